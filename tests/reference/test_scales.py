"""Scales of OCP MX: every edge by its bits, every step against float64, and the rules that peers state in integers."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest

from fpsim.formats import parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Scale,
    block_scale,
    decode,
    encode,
    parse_scale,
    round,
    scale_steps,
)
from fpsim.reference.elements import largest_magnitude, mantissa_bits, parse_element
from fpsim.reference.scales import ratio_scale

RULES = ("floor", "ceil", "rceil", "even")
FORMATS = ("e4m3fn", "e5m2", "e3m2fn", "e2m3fn", "e2m1fn", "mxint8")


def code(bits: int, name: str, rule: str, carrier: str = "fp32") -> int:
    """The E8M0 code of the scale of a block whose largest magnitude has these bits."""
    scale = block_scale([decode(bits, carrier)], name, rule)
    return 255 if scale is NAN else encode(scale, "e8m0fnu")


# -- edges ------------------------------------------------------------------------------------------------------------

#: The codes by floor, ceil, rceil and even, for each of `FORMATS`.
EDGES = {
    "zero": (0x00000000, "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0"),
    "the least subnormal": (0x00000001, "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0"),
    "2**-127": (0x00400000, "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0"),
    "just below 2**-126": (0x007FFFFF, "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 1 1 1"),
    "2**-126": (0x00800000, "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "0 0 0 0", "1 1 1 1"),
    "just below 2**-118": (0x047FFFFF, "0 1 1 1", "0 0 0 0", "4 5 5 5", "6 7 7 7", "6 7 7 7", "8 9 9 9"),
    "2**-118": (0x04800000, "1 1 1 1", "0 0 0 0", "5 5 5 5", "7 7 7 7", "7 7 7 7", "9 9 9 9"),
    "just below 1": (
        0x3F7FFFFF, "118 119 119 119", "111 112 112 112", "122 123 123 123", "124 125 125 125", "124 125 125 125",
        "126 127 127 127",
    ),
    "1": (
        0x3F800000, "119 119 119 119", "112 112 112 112", "123 123 123 123", "125 125 125 125", "125 125 125 125",
        "127 127 127 127",
    ),
    "just below 8": (
        0x40FFFFFF, "121 122 122 122", "114 115 115 115", "125 126 126 126", "127 128 128 128", "127 128 128 128",
        "129 130 130 130",
    ),
    "the largest number": (
        0x7F7FFFFF, "246 247 247 247", "239 240 240 240", "250 251 251 251", "252 253 253 253", "252 253 253 253",
        "254 254 254 254",
    ),
    "infinity": (0x7F800000, *["255 255 255 255"] * 6),
    "NaN": (0x7FC00000, *["255 255 255 255"] * 6),
    "a signalling NaN": (0x7F800001, *["255 255 255 255"] * 6),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_the_scale_is_right_at_every_edge(edge):
    bits, *expected = EDGES[edge]
    for name, codes in zip(FORMATS, expected, strict=True):
        assert [code(bits, name, rule) for rule in RULES] == [int(c) for c in codes.split()], name
        negative = NAN if decode(bits, "fp32") is NAN else decode(bits | 0x80000000, "fp32")
        for rule in RULES:
            assert block_scale([negative, 0], name, rule) == block_scale([decode(bits, "fp32")], name, rule)


def test_the_thresholds_of_e4m3fn_are_those_of_torchao():
    """448, 449, 464, 510 and 512 tell the four rules apart."""
    codes = {
        rule: [encode(block_scale([a], "e4m3fn", rule), "e8m0fnu") for a in (448, 449, 464, 510, 512)] for rule in RULES
    }
    assert codes == {
        "floor": [127, 127, 127, 127, 128],
        "ceil": [128, 128, 128, 128, 128],
        "even": [127, 127, 127, 128, 128],
        "rceil": [127, 128, 128, 128, 128],
    }


@pytest.mark.parametrize(
    ("name", "largest", "floor_and_ceil", "rounds_up"),
    [
        ("e4m3fn", "1.75", 8, "1.9375"),
        ("e5m2", "1.75", 15, "1.875"),
        ("e3m2fn", "1.75", 4, "1.875"),
        ("e2m3fn", "1.875", 2, "1.9375"),
        ("e2m1fn", "1.5", 2, "1.75"),
        ("mxint8", "1.984375", 0, "1.9921875"),
    ],
)
def test_each_rule_steps_at_its_own_mantissa(name, largest, floor_and_ceil, rounds_up):
    """In the binade of 1: rceil above the mantissa of the largest value, even half a step below 2, ceil above 1."""

    def codes(mantissa, rule):
        number = np.float32(mantissa)
        around = [np.nextafter(number, np.float32(0)), number, np.nextafter(number, np.float32(9))]
        return [encode(block_scale([float(x)], name, rule), "e8m0fnu") - 127 + floor_and_ceil for x in around]

    assert codes(largest, "rceil") == [0, 0, 1]
    assert codes(rounds_up, "even") == [0, 1, 1]
    assert codes(1, "floor") == [-1, 0, 0]
    assert codes(1, "ceil") == [0, 0, 1]


def test_the_golden_values_of_published_recipes():
    assert block_scale([957], "e4m3fn", "floor") == 2 and block_scale([957], "e4m3fn", "rceil") == 4
    assert encode(block_scale([150], "e4m3fn", "rceil"), "e8m0fnu") == 126
    assert encode(block_scale([150], "e4m3fn", "ceil"), "e8m0fnu") == 127
    assert 1 / block_scale([1], "e4m3fn", "rceil") == 256  # Transformer Engine's power-of-two scale for amax 1


# -- bugs of peers, each with the right value -------------------------------------------------------------------------


def test_the_exponent_of_the_largest_value_is_subtracted_once():
    """It was forgotten (vLLM#53110: a block's largest value became 1), and subtracted twice (vLLM#35979)."""
    assert block_scale([256], "e4m3fn", "floor") == 1
    assert block_scale([4], "e2m1fn", "floor") == 1


def test_the_exponent_comes_from_the_amax_itself_and_not_from_a_bfloat16_copy():
    """ao#4725: 0x3fffffff rounds to 2 in bfloat16, and its scale would be a binade too large."""
    just_below_2 = decode(0x3FFFFFFF, "fp32")
    assert code(0x3FFFFFFF, "e4m3fn", "floor") == 119
    assert encode(block_scale([round(just_below_2, "bf16")], "e4m3fn", "floor"), "e8m0fnu") == 120


def test_no_logarithm_rounds_up_just_below_a_power_of_two():
    """microxcaling, gfloat and pychop give 122 for the float32 before 8."""
    assert code(0x40FFFFFF, "e4m3fn", "floor") == 121


def test_the_largest_float32_does_not_overflow_when_it_is_rounded():
    """compressed-tensors 0.20.0 rounds the bits of 0x7f7fffff up to infinity. The scale code is 247."""
    assert code(0x7F7FFFFF, "e4m3fn", "even") == code(0x7F7FFFFF, "e4m3fn", "rceil") == 247


def test_the_largest_value_itself_needs_no_larger_scale():
    """compressed-tensors 0.20.0 uses the mantissa width of FP4 for FP8: it gives 128 for 448 (0x43e00000)."""
    assert code(0x43DFFFFF, "e4m3fn", "even") == code(0x43E00000, "e4m3fn", "even") == 127
    assert code(0x43E00000, "e4m3fn", "rceil") == 127 and code(0x43E00001, "e4m3fn", "rceil") == 128


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_anywhere_makes_the_scale_nan(rule):
    """hipDNN's std::max dropped it (rocm-libraries#12362)."""
    for values in ([1, NAN], [NAN, 1], [1, NAN, INFINITY], [INFINITY, 1], [1, NEGATIVE_INFINITY]):
        assert block_scale(values, "e4m3fn", rule) is NAN


@pytest.mark.parametrize("rule", RULES)
def test_zeros_of_both_signs_and_empty_blocks_have_the_least_scale(rule):
    for values in ([0, 0], [NEGATIVE_ZERO], [NEGATIVE_ZERO, 0], []):
        assert block_scale(values, "e2m1fn", rule) == Fraction(1, 2**127)


# -- all magnitudes ---------------------------------------------------------------------------------------------------


def float64_codes(amax: np.ndarray, name: str, rule: str) -> np.ndarray:
    """The codes by arithmetic of float64, which holds every step of it exactly for float32 and bfloat16 magnitudes."""
    element = parse_element(name)
    largest = float(largest_magnitude(element))
    emax = math.frexp(largest)[1] - 1
    mantissa, power = np.frexp(amax)  # amax = mantissa * 2**power, mantissa in [1/2, 1)
    if rule == "floor":
        k = power - 1 - emax
    elif rule == "ceil":
        k = power - 1 - emax + (mantissa != 0.5)
    elif rule == "rceil":
        k = power - 1 - emax + (2 * mantissa > np.ldexp(largest, -emax))
    else:
        steps = 2.0 ** mantissa_bits(element)
        k = np.frexp(np.ldexp(np.floor(2 * mantissa * steps + 0.5) / steps, power - 1))[1] - 1 - emax
    return np.where(amax == 0, 0, np.where(np.isfinite(amax), np.clip(k, -127, 127) + 127, 255))


def codes_by_steps(bits: np.ndarray, steps: tuple[tuple[int, int], ...]) -> np.ndarray:
    firsts, codes = (np.array(column) for column in zip(*steps, strict=True))
    return codes[np.searchsorted(firsts, bits, side="right") - 1]


def magnitudes(bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*FORMATS, "int8", "int4", "e1m2finite:bias=1", "e5m10", "e3m4"])
def test_the_steps_are_those_of_float64_and_of_the_definition(name, rule):
    steps = scale_steps(name, rule)
    firsts, codes = zip(*steps, strict=True)
    assert firsts[0] == 0 and list(firsts) == sorted(set(firsts)) and list(codes) == sorted(set(codes))
    around = sorted({bits + i for bits in firsts for i in (-1, 0, 1)} - {-1})
    around += [Random(7).randrange(1 << 31) for _ in range(500)]
    for bits, want in zip(around, codes_by_steps(np.array(around), steps), strict=True):
        assert code(bits, name, rule) == want, hex(bits)
    every = np.concatenate([around, np.arange(0, 1 << 31, 4093)])
    assert np.array_equal(codes_by_steps(every, steps), float64_codes(magnitudes(every), name, rule))


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMATS)
def test_all_magnitudes_have_the_codes_of_float64(name, rule):
    firsts, codes = zip(*scale_steps(name, rule), strict=True)
    chunk = 1 << 18
    for first, want, end in zip(firsts, codes, [*firsts[1:], 1 << 31], strict=True):
        for start in range(first, end, chunk):
            bits = np.arange(start, min(start + chunk, end))
            assert (float64_codes(magnitudes(bits), name, rule) == want).all(), hex(start)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMATS)
