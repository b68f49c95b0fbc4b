"""Numbers are read exactly, and shown exactly or marked as approximate."""

from fractions import Fraction

import pytest

from fpsim import reference
from fpsim.cli import exact_numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        ("-2.5e-3", Fraction(-1, 400)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("+1e3", Fraction(1000)),
        ("1/3", Fraction(1, 3)),
        ("-7/2", Fraction(-7, 2)),
        ("0x1.8p3", Fraction(12)),
        ("-0x.8p-1", Fraction(-1, 4)),
        ("0X1P-149", Fraction(1, 2**149)),
        ("0x10", Fraction(16)),
        ("1e-400", Fraction(1, 10**400)),
        ("0.1000000000000000055511151231257827", Fraction(1000000000000000055511151231257827, 10**34)),
        ("0", Fraction(0)),
        ("-0", reference.NEGATIVE_ZERO),
        ("-0.0e5", reference.NEGATIVE_ZERO),
        ("-0x0p0", reference.NEGATIVE_ZERO),
        ("inf", reference.INFINITY),
        ("-Infinity", reference.NEGATIVE_INFINITY),
        ("NaN", reference.NAN),
        ("-nan", reference.NAN),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert exact_numbers.parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "abc", "1.2.3", "1/0", "1/2/3", "0x", "0x.p3", "--1", "+-1", "1e", "e5", "1_000", "१"]
)
def test_what_is_no_number_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(ValueError, match=r"cannot read .* as a number: use a decimal .*0x1\.8p3"):
        exact_numbers.parse_number(text)


@pytest.mark.parametrize("text", ["1e999999999", "0x1p-999999999", "1e-4001"])
def test_an_exponent_that_would_fill_the_memory_is_an_error(text):
    with pytest.raises(ValueError, match="beyond 4000"):
        exact_numbers.parse_number(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Fraction(12), "12"),
        (Fraction(-13, 128), "-0.1015625"),
        (Fraction(1, 2**24), "5.9604644775390625e-8"),
        (Fraction(1, 3), "1/3"),
        (Fraction(10) ** 30, "1e30"),
        (Fraction(2) ** 127, "~1.70141e38"),
        (Fraction(1, 2**149), "~1.4013e-45"),
        (reference.NEGATIVE_ZERO, "-0"),
        (reference.NEGATIVE_INFINITY, "-inf"),
    ],
)
def test_numbers_are_shown_exactly_or_marked_as_not(value, shown):
    assert exact_numbers.show_number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Fraction(1, 3), "1/3"),
        (Fraction(884279719003555, 2**48), "3.141592653589793115997963468544185161590576171875"),
        (Fraction(2) ** 127, "170141183460469231731687303715884105728"),
        (Fraction(1, 3**200), "~3.76486e-96"),
        (reference.NAN, "nan"),
    ],
)
def test_the_input_is_shown_with_all_its_digits(value, shown):
    assert exact_numbers.show_exactly(value) == shown
