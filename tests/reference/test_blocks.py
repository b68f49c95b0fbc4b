"""Blocks whose elements share a scale: decoded values at every edge, the bugs of peers, and where blocks lie."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    as_value,
    block_indices,
    block_scale,
    decode,
    parse_cast,
    quantize_block,
    round,
    round_block,
    round_blocks,
)

RULES = ("floor", "ceil", "rceil", "even")
MX = ("mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "msfp12", "msfp16", "bfp16")
RATIO = ("int8/row", "int8:full/row", "int4/tensor:bf16", "e4m3fn/block:8", "e5m2/column:bf16", "nf4", "fp4_bnb")


def fp32(bits: int):
    return decode(bits, "fp32")


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


# -- OCP MX: edges ----------------------------------------------------------------------------------------------------

#: The bits of the largest magnitude in a block of e4m3fn: its element and its decoded value under floor and rceil.
EDGES = {
    0x00000000: (0, 0, 0, 0),
    0x00000001: (0, 0, 0, 0),  # 2**-149 * 2**127 = 2**-22, below half of 2**-9
    0x00400000: (1, power(-127), 1, power(-127)),
    0x007FFFFF: (2, power(-126), 2, power(-126)),
    0x00800000: (2, power(-126), 2, power(-126)),
    0x047FFFFF: (448, 448 * power(-127), 256, power(-118)),
    0x40FFFFFF: (448, 7, 256, 8),
    0x43E00000: (448, 448, 448, 448),
    0x43E00001: (448, 448, 224, 448),
    0x7F7FFFFF: (448, Fraction(7, 4) * power(127), 256, power(128)),
    0x7F800000: (NAN, NAN, NAN, NAN),
    0x7FC00000: (NAN, NAN, NAN, NAN),
}


@pytest.mark.parametrize("bits", EDGES, ids=hex)
def test_elements_and_values_are_right_at_every_edge(bits):
    for rule, (element, value) in zip(("floor", "rceil"), (EDGES[bits][:2], EDGES[bits][2:]), strict=True):
        block = quantize_block([fp32(bits), 0], "e4m3fn", f"mx:32:{rule}")
        second = NAN if element is NAN else Fraction(0)
        assert block.elements == (element, second)
        assert block.decoded() == (value, second) == round_block([fp32(bits), 0], "e4m3fn", f"mx:32:{rule}")


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2fn", "e2m3fn", "e2m1fn", "mxint8"])
@pytest.mark.parametrize("rule", RULES)
def test_a_nan_or_an_infinity_makes_the_whole_block_nan(name, rule):
    """Also where the element format has no NaN. For MXFP4, gfloat refuses NaN and gives 1e39 for infinity."""
    for special in (NAN, INFINITY, NEGATIVE_INFINITY):
        assert round_block([special, 1, NEGATIVE_ZERO], name, f"mx:32:{rule}") == (NAN, NAN, NAN)


def test_zeros_and_underflows_keep_their_sign_in_formats_with_negative_zero():
    for name in ("mxfp8", "mxfp4", "msfp12"):
        assert round_blocks([0, NEGATIVE_ZERO], name, (2,)) == (0, NEGATIVE_ZERO)
        assert round_blocks([1, -power(-40), power(-40)], name, (3,))[1:] == (NEGATIVE_ZERO, 0)
    for name in ("mxint8", "bfp16", "int8", "nf4"):
        assert round_blocks([1, NEGATIVE_ZERO, -power(-40)], name, (3,))[1:] == (0, 0)


def test_the_smallest_quanta_are_exact_and_beyond_bfloat16():
    """2**-136 under e4m3fn, 2**-143 under e5m2. bfloat16 has 2**-133: a tensor of it holds the value rounded once."""
    assert round_block([power(-136)], "e4m3fn", "mx") == (power(-136),)
    assert round_block([power(-143)], "e5m2", "mx") == (power(-143),)
    assert round(power(-136), "bf16") == 0 and round(5 * power(-136), "bf16") == power(-133)


def test_the_shared_exponent_of_mxint8_is_that_of_the_largest_element():
    """OCP MX 1.0: n/64. From 127.5/64 to 2 the element 128 saturates. mase#321 took the next exponent."""
    block = quantize_block(
        [Fraction(3, 2), Fraction(1, 64), Fraction(1, 128), Fraction(3, 128)], "mxint8", "mx:32:floor"
    )
    assert block.scale == 1 and block.elements == (Fraction(96, 64), Fraction(1, 64), 0, Fraction(2, 64))
    for x in (Fraction(127, 64), fp32(0x3FFF0000), fp32(0x3FFFFFFF)):
        assert round_block([x, -x], "mxint8", "mx:32:floor") == (Fraction(127, 64), Fraction(-127, 64))
    assert round_block([4, Fraction(-1, 33)], "mxint8", "mx:32:floor") == (4, 0)


