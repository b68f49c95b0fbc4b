"""Arithmetic with one rounding: the operations of IEEE 754-2019 clauses 5.3.1 and 5.4.1, into any format.

Operands are exact numbers and need not be of one format, or of any: ``add(a, b, "fp16")`` is the exact sum rounded
once. Special operands, signs of zeros and invalid operations are those of clauses 6 and 7. All operations share

Arguments:
    a, b, c: an int, Fraction, float (taken exactly) or `Special`.
    format: the format of the result, a name or a `FloatFormat`.
    rounding, overflow: as in `round`.
    random: as in `round`, the random number of stochastic rounding: the same operands and number give the same result.

Raises:
    ValueError: no such format, rounding or overflow mode, or an overflow mode that the format cannot take; ``random``
        missing, out of range, or given without stochastic rounding.
    TypeError: an operand, ``format`` or ``random`` is none of the above.

NaN results, and infinite ones in formats without infinity, become what `round` makes of NaN and infinity.
`with_flags` gives the flags too.
"""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

from fpsim.formats import FloatFormat

from .outcomes import INVALID, Flags, Outcome, Target, deliver, target
from .values import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Number,
    Special,
    Value,
    floor_log2,
    is_negative,
    magnitude,
    negate,
    scale_b,
)

_INFINITIES = (INFINITY, NEGATIVE_INFINITY)


