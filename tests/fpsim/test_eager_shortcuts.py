"""The shortcuts of eager CPU calls give the kernel's bits, for every format that they accept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpsim.formats import ROUNDINGS, FloatFormat, parse_format, resolve_overflow
from fpsim.kernel import FLOAT32
from fpsim.rounding_op import (
    _can_round_by_addition,
    _has_one_unit,
    _round_at_one_unit,
    _round_by_addition,
    round_with_torch_ops,
)


def accepted(exponent_bits: int) -> list[FloatFormat]:
    formats = []
    for mantissa_bits in range(24):
        for suffix in ("", "fn", "fnuz", "finite"):
            for bias in ("", ":bias=3", ":bias=-5", ":bias=20"):
                try:
                    fmt = parse_format(f"e{exponent_bits}m{mantissa_bits}{suffix}{bias}")
                except ValueError:  # a bias that leaves float64
                    continue
                if fmt.is_subset_of(FLOAT32) and _can_round_by_addition(
                    fmt, "nearest_even", resolve_overflow(fmt, None)
                ):
                    formats.append(fmt)
    return formats


def patterns(fmt: FloatFormat, count: int, generator: torch.Generator) -> Tensor:
    """Float32 numbers: random bits; exponents in and around the format's range; many ties; specials."""
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


@pytest.mark.parametrize("exponent_bits", range(2, 8))
def test_addition_and_kernel_agree_bit_for_bit(exponent_bits: int) -> None:
    generator = torch.Generator().manual_seed(exponent_bits)
    formats = accepted(exponent_bits)
    assert len(formats) > 100
    for fmt in formats:
        x = patterns(fmt, 1 << 13, generator)
        got = torch.empty_like(x)
        _round_by_addition(x, fmt, got)
        want = round_with_torch_ops(x, fmt, "nearest_even", resolve_overflow(fmt, None))
        assert_same_bits(x, got, want, fmt.name)


@pytest.mark.parametrize(
    "name", ["e8m3", "bf16", "e1m3", "e4m0", "e5m2:nosubnormals", "e4m3fn:unsigned", "e5m22", "e7m7:bias=120"]
)
def test_formats_for_which_addition_is_wrong_are_left_to_the_kernel(name: str) -> None:
    fmt = parse_format(name)
    assert not _can_round_by_addition(fmt, "nearest_even", resolve_overflow(fmt, None))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_unit_and_kernel_agree_bit_for_bit(rounding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for mantissa_bits in range(1, 23):
        fmt = FloatFormat(8, mantissa_bits)
        assert _has_one_unit(fmt, "ovf_inf")
        x = patterns(fmt, 1 << 15, generator)
        got = torch.empty_like(x)
        _round_at_one_unit(x, fmt, rounding, got)
        assert_same_bits(x, got, round_with_torch_ops(x, fmt, rounding, "ovf_inf"), f"{fmt.name} {rounding}")


@pytest.mark.parametrize(
    "name", ["e8m0", "e8m23", "e8m3fn", "e8m3:bias=126", "e8m3:nosubnormals", "e8m3:unsigned", "fp16"]
)
def test_formats_of_several_units_are_left_to_the_kernel(name: str) -> None:
    assert not _has_one_unit(parse_format(name), "ovf_inf")
    assert not _has_one_unit(parse_format("e8m3"), "sat_finite")
