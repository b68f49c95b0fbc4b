"""What a format gives in place of a result that it has no code for.

Such are results beyond the largest finite value, infinities, NaN, and zeros or negative numbers in formats without
them. `fpsim.formats.resolve_overflow` states the same rules in words; their names are those of IEEE P3109.
"""

from __future__ import annotations

from fractions import Fraction

from fpsim.formats import STOCHASTIC_ROUNDINGS, FloatFormat, Overflow

from .decoding import largest, smallest
from .values import INFINITY, NAN, NEGATIVE_ZERO, Value, with_sign


def for_nan(fmt: FloatFormat) -> Value:
    """NaN; where ``fmt`` has none, the largest finite value.

    OCP MX 1.0 section 5.3 leaves the second case to the implementation. The rule is that of NVIDIA's PTX ``cvt``
    to e2m1, e2m3 and e3m2, which turns NaN into the positive value of largest magnitude.
    """
    return NAN if fmt.has_nan else largest(fmt)


def for_infinity(fmt: FloatFormat, overflow: Overflow, *, negative: bool) -> Value:
    """What an infinite input becomes, in every rounding direction."""
    if negative and not fmt.signed:
        return smallest(fmt) if overflow == "sat_finite" else for_nan(fmt)
    if overflow == "sat_finite":
        return with_sign(largest(fmt), negative)
    return with_sign(INFINITY, negative) if fmt.has_infinity else for_nan(fmt)


def for_overflow(fmt: FloatFormat, rounding: str, overflow: Overflow, *, negative: bool) -> Value:
    """What a finite result beyond the largest finite value becomes (IEEE 754-2019 clause 7.4).

    ``to_odd`` is not in the standard. Like ``toward_zero`` it stays finite: an infinity would look exact to the
    second rounding that rounding to odd prepares for.
    """
    away = {"nearest_even": True, "nearest_away": True, "up": not negative, "down": negative}
    away |= dict.fromkeys(STOCHASTIC_ROUNDINGS, True)
    if overflow == "ovf_inf" and away.get(rounding, False):
        return for_infinity(fmt, overflow, negative=negative)
    return with_sign(largest(fmt), negative)


def for_negative(fmt: FloatFormat, overflow: Overflow) -> Value:
    """What a finite result below zero becomes in an unsigned format."""
    return for_nan(fmt) if overflow == "ovf_inf" else smallest(fmt)


def for_zero(fmt: FloatFormat, overflow: Overflow, *, negative: bool) -> Value:
    """What a zero becomes: itself, +0 where ``fmt`` has no -0; in a format without zero, NaN or the smallest value."""
    if not fmt.zero:
        return for_nan(fmt) if overflow == "ovf_inf" else smallest(fmt)
    return NEGATIVE_ZERO if negative and fmt.has_negative_zero else Fraction(0)
