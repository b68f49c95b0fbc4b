"""Elementary functions, correctly rounded in every direction, with the special values of IEEE 754-2019 clause 9.2.1.

Their results are irrational almost everywhere, and `fpsim.reference.irrational` finds a number that rounds alike. Its
search ends unless the exact result is a rounding boundary. So each function must know beforehand where its value is a
number of few bits:

- e**x, log x, sin x, cos x, tanh x and sigmoid x of a rational x are transcendental, except at x = 0 (log: x = 1), by
  the theorem of Lindemann and Weierstrass.
- 2**x and x**y of rationals are rational only if the operands are perfect powers: `_exact_power`. log2 x of a rational
  x is rational only if x is a power of two.
- For erf and gelu no proof is known that a rational x other than 0 never gives such a number. If one did,
  `MAX_PRECISION` would end the search with an error, never with a wrong value.

The cost must not depend on the size of the operands. A result far out of range is replaced by a nearer number that is
also out of range. A result next to a boundary, as exp(2**-1000) is next to 1, is decided by inequalities, before any
computation with many bits.

All functions share the arguments ``format``, ``rounding``, ``overflow``, ``random`` and the errors of
`fpsim.reference.arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from . import enclosures
from .enclosures import Enclosure
from .irrational import far_above, far_below, refine, square_root
from .operations import rounded
from .outcomes import INVALID, Flags, Outcome, Target
from .values import (
    INFINITIES,
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    ZEROS,
    Value,
    floor_log2,
    is_negative,
    magnitude,
    rational,
    scale_b,
    with_sign,
)

_ZERO, _ONE = Fraction(0), Fraction(1)
#: The binary logarithm of e, 1.442695...
_LOG2_E = Enclosure(Fraction(1442695, 10**6), Fraction(1442696, 10**6))


@rounded
def exp(where: Target, a: Value) -> Outcome:
    """e to the power of ``a``; 1 at both zeros, +0 at -infinity.

    >>> exp(1, "e4m3fn"), exp(1e300, "fp16"), exp(-1e300, "fp16", "up")
    (Fraction(11, 4), INFINITY, Fraction(1, 16777216))
    """
    if special := _special_power(a):
        return special
    x = rational(a)
    if far := far_below(_LOG2_E.times(x).upper, where) or far_above(_LOG2_E.times(x).lower, where):
        return Outcome(far)
    # exp is convex: it lies above its tangent at 0, and below its chords from 0 to -1 and to 1.
    bounds = Enclosure(1 + x, 1 + x * (2 if x > 0 else Fraction(1, 2)))
    return Outcome(refine(enclosures.exp, x, where, bounds if abs(x) < 1 else None))


@rounded
def exp2(where: Target, a: Value) -> Outcome:
    """2 to the power of ``a``; 1 at both zeros, +0 at -infinity.

    >>> exp2(-3, "e4m3fn"), exp2(0.5, "e4m3fn")
    (Fraction(1, 8), Fraction(11, 8))
    """
    if special := _special_power(a):
        return special
    x = rational(a)
    if far := far_below(x, where) or far_above(x, where):
        return Outcome(far)
    if x.denominator == 1:
        return Outcome(scale_b(1, int(x)))
    # As in exp: the slope log 2 of the tangent is between 1/2 and 1.
    bounds = Enclosure(1 + x / 2, 1 + x) if x > 0 else Enclosure(1 + x, 1 + x / 2)
    two = Fraction(2)
    return Outcome(refine(lambda y, bits: enclosures.power(two, y, bits), x, where, bounds if abs(x) < 1 else None))


@rounded
def log(where: Target, a: Value) -> Outcome:
    """The natural logarithm of ``a``, which is +0 for 1 and -infinity for a zero (a division by zero).

    A negative ``a`` is invalid.

    >>> log(10, "e4m3fn"), log(0, "fp16"), log(-1, "fp16")
    (Fraction(9, 4), NEGATIVE_INFINITY, NAN)
    """
    if special := _special_logarithm(a):
        return special
    x = magnitude(a)
    if x == 1:
        return Outcome(_ZERO)
    # log lies below its tangent at 1: log(x) < x - 1, and log(x) = -log(1 / x) > 1 - 1 / x.
    return Outcome(refine(enclosures.log, x, where, Enclosure(1 - 1 / x, x - 1)))


@rounded
def log2(where: Target, a: Value) -> Outcome:
    """The binary logarithm of ``a``, with the special values of `log`.

    >>> log2(10, "e4m3fn"), log2(Fraction(1, 8), "e4m3fn")
    (Fraction(13, 4), Fraction(-3, 1))
    """
    if special := _special_logarithm(a):
        return special
    x = magnitude(a)
    exponent = floor_log2(x)
    if x == scale_b(1, exponent):
        return Outcome(Fraction(exponent))
    return Outcome(refine(enclosures.log2, x, where))


@rounded
def sin(where: Target, a: Value) -> Outcome:
    """The sine of ``a`` in radians; zeros keep their sign, infinities are invalid.

    >>> sin(1, "e4m3fn"), sin(10**22, "fp32")
    (Fraction(13, 16), Fraction(-7148779, 8388608))
    """
    if a in INFINITIES:
        return INVALID
    # The terms of the series alternate in sign and decrease in magnitude.
    return odd_function(where, a, enclosures.sin, lambda x: Enclosure(x - x**3 / 6, x) if x < 1 else None)


@rounded
def cos(where: Target, a: Value) -> Outcome:
    """The cosine of ``a`` in radians; infinities are invalid.

    >>> cos(1, "e4m3fn"), cos(1e-300, "fp16", "down")
    (Fraction(9, 16), Fraction(2047, 2048))
    """
    if a is NAN or a in INFINITIES:
        return Outcome(NAN) if a is NAN else INVALID
    x = magnitude(a)
    if x == 0:
        return Outcome(_ONE)
    return Outcome(refine(enclosures.cos, x, where, Enclosure(1 - x**2 / 2, _ONE) if x < 1 else None))


@rounded
def tanh(where: Target, a: Value) -> Outcome:
    """The hyperbolic tangent of ``a``; zeros keep their sign, and infinities give 1 with their sign.

    >>> tanh(1, "e4m3fn"), tanh(1e300, "fp16", "down")
    (Fraction(3, 4), Fraction(2047, 2048))
    """
    if a in INFINITIES:
        return Outcome(with_sign(_ONE, is_negative(a)))
    return odd_function(
        where, a, enclosures.tanh, lambda x: Enclosure(x - x**3 / 3, x) if x < 1 else _just_below_1(2 * x - 1)
    )


@rounded
def erf(where: Target, a: Value) -> Outcome:
    """The error function of ``a``, ``2 / sqrt(pi)`` times the integral of ``exp(-t**2)`` from 0 to ``a``.

    Zeros keep their sign, and infinities give 1 with their sign.

    >>> erf(1, "e4m3fn")
    Fraction(13, 16)
    """
    if a in INFINITIES:
        return Outcome(with_sign(_ONE, is_negative(a)))
    return odd_function(where, a, enclosures.erf, lambda x: _just_below_1(x**2) if x > 1 else None)


@rounded
def gelu(where: Target, a: Value) -> Outcome:
    """``a`` times the standard normal distribution function at ``a``: ``a * (1 + erf(a / sqrt(2))) / 2``.

    This is the exact GELU (D. Hendrycks, K. Gimpel, arXiv:1606.08415), not its approximation by tanh. Zeros keep their
    sign, and infinities give the limits, +infinity and -0.

    >>> gelu(1, "e4m3fn"), gelu(-1, "e4m3fn")
    (Fraction(13, 16), Fraction(-5, 32))
    """
    if a is NAN or a is INFINITY or a in ZEROS:
        return Outcome(a)
    if a is NEGATIVE_INFINITY:
        return Outcome(NEGATIVE_ZERO)
    x = rational(a)
    if abs(x) < 1:  # erf(x / sqrt(2)) lies between x / 2 and x
        return Outcome(refine(enclosures.gelu, x, where, Enclosure(*sorted((x / 2 * (1 + x / 2), x / 2 * (1 + x))))))
    if x > 0:  # minus x times the tail of the normal distribution, which is below exp(-x**2 / 2)
        return Outcome(refine(enclosures.gelu, x, where, _just_below_1(x**2 / 2).times(x)))
    if far := far_below(floor_log2(-x) + 1 - x**2 / 2 * _LOG2_E.lower, where):
        return Outcome(-far)
    return Outcome(refine(enclosures.gelu, x, where))


@rounded
def sigmoid(where: Target, a: Value) -> Outcome:
    """``1 / (1 + exp(-a))``; 1/2 at both zeros, +0 at -infinity, 1 at +infinity.

    >>> sigmoid(1, "e4m3fn"), sigmoid(-1e300, "e4m3fn")
    (Fraction(3, 4), Fraction(0, 1))
    """
    if a is NAN or a in INFINITIES:
        return Outcome(NAN if a is NAN else _ZERO if is_negative(a) else _ONE)
    if a in ZEROS:
        return Outcome(Fraction(1, 2))
    x = rational(a)
    if far := far_below(_LOG2_E.times(x).upper, where) if x < 0 else None:  # it is below exp(x)
        return Outcome(far)
    bounds = None
    if abs(x) < 1:  # its slope there is between 1/8 and 1/4
        bounds = Enclosure(*sorted((Fraction(1, 2) + x / 8, Fraction(1, 2) + x / 4)))
    elif x > 0:
        bounds = _just_below_1(x)
    return Outcome(refine(enclosures.sigmoid, x, where, bounds))


@rounded
def rsqrt(where: Target, a: Value) -> Outcome:
    """The reciprocal of the square root of ``a`` (rSqrt), which is +0 for +infinity.

    A zero gives an infinity with its sign (a division by zero). A number below zero is invalid.

    >>> rsqrt(Fraction(1, 4), "e4m3fn", "up"), rsqrt(2, "e4m3fn"), rsqrt(-0.0, "fp16")
    (Fraction(2, 1), Fraction(11, 16), NEGATIVE_INFINITY)
    """
    if a in ZEROS:
        return Outcome(with_sign(INFINITY, is_negative(a)), Flags.DIVIDE_BY_ZERO)
    if a is NAN or a is INFINITY:
        return Outcome(NAN if a is NAN else _ZERO)
    return INVALID if is_negative(a) else Outcome(square_root(1 / magnitude(a), where))


@rounded
def pow(where: Target, a: Value, b: Value) -> Outcome:
    """``a`` to the power of ``b`` (pow): 1 if ``b`` is zero or ``a`` is 1, even if the other operand is NaN.

    A negative ``a`` is invalid if ``b`` is no integer. A zero to a negative power is a division by zero. Powers
    of zeros and infinities have the sign of ``a`` if ``b`` is an odd integer, else plus.

    >>> pow(2.25, 1.5, "e4m3fn", "up"), pow(-2, 3, "e4m3fn"), pow(NAN, 0, "fp16")
    (Fraction(7, 2), Fraction(-8, 1), Fraction(1, 1))
    """
    if b in ZEROS or a == 1:
        return Outcome(_ONE)
    if a is NAN or b is NAN:
        return Outcome(NAN)
    if b in INFINITIES:
        if a == -1:
            return Outcome(_ONE)
        grows = (a in INFINITIES or magnitude(a) > 1) != is_negative(b)
        return Outcome(INFINITY if grows else _ZERO)
    y = rational(b)
    negative = is_negative(a) and y.denominator == 1 and y.numerator % 2 == 1
    if a in ZEROS:
        if y < 0:
            return Outcome(with_sign(INFINITY, negative), Flags.DIVIDE_BY_ZERO)
        return Outcome(with_sign(_ZERO, negative))
    if a in INFINITIES:
        return Outcome(with_sign(INFINITY if y > 0 else _ZERO, negative))
    if is_negative(a) and y.denominator != 1:
        return INVALID
    return Outcome(with_sign(_power(magnitude(a), y, where), negative))


# -- shared by several functions --------------------------------------------------------------------------------------


def odd_function(
    where: Target,
    a: Value,
    enclose: Callable[[Fraction, int], Enclosure],
    bounds: Callable[[Fraction], Enclosure | None],
) -> Outcome:
    """An odd function of a finite ``a`` or NaN, one that maps zeros and NaN to themselves.

    ``enclose`` and ``bounds`` are as in `refine`, ``bounds`` as a function of the magnitude of ``a``.
    """
    if a is NAN or a in ZEROS:
        return Outcome(a)
    x = magnitude(a)
    return Outcome(with_sign(refine(enclose, x, where, bounds(x)), is_negative(a)))


def _just_below_1(exponent: Fraction) -> Enclosure:
    """The numbers from ``1 - 2**-exponent``, rounded down and not too close to 1, up to 1."""
    return Enclosure(1 - scale_b(1, -min(int(exponent), 200)), _ONE)


def _special_power(a: Value) -> Outcome | None:
    if a in ZEROS:
        return Outcome(_ONE)
    if a is NEGATIVE_INFINITY:
        return Outcome(_ZERO)
    return Outcome(a) if a is NAN or a is INFINITY else None


def _special_logarithm(a: Value) -> Outcome | None:
    if a in ZEROS:
        return Outcome(NEGATIVE_INFINITY, Flags.DIVIDE_BY_ZERO)
    if a is NAN or a is INFINITY:
        return Outcome(a)
    return INVALID if is_negative(a) else None


def _power(x: Fraction, y: Fraction, where: Target) -> Fraction:
    """A number that stands for ``x**y``, with ``x`` positive and not 1, and ``y`` not 0."""
    exponent = enclosures.log2(x, where.format.precision + 64).times(y)
    if far := far_below(exponent.upper, where) or far_above(exponent.lower, where):
        return far
    exact = _exact_power(x, y)
    if exact is not None:
        return exact
    bounds = None
    if max(map(abs, exponent)) < 1:  # as in exp2
        flat, steep = exponent.times(Fraction(1, 2)), exponent
        bounds = Enclosure(1 + min(flat.lower, steep.lower), 1 + max(flat.upper, steep.upper))
    return refine(lambda base, bits: enclosures.power(base, y, bits), x, where, bounds)


def _exact_power(x: Fraction, y: Fraction) -> Fraction | None:
    """``x**y`` if it is rational and has few enough bits to be a rounding boundary, else None.

    With y = a / b in lowest terms, it is rational if and only if numerator and denominator of x are powers of b.
    """
    top, bottom = _root(x.numerator, y.denominator), _root(x.denominator, y.denominator)
    if top is None or bottom is None:
        return None
    root = Fraction(top, bottom)
    twos = _trailing_zeros(top) - _trailing_zeros(bottom)
    odd = root / scale_b(1, twos)
    # The power k of an odd part of n bits, other than 1, has more than k * n / 2 bits: here more than 2**13.
    if abs(y.numerator) * max(odd.numerator, odd.denominator).bit_length() > 1 << 14 and odd != 1:
        return None
    return odd**y.numerator * scale_b(1, twos * y.numerator)


def _root(number: int, degree: int) -> int | None:
    """The integer whose power ``degree`` is ``number`` >= 1, or None."""
    if degree == 1 or number == 1:
        return number
    if degree >= number.bit_length():
        return None
    if degree % 2 == 0:
        half = isqrt(number)
        return _root(half, degree // 2) if half * half == number else None
    root = 1 << number.bit_length() // degree + 1  # too large; Newton's iteration descends to the root rounded down
    while (step := ((degree - 1) * root + number // root ** (degree - 1)) // degree) < root:
        root = step
    return root if root**degree == number else None


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1