def test_a_block_of_microsoft_floating_point_is_sign_and_magnitude():
    """MSFP12 has 3-bit magnitudes n/4 under a power of two, MSFP16 7-bit magnitudes n/64."""
    assert round_block([1, Fraction(3, 8), Fraction(1, 8), Fraction(-15, 8)], "e1m2finite:bias=1", "mx:16:floor") == (
        1, Fraction(1, 2), 0, Fraction(-7, 4),
    )  # fmt: skip
    assert parse_cast("msfp12").scale.size == parse_cast("msfp16").scale.size == (16,)
    assert parse_cast("bfp16").scale.size == (8,)


# -- OCP MX: golden values and bugs of peers --------------------------------------------------------------------------


def test_957_becomes_896_or_960():
    """microxcaling#4 asks why: floor has the scale 2 and clips 478.5 to 448; rceil has the scale 4."""
    assert round_block([957], "e4m3fn", "mx:32:floor") == (896,)
    assert round_block([957], "e4m3fn", "mx:32:rceil") == (960,)


def test_the_ties_of_e2m1_go_to_even():
    """aiter#3992 and #2247 rounded them away from zero, DeepGEMM's reference toward zero."""
    values = [6, *map(Fraction, ("0.25", "0.75", "1.25", "1.75", "2.5", "3.5", "5"))]
    assert round_block(values, "e2m1fn", "mx:32:floor") == (6, 0, 1, 1, 2, 2, 4, 4)
    assert round_block([-x for x in values], "e2m1fn", "mx")[1:] == (NEGATIVE_ZERO, -1, -1, -2, -2, -4, -4)


def test_a_number_just_above_a_tie_rounds_up():
    """tt-metal#51971 flushed 0x3e800002, just above 1/4, to zero."""
    assert round_block([4, fp32(0x3E800002)], "e2m1fn", "mx:32:floor") == (4, Fraction(1, 2))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2fn", "e2m3fn", "e2m1fn"])
def test_every_value_of_the_element_format_keeps_its_value_under_every_scale(name):
    """132 of the 256 codes of e4m3 did not in tt-metal#51971."""
    fmt = parse_cast(f"{name}/mx").element
    values = [decode(code, fmt) for code in range(1 << fmt.bits)]
    finite = [value for value in values if value is not NAN and value not in (INFINITY, NEGATIVE_INFINITY)]
    for exponent in (-100, 0, 100):
        scaled = [value if value is NEGATIVE_ZERO else value * power(exponent) for value in finite]
        for rule in ("floor", "rceil"):
            assert round_block(scaled, fmt, f"mx:32:{rule}") == tuple(scaled)


@pytest.mark.parametrize(
    ("rule", "bits", "element"),
    [
        ("floor", 0x00400000, 1),
        ("ceil", 0x00400000, 1),
        ("even", 0x00400000, 1),
        ("rceil", 0x007FFFFF, 2),
        ("rceil", 0x00800000, 2),
    ],
)
def test_the_scale_2_to_the_minus_127_divides_the_elements(rule, bits, element):
    """torchao 0.18.0 divided by 2**-126 under floor, ceil and even, and by 1 under rceil."""
    assert quantize_block([fp32(bits)], "e4m3fn", f"mx:32:{rule}").elements == (element,)


def test_an_infinity_does_not_leave_the_others_under_a_finite_scale():
    """torchao 0.18.0 gave the code 247 and the elements 448 and 0."""
    assert quantize_block([INFINITY, 1], "e4m3fn", "mx:32:floor").scale is NAN


