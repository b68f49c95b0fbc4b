"""Statistics of rounding: pure functions of the values of a tensor before and after.

Counts are read from the bits of the carrier. They are exact integers, which neither flushing of subnormals nor inexact
logarithms can falsify. Norms are summed in float64. `Statistics` of several tensors add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fpsim.casts import Cast
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.scaling.rules import E8M0_BIAS
from fpsim.scaling.scale import AFFINE_RULES, MX_RULES, NV_RULES, Scale
from fpsim.scaling.steps import SMALLEST_RATIO, scaled_groups

#: Pairs of an exponent and a number of elements, ascending. The exponent of x is floor(log2(abs(x))); zeros have none.
Histogram = tuple[tuple[int, int], ...]

#: The names of the counts in `Statistics`. Each is a number of elements.
COUNTS = ("zeros", "underflows", "subnormals", "saturations", "overflows", "infinities", "nans")

#: The names of the counts of groups of elements that share a scale.
GROUP_COUNTS = ("scales", "clipped_groups", "zero_groups", "lowest_scales", "highest_scales")

#: For each statistic the limit beyond which it is doubtful, and the limit beyond which it is bad. Counts are shares of
#: all elements, and ``sqnr`` is in dB and gets worse downwards.
LIMITS: dict[str, tuple[float, float]] = {
    "underflows": (0.01, 0.1),
    "subnormals": (0.1, 0.5),
    "saturations": (0.0, 0.001),
    "overflows": (0.0, 0.0),
    "infinities": (0.0, 0.0),
    "nans": (0.0, 0.0),
    "sqnr": (20.0, 10.0),
    "relative_error": (0.1, 0.3),
}

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}

# How many elements each thread processes at a time.
_CHUNK = 1 << 16


def severity(name: str, value: float) -> int:
    """How bad ``value`` of the statistic ``name`` is: 0, 1 (doubtful) or 2 (bad), by `LIMITS`."""
    doubtful, bad = LIMITS.get(name, (math.inf, math.inf))
    if math.isnan(value):
        return 2
    if doubtful > bad:
        return int(value < doubtful) + int(value < bad)
    return int(value > doubtful) + int(value > bad)


@dataclass(frozen=True)
class Statistics:
    """Statistics of ``elements`` numbers (inputs) that were rounded (to results).

    Attributes:
        elements: the number of inputs.
        zeros: inputs that are zero.
        underflows: nonzero inputs that became zero.
        subnormals: results that are subnormal numbers of the format.
        saturations: finite inputs beyond the largest finite value with a finite result; for a format without sign
            negative inputs too.
        overflows: finite inputs that became an infinity or NaN.
        infinities: inputs that are infinite.
        nans: inputs that are NaN.
        amax: the largest magnitude of a finite input; 0 if there is none.
        signal: the Euclidean norm of the finite inputs.
        noise: the Euclidean norm of the changes of the finite inputs; infinite if one of them overflowed.
        exponents: histogram of the finite nonzero inputs.
        rounded_exponents: histogram of the finite nonzero results.
        scales: the groups of elements that share a scale; 0 without a scale, and for one scale per tensor by
            ``power_of_two``.
        clipped_groups: groups with a finite input beyond the largest finite value, after scaling.
        zero_groups: groups of zeros.
        lowest_scales, highest_scales: scales at an end of their range, where they no longer follow the numbers: E8M0
            codes 0 and 254, NVFP4's block scales 0 and 448, ratios of 2^-100. Groups of zeros are not counted.
        scale_exponents: histogram of the finite nonzero scales.
    """

    elements: int = 0
    zeros: int = 0
    underflows: int = 0
    subnormals: int = 0
    saturations: int = 0
    overflows: int = 0
    infinities: int = 0
    nans: int = 0
    amax: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    exponents: Histogram = ()
    rounded_exponents: Histogram = ()
    scales: int = 0
    clipped_groups: int = 0
    zero_groups: int = 0
    lowest_scales: int = 0
    highest_scales: int = 0
    scale_exponents: Histogram = ()

    @property
    def sqnr(self) -> float:
        """The signal-to-quantization-noise ratio of the finite inputs in dB, ``10 log10(sum x^2 / sum (x - q)^2)``.

        It is infinite if no input changed, and minus infinity if a finite input overflowed or if only zeros changed.
        """
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or math.isinf(self.noise):
            return -math.inf
        return 20 * (math.log10(self.signal) - math.log10(self.noise))

    def share(self, name: str) -> float:
        """The count ``name`` (one of `COUNTS`) as a share of all elements; 0 if there are none."""
        if name not in COUNTS:
            raise ValueError(f"unknown count {name!r}: use one of {', '.join(COUNTS)}")
        return getattr(self, name) / self.elements if self.elements else 0.0

    def repeated(self, times: int) -> Statistics:
        """The statistics of ``times`` copies of the same numbers."""
        counts = {name: times * getattr(self, name) for name in ("elements", *COUNTS)}
        histograms = {
            name: tuple((exponent, times * count) for exponent, count in getattr(self, name))
            for name in ("exponents", "rounded_exponents")
        }
        root = math.sqrt(times)
        return replace(self, **counts, **histograms, signal=root * self.signal, noise=root * self.noise)  # type: ignore[arg-type]

    def __add__(self, other: Statistics) -> Statistics:
        return merge([self, other])


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of all numbers of ``parts`` together."""
    parts = list(parts)
    counts = {name: sum(getattr(part, name) for part in parts) for name in ("elements", *COUNTS, *GROUP_COUNTS)}
    return Statistics(
        **counts,
        amax=max((part.amax for part in parts), default=0.0),
        signal=math.hypot(*(part.signal for part in parts)),
        noise=math.hypot(*(part.noise for part in parts)),
        exponents=_added(part.exponents for part in parts),
        rounded_exponents=_added(part.rounded_exponents for part in parts),
        scale_exponents=_added(part.scale_exponents for part in parts),
    )


