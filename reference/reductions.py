"""Sums, means and variances whose additions are those of a narrow unit, and whose other steps are in float32.

A vector unit adds up a softmax, a norm or a loss in a format of its own. The additions are those of `sum`, with an
accumulator and an order. Everything else is one operation after the other in the format ``working``, to nearest even.
The elements of several axes are taken in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fpsim.formats import FloatFormat

from .arithmetic import convert, div, mul, sub
from .orders import Order
from .sums import RandomNumbers, sum
from .values import Number, Value, as_value


def mean(
    values: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    accumulator: str | FloatFormat,
    order: Order = "sequential",
    working: str | FloatFormat = "fp32",
    random: RandomNumbers | None = None,
) -> Value:
    """The mean of ``values``: their sum, and its quotient by their number in ``working``; NaN if there are none.

    Arguments:
        values: numbers as in `sum`.
        format: the format of the result, to which the quotient is rounded to nearest even.
        rounding, overflow: of the additions, as in `sum`.
        accumulator, order, random: as in `sum`.
        working: the format of the quotient, which has all values of ``accumulator``.

    Raises:
        ValueError, TypeError: as `sum`.

    >>> mean([1, 2, 4], "fp32", accumulator="fp16")
    Fraction(9786709, 4194304)
    """
    terms = [as_value(value) for value in values]
    total = _sum(terms, (rounding, overflow), accumulator, order, working, random)
    return convert(div(total, len(terms), working), format)


def variance(
    values: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    correction: int = 1,
    accumulator: str | FloatFormat,
    order: Order = "sequential",
    working: str | FloatFormat = "fp32",
    random: tuple[RandomNumbers, RandomNumbers] | None = None,
) -> Value:
    """The variance of ``values``, in two passes.

    With n values, and m their `mean` in ``working``: every ``d = x - m`` and every ``d * d`` is rounded to ``working``,
    the squares are added up, and the sum is divided by ``n - correction`` (by 0 if that is negative) in ``working``.

    Arguments:
        correction: how much smaller than n the divisor is.
        random: those of both sums.
        others: as in `mean`.

    Raises:
        ValueError, TypeError: as `sum`.

    >>> variance([1, 2, 3, 6], "fp32", accumulator="fp16", correction=0)
    Fraction(7, 2)
    """
    terms = [as_value(value) for value in values]
    of_mean, of_squares = random or (None, None)
    modes = (rounding, overflow)
    middle = div(_sum(terms, modes, accumulator, order, working, of_mean), len(terms), working)
    distances = [sub(x, middle, working) for x in terms]
    squares = [mul(d, d, working) for d in distances]
    total = _sum(squares, modes, accumulator, order, working, of_squares)
    return convert(div(total, max(len(terms) - correction, 0), working), format)


def _sum(
    terms: list[Value],
    modes: tuple[str, str | None],
    accumulator: str | FloatFormat,
    order: Order,
    working: str | FloatFormat,
    random: Any,
) -> Value:
    """The sum in the accumulator, which is a value of ``working``; without its last rounding, which is exact."""
    overflow = modes[1]
    return sum(terms, working, modes[0], overflow, accumulator=accumulator, order=order, random=random)