def test_a_block_of_tiny_bfloat16_numbers_does_not_saturate():
    """FlashInfer#2440: at a largest magnitude of 2.8e-36 the scale underflowed. Every element became 448 or NaN."""
    tiny = round(Fraction(28, 10**37), "bf16")
    block = quantize_block([tiny, tiny / 2], "e4m3fn", "mx")
    assert block.scale == block_scale([tiny], "e4m3fn", "rceil") == power(-126)
    assert block.elements == (240, 120) and block.decoded() == (240 * power(-126), 120 * power(-126))


def test_elements_are_divided_by_the_scale_that_is_stored():
    """kekzl/imp#250 divided by the exact amax / 6: up to a factor of 2 from the power of two that it stored."""
    assert round_block([5, Fraction(5, 2)], "e2m1fn", "mx:32:rceil") == (4, 2)
    assert round_block([7, Fraction(7, 2)], "e2m1fn", "mx:32:rceil") == (8, 4)


def test_a_scale_that_is_no_power_of_two_is_rounded_before_it_becomes_a_code():
    """sglang#25733: mantissa bits of a scale leaked into the next code. Every mx scale is a power of two."""
    random = Random(3)
    for _ in range(100):
        scale = block_scale([random.uniform(0, 1e6)], "e4m3fn", random.choice(RULES))
        assert scale.numerator & (scale.numerator - 1) == 0 == scale.denominator & (scale.denominator - 1)


# -- ratios -----------------------------------------------------------------------------------------------------------


def test_int8_has_a_restricted_and_a_full_range():
    """A largest magnitude of 127 has the scale 1, or 127/127.5 in float32 (compressed-tensors, distiller#463)."""
    restricted = quantize_block([127, -127, Fraction(5, 2)], "int8", "row")
    assert restricted.scale == 1 and restricted.elements == (127, -127, 2)
    full = quantize_block([127, -127, 1], "int8:full", "row")
    assert full.scale == round(Fraction(127 * 2, 255), "fp32") and full.elements == (127, -128, 1)


def test_a_zero_block_has_the_scale_1():
    """TE, SLIME and others divided zero by zero (kernels-community#681); TE's kernel and its reference disagree."""
    for name in ("int8", "e4m3fn", "nf4"):
        block = quantize_block([0, NEGATIVE_ZERO], name, "tensor")
        assert block.scale == 1 and block.decoded() == (0, NEGATIVE_ZERO if name == "e4m3fn" else 0)


def test_a_small_block_uses_the_whole_format():
    """With DeepSeek's floor of 1e-4 under amax, a block of amax 1e-6 would use a hundredth of it."""
    amax = round(Fraction(1, 10**6), "fp32")
    block = quantize_block([amax, amax / 3], "e4m3fn", "block:128")
    assert block.scale == round(amax / 448, "fp32") and block.elements == (448, 144)


def test_no_ratio_is_below_2_to_the_minus_100():
    block = quantize_block([448 * power(-100), power(-109), power(-111)], "e4m3fn", "row")
    assert block.scale == power(-100) and block.decoded() == (448 * power(-100), power(-109), 0)
    assert quantize_block([power(-126)], "e4m3fn", "row").scale == power(-100)


@pytest.mark.parametrize("name", ["int8", "e4m3fn/row", "uint8", "nvfp4", "e2m1fn/nv:torchao"])
@pytest.mark.parametrize("rounding", ["nearest_even", "up", "down", "to_odd"])
def test_subnormal_numbers_of_float32_count_as_zeros_under_ratios(name, rounding):
    """So a process that flushes them to zero has the same results. Only directed roundings tell the difference."""
    tiny, cast = power(-126) * (1 - power(-23)), parse_cast(name)
    for values in ([tiny, -tiny], [tiny, -tiny, 448]):
        block = quantize_block(values, cast.element, cast.scale, rounding)
        assert set(block.decoded()[:2]) <= {Fraction(0), NEGATIVE_ZERO}
        assert len(values) == 3 or cast.scale.rule == "torchao" or block.scale in (1, 0)
    huge = quantize_block([power(127), power(-20)], cast.element, cast.scale, "up", working="fp64")
    assert huge.decoded("fp64")[1] == 0  # the quotient is below 2**-126


