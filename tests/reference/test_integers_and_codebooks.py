"""Integers and codebooks: against formats with the same values, against all values by trial, and the known tables."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim.formats import ROUNDINGS, FloatFormat
from fpsim.reference import (
    CODEBOOKS,
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Codebook,
    Integers,
    as_value,
    dynamic_map,
    parse_codebook,
    parse_integers,
    round,
    round_codebook,
    round_integer,
)

numbers = st.fractions(-200, 200, max_denominator=64) | st.floats(-200, 200)


def float_format(bits: int, unit_exponent: int = 0) -> FloatFormat:
    """The floating-point format whose values are the multiples of a unit up to 2**(bits - 1) - 1 of them."""
    return FloatFormat(1, bits - 2, bias=3 - bits - unit_exponent, specials="finite")


def same_number(a, b) -> bool:
    return a == (0 if b is NEGATIVE_ZERO else b)


# -- integers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(numbers, st.integers(2, 16), st.sampled_from(ROUNDINGS))
def test_integers_round_as_the_format_with_one_exponent_bit_does(number, bits, rounding):
    """e1mX is a grid of even steps. It has -0 where integers have +0."""
    expected = round(number, float_format(bits), rounding, "sat_finite")
    assert same_number(round_integer(number, f"int{bits}", rounding), expected)


@settings(max_examples=100)
@given(st.fractions(-3, 3, max_denominator=512), st.integers(0, 255))
def test_mxint8_rounds_as_its_format_stochastically_too(number, random):
    fmt = float_format(8, -6)
    assert fmt.name == "e1m6finite:bias=1" and fmt.max == 127 / 64
    for rounding in ("stochastic:8", "stochastic_b:8", "stochastic_c:8"):
        expected = round(number, fmt, rounding, random=random)
        assert same_number(round_integer(number, "mxint8", rounding, random=random), expected)


@settings(max_examples=200)
@given(numbers, st.sampled_from(["int8", "int8:full", "int4:full", "uint4", "uint8"]))
def test_nearest_integers_are_those_of_python(number, name):
    """Python rounds ties of fractions to even."""
    grid = parse_integers(name)
    nearest = int(Fraction(number).__round__())
    assert round_integer(number, name) == min(max(nearest, grid.least), grid.greatest)


@pytest.mark.parametrize(
    ("name", "least", "greatest", "half_range"),
    [("int8", -127, 127, "127"), ("int8:full", -128, 127, "127.5"), ("int4", -7, 7, "7"), ("int4:full", -8, 7, "7.5"),
     ("int2", -1, 1, "1"), ("int16", -32767, 32767, "32767"), ("uint4", 0, 15, "7.5"), ("uint16", 0, 65535, "32767.5")],
)  # fmt: skip
def test_names_denote_ranges(name, least, greatest, half_range):
    grid = parse_integers(name)
    assert grid == Integers(least, greatest) and grid.half_range == Fraction(half_range)


def test_special_values_of_integers():
    for zero in (0, NEGATIVE_ZERO, Fraction(-1, 200)):
        assert round_integer(zero, "int8") == 0 and round_integer(zero, "mxint8", "toward_zero") == 0
    assert round_integer(INFINITY, "int4") == 7 and round_integer(NEGATIVE_INFINITY, "int4:full") == -8
    assert round_integer(NEGATIVE_INFINITY, "uint4") == 0 and round_integer(NAN, "int4") is NAN


@pytest.mark.parametrize("name", ["int1", "int17", "uint4:full", "int", "int8x", "mxint4"])
def test_other_integers_are_refused(name):
    with pytest.raises(ValueError, match="unknown integers"):
        round_integer(1, name)


# -- codebooks --------------------------------------------------------------------------------------------------------

codebooks = st.lists(st.fractions(-2, 2, max_denominator=9), min_size=2, max_size=9, unique=True).map(sorted)


@settings(max_examples=80)
@given(codebooks, st.fractions(-3, 3, max_denominator=18), st.sampled_from(["down", "up", "even", "zero", "away"]))
def test_a_codebook_gives_the_nearest_value(values, number, ties):
    """By trial of all values. Where two are nearest, the tie rule says which."""
    least = min(abs(value - number) for value in values)
    nearest = [value for value in values if abs(value - number) == least]
    rule = {"down": min, "even": lambda pair: next(v for v in pair if values.index(v) % 2 == 0)}
    rule |= {"up": max, "zero": lambda pair: min(pair, key=lambda v: (abs(v), v))}
    rule["away"] = lambda pair: min(pair, key=lambda v: (-abs(v), v))
    expected = nearest[0] if len(nearest) == 1 else rule[ties](nearest)
    assert round_codebook(number, Codebook(tuple(values), ties)) == expected


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb"])
def test_the_middle_of_two_values_is_exact_and_goes_where_the_kernel_of_bitsandbytes_sends_it(name):
    """A strict ``>`` of numbers for NF4, of magnitudes for FP4."""
    book = CODEBOOKS[name]
    for low, high in pairwise(book.values):
        middle = (low + high) / 2
        assert round_codebook(middle, name) == (low if name == "nf4" or low >= 0 else high)
        assert round_codebook(middle + Fraction(1, 10**20), name) == high
        assert round_codebook(middle - Fraction(1, 10**20), name) == low
        assert round_codebook(low, name) == low and round_codebook(high, name) == high


def test_a_codebook_can_be_written_out():
    book = Codebook((-1, 0, Fraction(1, 2), 1), "up")
    assert parse_codebook("codebook:up:-1,0,0.5,1") == book and round_codebook(0.25, book) == Fraction(1, 2)


def test_special_values_of_codebooks():
    assert round_codebook(INFINITY, "nf4") == 1 and round_codebook(NEGATIVE_INFINITY, "nf4") == -1
    assert round_codebook(NEGATIVE_ZERO, "nf4") == 0 and round_codebook(NAN, "nf4") is NAN
    assert round_codebook(2, "fp4_bnb") == 1


def test_the_table_of_nf4_has_the_digits_of_its_paper():
    digits = (
        "-1 -.696192801 -.525073051 -.394917488 -.284441382 -.18477343 -.0910500363 0 .0795802996 .160930201 "
        ".246112302 .337915242 .440709829 .562617004 .722956836 1"
    )
    assert [round(Fraction(d), "fp32") for d in digits.split()] == list(CODEBOOKS["nf4"].values)


def test_the_fp4_of_bitsandbytes_is_not_e2m1():
    positive = [value for value in CODEBOOKS["fp4_bnb"].values if value > 0]
    assert positive == [round(Fraction(n, 192), "fp32") for n in (1, 32, 48, 64, 96, 128, 192)]
    assert len(CODEBOOKS["fp4_bnb"].values) == 15


def test_the_dynamic_maps_have_the_ends_of_their_paper():
    signed, unsigned = dynamic_map(True).values, dynamic_map(False).values
    assert len(signed) == len(unsigned) == 256 and signed[-1] == unsigned[-1] == 1 and unsigned[0] == 0
    assert round(min(value for value in signed if value > 0), "e8m10") == round(Fraction(55, 10**8), "e8m10")
    assert round(min(value for value in unsigned if value > 0), "e8m10") == round(Fraction(325, 10**9), "e8m10")
    assert abs(signed[0] + Fraction(993, 1000)) < Fraction(1, 10000)


@pytest.mark.parametrize(
    ("values", "ties", "message"),
    [
        ((1, 0), "down", "increase"),
        ((0, 0), "down", "increase"),
        ((1,), "down", "two or more"),
        ((0, 1), "odd", "ties"),
    ],
)
def test_other_codebooks_are_refused(values, ties, message):
    with pytest.raises(ValueError, match=message):
        Codebook(values, ties)


def test_a_codebook_needs_finite_values_and_a_known_name():
    with pytest.raises(ValueError, match="not finite"):
        Codebook((0, as_value(float("inf"))))
    with pytest.raises(ValueError, match="unknown codebook 'nf3'"):
        round_codebook(1, "nf3")
