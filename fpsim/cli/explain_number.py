"""The facts that ``fpsim round`` shows of a number: its neighbours in a format, and its result in each rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from rich import box
from rich.table import Table

from fpsim import reference
from fpsim.cli.exact_numbers import (
    field_names,
    show_approximately,
    show_bits,
    show_code,
    show_exactly,
    show_fields,
    show_hex,
    show_number,
    show_power,
    show_ratio,
)
from fpsim.formats import FloatFormat, full_rounding, split_rounding
from fpsim.reference import Value
from fpsim.reference.values import floor_log2, is_negative, order


class Outcome(NamedTuple):
    """One possible result of rounding a number.

    Attributes:
        rounding: the name of the rounding; a stochastic one includes its number of random bits.
        result: the value.
        code: the code of ``result`` in the format.
        probability: the probability of this result; 1 unless the rounding is stochastic.
    """

    rounding: str
    result: Value
    code: int
    probability: Fraction


def outcomes(number: Value, fmt: FloatFormat, rounding: str, overflow: str | None = None) -> tuple[Outcome, ...]:
    """The outcomes of rounding ``number``: one, or the two candidates of stochastic rounding, the likelier first.

    A probability is exact: it is the share of all random numbers for which `fpsim.reference.round` gives the result.
    The result is monotonic in the random number, so a bisection counts them.

    Args:
        number: an exact value.
        fmt: the format.
        rounding, overflow: as in `fpsim.round`.

    Raises:
        ValueError: an unknown rounding or overflow mode.

    >>> candidates = outcomes(Fraction(9, 8), parse_format("e2m1fn"), "stochastic:8")
    >>> [(str(each.result), str(each.probability)) for each in candidates]
    [('1', '3/4'), ('3/2', '1/4')]
    """
    spelled = full_rounding(rounding)
    bits = split_rounding(spelled)[1]

    def result_of(random: int | None) -> Value:
        return reference.round(number, fmt, spelled, overflow, random=random)

    if not bits:
        shares = {result_of(None): Fraction(1)}
    else:
        first, last = result_of(0), result_of((1 << bits) - 1)
        low, high = 0, 1 << bits  # the number of random numbers that give `first` is more than low, at most high
        while first != last and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if result_of(middle) == first else (low, middle)
        shares = {last: 1 - Fraction(high, 1 << bits)}
        shares = {first: Fraction(high, 1 << bits)} | ({} if first == last else shares)
    ranked = sorted(shares.items(), key=lambda share: -share[1])
    usual = "sat_propagate" if fmt.has_infinity else "sat_finite"
    return tuple(
        Outcome(spelled, value, reference.encode(value, fmt, overflow=usual), share) for value, share in ranked
    )


def table_of_roundings(number: Value, fmt: FloatFormat, roundings: Sequence[str], overflow: str) -> Table:
    """A table of ``roundings``, with a row for each possible result."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rounding")
    table.add_column("result", justify="right", overflow="fold")
    table.add_column("hexadecimal", justify="right", overflow="fold")
    table.add_column("code")
    table.add_column(field_names(fmt), overflow="fold")
    table.add_column("error in ulps", justify="right", overflow="fold")
    stochastic = any(split_rounding(rounding)[1] for rounding in roundings)
    if stochastic:
        table.add_column("probability", justify="right", overflow="fold")
    for rounding in roundings:
        for each in outcomes(number, fmt, rounding, overflow):
            probability = show_ratio(each.probability) if split_rounding(rounding)[1] else ""
            table.add_row(
                rounding,
                show_number(each.result),
                show_hex(each.result),
                show_code(each.code, fmt),
                show_fields(each.code, fmt, " | "),
                _show_ulps(number, each.result, fmt),
                *([probability] if stochastic else []),
            )
    return table


def _show_ulps(number: Value, result: Value, fmt: FloatFormat) -> str:
    error = _error(number, result)
    return "not finite" if error is None else show_ratio(error / ulp(_fraction(number), fmt)) if error else "0"


def explain_number(text: str, number: Value, fmt: FloatFormat) -> Iterable[tuple[str, str]]:
    """The facts of ``number`` that depend on no rounding: headings and contents."""
    exact = show_exactly(number)
    yield "input", text if text == exact else f"{text} = {exact}"
    below, above = bracket(number, fmt)
    for side, code in (("below", below), ("above", above)):
        yield side, "none" if code is None else f"{_show_value_of_bits(code, fmt)}"
    if reference.is_finite(number):
        size = ulp(_fraction(number), fmt)
        yield "ulp", " = ".join(dict.fromkeys([show_number(size), show_power(size)]))


