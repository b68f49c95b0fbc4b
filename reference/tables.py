"""Rounding as a table: every value of a format, with the exact interval of inputs that round to it.

The table is built from the values of the codes, and from the boundary that each rounding direction puts between two
neighbours. It never rounds anything. With it, checking an input costs one comparison.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from fpsim.formats import FloatFormat, Overflow, Rounding, check_rounding, parse_format, resolve_overflow

from . import substitutes
from .decoding import decode, normal
from .values import INFINITY, NAN, Number, Value, as_value, magnitude, negate, order

#: The most exponent and mantissa bits together that `table` takes: the width of tf32.
MAX_BITS = 18


@dataclass(frozen=True, slots=True)
class Interval:
    """Neighbouring inputs that round to the same ``result``.

    Attributes:
        lower, upper: the ends, in the order of `order` (so that -0 lies below +0); they may be infinite.
        lower_closed, upper_closed: whether the end itself belongs to the interval.
        result: a value of the format.
    """

    lower: Value
    lower_closed: bool
    upper: Value
    upper_closed: bool
    result: Value

    def __contains__(self, number: Number) -> bool:
        value = as_value(number)
        if value is NAN:
            return False
        above = order(self.lower) <= order(value) if self.lower_closed else order(self.lower) < order(value)
        below = order(value) <= order(self.upper) if self.upper_closed else order(value) < order(self.upper)
        return above and below

    def negated_inputs(self) -> Interval:
        """The mirror image of the interval, with the same result."""
        return Interval(negate(self.upper), self.upper_closed, negate(self.lower), self.lower_closed, self.result)


@dataclass(frozen=True)
class Table:
    """The result for every input other than NaN in ``format``: intervals from -infinity to +infinity, without gaps.

    Two neighbours share an end, which belongs to one of them. Only in the middle, one interval ends with -0 and the
    next begins with +0, both included, so that no interval holds inputs of both signs. Neighbours differ in ``result``,
    except perhaps these two. A result may occur twice: NaN stands at both ends where there is no infinity.

    Attributes:
        format, rounding, overflow: the format and modes of the table; ``overflow`` is the mode in force, never None.
        intervals: in increasing order of inputs.
        nan: the result for NaN.
    """

    format: FloatFormat
    rounding: Rounding
    overflow: Overflow
    intervals: tuple[Interval, ...]
    nan: Value

    def __call__(self, number: Number) -> Value:
        """The result for one input, by binary search.

        Raises:
            TypeError: not a number, as `as_value`.
        """
        value = as_value(number)
        if value is NAN:
            return self.nan
        return self.intervals[bisect_right(self._starts, (order(value), False)) - 1].result

    @cached_property
    def _starts(self) -> list[tuple[tuple[int, Fraction, bool], bool]]:
        # An open interval starts just after its lower end.
        return [(order(interval.lower), not interval.lower_closed) for interval in self.intervals]


def table(format: str | FloatFormat, rounding: str = "nearest_even", overflow: str | None = None) -> Table:
    """The whole of rounding to ``format``, as intervals of inputs.

    Arguments:
        format: a name or a `FloatFormat`, of at most `MAX_BITS` exponent and mantissa bits together.
        rounding, overflow: as in `round`.

    Raises:
        ValueError: as `round`, or a format so wide that the table would not fit comfortably in memory.
        TypeError: as `round`.

    Source: as `round`.

    >>> for interval in table("e2m1fn", "down").intervals[-2:]:
    ...     print(interval.lower, interval.upper, interval.result)
    4 6 4
    6 inf 6
    """
    fmt = parse_format(format)
    direction = check_rounding(rounding)
    mode = resolve_overflow(fmt, overflow)
    if fmt.exponent_bits + fmt.mantissa_bits > MAX_BITS:
        raise ValueError(
            f"{fmt.name} has too many values for a table: at most {MAX_BITS} exponent and mantissa bits together, "
            f"got {fmt.exponent_bits} + {fmt.mantissa_bits}; use round"
        )
    negative = [half.negated_inputs() for half in _half(fmt, direction, mode, negative=True)]
    positive = _half(fmt, direction, mode, negative=False)
    return Table(fmt, direction, mode, (*reversed(negative), *positive), substitutes.for_nan(fmt))


def _half(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, *, negative: bool) -> Iterator[Interval]:
    """The intervals of the inputs of one sign, by increasing magnitude, their ends written as magnitudes."""
    neighbours = _neighbours(fmt, rounding, overflow, negative=negative)
    lower, closed = Fraction(0), True
    at_zero, last = substitutes.for_zero(fmt, overflow, negative=negative), neighbours[0].result
    if at_zero != last:
        yield Interval(lower, True, lower, True, at_zero)
        closed = False
    for below, above in pairwise(neighbours):
        if below.result != above.result:
            boundary, belongs_above = _boundary(below, above, rounding, negative)
            yield Interval(lower, closed, boundary, not belongs_above, below.result)
            lower, closed = boundary, belongs_above
    result, at_infinity = neighbours[-1].result, substitutes.for_infinity(fmt, overflow, negative=negative)
    yield Interval(lower, closed, INFINITY, result == at_infinity, result)
    if result != at_infinity:
        yield Interval(INFINITY, True, INFINITY, True, at_infinity)


class _Neighbour(NamedTuple):
    """A point of the rounding grid: its magnitude, whether its code is odd, and the value delivered for it."""

    magnitude: Fraction
    odd: bool
    result: Value


def _neighbours(fmt: FloatFormat, rounding: Rounding, overflow: Overflow, *, negative: bool) -> list[_Neighbour]:
    """The rounding grid of one sign, by increasing magnitude.

    Its points are the values of the format, and one more at the top, beyond the largest finite value. Below the
    smallest normal number, a format without subnormals has one more point: numbers that round to it or below are
    flushed.
    """
    first, top = 0, fmt.max_code + 1
    results: dict[int, Value] = {}
    if negative and not fmt.signed:
        results = dict.fromkeys(range(top + 1), substitutes.for_negative(fmt, overflow))
    else:
        sign = fmt.sign_code if negative else 0
        results = {code: decode(sign | code, fmt) for code in range(top)}
        results[top] = substitutes.for_overflow(fmt, rounding, overflow, negative=negative)
    if fmt.zero:
        first = 0 if fmt.subnormals else (1 << fmt.mantissa_bits) - 1
        results[first] = substitutes.for_zero(fmt, overflow, negative=negative)
    return [_Neighbour(_on_grid(code, fmt), code % 2 == 1, results[code]) for code in range(first, top + 1)]


def _on_grid(code: int, fmt: FloatFormat) -> Fraction:
    if fmt.subnormals and code < 1 << fmt.mantissa_bits:
        return magnitude(decode(code, fmt))
    return normal(code, fmt)


def _boundary(below: _Neighbour, above: _Neighbour, rounding: Rounding, negative: bool) -> tuple[Fraction, bool]:
    """The boundary between the magnitudes that round to ``below`` and ``above``, and whether it rounds to ``above``."""
    match rounding:
        case "nearest_even":
            return (below.magnitude + above.magnitude) / 2, below.odd
        case "nearest_away":
            return (below.magnitude + above.magnitude) / 2, True
        case "to_odd":
            toward_zero = below.odd
        case "toward_zero":
            toward_zero = True
        case "up" | "down":
            toward_zero = negative == (rounding == "up")
    # All magnitudes strictly between two neighbours round the same way, so the boundary is one of the neighbours.
    return (above.magnitude, True) if toward_zero else (below.magnitude, False)