def test_normal_magnitudes_follow_the_integer_rules_of_peers(name, rule):
    """As torchao and DeepGEMM compute them: the exponent field, a comparison or a carry of the mantissa."""
    element = parse_element(name)
    largest = np.float32(float(largest_magnitude(element))).view(np.uint32).item()
    bits = np.concatenate([np.arange(0x00800000, 0x7F800000, 1021), np.arange(0x43DFFF00, 0x43E00100)])
    field, mantissa = bits >> 23, bits & 0x7FFFFF
    half = 1 << (22 - mantissa_bits(element))
    shift = (largest >> 23) - 127
    k = {
        "floor": field - shift,
        "ceil": field + (mantissa != 0) - shift,
        "rceil": field + (mantissa > (largest & 0x7FFFFF)) - shift,
        "even": ((bits + half) >> 23) - shift,
    }[rule]
    assert np.array_equal(codes_by_steps(bits, scale_steps(name, rule)), np.clip(k, 0, 254))


@pytest.mark.parametrize("rule", RULES)
def test_the_steps_of_other_carriers_are_those_of_the_definition(rule):
    """bfloat16 has few enough magnitudes for all of them; float64 has scales at both ends of E8M0."""
    every = np.arange(1 << 15)
    codes = codes_by_steps(every, scale_steps("e4m3fn", rule, "bf16"))
    assert np.array_equal(codes, float64_codes(magnitudes(every << 16), "e4m3fn", rule))
    steps = scale_steps("e4m3fn", rule, "fp64")
    assert [c for _, c in steps] == list(range(256))
    for bits, want in steps[:6] + steps[-6:]:
        assert code(bits, "e4m3fn", rule, "fp64") == want
        assert bits == 0 or code(bits - 1, "e4m3fn", rule, "fp64") == want - 1


