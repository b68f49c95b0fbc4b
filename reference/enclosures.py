"""Rational intervals around the values of transcendental functions, as narrow as asked for.

They rest on mpmath's functions of arbitrary precision (`mpmath.libmp`, which has no global state), each computed
with `GUARD` bits more than asked for. mpmath builds its functions to be accurate to about one unit in the last place
of the working precision, relative to the result, also where terms cancel (`mpf_log` near 1, `mpf_sin` near multiples
of pi, `mpf_tanh` and `mpf_erf` near 0). The enclosures assume 2**32 times that error: a relative error below
2**-precision. Arguments are never rounded silently: an argument without a finite binary expansion is enclosed too.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from mpmath import libmp

from .values import scale_b

#: Bits of working precision beyond the precision of an enclosure.
GUARD = 32

#: One of mpmath's functions: number, working precision and direction of rounding to number.
MpFunction: TypeAlias = Callable[[Any, int, str], Any]


class Enclosure(NamedTuple):
    """An interval with the exact value in it."""

    lower: Fraction
    upper: Fraction

    def times(self, factor: Fraction) -> Enclosure:
        """The interval of the products with ``factor``."""
        return Enclosure(*sorted((self.lower * factor, self.upper * factor)))


def monotone(function: MpFunction, low: Fraction, high: Fraction, precision: int) -> Enclosure:
    """All values of a monotone function of mpmath between ``low`` and ``high``, relative error 2**-precision."""
    bits = precision + GUARD
    ends = function(_mpf(low, bits, "f"), bits, "n"), function(_mpf(high, bits, "c"), bits, "n")
    values = sorted(map(_fraction, ends))
    error = Fraction(1, 1 << precision)
    return Enclosure(values[0] - abs(values[0]) * error, values[1] + abs(values[1]) * error)


def exp(x: Fraction, precision: int) -> Enclosure:
    """e to the power of ``x``."""
    return monotone(libmp.mpf_exp, x, x, precision)


def log(x: Fraction, precision: int) -> Enclosure:
    """The natural logarithm of ``x`` > 0, relative error 2**-precision also next to ``x`` = 1."""
    # Rounding x changes the logarithm most, relative to its size, near x = 1: the bits of x - 1 have to be kept.
    kept = precision + max(0, x.denominator.bit_length() - abs(x - 1).numerator.bit_length())
    return monotone(libmp.mpf_log, x, x, kept)


def power(x: Fraction, y: Fraction, precision: int) -> Enclosure:
    """``x`` > 0 to the power of ``y``, by exp and log."""
    logarithm = log(x, precision).times(y)
    return monotone(libmp.mpf_exp, *logarithm, precision)


def log2(x: Fraction, precision: int) -> Enclosure:
    """The binary logarithm of ``x`` > 0."""
    unit = log(Fraction(2), precision)
    ends = [end / by for end in log(x, precision) for by in unit]
    return Enclosure(min(ends), max(ends))


def sin(x: Fraction, precision: int) -> Enclosure:
    """The sine of ``x``."""
    return _of_slope_one(libmp.mpf_sin, x, precision)


def cos(x: Fraction, precision: int) -> Enclosure:
    """The cosine of ``x``."""
    return _of_slope_one(libmp.mpf_cos, x, precision)


def tanh(x: Fraction, precision: int) -> Enclosure:
    """The hyperbolic tangent of ``x``."""
    return monotone(libmp.mpf_tanh, x, x, precision)


def erf(x: Fraction, precision: int) -> Enclosure:
    """The error function of ``x``."""
    return monotone(libmp.mpf_erf, x, x, precision)


def sigmoid(x: Fraction, precision: int) -> Enclosure:
    """``1 / (1 + exp(-x))``."""
    lower, upper = exp(-x, precision)
    return Enclosure(1 / (1 + upper), 1 / (1 + lower))


def gelu(x: Fraction, precision: int) -> Enclosure:
    """``x`` times the standard normal distribution function at ``x``: ``x / 2 * erfc(-x / sqrt(2))``."""
    argument = monotone(libmp.mpf_sqrt, Fraction(1, 2), Fraction(1, 2), precision).times(-x)
    return monotone(libmp.mpf_erfc, *argument, precision).times(x / 2)


def _of_slope_one(function: MpFunction, x: Fraction, precision: int) -> Enclosure:
    """A function of slope at most 1: its value at one end of an interval around ``x``, give or take the width of it."""
    bits = precision + GUARD
    low, high = _mpf(x, bits, "f"), _mpf(x, bits, "c")
    value = _fraction(function(low, bits, "n"))
    error = abs(value) / (1 << precision) + _fraction(high) - _fraction(low)
    return Enclosure(value - error, value + error)


def _mpf(number: Fraction, bits: int, rounding: str) -> Any:
    """``number`` as mpmath writes it: exact if its binary expansion is finite, else rounded to ``bits`` bits."""
    exponent = number.denominator.bit_length() - 1
    if number.denominator == 1 << exponent:
        return libmp.from_man_exp(number.numerator, -exponent)
    return libmp.from_rational(number.numerator, number.denominator, bits, rounding)


def _fraction(number: Any) -> Fraction:
    """The value of mpmath's (sign, significand, exponent, bit length), which is finite."""
    sign, significand, exponent, _ = number
    return scale_b(-int(significand) if sign else int(significand), int(exponent))
