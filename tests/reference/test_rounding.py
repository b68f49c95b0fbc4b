"""round, case by case: the definitions of the directions, ties, overflow, and cases in which others failed."""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from fpsim.formats import OVERFLOWS, ROUNDINGS, FloatFormat, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Special,
    as_value,
    encode,
    round,
    to_float,
)
from fpsim.reference.values import rational
from tests.shared.formats import finite_values

TINY = Fraction(1, 2**300)

# -- the directions, by definition ---------------------------------------------------------------------------------

DIRECTED = ["e5m2", "e4m3", "e4m3fn", "e4m3fnuz", "e3m2fn", "e2m1fn", "e5m0", "e1m3", "e3m1:bias=-7"]


def near(values: Sequence[Fraction]) -> list[Fraction]:
    """The values, the middles between them, one more point between each two, and the closest numbers to all."""
    points = list(values)
    for a, b in itertools.pairwise(values):
        points += [a + (b - a) * t for t in (Fraction(1, 2), Fraction(1, 3))]
    return sorted(p + shift for p in points for shift in (-TINY, 0, TINY) if values[0] <= p + shift <= values[-1])


@pytest.mark.parametrize("name", DIRECTED)
def test_directed_roundings_are_the_closest_values_on_their_side(name):
    values = finite_values(name)
    for x in near(values):
        below, above = values[bisect_right(values, x) - 1], values[bisect_left(values, x)]
        assert rational(round(x, name, "down")) == below, x
        assert rational(round(x, name, "up")) == above, x
        assert rational(round(x, name, "toward_zero")) == min(below, above, key=abs), x


@pytest.mark.parametrize("name", DIRECTED)
def test_nearest_roundings_are_the_closest_values_of_all(name):
    values = finite_values(name)
    for x in near(values):
        below, above = values[bisect_right(values, x) - 1], values[bisect_left(values, x)]
        even, away = rational(round(x, name)), rational(round(x, name, "nearest_away"))
        if x - below != above - x:
            assert even == away == min(below, above, key=lambda v: abs(v - x)), x
        elif below == above:
            assert even == away == x, x
        else:
            assert away == max(below, above, key=abs), x
            assert even == next(v for v in (below, above) if encode(v, name) % 2 == 0), x


@pytest.mark.parametrize("name", DIRECTED)
def test_rounding_to_odd_is_exact_or_odd(name):
    values = finite_values(name)
    for x in near(values):
        below, above = values[bisect_right(values, x) - 1], values[bisect_left(values, x)]
        odd = rational(round(x, name, "to_odd"))
        assert odd in (below, above), x
        assert odd == x or encode(odd, name) % 2 == 1, x


# S. Boldo, G. Melquiond (2008), theorem 1: rounding to odd with two more bits does not harm a second rounding
@pytest.mark.parametrize("name", ["e5m2", "e4m3", "e3m4", "e5m0", "e2m5"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_to_odd_first_is_innocuous(name, rounding):
    fmt = parse_format(name)
    wide = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits + 2, fmt.bias)
    points = near([v for v in finite_values(name) if v >= 0])
    for x in points + [-x for x in points] + [Fraction(fmt.max) * t for t in (Fraction(33, 32), Fraction(17, 16), 9)]:
        assert round(round(x, wide, "to_odd"), fmt, rounding) == round(x, fmt, rounding), x


def test_rounding_to_nearest_first_is_not():
    x = 1 + Fraction(1, 8) + TINY  # just above a tie of e5m2
    assert round(round(x, "e5m4"), "e5m2") == 1 != round(x, "e5m2") == Fraction(5, 4)


# -- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "even", "away"),
    [
        ("e4m3fn", Fraction(17, 16), 1, Fraction(9, 8)),
        ("e4m3fn", Fraction(19, 16), Fraction(5, 4), Fraction(5, 4)),
        ("e4m3fn", Fraction(31, 16), 2, 2),  # carry into the next binade
        ("e4m3fn", Fraction(1, 2**10), 0, Fraction(1, 2**9)),  # half of the smallest
        ("e4m3fn", Fraction(3, 2**10), Fraction(1, 2**8), Fraction(1, 2**8)),
        ("e4m3fn", Fraction(15, 2**10), Fraction(1, 2**6), Fraction(1, 2**6)),  # largest subnormal to smallest normal
        ("fp16", Fraction(2049), 2048, 2050),
        ("fp16", Fraction(2051), 2052, 2052),
        # no mantissa bits: the even code is the even exponent field, here that of 2, 1/2, ...
        ("e5m0", Fraction(3, 2), 2, 2),
        ("e5m0", Fraction(3), 2, 4),
        ("e5m0", Fraction(6), 8, 8),
        ("e5m0", Fraction(1, 2**15), 0, Fraction(1, 2**14)),  # field 0 against field 1
        ("e5m0", Fraction(3, 2**15), Fraction(1, 2**13), Fraction(1, 2**13)),
        ("e5m0:bias=16", Fraction(3, 2), 1, 2),  # another bias, another parity
        ("e8m0fnu", Fraction(3, 2), 2, 2),
        ("e8m0fnu", Fraction(3), 2, 4),
        ("e8m0fnu", Fraction(3, 2**127), Fraction(1, 2**125), Fraction(1, 2**125)),
        ("e8m0fnu", Fraction(3, 2**128), Fraction(1, 2**127), Fraction(1, 2**126)),  # code 0 against code 1
    ],
)
def test_ties(name, x, even, away):
    assert (round(x, name), round(x, name, "nearest_away")) == (even, away)
    if parse_format(name).signed:
        assert (rational(round(-x, name)), rational(round(-x, name, "nearest_away"))) == (-even, -away)


