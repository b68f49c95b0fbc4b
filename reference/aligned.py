"""One step of a matrix unit: products are shifted to a common exponent, cut, and added with the accumulator.

The units of NVIDIA and AMD do not add exact products. They align all terms of a step to the largest exponent among
them, keep a few bits below it, and round the sum once. `Aligned` is the description of such a unit.

Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
Science 7 (2021); P. Xie and others, MMA-Sim (package ``mmasim`` 2.1.1), which measured the units of both makers; the
recorded results of eight GPUs in the repository north-numerical-computing/MATLAB-tensor-core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .outcomes import Exact, Outcome, Target
from .values import INFINITIES, INFINITY, NAN, NEGATIVE_ZERO, Value, floor_log2, rational, scale_b, with_sign


@dataclass(frozen=True)
class Aligned:
    """The order of summation of a matrix unit, in steps of ``length`` products.

    In every step each term has an exponent: a product the sum of the exponents of its factors, before the product is
    normalised; the accumulator its own. Subnormal numbers have the least exponent of their format. Zeros have none. The
    largest exponent of a step, or ``floor`` if that is larger, is e. Each term is cut to a multiple of
    ``2**(e - fraction_bits)``, toward zero. The sum of what is left is exact. It is rounded once to the accumulator. A
    magnitude of ``2**(emax + 1)`` or more is infinite in every rounding direction, where emax is the largest exponent
    of the accumulator. The accumulator is +0 at first, and -0 never occurs.

    With ``late_bits`` the accumulator joins later, as in AMD's CDNA 3. The products alone are cut and added. Let e be
    the larger of the exponents of their sum, which is the largest exponent of a product, and of the accumulator. The
    sum of the products is rounded down (toward minus infinity) to a multiple of ``2**(e - late_bits - 1)``, and the
    accumulator to a multiple of ``2**(e - fraction_bits)``. The sum of both is rounded down to ``late_bits`` fractional
    bits, and then to the accumulator. A product of ``2**(emax + 1)`` or more is infinite before it is added.

    Attributes:
        length: the number of products in a step, 1 or more. The last step may have fewer.
        fraction_bits: the bits that are kept below the largest exponent, 0 or more.
        floor: the least value of e; None if there is none. A late accumulator of zero has its least exponent.
        late_bits: None, or the bits that are kept when the accumulator joins.
        lanes: with ``late_bits`` only, 2 if the products at even and at odd places are cut and added apart, and then
            both sums are rounded down to ``fraction_bits`` below the larger of their exponents. An accumulator below
            the last bit that is kept then counts as zero.

    Raises:
        ValueError: an attribute is out of range.
    """

    length: int
    fraction_bits: int
    floor: int | None = None
    late_bits: int | None = None
    lanes: int = 1
    group: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.fraction_bits < 0:
            raise ValueError(
                f"an aligned sum has a positive length and fraction bits from 0, got {self.length} and "
                f"{self.fraction_bits}: NVIDIA's Hopper has 32 and 13 for fp8"
            )
        if self.lanes not in (1, 2) or (self.lanes == 2 and self.late_bits is None):
            raise ValueError(f"an aligned sum has 1 lane, or with late_bits 2, got {self.lanes}")
        if self.group < 1 or self.length % self.group:
            raise ValueError(f"a step of {self.length} products has no groups of {self.group}: use a divisor")


#: The exponent of products that are all zero.
_NOTHING = -(1 << 20)


def exponent_of(number: Value, least: int) -> int | None:
    """The exponent of a number in a format whose least exponent is ``least``; None for zeros, infinities and NaN."""
    if not isinstance(number, Fraction) or number == 0:
        return None
    return max(floor_log2(abs(number)), least)


def aligned_sum(order: Aligned, exponents: Sequence[int | None]) -> Exact:
    """The operation of one step, which takes the accumulator and then the products, with these exponents."""

    def step(where: Target, total: Value, *products: Value) -> Outcome:
        least, limit = where.format.emin, scale_b(1, where.format.max_exponent + 1)
        if order.late_bits is not None:
            products = tuple(_infinite_from(limit, product) for product in products)
        special = _special(total, products)
        if special is not None:
            return Outcome(special)
        accumulator, terms = rational(total), [rational(product) for product in products]
        if order.late_bits is None:
            own = exponent_of(total, least)
            largest = max((e for e in (own, order.floor, *exponents) if e is not None), default=0)
            terms = [sum(terms[i : i + order.group], Fraction(0)) for i in range(0, len(terms), order.group)]
            result = sum((_cut(term, largest - order.fraction_bits) for term in (accumulator, *terms)), Fraction(0))
        else:
            result = _late(order, accumulator, terms, exponents, least)
        return Outcome(_infinite_from(limit, result))

    return step


def without_minus_zero(where: Target | None, number: Value) -> Outcome:
    """``number``, and +0 in place of -0."""
    return Outcome(Fraction(0) if number is NEGATIVE_ZERO else number)


def _infinite_from(limit: Fraction, number: Value) -> Value:
    """``number``, or the infinity of its sign if its magnitude is ``limit`` or more."""
    too_large = isinstance(number, Fraction) and abs(number) >= limit
    return with_sign(INFINITY, number < 0) if too_large else number  # type: ignore[operator]


def _special(total: Value, products: Sequence[Value]) -> Value | None:
    """The sum if a term is an infinity or NaN; None if all are finite."""
    terms = (total, *products)
    infinities = {term for term in terms if term in INFINITIES}
    if NAN in terms or len(infinities) == 2:
        return NAN
    return infinities.pop() if infinities else None


def _cut(term: Fraction, exponent: int) -> Fraction:
    """``term`` rounded toward zero to a multiple of ``2**exponent``."""
    return math.trunc(term / scale_b(1, exponent)) * scale_b(1, exponent)


def _floor(term: Fraction, exponent: int) -> Fraction:
    """``term`` rounded down to a multiple of ``2**exponent``."""
    return math.floor(term / scale_b(1, exponent)) * scale_b(1, exponent)


def _late(
    order: Aligned, accumulator: Fraction, terms: Sequence[Fraction], exponents: Sequence[int | None], least: int
) -> Fraction:
    """The sum of a step in which the accumulator joins late, before it is rounded to the accumulator's format."""
    bits, late_bits = order.fraction_bits, order.late_bits or 0
    sums: list[Fraction] = []
    tops: list[int] = []
    for lane in range(order.lanes):
        top = max((e for e in exponents[lane :: order.lanes] if e is not None), default=_NOTHING)
        sums.append(sum((_cut(term, top - bits) for term in terms[lane :: order.lanes]), Fraction(0)))
        tops.append(top)
    top = max(tops)
    if order.lanes > 1:
        sums = [_floor(part, top - bits) for part in sums]
    own = least if accumulator == 0 else max(floor_log2(abs(accumulator)), least)
    joined = max(top, own)
    kept = _floor(accumulator, joined - bits)
    if order.lanes > 1 and own < joined - bits - 1:
        kept = Fraction(0)
    result = _floor(sum(sums, Fraction(0)), joined - late_bits - 1) + kept
    if result == 0:
        return result
    return _floor(result, max(floor_log2(abs(result)), least) - late_bits)
