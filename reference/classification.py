"""The place of a value in its format: its class, its neighbours and its exponent (IEEE 754-2019 clauses 5.3, 5.7).

Values are numbers as everywhere here: an int, Fraction, float (taken exactly) or `Special`. Where a function takes a
format, a name or a `FloatFormat`, the value has to be one of the format: round it first.
"""

from __future__ import annotations

from enum import Enum
from fractions import Fraction

from fpsim.formats import FloatFormat, parse_format, resolve_overflow

from . import substitutes
from .decoding import decode, largest
from .encoding import encode
from .outcomes import target
from .rounding import round
from .values import (
    INFINITIES,
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    ZEROS,
    Number,
    Value,
    as_value,
    floor_log2,
    is_negative,
    magnitude,
    negate,
    rational,
    scale_b,
    with_sign,
)


class FloatClass(Enum):
    """The classes of clause 5.7.2, by their names there. The reference has one NaN, and no signaling NaNs."""

    QUIET_NAN = "quietNaN"
    NEGATIVE_INFINITY = "negativeInfinity"
    NEGATIVE_NORMAL = "negativeNormal"
    NEGATIVE_SUBNORMAL = "negativeSubnormal"
    NEGATIVE_ZERO = "negativeZero"
    POSITIVE_ZERO = "positiveZero"
    POSITIVE_SUBNORMAL = "positiveSubnormal"
    POSITIVE_NORMAL = "positiveNormal"
    POSITIVE_INFINITY = "positiveInfinity"


_SPECIAL_CLASSES: dict[Value, FloatClass] = {
    NAN: FloatClass.QUIET_NAN,
    NEGATIVE_INFINITY: FloatClass.NEGATIVE_INFINITY,
    INFINITY: FloatClass.POSITIVE_INFINITY,
    NEGATIVE_ZERO: FloatClass.NEGATIVE_ZERO,
    Fraction(0): FloatClass.POSITIVE_ZERO,
}


def classify(value: Number, format: str | FloatFormat) -> FloatClass:
    """The class of ``value`` in ``format``.

    Raises:
        ValueError: ``value`` is not a value of the format, or there is no such format.
        TypeError: not a number, or not a format.

    >>> classify(1, "e4m3fn"), classify(Fraction(-1, 512), "e4m3fn")
    (<FloatClass.POSITIVE_NORMAL: 'positiveNormal'>, <FloatClass.NEGATIVE_SUBNORMAL: 'negativeSubnormal'>)
    """
    fmt = parse_format(format)
    exact = _value_of(value, fmt)
    if exact in _SPECIAL_CLASSES:
        return _SPECIAL_CLASSES[exact]
    subnormal = magnitude(exact) < scale_b(1, fmt.emin)
    if is_negative(exact):
        return FloatClass.NEGATIVE_SUBNORMAL if subnormal else FloatClass.NEGATIVE_NORMAL
    return FloatClass.POSITIVE_SUBNORMAL if subnormal else FloatClass.POSITIVE_NORMAL


def is_nan(value: Number) -> bool:
    """Whether ``value`` is NaN."""
    return as_value(value) is NAN


def is_infinite(value: Number) -> bool:
    """Whether ``value`` is an infinity."""
    return as_value(value) in INFINITIES


def is_finite(value: Number) -> bool:
    """Whether ``value`` is a number, zeros included."""
    return not is_nan(value) and not is_infinite(value)


def is_zero(value: Number) -> bool:
    """Whether ``value`` is a zero of either sign."""
    return as_value(value) in ZEROS


def is_normal(value: Number, format: str | FloatFormat) -> bool:
    """Whether ``value`` is a normal number of ``format``: not zero, infinite or NaN. Errors as `classify`."""
    return classify(value, format) in (FloatClass.NEGATIVE_NORMAL, FloatClass.POSITIVE_NORMAL)


def is_subnormal(value: Number, format: str | FloatFormat) -> bool:
    """Whether ``value`` is a subnormal number of ``format``. Errors as `classify`."""
    return classify(value, format) in (FloatClass.NEGATIVE_SUBNORMAL, FloatClass.POSITIVE_SUBNORMAL)


def next_up(value: Number, format: str | FloatFormat) -> Value:
    """The least value of ``format`` that is greater than ``value`` (clause 5.3.1, nextUp).

    +infinity follows the largest finite value and itself; in a format without infinity, the largest finite value
    follows itself. The smallest positive value follows zeros of both signs. -0 follows the negative value nearest to
    zero, in a format that has -0. NaN stays NaN.

    Raises:
        ValueError, TypeError: as `classify`.

    >>> next_up(1, "e4m3fn"), next_up(Fraction(-1, 512), "e4m3fn"), next_up(448, "e4m3fn"), next_up(240, "e4m3")
    (Fraction(9, 8), NEGATIVE_ZERO, Fraction(448, 1), INFINITY)
    """
    fmt = parse_format(format)
    exact = _value_of(value, fmt)
    if exact is NAN or exact is INFINITY:
        return exact
    return _toward_zero(exact, fmt) if is_negative(exact) and exact is not NEGATIVE_ZERO else _away(exact, fmt, False)


