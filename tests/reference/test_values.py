"""Exact values: conversion from and to floats, order and signs."""

import math
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpsim import reference
from fpsim.reference import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, as_value, to_float
from fpsim.reference.values import floor_log2, is_negative, magnitude, negate, order, scale_b

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def bits(number: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", number))[0]


@given(st.floats(allow_nan=False))
def test_floats_come_back_bit_for_bit(number):
    assert bits(to_float(as_value(number))) == bits(number)


def test_nan_comes_back():
    assert math.isnan(to_float(NAN)) and as_value(math.nan) is NAN


@given(FINITE)
def test_a_float_stands_for_exactly_what_it_holds(number):
    if bits(number) != bits(-0.0):
        assert as_value(number) == Fraction(*number.as_integer_ratio())


@pytest.mark.parametrize("number", [0, 3, -7, Fraction(1, 3), NAN, NEGATIVE_ZERO, 10**400])
def test_what_is_exact_already_stays(number):
    assert as_value(number) == number


@pytest.mark.parametrize("thing", ["1", None, 1j, [1]])
def test_what_is_no_number_is_a_type_error(thing):
    with pytest.raises(TypeError, match=r"a number is an int, a float, .* use float\(x\)"):
        as_value(thing)


@pytest.mark.parametrize("value", [Fraction(1, 3), 2**53 + 1, Fraction(1, 2**1075), 2**1024, -(10**400)])
def test_to_float_refuses_what_no_float_holds(value):
    with pytest.raises(ValueError, match="no float64 equals"):
        to_float(value)


def test_values_are_data():
    assert Fraction(0) != NEGATIVE_ZERO and NAN == NAN
    assert len({NAN, INFINITY, NEGATIVE_INFINITY, NEGATIVE_ZERO, Fraction(0)}) == 5
    assert [repr(v) for v in reference.Special] == ["NEGATIVE_ZERO", "INFINITY", "NEGATIVE_INFINITY", "NAN"]
    assert [str(v) for v in reference.Special] == ["-0", "inf", "-inf", "nan"]


@given(st.floats(allow_nan=False))
def test_negate_and_is_negative_are_those_of_floats(number):
    assert bits(to_float(negate(as_value(number)))) == bits(-number)
    assert is_negative(as_value(number)) == (math.copysign(1, number) < 0)


def test_nan_has_no_sign():
    assert negate(NAN) is NAN and not is_negative(NAN)


def test_magnitude_is_for_finite_values():
    assert (magnitude(NEGATIVE_ZERO), magnitude(Fraction(-2, 3))) == (0, Fraction(2, 3))
    for value in (INFINITY, NEGATIVE_INFINITY, NAN):
        with pytest.raises(ValueError, match="is not finite"):
            magnitude(value)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_order_is_that_of_floats_with_negative_zero_first(a, b):
    assert (order(as_value(a)) < order(as_value(b))) == ((a, math.copysign(1, a)) < (b, math.copysign(1, b)))


def test_order_refuses_nan():
    with pytest.raises(ValueError, match="NaN has no place"):
        order(NAN)


@given(st.fractions(min_value=Fraction(1, 10**30)))
def test_floor_log2_is_the_exponent_of_the_leading_bit(number):
    exponent = floor_log2(number)
    assert Fraction(2) ** exponent <= number < Fraction(2) ** (exponent + 1)


@given(st.integers(), st.integers(-1100, 1100))
def test_scale_b_multiplies_by_a_power_of_two(significand, exponent):
    assert scale_b(significand, exponent) == significand * Fraction(2) ** exponent