def test_a_ratio_stays_finite():
    largest = fp32(0x7F7FFFFF)
    assert quantize_block([largest], "nf4", "tensor").decoded() == (largest,)
    assert quantize_block([largest], "nf4", "tensor:bf16").scale == decode(0x7F7F, "bf16")
    assert round_block([power(128)], "int8", "row", working="fp64") == (NAN,)


@pytest.mark.parametrize("name", RATIO)
def test_a_nan_or_an_infinity_makes_the_whole_ratio_block_nan(name):
    for special in (NAN, INFINITY, NEGATIVE_INFINITY):
        assert round_blocks([special, 1, 0], name, (3, 1) if "column" in name else (3,), -1) == (NAN, NAN, NAN)


def test_the_quotient_rounds_to_the_working_format_before_it_rounds_to_the_element():
    """a / 127 is no float32: the second element is a tie only after its quotient has been rounded to float32."""
    d = round(Fraction(100, 127), "fp32")
    x = round(d * Fraction(5, 2), "fp32")
    assert x / d != Fraction(5, 2) and round(x / d, "fp32") == Fraction(5, 2)
    assert quantize_block([100, x], "int8", "row").elements == (127, 2)


def test_scales_in_bfloat16_are_rounded_twice_and_used_as_stored():
    d = round(round(Fraction(100, 127), "fp32"), "bf16")
    block = quantize_block([100, 50], "int8", "row:bf16")
    assert block.scale == d and block.decoded() == tuple(round(n * d, "fp32") for n in (127, 63))


# -- zero points ------------------------------------------------------------------------------------------------------


def test_the_quotient_is_rounded_before_the_zero_point_is_added():
    """ONNX's order: 0.5 + 3 is 3, because 0.5 rounds to 0. Rounding the sum gives 4."""
    block = quantize_block([-3, 12, Fraction(1, 2)], "uint4", "row")
    assert block.scale == 1 and block.zero_point == 3 and block.elements == (0, 15, 3)
    assert block.decoded() == (-3, 12, 0)


def test_the_range_of_an_asymmetric_block_contains_zero():
    block = quantize_block([Fraction(15, 2), 15], "uint4", "row")
    assert block.zero_point == 0 and block.decoded() == (8, 15)
    block = quantize_block([-15, -1], "uint4", "row")
    assert block.zero_point == 15 and block.decoded() == (-15, -1)


def test_an_all_zero_asymmetric_block_is_zero():
    """Scale 0 would give 0/0."""
    for name in ("uint8/row", "int4/group:2:asymmetric"):
        assert round_blocks([0, NEGATIVE_ZERO], name, (2,)) == (0, 0)


def test_short_asymmetric_blocks_take_the_range_of_their_own_elements():
    """1bit-MONSTER#639: padding with zeros widened the range."""
    values = [1, 2, 3, 4, -5, -20]
    assert round_blocks(values, "uint4/group:4", (6,))[4:] == round_block([-5, -20], "uint4", "row")


def test_the_widest_asymmetric_range_stays_finite():
    largest = fp32(0x7F7FFFFF)
    block = quantize_block([largest, -largest, 1], "uint8", "row")
    assert block.scale == largest and block.zero_point == 1 and block.decoded() == (largest, -largest, 0)


def test_onnx_blocks_lie_along_their_axis():
    """OpenVINO#32918: codes 9 in blocks of 2 along axis 1, scale = zero point = 1 to 4. It interleaved them."""
    scales, codes = [1, 2, 3, 4], [9] * 8
    lies = block_indices((2, 4), 1, "block:2")
    decoded = [0] * 8
    for s, indices in zip(scales, lies, strict=True):
        for i in indices:
            decoded[i] = (codes[i] - s) * s
    assert decoded == [8, 8, 14, 14, 18, 18, 20, 20]


# -- NVFP4 ------------------------------------------------------------------------------------------------------------


def test_nvfp4_follows_transformer_engine_step_by_step():
    """Amax 10 in the tensor, 3 in the block, by hand: g = 268.8, s = 134.4 and so 128, r = 2.1."""
    block = quantize_block([3, -1, Fraction(1, 1000)], "e2m1fn", "nv", tensor_amax=10)
    g = round(Fraction(2688, 10), "fp32")
    assert block.tensor_scale == g and block.scale == 128
    r = round(1 / round(128 * round(1 / g, "fp32"), "fp32"), "fp32")
    assert abs(r - g / 128) < power(-22) and block.elements == (6, -2, 0)
    assert block.decoded() == (round(Fraction(6 * 128) / g, "fp32"), round(Fraction(-2 * 128) / g, "fp32"), 0)


