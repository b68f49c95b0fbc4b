"""The table of a format has no gap, and agrees with round at every boundary and on both sides of it."""

from fractions import Fraction
from itertools import pairwise
from random import Random

import ml_dtypes
import numpy as np
import pytest

from fpsim import reference
from fpsim.formats import NAMED_FORMATS, ROUNDINGS, FloatFormat, parse_format
from fpsim.reference import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, Interval, as_value, table
from fpsim.reference.values import order
from tests.shared.formats import formats_of_every_kind, overflows

NARROW = [name for name in NAMED_FORMATS if parse_format(name).bits <= 8]

SMALL = formats_of_every_kind([(1, 0, None), (1, 0, 4), (1, 2, None), (2, 0, None), (2, 0, 5), (2, 1, None)])


def assert_covers_the_line(intervals: tuple[Interval, ...]) -> None:
    first, last = intervals[0], intervals[-1]
    assert (first.lower, first.lower_closed, last.upper, last.upper_closed) == (NEGATIVE_INFINITY, True, INFINITY, True)
    for a, b in pairwise(intervals):
        if a.upper is NEGATIVE_ZERO and a.upper_closed:
            assert b.lower == 0 and b.lower_closed
        else:
            assert a.upper == b.lower and a.upper_closed != b.lower_closed and a.result != b.result
    for i in intervals:
        assert order(i.lower) < order(i.upper) or (i.lower == i.upper and i.lower_closed and i.upper_closed)


def probes(interval: Interval) -> list:
    """The ends of an interval, the numbers closest to them on both sides, and one inside."""
    points = [interval.lower, interval.upper]
    finite = [p for p in points if isinstance(p, Fraction)]
    points += [p + shift for p in finite for shift in (-abs(p) / 2**90, abs(p) / 2**90)]
    points += [sum(finite, Fraction(0)) / 2]
    return points


def assert_agrees_with_round(fmt: FloatFormat, rounding: str, overflow: str | None, count: int | None = None) -> None:
    judged = table(fmt, rounding, overflow)
    assert_covers_the_line(judged.intervals)
    assert judged.nan == reference.round(NAN, fmt, rounding, overflow)
    intervals = judged.intervals
    if count is not None:
        middle = len(intervals) // 2
        sample = Random(5).sample(range(len(intervals)), min(count, len(intervals)))
        intervals = [intervals[i] for i in {*sample, 0, 1, middle - 2, middle - 1, middle, middle + 1, -2, -1}]
    for interval in intervals:
        for x in probes(interval):
            want = reference.round(x, fmt, rounding, overflow)
            assert judged(x) == want, (rounding, overflow, x)
            if x in interval:
                assert interval.result == want, (rounding, overflow, x)
    for x in (0.0, -0.0, 2.0**-1074, -(2.0**-1074), 1e308, -1e308, INFINITY, NEGATIVE_INFINITY, NAN):
        assert judged(x) == reference.round(x, fmt, rounding, overflow), (rounding, overflow, x)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", NARROW)
def test_tables_of_narrow_formats_agree_with_round_at_every_boundary(name, rounding):
    fmt = parse_format(name)
    assert_agrees_with_round(fmt, rounding, None)
    for overflow in overflows(fmt):
        assert_agrees_with_round(fmt, rounding, overflow, count=8)  # they differ only at the ends


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_tables_of_small_formats_agree_with_round_at_every_boundary(fmt):
    for rounding in ROUNDINGS:
        for overflow in overflows(fmt):
            assert_agrees_with_round(fmt, rounding, overflow)


@pytest.mark.parametrize(
    ("name", "rounding"), [("fp16", "nearest_even"), ("bf16", "to_odd"), ("e4m5:nosubnormals", "up")]
)
def test_tables_of_wide_formats_agree_with_round(name, rounding):
    assert_agrees_with_round(parse_format(name), rounding, None, count=300)


def test_the_table_of_fp4():
    """e2m1 of OCP MX: 0, 1/2, 1, 3/2, 2, 3, 4, 6."""
    h = Fraction(1, 2)
    expected = [
        (0, True, h / 2, True, 0),
        (h / 2, False, 3 * h / 2, False, h),
        (3 * h / 2, True, 5 * h / 2, True, 1),
        (5 * h / 2, False, 7 * h / 2, False, 3 * h),
        (7 * h / 2, True, 5 * h, True, 2),
        (5 * h, False, 7 * h, False, 3),
        (7 * h, True, 5, True, 4),
        (5, False, INFINITY, True, 6),
    ]
    positive = table("e2m1fn").intervals[8:]
    assert [(i.lower, i.lower_closed, i.upper, i.upper_closed, i.result) for i in positive] == expected
    assert table("e2m1fn").intervals[7] == Interval(Fraction(-1, 4), True, NEGATIVE_ZERO, True, NEGATIVE_ZERO)


