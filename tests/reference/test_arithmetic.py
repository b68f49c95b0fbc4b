"""Arithmetic against ml_dtypes, MPFR, numpy, gfloat and Python, and the special cases of IEEE 754 one by one."""

import math
import operator
from fractions import Fraction
from random import Random

import gfloat
import gmpy2
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import ROUNDINGS, FloatFormat, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    add,
    as_value,
    convert,
    decode,
    div,
    fma,
    mul,
    remainder,
    round,
    sqrt,
    sub,
    to_float,
)
from tests.shared.formats import finite_values, operand_count, values_near_the_ends
from tests.shared.peers import (
    GFLOAT_FORMATS,
    GFLOAT_MODES,
    ML_DTYPES,
    MPFR_ARITHMETIC,
    MPFR_MODES,
    from_mpfr,
    mpfr_like,
    to_mpfr,
)

BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
FINITE_ZEROS = (Fraction(0), NEGATIVE_ZERO)


# -- all pairs, against ml_dtypes --------------------------------------------------------------------------------------

#: ml_dtypes computes in float32 and then rounds, which for so few bits is one rounding: see test_theorems.
SMALL = [name for name in ML_DTYPES if parse_format(name).bits <= 8 and name != "float8_e8m0fnu"]
DEFAULT = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float6_e3m2fn")


def cases_of_all_pairs():
    for name in SMALL:
        for operation in BINARY:
            marks = () if name in DEFAULT else pytest.mark.exhaustive
            yield pytest.param(name, operation, marks=marks, id=f"{name}-{operation}")


@pytest.mark.parametrize(("name", "operation"), list(cases_of_all_pairs()))
def test_all_pairs_of_codes_give_what_ml_dtypes_gives(name, operation):
    """In a format without NaN, ml_dtypes gives zeros for invalid operations: these are not compared."""
    fmt = parse_format(name)
    values = [decode(code, fmt) for code in range(1 << fmt.bits)]
    numbers = np.array([to_float(v) for v in values]).astype(getattr(ml_dtypes, name))
    with np.errstate(all="ignore"):
        others = BINARY[operation](numbers[:, None], numbers[None, :]).astype(np.float64)
    ours, overflow, wrong = getattr(reference, operation), "ovf_inf" if fmt.has_nan else "sat_finite", []
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if not fmt.has_nan and operation == "div" and a in FINITE_ZEROS and b in FINITE_ZEROS:
                continue
            if (got := ours(a, b, fmt, "nearest_even", overflow)) != as_value(float(others[i, j])):
                wrong.append(f"{i:#04x} {operation} {j:#04x}: reference {got}, ml_dtypes {others[i, j]}")
    assert not wrong, wrong[:10]


# -- MPFR --------------------------------------------------------------------------------------------------------------


@st.composite
def ieee_formats(draw) -> FloatFormat:
    """Formats with infinities and subnormals."""
    return parse_format(f"e{draw(st.integers(2, 11))}m{draw(st.integers(1, 24))}")


@st.composite
def operations(draw, names=tuple(MPFR_ARITHMETIC)):
    fmt, name = draw(ieee_formats()), draw(st.sampled_from(names))
    return fmt, name, [draw(values_near_the_ends(fmt)) for _ in range(operand_count(name))]


@settings(max_examples=600)
@given(operations(), st.sampled_from(list(MPFR_MODES)))
def test_results_are_those_of_mpfr(case, rounding):
    """With the subnormals, the range and the signs of zero of MPFR itself."""
    fmt, name, operands = case
    numbers = list(map(to_mpfr, operands))
    with mpfr_like(fmt, rounding):
        expected = from_mpfr(MPFR_ARITHMETIC[name](*numbers))
    assert getattr(reference, name)(*operands, fmt, rounding) == expected


@settings(max_examples=400)
@given(operations(), st.data(), st.sampled_from(ROUNDINGS))
def test_results_of_mixed_formats_are_those_of_mpfr_cut_off_and_then_rounded(case, data, rounding):
    """MPFR truncates to two bits more than needed; if that is inexact, a little more rounds as the exact result."""
    into, name, operands = case
    formats = ("fp64", "fp16", "bf16", "e4m3fn", "e8m0fnu", "e2m1fn")
    operands[0] = data.draw(values_near_the_ends(parse_format(data.draw(st.sampled_from(formats)))))
    target = data.draw(st.sampled_from((into, *map(parse_format, ("e4m3fn", "e5m2fnuz", "fp16", "e5m2:nosubnormals")))))
    numbers = list(map(to_mpfr, operands))
    with gmpy2.context(precision=target.precision + 2, round=gmpy2.RoundToZero) as context:
        cut_off = MPFR_ARITHMETIC[name](*numbers)
        exact = from_mpfr(cut_off)
        inexact = context.inexact
    if inexact:
        exact += exact / 2**90
    if (isinstance(exact, Fraction) and exact == 0) or exact is NEGATIVE_ZERO:
        return  # the sign of an exact zero depends on the direction: the test above has it
    assert getattr(reference, name)(*operands, target, rounding) == round(exact, target, rounding)


