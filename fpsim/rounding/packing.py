"""Packing of codes that are narrower than a byte, as hardware and checkpoints store them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.definitions import pieces


def _group(fmt: FloatFormat) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and the number of these bytes."""
    if fmt.bits > 8:
        raise ValueError(f"{fmt.name} has {fmt.bits} bits: only codes of up to 8 bits are packed into bytes")
    common = math.gcd(fmt.bits, 8)
    return 8 // common, fmt.bits // common


def pack(codes: Tensor, format: str | FloatFormat) -> Tensor:
    """Pack codes of ``format`` into bytes along the last dimension, as a little-endian string of bits.

    Code number i occupies the bits from ``i * bits`` upwards, counted from the lowest bit of the first byte. So 4-bit
    codes with an even number are in the low halves of the bytes, as in `torch.float4_e2m1fn_x2`, and four 6-bit codes
    fill three bytes.

    Args:
        codes: uint8, shape (..., n), as `fpsim.encode` returns them. n is a multiple of 2 for 4-bit codes, of 4 for
            2-bit and 6-bit codes, and of 8 for codes with an odd number of bits.
        format: a name or a `FloatFormat` of up to 8 bits.

    Returns:
        uint8, shape (..., n * bits / 8).

    Raises:
        ValueError: the format has more than 8 bits, the last dimension does not fill whole bytes, or a code is too
            large.
        TypeError: ``codes`` is not uint8.

    Source: OCP Microscaling Formats (MX) 1.0 leaves the layout open. This is the layout of torch and of NVIDIA's FP4.

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
    groups = codes.unflatten(-1, (-1, count))
    packed = codes.new_empty((*groups.shape[:-1], width))
    for part, target in pieces(groups, packed, keep=1):
        word = (part.to(torch.int64) << fmt.bits * torch.arange(count, device=codes.device)).sum(-1, keepdim=True)
        target.copy_(word >> 8 * torch.arange(width, device=codes.device) & 0xFF)  # the word has up to 56 bits
    return packed.flatten(-2)


def unpack(packed: Tensor, format: str | FloatFormat) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8, shape (..., n), as `pack` returns it.
        format: the format that `pack` was given.

    Returns:
        The codes: uint8, shape (..., n * 8 / bits).

    Raises:
        ValueError: the format has more than 8 bits, or the last dimension does not hold whole groups of codes.
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
    groups = packed.unflatten(-1, (-1, width))
    codes = packed.new_empty((*groups.shape[:-1], count))
    for part, target in pieces(groups, codes, keep=1):
        word = (part.to(torch.int64) << 8 * torch.arange(width, device=packed.device)).sum(-1, keepdim=True)
        target.copy_(word >> fmt.bits * torch.arange(count, device=packed.device) & ((1 << fmt.bits) - 1))
    return codes.flatten(-2)