@pytest.mark.parametrize(
    ("name", "rounding", "overflow", "last"),  # the last intervals: lower end, whether it belongs, result
    [
        ("e5m2", "nearest_even", None, [(53248, False, 57344), (61440, True, INFINITY)]),
        ("e5m2", "toward_zero", None, [(57344, True, 57344), (INFINITY, True, INFINITY)]),
        ("e5m2", "up", None, [(49152, False, 57344), (57344, False, INFINITY)]),
        ("e5m2", "nearest_even", "sat_finite", [(45056, True, 49152), (53248, False, 57344)]),
        ("e5m2", "nearest_even", "sat_propagate", [(53248, False, 57344), (INFINITY, True, INFINITY)]),
        ("e4m3fn", "nearest_even", "ovf_inf", [(432, True, 448), (464, False, NAN)]),
        ("e4m3fn", "to_odd", "ovf_inf", [(448, True, 448), (INFINITY, True, NAN)]),
        ("e8m0fnu", "down", "sat_finite", [(2**126, True, 2**126), (2**127, True, 2**127)]),
    ],
)
def test_the_upper_end_of_a_table(name, rounding, overflow, last):
    intervals = table(name, rounding, overflow).intervals
    assert [(i.lower, i.lower_closed, i.result) for i in intervals[-2:]] == last


def test_a_format_without_zero_has_its_zero_in_an_interval_of_its_own():
    nan, smallest = Interval(NEGATIVE_INFINITY, True, NEGATIVE_ZERO, True, NAN), Fraction(1, 2**127)
    zero, first = (
        Interval(Fraction(0), True, Fraction(0), True, NAN),
        Interval(0, False, 3 * smallest / 2, True, smallest),
    )
    assert table("e8m0fnu", overflow="ovf_inf").intervals[:3] == (nan, zero, first)


def test_a_table_gives_the_results_for_all_inputs_of_a_type_as_runs():
    """The use of tables: one pass over all float16 in order, judged by ml_dtypes."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    floats = codes.view(np.float16)
    floats = floats[~np.isnan(floats)]
    floats = floats[np.lexsort((~np.signbit(floats), floats))]  # -0 before +0
    with np.errstate(all="ignore"):
        expected = floats.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64).tolist()
    intervals = iter(table("e4m3fn", overflow="ovf_inf").intervals)
    current = next(intervals)
    for x, want in zip(floats.tolist(), expected, strict=True):
        key = order(as_value(x))
        while not (key < order(current.upper) or (key == order(current.upper) and current.upper_closed)):
            current = next(intervals)
        assert current.result == as_value(want), x


def test_intervals_know_their_members():
    interval = Interval(Fraction(1), False, Fraction(2), True, Fraction(2))
    assert [x in interval for x in (1, 1.5, 2, 3, NAN)] == [False, True, True, False, False]
    assert -0.0 not in Interval(Fraction(0), True, Fraction(1), False, Fraction(0))
    assert 0.0 not in Interval(Fraction(-1), True, NEGATIVE_ZERO, True, NEGATIVE_ZERO)


def test_a_table_is_a_value():
    assert table("e2m1fn") == table("float4_e2m1fn", "nearest_even", "sat_finite")
    assert hash(table("e2m1fn")) == hash(table("e2m1fn"))
    assert (table("e5m2").rounding, table("e5m2").overflow) == ("nearest_even", "ovf_inf")


def test_errors_name_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"e8m23 has too many values for a table: at most 18 .* got 8 \+ 23; use round"
    ):
        table("fp32")
    with pytest.raises(ValueError, match="unknown rounding 'nearest'"):
        table("e5m2", "nearest")
    with pytest.raises(ValueError, match="unknown overflow mode 'clamp'"):
        table("e5m2", overflow="clamp")
    with pytest.raises(ValueError, match="use overflow='sat_finite'"):
        table("e2m1fn", overflow="ovf_inf")
    with pytest.raises(TypeError, match="a number is"):
        table("e2m1fn")("1")
