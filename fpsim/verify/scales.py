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
#: Magnitudes that one call compares: compiled code needs no memory for them, eager code 16 MiB at a time.
_PIECE = 1 << 22
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
    changes (`fpsim.reference.scale_steps`). Between these, one loop makes the magnitudes, applies the rule and counts
    the wrong codes.

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

    def count_wrong(first: Tensor, length: int, want: Tensor) -> Tensor:
        magnitudes = torch.arange(length, dtype=torch.int32) + first
        return (codes_of(magnitudes) != want).sum(dtype=torch.int32)

    start, cpu_start = time.perf_counter(), time.process_time()
    got_of, wrong_among = (_compiled(codes_of), _compiled(count_wrong)) if compiled else (codes_of, count_wrong)
    done, mismatches = 0, 0
    examples: list[Mismatch] = []
    path = "compiled" if compiled else "eager"

    def compare(magnitudes: Tensor) -> int:
        got, want = got_of(magnitudes), codes[torch.searchsorted(firsts, magnitudes, right=True) - 1]
        wrong = (got != want).nonzero().flatten()
        for i in wrong[: MAX_EXAMPLES - len(examples)].tolist():
            bits = (f"{int(magnitudes[i]):#010x}", _float32_of(int(got[i])), _float32_of(int(want[i])))
            examples.append(Mismatch(path, *bits))
        return wrong.numel()

    if exhaustive:
        for first, end, want in _pieces(firsts, codes):
            wrong = int(wrong_among(torch.tensor(first, dtype=torch.int32), end - first, want))
            if wrong and len(examples) < MAX_EXAMPLES:
                compare(torch.arange(first, end, dtype=torch.int32))
            mismatches, done = mismatches + wrong, end
            if progress is not None:
                progress(done, MAGNITUDES)
    else:
        magnitudes = _sample(firsts, samples, seed)
        mismatches, done = compare(magnitudes), magnitudes.numel()
        if progress is not None:
            progress(done, done)
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


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` in a code object of its own: Dynamo limits the compilations of one, and other formats count."""
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _pieces(firsts: Tensor, codes: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """All magnitudes in pieces of one code: the first one, the one after the last, and the code."""
    ends = [*firsts[1:].tolist(), MAGNITUDES]
    for first, end, code in zip(firsts.tolist(), ends, codes, strict=True):
        for start in range(first, end, _PIECE):
            yield start, min(start + _PIECE, end), code


def _sample(firsts: Tensor, samples: int, seed: int) -> Tensor:
    """Bits of magnitudes, int32: those around ``firsts`` and random ones."""
    around = (firsts.long()[:, None] + torch.arange(-2, 3)).clamp(0, MAGNITUDES - 1).flatten()
    drawn = torch.randint(MAGNITUDES, (samples,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([around, drawn]).to(torch.int32)


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