# -- numpy, gfloat and Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*BINARY, "sqrt"])
@pytest.mark.parametrize(("name", "dtype", "code"), [("fp16", np.float16, np.uint16), ("fp32", np.float32, np.uint32)])
@settings(max_examples=100)
@given(st.data())
def test_results_are_those_of_numpy(name, dtype, code, operation, data):
    patterns = st.integers(0, np.iinfo(code).max)
    a, b = (code(data.draw(patterns)).view(dtype) for _ in range(2))
    with np.errstate(all="ignore"):
        if operation == "sqrt":
            expected, got = np.sqrt(a), sqrt(float(a), name)
        else:
            expected = BINARY[operation](a, b)
            got = getattr(reference, operation)(float(a), float(b), name)
    assert got == as_value(float(expected)), (a.tobytes().hex(), b.tobytes().hex())


@settings(max_examples=200)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 3, st.sampled_from(ROUNDINGS))
def test_fma_of_fp32_is_the_exact_result_rounded(a, b, c, rounding):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        assert fma(a, b, c, "fp32", rounding) == round(exact, "fp32", rounding)


@pytest.mark.parametrize("rounding", GFLOAT_MODES)
@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e2m3fn"])
def test_sums_and_products_are_those_of_gfloat(name, rounding):
    """gfloat has no arithmetic, but it rounds sums and products that are exact in float64."""
    random, fmt = Random(5), parse_format(name)
    finite = [v for v in (decode(code, fmt) for code in range(1 << fmt.bits)) if v == 0 or isinstance(v, Fraction)]
    for _ in range(300):
        a, b = random.choices(finite, k=2)
        for operation in ("add", "mul"):
            exact = BINARY[operation](to_float(a), to_float(b))
            expected = gfloat.round_float(GFLOAT_FORMATS[name], exact, GFLOAT_MODES[rounding], True)
            if exact != 0:
                got = getattr(reference, operation)(a, b, name, rounding, "sat_finite")
                assert got == as_value(float(expected)), (a, operation, b)


@settings(max_examples=150)
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False).filter(bool))
def test_remainder_is_that_of_python(a, b):
    assert remainder(a, b, "fp64") == as_value(math.remainder(a, b))