@pytest.mark.parametrize(("rule", "loss"), [("rceil", (1, 17)), ("floor", (1, 8)), ("even", (3, 31))])
def test_the_largest_element_of_a_block_loses_no_more_than_the_rule_allows(rule, loss):
    """E4M3: 1/17 is the most that rounding loses. Under floor and even, clipping 512 or 496 to 448 loses more."""
    worst = Fraction(0)
    for significand in range(1 << 10, 1 << 11):
        for amax in (Fraction(significand), significand + Fraction(1, 2**13), significand + 1 - Fraction(1, 2**13)):
            scale = block_scale([amax], "e4m3fn", rule)
            rounded = round(amax / scale, "e4m3fn", overflow="sat_finite") * scale
            worst = max(worst, abs(rounded - amax) / amax)
    assert Fraction(199, 200) * Fraction(*loss) < worst <= Fraction(*loss)


# -- names and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("mx", Scale("block", "rceil", (32,))),
        ("mx:even", Scale("block", "even", (32,))),
        ("mx:16", Scale("block", "rceil", (16,))),
        ("mx:16:floor", Scale("block", "floor", (16,))),
        ("nv", Scale("block", "te", (16,))),
        ("nv:16x16", Scale("block", "te", (16, 16))),
        ("nv:torchao", Scale("block", "torchao", (16,))),
        ("tensor", Scale("tensor", "fp32")),
        ("row:bf16", Scale("row", "bf16")),
        ("column", Scale("column", "fp32")),
        ("block:128", Scale("block", "fp32", (128,))),
        ("block:128x128:bf16", Scale("block", "bf16", (128, 128))),
        ("block:128:power_of_two", Scale("block", "rceil", (128,))),
        ("group:64", Scale("group", "fp32", (64,))),
        ("group:64:asymmetric", Scale("group", "fp32", (64,), asymmetric=True)),
        ("row:asymmetric", Scale("row", "fp32", asymmetric=True)),
        ("row:floor", Scale("row", "floor")),
        ("mx:16x16:even", Scale("block", "even", (16, 16))),
        ("power_of_two", Scale("tensor", "power_of_two")),
        ("tensor:power_of_two", Scale("tensor", "power_of_two")),
    ],
)
def test_names_denote_scales(name, scale):
    assert parse_scale(name) == parse_scale(scale) == scale


@pytest.mark.parametrize(
    "name", ["", "mx:", "mx:0", "mx:32:up", "mx:32x", "nv:32", "block", "block:0", "group", "rows"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="scale"):
        parse_scale(name)


def test_wrong_rules_and_formats_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'nearest'"):
        block_scale([1], "e4m3fn", "nearest")
    with pytest.raises(ValueError, match="a codebook has no mantissa bits"):
        block_scale([1], "nf4", "even")
    with pytest.raises(ValueError, match="a carrier is signed and has infinities"):
        scale_steps("e4m3fn", "floor", "e4m3fn")
    with pytest.raises(ValueError, match="needs no ratio scale"):
        ratio_scale(Fraction(1), parse_format("bf16"), "fp32")