# -- overflow ------------------------------------------------------------------------------------------------------

MODES = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd")
assert MODES == ROUNDINGS, "the columns of the tables below"
INF, NINF, MAX, MIN = INFINITY, NEGATIVE_INFINITY, "max", "-max"

# (kind of format, overflow, input) -> results in the order of MODES; "big" is far beyond the largest value
OVERFLOW = {
    ("e5m2", "ovf_inf", "big"): (INF, INF, MAX, INF, MAX, MAX),
    ("e5m2", "ovf_inf", "-big"): (NINF, NINF, MIN, MIN, NINF, MIN),
    ("e5m2", "ovf_inf", "inf"): (INF,) * 6,
    ("e5m2", "ovf_inf", "-inf"): (NINF,) * 6,
    ("e5m2", "sat_finite", "big"): (MAX,) * 6,
    ("e5m2", "sat_finite", "-big"): (MIN,) * 6,
    ("e5m2", "sat_finite", "inf"): (MAX,) * 6,
    ("e5m2", "sat_finite", "-inf"): (MIN,) * 6,
    ("e5m2", "sat_propagate", "big"): (MAX,) * 6,
    ("e5m2", "sat_propagate", "-big"): (MIN,) * 6,
    ("e5m2", "sat_propagate", "inf"): (INF,) * 6,
    ("e5m2", "sat_propagate", "-inf"): (NINF,) * 6,
    ("e4m3fn", "ovf_inf", "big"): (NAN, NAN, MAX, NAN, MAX, MAX),
    ("e4m3fn", "ovf_inf", "-big"): (NAN, NAN, MIN, MIN, NAN, MIN),
    ("e4m3fn", "ovf_inf", "inf"): (NAN,) * 6,
    ("e4m3fn", "ovf_inf", "-inf"): (NAN,) * 6,
    ("e4m3fn", "sat_finite", "big"): (MAX,) * 6,
    ("e4m3fn", "sat_finite", "-big"): (MIN,) * 6,
    ("e4m3fn", "sat_finite", "inf"): (MAX,) * 6,
    ("e4m3fn", "sat_finite", "-inf"): (MIN,) * 6,
    ("e4m3fn", "sat_propagate", "big"): (MAX,) * 6,
    ("e4m3fn", "sat_propagate", "-big"): (MIN,) * 6,
    ("e4m3fn", "sat_propagate", "inf"): (NAN,) * 6,
    ("e4m3fn", "sat_propagate", "-inf"): (NAN,) * 6,
    ("e2m1fn", "sat_finite", "big"): (MAX,) * 6,
    ("e2m1fn", "sat_finite", "-big"): (MIN,) * 6,
    ("e2m1fn", "sat_finite", "inf"): (MAX,) * 6,
    ("e2m1fn", "sat_finite", "-inf"): (MIN,) * 6,
    ("e5m2:unsigned", "ovf_inf", "big"): (INF, INF, MAX, INF, MAX, MAX),
    ("e5m2:unsigned", "ovf_inf", "-big"): (NAN,) * 6,
    ("e5m2:unsigned", "ovf_inf", "-inf"): (NAN,) * 6,
    ("e5m2:unsigned", "sat_finite", "-big"): (0,) * 6,
    ("e5m2:unsigned", "sat_finite", "-inf"): (0,) * 6,
    ("e5m2:unsigned", "sat_propagate", "-big"): (0,) * 6,
    ("e5m2:unsigned", "sat_propagate", "-inf"): (NAN,) * 6,
    ("e8m0fnu", "ovf_inf", "big"): (NAN, NAN, MAX, NAN, MAX, MAX),
    ("e8m0fnu", "ovf_inf", "-big"): (NAN,) * 6,
    ("e8m0fnu", "ovf_inf", "inf"): (NAN,) * 6,
    ("e8m0fnu", "sat_finite", "-big"): (Fraction(1, 2**127),) * 6,
    ("e8m0fnu", "sat_finite", "-inf"): (Fraction(1, 2**127),) * 6,
    ("e8m0fnu", "sat_finite", "inf"): (MAX,) * 6,
    ("e8m0fnu", "sat_propagate", "-big"): (Fraction(1, 2**127),) * 6,
    ("e8m0fnu", "sat_propagate", "-inf"): (NAN,) * 6,
    ("e8m0fnu", "sat_propagate", "big"): (MAX,) * 6,
    # an infinity but neither a number other than zero nor a NaN, for which the largest finite value stands
    ("e1m0", "ovf_inf", "big"): (INF, INF, 0, INF, 0, 0),
    ("e1m0", "ovf_inf", "-big"): (NINF, NINF, NEGATIVE_ZERO, NEGATIVE_ZERO, NINF, NEGATIVE_ZERO),
    ("e1m0", "sat_finite", "-inf"): (NEGATIVE_ZERO,) * 6,
    ("e1m0:unsigned", "ovf_inf", "-big"): (0,) * 6,
    ("e5m0:unsigned", "ovf_inf", "-big"): (0,) * 6,  # the nearest value: there is no NaN
    ("e5m0:unsigned", "ovf_inf", "-inf"): (0,) * 6,
    ("e5m0:unsigned", "sat_propagate", "-big"): (0,) * 6,
    ("e5m0:unsigned", "sat_propagate", "-inf"): (0,) * 6,
    ("e5m0:unsigned", "sat_finite", "-inf"): (0,) * 6,
}


