"""Comparing the scales of OCP MX with the reference, for every largest magnitude that a block can have."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType

import torch
from torch import Tensor

from fpsim import reference
from fpsim.formats import NAMED_FORMATS, WHOLE_FORMATS, parse_element
from fpsim.rounding.ops import SOURCE
from fpsim.scaling.rules import E8M0_BIAS, NAN_MARK
from fpsim.scaling.scale import MX_RULES, parse_scale
from fpsim.verify.verdict import MAX_EXAMPLES, Mismatch, Verdict

#: The number of magnitudes of float32, NaNs included.
MAGNITUDES = 1 << 31
_CHUNK = 1 << 17
#: The formats of which `verify_scales` verifies the scales if it is given none: the elements of OCP MX and of block
#: floating point, the named formats that float32 carries, and two integers.
SCALED_FORMATS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(text.partition("/")[0] for text in WHOLE_FORMATS.values() if "/mx" in text),
            *(name for name in NAMED_FORMATS if name not in ("fp64", "e8m0fnu")),
            "int8",
            "int4",
        ]
    )
)


def verify_scale(
    format: str,
    scale: str,
    *,
    exhaustive: bool = False,
    samples: int = 1 << 20,
    seed: int = 0,
    compiled: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Compare the E8M0 codes of a scale with those of the reference, for float32 magnitudes.

    The code is a function of the largest magnitude of a block alone. The reference computes the magnitudes at which it
    changes (`fpsim.reference.scale_steps`).

    Args:
        format: the format of the elements: a float or an integer format.
        scale: a scale whose factors are powers of two: ``mx:32:rceil``.
        exhaustive: whether to compare all 2**31 magnitudes.
        samples: else the number of random magnitudes, besides those around each change.
        seed: of the random magnitudes.
        compiled: whether Inductor compiles the rule; else it runs eagerly.
        progress: called with the number of magnitudes that are done, and of all.

    Returns:
        A verdict. Its ``rounding`` is the name of the scale, and its ``overflow`` is ``scale``. Examples show the
        magnitude and the scales, as float32 numbers.

    Raises:
        ValueError: there is no such format or scale, or its factors are no E8M0 codes.
    """
    parsed, element = parse_scale(scale), parse_element(format)
    if parsed is None or parsed.rule not in MX_RULES:
        raise ValueError(f"scale {scale!r} has no E8M0 codes: use mx:32:rceil, floor, ceil or even")
    rule, name = parsed.rule, element.name  # Dynamo cannot read the name of a format
    steps = reference.scale_steps(format, rule)  # type: ignore[arg-type]
    firsts, codes = (torch.tensor(part, dtype=torch.int32) for part in zip(*steps, strict=True))

    def codes_of(magnitudes: Tensor) -> Tensor:
        amax = magnitudes.view(torch.float32)
        multiplier = torch.ops.fpsim.mx_multiplier.default(amax, name, rule, SOURCE)
        code = 2 * E8M0_BIAS - (multiplier.view(torch.int32) >> 23)
        return torch.where(multiplier == NAN_MARK, 2 * E8M0_BIAS + 1, code)

    start, cpu_start = time.perf_counter(), time.process_time()
    # Dynamo limits the compilations of one code object, and those of other formats count.
    own = FunctionType(codes_of.__code__.replace(), codes_of.__globals__, closure=codes_of.__closure__)
    got_of = torch.compile(own, dynamic=True, fullgraph=True) if compiled else codes_of
    done, mismatches = 0, 0
    examples: list[Mismatch] = []
    path = "compiled" if compiled else "eager"
    for magnitudes in _chunks(firsts, samples, seed, exhaustive):
        got = got_of(magnitudes)
        want = _of_range(magnitudes, firsts, codes) if exhaustive else _of_any(magnitudes, firsts, codes)
        wrong = (got != want).nonzero().flatten()
        mismatches += wrong.numel()
        for i in wrong[: MAX_EXAMPLES - len(examples)].tolist():
            bits = (f"{int(magnitudes[i]):#010x}", _float32_of(int(got[i])), _float32_of(int(want[i])))
            examples.append(Mismatch(path, *bits))
        done += magnitudes.numel()
        if progress is not None:
            progress(done, MAGNITUDES if exhaustive else done)
    return Verdict(
        format=name,
        rounding=str(parsed),
        overflow="scale",
        carrier="float32",
        device="cpu",
        paths=(path,),
        exhaustive=exhaustive,
        inputs=done,
        mismatches=mismatches,
        examples=tuple(examples),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
    )


def _of_any(magnitudes: Tensor, firsts: Tensor, codes: Tensor) -> Tensor:
    """The codes of any magnitudes; ``codes`` change at ``firsts``."""
    return codes[torch.searchsorted(firsts, magnitudes, right=True) - 1]


def _of_range(magnitudes: Tensor, firsts: Tensor, codes: Tensor) -> Tensor:
    """`_of_any` for magnitudes that follow one another: far faster. It is one code if all of them have it."""
    first, last = _of_any(magnitudes[[0, -1]], firsts, codes)
    return first.expand(len(magnitudes)) if first == last else _of_any(magnitudes, firsts, codes)


def _chunks(firsts: Tensor, samples: int, seed: int, exhaustive: bool) -> Iterator[Tensor]:
    """Bits of magnitudes, int32: all of them, or those around ``firsts`` and random ones."""
    if not exhaustive:
        around = (firsts.long()[:, None] + torch.arange(-2, 3)).clamp(0, MAGNITUDES - 1).flatten()
        drawn = torch.randint(MAGNITUDES, (samples,), generator=torch.Generator().manual_seed(seed))
        yield torch.cat([around, drawn]).to(torch.int32)
        return
    part = torch.arange(_CHUNK, dtype=torch.int32)
    for first in range(0, MAGNITUDES, _CHUNK):
        yield part + first


def _float32_of(code: int) -> str:
    """The bits of the scale with an E8M0 code, as a float32 number."""
    if code == 2 * E8M0_BIAS + 1:
        return "0x7fc00000"
    return f"{code << 23 if code else 1 << 22:#010x}"


def verify_scales(formats: Sequence[str], scale: str, paths: Sequence[str], **options: object) -> Iterator[Verdict]:
    """`verify_scale` for several formats, each on the paths ``eager`` and ``compiled`` that are given.

    Args:
        formats: the formats; none stands for all of `SCALED_FORMATS`.
        scale: a scale, or ``all`` for every rule.
        paths: the paths.
        options: the other arguments of `verify_scale`.
    """
    scales = [f"mx:32:{rule}" for rule in MX_RULES] if scale == "all" else [scale]
    for format in formats or SCALED_FORMATS:
        for each in scales:
            for path in paths:
                yield verify_scale(format, each, compiled=path == "compiled", **options)  # type: ignore[arg-type]
