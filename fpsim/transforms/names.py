"""The names of transforms."""

from __future__ import annotations

import reprlib

from fpsim.suggestions import did_you_mean, first_words
from fpsim.transforms.chain import Chain
from fpsim.transforms.hadamard import Hadamard
from fpsim.transforms.permutation import ORDERS, Permutation
from fpsim.transforms.power_map import PowerMap
from fpsim.transforms.root import Root
from fpsim.transforms.smoothing import Smoothing
from fpsim.transforms.transform import Transform

#: What transforms may be called, for messages: those of products, and those of casts.
NAMES_OF_PRODUCTS = (
    "hadamard:16[:te|:seed=N|:+-...][:bf16][:kept]", "hadamard:full",
    "smooth[:alpha=0.5|:factors=1,2,...][:power_of_two]", "permute:amax[:second]", "permute:norm[:second]",
    "permute:order=1,0,...", "smooth/hadamard:16 (one after the other)",
)  # fmt: skip
NAMES_OF_CASTS = ("hadamard:16[:te|:seed=N|:+-...][:bf16]", "expand[:kernel][:clamp]", "sqrt")


def parse_transform(name: str | Transform | None) -> Transform | None:
    """The transform that ``name`` denotes; None for None.

    Raises:
        ValueError: there is no such transform. The message lists the valid names.

    >>> parse_transform("hadamard:16:te")
    Hadamard(size=16, signs='te', bf16=False, of_kept_axis=False)
    >>> str(parse_transform("smooth/hadamard:16"))
    'smooth:alpha=0.5/hadamard:16'
    """
    if name is None or isinstance(name, Transform):
        return name
    transform = _parse(name) if isinstance(name, str) else None
    if transform is None:
        valid = dict.fromkeys((*NAMES_OF_PRODUCTS, *NAMES_OF_CASTS))
        word, words = str(name).partition(":")[0], first_words(valid)
        hint = "" if word in words else did_you_mean(word, words)
        raise ValueError(f"unknown transform {reprlib.repr(name)}{hint}: use one of {', '.join(valid)}, or None")
    return transform


def is_transform(name: str) -> bool:
    """Whether ``name`` begins like a transform, so that `parse_transform` either reads it or says why it cannot."""
    return name.partition(":")[0] in _PARSERS


def _parse(name: str) -> Transform | None:
    parts = [each for each in map(_parse_one, name.split("/")) if each is not None]
    if len(parts) <= name.count("/"):
        return None
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _parse_one(name: str) -> Transform | None:
    kind, *options = name.strip().lower().split(":")
    if len(set(options)) < len(options) or kind not in _PARSERS:
        return None
    return _PARSERS[kind](options)


def _hadamard(options: list[str]) -> Hadamard | None:
    if not options:
        return None
    size, *options = options
    if size != "full" and not (size.isascii() and size.isdigit()):
        return None
    kept = options[-1:] == ["kept"]
    options = options[: len(options) - kept]
    bf16 = options[-1:] == ["bf16"]
    signs = options[: len(options) - bf16]
    if len(signs) > 1:
        return None
    return Hadamard(None if size == "full" else int(size), signs[0] if signs else "", bf16, kept)


def _smoothing(options: list[str]) -> Smoothing | None:
    power_of_two = options[-1:] == ["power_of_two"]
    own = options[: len(options) - power_of_two]
    try:
        match [option.split("=") for option in own]:
            case []:
                return Smoothing(power_of_two=power_of_two)
            case [["alpha", alpha]]:
                return Smoothing(float(alpha), power_of_two=power_of_two)
            case [["factors", factors]]:
                return Smoothing(None, tuple(map(float, factors.split(","))), power_of_two)
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
    return None


def _permutation(options: list[str]) -> Permutation | None:
    match options:
        case [by] if by in ORDERS:
            return Permutation(by)  # type: ignore[arg-type]
        case [by, "first" | "second" as operand] if by in ORDERS:
            return Permutation(by, operand)  # type: ignore[arg-type]
        case [order] if order.startswith("order="):
            try:
                return Permutation(None, order=tuple(map(int, order.removeprefix("order=").split(","))))
            except ValueError as error:
                if "invalid literal" not in str(error):
                    raise
    return None


def _power_map(options: list[str]) -> PowerMap | None:
    if set(options) - {"kernel", "clamp"}:
        return None
    return PowerMap("kernel" if "kernel" in options else "nonzero", "clamp" in options)


def _root(options: list[str]) -> Root | None:
    return None if options else Root()


_PARSERS = {"hadamard": _hadamard, "smooth": _smoothing, "permute": _permutation, "expand": _power_map, "sqrt": _root}
