"""The shortcuts of eager CPU calls give the kernel's bits, for every format that they accept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fpsim
from fpsim.formats import ROUNDINGS, FloatFormat, parse_format, resolve_overflow
from fpsim.rounding.cpu import can_round_by_scaling, has_one_unit, has_subnormal, round_at_one_unit, round_by_scaling
from fpsim.rounding.kernel import FLOAT32
from fpsim.rounding.tensors import round_with_torch_ops


def accepted(exponent_bits: int, overflow: str) -> list[FloatFormat]:
    formats = []
    for mantissa_bits in range(24):
        for suffix in ("", "fn", "fnuz", "finite", ":p3109"):
            for bias in ("", ":bias=3", ":bias=20"):
                try:
                    fmt = parse_format(f"e{exponent_bits}m{mantissa_bits}{suffix}{bias}")
                except ValueError:  # a bias that leaves float64
                    continue
                if fmt.is_subset_of(FLOAT32) and can_round_by_scaling(fmt, overflow):
                    formats.append(fmt)
    return formats


def patterns(fmt: FloatFormat, count: int, generator: torch.Generator) -> Tensor:
    """Float32 numbers: random bits, exponents in and around the format's range, many ties, specials."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    low, high = max(fmt.emin - fmt.mantissa_bits - 3 + 127, 0), min(fmt.max_exponent + 3 + 127, 255)
    fields = torch.randint(low, high + 1, (count // 2,), generator=generator).to(torch.int32)
    bits[: count // 2] = (bits[: count // 2] & ~0x7F800000) | (fields << 23)
    bits[: count // 4] &= ~((1 << max(22 - fmt.mantissa_bits, 0)) - 1)
    specials = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4028234663852886e38, 1e-45])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).to(torch.int32).view(torch.float32)
    return torch.cat([bits.view(torch.float32), specials, nans])


def assert_same_bits(x: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    wrong = got.view(torch.int32) != want.view(torch.int32)
    assert not wrong.any(), f"{what}: {x[wrong][:3]} -> {got[wrong][:3]}, want {want[wrong][:3]}"


@pytest.mark.parametrize(("overflow", "at_least"), [("ovf_inf", 90), ("sat_finite", 400), ("sat_propagate", 180)])
def test_scaling_and_kernel_agree_bit_for_bit(overflow: str, at_least: int) -> None:
    generator = torch.Generator().manual_seed(0)
    formats = [fmt for exponent_bits in range(2, 9) for fmt in accepted(exponent_bits, overflow)]
    assert len(formats) > at_least
    for fmt in formats:
        x = patterns(fmt, 1 << 12, generator)
        got = torch.empty_like(x)
        for rounding in ROUNDINGS:
            round_by_scaling(x, fmt, rounding, overflow, got)
            want = round_with_torch_ops(x, fmt, rounding, overflow)
            assert_same_bits(x, got, want, f"{fmt.name} {rounding}")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e5m10"])
def test_scaling_is_right_under_flush_to_zero(name: str, rounding: str) -> None:
    fmt, x = parse_format(name), patterns(parse_format(name), 1 << 14, torch.Generator().manual_seed(0))
    assert has_subnormal(x)
    want = round_with_torch_ops(x, fmt, rounding, resolve_overflow(fmt, None))
    torch.set_flush_denormal(True)
    try:
        got = fpsim.round(x, name, rounding=rounding)
        normal = x[(x.view(torch.int32) & 0x7F800000) != 0]
        assert not has_subnormal(normal)
        got_of_normal = fpsim.round(normal, name, rounding=rounding)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(x, got, want, name)
    assert_same_bits(
        normal, got_of_normal, round_with_torch_ops(normal, fmt, rounding, resolve_overflow(fmt, None)), name
    )


@pytest.mark.parametrize("code", [0, 1, 0x7FFFFF, 0x800000, 0x7F800000, 0x7FC00000])
@pytest.mark.parametrize("sign", [0, 1])
def test_has_subnormal_reads_the_bits(code: int, sign: int) -> None:
    x = torch.tensor([code - (sign << 31)]).to(torch.int32).view(torch.float32)
    assert has_subnormal(x) == (0 < code < 0x800000)
    assert not has_subnormal(x[:0])


@pytest.mark.parametrize(
    ("name", "overflow"),
    [
        ("e8m3", "ovf_inf"),
        ("bf16", "sat_finite"),
        ("e1m3", "ovf_inf"),
        ("e4m0", "ovf_inf"),
        ("e5m2:nosubnormals", "ovf_inf"),
        ("e4m3fn:unsigned", "sat_finite"),
        ("e4m3fn", "ovf_inf"),
        ("e4m3fn", "sat_propagate"),
        ("binary8p3se", "ovf_inf"),
        ("e5m23", "ovf_inf"),
        ("e7m7:bias=120", "ovf_inf"),
        ("e4m3:bias=-5", "ovf_inf"),
    ],
)
def test_formats_for_which_scaling_is_wrong_are_left_to_the_kernel(name: str, overflow: str) -> None:
    assert not can_round_by_scaling(parse_format(name), overflow)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_unit_and_kernel_agree_bit_for_bit(rounding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for mantissa_bits in range(1, 23):
        fmt = FloatFormat(8, mantissa_bits)
        assert has_one_unit(fmt, "ovf_inf")
        x = patterns(fmt, 1 << 15, generator)
        got = torch.empty_like(x)
        round_at_one_unit(x, fmt, rounding, got)
        assert_same_bits(x, got, round_with_torch_ops(x, fmt, rounding, "ovf_inf"), f"{fmt.name} {rounding}")


@pytest.mark.parametrize(
    "name", ["e8m0", "e8m23", "e8m3fn", "e8m3:bias=126", "e8m3:nosubnormals", "e8m3:unsigned", "fp16"]
)
def test_formats_of_several_units_are_left_to_the_kernel(name: str) -> None:
    assert not has_one_unit(parse_format(name), "ovf_inf")
    assert not has_one_unit(parse_format("e8m3"), "sat_finite")


LAYOUTS = {
    "sliced": lambda x: x[:, 3:],
    "every other": lambda x: x[::2, ::3],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(7, -1),
    "of size one": lambda x: x[:1, 4:5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e8m3", "e4m0", "e5m2:nosubnormals"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_layout_does_not_matter(name: str, rounding: str, layout: str) -> None:
    fmt = parse_format(name)
    numbers = patterns(fmt, 1 << 10, torch.Generator().manual_seed(1))
    numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))]
    x = LAYOUTS[layout](numbers[: 34 * 30].view(34, 30))
    want = round_with_torch_ops(x.contiguous(), fmt, rounding, resolve_overflow(fmt, None))
    got = fpsim.round(x, name, rounding=rounding)
    assert got.shape == x.shape
    assert_same_bits(x.contiguous(), got.contiguous(), want, f"{name} {rounding}")