@pytest.mark.parametrize(("case", "results"), OVERFLOW.items(), ids=lambda c: "-".join(c) if len(c) == 3 else "")
def test_overflow(case, results):
    name, overflow, number = case
    largest = Fraction(parse_format(name).max)
    value = {"big": 2**200, "-big": -(2**200), "inf": INFINITY, "-inf": NEGATIVE_INFINITY}[number]
    expected = [{MAX: largest, MIN: -largest}.get(result, result) for result in results]
    assert [round(value, name, rounding, overflow) for rounding in MODES] == expected


@pytest.mark.parametrize(
    ("name", "largest", "tie", "tie_overflows"),
    [
        ("e5m2", 57344, 61440, True),
        ("e4m3", 240, 248, True),
        ("e4m3fn", 448, 464, False),  # 448 has the even code: the next one would be 480
        ("e4m3fnuz", 240, 248, True),
        ("fp16", 65504, 65520, True),
        ("bf16", 0xFF << 120, 0x1FF << 119, True),
        ("fp32", 0xFFFFFF << 104, 0x1FFFFFF << 103, True),
        ("e8m0fnu", 2**127, 3 * 2**126, False),
        ("e5m0", 2**15, 3 * 2**14, False),
        ("e5m0:bias=16", 2**14, 3 * 2**13, False),
        ("e1m2", Fraction(3, 2), Fraction(7, 4), True),  # beyond the largest subnormal there is nothing
    ],
)
def test_overflow_begins_half_an_ulp_beyond_the_largest_value(name, largest, tie, tie_overflows):
    fmt = parse_format(name)
    over = INFINITY if fmt.has_infinity else NAN
    assert round(tie - TINY, name, overflow="ovf_inf") == largest == Fraction(fmt.max)
    assert round(tie, name, overflow="ovf_inf") == (over if tie_overflows else largest)
    assert round(tie + TINY, name, overflow="ovf_inf") == over
    assert round(tie, name, "nearest_away", "ovf_inf") == over
    assert round(largest + TINY, name, "up", "ovf_inf") == over
    assert round(2 * tie, name, "toward_zero", "ovf_inf") == largest