def next_down(value: Number, format: str | FloatFormat) -> Value:
    """The greatest value of ``format`` that is less than ``value`` (nextDown): as `next_up`, mirrored.

    In an unsigned format, nothing precedes the least value but itself.

    Raises:
        ValueError, TypeError: as `classify`.

    >>> next_down(1, "e4m3fn"), next_down(0, "e4m3fn"), next_down(0, "e4m3fn:unsigned")
    (Fraction(15, 16), Fraction(-1, 512), Fraction(0, 1))
    """
    fmt = parse_format(format)
    exact = _value_of(value, fmt)
    if exact is NAN or exact is NEGATIVE_INFINITY:
        return exact
    if is_negative(exact) or exact == 0:
        return _away(exact, fmt, True) if fmt.signed else exact
    return _toward_zero(exact, fmt)


def ulp(value: Number, format: str | FloatFormat) -> Fraction:
    """The distance between the values of ``format`` in the binade of ``value``, which need not be one of them.

    That is ``2**(e - M)``, where e is the exponent of the leading bit of ``value``, or that of the smallest normal
    number if it is greater and the format has subnormals. At zero it is the smallest positive value.

    Raises:
        ValueError: an infinity or NaN, or no such format.
        TypeError: not a number, or not a format.

    Source: J.-M. Muller and others, "Handbook of Floating-Point Arithmetic", second edition (2018), section 2.3.2.

    >>> ulp(1, "e4m3fn"), ulp(0, "e4m3fn"), ulp(500, "e4m3fn")
    (Fraction(1, 8), Fraction(1, 512), Fraction(32, 1))
    """
    fmt = parse_format(format)
    size = magnitude(as_value(value))
    if size == 0:
        return scale_b(1, fmt.emin - (fmt.mantissa_bits if fmt.subnormals else 0))
    exponent = floor_log2(size)
    return scale_b(1, (max(exponent, fmt.emin) if fmt.subnormals else exponent) - fmt.mantissa_bits)


def logb(value: Number) -> Value:
    """The exponent of the leading bit of ``value``, subnormal or not (clause 5.3.3, logB).

    -infinity for zeros (which the standard counts as a division by zero), +infinity for infinities, NaN for NaN.

    Raises:
        TypeError: not a number.

    >>> logb(448), logb(Fraction(-1, 512)), logb(0)
    (Fraction(8, 1), Fraction(-9, 1), NEGATIVE_INFINITY)
    """
    exact = as_value(value)
    if exact is NAN or is_infinite(exact):
        return NAN if exact is NAN else INFINITY
    size = magnitude(exact)
    return Fraction(floor_log2(size)) if size else NEGATIVE_INFINITY


def scaleb(
    value: Number,
    exponent: int,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``value * 2**exponent``, rounded to ``format`` as `round` does it (clause 5.3.3, scaleB).

    Raises:
        ValueError, TypeError: as `round`; or ``exponent`` is not an int.

    >>> scaleb(7, 6, "e4m3fn"), scaleb(7, -13, "e4m3fn")
    (Fraction(448, 1), Fraction(0, 1))
    """
    if not isinstance(exponent, int):
        raise TypeError(f"the exponent is an int, got {exponent!r} of type {type(exponent)}")
    where, exact = target(format, rounding, overflow, random=random), as_value(value)
    if not is_finite(exact) or is_zero(exact):
        return round(exact, format, rounding, overflow, random=random)
    # An exponent far out of range is replaced by one just out of range, so that no number gets as many bits.
    leading = floor_log2(magnitude(exact))
    low, high = where.negligible - leading, where.format.max_exponent + 3 - leading
    scale = scale_b(1, min(max(exponent, low), high))
    return round(rational(exact) * scale, format, rounding, overflow, random=random)


def _value_of(value: Number, fmt: FloatFormat) -> Value:
    exact = as_value(value)
    if round(exact, fmt, "toward_zero") != exact:
        raise ValueError(f"{exact!r} is not a value of {fmt.name}: round it first, to {round(exact, fmt)!r}")
    return exact


def _away(value: Value, fmt: FloatFormat, negative: bool) -> Value:
    """The neighbour of a finite ``value`` further from zero; for a zero, the negative one if ``negative``."""
    size = magnitude(value)
    if size == largest(fmt):
        return substitutes.for_infinity(fmt, resolve_overflow(fmt, None), negative=negative)
    lowest = 1 if fmt.subnormals or not fmt.zero else 1 << fmt.mantissa_bits
    above = decode(max(encode(size, fmt) + 1, lowest), fmt)
    return with_sign(above, negative)


def _toward_zero(value: Value, fmt: FloatFormat) -> Value:
    """The neighbour of ``value``, which is not zero, nearer to zero; the smallest itself in a format without zero."""
    negative = is_negative(value)
    code = encode(value, fmt) & ~fmt.sign_code
    below = decode(max(code - 1, 0), fmt)
    return negate(below) if negative and (below != 0 or fmt.has_negative_zero) else below
