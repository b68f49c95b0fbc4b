"""Comparison, classes and neighbours: against Python, numpy, ml_dtypes and gfloat, and by the order of the values."""

import math
from fractions import Fraction
from itertools import product

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import FloatFormat, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    FloatClass,
    as_value,
    classify,
    compare,
    decode,
    encode,
    logb,
    maximum,
    maximum_number,
    minimum,
    minimum_number,
    next_down,
    next_up,
    round,
    scaleb,
    to_float,
    total_order,
    ulp,
)
from tests.shared.peers import GFLOAT_FORMATS

FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, -5e-324, 1e308]
EIGHT_BITS = ["e4m3fn", "e5m2", "e4m3", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz"]
OTHERS = ["e2m1fn", "e3m2fn", "e8m0fnu", "e5m2:nosubnormals", "e4m3fn:unsigned", "e1m3", "e5m0", "e3m0fn"]


def values_in_order(name: str) -> list:
    """The values of a format without NaN, in increasing order; -0 before +0."""
    fmt = parse_format(name)
    values = {decode(code, fmt) for code in range(1 << fmt.bits)} - {NAN}
    return sorted(values, key=lambda v: (to_float(v), v is not NEGATIVE_ZERO))


# -- comparison --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "by_python"),
    [
        ("equal", lambda a, b: a == b),
        ("less", lambda a, b: a < b),
        ("less_equal", lambda a, b: a <= b),
        ("greater", lambda a, b: a > b),
        ("greater_equal", lambda a, b: a >= b),
        ("unordered", lambda a, b: math.isnan(a) or math.isnan(b)),
    ],
)
def test_predicates_are_those_of_python(name, by_python):
    for a, b in product(FLOATS, repeat=2):
        assert getattr(reference, name)(a, b) == by_python(a, b), (a, b)


def test_exactly_one_relation_holds():
    for a, b in product(FLOATS, repeat=2):
        mirrored = {"less": "greater", "greater": "less"}.get(compare(a, b), compare(a, b))
        assert compare(b, a) == mirrored
    assert compare(0.1, Fraction(1, 10)) == "greater", "numbers are compared exactly"


def test_total_order_is_total():
    for a, b in product(FLOATS, repeat=2):
        same = as_value(a) == as_value(b)
        assert total_order(a, b) + total_order(b, a) == (2 if same else 1)
    ranked = [-math.inf, -1.0, -5e-324, -0.0, 0.0, 5e-324, 0.5, 1.0, math.inf, math.nan]
    for i, j in product(range(len(ranked)), repeat=2):
        assert total_order(ranked[i], ranked[j]) == (i <= j)


def test_minima_and_maxima_are_those_of_numpy():
    """Except zeros, which numpy does not distinguish."""
    with np.errstate(all="ignore"):
        for a, b in product(FLOATS, repeat=2):
            if a != 0 or b != 0:
                assert minimum(a, b) == as_value(float(np.minimum(a, b)))
                assert maximum(a, b) == as_value(float(np.maximum(a, b)))
                assert minimum_number(a, b) == as_value(float(np.fmin(a, b)))
                assert maximum_number(a, b) == as_value(float(np.fmax(a, b)))
    for low, high in ((minimum, maximum), (minimum_number, maximum_number)):
        for a, b in ((0.0, -0.0), (-0.0, 0.0)):
            assert low(a, b) is NEGATIVE_ZERO and high(a, b) == 0


@given(st.floats())
def test_the_sign(x):
    assert reference.is_sign_minus(x) == (not math.isnan(x) and math.copysign(1, x) < 0)


# -- classes -----------------------------------------------------------------------------------------------------------

GFLOAT_CLASSES = {
    "NORMAL": (FloatClass.NEGATIVE_NORMAL, FloatClass.POSITIVE_NORMAL),
    "SUBNORMAL": (FloatClass.NEGATIVE_SUBNORMAL, FloatClass.POSITIVE_SUBNORMAL),
    "ZERO": (FloatClass.NEGATIVE_ZERO, FloatClass.POSITIVE_ZERO),
    "INFINITE": (FloatClass.NEGATIVE_INFINITY, FloatClass.POSITIVE_INFINITY),
    "NAN": (FloatClass.QUIET_NAN, FloatClass.QUIET_NAN),
}


@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e3m2fn", "e2m1fn", "fp16"])
def test_classes_are_those_of_gfloat(name):
    fmt = parse_format(name)
    for code in range(0, 1 << fmt.bits, 1 if fmt.bits <= 8 else 31):
        other = gfloat.decode_float(GFLOAT_FORMATS[name], code)
        assert classify(decode(code, fmt), fmt) == GFLOAT_CLASSES[other.fclass.name][not other.signbit], hex(code)


def test_every_value_has_one_class_and_the_predicates_agree():
    for name in EIGHT_BITS + OTHERS:
        fmt = parse_format(name)
        for code in range(1 << fmt.bits):
            value = decode(code, fmt)
            kinds = [reference.is_nan(value), reference.is_infinite(value), reference.is_zero(value)]
            kinds += [reference.is_normal(value, fmt), reference.is_subnormal(value, fmt)]
            assert kinds.count(True) == 1, (name, hex(code))
            assert reference.is_finite(value) == (not (kinds[0] or kinds[1]))