def test_remainders_are_exact_and_at_most_half_the_divisor():
    """IEEE 754-2019 clause 5.3.1: the remainder of two values of a format is a value of it, in every direction."""
    values = finite_values("e3m2")
    for a in (*values, NEGATIVE_ZERO):
        for b in filter(None, values):
            rest = remainder(a, b, "e3m2", "up")
            assert rest == remainder(a, b, "fp64", "down")
            size = abs(rest) if isinstance(rest, Fraction) else Fraction(0)
            assert size <= abs(b) / 2
            if size == 0:
                assert (rest is NEGATIVE_ZERO) == (a is NEGATIVE_ZERO or a < 0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m0fn", "e2m1fn", "e5m2:nosubnormals", "e8m0fnu"])
def test_square_roots_are_those_of_gmp(name, rounding):
    """For every positive value of the format: its root to 200 bits by GMP, and a little more if that is inexact."""
    for a in (v for v in finite_values(name) if v > 0):
        below = Fraction(int(gmpy2.isqrt(gmpy2.mpz(int(a * 4**200)))), 2**200)
        exact = below if below**2 == a else below + Fraction(1, 2**201)
        assert sqrt(a, name, rounding) == round(exact, name, rounding), a


# -- special operands --------------------------------------------------------------------------------------------------

ZERO, ONE = Fraction(0), Fraction(1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_sign_of_a_zero_sum(rounding):
    """Clause 6.3."""
    zero = NEGATIVE_ZERO if rounding == "down" else ZERO
    assert add(1, -1, "fp16", rounding) == sub(1, 1, "fp16", rounding) == zero
    assert add(0, NEGATIVE_ZERO, "fp16", rounding) == add(NEGATIVE_ZERO, 0, "fp16", rounding) == zero
    assert sub(0, 0, "fp16", rounding) == sub(NEGATIVE_ZERO, NEGATIVE_ZERO, "fp16", rounding) == zero
    assert add(0, 0, "fp16", rounding) == sub(0, NEGATIVE_ZERO, "fp16", rounding) == ZERO
    assert add(NEGATIVE_ZERO, NEGATIVE_ZERO, "fp16", rounding) == NEGATIVE_ZERO
    assert sub(NEGATIVE_ZERO, 0, "fp16", rounding) == NEGATIVE_ZERO
    assert fma(2, 3, -6, "fp16", rounding) == fma(-0.0, 3, 0, "fp16", rounding) == zero
    assert fma(-0.0, 3, -0.0, "fp16", rounding) == NEGATIVE_ZERO
    assert add(1, -1, "e4m3fnuz", rounding) == ZERO, "there is no other"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_sign_of_a_sum_that_underflows_is_that_of_the_exact_one(rounding):
    tiny = Fraction(1, 2**90)
    assert fma(tiny, -1, 0, "fp16", rounding) == round(-tiny, "fp16", rounding)
    assert add(tiny, -2 * tiny, "fp16", "nearest_even") == NEGATIVE_ZERO


def test_signs_of_products_and_quotients():
    for a, b, negative in ((1, -0.0, True), (-1, 0.0, True), (-1, -0.0, False), (0.0, 0.0, False)):
        zero = NEGATIVE_ZERO if negative else ZERO
        assert mul(a, b, "fp16") == mul(b, a, "fp16") == zero
    assert div(-0.0, 5, "fp16") == div(0, -5, "fp16") == div(5, NEGATIVE_INFINITY, "fp16") == NEGATIVE_ZERO
    assert div(5, -0.0, "fp16") == div(-5, 0, "fp16") == div(NEGATIVE_INFINITY, 3, "fp16") == NEGATIVE_INFINITY
    assert div(INFINITY, -0.0, "fp16") == mul(INFINITY, -2, "fp16") == NEGATIVE_INFINITY


INVALID = [
    (add, INFINITY, NEGATIVE_INFINITY),
    (sub, INFINITY, INFINITY),
    (mul, 0, INFINITY),
    (mul, NEGATIVE_INFINITY, -0.0),
    (div, 0, -0.0),
    (div, INFINITY, NEGATIVE_INFINITY),
    (fma, 0, INFINITY, 1),
    (fma, INFINITY, 1, NEGATIVE_INFINITY),
    (sqrt, -1),
    (sqrt, NEGATIVE_INFINITY),
    (remainder, INFINITY, 1),
    (remainder, 1, -0.0),
]


@pytest.mark.parametrize(("operation", "operands"), [(case[0], case[1:]) for case in INVALID])
def test_invalid_operations_give_nan_or_what_stands_for_it(operation, operands):
    """Clause 7.2. The six-bit and four-bit formats of OCP have no NaN: the largest value stands for it."""
    assert operation(*operands, "fp16") is NAN
    assert operation(*operands, "e4m3fn") is NAN
    assert operation(*operands, "e2m1fn") == 6


@pytest.mark.parametrize("operation", [add, sub, mul, div, remainder])
def test_nan_stays_nan(operation):
    for other in (0, -0.0, 1, INFINITY, NAN):
        assert operation(NAN, other, "fp16") is NAN and operation(other, NAN, "fp16") is NAN
        assert fma(NAN, other, 1, "fp16") is NAN and fma(0, INFINITY, NAN, "fp16") is NAN
    assert sqrt(NAN, "fp16") is NAN and convert(NAN, "fp16") is NAN


def test_other_special_operands():
    assert sqrt(NEGATIVE_ZERO, "fp16") is NEGATIVE_ZERO and sqrt(0, "fp16") == 0 and sqrt(INFINITY, "fp16") is INFINITY
    assert remainder(3, INFINITY, "fp16") == 3 and remainder(-0.0, NEGATIVE_INFINITY, "fp16") is NEGATIVE_ZERO
    assert add(INFINITY, 1, "fp16") is INFINITY and add(1, NEGATIVE_INFINITY, "fp16") is NEGATIVE_INFINITY
    assert fma(1, 2, NEGATIVE_INFINITY, "fp16") is NEGATIVE_INFINITY
    assert div(1, 0, "e4m3fn") == 448 and div(1, 0, "e4m3fn", overflow="ovf_inf") is NAN


def test_a_result_is_rounded_once():
    """Boldo and Melquiond's example of what a fused multiply-add must not do, for e4m3: two roundings lose the rest."""
    assert fma(1.125, 1.125, -1.25, "e4m3fn") == Fraction(1, 64)
    assert add(mul(1.125, 1.125, "e4m3fn"), -1.25, "e4m3fn") == 0


def test_convert_is_round():
    for x in (0.1, -0.0, 1e9, INFINITY, NAN, Fraction(1, 3)):
        for rounding in ROUNDINGS:
            assert convert(x, "e4m3fn", rounding, "ovf_inf") == round(x, "e4m3fn", rounding, "ovf_inf")


def test_errors_name_what_is_wrong():
    with pytest.raises(TypeError, match="'1'"):
        add("1", 1, "fp16")
    with pytest.raises(ValueError, match="unknown format 'fp17'"):
        mul(1, 1, "fp17")
    with pytest.raises(ValueError, match="unknown rounding 'nearest'"):
        div(1, 1, "fp16", "nearest")
    with pytest.raises(ValueError, match="use overflow='sat_finite'"):
        sqrt(1, "e2m1fn", overflow="ovf_inf")
