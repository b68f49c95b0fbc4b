"""Theorems about floating-point arithmetic, over all operands of small formats and random ones of larger formats.

They hold for correctly rounded operations, and fail for almost any other.
"""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import ROUNDINGS, FloatFormat, parse_format
from fpsim.reference import (
    INFINITY,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Flags,
    add,
    decode,
    div,
    fma,
    is_finite,
    mul,
    next_up,
    round,
    sqrt,
    sub,
    ulp,
    with_flags,
)
from fpsim.reference.values import rational
from tests.shared.formats import finite_values, operand_count

some = settings(max_examples=150)


@st.composite
def values_of(draw, fmt: str | FloatFormat) -> Fraction:
    """A finite value, of any magnitude or near 1, so that two values often have similar magnitudes."""
    fmt = parse_format(fmt)
    middling = (
        st.integers(-3, 3).map(lambda field: fmt.bias + field << fmt.mantissa_bits) if fmt.bias > 3 else st.just(0)
    )
    any_code = st.integers(0, fmt.max_code)
    mantissa = st.integers(0, (1 << fmt.mantissa_bits) - 1)
    code = draw(any_code | st.builds(lambda base, low: min(base + low, fmt.max_code), middling, mantissa))
    return Fraction(decode(code, fmt)) * draw(st.sampled_from((1, -1)))


# -- double rounding ---------------------------------------------------------------------------------------------------

#: S. Figueroa, "When is double rounding innocuous?", ACM SIGNUM Newsletter 30 (1995): bits beyond 2 p of the wider
#: format at which rounding to it first, to nearest, does no harm.
BITS_BEYOND_TWICE = {"add": 1, "sub": 1, "mul": 0, "div": 0, "sqrt": 2}


def twice_rounded(operation: str, narrow: FloatFormat, bits: int) -> list:
    """The operands for which rounding first to ``bits`` bits, with a larger range, changes the result."""
    wide, run = FloatFormat(8, bits - 1), getattr(reference, operation)
    values = [v for v in finite_values(narrow.name) if v > 0]
    operands = product(values, repeat=operand_count(operation))
    return [xs for xs in operands if round(run(*xs, wide), narrow) != run(*xs, narrow)]


@pytest.mark.parametrize(("precision", "exponent_bits"), [(2, 4), (4, 3)])
@pytest.mark.parametrize("operation", BITS_BEYOND_TWICE)
def test_double_rounding_is_innocuous_from_figueroas_bound_on_and_not_before(operation, precision, exponent_bits):
    narrow = FloatFormat(exponent_bits, precision - 1)
    enough = 2 * precision + BITS_BEYOND_TWICE[operation]
    for bits in (enough, 2 * precision + 3):
        assert not twice_rounded(operation, narrow, bits)
    assert twice_rounded(operation, narrow, enough - 1)


@some
@given(st.data(), st.sampled_from(list(BITS_BEYOND_TWICE)))
def test_float32_arithmetic_serves_every_format_of_up_to_eleven_bits(data, operation):
    """So fp16 and fp8 may be computed in float32 and then rounded, subnormals included."""
    narrow = FloatFormat(data.draw(st.integers(2, 6)), data.draw(st.integers(0, 10)))
    operands = [data.draw(values_of(narrow)) for _ in range(operand_count(operation))]
    run = getattr(reference, operation)
    assert round(run(*operands, "fp32"), narrow) == run(*operands, narrow)


def test_a_fused_multiply_add_is_not_among_them():
    """The exact result is 2**-31 below a tie of fp16. float32 has too few bits for that, and the tie rounds up."""
    a, b, c = Fraction(1025, 2**15), Fraction(1023, 2**16), 1 + Fraction(1, 2**10)
    assert a * b + c == c + Fraction(1, 2**11) - Fraction(1, 2**31)
    assert fma(a, b, c, "fp16") == c
    assert round(fma(a, b, c, "fp32"), "fp16") == 1 + Fraction(1, 2**9)


