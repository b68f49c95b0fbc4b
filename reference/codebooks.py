"""Rounding to the nearest value of any list, and the lists of bitsandbytes: NF4, its FP4 and its dynamic 8-bit maps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Literal, get_args

from .arithmetic import add, div, fma, mul, sub
from .rounding import round
from .values import INFINITIES, NAN, Number, Value, as_value, is_negative, rational

Ties = Literal["down", "up", "even", "zero", "away"]


@dataclass(frozen=True, slots=True)
class Codebook:
    """Values in increasing order, and where a number half-way between two neighbours goes. The code is the index.

    ``ties`` is ``"down"`` (to the smaller value), ``"up"`` (to the larger one), ``"even"`` (to the one whose index is
    even), ``"zero"`` (to the one of smaller magnitude) or ``"away"`` (to the one of larger magnitude). Of two equal
    magnitudes the last two take the smaller value.

    Raises:
        ValueError: the values do not increase, are fewer than two, or not finite; ``ties`` is unknown.
    """

    values: tuple[Fraction, ...]
    ties: Ties = "down"

    def __post_init__(self) -> None:
        values = tuple(rational(as_value(value)) for value in self.values)
        if len(values) < 2 or any(left >= right for left, right in pairwise(values)):
            raise ValueError(f"the values of a codebook increase, and are two or more, got {self.values}")
        if self.ties not in get_args(Ties):
            raise ValueError(f"unknown ties {self.ties!r}: use one of {', '.join(get_args(Ties))}")
        object.__setattr__(self, "values", values)

    @property
    def largest(self) -> Fraction:
        """The largest magnitude."""
        return max(abs(value) for value in self.values)


def round_codebook(value: Number, codebook: str | Codebook) -> Value:
    """The value of ``codebook`` that is nearest to ``value``. The middle of two neighbours is exact.

    A number beyond the ends, infinities included, becomes the end on its side. A zero result is +0. NaN stays NaN.

    Arguments:
        value: an int, Fraction, float (taken exactly) or `Special`.
        codebook: one of `CODEBOOKS` or a `Codebook`.

    Raises:
        ValueError: no such codebook.
        TypeError: ``value`` is no number.

    >>> [str(round_codebook(1.5, Codebook((0, 1, 2), ties))) for ties in ("down", "even", "zero")]
    ['1', '2', '1']
    """
    book = parse_codebook(codebook) if isinstance(codebook, str) else codebook
    value = as_value(value)
    if value is NAN:
        return NAN
    if value in INFINITIES:
        return book.values[0 if is_negative(value) else -1]
    exact = rational(value)
    above = bisect_left(book.values, exact)
    if above in (0, len(book.values)) or book.values[above] == exact:
        return book.values[min(above, len(book.values) - 1)]
    low, high = book.values[above - 1], book.values[above]
    if exact - low != high - exact:
        return low if exact - low < high - exact else high
    match book.ties:
        case "down":
            return low
        case "even":
            return low if above % 2 == 1 else high
        case "up":
            return high
        case "zero":
            return low if abs(low) <= abs(high) else high
        case "away":
            return low if abs(low) >= abs(high) else high


def parse_codebook(name: str) -> Codebook:
    """The codebook of `CODEBOOKS` that ``name`` denotes, or that ``codebook:TIES:VALUE,VALUE,...`` writes out.

    Raises:
        ValueError: there is none.
    """
    if name.startswith("codebook:"):
        _, ties, values = name.split(":")
        return Codebook(tuple(Fraction(value) for value in values.split(",")), ties)  # type: ignore[arg-type]
    if name not in CODEBOOKS:
        raise ValueError(f"unknown codebook {name!r}: use one of {', '.join(CODEBOOKS)}, or a Codebook")
    return CODEBOOKS[name]


def _float32(value: Number) -> Fraction:
    return rational(round(value, "fp32"))


@cache
def dynamic_map(signed: bool, decades: int = 7, ties: Ties = "down") -> Codebook:
    """The dynamic map of bitsandbytes (``create_dynamic_map``), by which its 8-bit optimizers store their states.

    Decade i of 0 to ``decades`` - 1 splits the numbers from 0.1 to 1 evenly, into 2**i parts (2**(i + 1) if unsigned).
    The middle of each part times 10**(i - decades + 1) is a value, and its negative too if signed. 0 and 1 are values.
    Every step rounds to float32, as it does there. `torch.linspace` counts from the nearer end, with a fused
    multiply-add. The map with signs and 3 decades is that of torchao's 4-bit optimizers, which send ties upwards.

    Source: T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561;
    bitsandbytes.functional.create_dynamic_map; torchao.optim.quant_utils.

    >>> len(dynamic_map(True).values), float(dynamic_map(True).values[0])
    (256, -0.992968738079071)
    """
    values = {Fraction(0), Fraction(1)}
    for decade in range(decades):
        ends = _linspace(2 ** (decade + (not signed)))
        power = _float32(Fraction(1, 10 ** (decades - 1 - decade)))
        for left, right in pairwise(ends):
            middle = div(add(left, right, "fp32"), 2, "fp32")
            value = rational(mul(power, middle, "fp32"))
            values |= {value, -value} if signed else {value}
    return Codebook(tuple(sorted(values)), ties)


def _linspace(parts: int) -> list[Value]:
    """The ends of ``parts`` even parts of the numbers from 0.1 to 1, as `torch.linspace` computes them in float32."""
    start, end = _float32(Fraction(1, 10)), Fraction(1)
    step = div(sub(end, start, "fp32"), parts, "fp32")
    half = (parts + 1) // 2
    return [fma(step, i, start, "fp32") if i < half else fma(step, i - parts, end, "fp32") for i in range(parts + 1)]


def _floats(numbers: Iterable[float]) -> tuple[Fraction, ...]:
    return tuple(Fraction(number) for number in numbers)


#: NF4 of QLoRA (arXiv 2305.14314), the float32 numbers of bitsandbytes' table. They do not follow exactly from the
#: quantiles of the normal distribution from which they were once computed.
NF4 = Codebook(
    _floats(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    )
)

_TWELFTHS = (Fraction(1, 16), Fraction(2), Fraction(3), Fraction(4), Fraction(6), Fraction(8), Fraction(12))
_FP4_MAGNITUDES = [_float32(twelfths / 12) for twelfths in _TWELFTHS]

#: The FP4 of bitsandbytes, which is not the e2m1 of OCP MX: 0 and +-{1/16, 2, 3, 4, 6, 8, 12} / 12, in float32. Its
#: CUDA kernel compares magnitudes with a strict ``>``.
FP4_BNB = Codebook((*(-value for value in reversed(_FP4_MAGNITUDES)), Fraction(0), *_FP4_MAGNITUDES), "zero")

#: The codebooks that have names.
CODEBOOKS = {
    "nf4": NF4,
    "fp4_bnb": FP4_BNB,
    "dynamic8": dynamic_map(True),
    "dynamic8:unsigned": dynamic_map(False),
    "dynamic4": dynamic_map(True, 3, "up"),
    "linear4:unsigned": Codebook(tuple(Fraction(i, 16) for i in range(1, 17)), "up"),  # it has no zero
}
