"""Codebooks as frozen values: formats whose values are any list of numbers, such as NF4."""

from __future__ import annotations

import itertools
import math
import reprlib
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Literal, get_args

Ties = Literal["down", "up", "even", "zero", "away"]
TIES: tuple[str, ...] = get_args(Ties)


@dataclass(frozen=True)
class CodebookFormat:
    """A format with the given values. A number becomes the nearest value.

    Attributes:
        values: 2 to 65536 finite float32 numbers in ascending order.
        ties: the value for a number halfway between two: ``down`` the smaller one (as bitsandbytes, which compares with
            a strict ``>``), ``up`` the larger one, ``even`` the one with the even index, ``zero`` the one nearer to
            zero, ``away`` the other one.
        name: a name for people; empty for the name ``codebook:ties:v0,v1,...`` that `parse_codebook` reads. Equality
            ignores it.
        codes: the code of each value; empty for its index.

    Raises:
        TypeError: a value is no number.
        ValueError: the values are too few or too many, not finite, not float32 or not in ascending order, the rule for
            ties is unknown, or the codes are too large or not distinct.

    Source of the tables: Dettmers et al., QLoRA (arXiv 2305.14314), appendix E (NF4); bitsandbytes (FP4 and the dynamic
    8-bit maps); torchao's 4-bit optimizers, after Li et al. (arXiv 2309.01507) (the dynamic and the linear 4-bit map).
    """

    values: tuple[float, ...]
    ties: Ties = "down"
    name: str = field(default="", compare=False)
    codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        try:
            values = tuple(float(value) for value in self.values)
        except (TypeError, ValueError):
            raise TypeError(f"the values of a codebook are numbers, got {reprlib.repr(self.values)}") from None
        object.__setattr__(self, "values", values)
        if not 2 <= len(values) <= 1 << 16:
            raise ValueError(f"a codebook has 2 to 65536 values, got {len(values)}")
        if not all(map(math.isfinite, values)) or any(_float32(value) != value for value in values):
            wrong = next(v for v in values if not math.isfinite(v) or _float32(v) != v)
            raise ValueError(f"the values of a codebook are finite float32 numbers, got {wrong!r}: round it to float32")
        if any(a >= b for a, b in itertools.pairwise(values)):
            raise ValueError(f"the values of a codebook are in ascending order, got {reprlib.repr(values)}: sort them")
        if max(map(abs, values)) == 0 or max(map(abs, values)) < 2.0**-60:
            raise ValueError("the largest magnitude in a codebook is at least 2**-60")
        if self.ties not in TIES:
            raise ValueError(f"unknown rule for ties {reprlib.repr(self.ties)}: use one of {', '.join(TIES)}")
        distinct = {code for code in self.codes if 0 <= code < 1 << self.bits}
        if self.codes and len(distinct) != len(values):
            raise ValueError(f"a codebook has a code for each value, distinct and below {1 << self.bits}")
        if not self.name:
            text = ",".join(repr(value) for value in values)
            order = ":codes=" + ",".join(map(str, self.codes)) if self.codes else ""
            object.__setattr__(self, "name", f"codebook:{self.ties}:{text}{order}")

    @property
    def bits(self) -> int:
        """The width of a code in bits."""
        return (len(self.values) - 1).bit_length()

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return max(map(abs, self.values))

    def thresholds(self, double: bool = False) -> tuple[float, ...]:
        """For each value but the first, the smallest number that becomes this value or a larger one.

        Args:
            double: whether the numbers are those of float64 rather than of float32.
        """
        return _thresholds(self, double)

    def threshold(self, index: int, double: bool) -> float:
        """The smallest number that becomes a value behind the one at ``index``: see `thresholds`."""
        low, high = self.values[index], self.values[index + 1]
        middle = (Fraction(low) + Fraction(high)) / 2
        takes_high = {
            "down": False,
            "up": True,
            "even": index % 2 == 1,
            "zero": abs(high) < abs(low),
            "away": abs(high) > abs(low),
        }[self.ties]
        near, step = (float, _next_float64) if double else (lambda value: _float32(float(value)), _next_float32)
        candidate = near(middle)
        while Fraction(candidate) > middle or (takes_high and Fraction(candidate) == middle):
            candidate = step(candidate, -1)
        while Fraction(candidate) < middle or (not takes_high and Fraction(candidate) == middle):
            candidate = step(candidate, 1)
        return candidate


