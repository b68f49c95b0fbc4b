"""The numbers of the reference: rational numbers, and the special values that IEEE 754 adds to them.

A finite value is a `fractions.Fraction`, and ``Fraction(0)`` is +0; negative zero, the infinities and NaN are
members of `Special`. Values are compared as data: NaN equals itself, and -0 differs from +0 (IEEE 754-2019 clause
3.3, the level of floating-point data).
"""

from __future__ import annotations

import math
import reprlib
import struct
from enum import Enum
from fractions import Fraction
from typing import Final, TypeAlias

from fpsim.formats.float import float64_of


class Special(Enum):
    """A value that is no `Fraction`: negative zero, an infinity, or NaN. There is one NaN, without a payload."""

    NEGATIVE_ZERO = "-0"
    INFINITY = "inf"
    NEGATIVE_INFINITY = "-inf"
    NAN = "nan"

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.value


NEGATIVE_ZERO: Final = Special.NEGATIVE_ZERO
INFINITY: Final = Special.INFINITY
NEGATIVE_INFINITY: Final = Special.NEGATIVE_INFINITY
NAN: Final = Special.NAN

INFINITIES: Final = (INFINITY, NEGATIVE_INFINITY)
ZEROS: Final = (Fraction(0), NEGATIVE_ZERO)

#: The type of the values that functions of the reference return.
Value: TypeAlias = Fraction | Special
#: The type of the numbers that functions of the reference accept: see `as_value`.
Number: TypeAlias = Value | int | float

_NEGATIVES: Final[dict[Special, Value]] = {
    NEGATIVE_ZERO: Fraction(0),
    INFINITY: NEGATIVE_INFINITY,
    NEGATIVE_INFINITY: INFINITY,
    NAN: NAN,
}
_FLOATS: Final = {NEGATIVE_ZERO: -0.0, INFINITY: math.inf, NEGATIVE_INFINITY: -math.inf, NAN: math.nan}


def as_value(number: Number) -> Value:
    """``number`` as an exact value: a float stands for exactly the number it holds, -0.0, inf and nan included.

    Arguments:
        number: an int, a Fraction, a float, or a value already.

    Raises:
        TypeError: ``number`` is none of these. (A numpy or torch scalar becomes one by ``float(x)``.)

    >>> as_value(0.1)
    Fraction(3602879701896397, 36028797018963968)
    >>> as_value(-0.0)
    NEGATIVE_ZERO
    """
    if isinstance(number, Special):
        return number
    if isinstance(number, float):
        return _from_float(number)
    if isinstance(number, (int, Fraction)):
        return Fraction(number)
    raise TypeError(
        f"a number is an int, a float, a Fraction or a Special, got {reprlib.repr(number)} of {type(number)}: "
        "use float(x)"
    )


def _from_float(number: float) -> Value:
    if math.isnan(number):
        return NAN
    if math.isinf(number):
        return INFINITY if number > 0 else NEGATIVE_INFINITY
    # The bits, because arithmetic and comparisons take subnormals for zeros where the process flushes them.
    (bits,) = struct.unpack("<Q", struct.pack("<d", number))
    field, mantissa = bits >> 52 & 0x7FF, bits & ((1 << 52) - 1)
    size = scale_b(mantissa + (1 << 52) if field else mantissa, max(field, 1) - 1075)
    return with_sign(size, bits >> 63 == 1)


def to_float(value: Number) -> float:
    """The Python float (binary64) that holds ``value`` exactly; the inverse of `as_value` on floats.

    Raises:
        ValueError: no float holds it.
    """
    value = as_value(value)
    if isinstance(value, Special):
        return _FLOATS[value]
    units = abs(value) * 2**1074
    if units.denominator == 1 and units < 1 << 2098:
        size = float64_of(units.numerator)
        if _from_float(size) == abs(value):
            return math.copysign(size, -1 if value < 0 else 1)
    try:
        nearest = float(value)
    except OverflowError:
        nearest = math.inf
    raise ValueError(f"no float64 equals {value}; the nearest is {nearest!r}")


def negate(value: Value) -> Value:
    """``value`` with the opposite sign, zeros and infinities included (IEEE 754-2019 clause 5.5.1); NaN stays NaN.

    This differs from ``-value``: the negative of ``Fraction(0)``, which is +0, is -0.
    """
    if isinstance(value, Special):
        return _NEGATIVES[value]
    return -value if value else NEGATIVE_ZERO


def is_negative(value: Value) -> bool:
    """Whether the sign of ``value`` is minus, -0 included (IEEE 754-2019 clause 5.7.2, isSignMinus); False for NaN."""
    if isinstance(value, Special):
        return value in (NEGATIVE_ZERO, NEGATIVE_INFINITY)
    return value < 0


def with_sign(size: Value, negative: bool) -> Value:
    """``size``, which has a plus sign, with a minus sign if ``negative``."""
    return negate(size) if negative else size


def rational(value: Value) -> Fraction:
    """The number that a finite ``value`` is, 0 for both zeros.

    Raises:
        ValueError: ``value`` is an infinity or NaN.
    """
    if isinstance(value, Fraction):
        return value
    if value is NEGATIVE_ZERO:
        return Fraction(0)
    raise ValueError(f"{value!r} is not finite")


def magnitude(value: Value) -> Fraction:
    """The absolute value of the number that a finite ``value`` is, 0 for both zeros.

    Raises:
        ValueError: ``value`` is an infinity or NaN.
    """
    return abs(rational(value))


def order(value: Value) -> tuple[int, Fraction, bool]:
    """A key that sorts values other than NaN as IEEE 754-2019 clause 5.10 (totalOrder) does: -0 just before +0.

    Raises:
        ValueError: ``value`` is NaN.
    """
    if value is NAN:
        raise ValueError("NaN has no place in the order of values")
    if value in INFINITIES:
        return (1 if value is INFINITY else -1), Fraction(0), False
    finite = magnitude(value)
    return 0, -finite if is_negative(value) else finite, value is not NEGATIVE_ZERO


def scale_b(significand: int, exponent: int) -> Fraction:
    """``significand * 2**exponent`` (IEEE 754-2019 clause 5.3.3, scaleB)."""
    return Fraction(significand << exponent) if exponent >= 0 else Fraction(significand, 1 << -exponent)


def floor_log2(number: Fraction) -> int:
    """The exponent of the leading bit of ``number`` > 0: the e with 2**e <= number < 2**(e + 1)."""
    exponent = number.numerator.bit_length() - number.denominator.bit_length()
    return exponent if scale_b(1, exponent) <= number else exponent - 1
