"""How Inductor compiles ``fpsim::round``: as pointwise integer operations that fuse with their neighbours.

Importing this module registers the lowering. It runs `fpsim.kernel` on values of Inductor's intermediate
language, so generated code holds the same integer arithmetic as an eager call, on CPU (C++) and GPU (Triton).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import ops

from fpsim.formats import parse_format
from fpsim.kernel import Grid, round_code
from fpsim.rounding_op import CARRIERS, INTEGER_OF, grid_of, working_dtype


@dataclass(frozen=True)
class Lanes:
    """An integer value of the intermediate language, with the operators that `fpsim.kernel` uses."""

    value: Any
    dtype: torch.dtype

    def lift(self, other: Lanes | int) -> Any:
        """``other`` as a value of the intermediate language."""
        return other.value if isinstance(other, Lanes) else ops.constant(other, self.dtype)

    def apply(self, op: Any, *others: Lanes | int) -> Lanes:
        """``op(self, *others)``, of the same dtype."""
        return Lanes(op(self.value, *(self.lift(other) for other in others)), self.dtype)

    def __add__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.add, other)

    __radd__ = __add__

    def __sub__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.sub, other)

    def __rsub__(self, other: int) -> Lanes:
        return Lanes(self.lift(other), self.dtype) - self

    def __and__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_and, other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_or, other)

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_xor, other)

    def __invert__(self) -> Lanes:
        return self.apply(ops.bitwise_not)

    def __neg__(self) -> Lanes:
        return 0 - self

    def __rshift__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_right_shift, other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_left_shift, other)

    def __rlshift__(self, other: int) -> Lanes:
        return Lanes(self.lift(other), self.dtype) << self


@dataclass(frozen=True)
class LaneMask:
    """A truth value of the intermediate language."""

    value: Any

    def __and__(self, other: LaneMask) -> LaneMask:
        return LaneMask(ops.logical_and(self.value, other.value))

    def __or__(self, other: LaneMask) -> LaneMask:
        return LaneMask(ops.logical_or(self.value, other.value))

    def __invert__(self) -> LaneMask:
        return LaneMask(ops.logical_not(self.value))


class LaneOps:
    """The kernel's executor on `Lanes` (`fpsim.kernel.Ops`)."""

    def __init__(self, floating: torch.dtype) -> None:
        self.floating, self.integer = floating, INTEGER_OF[floating]

    def clamp(self, a: Lanes, low: int | None, high: int | None) -> Lanes:
        if low is not None:
            a = a.apply(ops.maximum, low)
        return a if high is None else a.apply(ops.minimum, high)

    def less(self, a: Lanes, bound: int) -> LaneMask:
        return LaneMask(ops.lt(a.value, a.lift(bound)))

    def choose(self, mask: LaneMask, a: Lanes | int, b: Lanes | int) -> Lanes:
        values = (x.value if isinstance(x, Lanes) else ops.constant(x, self.integer) for x in (a, b))
        return Lanes(ops.where(mask.value, *values), self.integer)

    def code_of_integer(self, a: Lanes) -> Lanes:
        as_float = ops.to_dtype(a.value, self.floating, src_dtype=self.integer)
        return Lanes(ops.to_dtype_bitcast(as_float, self.integer, self.floating), self.integer)


@lowering.register_lowering(torch.ops.fpsim.round.default, type_promotion_kind=None)
def _lower_round(x: ir.TensorBox, format: str, rounding: str, overflow: str, kernel: str = "") -> ir.TensorBox:
    carrier, fmt = x.get_dtype(), parse_format(format)
    working = working_dtype(carrier)
    lane_ops = LaneOps(working)
    grid = grid_of(fmt, carrier)
    load = x.make_loader()

    def rounded(index: Any) -> Any:
        value = ops.to_dtype(load(index), working, src_dtype=carrier)
        code = Lanes(ops.to_dtype_bitcast(value, lane_ops.integer, working), lane_ops.integer)
        if working != carrier:
            # Inductor keeps 16-bit intermediates in float32, unrounded: give them their own precision first.
            code = round_code(code, Grid(CARRIERS[carrier], CARRIERS[working]), "nearest_even", "ovf_inf", lane_ops)
        code = round_code(code, grid, rounding, overflow, lane_ops)
        value = ops.to_dtype_bitcast(code.value, working, lane_ops.integer)
        return ops.to_dtype(value, carrier, src_dtype=working)

    return ir.Pointwise.create(device=x.get_device(), dtype=carrier, inner_fn=rounded, ranges=list(x.get_size()))
