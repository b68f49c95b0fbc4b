"""Sums and inner products: exact with one rounding, or every step rounded, in any order.

IEEE 754-2019 clause 9.4 leaves the order and the intermediate precision of reductions to the implementation. Here both
are arguments, so that what a processor, a loop or a matrix unit computes can be written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import islice
from typing import TypeAlias

from fpsim.formats import FloatFormat

from .arithmetic import exact_add, exact_convert, exact_mul, exact_sub
from .outcomes import Exact, Target, deliver, target
from .values import Number, Value, as_value

#: The name of an order of summation, or a pair of name and length: see `sum`.
Order: TypeAlias = str | tuple[str, int]

#: Orders that are a name, and those that are a pair of a name and a length.
PLAIN_ORDERS = ("sequential", "pairwise", "kahan")
ORDERS_WITH_LENGTH = ("blocked", "interleaved", "chunked")


def sum(
    values: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
) -> Value:
    """The sum of ``values``, in ``format``.

    Without an accumulator the exact sum is rounded once, and the order does not matter. With one, every addition
    rounds to it, by the rules of `add`, and the final sum is then rounded to ``format``. The orders, with ``+`` for an
    addition that rounds to the accumulator and x1 to xn for the values:

    - ``"sequential"``: ``(((x1 + x2) + x3) + ...) + xn``, beginning with x1 rounded to the accumulator.
    - ``"pairwise"``: neighbours are added, ``x1 + x2``, ``x3 + x4``, ...; a last one that is left over goes on as it
      is. So also the sums of the pairs, until one is left.
    - ``("blocked", n)``: every n values in a row (the last block may have fewer) are summed sequentially, then their
      sums are, in order.
    - ``("interleaved", n)``: n lanes as in a vector unit: lane i sums x_i, x_(i+n), x_(i+2n), ... sequentially; then
      the lanes' sums are summed sequentially.
    - ``("chunked", n)``: the exact sum of every n values in a row is one addition: ``(c1 + c2) + ...``, with the c's
      exact and c1 rounded first. So do matrix units that add n products at once. ``("chunked", 1)`` is sequential.
    - ``"kahan"``: W. Kahan's compensated summation ("Further remarks on reducing truncation errors", Communications
      of the ACM 8 (1965)), every operation rounded to the accumulator: from s = x1 rounded and c = 0, for every x in
      order y = x - c, t = s + y, c = (t - s) - y, s = t; the sum is s.

    An exact sum of zero is signed as in `add`: -0 if all values are -0, or for rounding ``down`` if not all are +0. The
    sum of nothing is +0. (Hardware that begins with +0 and not with x1 differs in one case: it never gives -0, unless
    rounding ``down``.)

    Arguments:
        values: numbers, each an int, Fraction, float (taken exactly) or `Special`.
        format: the format of the result, a name or a `FloatFormat`.
        rounding, overflow: as in `round`; for the additions too.
        accumulator: the format to which every addition rounds; None for an exact sum.
        order: one of the above.

    Raises:
        ValueError: no such format, rounding, overflow mode or order, or an overflow mode that ``format`` or
            ``accumulator`` cannot take.
        TypeError: a value or format is none of the above.

    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn")
    Fraction(9, 8)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn")
    Fraction(1, 1)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn", order=("chunked", 3))
    Fraction(9, 8)
    """
    where = target(format, rounding, overflow)
    add_up = _summation(order)
    terms = [as_value(value) for value in values]
    if accumulator is None:
        return deliver(exact_convert, (_exact_sum(terms, where),), where)
    return deliver(exact_convert, (add_up(terms, target(accumulator, rounding, overflow)),), where)


def dot(
    xs: Iterable[Number],
    ys: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    product: str | FloatFormat | None = None,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
) -> Value:
    """The inner product of ``xs`` and ``ys``, in ``format``: the `sum` of their products.

    Products are exact, or rounded to the format ``product``. Exact products summed sequentially are a chain of fused
    multiply-adds, each of which rounds once: ``fma(x2, y2, x1 * y1 rounded)`` and so on. Without an accumulator and
    with exact products, the inner product is rounded once in all.

    Arguments:
        xs, ys: numbers as in `sum`, as many of both.
        format, rounding, overflow, accumulator, order: as in `sum`.
        product: the format to which every product is rounded; None for exact products.

    Raises:
        ValueError: as `sum`; or ``xs`` and ``ys`` differ in length.
        TypeError: as `sum`.

    >>> dot([1.125, 1], [1.125, -1.25], "e4m3fn"), dot([1.125, 1], [1.125, -1.25], "e4m3fn", product="e4m3fn")
    (Fraction(1, 64), Fraction(0, 1))
    """
    left, right = list(xs), list(ys)
    if len(left) != len(right):
        raise ValueError(f"an inner product takes two vectors of one length, got {len(left)} and {len(right)} numbers")
    if product is None:
        exactly = target(format, rounding, overflow)  # an exact product depends on nothing in it
        terms = [exact_mul(exactly, as_value(x), as_value(y)).value for x, y in zip(left, right, strict=True)]
    else:
        where = target(product, rounding, overflow)
        terms = [deliver(exact_mul, pair, where) for pair in zip(left, right, strict=True)]
    return sum(terms, format, rounding, overflow, accumulator=accumulator, order=order)


# -- the orders -------------------------------------------------------------------------------------------------------

_Summation: TypeAlias = Callable[[Sequence[Value], Target], Value]


def _summation(order: Order) -> _Summation:
    match order:
        case "sequential":
            return _sequential
        case "pairwise":
            return _pairwise
        case "kahan":
            return _kahan
        case (("blocked" | "interleaved" | "chunked") as name, int(length)) if length >= 1:
            return lambda terms, where: _sequential(_parts(terms, name, length, where), where)
    raise ValueError(
        f"unknown order {order!r}: use one of {', '.join(PLAIN_ORDERS)}, or a pair of one of "
        f"{', '.join(ORDERS_WITH_LENGTH)} and a positive integer"
    )


def _exact_sum(terms: Iterable[Value], where: Target) -> Value:
    """The exact sum, its zero signed as ``where`` says, which does not depend on the order."""
    return _fold(lambda a, b: exact_add(where, a, b).value, terms)


def _sequential(terms: Iterable[Value], where: Target) -> Value:
    rounded_first = (term if i else deliver(exact_convert, (term,), where) for i, term in enumerate(terms))
    return _fold(lambda a, b: deliver(exact_add, (a, b), where), rounded_first)


def _pairwise(terms: Sequence[Value], where: Target) -> Value:
    while len(terms) > 1:
        pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
        terms = [deliver(exact_add, tuple(pair), where) if len(pair) == 2 else pair[0] for pair in pairs]
    return deliver(exact_convert, (terms[0] if terms else Fraction(0),), where)


def _kahan(terms: Sequence[Value], where: Target) -> Value:
    def step(operation: Exact, a: Value, b: Value) -> Value:
        return deliver(operation, (a, b), where)

    total = _sequential(terms[:1], where)
    compensation: Value = Fraction(0)
    for term in islice(terms, 1, None):
        corrected = step(exact_sub, term, compensation)
        longer = step(exact_add, total, corrected)
        compensation = step(exact_sub, step(exact_sub, longer, total), corrected)
        total = longer
    return total


def _parts(terms: Sequence[Value], name: str, length: int, where: Target) -> list[Value]:
    """The partial sums that an order with a length adds up in the end."""
    if name == "interleaved":
        return [_sequential(terms[lane::length], where) for lane in range(min(length, len(terms)))]
    rows = [terms[i : i + length] for i in range(0, len(terms), length)]
    return [(_exact_sum if name == "chunked" else _sequential)(row, where) for row in rows]


def _fold(add: Callable[[Value, Value], Value], terms: Iterable[Value]) -> Value:
    """``terms`` added from the first to the last; +0 if there are none."""
    rest = iter(terms)
    total = next(rest, Fraction(0))
    for term in rest:
        total = add(total, term)
    return total
