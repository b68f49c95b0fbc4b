"""A number in place of an irrational result, from which no rounding can tell it apart.

Ziv's strategy (A. Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last bit", ACM
Transactions on Mathematical Software 17 (1991)): enclose the exact value in an interval, ever narrower, until
`stand_in` finds that the whole interval rounds as one number. The search ends unless the exact value is a rounding
boundary: a number of at most `Target.boundary_bits` bits, which is p + 1 in the deterministic directions and a few more
in stochastic rounding.

A result far out of range is replaced before the search (`far_above`, `far_below`), so that no power with a huge
exponent is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from .enclosures import Enclosure
from .outcomes import Target
from .values import floor_log2, scale_b

#: The bits of an enclosure beyond which `refine` gives up.
MAX_PRECISION = 1 << 18


def stand_in(lower: Fraction, upper: Fraction, where: Target) -> Fraction | None:
    """A number that rounds to ``where`` as every number strictly between ``lower`` and ``upper`` does; None if unknown.

    Results change, or are exact, only at numbers of at most b significant bits, where b is `Target.boundary_bits`.
    These are the even ones among the numbers of b + 1 bits. If the whole interval lies between two neighbours of b + 1
    bits, the odd one of the two stands for it. This is rounding to odd, and theorem 1 of S. Boldo, G. Melquiond,
    "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57 (2008), proves that it does not
    change a second rounding. Subnormals and the end of the range only remove boundaries.

    >>> from fpsim.reference.outcomes import target
    >>> stand_in(Fraction(141421, 100000), Fraction(141422, 100000), target("e4m3fn"))
    Fraction(45, 32)
    """
    if upper < 0:
        mirrored = stand_in(-upper, -lower, where)
        return None if mirrored is None else -mirrored
    if lower <= 0:
        return None
    quantum = scale_b(1, floor_log2(lower) - where.boundary_bits)
    below = lower // quantum
    return (below | 1) * quantum if upper <= (below + 1) * quantum else None


def square_root(square: Fraction, where: Target) -> Fraction:
    """The square root of ``square`` > 0, or the number that stands for it, as `stand_in` would choose it."""
    quantum = scale_b(1, floor_log2(square) // 2 - where.boundary_bits)
    scaled = square / quantum**2
    below = isqrt(int(scaled))  # has one bit more than a boundary
    return (below if below**2 == scaled else below | 1) * quantum


def refine(
    enclose: Callable[[Fraction, int], Enclosure], x: Fraction, where: Target, bounds: Enclosure | None = None
) -> Fraction:
    """A number that stands for the value of a function at ``x``, which must not be a rounding boundary.

    Arguments:
        enclose: gives an enclosure of the value at ``x`` for a precision in bits.
        x: the argument of the function.
        where: the format and the modes of the result.
        bounds: an open interval that holds the value; if it is narrow enough, ``enclose`` is not called.

    Raises:
        ArithmeticError: the value is closer to a rounding boundary than enclosures of `MAX_PRECISION` bits can tell.
    """
    number = stand_in(*bounds, where) if bounds else None
    precision = where.boundary_bits + 11
    while number is None:
        if precision > MAX_PRECISION:
            short = x.numerator.bit_length() + x.denominator.bit_length() < 400
            raise ArithmeticError(
                f"the result for {x if short else 'an argument of many bits'} is within 2**-{precision // 2} of a "
                f"rounding boundary of {where.format.name}, or on it: round the argument to fewer bits"
            )
        number = stand_in(*enclose(x, precision), where)
        precision *= 2
    return number


def far_above(exponent: Fraction, where: Target) -> Fraction | None:
    """A number that stands for every number from ``2**exponent`` up, if all of them overflow alike; else None."""
    top = where.format.max_exponent + 3
    return scale_b(1, top) if exponent >= top else None


def far_below(exponent: Fraction, where: Target) -> Fraction | None:
    """A number that stands for every number between 0 and ``2**exponent``, if all of them round alike; else None."""
    return scale_b(1, where.negligible) if exponent <= where.negligible else None