def test_subnormals_of_the_wider_format_break_it():
    """19 bits are enough for the 8 of bf16, but this product is subnormal in e5m18, and has fewer there."""
    a, b = Fraction(129, 2**19), Fraction(193, 2**19)
    assert parse_format("e5m18").precision >= 2 * parse_format("bf16").precision + 2
    assert mul(a, b, "bf16") == Fraction(195, 2**31)
    assert round(mul(a, b, "e5m18"), "bf16") == Fraction(97, 2**30)
    assert round(mul(a, b, "e8m18"), "bf16") == Fraction(195, 2**31)


@some
@given(st.data(), st.sampled_from(("add", "sub", "mul", "div", "sqrt", "fma")), st.sampled_from(ROUNDINGS))
def test_rounding_to_odd_first_is_innocuous_for_every_operation(data, operation, rounding):
    """With two bits more and enough range: Boldo and Melquiond 2008, theorem 1; also for fused multiply-add."""
    narrow = FloatFormat(data.draw(st.integers(2, 5)), data.draw(st.integers(0, 8)))
    wide = FloatFormat(9, narrow.mantissa_bits + 2)
    operands = [
        data.draw(values_of(data.draw(st.sampled_from((narrow, "fp16"))))) for _ in range(operand_count(operation))
    ]
    run = getattr(reference, operation)
    directly = run(*operands, narrow, rounding)
    if directly not in (0, NEGATIVE_ZERO):  # the sign of an exact zero is the direction's
        assert round(run(*operands, wide, "to_odd"), narrow, rounding) == directly


# -- exact operations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e3m2", "e4m3fn", "e2m1fn", "e3m0fn"])
def test_sterbenz(name):
    """P. Sterbenz, "Floating-Point Computation" (1974): if y/2 <= x <= 2 y, then x - y is exact, in every direction."""
    values = [v for v in finite_values(name) if v > 0]
    for x, y in product(values, repeat=2):
        if y / 2 <= x <= 2 * y:
            result = with_flags(sub, x, y, format=name, rounding="to_odd")
            assert (result.value, result.flags) == (x - y, Flags.NONE), (x, y)


def test_sterbenz_needs_subnormals():
    smallest = Fraction(1, 4)
    x, y = smallest * Fraction(5, 4), smallest
    assert sub(x, y, "e3m2") == smallest / 4
    assert with_flags(sub, x, y, format="e3m2:nosubnormals").value == 0


@pytest.mark.parametrize("name", ["e3m2", "e3m1", "e2m3"])
def test_sums_and_differences_never_underflow(name):
    """J. Hauser, "Handling floating-point exceptions in numeric programs" (1996): a subnormal sum is exact."""
    for x, y in product(finite_values(name), repeat=2):
        for rounding in ("nearest_even", "up"):
            assert Flags.UNDERFLOW not in with_flags(add, x, y, format=name, rounding=rounding, tininess="before").flags


def two_sum(a, b, fmt):
    """O. Møller 1965, D. Knuth 1969: the rounded sum and its error, in six operations."""
    total = add(a, b, fmt)
    b_part = sub(total, a, fmt)
    a_part = sub(total, b_part, fmt)
    return total, add(sub(a, a_part, fmt), sub(b, b_part, fmt), fmt)


def fast_two_sum(a, b, fmt):
    """T. Dekker 1971: the same in three operations, if ``a`` is not smaller than ``b``."""
    total = add(a, b, fmt)
    return total, sub(b, sub(total, a, fmt), fmt)


@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e4m1"])
def test_two_sum_is_exact_for_all_pairs(name):
    for a, b in product(finite_values(name), repeat=2):
        total, error = two_sum(a, b, name)
        if is_finite(total) and is_finite(sub(total, a, name)):
            assert rational(total) + rational(error) == a + b, (a, b)
            if abs(a) >= abs(b):
                assert fast_two_sum(a, b, name)[0] == total
                assert rational(fast_two_sum(a, b, name)[1]) == rational(error)


@some
@given(st.data(), st.sampled_from(("fp16", "bf16", "fp32", "e5m2", "e4m3")))
def test_two_sum_is_exact(data, name):
    a, b = data.draw(values_of(name)), data.draw(values_of(name))
    total, error = two_sum(a, b, name)
    assume(is_finite(total) and is_finite(error))
    assert rational(total) + rational(error) == a + b


