"""Codes of less than a byte, packed: several to a byte, as hardware and checkpoints store them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpsim.formats import FloatFormat, parse_format


def _group(fmt: FloatFormat) -> tuple[int, int]:
    """How many codes fill how many bytes exactly."""
    if fmt.bits > 8:
        raise ValueError(f"{fmt.name} has {fmt.bits} bits: only codes of up to 8 bits are packed into bytes")
    common = math.gcd(fmt.bits, 8)
    return 8 // common, fmt.bits // common


def pack(codes: Tensor, format: str | FloatFormat) -> Tensor:
    """Codes of ``format`` packed into bytes along the last dimension: a little-endian string of bits.

    Code number i has the bits from ``i * bits`` upwards, counted from the lowest bit of the first byte. For 4-bit codes
    the even ones are in the low halves of the bytes, as in `torch.float4_e2m1fn_x2`; four 6-bit codes fill three bytes.

    Args:
        codes: uint8 as `fpsim.encode` returns them, shape (..., n); n a multiple of 2 for 4-bit codes, of 4 for 6-bit
            codes, of 8 for those of an odd number of bits.
        format: a name or a `FloatFormat` of up to 8 bits.

    Returns:
        uint8, shape (..., n * bits / 8).

    Raises:
        ValueError: a format of more than 8 bits, a last dimension that does not fill whole bytes, a code too large.
        TypeError: ``codes`` is not uint8.

    Source: OCP Microscaling Formats (MX) 1.0 leaves the layout open; this is the one of torch and of NVIDIA's FP4.

    >>> pack(torch.tensor([0x1, 0x2, 0x3, 0x4], dtype=torch.uint8), "e2m1fn")
    tensor([33, 67], dtype=torch.uint8)
    """
    fmt = parse_format(format)
    count, width = _group(fmt)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        raise TypeError(f"codes must be a uint8 tensor, got {getattr(codes, 'dtype', type(codes))}: use fpsim.encode")
    if not codes.dim() or codes.shape[-1] % count:
        raise ValueError(
            f"{count} codes of {fmt.name} fill {width} bytes: the last dimension must be a multiple of {count}, got "
            f"shape {tuple(codes.shape)}; pad it"
        )
    if codes.numel() and int(codes.max()) >> fmt.bits:
        raise ValueError(f"code {int(codes.max())} is not one of {fmt.name}: codes are 0 to {(1 << fmt.bits) - 1}")
    groups = codes.to(torch.int64).unflatten(-1, (-1, count))
    word = (groups << fmt.bits * torch.arange(count, device=codes.device)).sum(-1, keepdim=True)  # up to 56 bits
    return (word >> 8 * torch.arange(width, device=codes.device) & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, format: str | FloatFormat) -> Tensor:
    """The codes that `pack` packed: uint8, shape (..., n * 8 / bits) of ``packed``'s (..., n).

    Raises:
        ValueError: a format of more than 8 bits, or a last dimension that does not hold whole groups of codes.
        TypeError: ``packed`` is not uint8.

    >>> unpack(torch.tensor([33, 67], dtype=torch.uint8), "e2m1fn")
    tensor([1, 2, 3, 4], dtype=torch.uint8)
    """
    fmt = parse_format(format)
    count, width = _group(fmt)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are a uint8 tensor, got {getattr(packed, 'dtype', type(packed))}")
    if not packed.dim() or packed.shape[-1] % width:
        raise ValueError(
            f"{count} codes of {fmt.name} fill {width} bytes: the last dimension must be a multiple of {width}, got "
            f"shape {tuple(packed.shape)}"
        )
    groups = packed.to(torch.int64).unflatten(-1, (-1, width))
    word = (groups << 8 * torch.arange(width, device=packed.device)).sum(-1, keepdim=True)
    codes = word >> fmt.bits * torch.arange(count, device=packed.device) & ((1 << fmt.bits) - 1)
    return codes.to(torch.uint8).flatten(-2)