def test_the_smallest_scale_of_nvfp4_is_the_smallest_subnormal():
    """pytorch#179111: torchao stops at 2**-6, the smallest normal, where 2**-9 makes both elements exact."""
    x = fp32(0x3C400000)  # 6 * 2**-9
    assert quantize_block([x, x / 2], "e2m1fn", "nv", tensor_amax=2688).scale == power(-9)
    assert round_block([x, x / 2], "e2m1fn", "nv", tensor_amax=2688) == (x, x / 2)
    assert round_block([x, x / 2], "e2m1fn", "nv:torchao", tensor_amax=2688) == (power(-6), power(-7))


def test_a_scale_that_underflows_makes_zeros():
    """compressed-tensors 0.20.0 replaces it by 0.125: 64 times the smallest scale."""
    block = quantize_block([6 * power(-10), -6 * power(-10), 0], "e2m1fn", "nv", tensor_amax=2688)
    assert block.scale == 0 and block.elements == (6, -6, 0) and block.decoded() == (0, NEGATIVE_ZERO, 0)


@pytest.mark.parametrize("name", ["nvfp4", "e2m1fn/nv:torchao", "e2m1fn/nv:16x16"])
def test_an_all_zero_tensor_stays_zero(name):
    """torchao gives a NaN scale, and elements -2."""
    assert round_blocks([0, NEGATIVE_ZERO, 0, 0], name, (2, 2)) == (0, NEGATIVE_ZERO, 0, 0)


def test_a_zero_row_beside_others_stays_zero():
    """FlashInfer#3448: infinity times zero was NaN."""
    assert round_blocks([0] * 16 + [1] * 16, "nvfp4", (2, 16))[:16] == (0,) * 16


def test_a_block_scale_beyond_448_saturates():
    """Model-Optimizer#1397 and #1633: beyond 464 it became NaN (0x7f) before it saturated. It is 448 (0x7e)."""
    block = quantize_block([INFINITY, 1], "e2m1fn", "nv")
    assert block.scale == 448 and block.tensor_scale == 1 and block.decoded() == (2688, 0)
    assert quantize_block([465 * 6], "e2m1fn", "nv", tensor_amax=2688).scale == 448


def test_the_scale_code_1_is_2_to_the_minus_9():
    """b12x#388 decoded the byte 0x01 as 0.0088."""
    assert decode(0x01, "e4m3fn") == power(-9)


def test_a_nan_makes_its_block_nan_and_the_tensor_scale_1():
    values = [NAN] + [1] * 15 + [6] * 16
    for name in ("nvfp4", "e2m1fn/nv:torchao"):
        assert round_blocks(values, name, (32,)) == (NAN,) * 16 + (6,) * 16


def test_tensors_below_2_to_the_minus_100_have_the_scale_of_2_to_the_minus_100():
    """So that no step is subnormal. At 1e-38 the block scales are below 2**-10, and all is zero."""
    block = quantize_block([power(-101)], "e2m1fn", "nv")
    assert block.tensor_scale == 2688 * power(100) and block.decoded() == (power(-101),)
    assert round_block([round(Fraction(1, 10**38), "fp32")], "e2m1fn", "nv") == (0,)


def test_stochastic_elements_of_nvfp4_reach_no_further_than_6():
    for number in (0, 255):
        block = quantize_block([6, Fraction(13, 4)], "e2m1fn", "nv", "stochastic:8", random=[number] * 2)
        assert block.elements[0] == 6 and block.elements[1] in (3, 4)


# -- the tensor's power of two ----------------------------------------------------------------------------------------


def test_power_of_two_is_one_scale_for_the_tensor():
    assert round_blocks([957, 1, Fraction(1, 1000)], "e4m3fn/power_of_two", (3,))[:2] == (960, 1)
    assert round_blocks([1, INFINITY, NAN], "e5m2/power_of_two", (3,)) == (1, INFINITY, NAN)


