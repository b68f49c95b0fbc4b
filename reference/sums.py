"""Sums and inner products: exact with one rounding, or every step rounded, in any order.

IEEE 754-2019 clause 9.4 leaves the order and the intermediate precision of reductions to the implementation. Here both
are arguments, so that what a processor, a loop or a matrix unit computes can be written down.

An order is written as a generator: it yields the `Step` to take next, is sent the step's value, and returns the sum.
So it says what is added to what, and `_run` alone rounds, draws random numbers and collects flags.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from itertools import count, repeat
from operator import or_
from typing import NamedTuple, TypeAlias

from fpsim.formats import FloatFormat, split_rounding

from .arithmetic import exact_add, exact_convert, exact_mul, exact_sub, exact_sum
from .outcomes import Exact, Flags, Result, Target, finish, target
from .values import Number, Value, as_value

#: The name of an order of summation, or a pair of name and length: see `sum`.
Order: TypeAlias = str | tuple[str, int]
#: The random numbers of stochastic rounding, one for each rounding, or a function of its index: see `sum`.
RandomNumbers: TypeAlias = Sequence[int] | Callable[[int], int]

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
    random: RandomNumbers | None = None,
) -> Value:
    """The sum of ``values``, in ``format``.

    Without an accumulator the exact sum is rounded once, and the order does not matter. With one, every addition
    rounds to it, by the rules of `add`, and the final sum is then rounded to ``format``. The orders, with ``+`` for an
    addition that rounds to the accumulator and x1 to xn for the values:

    - ``"sequential"``: ``(((x1 + x2) + x3) + ...) + xn``, beginning with x1 rounded to the accumulator.
    - ``"pairwise"``: neighbours are added, ``x1 + x2``, ``x3 + x4``, ...; a last one that is left over goes on as it
      is. So also the sums of the pairs, until one is left, which is rounded to the accumulator.
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

    In stochastic rounding every rounding has a random number of its own. They are counted from 0 in the order written
    above: pairwise sums level by level, blocks and lanes one after the other and then their sums, of Kahan's method y,
    t, t - s and c; last the rounding to ``format``. A rounding that turns out to be exact counts too, so that what a
    random number is for does not depend on the values.

    Arguments:
        values: numbers, each an int, Fraction, float (taken exactly) or `Special`.
        format: the format of the result, a name or a `FloatFormat`.
        rounding, overflow: as in `round`; for the additions too.
        accumulator: the format to which every addition rounds; None for an exact sum.
        order: one of the above.
        random: of stochastic rounding, and only of it: the random numbers as in `round`, a sequence of exactly as
            many as there are roundings, or a function from the index of a rounding to its number.

    Raises:
        ValueError: no such format, rounding, overflow mode or order, or an overflow mode that ``format`` or
            ``accumulator`` cannot take; ``random`` missing, too short or too long, with a number out of range, or
            given without stochastic rounding.
        TypeError: a value, format or ``random`` is none of the above.

    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn")
    Fraction(9, 8)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn")
    Fraction(1, 1)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn", order=("chunked", 3))
    Fraction(9, 8)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", "stochastic:1", accumulator="e4m3fn", random=[0, 1, 0, 0])
    Fraction(9, 8)
    """
    return sum_with_flags(values, format, rounding, overflow, accumulator=accumulator, order=order, random=random).value


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
    random: RandomNumbers | None = None,
) -> Value:
    """The inner product of ``xs`` and ``ys``, in ``format``: the `sum` of their products.

    Products are exact, or rounded to the format ``product``. Exact products summed sequentially are a chain of fused
    multiply-adds, each of which rounds once: ``fma(x2, y2, x1 * y1 rounded)`` and so on. Without an accumulator and
    with exact products, the inner product is rounded once in all.

    In stochastic rounding, the roundings of products come first, in order; those of the sum follow.

    Arguments:
        xs, ys: numbers as in `sum`, as many of both.
        format, rounding, overflow, accumulator, order, random: as in `sum`.
        product: the format to which every product is rounded; None for exact products.

    Raises:
        ValueError: as `sum`; or ``xs`` and ``ys`` differ in length.
        TypeError: as `sum`.

    >>> dot([1.125, 1], [1.125, -1.25], "e4m3fn"), dot([1.125, 1], [1.125, -1.25], "e4m3fn", product="e4m3fn")
    (Fraction(1, 64), Fraction(0, 1))
    """
    return dot_with_flags(
        xs, ys, format, rounding, overflow, product=product, accumulator=accumulator, order=order, random=random
    ).value


def sum_with_flags(
    values: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
    random: RandomNumbers | None = None,
    tininess: str = "after",
) -> Result:
    """`sum`, and the flags of all its roundings together: see `with_flags`."""
    into = target(format, rounding, overflow, tininess=tininess)
    within = None if accumulator is None else target(accumulator, rounding, overflow, tininess=tininess)
    add_up = _order(order)
    terms = [as_value(value) for value in values]
    return _run(lambda: _sum(terms, add_up, within, into), random, rounding)


def dot_with_flags(
    xs: Iterable[Number],
    ys: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    product: str | FloatFormat | None = None,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
    random: RandomNumbers | None = None,
    tininess: str = "after",
) -> Result:
    """`dot`, and the flags of all its products and roundings together: see `with_flags`."""
    left, right = [as_value(x) for x in xs], [as_value(y) for y in ys]
    if len(left) != len(right):
        raise ValueError(f"an inner product takes two vectors of one length, got {len(left)} and {len(right)} numbers")
    into = target(format, rounding, overflow, tininess=tininess)
    within = None if accumulator is None else target(accumulator, rounding, overflow, tininess=tininess)
    multiply = None if product is None else target(product, rounding, overflow, tininess=tininess)
    add_up = _order(order)

    def steps() -> Steps:
        terms = []
        for pair in zip(left, right, strict=True):
            terms.append((yield Step(exact_mul, pair, multiply)))
        return (yield from _sum(terms, add_up, within, into))

    return _run(steps, random, rounding)


# -- steps ------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An operation on numbers, rounded to ``where``; None for an exact product, which needs to know nothing of it."""

    operation: Exact
    operands: tuple[Value, ...]
    where: Target | None