@cache
def _thresholds(book: CodebookFormat, double: bool) -> tuple[float, ...]:
    return tuple(book.threshold(index, double) for index in range(len(book.values) - 1))


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def _next_float64(value: float, step: int) -> float:
    """The next float64 number above (``step`` 1) or below (-1) a finite one."""
    return math.nextafter(value, math.copysign(math.inf, step))


def _next_float32(value: float, step: int) -> float:
    """The next float32 number above (``step`` 1) or below (-1) a finite one."""
    bits = struct.unpack("<i", struct.pack("<f", value))[0]
    order = bits if bits >= 0 else -(bits & 0x7FFFFFFF)  # codes in the order of the values, one zero
    order += step
    return float(struct.unpack("<f", struct.pack("<I", order if order >= 0 else 0x80000000 - order))[0])


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: The codes of bitsandbytes' FP4: a sign bit and three bits of magnitude. Code 8, -0, is not used.
_FP4 = {
    sign * _float32(magnitude): code + (8 if sign < 0 else 0)
    for sign in (1, -1)
    for code, magnitude in enumerate((0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4))
    if magnitude or sign > 0
}


def _dynamic_map(decades: int, signed: bool) -> tuple[float, ...]:
    """The values of a dynamic map, computed in float32 as ``create_dynamic_map`` of bitsandbytes and torchao does.

    Decade i splits the numbers from 0.1 to 1 into ``2**i`` equal parts (``2**(i+1)`` without signs). The middle of each
    part, times ``10**(i - decades + 1)``, is a value. So are 0 and 1. Float64 holds every intermediate result exactly.
    """
    start, values = _float32(0.1), {0.0, 1.0}
    for decade in range(decades):
        parts = 2 ** (decade + (not signed))
        step, half = _float32(_float32(1 - start) / parts), (parts + 1) // 2
        ends = [_float32(start + step * i if i < half else 1 - step * (parts - i)) for i in range(parts + 1)]
        for low, high in itertools.pairwise(ends):
            value = _float32(_float32(10.0 ** (decade - decades + 1)) * (_float32(low + high) / 2))
            values |= {value, -value} if signed else {value}
    return tuple(sorted(values))


#: The codebooks that have names.
CODEBOOKS: dict[str, CodebookFormat] = {
    "nf4": CodebookFormat(_NF4, "down", "nf4"),
    "fp4_bnb": CodebookFormat(tuple(sorted(_FP4)), "zero", "fp4_bnb", tuple(_FP4[v] for v in sorted(_FP4))),
    "dynamic8": CodebookFormat(_dynamic_map(7, signed=True), "down", "dynamic8"),
    "dynamic8:unsigned": CodebookFormat(_dynamic_map(7, signed=False), "down", "dynamic8:unsigned"),
    "dynamic4": CodebookFormat(_dynamic_map(3, signed=True), "up", "dynamic4"),
    "linear4:unsigned": CodebookFormat(tuple(i / 16 for i in range(1, 17)), "up", "linear4:unsigned"),
}
#: The number of elements that share a scale, in the libraries that use a codebook.
GROUP_SIZES: dict[str, int] = {
    "nf4": 64, "fp4_bnb": 64, "dynamic8": 256, "dynamic8:unsigned": 256, "dynamic4": 128, "linear4:unsigned": 128,
}  # fmt: skip


def parse_codebook(name: str) -> CodebookFormat | None:
    """The codebook with this name (``nf4``, ``dynamic8``, ``codebook:down:-1,0,0.5,1``); None if it is none.

    Raises:
        ValueError: the name begins with ``codebook:``, but the rest gives no codebook.
    """
    text = name.strip().lower()
    if text in CODEBOOKS:
        return CODEBOOKS[text]
    if not text.startswith("codebook:"):
        return None
    ties, _, rest = text.removeprefix("codebook:").partition(":")
    numbers, _, order = rest.partition(":codes=")
    try:
        values = tuple(float(number) for number in numbers.split(","))
        codes = tuple(int(code) for code in order.split(",")) if order else ()
    except ValueError:
        raise ValueError(f"no such codebook {reprlib.repr(name)}: write codebook:down:-1,0,0.5,1") from None
    return CodebookFormat(values, ties, codes=codes)  # type: ignore[arg-type]