def _added(histograms: Iterable[Histogram]) -> Histogram:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(dict(histogram))
    return tuple(sorted(total.items()))


def measure(x: Tensor, rounded: Tensor, format: FloatFormat | None = None) -> Statistics:
    """The statistics of rounding ``x``.

    Args:
        x: the inputs: float64, float32, bfloat16 or float16, any shape and strides.
        rounded: the results, values of ``format``, of the same shape and dtype.
        format: None stands for the format of the dtype of ``x``.

    Raises:
        TypeError: a dtype that is no carrier, or different dtypes.
        ValueError: different shapes, or a format with values that the dtype lacks.
    """
    if x.dtype != rounded.dtype:
        raise TypeError(f"values before and after rounding differ in dtype: {x.dtype} and {rounded.dtype}")
    if x.shape != rounded.shape:
        raise ValueError(f"values before and after rounding differ in shape: {(*x.shape,)} and {(*rounded.shape,)}")
    format = format or CARRIERS.get(x.dtype) or FloatFormat(8, 23)
    check_carrier(x.dtype, format)
    same = rounded is x
    x, rounded, times = _flat(x.detach(), rounded.detach())
    size = piece_size(x.device)
    pieces = zip(x.split(size), x.split(size) if same else rounded.split(size), strict=True)
    return merge(_measure_piece(a, a if same else b, format) for a, b in pieces).repeated(times)


def measure_groups(x: Tensor, cast: Cast, axes: Sequence[int]) -> dict[str, Any]:
    """The counts of groups (`GROUP_COUNTS`) and the histogram of scales of ``x``, which has elements.

    Args:
        x: the inputs.
        cast: a cast whose scales are not ``power_of_two``.
        axes: the axes along which rows and blocks lie.
    """
    assert cast.scale is not None, "the cast has a scale"
    scaled = scaled_groups(x.detach(), cast.format, cast.scale, list(axes))
    magnitudes = scaled.groups.values.double().abs()
    finite = torch.where(magnitudes.isfinite(), magnitudes, 0.0)
    amax = finite.amax(scaled.groups.axes, keepdim=True)
    is_zero = magnitudes.amax(scaled.groups.axes, keepdim=True) == 0
    lowest, highest = _ends_of_scales(cast.scale)
    counted = scaled.scales[scaled.scales.isfinite() & (scaled.scales > 0)]
    exponents, counts = torch.unique(torch.frexp(counted)[1] - 1, return_counts=True)
    return {
        "scales": scaled.scales.numel(),
        "clipped_groups": 0 if cast.scale.rule in AFFINE_RULES else _count(amax * scaled.factors > cast.format.max),
        "zero_groups": _count(is_zero),
        "lowest_scales": _count((scaled.scales == lowest) & ~is_zero),
        "highest_scales": _count((scaled.scales == highest) & ~is_zero),
        "scale_exponents": tuple(zip(exponents.tolist(), counts.tolist(), strict=True)),
    }


def _ends_of_scales(scale: Scale) -> tuple[float, float]:
    if scale.rule in MX_RULES:
        return 2.0**-E8M0_BIAS, 2.0**E8M0_BIAS
    return (0.0, 448.0) if scale.rule in NV_RULES else (SMALLEST_RATIO, math.inf)


def piece_size(device: torch.device) -> int:
    """How many elements to process at a time, so that temporaries stay in the caches of a processor."""
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else 1 << 28


def relative_error(error: float, reference: float) -> float:
    """``error / reference``, the ratio of two norms: 0 if the error is zero, infinite if only the reference is."""
    if error == 0:
        return 0.0
    return error / reference if reference else math.copysign(math.inf, error)


