"""Elementary functions, correctly rounded in every direction, with the special values of IEEE 754-2019 clause 9.2.1.

Ziv's strategy (A. Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last bit", ACM
Transactions on Mathematical Software 17 (1991)): enclose the exact value in an interval, ever narrower, until
`stand_in` finds that the whole interval rounds as one number. It ends unless the exact value is a rounding boundary,
a number of at most `Target.boundary_bits` bits: p + 1 in the deterministic directions, a few more in stochastic
rounding. So what is needed besides enclosures is to know beforehand where the value is such a number:

- e**x, log x, sin x, cos x, tanh x and sigmoid x of a rational x are transcendental, except at x = 0 (log: x = 1), by
  the theorem of Lindemann and Weierstrass.
- 2**x and x**y of rationals are rational only if the operands are perfect powers: `_exact_power`. log2 x of a rational
  x is rational only if x is a power of two.
- For erf and gelu no proof is known that a rational x other than 0 never gives such a number. If one did,
  `MAX_PRECISION` would end the search with an error, never with a wrong value.

Two things must not depend on the size of the operands. Where the exponent of the result is far out of range, a number
out of range stands for it, and no power is computed. Where the result is next to a boundary, as exp(2**-1000) is to 1,
an enclosure by inequalities decides it, before any computation with many bits.

All functions share the arguments ``format``, ``rounding``, ``overflow``, ``random`` and the errors of
`fpsim.reference.arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from fpsim.formats import FloatFormat

from . import enclosures
from .arithmetic import square_root
from .enclosures import Enclosure
from .outcomes import INVALID, Flags, Outcome, Target, deliver, stand_in, target
from .values import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Number,
    Value,
    floor_log2,
    is_negative,
    magnitude,
    negate,
    scale_b,
)

#: Where `_refine` gives up.
MAX_PRECISION = 1 << 18

_ZERO, _ONE = Fraction(0), Fraction(1)
_INFINITIES = (INFINITY, NEGATIVE_INFINITY)
#: The binary logarithm of e, 1.442695...
_LOG2_E = Enclosure(Fraction(1442695, 10**6), Fraction(1442696, 10**6))


def exp(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """e to the power of ``a``; 1 at both zeros, +0 at -infinity.

    >>> exp(1, "e4m3fn"), exp(1e300, "fp16"), exp(-1e300, "fp16", "up")
    (Fraction(11, 4), INFINITY, Fraction(1, 16777216))
    """
    return deliver(exact_exp, (a,), target(format, rounding, overflow, random))


def exp2(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """2 to the power of ``a``; 1 at both zeros, +0 at -infinity.

    >>> exp2(-3, "e4m3fn"), exp2(0.5, "e4m3fn")
    (Fraction(1, 8), Fraction(11, 8))
    """
    return deliver(exact_exp2, (a,), target(format, rounding, overflow, random))


def log(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The natural logarithm of ``a``; that of 1 is +0, of a zero -infinity (a division by zero), below it is invalid.

    >>> log(10, "e4m3fn"), log(0, "fp16"), log(-1, "fp16")
    (Fraction(9, 4), NEGATIVE_INFINITY, NAN)
    """
    return deliver(exact_log, (a,), target(format, rounding, overflow, random))


