"""Packed codes: judged by Python's big integers, bit by bit, and by torch's packed dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpsim
from fpsim.formats import parse_format

FORMATS = ["e2m1fn", "e3m2fn", "e2m3fn", "e2m0", "e2m2", "e3m3", "e4m3fn", "e1m2:unsigned", "binary3p2se"]


@given(st.sampled_from(FORMATS), st.integers(0, 3), st.data())
def test_codes_are_a_little_endian_string_of_bits(name: str, groups: int, data: st.DataObject) -> None:
    bits = parse_format(name).bits
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=8 * groups, max_size=8 * groups))
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    packed = fpsim.pack(torch.tensor(codes, dtype=torch.uint8), name)
    assert bytes(packed.tolist()) == number.to_bytes(bits * groups, "little")
    assert fpsim.unpack(packed, name).tolist() == codes


@pytest.mark.parametrize(
    ("name", "codes", "size"), [("e2m1fn", 6, 3), ("e3m2fn", 8, 6), ("e2m2", 8, 5), ("e5m2", 7, 7)]
)
def test_the_last_dimension_is_packed(name: str, codes: int, size: int) -> None:
    x = torch.randint(1 << parse_format(name).bits, (2, 3, codes), dtype=torch.uint8)
    packed = fpsim.pack(x, name)
    assert packed.shape == (2, 3, size) and packed.dtype == torch.uint8
    assert torch.equal(fpsim.unpack(packed, name), x)
    assert torch.equal(fpsim.pack(x[1, 2], name), packed[1, 2])


def test_four_bit_codes_lie_as_in_torch() -> None:
    """An element of `torch.float4_e2m1fn_x2` holds two codes, the first in the low half."""
    x = torch.tensor([0.5, -6.0, 3.0, 1.0])
    packed = fpsim.pack(fpsim.encode(x, "e2m1fn"), "e2m1fn").view(torch.float4_e2m1fn_x2)
    assert packed.shape == (2,)
    assert packed.view(torch.uint8).tolist() == [0x1 | 0xF << 4, 0x5 | 0x2 << 4]


def test_six_bit_codes_fill_three_bytes() -> None:
    packed = fpsim.pack(torch.tensor([0b000001, 0b000010, 0b000011, 0b111111], dtype=torch.uint8), "e3m2fn")
    assert [f"{byte:08b}" for byte in packed.tolist()] == ["10000001", "00110000", "11111100"]


@pytest.mark.parametrize(
    ("function", "tensor", "name", "error", "message"),
    [
        (fpsim.pack, torch.zeros(3, dtype=torch.uint8), "e2m1fn", ValueError, r"of 2, got shape \(3,\); pad it"),
        (fpsim.pack, torch.zeros((), dtype=torch.uint8), "e2m1fn", ValueError, "multiple of 2"),
        (fpsim.pack, torch.zeros(2, dtype=torch.int32), "e2m1fn", TypeError, "uint8 tensor, got torch.int32"),
        (fpsim.pack, torch.tensor([16, 0], dtype=torch.uint8), "e2m1fn", ValueError, "code 16 is not one of e2m1fn"),
        (fpsim.pack, torch.zeros(2, dtype=torch.uint8), "fp16", ValueError, "has 16 bits"),
        (fpsim.unpack, torch.zeros(4, dtype=torch.uint8), "e3m2fn", ValueError, "multiple of 3"),
        (fpsim.unpack, torch.zeros(3), "e3m2fn", TypeError, "uint8 tensor, got torch.float32"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_names_it(function, tensor, name, error, message) -> None:
    with pytest.raises(error, match=message):
        function(tensor, name)