def norm(values: Tensor) -> float:
    """The Euclidean norm of ``values``, summed in float64: infinite if one is infinite, NaN if one is NaN.

    Numbers whose squares float64 cannot hold are scaled by a power of two first.
    """
    values = values.double().flatten()
    plain = math.sqrt(float(torch.dot(values, values)))
    if 1e-140 < plain < 1e140:
        return plain
    peak = float(values.abs().max()) if values.numel() else 0.0
    if peak == 0 or not math.isfinite(peak):
        return peak
    exponent = math.frexp(peak)[1] - 1
    scaled = values / 2.0**exponent
    return math.ldexp(math.sqrt(float(torch.dot(scaled, scaled))), exponent)


def _flat(x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both tensors as vectors, in the order of ``x`` in memory, and how often each element occurs.

    The vectors hold every expanded element once, as memory does.
    """
    times = 1
    for dim, size in enumerate(x.shape):
        if size > 1 and x.stride(dim) == 0 and rounded.stride(dim) == 0:
            x, rounded, times = x.narrow(dim, 0, 1), rounded.narrow(dim, 0, 1), times * size
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1), rounded.permute(order).reshape(-1), times


def _measure_piece(x: Tensor, rounded: Tensor, format: FloatFormat) -> Statistics:
    before = _read(x)
    after = before if rounded is x else _read(rounded)
    counts = {
        "zeros": before.zeros,
        "underflows": after.zeros - _zeros_kept(before, after),
        "subnormals": sum(count for exponent, count in after.histogram if exponent < format.emin),
    }
    if before.specials or after.specials:
        is_finite = before.magnitude < before.infinity
        counts["overflows"] = _count(is_finite & (after.magnitude >= after.infinity))
        counts["infinities"] = _count(before.magnitude == before.infinity)
        counts["nans"] = before.specials - counts["infinities"]
        x, rounded = torch.where(is_finite, x, 0.0), torch.where(is_finite, rounded, 0.0)
    if before.amax > format.max or (not format.signed and bool((x < 0).any())):
        is_beyond = (x > format.max) | (x < (-format.max if format.signed else 0.0))
        counts["saturations"] = _count(is_beyond & (after.magnitude < after.infinity))
    exact = x.double()
    noise = 0.0 if after is before else norm(exact - rounded.double())
    return Statistics(
        elements=x.numel(),
        **counts,  # type: ignore[arg-type]
        amax=before.amax,
        signal=norm(exact),
        noise=math.inf if counts.get("overflows") else noise,
        exponents=before.histogram,
        rounded_exponents=after.histogram,
    )


@dataclass(frozen=True)
class _Reading:
    """Facts that are read from the bits of a tensor.

    Attributes:
        magnitude: the bits without the sign, as integers; their order is the order of magnitudes.
        infinity: the bits of infinity; greater magnitudes are NaNs.
        histogram: the histogram of the finite nonzero elements.
        zeros: how many elements are zero.
        specials: how many are infinite or NaN.
        amax: the largest finite magnitude, 0 if there is none.
    """

    magnitude: Tensor
    infinity: int
    histogram: Histogram
    zeros: int
    specials: int
    amax: float


def _read(x: Tensor) -> _Reading:
    carrier = CARRIERS[x.dtype]
    integer = _INTEGERS[x.element_size()]
    magnitude = x.view(integer) & torch.iinfo(integer).max
    fields = magnitude >> carrier.mantissa_bits
    by_field: list[int] = torch.bincount(fields, minlength=1 << carrier.exponent_bits).tolist()
    histogram = {field - carrier.bias: count for field, count in enumerate(by_field[:-1]) if field and count}
    zeros = magnitude.numel() - _count(magnitude) if by_field[0] else 0
    if by_field[0] > zeros:
        least = magnitude[fields == 0]
        # A subnormal number is an integer times a unit. The integer is exact in float64, and so is its exponent.
        _, exponents = torch.frexp(least[least != 0].double())
        values, occurrences = torch.unique(exponents, return_counts=True)
        unit = carrier.emin - carrier.mantissa_bits
        for value, count in zip(values.tolist(), occurrences.tolist(), strict=True):
            histogram[value - 1 + unit] = histogram.get(value - 1 + unit, 0) + count
    infinity = ((1 << carrier.exponent_bits) - 1) << carrier.mantissa_bits
    finite = magnitude[magnitude < infinity] if by_field[-1] else magnitude
    top = finite.max() if finite.numel() else magnitude.new_zeros(())
    return _Reading(
        magnitude, infinity, tuple(sorted(histogram.items())), zeros, by_field[-1], float(top.view(x.dtype))
    )


def _zeros_kept(before: _Reading, after: _Reading) -> int:
    if not before.zeros or not after.zeros:
        return 0
    return before.magnitude.numel() - _count(before.magnitude | after.magnitude)


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))