#: Yields steps, at least one, is sent the value of each, and returns the last value.
Steps: TypeAlias = Generator[Step, Value, Value]


def _run(steps: Callable[[], Steps], random: RandomNumbers | None, rounding: str) -> Result:
    """The last value of the steps, and the flags of all: flags are sticky (IEEE 754-2019 clause 7.1)."""
    numbers = _numbers(random, rounding, steps)
    raised: list[Flags] = []

    def take(step: Step) -> Value:
        operation, operands, where = step
        if where is None:
            value, flags = operation(None, *operands)
        else:
            result = finish(operation, operands, replace(where, random=next(numbers)))
            value, flags = result.value, result.flags
        raised.append(flags)
        return value

    return Result(_drive(steps(), take), reduce(or_, raised))


def _drive(steps: Steps, take: Callable[[Step], Value]) -> Value:
    """What ``steps`` return when ``take`` gives their values."""
    step = next(steps)
    while True:
        value = take(step)
        try:
            step = steps.send(value)
        except StopIteration as end:
            return end.value


def _numbers(random: RandomNumbers | None, rounding: str, steps: Callable[[], Steps]) -> Iterator[int | None]:
    """The random numbers of the roundings, one after the other; None for each if they are deterministic."""
    if not split_rounding(rounding)[1]:
        if random is not None:
            raise ValueError(f"random={random!r} has no meaning with rounding={rounding!r}: use 'stochastic:BITS'")
        return repeat(None)
    if callable(random):
        return map(random, count())
    roundings = _roundings(steps())
    needs = f"rounding={rounding!r} needs {roundings} random numbers, one for each rounding, or a function of the index"
    if random is not None and not isinstance(random, Sequence):
        raise TypeError(f"{needs}: got {random!r} of type {type(random)}")
    if random is None or len(random) != roundings:
        raise ValueError(f"{needs}: got {random if random is None else len(random)}")
    return iter(random)


def _roundings(steps: Steps) -> int:
    """How many of the steps round, which does not depend on the values."""
    taken: list[Step] = []

    def take(step: Step) -> Value:
        taken.append(step)
        return Fraction(0)

    _drive(steps, take)
    return len([step for step in taken if step.where is not None])


# -- the orders -------------------------------------------------------------------------------------------------------

_Order: TypeAlias = Callable[[Sequence[Value], Target], Steps]


def _sum(terms: Sequence[Value], add_up: _Order, within: Target | None, into: Target) -> Steps:
    if within is None:
        return (yield Step(exact_sum, tuple(terms), into))
    total = yield from add_up(terms, within)
    return (yield Step(exact_convert, (total,), into))


def _order(order: Order) -> _Order:
    match order:
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
        f"{', '.join(ORDERS_WITH_LENGTH)} and a positive integer"
    )


def _rows(terms: Sequence[Value], length: int) -> list[Sequence[Value]]:
    return [terms[i : i + length] for i in range(0, len(terms), length)]


def _lanes(terms: Sequence[Value], length: int) -> list[Sequence[Value]]:
    return [terms[lane::length] for lane in range(min(length, len(terms)))]


def _chunked(rows: Iterable[Sequence[Value]], where: Target) -> Steps:
    """Row after row added to the total, with one rounding each; +0 if there are none."""
    total: tuple[Value, ...] = ()
    for row in rows:
        total = ((yield Step(exact_sum, (*total, *row), where)),)
    return total[0] if total else Fraction(0)


def _sequential(terms: Sequence[Value], where: Target) -> Steps:
    return _chunked(_rows(terms, 1), where)


def _in_parts(parts: Iterable[Sequence[Value]], where: Target) -> Steps:
    """The parts summed, and then their sums."""
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
        corrected = yield Step(exact_sub, (term, compensation), where)
        longer = yield Step(exact_add, (total, corrected), where)
        gained = yield Step(exact_sub, (longer, total), where)
        compensation = yield Step(exact_sub, (gained, corrected), where)
        total = longer
    return total