def convert(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a`` in another format (clause 5.4.2, convertFormat): the same as `round`.

    >>> convert(0.1, "e4m3fn")
    Fraction(13, 128)
    """
    return deliver(exact_convert, (a,), target(format, rounding, overflow, random))


def add(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a + b``. A sum of numbers of opposite sign that is exactly zero is +0, for rounding ``down`` -0 (clause 6.3).

    Infinities of opposite sign are invalid.

    >>> add(448, Fraction(1, 512), "e4m3fn", "up"), add(1, -1, "e4m3fn", "down")
    (Fraction(448, 1), NEGATIVE_ZERO)
    """
    return deliver(exact_add, (a, b), target(format, rounding, overflow, random))


def sub(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a - b``, which is ``a + (-b)`` in every respect.

    >>> sub(17, Fraction(1, 4), "e4m3fn")
    Fraction(16, 1)
    """
    return deliver(exact_sub, (a, b), target(format, rounding, overflow, random))


def mul(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a * b``, its sign the exclusive or of the operands' signs. Zero times infinity is invalid.

    >>> mul(1.125, 1.125, "e4m3fn"), mul(-0.0, 3, "e4m3fn")
    (Fraction(5, 4), NEGATIVE_ZERO)
    """
    return deliver(exact_mul, (a, b), target(format, rounding, overflow, random))


def div(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a / b``, its sign the exclusive or of the operands' signs.

    Zero by zero and infinity by infinity are invalid; any other finite number by zero is infinite.

    >>> div(1, 3, "e4m3fn"), div(-1, 0, "fp16"), div(-1, 0, "e4m3fn")
    (Fraction(11, 32), NEGATIVE_INFINITY, Fraction(-448, 1))
    """
    return deliver(exact_div, (a, b), target(format, rounding, overflow, random))


def fma(
    a: Number,
    b: Number,
    c: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a * b + c`` with one rounding (fusedMultiplyAdd), its zero signed as that of the sum of ``a * b`` and ``c``.

    Zero times infinity is invalid, unless ``c`` is NaN (which clause 7.2 c leaves open).

    >>> fma(1.125, 1.125, -1.25, "e4m3fn")
    Fraction(1, 64)
    """
    return deliver(exact_fma, (a, b, c), target(format, rounding, overflow, random))


def sqrt(
    a: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """The square root of ``a``; that of -0 is -0 (clause 5.4.1). Below zero it is invalid.

    >>> sqrt(2, "e4m3fn"), sqrt(2, "e4m3fn", "up"), sqrt(Fraction(9, 4), "e4m3fn", "up")
    (Fraction(11, 8), Fraction(3, 2), Fraction(3, 2))
    """
    return deliver(exact_sqrt, (a,), target(format, rounding, overflow, random))


def remainder(
    a: Number,
    b: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``a - b * n`` for the integer n nearest to ``a / b``, the even one of two (clause 5.3.1).

    A zero has the sign of ``a``; the remainder by an infinity is ``a``. An infinite ``a`` or a zero ``b`` is invalid.

    >>> remainder(5, 3, "e4m3fn"), remainder(-6, 3, "e4m3fn")
    (Fraction(-1, 1), NEGATIVE_ZERO)
    """
    return deliver(exact_remainder, (a, b), target(format, rounding, overflow, random))


# -- the exact results ------------------------------------------------------------------------------------------------


def exact_convert(where: Target, a: Value) -> Outcome:
    """The number itself."""
    return Outcome(a)


def exact_add(where: Target, a: Value, b: Value) -> Outcome:
    """The sum of two."""
    return exact_sum(where, a, b)


def exact_sum(where: Target, *terms: Value) -> Outcome:
    """The sum of any number of terms, by clauses 6.1 (infinities), 6.2 (NaN), 6.3 (zeros) and 7.2 d; +0 of none."""
    if NAN in terms:
        return Outcome(NAN)
    infinities = {term for term in terms if term in _INFINITIES}
    if infinities:
        return INVALID if len(infinities) == 2 else Outcome(infinities.pop())
    total = sum(map(_number, terms), Fraction(0))
    if total != 0:
        return Outcome(total)
    if len({is_negative(term) for term in terms}) == 2:
        return Outcome(NEGATIVE_ZERO if where.rounding == "down" else Fraction(0))
    return Outcome(terms[0] if terms else Fraction(0))  # zeros of one sign


def exact_sub(where: Target, a: Value, b: Value) -> Outcome:
    """The difference."""
    return exact_add(where, a, negate(b))


def exact_mul(where: Target, a: Value, b: Value) -> Outcome:
    """The product, by clauses 6.3 and 7.2 b."""
    if a is NAN or b is NAN:
        return Outcome(NAN)
    negative = is_negative(a) != is_negative(b)
    if a in _INFINITIES or b in _INFINITIES:
        return INVALID if _is_zero(a) or _is_zero(b) else Outcome(_with_sign(INFINITY, negative))
    return Outcome(_with_sign(magnitude(a) * magnitude(b), negative))


def exact_div(where: Target, a: Value, b: Value) -> Outcome:
    """The quotient, by clauses 6.3, 7.2 e and 7.3."""
    if a is NAN or b is NAN:
        return Outcome(NAN)
    negative = is_negative(a) != is_negative(b)
    if a in _INFINITIES:
        return INVALID if b in _INFINITIES else Outcome(_with_sign(INFINITY, negative))
    if b in _INFINITIES:
        return Outcome(_with_sign(Fraction(0), negative))
    if _is_zero(b):
        return INVALID if _is_zero(a) else Outcome(_with_sign(INFINITY, negative), Flags.DIVIDE_BY_ZERO)
    return Outcome(_with_sign(magnitude(a) / magnitude(b), negative))


def exact_fma(where: Target, a: Value, b: Value, c: Value) -> Outcome:
    """The product, then the sum."""
    if c is NAN:
        return Outcome(NAN)
    product = exact_mul(where, a, b)
    return product if product.value is NAN else exact_add(where, product.value, c)


def exact_sqrt(where: Target, a: Value) -> Outcome:
    """The square root if it is short, else the number that stands for it, by clause 7.2 g."""
    if a is NAN or a is INFINITY or _is_zero(a):
        return Outcome(a)
    return INVALID if is_negative(a) else Outcome(square_root(magnitude(a), where))


def exact_remainder(where: Target, a: Value, b: Value) -> Outcome:
    """The remainder, by clauses 5.3.1 and 7.2 f."""
    if a is NAN or b is NAN:
        return Outcome(NAN)
    if a in _INFINITIES or _is_zero(b):
        return INVALID
    if b in _INFINITIES:
        return Outcome(a)
    number, divisor = _number(a), _number(b)
    rest = number - divisor * (number / divisor).__round__()  # Fraction rounds ties to even
    return Outcome(rest if rest else _with_sign(rest, is_negative(a)))


def square_root(square: Fraction, where: Target) -> Fraction:
    """The root of ``square`` > 0, or the number of one bit more than a boundary that stands for it: see `stand_in`."""
    quantum = scale_b(1, floor_log2(square) // 2 - where.boundary_bits)
    scaled = square / quantum**2
    below = isqrt(int(scaled))  # the root of scaled rounded down: an integer of one bit more than a boundary
    return (below if below**2 == scaled else below | 1) * quantum


def _number(finite: Value) -> Fraction:
    return Fraction(0) if isinstance(finite, Special) else finite


def _is_zero(value: Value) -> bool:
    return value is NEGATIVE_ZERO or value == 0


def _with_sign(size: Value, negative: bool) -> Value:
    return negate(size) if negative else size
