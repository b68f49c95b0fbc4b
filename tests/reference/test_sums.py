"""Sums and inner products: every order written out in the arithmetic of numpy, and known error bounds."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim.formats import ROUNDINGS
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    add,
    as_value,
    convert,
    decode,
    dot,
    fma,
    mul,
    round,
    sub,
    sum,
)

ORDERS = ("sequential", "pairwise", "kahan", ("blocked", 3), ("interleaved", 4), ("chunked", 3))
fp32s = st.floats(-1e6, 1e6, width=32)
few = settings(max_examples=60)


# -- exact sums --------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.lists(st.floats(-1e300, 1e300)))
def test_an_exact_sum_is_that_of_fsum(numbers):
    """fsum of Python is correctly rounded to float64, but its zero is always +0."""
    expected = as_value(math.fsum(numbers))
    got = sum(numbers, "fp64")
    assert got == expected or (got is NEGATIVE_ZERO and expected == 0 and set(map(str, numbers)) == {"-0.0"})


@few
@given(st.lists(st.integers(0, 255).map(lambda code: decode(code, "e5m2")), max_size=4), st.sampled_from(ROUNDINGS))
def test_an_exact_sum_does_not_depend_on_the_order(values, rounding):
    """With infinities, NaN and both zeros among the values."""
    assert len({sum(order, "e5m2", rounding) for order in permutations(values)}) == 1
    assert {sum(values, "e5m2", rounding, order=order) for order in ORDERS} == {sum(values, "e5m2", rounding)}


@few
@given(st.lists(st.tuples(fp32s, fp32s)), st.sampled_from(ROUNDINGS))
def test_an_exact_inner_product_is_one_rounding(pairs, rounding):
    exact = Fraction(0)
    for x, y in pairs:
        exact += Fraction(x) * Fraction(y)
    if exact:
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        assert dot(xs, ys, "e4m3fn", rounding) == round(exact, "e4m3fn", rounding)


def test_zeros_and_specials():
    for rounding in ROUNDINGS:
        for accumulator in (None, "fp16"):
            options = {"rounding": rounding, "accumulator": accumulator}
            assert sum([], "fp16", **options) == 0
            assert sum([-0.0, -0.0], "fp16", **options) is NEGATIVE_ZERO
            assert sum([0, 0], "fp16", **options) == 0
            mixed = NEGATIVE_ZERO if rounding == "down" else 0
            assert sum([0.0, -0.0], "fp16", **options) == sum([1, -1], "fp16", **options) == mixed
            assert sum([1, INFINITY, 2], "fp16", **options) is INFINITY
            assert sum([INFINITY, NEGATIVE_INFINITY, 2], "fp16", **options) is NAN
    assert dot([0, 1], [INFINITY, 1], "fp16") is NAN
    assert dot([-1], [0], "fp16") is NEGATIVE_ZERO


def test_an_exact_sum_ignores_overflow_on_the_way():
    assert sum([65504, 65504, -65504], "fp16") == 65504
    assert sum([65504, 65504, -65504], "fp16", accumulator="fp16") is INFINITY
    assert sum([448, 448, -448], "e4m3fn", accumulator="e4m3fn") == 0, "it saturated"


# -- every order, in numpy's arithmetic --------------------------------------------------------------------------------


def sequential(terms):
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def pairwise(terms):
    if len(terms) == 1:
        return terms[0]
    pairs = [terms[i] + terms[i + 1] if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return pairwise(pairs)


def kahan(terms):
    total, compensation = terms[0], type(terms[0])(0)
    for term in terms[1:]:
        corrected = term - compensation
        longer = total + corrected
        compensation = (longer - total) - corrected
        total = longer
    return total


IN_NUMPY = {
    "sequential": sequential,
    "pairwise": pairwise,
    "kahan": kahan,
    ("blocked", 3): lambda terms: sequential([sequential(terms[i : i + 3]) for i in range(0, len(terms), 3)]),
    ("interleaved", 4): lambda terms: sequential([sequential(terms[i::4]) for i in range(min(4, len(terms)))]),
}


@pytest.mark.parametrize("order", IN_NUMPY, ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
@few
@given(st.data())
def test_every_order_is_what_it_says(name, dtype, order, data):
    numbers = data.draw(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=20))
    expected = IN_NUMPY[order]([dtype(x) for x in numbers])
    assert sum(numbers, name, accumulator=name, order=order) == as_value(float(expected))


@few
@given(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=20))
def test_sequential_sums_are_those_of_accumulate(numbers):
    expected = np.add.accumulate(np.array(numbers, np.float16))[-1]
    assert sum(numbers, "fp16", accumulator="fp16") == as_value(float(expected))


@few
@given(st.lists(fp32s, min_size=1, max_size=12), st.integers(1, 5), st.sampled_from(ROUNDINGS))
def test_chunks_are_exact_inside(numbers, length, rounding):
    chunks = [sum(numbers[i : i + length], "fp64", rounding) for i in range(0, len(numbers), length)]  # exact there
    total = convert(chunks[0], "e4m3", rounding)
    for chunk in chunks[1:]:
        total = add(total, chunk, "e4m3", rounding)
    assert sum(numbers, "e4m3", rounding, accumulator="e4m3", order=("chunked", length)) == total


@few
@given(st.lists(fp32s, min_size=1, max_size=12), st.sampled_from(ROUNDINGS))
def test_one_block_and_one_lane_and_chunks_of_one_are_sequential(numbers, rounding):
    expected = sum(numbers, "fp16", rounding, accumulator="e5m4")
    for order in (("blocked", 99), ("interleaved", 1), ("chunked", 1)):
        assert sum(numbers, "fp16", rounding, accumulator="e5m4", order=order) == expected
    once = sum(numbers, "e5m4", rounding)
    assert sum(numbers, "e5m4", rounding, accumulator="e5m4", order=("chunked", 99)) == once


# -- inner products ----------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.tuples(fp32s, fp32s), min_size=1, max_size=8), st.sampled_from(ROUNDINGS))
def test_exact_products_in_sequence_are_a_chain_of_fused_multiply_adds(pairs, rounding):
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    total = mul(xs[0], ys[0], "fp16", rounding)
    for x, y in pairs[1:]:
        total = fma(x, y, total, "fp16", rounding)
    assert dot(xs, ys, "fp16", rounding, accumulator="fp16") == total


@few
@given(st.lists(st.tuples(fp32s, fp32s), min_size=1, max_size=8), st.sampled_from(ORDERS))
def test_rounded_products_are_summed_as_numbers(pairs, order):
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    products = [mul(x, y, "bf16") for x, y in pairs]
    options = {"accumulator": "fp32", "order": order}
    assert dot(xs, ys, "fp16", product="bf16", **options) == sum(products, "fp16", **options)


def test_a_mixed_precision_inner_product_step_by_step():
    """FP8 operands, products in fp16, an accumulator of bf16, and a result in e4m3fn."""
    xs = [decode(code, "e4m3fn") for code in (0x3A, 0x41, 0xB7, 0x50)]
    ys = [decode(code, "e5m2") for code in (0x3D, 0x47, 0x3B, 0xC1)]
    total = convert(mul(xs[0], ys[0], "fp16"), "bf16")
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total = add(total, mul(x, y, "fp16"), "bf16")
    assert dot(xs, ys, "e4m3fn", product="fp16", accumulator="bf16") == convert(total, "e4m3fn")


# -- errors of summation -----------------------------------------------------------------------------------------------


def test_stagnation_and_how_the_orders_escape_it():
    """4096 ones and more: a sequential sum in fp16 stops at 2048, where 1 is half an ulp."""
    ones = [1] * 4096
    assert sum(ones, "fp16", accumulator="fp16") == 2048
    for order in ("pairwise", "kahan", ("blocked", 64), ("interleaved", 64), ("chunked", 16)):
        assert sum(ones, "fp16", accumulator="fp16", order=order) == 4096


@few
@given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_error_bounds(codes):
    """To first order in u, for positive terms: (n - 1) u sequential, log2(n) u pairwise, about 2 u with Kahan's method.

    N. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), sections 4.2 and 4.3.
    """
    terms = [Fraction(decode(code, "e4m3fn:unsigned")) for code in codes if code < 0x7F]
    exact = Fraction(0)
    for term in terms:
        exact += term
    u, n = Fraction(1, 2**11), max(len(terms), 1)
    for order, steps in (("sequential", n - 1), ("pairwise", (n - 1).bit_length()), ("kahan", 3)):
        got = sum(terms, "fp64", accumulator="e8m10", order=order)
        assert abs(got - exact) <= ((1 + u) ** steps - 1) * exact + n * u**2 * exact


def test_kahan_by_hand():
    """In e4m3: 16 + 0.75 is 16, a remainder of 0.75 is kept, and the next 0.75 makes it 18 (17.5 exactly)."""
    terms = [16, 0.75, 0.75]
    assert sum(terms, "e4m3", accumulator="e4m3") == 16
    assert add(16, 0.75, "e4m3") == 16 and sub(0.75, -0.75, "e4m3") == 1.5
    assert sum(terms, "e4m3", accumulator="e4m3", order="kahan") == 18


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", ("blocked", 0), ("pairwise", 2), "blocked", ("chunked", 1.5), None])
def test_unknown_orders(order):
    with pytest.raises(ValueError, match="sequential, pairwise, kahan, or a pair"):
        sum([1], "fp16", order=order)


def test_other_errors():
    with pytest.raises(ValueError, match="got 2 and 1 numbers"):
        dot([1, 2], [1], "fp16")
    with pytest.raises(ValueError, match="unknown format 'fp15'"):
        sum([1], "fp16", accumulator="fp15")
    with pytest.raises(TypeError, match="'x'"):
        sum(["x"], "fp16")
