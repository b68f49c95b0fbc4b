"""Arithmetic with one rounding: the operations of IEEE 754-2019 clauses 5.3.1 and 5.4.1, into any format.

Operands are exact numbers, which need not be values of a format: ``add(a, b, "fp16")`` is the exact sum rounded once.
Special operands, signs of zeros and invalid operations follow clauses 6 and 7. The body of each function is the exact
operation, and `rounded` makes the public function of it. All public functions share these arguments and errors.

Arguments:
    a, b, c: an int, Fraction, float (taken exactly) or `Special`.
    format: the format of the result, a name or a `FloatFormat`.
    rounding, overflow: as in `round`.
    random: as in `round`, the random number of stochastic rounding: the same operands and number give the same result.

Raises:
    ValueError: no such format, rounding or overflow mode, or an overflow mode that the format cannot take; ``random``
        missing, out of range, or given without stochastic rounding.
    TypeError: an operand, ``format`` or ``random`` is none of the above.

`round` says what becomes of a NaN or an infinity that the format does not have. `with_flags` gives the flags too.
"""

from __future__ import annotations

from fractions import Fraction

from .irrational import square_root
from .operations import rounded
from .outcomes import INVALID, Flags, Outcome, Target
from .values import (
    INFINITIES,
    INFINITY,
    NAN,
    NEGATIVE_ZERO,
    ZEROS,
    Value,
    is_negative,
    magnitude,
    negate,
    rational,
    with_sign,
)


@rounded
def convert(where: Target, a: Value) -> Outcome:
    """``a`` in another format (clause 5.4.2, convertFormat): the same as `round`.

    >>> convert(0.1, "e4m3fn")
    Fraction(13, 128)
    """
    return Outcome(a)


@rounded
def add(where: Target, a: Value, b: Value) -> Outcome:
    """``a + b``. Infinities of opposite sign are invalid.

    An exact zero from operands of opposite sign is +0, or -0 if ``rounding`` is ``down`` (clause 6.3).

    >>> add(448, Fraction(1, 512), "e4m3fn", "up"), add(1, -1, "e4m3fn", "down")
    (Fraction(448, 1), NEGATIVE_ZERO)
    """
    return exact_sum(where, a, b)


def exact_sum(where: Target, *terms: Value) -> Outcome:
    """The sum of any number of terms, by clauses 6.1 (infinities), 6.2 (NaN), 6.3 (zeros) and 7.2 d; +0 for none."""
    if NAN in terms:
        return Outcome(NAN)
    infinities = {term for term in terms if term in INFINITIES}
    if infinities:
        return INVALID if len(infinities) == 2 else Outcome(infinities.pop())
    total = sum(map(rational, terms), Fraction(0))
    if total != 0:
        return Outcome(total)
    if len({is_negative(term) for term in terms}) == 2:
        return Outcome(NEGATIVE_ZERO if where.rounding == "down" else Fraction(0))
    return Outcome(terms[0] if terms else Fraction(0))  # zeros of one sign


@rounded
def sub(where: Target, a: Value, b: Value) -> Outcome:
    """``a - b``, which is ``a + (-b)`` in every respect.

    >>> sub(17, Fraction(1, 4), "e4m3fn")
    Fraction(16, 1)
    """
    return add.exact(where, a, negate(b))


@rounded
def mul(where: Target, a: Value, b: Value) -> Outcome:
    """``a * b``, whose sign is the exclusive or of the operands' signs. Zero times infinity is invalid.

    >>> mul(1.125, 1.125, "e4m3fn"), mul(-0.0, 3, "e4m3fn")
    (Fraction(5, 4), NEGATIVE_ZERO)
    """
    if a is NAN or b is NAN:
        return Outcome(NAN)
    negative = is_negative(a) != is_negative(b)
    if a in INFINITIES or b in INFINITIES:
        return INVALID if a in ZEROS or b in ZEROS else Outcome(with_sign(INFINITY, negative))
    return Outcome(with_sign(magnitude(a) * magnitude(b), negative))


@rounded
def div(where: Target, a: Value, b: Value) -> Outcome:
    """``a / b``, whose sign is the exclusive or of the operands' signs.

    Zero by zero and infinity by infinity are invalid. Any other finite number divided by zero is infinite.

    >>> div(1, 3, "e4m3fn"), div(-1, 0, "fp16"), div(-1, 0, "e4m3fn")
    (Fraction(11, 32), NEGATIVE_INFINITY, Fraction(-448, 1))
    """
    if a is NAN or b is NAN:
        return Outcome(NAN)
    negative = is_negative(a) != is_negative(b)
    if a in INFINITIES:
        return INVALID if b in INFINITIES else Outcome(with_sign(INFINITY, negative))
    if b in INFINITIES:
        return Outcome(with_sign(Fraction(0), negative))
    if b in ZEROS:
        return INVALID if a in ZEROS else Outcome(with_sign(INFINITY, negative), Flags.DIVIDE_BY_ZERO)
    return Outcome(with_sign(magnitude(a) / magnitude(b), negative))


@rounded
def fma(where: Target, a: Value, b: Value, c: Value) -> Outcome:
    """``a * b + c`` with one rounding (fusedMultiplyAdd). A zero has the sign of the sum of ``a * b`` and ``c``.

    Zero times infinity is invalid, unless ``c`` is NaN (which clause 7.2 c leaves open).

    >>> fma(1.125, 1.125, -1.25, "e4m3fn")
    Fraction(1, 64)
    """
    if c is NAN:
        return Outcome(NAN)
    product = mul.exact(where, a, b)
    return product if product.value is NAN else add.exact(where, product.value, c)


@rounded
def sqrt(where: Target, a: Value) -> Outcome:
    """The square root of ``a``, which is -0 for -0 (clause 5.4.1). A number below zero is invalid.

    >>> sqrt(2, "e4m3fn"), sqrt(2, "e4m3fn", "up"), sqrt(Fraction(9, 4), "e4m3fn", "up")
    (Fraction(11, 8), Fraction(3, 2), Fraction(3, 2))
    """
    if a is NAN or a is INFINITY or a in ZEROS:
        return Outcome(a)
    return INVALID if is_negative(a) else Outcome(square_root(magnitude(a), where))


@rounded
def remainder(where: Target, a: Value, b: Value) -> Outcome:
    """``a - b * n``, where n is the integer nearest to ``a / b``, and in a tie the even one (clause 5.3.1).

    A zero has the sign of ``a``; the remainder by an infinity is ``a``. An infinite ``a`` or a zero ``b`` is invalid.

    >>> remainder(5, 3, "e4m3fn"), remainder(-6, 3, "e4m3fn")
    (Fraction(-1, 1), NEGATIVE_ZERO)
    """
    if a is NAN or b is NAN:
        return Outcome(NAN)
    if a in INFINITIES or b in ZEROS:
        return INVALID
    if b in INFINITIES:
        return Outcome(a)
    number, divisor = rational(a), rational(b)
    rest = number - divisor * (number / divisor).__round__()  # Fraction rounds ties to even
    return Outcome(rest if rest else with_sign(rest, is_negative(a)))