def log2(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The binary logarithm of ``a``, its special values those of `log`.

    >>> log2(10, "e4m3fn"), log2(Fraction(1, 8), "e4m3fn")
    (Fraction(13, 4), Fraction(-3, 1))
    """
    return deliver(exact_log2, (a,), target(format, rounding, overflow, random))


def sin(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The sine of ``a`` in radians; zeros keep their sign, infinities are invalid.

    >>> sin(1, "e4m3fn"), sin(10**22, "fp32")
    (Fraction(13, 16), Fraction(-7148779, 8388608))
    """
    return deliver(exact_sin, (a,), target(format, rounding, overflow, random))


def cos(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The cosine of ``a`` in radians; infinities are invalid.

    >>> cos(1, "e4m3fn"), cos(1e-300, "fp16", "down")
    (Fraction(9, 16), Fraction(2047, 2048))
    """
    return deliver(exact_cos, (a,), target(format, rounding, overflow, random))


def tanh(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The hyperbolic tangent of ``a``; zeros keep their sign, infinities give 1 with theirs.

    >>> tanh(1, "e4m3fn"), tanh(1e300, "fp16", "down")
    (Fraction(3, 4), Fraction(2047, 2048))
    """
    return deliver(exact_tanh, (a,), target(format, rounding, overflow, random))


def erf(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The error function of ``a``, ``2 / sqrt(pi)`` times the integral of ``exp(-t**2)`` from 0 to ``a``.

    Zeros keep their sign, infinities give 1 with theirs.

    >>> erf(1, "e4m3fn")
    Fraction(13, 16)
    """
    return deliver(exact_erf, (a,), target(format, rounding, overflow, random))


def gelu(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a`` times the standard normal distribution function at ``a``: ``a * (1 + erf(a / sqrt(2))) / 2``.

    That is GELU itself (D. Hendrycks, K. Gimpel, arXiv:1606.08415), not its approximation by tanh. Zeros keep their
    sign; infinities give the limits, +infinity and -0.

    >>> gelu(1, "e4m3fn"), gelu(-1, "e4m3fn")
    (Fraction(13, 16), Fraction(-5, 32))
    """
    return deliver(exact_gelu, (a,), target(format, rounding, overflow, random))


def sigmoid(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``1 / (1 + exp(-a))``; 1/2 at both zeros, +0 at -infinity, 1 at +infinity.

    >>> sigmoid(1, "e4m3fn"), sigmoid(-1e300, "e4m3fn")
    (Fraction(3, 4), Fraction(0, 1))
    """
    return deliver(exact_sigmoid, (a,), target(format, rounding, overflow, random))


def rsqrt(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The reciprocal of the square root of ``a`` (rSqrt); infinite, with their sign, at zeros, +0 at +infinity.

    Below zero it is invalid.

    >>> rsqrt(Fraction(1, 4), "e4m3fn", "up"), rsqrt(2, "e4m3fn"), rsqrt(-0.0, "fp16")
    (Fraction(2, 1), Fraction(11, 16), NEGATIVE_INFINITY)
    """
    return deliver(exact_rsqrt, (a,), target(format, rounding, overflow, random))


def pow(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a`` to the power of ``b`` (pow): 1 if ``b`` is zero or ``a`` is 1, whatever the other, NaN included.

    A negative ``a`` has powers for integers ``b`` only, others are invalid. A zero to a negative power divides by
    zero. The sign of a result from a zero or an infinity is that of ``a`` if ``b`` is an odd integer, else plus.

    >>> pow(2.25, 1.5, "e4m3fn", "up"), pow(-2, 3, "e4m3fn"), pow(NAN, 0, "fp16")
    (Fraction(7, 2), Fraction(-8, 1), Fraction(1, 1))
    """
    return deliver(exact_pow, (a, b), target(format, rounding, overflow, random))


# -- the exact results, or what stands for them -----------------------------------------------------------------------


def exact_exp(where: Target, a: Value) -> Outcome:
    """e to the power of ``a``."""
    if special := _special_power(a):
        return special
    x = Fraction(a)  # type: ignore[arg-type]  # finite: the special values are done
    if far := _far_below(_LOG2_E.times(x).upper, where) or _far_above(_LOG2_E.times(x).lower, where):
        return Outcome(far)
    # Convex: above its tangent at 0, and below its chords from there to -1 and to 1.
    bounds = Enclosure(1 + x, 1 + x * (2 if x > 0 else Fraction(1, 2)))
    return _refine(enclosures.exp, x, where, bounds if abs(x) < 1 else None)


def exact_exp2(where: Target, a: Value) -> Outcome:
    """2 to the power of ``a``."""
    if special := _special_power(a):
        return special
    x = Fraction(a)  # type: ignore[arg-type]
    if far := _far_below(x, where) or _far_above(x, where):
        return Outcome(far)
    if x.denominator == 1:
        return Outcome(scale_b(1, int(x)))
    # As in exact_exp: the slope log 2 of the tangent is between 1/2 and 1.
    bounds = Enclosure(1 + x / 2, 1 + x) if x > 0 else Enclosure(1 + x, 1 + x / 2)
    return _refine(lambda y, bits: enclosures.power(Fraction(2), y, bits), x, where, bounds if abs(x) < 1 else None)


def exact_log(where: Target, a: Value) -> Outcome:
    """The natural logarithm of ``a``."""
    if special := _special_logarithm(a):
        return special
    x = magnitude(a)
    if x == 1:
        return Outcome(_ZERO)
    # Concave: below its tangent at 1, and minus the logarithm of 1/x, which is below its own.
    return _refine(enclosures.log, x, where, Enclosure(1 - 1 / x, x - 1))


def exact_log2(where: Target, a: Value) -> Outcome:
    """The binary logarithm of ``a``."""
    if special := _special_logarithm(a):
        return special
    x = magnitude(a)
    exponent = floor_log2(x)
    if x == scale_b(1, exponent):
        return Outcome(Fraction(exponent))
    return _refine(enclosures.log2, x, where)


def exact_sin(where: Target, a: Value) -> Outcome:
    """The sine of ``a``."""
    if a in _INFINITIES:
        return INVALID
    # The series of odd powers alternates, and falls from term to term.
    return _odd(where, a, enclosures.sin, lambda x: Enclosure(x - x**3 / 6, x) if x < 1 else None)


def exact_cos(where: Target, a: Value) -> Outcome:
    """The cosine of ``a``."""
    if a is NAN or a in _INFINITIES:
        return Outcome(NAN) if a is NAN else INVALID
    x = magnitude(a)
    if x == 0:
        return Outcome(_ONE)
    return _refine(enclosures.cos, x, where, Enclosure(1 - x**2 / 2, _ONE) if x < 1 else None)


def exact_tanh(where: Target, a: Value) -> Outcome:
    """The hyperbolic tangent of ``a``: x - x**3/3 + ..., and 1 - 2 / (exp(2 x) + 1)."""
    if a in _INFINITIES:
        return Outcome(-_ONE if is_negative(a) else _ONE)
    return _odd(where, a, enclosures.tanh, lambda x: Enclosure(x - x**3 / 3, x) if x < 1 else _just_below_1(2 * x - 1))


def exact_erf(where: Target, a: Value) -> Outcome:
    """The error function of ``a``; its complement is below exp(-x**2)."""
    if a in _INFINITIES:
        return Outcome(-_ONE if is_negative(a) else _ONE)
    return _odd(where, a, enclosures.erf, lambda x: _just_below_1(x**2) if x > 1 else None)


def exact_gelu(where: Target, a: Value) -> Outcome:
    """GELU of ``a``."""
    if a is NAN or a is INFINITY or a in (0, NEGATIVE_ZERO):
        return Outcome(a)
    if a is NEGATIVE_INFINITY:
        return Outcome(NEGATIVE_ZERO)
    x = Fraction(a)
    if abs(x) < 1:  # erf(x / sqrt(2)) lies between x / 2 and x
        return _refine(enclosures.gelu, x, where, Enclosure(*sorted((x / 2 * (1 + x / 2), x / 2 * (1 + x)))))
    if x > 0:  # minus x times the tail of the normal distribution, which is below exp(-x**2 / 2)
        return _refine(enclosures.gelu, x, where, _just_below_1(x**2 / 2).times(x))
    if far := _far_below(floor_log2(-x) + 1 - x**2 / 2 * _LOG2_E.lower, where):
        return Outcome(-far)
    return _refine(enclosures.gelu, x, where)


def exact_sigmoid(where: Target, a: Value) -> Outcome:
    """The logistic function of ``a``."""
    if a is NAN or a in _INFINITIES:
        return Outcome({NAN: NAN, INFINITY: _ONE}.get(a, _ZERO))  # type: ignore[arg-type]
    if a in (0, NEGATIVE_ZERO):
        return Outcome(Fraction(1, 2))
    x = Fraction(a)  # type: ignore[arg-type]
    if far := _far_below(_LOG2_E.times(x).upper, where) if x < 0 else None:  # it is below exp(x)
        return Outcome(far)
    bounds = None
    if abs(x) < 1:  # its slope there is between 1/8 and 1/4
        bounds = Enclosure(*sorted((Fraction(1, 2) + x / 8, Fraction(1, 2) + x / 4)))
    elif x > 0:
        bounds = _just_below_1(x)
    return _refine(enclosures.sigmoid, x, where, bounds)


def exact_rsqrt(where: Target, a: Value) -> Outcome:
    """The reciprocal square root of ``a``, which is the square root of the reciprocal."""
    if a in (0, NEGATIVE_ZERO):
        return Outcome(NEGATIVE_INFINITY if is_negative(a) else INFINITY, Flags.DIVIDE_BY_ZERO)
    if a is NAN or a is INFINITY:
        return Outcome(NAN if a is NAN else _ZERO)
    return INVALID if is_negative(a) else Outcome(square_root(1 / magnitude(a), where))


def exact_pow(where: Target, a: Value, b: Value) -> Outcome:
    """``a`` to the power of ``b``, the special values in the order of clause 9.2.1."""
    if b in (0, NEGATIVE_ZERO) or a == 1:
        return Outcome(_ONE)
    if a is NAN or b is NAN:
        return Outcome(NAN)
    if b in _INFINITIES:
        if a == -1:
            return Outcome(_ONE)
        grows = (a in _INFINITIES or magnitude(a) > 1) != is_negative(b)
        return Outcome(INFINITY if grows else _ZERO)
    y = magnitude(b) * (-1 if is_negative(b) else 1)
    negative = is_negative(a) and y.denominator == 1 and y.numerator % 2 == 1
    if a in (0, NEGATIVE_ZERO):
        size, flags = (INFINITY, Flags.DIVIDE_BY_ZERO) if y < 0 else (_ZERO, Flags.NONE)
        return Outcome(negate(size) if negative else size, flags)
    if a in _INFINITIES:
        limit: Value = INFINITY if y > 0 else _ZERO
        return Outcome(negate(limit) if negative else limit)
    if is_negative(a) and y.denominator != 1:
        return INVALID
    outcome = _power(magnitude(a), y, where)
    return Outcome(-outcome if negative else outcome)


# -- Ziv's strategy ---------------------------------------------------------------------------------------------------


def _refine(
    enclose: Callable[[Fraction, int], Enclosure], x: Fraction, where: Target, bounds: Enclosure | None = None
) -> Outcome:
    """What stands for a function at ``x``: found from ``bounds`` if they are narrow enough, else from enclosures.

    ``bounds`` need not contain their ends; the function's value is no rounding boundary.
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
    return Outcome(number)


def _odd(
    where: Target,
    a: Value,
    enclose: Callable[[Fraction, int], Enclosure],
    bounds: Callable[[Fraction], Enclosure | None],
) -> Outcome:
    """A function whose sign turns with that of ``a``, and which keeps zeros and NaN."""
    if a is NAN or a in (0, NEGATIVE_ZERO):
        return Outcome(a)
    x = magnitude(a)
    size = Fraction(_refine(enclose, x, where, bounds(x)).value)  # type: ignore[arg-type]
    return Outcome(-size if is_negative(a) else size)


def _far_above(exponent: Fraction, where: Target) -> Fraction | None:
    """A number that stands for every one from ``2**exponent`` on, if all of them overflow alike; else None."""
    top = where.format.max_exponent + 3
    return scale_b(1, top) if exponent >= top else None


def _far_below(exponent: Fraction, where: Target) -> Fraction | None:
    """A number that stands for all from ``2**exponent`` down to 0, if they are far below the smallest; else None."""
    return scale_b(1, where.negligible) if exponent <= where.negligible else None


def _just_below_1(exponent: Fraction) -> Enclosure:
    """The numbers from ``1 - 2**-exponent``, rounded down and not too close to 1, up to 1."""
    return Enclosure(1 - scale_b(1, -min(int(exponent), 200)), _ONE)


def _special_power(a: Value) -> Outcome | None:
    if a in (0, NEGATIVE_ZERO):
        return Outcome(_ONE)
    if a is NEGATIVE_INFINITY:
        return Outcome(_ZERO)
    return Outcome(a) if a is NAN or a is INFINITY else None


def _special_logarithm(a: Value) -> Outcome | None:
    if a in (0, NEGATIVE_ZERO):
        return Outcome(NEGATIVE_INFINITY, Flags.DIVIDE_BY_ZERO)
    if a is NAN or a is INFINITY:
        return Outcome(a)
    return INVALID if is_negative(a) else None


def _power(x: Fraction, y: Fraction, where: Target) -> Fraction:
    """What stands for ``x**y``, ``x`` positive and not 1, ``y`` not 0."""
    exponent = enclosures.log2(x, where.format.precision + 64).times(y)
    if far := _far_below(exponent.upper, where) or _far_above(exponent.lower, where):
        return far
    exact = _exact_power(x, y)
    if exact is not None:
        return exact
    bounds = None
    if max(map(abs, exponent)) < 1:  # as in exact_exp2
        flat, steep = exponent.times(Fraction(1, 2)), exponent
        bounds = Enclosure(1 + min(flat.lower, steep.lower), 1 + max(flat.upper, steep.upper))
    outcome = _refine(lambda base, bits: enclosures.power(base, y, bits), x, where, bounds)
    return Fraction(outcome.value)  # type: ignore[arg-type]


def _exact_power(x: Fraction, y: Fraction) -> Fraction | None:
    """``x**y`` if it is rational, and short enough that it could be a rounding boundary; else None.

    With y = a / b in lowest terms, it is rational if and only if numerator and denominator of x are powers of b.
    """
    top, bottom = _root(x.numerator, y.denominator), _root(x.denominator, y.denominator)
    if top is None or bottom is None:
        return None
    root = Fraction(top, bottom)
    twos = _trailing_zeros(top) - _trailing_zeros(bottom)
    odd = root / scale_b(1, twos)
    # An odd part other than 1 of n bits has, to the power of k, more than k * n / 2: more than 2**13, here.
    if abs(y.numerator) * max(odd.numerator, odd.denominator).bit_length() > 1 << 14 and odd != 1:
        return None
    return odd**y.numerator * scale_b(1, twos * y.numerator)


def _root(number: int, degree: int) -> int | None:
    """The integer whose power of ``degree`` is ``number`` >= 1, None if there is none."""
    if degree == 1 or number == 1:
        return number
    if degree >= number.bit_length():
        return None
    if degree % 2 == 0:
        half = isqrt(number)
        return _root(half, degree // 2) if half * half == number else None
    root = 1 << number.bit_length() // degree + 1  # too large: Newton's iteration falls to the root rounded down
    while (step := ((degree - 1) * root + number // root ** (degree - 1)) // degree) < root:
        root = step
    return root if root**degree == number else None


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1