def bracket(number: Value, fmt: FloatFormat) -> tuple[int | None, int | None]:
    """The codes of the largest value of ``fmt`` below ``number`` and of the smallest one above it.

    ``number`` need not be a value of ``fmt``. Infinities count as values, and the two zeros as one. None means that
    there is no such value, or that ``number`` is NaN.

    >>> [hex(code) for code in bracket(Fraction(1, 10), parse_format("e4m3fn"))]
    ['0x1c', '0x1d']
    """
    if number is reference.NAN:
        return None, None
    outside = is_negative(number) and not fmt.signed  # the format has no negative infinity
    usual = "sat_propagate" if fmt.has_infinity and not outside else "sat_finite"
    inner = reference.round(number, fmt, "toward_zero", usual)  # beyond the range: the largest value
    code = reference.encode(inner, fmt, overflow=usual)
    number, plain = (reference.as_value(0) if x is reference.NEGATIVE_ZERO else x for x in (number, inner))
    below = code if order(plain) < order(number) else neighbour(inner, fmt, -1)
    above = code if order(plain) > order(number) else neighbour(inner, fmt, 1)
    return below, above


def explain_rounding(
    text: str, number: Value, fmt: FloatFormat, rounding: str, overflow: str
) -> Iterable[tuple[str, str]]:
    """The result of one rounding of ``number``: headings and contents."""
    result = reference.round(number, fmt, rounding, overflow)
    code = reference.encode(number, fmt, rounding, overflow)
    exact = show_number(number)
    yield "input", text if text == exact else f"{text} = {exact}"
    yield "result", " = ".join(dict.fromkeys([show_number(result), show_hex(result)]))
    yield "code", f"{show_code(code, fmt)} = {show_fields(code, fmt)}"
    yield "error", _show_error(number, result, fmt)
    yield "neighbours", _show_neighbours(result, fmt)


def _show_error(number: Value, result: Value, fmt: FloatFormat) -> str:
    error = _error(number, result)
    if error is None:
        return "not finite"
    if not error:
        return "0 (exact)"
    return f"{show_number(error)} = {show_approximately(error / ulp(_fraction(number), fmt))} ulp"


def _error(number: Value, result: Value) -> Fraction | None:
    """``result - number``; 0 if they are equal; None if they differ and one is not finite."""
    if number == result:
        return Fraction(0)
    if reference.is_finite(number) and reference.is_finite(result):
        return _fraction(result) - _fraction(number)
    return None


def _fraction(value: Value) -> Fraction:
    """A finite value as a fraction; -0 becomes 0."""
    return value if isinstance(value, Fraction) else Fraction(0)


def ulp(number: Fraction, fmt: FloatFormat) -> Fraction:
    """The distance between values of ``fmt`` in the binade of ``number``, or in the nearest binade of ``fmt``.

    >>> ulp(Fraction(1), parse_format("e4m3fn")), ulp(Fraction(1000), parse_format("e4m3fn"))
    (Fraction(1, 8), Fraction(32, 1))
    """
    exponent = min(max(floor_log2(abs(number)), fmt.emin), fmt.max_exponent) if number else fmt.emin
    return Fraction(2) ** (exponent - fmt.mantissa_bits)


def _show_neighbours(result: Value, fmt: FloatFormat) -> str:
    shown = []
    for step, side in ((-1, "below"), (1, "above")):
        code = neighbour(result, fmt, step)
        shown.append(f"none {side}" if code is None else f"{_show_value_of(code, fmt)} {side}")
    return ", ".join(shown)


def _show_value_of(code: int, fmt: FloatFormat) -> str:
    return f"{show_number(reference.decode(code, fmt))} ({show_code(code, fmt)})"


def _show_value_of_bits(code: int, fmt: FloatFormat) -> str:
    value = reference.decode(code, fmt)
    return f"{' = '.join(dict.fromkeys([show_number(value), show_hex(value)]))} ({show_bits(code, fmt)})"


def neighbour(value: Value, fmt: FloatFormat, step: int) -> int | None:
    """The code of the next value of ``fmt`` after ``value``, upwards (``step`` 1) or downwards (-1).

    Infinities count as values, and the two zeros as one. None means that there is no such value, or that ``value`` is
    NaN.

    >>> neighbour(Fraction(448), parse_format("e4m3fn"), -1)
    125
    """
    if value is reference.NAN:
        return None
    code = reference.encode(value, fmt, overflow="sat_propagate" if fmt.has_infinity else "sat_finite")
    magnitude = code & ~fmt.sign_code
    position = (-magnitude if code & fmt.sign_code else magnitude) + step
    smallest = 1 << fmt.mantissa_bits  # the code of the smallest normal number
    if fmt.zero and not fmt.subnormals and 0 < abs(position) < smallest:
        position = smallest * step if position * step > 0 and not magnitude else 0
    if abs(position) > fmt.max_code + fmt.has_infinity or (position < 0 and not fmt.signed):
        return None
    return abs(position) | (fmt.sign_code if position < 0 else 0)
