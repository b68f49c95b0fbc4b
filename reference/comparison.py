"""Comparisons of IEEE 754-2019 clauses 5.10 and 5.11, and the minima and maxima of clause 9.6.

Numbers are compared exactly, so operands may be of different formats. All functions take an int, Fraction, float
(taken exactly) or `Special`, and raise TypeError for anything else. The predicates are the standard's quiet ones:
with NaN every one is False, except `unordered`.
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
    # order tells the zeros apart in its last place; here it does not count.
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

    NaN, whose sign and payload are not modelled, stands where the standard puts positive ones: above +infinity.

    >>> total_order(-0.0, 0.0), total_order(0.0, -0.0), total_order(float("inf"), NAN)
    (True, False, True)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right is NAN
    return order(left) <= order(right)


def minimum(a: Number, b: Number) -> Value:
    """The lesser one, -0 less than +0; NaN if one is NaN.

    >>> minimum(0.0, -0.0), minimum(1, NAN)
    (NEGATIVE_ZERO, NAN)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return NAN
    return left if total_order(left, right) else right


def maximum(a: Number, b: Number) -> Value:
    """The greater one, +0 greater than -0; NaN if one is NaN."""
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return NAN
    return right if total_order(left, right) else left


def minimum_number(a: Number, b: Number) -> Value:
    """minimumNumber: as `minimum`, but of a number and NaN it is the number.

    >>> minimum_number(1, NAN), minimum_number(NAN, NAN)
    (Fraction(1, 1), NAN)
    """
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right if left is NAN else left
    return minimum(left, right)


def maximum_number(a: Number, b: Number) -> Value:
    """maximumNumber: as `maximum`, but of a number and NaN it is the number."""
    left, right = as_value(a), as_value(b)
    if left is NAN or right is NAN:
        return right if left is NAN else left
    return maximum(left, right)


def is_sign_minus(a: Number) -> bool:
    """isSignMinus (clause 5.7.2): whether the sign is minus, that of -0 included; False for NaN, which has none here.

    >>> is_sign_minus(-0.0), is_sign_minus(0.0)
    (True, False)
    """
    return is_negative(as_value(a))


def _relation(left: tuple, right: tuple) -> Relation:
    if left == right:
        return "equal"
    return "less" if left < right else "greater"
