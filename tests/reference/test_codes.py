"""decode and encode against ml_dtypes and numpy, code by code, and against each other."""

from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from fpsim.formats import parse_format
from fpsim.reference import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, Special, as_value, decode, encode
from tests.shared.formats import formats_of_every_kind
from tests.shared.peers import ML_DTYPES

SMALL = formats_of_every_kind([(1, 0, None), (1, 3, None), (2, 0, None), (2, 1, -4), (4, 3, None), (4, 0, 9)])


def datums(name: str) -> tuple[np.ndarray, list]:
    """All codes of a type of ml_dtypes or numpy, and their values according to it."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    codes = np.arange(1 << parse_format(name).bits, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs
        floats = codes.view(dtype).astype(np.float64)
    return codes, [as_value(float(x)) for x in floats]


@pytest.mark.parametrize("name", [*ML_DTYPES, "float16"])
def test_decode_agrees_with_ml_dtypes_and_numpy_on_every_code(name):
    codes, expected = datums(name)
    wrong = {
        hex(c): (decode(c, name), want) for c, want in zip(codes, expected, strict=True) if decode(c, name) != want
    }
    assert not wrong


@pytest.mark.parametrize("name", [*ML_DTYPES, "float16"])
def test_encode_agrees_with_ml_dtypes_and_numpy_on_values(name):
    codes, values = datums(name)
    overflow = "ovf_inf" if parse_format(name).has_nan else None  # an infinity or NaN that it has stays
    step = 1 if len(codes) <= 256 else 7  # prime to every power of two: all fields take all their values
    for code, value in zip(codes[::step], values[::step], strict=True):
        if value is not NAN:
            assert encode(value, name, overflow=overflow) == code, hex(code)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_encode_inverts_decode(fmt):
    overflow = "ovf_inf" if fmt.has_infinity or fmt.has_nan else None
    for code in range(1 << fmt.bits):
        value = decode(code, fmt)
        canonical = code
        if value is NAN:
            canonical = fmt.nan_code
        elif value in (0, NEGATIVE_ZERO):  # without subnormals there are many zeros
            canonical = fmt.sign_code if value is NEGATIVE_ZERO else 0
            assert code in (0, fmt.sign_code) or not fmt.subnormals
        assert encode(value, fmt, overflow=overflow) == canonical, hex(code)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_codes_are_in_the_order_of_their_values(fmt):
    values = [decode(code, fmt) for code in range(fmt.max_code + 1)]
    if fmt.subnormals or not fmt.zero:
        assert all(a < b for a, b in pairwise(values))
    else:
        assert values == sorted(values)


# OCP 8-bit Floating Point Specification 1.0, table 2; OCP Microscaling Formats 1.0, section 5.3, tables 3 to 5
@pytest.mark.parametrize(
    ("name", "code", "value"),
    [
        ("e5m2", 0b0_11111_00, INFINITY),
        ("e5m2", 0b1_11111_00, NEGATIVE_INFINITY),
        ("e5m2", 0b0_11111_01, NAN),
        ("e5m2", 0b1_11111_11, NAN),
        ("e5m2", 0b1_00000_00, NEGATIVE_ZERO),
        ("e5m2", 0b0_11110_11, 57344),
        ("e5m2", 0b0_00001_00, Fraction(1, 2**14)),
        ("e5m2", 0b0_00000_11, Fraction(3, 2**16)),
        ("e5m2", 0b0_00000_01, Fraction(1, 2**16)),
        ("e4m3fn", 0b0_1111_111, NAN),
        ("e4m3fn", 0b1_1111_111, NAN),
        ("e4m3fn", 0b1_0000_000, NEGATIVE_ZERO),
        ("e4m3fn", 0b0_1111_110, 448),
        ("e4m3fn", 0b1_1111_000, -256),
        ("e4m3fn", 0b0_0000_111, Fraction(7, 2**9)),
        ("e4m3fn", 0b0_0000_001, Fraction(1, 2**9)),
        ("e3m2fn", 0b0_111_11, 28),
        ("e3m2fn", 0b0_000_11, Fraction(3, 16)),
        ("e2m3fn", 0b1_11_111, Fraction(-15, 2)),
        ("e2m3fn", 0b0_00_001, Fraction(1, 8)),
        ("e2m1fn", 0b0_11_1, 6),
        ("e2m1fn", 0b0_00_1, Fraction(1, 2)),
        ("e2m1fn", 0b1_00_0, NEGATIVE_ZERO),
        ("e8m0fnu", 0, Fraction(1, 2**127)),
        ("e8m0fnu", 127, 1),
        ("e8m0fnu", 254, 2**127),
        ("e8m0fnu", 255, NAN),
    ],
)
def test_codes_of_the_ocp_tables(name, code, value):
    assert decode(code, name) == value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("e1m0", [0, INFINITY, NEGATIVE_ZERO, NEGATIVE_INFINITY]),
        ("e1m0fn", [0, NAN, NEGATIVE_ZERO, NAN]),
        ("e1m0fnuz", [0, 1, NAN, -1]),
        ("e1m0finite", [0, 2, NEGATIVE_ZERO, -2]),
        ("e1m1:unsigned", [0, 1, INFINITY, NAN]),
        ("e1m1:nosubnormals", [0, 0, INFINITY, NAN, NEGATIVE_ZERO, NEGATIVE_ZERO, NEGATIVE_INFINITY, NAN]),
        ("e1m1fnuz:nosubnormals", [0, 0, 1, Fraction(3, 2), NAN, 0, -1, Fraction(-3, 2)]),
        ("e2m0", [0, 1, 2, INFINITY, NEGATIVE_ZERO, -1, -2, NEGATIVE_INFINITY]),
        ("e1m1finite:unsigned:nosubnormals:nozero", [1, Fraction(3, 2), 2, 3]),
    ],
)
def test_all_codes_of_the_smallest_formats(name, values):
    assert [decode(code, name) for code in range(len(values))] == values
    assert parse_format(name).bits == (len(values) - 1).bit_length()


@pytest.mark.parametrize("code", [-1, 256, 1 << 40])
def test_a_code_out_of_range_is_named(code):
    with pytest.raises(ValueError, match=f"code {code} is outside of e4m3fn, whose codes are 0 to 255"):
        decode(code, "e4m3fn")


@pytest.mark.parametrize("code", [1.0, "1", None, Fraction(1)])
def test_a_code_is_an_integer(code):
    with pytest.raises(TypeError):
        decode(code, "e4m3fn")


def test_numpy_integers_are_codes():
    assert decode(np.uint8(0x38), "e4m3fn") == 1


def test_encode_rounds_first():
    assert encode(Fraction(1, 3), "e4m3fn") == 0b0_0101_011
    assert encode(Fraction(1, 3), "e4m3fn", "down") == 0b0_0101_010
    assert encode(1000, "e5m2") == 0b0_11001_00
    assert encode(10**6, "e5m2") == 0b0_11111_00
    assert encode(10**6, "e5m2", "nearest_even", "sat_finite") == 0b0_11110_11
    assert encode(-(10**-9), "e5m2") == 0b1_00000_00


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e4m3fnuz", "e8m0fnu"])
def test_nan_has_one_canonical_code(name):
    assert encode(NAN, name) == parse_format(name).nan_code


def test_nan_takes_the_largest_finite_code_where_there_is_none():
    assert [encode(NAN, name) for name in ("e2m1fn", "e2m3fn", "e3m2fn", "e1m0")] == [0b111, 0b11111, 0b11111, 0]


def test_decoded_values_are_fractions_or_special():
    assert {type(decode(code, "e5m2")) for code in range(256)} == {Fraction, Special}