# -- where blocks lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "scale", "blocks"),
    [
        ((2, 3), -1, "tensor", [(0, 1, 2, 3, 4, 5)]),
        ((2, 3), -1, "row", [(0, 1, 2), (3, 4, 5)]),
        ((2, 3), 0, "row", [(0, 3), (1, 4), (2, 5)]),
        ((2, 3), -1, "column", [(0, 3), (1, 4), (2, 5)]),
        ((2, 3), 0, "column", [(0, 1, 2), (3, 4, 5)]),
        ((2, 3), -1, "mx:2", [(0, 1), (2,), (3, 4), (5,)]),
        ((3, 2), 0, "mx:2", [(0, 2), (1, 3), (4,), (5,)]),
        ((2, 2, 2), 1, "mx:32", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ((2, 2, 2), 0, "row", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ((2, 3), -1, "block:2x2", [(0, 1, 3, 4), (2, 5)]),
        ((3, 2), 0, "block:1x2", [(0, 2), (1, 3), (4,), (5,)]),
        ((2, 2, 2), -1, "nv:16x16", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((2, 3), -1, "group:4", [(0, 1, 2, 3), (4, 5)]),
        ((5,), 0, "mx:4", [(0, 1, 2, 3), (4,)]),
        ((2, 3), (0, 1), "mx:4", [(0, 1, 2, 3), (4, 5)]),
        ((2, 2, 2), (0, 2), "mx:3", [(0, 1, 4), (5,), (2, 3, 6), (7,)]),
        ((2, 2, 2), (0, 2), "row", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ((2, 2, 2), (2, 0), "block:2x3", [(0, 1, 4, 2, 3, 6), (5, 7)]),
        ((2, 2, 2), 0, "column", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ((2, 2), (), "mx", [(0,), (1,), (2,), (3,)]),
        ((3,), 0, "block:2x2", [(0, 1), (2,)]),
        ((2,), 0, "column", [(0,), (1,)]),
        ((), -1, "row", [(0,)]),
        ((0, 4), -1, "mx", []),
    ],
)
def test_blocks_lie_along_the_axis(shape, axis, scale, blocks):
    assert block_indices(shape, axis, scale) == blocks


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["tensor", "row", "column", "mx:2", "mx", "nv", "block:2x3", "group:4", "nv:16x16"]),
)
def test_every_element_is_in_one_block(shape, data, scale):
    axis = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), max_size=3))
    blocks = block_indices(shape, axis, scale)
    assert sorted(i for block in blocks for i in block) == list(range(math.prod(shape)))


@pytest.mark.parametrize("name", [*MX, *RATIO, "nvfp4", "uint4/row"])
def test_arrays_are_rounded_block_by_block(name):
    """A row of an array is rounded as the blocks of that row are, whatever stands beside it; the tensor scale apart."""
    random = Random(5)
    values = [as_value(random.gauss(0, 1) * 2.0 ** random.randrange(-9, 9)) for _ in range(2 * 70)]
    cast = parse_cast(name)
    results = round_blocks(values, name, (2, 70), -1)
    largest = max(map(abs, values))
    for indices in block_indices((2, 70), -1, cast.scale):
        block = [values[i] for i in indices]
        expected = round_block(block, cast.element, cast.scale, tensor_amax=largest)
        assert [results[i] for i in indices] == list(expected)


# -- laws -------------------------------------------------------------------------------------------------------------


@st.composite
def numbers(draw) -> list[Fraction]:
    """Numbers of float32's precision and both signs, some far below the largest."""
    magnitudes = st.builds(lambda n, e: n * power(e), st.integers(0, (1 << 24) - 1), st.integers(-60, 20))
    return [draw(st.sampled_from([1, -1])) * x for x in draw(st.lists(magnitudes, min_size=1, max_size=8))]


@settings(max_examples=80)
@given(numbers(), st.sampled_from(MX), st.integers(-20, 40))
def test_a_power_of_two_moves_with_the_numbers(values, name, exponent):
    moved = round_blocks([x * power(exponent) for x in values], name, (len(values),))
    expected = round_blocks(values, name, (len(values),))
    assert moved == tuple(x if x is NEGATIVE_ZERO else x * power(exponent) for x in expected)