def test_only_values_of_the_format_have_a_class():
    for value, name in ((Fraction(1, 3), "fp16"), (449, "e4m3fn"), (NEGATIVE_ZERO, "e4m3fnuz"), (INFINITY, "e4m3fn")):
        with pytest.raises(ValueError, match="round it first"):
            classify(value, name)
        with pytest.raises(ValueError, match="round it first"):
            next_up(value, name)


# -- neighbours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EIGHT_BITS + OTHERS)
def test_neighbours_are_neighbours_in_the_order_of_values(name):
    """-0 and +0 have the same neighbours. The ends of the range have themselves or an infinity as neighbour."""
    fmt, values = parse_format(name), values_in_order(name)
    lower = [v for v in values if not (v == 0 and NEGATIVE_ZERO in values)]  # -0 stands for both, from below
    upper = [v for v in values if v is not NEGATIVE_ZERO]
    for i, value in enumerate(lower):
        assert next_up(value, fmt) == lower[min(i + 1, len(lower) - 1)], value
    for i, value in enumerate(upper):
        assert next_down(value, fmt) == upper[max(i - 1, 0)], value
    if NEGATIVE_ZERO in values:
        assert next_up(0, fmt) == next_up(NEGATIVE_ZERO, fmt) and next_down(0, fmt) == next_down(NEGATIVE_ZERO, fmt)
    if fmt.has_nan:
        assert next_up(NAN, fmt) is NAN and next_down(NAN, fmt) is NAN


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_neighbours_are_those_of_ml_dtypes(name):
    """Only inside the range: in formats without infinity, ml_dtypes gives NaN after the largest value."""
    dtype = getattr(ml_dtypes, f"float8_{name}")
    for code in range(256):
        value = decode(code, name)
        if value not in (NAN, INFINITY, NEGATIVE_INFINITY) and abs(to_float(value)) < parse_format(name).max:
            number = np.array(to_float(value)).astype(dtype)
            for direction, neighbour in ((math.inf, next_up), (-math.inf, next_down)):
                toward = np.array(math.copysign(parse_format(name).max, direction)).astype(dtype)
                assert neighbour(value, name) == as_value(float(np.nextafter(number, toward))), hex(code)


@given(st.floats())
def test_neighbours_in_fp64_are_those_of_python(x):
    assert next_up(x, "fp64") == as_value(math.nextafter(x, math.inf))
    assert next_down(x, "fp64") == as_value(math.nextafter(x, -math.inf))


# -- exponents ---------------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_ulp_is_that_of_python(x):
    assert ulp(x, "fp64") == Fraction(math.ulp(x))


def test_ulp_is_the_distance_to_the_next_value_away_from_zero():
    for name in EIGHT_BITS + OTHERS:
        fmt = parse_format(name)
        for value in values_in_order(name):
            if isinstance(value, Fraction) and 0 <= value < fmt.max:
                assert next_up(value, fmt) - value == ulp(value, fmt), (name, value)
    for special in (INFINITY, NAN):
        with pytest.raises(ValueError, match="not finite"):
            ulp(special, "fp16")


@given(st.floats(allow_nan=False, allow_infinity=False).filter(bool))
def test_logb_is_that_of_frexp(x):
    assert logb(x) == math.frexp(x)[1] - 1


def test_logb_of_specials():
    assert logb(0) == logb(-0.0) == NEGATIVE_INFINITY
    assert logb(INFINITY) == logb(NEGATIVE_INFINITY) == INFINITY
    assert logb(NAN) is NAN


@given(st.floats(width=32), st.integers(-400, 400))
def test_scaleb_is_that_of_ldexp(x, exponent):
    with np.errstate(all="ignore"):
        expected = np.ldexp(np.float32(x), np.int32(exponent))
    assert scaleb(x, exponent, "fp32") == as_value(float(expected))


@settings(max_examples=200)
@given(st.fractions(), st.integers(-300, 300), st.sampled_from(("up", "down", "to_odd", "nearest_away")))
def test_scaleb_rounds_once(x, exponent, rounding):
    for fmt in (FloatFormat(4, 3), FloatFormat(5, 2, subnormals=False), FloatFormat(4, 3, bias=-20)):
        assert scaleb(x, exponent, fmt, rounding) == round(x * Fraction(2) ** exponent, fmt, rounding)


def test_scaleb_with_a_huge_exponent():
    assert scaleb(1, 10**18, "fp16") is INFINITY and scaleb(-1, -(10**18), "fp16") is NEGATIVE_ZERO
    assert scaleb(Fraction(1, 2**5000), 5001, "fp16") == 2
    with pytest.raises(TypeError, match=r"0\.5"):
        scaleb(1, 0.5, "fp16")
    assert encode(scaleb(NAN, 3, "fp16"), "fp16") == 0x7E00
