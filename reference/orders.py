"""The orders of summation: which operations are rounded, one after the other, to add up the terms of a sum.

An order is written as a generator. It yields the `Step` to take next, is sent the value of that step, and returns the
sum. It does not round: whoever takes the steps does. The steps of matrix units stand in `aligned`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from .aligned import Aligned, aligned_sum, exponent_of, without_minus_zero
from .arithmetic import add, exact_sum, sub
from .outcomes import Exact, Target
from .values import Value

#: The name of an order of summation, a pair of name and length, or the alignment of a matrix unit: see `sum`.
Order: TypeAlias = str | tuple[str, int] | tuple[str, int, int] | Aligned
#: Orders that are a name, and those that are a pair of a name and a length.
PLAIN_ORDERS = ("sequential", "pairwise", "kahan")
ORDERS_WITH_LENGTH = ("blocked", "interleaved", "chunked")


class Step(NamedTuple):
    """An operation on numbers, rounded to ``where``, or exact if ``where`` is None."""

    operation: Exact
    operands: tuple[Value, ...]
    where: Target | None


#: Yields steps, at least one, is sent the value of each, and returns the last value.
Steps: TypeAlias = Generator[Step, Value, Value]
#: Takes the terms and the target of every addition, and yields the additions.
Adder: TypeAlias = Callable[[Sequence[Value], Target], Steps]
#: The exponents of the terms as a matrix unit takes them, None for a zero. No exponents: those of the numbers.
Exponents: TypeAlias = Sequence[int | None] | None


def adder(order: Order, exponents: Exponents = None) -> Adder:
    """The adder for an order that `sum` names.

    Args:
        exponents: the exponents of the terms; only the alignment of a matrix unit depends on them.

    Raises:
        ValueError: no such order.
    """
    match order:
        case Aligned():
            return lambda terms, where: _aligned(order, terms, exponents, where)
        case ("aligned", int(length), int(fraction_bits)):
            return adder(Aligned(length, fraction_bits), exponents)
        case "sequential":
            return _sequential
        case "pairwise":
            return _pairwise
        case "kahan":
            return _kahan
        case ("blocked", int(length)) if length >= 1:
            return lambda terms, where: _in_parts(_rows(terms, length), where)
        case ("interleaved", int(length)) if length >= 1:
            return lambda terms, where: _in_parts(_lanes(terms, length), where)
        case ("chunked", int(length)) if length >= 1:
            return lambda terms, where: _chunked(_rows(terms, length), where)
    raise ValueError(
        f"unknown order {order!r}: use one of {', '.join(PLAIN_ORDERS)}, or a pair of one of "
        f"{', '.join(ORDERS_WITH_LENGTH)} and a positive integer, or ('aligned', length, fraction_bits)"
    )


def is_aligned(order: Order) -> bool:
    """Whether ``order`` is that of a matrix unit."""
    return isinstance(order, Aligned) or (isinstance(order, tuple) and order[0] == "aligned")


def _rows(terms: Sequence[Value], length: int) -> list[Sequence[Value]]:
    return [terms[i : i + length] for i in range(0, len(terms), length)]


def _lanes(terms: Sequence[Value], length: int) -> list[Sequence[Value]]:
    return [terms[lane::length] for lane in range(min(length, len(terms)))]


def _chunked(rows: Iterable[Sequence[Value]], where: Target) -> Steps:
    """The rows added to the total one after the other, with one rounding each; +0 if there are none."""
    total: tuple[Value, ...] = ()
    for row in rows:
        total = ((yield Step(exact_sum, (*total, *row), where)),)
    return total[0] if total else Fraction(0)


def _aligned(order: Aligned, terms: Sequence[Value], exponents: Exponents, where: Target) -> Steps:
    """The steps of a matrix unit: `Aligned` defines them."""
    if exponents is None:
        exponents = [exponent_of(term, where.format.emin) for term in terms]
    total: Value = Fraction(0)
    for first in range(0, len(terms), order.length):
        part = slice(first, first + order.length)
        step = aligned_sum(order, exponents[part])
        total = yield Step(step, (total, *terms[part]), where)
        if not order.late_bits:
            total = yield Step(without_minus_zero, (total,), None)
    return total


def _sequential(terms: Sequence[Value], where: Target) -> Steps:
    return _chunked(_rows(terms, 1), where)


def _in_parts(parts: Iterable[Sequence[Value]], where: Target) -> Steps:
    """The sequential sum of the sequential sums of the parts."""
    sums = []
    for part in parts:
        sums.append((yield from _sequential(part, where)))
    return (yield from _sequential(sums, where))


def _pairwise(terms: Sequence[Value], where: Target) -> Steps:
    while len(terms) > 1:
        sums = []
        for pair in _rows(terms, 2):
            sums.append((yield Step(exact_sum, tuple(pair), where)) if len(pair) == 2 else pair[0])
        terms = sums
    return (yield Step(exact_sum, tuple(terms), where))


def _kahan(terms: Sequence[Value], where: Target) -> Steps:
    total = yield from _sequential(terms[:1], where)
    compensation: Value = Fraction(0)
    for term in terms[1:]:
        corrected = yield Step(sub.exact, (term, compensation), where)
        longer = yield Step(add.exact, (total, corrected), where)
        gained = yield Step(sub.exact, (longer, total), where)
        compensation = yield Step(sub.exact, (gained, corrected), where)
        total = longer
    return total