@settings(max_examples=80)
@given(numbers(), st.sampled_from(["mxfp8", "mxfp4", "e4m3fn/mx:32:ceil", "mxint8", "int8", "e5m2/tensor", "nvfp4"]))
def test_the_sign_of_a_number_is_the_sign_of_its_result(values, name):
    sizes = round_blocks([abs(x) for x in values], name, (len(values),))
    results = round_blocks(values, name, (len(values),))
    assert [0 if x is NEGATIVE_ZERO else x for x in results] == [
        -size if x < 0 else size for x, size in zip(values, sizes, strict=True)
    ]


@settings(max_examples=80)
@given(numbers(), st.sampled_from(["rceil", "ceil"]), st.sampled_from(["e4m3fn", "e2m1fn", "e5m2", "e3m2fn"]))
def test_rounding_twice_is_rounding_once_under_scales_that_do_not_clip(values, rule, name):
    once = round_block(values, name, f"mx:32:{rule}")
    assert round_block(once, name, f"mx:32:{rule}") == once


def test_stochastic_elements_take_the_random_number_of_their_own_index():
    values, numbers = [448, *[Fraction(17, 1)] * 4], [0, 0, 1, 2, 3]
    assert round_blocks(values, "e4m3fn/stochastic:2/mx:32", (5,), random=numbers) == (448, 16, 16, 18, 18)
    assert round_blocks(values, "e4m3fn/stochastic:2/mx:2", (5,), random=lambda i: numbers[i])[1:] == (16, 16, 18, 18)


def test_stochastic_rounding_of_a_block_is_unbiased():
    """Over all random numbers, each element is its scaled value on average."""
    values = [Fraction(400), Fraction(17), Fraction(-3, 7), Fraction(1, 1000)]
    total = [Fraction(0)] * 4
    for number in range(256):
        results = round_block(values, "e4m3fn", "mx", "stochastic:8", random=[number] * 4)
        total = [t + (0 if x is NEGATIVE_ZERO else x) for t, x in zip(total, results, strict=True)]
    for x, t in zip(values, total, strict=True):
        spacing = max(abs(x) / 8, power(-9) * block_scale(values, "e4m3fn"))
        assert abs(t / 256 - x) <= spacing / 256


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e4m3fn", "has no scale"),
        ("mxfp9", "unknown format"),
        ("e4m3fn/mx:0", "block without elements"),
        ("e4m3fn/nv", "elements of e2m1fn"),
        ("bf16/row", "needs no ratio scale"),
        ("uint8/mx", "a ratio scale in fp32"),
        ("e4m3fn/group:4:asymmetric", "has integers as elements"),
        ("int8/ovf_inf/row", "use 'sat_finite'"),
        ("nf4/up", "a codebook rounds to the nearest value"),
        ("e4m3fn/stochastic/mx", "needs a random number"),
    ],
)
def test_wrong_casts_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        round_blocks([1, 2], name, (2,))


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) has 3 elements, got 2"):
        round_blocks([1, 2], "mxfp8", (3,))
    with pytest.raises(ValueError, match="axis 1 is out of range"):
        round_blocks([1, 2], "mxfp8", (2,), 1)
    with pytest.raises(TypeError, match="use float"):
        round_blocks(["1"], "mxfp8", (1,))


# -- published measurements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "decibels"),
    [
        ("mxfp4", "18.8"),
        ("nvfp4", "20.4"),
        ("e4m3fn/mx:32:floor", "30.7"),
        ("mxfp8", "31.5"),
        ("e4m3fn/tensor", "31.5"),
        ("nf4", "20.7"),
        ("e2m1fn/block:64", "19.5"),
        ("int4/block:64", "19.2"),
        ("fp4_bnb", "18.2"),
    ],
)
def test_normal_numbers_keep_the_published_ratio_of_signal_to_noise(name, decibels):
    """Within 0.4 dB, on the quantiles of the normal distribution in random order."""
    values = [NormalDist().inv_cdf((i + 0.5) / 2048) for i in range(2048)]
    Random(4).shuffle(values)
    results = round_blocks(values, name, (2048,))
    noise = sum((x - float(0 if y is NEGATIVE_ZERO else y)) ** 2 for x, y in zip(values, results, strict=True))
    assert abs(10 * math.log10(sum(x * x for x in values) / noise) - float(decibels)) < 0.4
