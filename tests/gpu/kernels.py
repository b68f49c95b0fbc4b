"""A Triton kernel like a user's, with fpsim's rounding inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpsim.triton import fpsim_round


@triton.jit
def rounding_kernel(
    x, out, count, FORMAT: tl.constexpr, ROUNDING: tl.constexpr, OVERFLOW: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    rounded = fpsim_round(tl.load(x + index, mask=inside, other=0.0), FORMAT, ROUNDING, OVERFLOW)
    tl.store(out + index, rounded, mask=inside)


def rounded_in_a_kernel(x: Tensor, format: str, rounding: str, overflow: str, *, block: int = 4096) -> Tensor:
    """``x``, which must be contiguous, rounded by `rounding_kernel`."""
    out = torch.empty_like(x)
    rounding_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), format, rounding, overflow, block)
    return out