@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e4m3fnuz", "e5m2:unsigned", "e8m0fnu", "e1m1"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_nan_stays_nan(name, rounding, overflow):
    assert round(NAN, name, rounding, overflow) is NAN
    assert round(float("nan"), name, rounding, overflow) is NAN


@pytest.mark.parametrize(("name", "largest"), [("e2m1fn", 6), ("e2m3fn", 7.5), ("e3m2fn", 28), ("e1m0", 0)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nan_becomes_the_largest_value_where_there_is_none(name, largest, rounding):
    assert round(NAN, name, rounding) == largest


# -- zeros, signs, underflow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_keep_their_sign_where_there_is_a_negative_zero(rounding):
    for name in ("fp16", "e4m3fn", "e2m1fn", "e5m2:nosubnormals", "e5m0"):
        assert round(0.0, name, rounding) == 0
        assert round(-0.0, name, rounding) is NEGATIVE_ZERO
    for name in ("e4m3fnuz", "e5m2:unsigned"):
        assert round(0.0, name, rounding) == round(-0.0, name, rounding) == 0


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_negative_underflow_keeps_its_sign(overflow):
    assert round(-TINY, "e5m2", overflow=overflow) is NEGATIVE_ZERO
    assert round(-TINY, "e5m2", "up", overflow) is NEGATIVE_ZERO
    assert round(-TINY, "e5m2", "down", overflow) == Fraction(-1, 2**16)
    assert round(-TINY, "e4m3fnuz", "up", overflow) == 0


def test_in_unsigned_formats_only_what_stays_below_zero_is_out_of_range():
    for overflow, below in (("ovf_inf", NAN), ("sat_finite", 0), ("sat_propagate", 0)):
        assert round(-TINY, "e5m2:unsigned", "up", overflow) == 0
        assert round(-TINY, "e5m2:unsigned", "nearest_even", overflow) == 0
        assert round(-TINY, "e5m2:unsigned", "to_odd", overflow) == below
        assert round(-TINY, "e5m2:unsigned", "down", overflow) == below
        assert round(-1, "e5m2:unsigned", "up", overflow) == below


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_format_without_zero_begins_at_its_smallest_value(rounding):
    smallest = Fraction(1, 2**127)
    for x in (TINY, smallest / 2, smallest * Fraction(7, 8), smallest):
        for overflow in OVERFLOWS:
            assert round(x, "e8m0fnu", rounding, overflow) == smallest
    for zero in (0.0, -0.0, 0, NEGATIVE_ZERO):
        assert round(zero, "e8m0fnu", rounding, "ovf_inf") is NAN
        assert round(zero, "e8m0fnu", rounding, "sat_finite") == smallest
        assert round(zero, "e8m0fnu", rounding, "sat_propagate") == smallest
    assert round(-TINY, "e8m0fnu", rounding, "ovf_inf") is NAN
    assert round(-TINY, "e8m0fnu", rounding) == smallest


# e3m1:nosubnormals: smallest normal 1/4, the number before it would be 3/16
@pytest.mark.parametrize(
    ("rounding", "least"),  # the least number that becomes 1/4, and whether it does so itself
    [
        ("nearest_even", (Fraction(7, 32), True)),
        ("nearest_away", (Fraction(7, 32), True)),
        ("toward_zero", (Fraction(1, 4), True)),
        ("down", (Fraction(1, 4), True)),
        ("up", (Fraction(3, 16), False)),
        ("to_odd", (Fraction(1, 4), True)),
    ],
)
def test_without_subnormals_numbers_are_rounded_and_then_flushed(rounding, least):
    name, (bound, closed) = "e3m1:nosubnormals", least
    assert round(bound - TINY, name, rounding) == 0
    assert round(bound, name, rounding) == (Fraction(1, 4) if closed else 0)
    assert round(bound + TINY, name, rounding) == (Fraction(3, 8) if bound == Fraction(1, 4) and rounding in
                                                   ("up", "to_odd") else Fraction(1, 4))  # fmt: skip
    assert round(TINY, name, rounding) == 0
    opposite = {"up": "down", "down": "up"}.get(rounding, rounding)
    assert round(-(bound - TINY), name, opposite) is NEGATIVE_ZERO
    assert round(-bound, name, opposite) == (Fraction(-1, 4) if closed else NEGATIVE_ZERO)


# e3m0:nosubnormals: smallest normal 1/4 with code 1; before it 1/8 with code 0, then 1/16 with code -1
@pytest.mark.parametrize(
    ("rounding", "x", "result"),
    [
        ("nearest_even", Fraction(3, 16), 0),  # the tie goes to code 0, which is flushed
        ("nearest_even", Fraction(3, 16) + TINY, Fraction(1, 4)),
        ("nearest_away", Fraction(3, 16), Fraction(1, 4)),
        ("to_odd", Fraction(1, 8), 0),
        ("to_odd", Fraction(1, 8) + TINY, Fraction(1, 4)),
        ("to_odd", Fraction(1, 8) - TINY, 0),
        ("up", Fraction(1, 8), 0),
        ("up", Fraction(1, 8) + TINY, Fraction(1, 4)),
    ],
)
def test_without_subnormals_nor_mantissa_bits(rounding, x, result):
    assert round(x, "e3m0:nosubnormals", rounding) == result


def test_subnormals_without_mantissa_bits_are_only_zero():
    assert round(Fraction(1, 8) + TINY, "e3m0") == Fraction(1, 4)  # the quantum is that of the smallest normal
    assert round(Fraction(1, 8), "e3m0") == 0
    assert round(TINY, "e3m0", "to_odd") == Fraction(1, 4)


def test_one_exponent_bit():
    # IEEE: zero and subnormals only, e1m2: 0, 1/2, 1, 3/2, then infinity at 2
    assert [round(Fraction(k, 4), "e1m2") for k in range(9)] == [
        0, 0, Fraction(1, 2), 1, 1, 1, Fraction(3, 2), INFINITY, INFINITY
    ]  # fmt: skip
    # finite: one binade of normals, e1m2finite: 0, 1/2, 1, 3/2, 2, 5/2, 3, 7/2
    assert [round(Fraction(k, 4), "e1m2finite") for k in range(14, 17)] == [Fraction(7, 2)] * 3
    # without subnormals nothing is left of the IEEE format but zero and infinity
    assert [round(x, "e1m2:nosubnormals") for x in (1, Fraction(15, 8), 2)] == [0, INFINITY, INFINITY]
    assert round(100, "e1m2:nosubnormals", overflow="sat_finite") == 0
    assert round(-100, "e1m2:nosubnormals", overflow="sat_finite") is NEGATIVE_ZERO


# -- inputs that broke other simulators --------------------------------------------------------------------------------


def float32(pattern: int) -> float:
    return float(np.array(pattern, np.uint32).view(np.float32))


@pytest.mark.parametrize(
    ("pattern", "name", "arguments", "result"),
    [
        (0x3F280000, "e4m3", (), 0.625),  # a tie, not away
        (0x3B3FFFFF, "e4m3", (), 0.001953125),  # double rounding in the subnormals
        (0xB731004C, "e4m3", (), -0.0),  # negative underflow
        (0xB2FFC19D, "fp32", (), float32(0xB2FFC19D)),  # the identity
        (0x80651D03, "bf16", (), float32(0x80650000)),  # a subnormal of float32
        (0x80651D03, "fp32", ("to_odd",), float32(0x80651D03)),
        (0x00000001, "e8m22", (), 0.0),  # the tie below the least subnormal
        (0x00000003, "e8m22", (), float32(4)),
        (0x7F800000, "e4m3", ("nearest_even", "sat_finite"), 240.0),
        (0xC3CB0E2F, "e4m3", (), float("-inf")),  # the binade above the largest number
        (0x7F7FFFFF, "bf16", (), float("inf")),
        (0x7F7FFFFF, "e4m3fn", (), 448.0),
        (0xFF7FFFFF, "e5m2", ("up",), -57344.0),
        (0x43780000, "e4m3", (), float("inf")),  # a carry out of the top binade
        (0x43780000, "e4m3fn", (), 256.0),  # the same carry, within range
        (0x3A800001, "e4m3", (), 0.001953125),  # just above half of the smallest
        (0x3A800000, "e4m3", (), 0.0),
        (0x3A7FFFFF, "e4m3", (), 0.0),
        (0x3A80909B, "e4m3", (), 0.001953125),
        (0xB3BFFF2B, "fp16", (), -(2.0**-24)),
        (0x0099257B, "e4m3", (), 0.0),
        (0x037F0000, "bf16", (), float32(0x037F0000)),
        (0x80000000, "e4m3", (), -0.0),
        (0x43F55C50, "e4m3fn", (), 448.0),
        (0x43F55C50, "e4m3fn", ("nearest_even", "ovf_inf"), float("nan")),
        (0xBC2FF6DC, "e5m2", (), -0.009765625),  # double rounding through fp16
        (0x3F480B90, "e4m3", (), 0.8125),
        (0xC76FF989, "e5m2", (), -57344.0),
        (0x3B400000, "e4m3", (), 0.00390625),
        (0xB9FFFFFC, "e5m2", ("toward_zero",), -0.00042724609375),  # just under a power of two
        (0xB9FFFFFC, "e5m2", ("up",), -0.00042724609375),
        (0xB9FFFFFC, "e5m2", ("down",), -0.00048828125),
        (0x38800000, "e5m2", ("to_odd",), 2.0**-14),  # exact, although its code is even
        (0x7FC00000, "e2m1fn", (), 6.0),
    ],
)
def test_inputs_that_broke_other_simulators(pattern, name, arguments, result):
    assert round(float32(pattern), name, *arguments) == as_value(result), hex(pattern)


@pytest.mark.parametrize(
    ("x", "name", "result"),
    [
        (0.0009765625000000002, "e4m3", 0.001953125),  # a float64 just above half of the smallest
        (6.05743e-05, "e5m2", 2.0**-14),  # a subnormal that rounds up to the smallest normal
        (1 + 2.0**-24, "fp32", 1.0),
        (1 + 2.0**-24 + 2.0**-52, "fp32", 1 + 2.0**-23),
        (1 + 2.0**-4 + 2.0**-40, "e4m3", 1.125),  # a float64 that float32 would turn into a tie
    ],
)
def test_float64_inputs_near_ties(x, name, result):
    assert round(x, name) == as_value(result)


# -- arguments -----------------------------------------------------------------------------------------------------


def test_inputs_of_every_kind():
    third = Fraction(11, 32)
    assert round(Fraction(1, 3), "e4m3fn") == third == round(1 / 3, "e4m3fn") == round(third, FloatFormat(4, 3))
    assert round(17, "e4m3fn") == 16 and round(True, "e4m3fn") == 1 and round(np.float64(17.0), "e4m3fn") == 16
    assert to_float(round(0.1, "fp32")) == float(np.float32(0.1))
    assert isinstance(round(17, "e4m3fn"), Fraction) and isinstance(round(NAN, "e4m3fn"), Special)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown format 'e4m3nf'"):
        round(1, "e4m3nf")
    with pytest.raises(ValueError, match="unknown rounding 'nearest'"):
        round(1, "e4m3fn", "nearest")
    with pytest.raises(ValueError, match="rounding='stochastic:3' needs a random number from 0 to 7, got None"):
        round(1, "e4m3fn", "stochastic:3")
    with pytest.raises(ValueError, match="unknown overflow mode 'clamp'"):
        round(1, "e4m3fn", overflow="clamp")
    with pytest.raises(ValueError, match="e2m1fn has neither: use overflow='sat_finite'"):
        round(1, "e2m1fn", overflow="ovf_inf")
    with pytest.raises(TypeError, match="a number is"):
        round("1", "e4m3fn")
    with pytest.raises(TypeError, match="a format is"):
        round(1, 8)
