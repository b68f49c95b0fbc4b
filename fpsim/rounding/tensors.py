"""The rounding algorithm on torch tensors, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import INTEGER_OF, grid_of, working_dtype
from fpsim.rounding.kernel import Int, round_code


class TorchOps:
    """The kernel's executor on torch tensors (`fpsim.rounding.kernel.Ops`)."""

    def __init__(self, floating: torch.dtype) -> None:
        self.floating, self.integer = floating, INTEGER_OF[floating]

    @staticmethod
    def clamp(a: Tensor, low: int | None, high: int | None) -> Tensor:
        return a.clamp(low, high)

    @staticmethod
    def larger(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    # Masks are integers, -1 or 0: comparing and selecting tensors would cost several times as much.
    @staticmethod
    def less(a: Tensor, bound: Int) -> Tensor:
        if isinstance(bound, Tensor):
            return -(a < bound).to(a.dtype)
        return a.clamp(bound - 1, bound) - bound  # after the clamp the difference cannot overflow

    @staticmethod
    def choose(mask: Tensor, a: Int, b: Int) -> Tensor:
        if isinstance(a, int) and a == 0:
            return b & ~mask
        if isinstance(b, int) and b == 0:
            return a & mask
        return b ^ ((a ^ b) & mask)

    def code_of_integer(self, a: Tensor) -> Tensor:
        return a.to(self.floating).view(self.integer)


def round_with_torch_ops(
    x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, word: Int = 0, scale: Tensor | None = None
) -> Tensor:
    """``x`` rounded by plain torch operations only. This defines the result of the operators on every device.

    Args:
        x: a tensor of a carrier dtype.
        fmt: the format.
        rounding: any rounding that `fpsim.formats.split_rounding` takes.
        overflow: one of `fpsim.formats.OVERFLOWS`.
        word: for stochastic rounding, 32-bit random words (int32) of the shape of ``x``.
        scale: None, or powers of two of the dtype of ``x``, in a shape that broadcasts to the shape of ``x``.
    """
    working = working_dtype(x.dtype)
    ops = TorchOps(working)
    code = x.to(working).view(ops.integer)
    if isinstance(word, Tensor) and ops.integer == torch.int64:
        word = word.to(torch.int64) << 32
    grid = grid_of(fmt, x.dtype, scale is not None)
    powers = None if scale is None else scale.to(working).view(ops.integer)
    return round_code(code, grid, rounding, overflow, ops, word, powers).view(working).to(x.dtype)
