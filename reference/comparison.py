"""Comparisons of IEEE 754-2019 clauses 5.10 and 5.11, and the minima and maxima of clause 9.6.

Numbers are compared exactly, so operands may be of different formats. All functions take an int, Fraction, float
(taken exactly) or `Special`, and raise TypeError for anything else. The predicates are the quiet ones of the standard:
with NaN, all are False except `unordered`.
"""

from __future__ import annotations

from typing import Literal

from .values import NAN, Number, Value, as_value, is_negative, order

Relation = Literal["less", "equal", "greater", "unordered"]


def compare(a: Number, b: Number) -> Relation:
    """The relation between ``a`` and ``b``, one of the four of clause 5.11. -0 and +0 are equal, NaN is unordered.

    >>> compare(1, 0.5), compare(0.0, -0.0), compare(NAN, NAN)
    ('greater', 'equal', 'unordered')
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return "unordered"
    # The last element of the key distinguishes the zeros, which are equal here.
    return _relation(order(left)[:2], order(right)[:2])


def equal(a: Number, b: Number) -> bool:
    """compareQuietEqual.

    >>> equal(0.0, -0.0), equal(NAN, NAN)
    (True, False)
    """
    return compare(a, b) == "equal"


def less(a: Number, b: Number) -> bool:
    """compareQuietLess."""
    return compare(a, b) == "less"


def less_equal(a: Number, b: Number) -> bool:
    """compareQuietLessEqual."""
    return compare(a, b) in ("less", "equal")


def greater(a: Number, b: Number) -> bool:
    """compareQuietGreater."""
    return compare(a, b) == "greater"


def greater_equal(a: Number, b: Number) -> bool:
    """compareQuietGreaterEqual."""
    return compare(a, b) in ("greater", "equal")


def unordered(a: Number, b: Number) -> bool:
    """compareQuietUnordered: whether one of the two is NaN."""
    return compare(a, b) == "unordered"


def total_order(a: Number, b: Number) -> bool:
    """Whether ``a`` comes before ``b``, or is the same: totalOrder (clause 5.10), in which -0 is less than +0.

    NaN, which has no sign or payload here, stands where the standard puts positive NaNs: above +infinity.

    >>> total_order(-0.0, 0.0), total_order(0.0, -0.0), total_order(float("inf"), NAN)
    (True, False, True)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right is NAN
    return order(left) <= order(right)


def minimum(a: Number, b: Number) -> Value:
    """The lesser operand, where -0 is less than +0; NaN if one operand is NaN.

    >>> minimum(0.0, -0.0), minimum(1, NAN)
    (NEGATIVE_ZERO, NAN)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return NAN
    return left if total_order(left, right) else right


def maximum(a: Number, b: Number) -> Value:
    """The greater operand, where +0 is greater than -0; NaN if one operand is NaN."""
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return NAN
    return right if total_order(left, right) else left


def minimum_number(a: Number, b: Number) -> Value:
    """minimumNumber: as `minimum`, but the number if one operand is NaN.

    >>> minimum_number(1, NAN), minimum_number(NAN, NAN)
    (Fraction(1, 1), NAN)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right if left is NAN else left
    return minimum(left, right)


def maximum_number(a: Number, b: Number) -> Value:
    """maximumNumber: as `maximum`, but the number if one operand is NaN."""
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right if left is NAN else left
    return maximum(left, right)


def is_sign_minus(a: Number) -> bool:
    """isSignMinus (clause 5.7.2): whether the sign is minus, also of -0; False for NaN, which has no sign here.

    >>> is_sign_minus(-0.0), is_sign_minus(0.0)
    (True, False)
    """
    return is_negative(as_value(a))


def _relation(left: tuple, right: tuple) -> Relation:
    if left == right:
        return "equal"
    return "less" if left < right else "greater"