@some
@given(st.data(), st.sampled_from(("fp16", "bf16", "fp32", "e5m2", "e4m3")))
def test_the_error_of_a_product_is_a_fused_multiply_add(data, name):
    """Exact unless it falls below the smallest subnormal."""
    fmt = parse_format(name)
    a, b = data.draw(values_of(name)), data.draw(values_of(name))
    product_ = mul(a, b, name)
    assume(is_finite(product_) and abs(a * b) >= Fraction(2) ** (fmt.emin + fmt.precision))
    error = with_flags(fma, a, b, -product_, format=name)
    assert Flags.INEXACT not in error.flags
    assert product_ + rational(error.value) == a * b


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3fn"])
def test_the_root_of_a_square_is_the_number(name):
    """In radix 2, to nearest, barring overflow and underflow. S. Boldo, "Stupid is as stupid does" (2015)."""
    fmt = parse_format(name)
    for x in finite_values(name):
        square = mul(x, x, name)
        if is_finite(square) and Fraction(fmt.smallest_normal) <= x * x <= fmt.max:
            assert sqrt(square, name) == abs(x)


def test_a_quotient_times_its_divisor_may_miss_but_x_by_x_is_one():
    values = [v for v in finite_values("e4m3fn") if v]
    for x in values:
        assert div(x, x, "e4m3fn", "up") == 1
    missed = [(x, y) for x, y in product(values[:40], values[60:90]) if mul(div(x, y, "fp16"), y, "fp16") != x]
    assert missed


# -- laws of every operation -------------------------------------------------------------------------------------------


@some
@given(st.data(), st.sampled_from(("fp16", "e4m3fn", "e5m2:nosubnormals")), st.sampled_from(ROUNDINGS))
def test_laws(data, name, rounding):
    """Operations are commutative, symmetric under change of signs and direction, and have exact neutral elements."""
    a, b, c = (data.draw(values_of(name)) for _ in range(3))
    assert add(a, b, name, rounding) == add(b, a, name, rounding)
    assert mul(a, b, name, rounding) == mul(b, a, name, rounding)
    assert fma(a, b, c, name, rounding) == fma(b, a, c, name, rounding)
    assert add(a, b, name, rounding) == sub(a, -b if b else NEGATIVE_ZERO, name, rounding)
    mirrored = {"up": "down", "down": "up"}.get(rounding, rounding)
    left, right = mul(-a, b, name, mirrored), mul(a, b, name, rounding)
    assert number_or_infinity(left) == -number_or_infinity(right)
    zero = 0 if rounding == "down" else NEGATIVE_ZERO
    for x in (a, NEGATIVE_ZERO):
        assert mul(x, 1, name, rounding) == div(x, 1, name, rounding) == fma(x, 1, zero, name, rounding) == x
        assert add(x, zero, name, rounding) == x


def number_or_infinity(value) -> Fraction | float:
    return {INFINITY: float("inf"), NEGATIVE_INFINITY: -float("inf")}.get(value) or rational(value)


@some
@given(st.data(), st.sampled_from(("fp16", "bf16", "e4m3fn")), st.sampled_from(("add", "mul", "div", "sqrt")))
def test_a_directed_result_brackets_the_exact_one_within_an_ulp(data, name, operation):
    operands = [abs(data.draw(values_of(name))) for _ in range(operand_count(operation))]
    assume(operands[-1] != 0)
    run = getattr(reference, operation)
    below, above, to_nearest = (run(*operands, name, way) for way in ("down", "up", "nearest_even"))
    assume(all(map(is_finite, (below, above, to_nearest))) and rational(above) < parse_format(name).max)
    exactly = with_flags(run, *operands, format=name).flags == Flags.NONE
    assert rational(above) == rational(below) if exactly else above == next_up(below, name)
    assert to_nearest in (below, above)
    assert rational(above) - rational(below) <= ulp(rational(above), name)
