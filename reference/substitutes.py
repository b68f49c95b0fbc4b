"""The values that a format delivers in place of results that it cannot represent.

Such results are numbers beyond the largest finite value, and infinities, NaN, zeros or negative numbers in formats
without them. `fpsim.formats.resolve_overflow` states the same rules in words. The names of the modes are those of IEEE
P3109.
"""

from __future__ import annotations

from fractions import Fraction

from fpsim.formats import STOCHASTIC_ROUNDINGS, FloatFormat, Overflow

from .decoding import largest, smallest
from .values import INFINITY, NAN, NEGATIVE_ZERO, Value, with_sign


def for_nan(fmt: FloatFormat) -> Value:
    """NaN, or the largest finite value where ``fmt`` has no NaN.

    OCP MX 1.0 section 5.3 leaves the second case to the implementation. This rule is that of NVIDIA's PTX ``cvt`` to
    e2m1, e2m3 and e3m2, which turns NaN into the positive value of largest magnitude.
    """
    return NAN if fmt.has_nan else largest(fmt)


def for_infinity(fmt: FloatFormat, overflow: Overflow, *, negative: bool) -> Value:
    """The value for an infinite input, in every rounding direction."""
    if negative and not fmt.signed:
        return NAN if overflow != "sat_finite" and fmt.has_nan else smallest(fmt)
    if overflow == "sat_finite":
        return with_sign(largest(fmt), negative)
    return with_sign(INFINITY, negative) if fmt.has_infinity else for_nan(fmt)


def for_overflow(fmt: FloatFormat, rounding: str, overflow: Overflow, *, negative: bool) -> Value:
    """The value for a finite result beyond the largest finite value (IEEE 754-2019 clause 7.4).

    ``to_odd`` is not in the standard. Like ``toward_zero`` it stays finite: an infinity would look exact to the
    second rounding that rounding to odd prepares for.
    """
    away = {"nearest_even": True, "nearest_away": True, "up": not negative, "down": negative}
    away |= dict.fromkeys(STOCHASTIC_ROUNDINGS, True)
    if overflow == "ovf_inf" and away.get(rounding, False):
        return for_infinity(fmt, overflow, negative=negative)
    return with_sign(largest(fmt), negative)


def for_negative(fmt: FloatFormat, overflow: Overflow) -> Value:
    """The value for a finite result below zero in an unsigned format: NaN, or the smallest value.

    IEEE P3109 has the second case only under saturation, because all its unsigned formats have a NaN. Where the format
    has none, the smallest value is the nearest one.
    """
    return NAN if overflow == "ovf_inf" and fmt.has_nan else smallest(fmt)


def for_zero(fmt: FloatFormat, overflow: Overflow, *, negative: bool) -> Value:
    """The value for a zero: itself; +0 where ``fmt`` has no -0; NaN or the smallest value where it has no zero."""
    if not fmt.zero:
        return NAN if overflow == "ovf_inf" and fmt.has_nan else smallest(fmt)
    return NEGATIVE_ZERO if negative and fmt.has_negative_zero else Fraction(0)
