"""One test for every input that broke another simulator, with the bits written out by hand.

The comments list the peers and their results. Every case runs eagerly on float32, and on float64 where the numbers are
the same. The reference judges the statements that hold for all formats.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import fpsim
from fpsim.formats import ROUNDINGS, parse_format
from tests.shared.judge import (
    CARRIERS,
    assert_codes,
    assert_result,
    assert_same_bits,
    codes_of,
    interesting,
    random_inputs,
    specials,
    suits,
    tensor_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = math.inf, math.nan
FLT_MAX = (2 - 2.0**-23) * 2.0**127


def bits(*codes: int) -> torch.Tensor:
    """The float32 tensor with these bit patterns."""
    return tensor_of(np.array(codes, np.uint32), torch.float32)


def after(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(INF)))


def before(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(-INF)))


def check(name: str, pairs: dict[float, float], rounding: str = "nearest_even", overflow: str | None = None) -> None:
    """Each number rounds to its partner bit for bit, and so do their negatives, in every dtype that has them."""
    mirror = {"up": "down", "down": "up"}.get(rounding, rounding)
    for dtype in (torch.float32, torch.float64):
        for sign, direction in ((1, rounding), (-1, mirror)):
            x = torch.tensor([sign * number for number in pairs], dtype=torch.float64).to(dtype)
            want = torch.tensor([sign * number for number in pairs.values()], dtype=torch.float64).to(dtype)
            got = fpsim.round(x, name, rounding=direction, overflow=overflow)
            assert_codes(codes_of(got), codes_of(want), codes_of(x), (name, direction, dtype))


# -- nearest -------------------------------------------------------------------------------------------------------


def test_ties_go_to_even():
    # qtorch: away from zero, 0x3f280000 = 0.65625 -> 0.6875
    check("e4m3", {0.65625: 0.625, 0.71875: 0.75, 1.0625: 1.0, 1.1875: 1.25, 17.0: 16.0, 19.0: 20.0})
    check("e4m3fn", {1.5 * 2**-9: 2**-8, 2.5 * 2**-9: 2**-8, 432.0: 448.0, 400.0: 384.0})


def test_neighbours_of_ties():
    for tie, below, above in ((0.65625, 0.625, 0.6875), (1.0625, 1.0, 1.125), (2.5 * 2.0**-9, 2.0**-8, 3 * 2.0**-9)):
        check("e4m3", {before(tie): below, after(tie): above})
        check("e4m3", {before(tie): below, tie: above, after(tie): above}, "nearest_away")


def test_predecessor_of_half_the_smallest_is_zero():
    # microxcaling: floor(|x| + 0.5), 0x3a7fffff -> 0.001953125
    assert codes_of(fpsim.round(bits(0x3A7FFFFF, 0xBA7FFFFF), "e4m3")).tolist() == [0, 0x80000000]
    check("e5m2", {before(2.0**-17): 0.0})
    check("fp16", {before(2.0**-25): 0.0})


def test_half_the_smallest_is_a_tie_with_zero():
    half = 2.0**-10
    check("e4m3", {half: 0.0, after(half): 2 * half})  # qtorch and pychop: 0x3a800001 -> 0, FaultChop too
    check("e4m3", {half: 2 * half, before(half): 0.0}, "nearest_away")
    check("fp16", {2.0**-25: 0.0, after(2.0**-25): 2.0**-24})


def test_subnormals_are_rounded_once():
    # qtorch adds 2**emin in float32 first: 0x3b3fffff = 0.00292969 -> 0.00390625; pychop: 0xb3bfff2b -> -1.19e-7
    assert fpsim.round(bits(0x3B3FFFFF), "e4m3").item() == 0.001953125
    assert fpsim.round(bits(0xB3BFFF2B), "fp16").item() == -(2.0**-24)
    check("e4m3", {0.0029296875: 0.00390625, before(0.0029296875): 0.001953125})  # FP8-Emu: 0.0029296875 unchanged


def test_no_double_rounding_through_fp16():
    # FP8-Emu: 0xbc2ff6dc -> -0.01171875 in e5m2; 0x3f480b90 -> 0.75 in e4m3; 0xc76ff989 -> -inf
    assert fpsim.round(bits(0xBC2FF6DC, 0xC76FF989), "e5m2").tolist() == [-0.009765625, -57344.0]
    assert fpsim.round(bits(0x3F480B90), "e4m3").item() == 0.8125


# -- zeros and underflow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_keep_their_sign(rounding):
    # qtorch, pychop, microxcaling: -0 -> +0
    for dtype in CARRIERS:
        zeros = torch.tensor([0.0, -0.0], dtype=dtype)
        for name in ("e4m3fn", "e5m2", "e2m1fn", "e4m3:nosubnormals"):
            assert_same_bits(fpsim.round(zeros, name, rounding=rounding), zeros)
        assert codes_of(fpsim.round(zeros, "e4m3fnuz", rounding=rounding)).tolist() == [0, 0]


def test_negative_underflow_keeps_its_sign():
    # mptorch, qtorch: 0xb731004c -> +0; CPFloat: RU of -tiny -> +0
    for rounding in ("nearest_even", "nearest_away", "toward_zero", "up"):
        got = fpsim.round(bits(0xB731004C, 0x80000001, 0x80800000), "e4m3fn", rounding=rounding)
        assert codes_of(got).tolist() == [0x80000000] * 3, rounding
    assert codes_of(fpsim.round(bits(0xB731004C), "e4m3fnuz")).tolist() == [0]
    assert fpsim.round(bits(0xB731004C), "e4m3fn", rounding="down").item() == -(2.0**-9)


def test_directed_underflow_reaches_the_smallest():
    # pychop: RU of tiny positive -> 0
    tiny = 2.0**-149
    check("e4m3fn", {tiny: 2.0**-9, 0.0: 0.0}, "up")
    check("e4m3fn", {tiny: 2.0**-9}, "to_odd")
    check("bf16", {tiny: 2.0**-133}, "up")
    check("e4m3fn", {tiny: 0.0}, "toward_zero")
    check("e4m3fn", {tiny: 0.0}, "nearest_away")


# -- carries and overflow ------------------------------------------------------------------------------------------


def test_a_subnormal_carries_into_the_smallest_normal():
    # apytypes .cast: 6.05743e-05 (5,2) -> 0
    check("e5m2", {6.05743e-05: 2.0**-14})
    check("e4m3", {before(2.0**-6): 2.0**-6, 7.5 * 2.0**-9: 2.0**-6})
    check("e2m1fn", {0.75: 1.0, before(0.75): 0.5})


def test_a_carry_out_of_the_top_binade_overflows():
    # pychop: 0x43780000 = 248 -> 256 in e4m3, whose largest value is 240
    check("e4m3", {248.0: INF, before(248.0): 240.0})
    check("e4m3", {248.0: 240.0, 255.0: 240.0}, overflow="sat_finite")
    check("e4m3", {248.0: 240.0}, overflow="sat_propagate")


def test_the_binade_above_the_largest_is_overflow_too():
    # pychop Chop: 256 <= |x| < 512 -> 0 in e4m3; CPFloat's OFP8 preset: 490.7 -> 480
    check("e4m3", {256.0: INF, 406.1: INF, 511.0: INF, 512.0: INF})
    check("e4m3fn", {490.6875: 448.0, 464.5: 448.0, 500.0: 448.0, 1e30: 448.0})
    assert bool(fpsim.round(torch.tensor([464.5, 490.7, 500.0]), "e4m3fn", overflow="ovf_inf").isnan().all())


def test_the_bound_of_overflow_is_a_tie():
    """The tie between the largest value and the value that would come next goes to the even one."""
    check("e5m2", {61440.0: INF, before(61440.0): 57344.0})
    check("e5m2", {57344.0: 57344.0, after(57344.0): INF}, "up")
    check("e5m2", {after(57344.0): 57344.0, 65536.0: 57344.0, INF: INF}, "toward_zero")
    got = fpsim.round(torch.tensor([464.0, after(464.0)]), "e4m3fn", overflow="ovf_inf")
    assert got[0].item() == 448.0 and got[1].isnan()
    check("e2m1fn", {5.0: 4.0, 7.0: 6.0, after(5.0): 6.0, 1e9: 6.0})
    check("fp16", {65520.0: INF, before(65520.0): 65504.0})


def test_flt_max():
    # microxcaling: FLT_MAX -> NaN; pychop: 0 for bf16
    check("bf16", {FLT_MAX: INF})
    check("bf16", {FLT_MAX: 255.0 * 2**120}, "toward_zero")
    check("bf16", {FLT_MAX: 255.0 * 2**120}, overflow="sat_finite")
    check("e4m3fn", {FLT_MAX: 448.0})
    check("e5m2", {FLT_MAX: INF})
    check("fp32", {FLT_MAX: FLT_MAX})
    assert fpsim.round(torch.tensor([FLT_MAX]), "e8m0fnu").item() == 2.0**127


def test_infinities():
    # mptorch, microxcaling: a saturating mode leaves infinities as they are
    check("e4m3", {INF: 240.0}, overflow="sat_finite")
    check("e5m2", {INF: INF, 1e9: 57344.0}, overflow="sat_propagate")
    check("e4m3fn", {INF: 448.0})
    check("e2m1fn", {INF: 6.0})
    for overflow in ("ovf_inf", "sat_propagate"):
        for rounding in ROUNDINGS:  # infinity is infinity in every direction
            assert fpsim.round(torch.tensor([INF, -INF]), "e4m3fn", rounding=rounding, overflow=overflow).isnan().all()
            got = fpsim.round(torch.tensor([INF, -INF]), "e5m2", rounding=rounding, overflow=overflow)
            assert got.tolist() == [INF, -INF]


# -- NaN -----------------------------------------------------------------------------------------------------------

NANS = [0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7FA00000, 0x7FBFFFFF, 0x7FD63863, 0x7F81897B, 0x7F8FFFFF]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nans_of_any_payload_and_sign_stay_nan(rounding):
    # CPFloat: 0x7f81897b -> inf, 0xfffeddd3 -> -0; qtorch: 0xffffdebe -> 0 in bf16; FP8-Emu: 0xff801e2f -> -inf
    nans = bits(*NANS, *(code | 0x80000000 for code in NANS), 0xFFFEDDD3, 0xFFFFDEBE, 0xFF801E2F)
    for name in ("e4m3fn", "e5m2", "e4m3", "e4m3fnuz", "e8m0fnu", "bf16", "fp16", "tf32", "fp32", "e8m1", "e5m1"):
        for overflow in ("ovf_inf", "sat_finite", "sat_propagate"):
            got = fpsim.round(nans, name, rounding=rounding, overflow=overflow)
            assert bool(got.isnan().all()), (name, overflow)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nans_become_the_largest_where_there_is_no_nan(rounding):
    # ml_dtypes: -0 or +0 by the inverted sign; torchao floatx, torch-floating-point: 1.625, 256, ...
    nans = bits(*NANS, *(code | 0x80000000 for code in NANS))
    for name in ("e2m1fn", "e2m3fn", "e3m2fn", "e5m2finite"):
        assert set(fpsim.round(nans, name, rounding=rounding).tolist()) == {parse_format(name).max}


# -- exponents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["bf16", "tf32", "e8m3", "e8m0fnu", "e8m2:nosubnormals", "e8m23", "e8m22"])
def test_float32_subnormals_with_eight_exponent_bits(name, rounding):
    # mptorch treats them as normal: 0x80651d03 -> -9.367e-39 (bf16; it is -9.275e-39)
    subnormals = np.random.default_rng(1).integers(0, 1 << 23, 20_000).astype(np.uint32)
    x = bits(*subnormals.tolist(), *(subnormals | 0x80000000).tolist())
    assert_result(fpsim.round(x, name, rounding=rounding), x, name, rounding)


def test_a_float32_subnormal_in_bf16():
    assert codes_of(fpsim.round(bits(0x80651D03), "bf16")).tolist() == [0x80650000]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_23_mantissa_bits_are_the_identity(rounding):
    # qtorch: 0xb2ffc19d changes its sign; CPFloat adds an ulp
    x = specials(torch.float32) | random_inputs(parse_format("fp32"), torch.float32, 20_000)
    got = fpsim.round(x.tensor, "fp32", rounding=rounding)
    numbers = ~x.tensor.isnan()
    assert_same_bits(got[numbers], x.tensor[numbers])
    assert bool(got[~numbers].isnan().all())
    for dtype, name in ((torch.float64, "fp64"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        x = interesting(parse_format(name), dtype).tensor
        x = x[~x.isnan()]
        assert_same_bits(fpsim.round(x, name, rounding=rounding), x)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_22_mantissa_bits_drop_one(rounding):
    x = random_inputs(parse_format("e8m22"), torch.float32, 50_000).tensor
    assert_result(fpsim.round(x, "e8m22", rounding=rounding), x, "e8m22", rounding)
    assert fpsim.round(bits(0x3F800001, 0x3F800003, 0x3F800002), "e8m22").view(torch.int32).tolist() == [
        0x3F800000, 0x3F800004, 0x3F800002
    ]  # fmt: skip


def test_no_mantissa_bits_ties_go_to_the_even_code():
    """Three conventions are in use: this is that of IEEE P3109 and gfloat; mptorch and CPFloat go up, apytypes down."""
    check("e5m0", {1.0: 1.0, 1.5: 2.0, 3.0: 2.0, 6.0: 8.0, 12.0: 8.0})
    check("e5m0", {1.5: 2.0, 3.0: 4.0, 6.0: 8.0}, "nearest_away")
    check("e5m0", {1.25: 1.0, 2.5: 2.0}, "toward_zero")
    check("e5m0", {1.25: 1.0, 2.5: 4.0}, "to_odd")  # the codes of 1/4, 1 and 4 are odd
    check("e5m0", {2.0**-14: 2.0**-14, 1.5 * 2.0**-14: 2.0**-13, 2.0**-15: 0.0, 0.75 * 2.0**-14: 2.0**-14})
    check("e5m0", {2.0**15: 2.0**15, 1.5 * 2.0**15: 2.0**15, after(1.5 * 2.0**15): INF, 2.0**16: INF})


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "bf16", "fp16", "e3m4", "e8m0fnu"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_values_just_below_powers_of_two(name, rounding):
    # pychop and microxcaling take the exponent from log2: 0xb9fffffc RZ -> -0.000366, where the result is -0.000427
    codes = (np.arange(1, 255) << 23) - np.arange(-3, 6).reshape(-1, 1)
    x = tensor_of(np.concatenate([codes, codes | 0x80000000]).astype(np.uint32), torch.float32)
    assert_result(fpsim.round(x, name, rounding=rounding), x, name, rounding)


def test_a_value_just_below_a_power_of_two_toward_zero():
    check("e5m2", {before(8.0): 7.0, 8.0: 8.0}, "toward_zero")
    check("e5m2", {before(8.0): 8.0, after(8.0): 10.0}, "up")
    assert fpsim.round(bits(0xB9FFFFFC), "e5m2", rounding="toward_zero").item() == -0.00042724609375


def test_odd_rounding_keeps_representable_numbers():
    # pychop: 0x38800000 -> 7.6e-05
    check("e5m2", {2.0**-14: 2.0**-14, 1.0: 1.0, 1.25: 1.25, 1.1: 1.25, 1.3: 1.25, 1.6: 1.75, 1e9: 57344.0}, "to_odd")


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "e4m3fn", "e5m2"])
def test_float64_inputs_next_to_float32_ties(name):
    """Rounding to float32 first would turn them into ties; custom-float-quant: 0.0009765625000000002 -> 0."""
    fmt = parse_format(name)
    ties = torch.tensor([(1 + (2 * k + 1) * 2.0 ** -(fmt.mantissa_bits + 1)) for k in range(2)], dtype=torch.float64)
    ties = torch.cat([ties, ties * 2.0**-3, torch.tensor([0.5, 1.5, 2.5]) * fmt.smallest_subnormal])
    for x in (ties, *(torch.nextafter(ties, torch.tensor(limit, dtype=torch.float64)) for limit in (INF, -INF))):
        for rounding in ROUNDINGS:
            assert_result(fpsim.round(x, name, rounding=rounding), x, name, rounding)
    assert fpsim.round(torch.tensor([0.0009765625000000002], dtype=torch.float64), "e4m3").item() == 0.001953125


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 100])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_directions_do_not_depend_on_the_size(rounding, size):
    # FP8-Emu: nearest-even in every mode where the size is a multiple of 32
    x = torch.full((size,), 1.1)
    want = {"up": 1.25, "to_odd": 1.25}.get(rounding, 1.0)
    assert fpsim.round(x, "e5m2", rounding=rounding).tolist() == [want] * size


SHAPES: dict[str, Callable[[], torch.Tensor]] = {
    "strided": lambda: torch.randn(9, 10)[::2, 1::3],
    "zero-dimensional": lambda: torch.tensor(0.3),
    "empty": lambda: torch.empty(0, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    x = SHAPES[shape]()
    assert_result(fpsim.round(x, "e4m3fn"), x, "e4m3fn")


# -- flush to zero -------------------------------------------------------------------------------------------------


@contextmanager
def flush_to_zero() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        assert (torch.tensor([1e-40]) * 1).item() == 0, "the mode is on"
        yield
    finally:
        torch.set_flush_denormal(False)


FTZ = [
    "e4m3fn", "e5m2", "fp16", "bf16", "tf32", "fp32", "e8m0fnu", "e8m3", "e8m2:nosubnormals", "e5m7:bias=125",
    "e7m7:bias=118", "e7m7:bias=119", "e7m7:bias=120", "e7m7:bias=125", "e5m2:bias=130", "e5m2:bias=140",
    "e6m10:bias=120", "e4m3fn:bias=129", "fp64", "e11m0", "e11m20:nosubnormals",
]  # fmt: skip
FTZ_CASES = [(name, dtype) for name in FTZ for dtype in CARRIERS if suits(parse_format(name), dtype)]


@pytest.mark.parametrize(("name", "dtype"), FTZ_CASES, ids=str)
def test_flush_to_zero_changes_nothing(name, dtype):
    # unit-scaling: with flush-to-zero on, all subnormals of the target become 0
    fmt = parse_format(name)
    x = (interesting(fmt, dtype).sample(8000) | random_inputs(fmt, dtype, 2000)).tensor
    for rounding in ROUNDINGS:
        with flush_to_zero():
            got = fpsim.round(x, name, rounding=rounding)
        assert_result(got, x, name, rounding)


def test_codes_under_flush_to_zero():
    codes = torch.arange(256)
    for name in ("e4m3fn", "e8m0fnu", "e4m3fn:bias=129"):
        fmt = parse_format(name)
        numbers = [code for code in range(256) if not fmt.is_nan_code(code)]
        with flush_to_zero():
            back = fpsim.encode(fpsim.decode(codes, name), name)
        assert back[numbers].tolist() == numbers
