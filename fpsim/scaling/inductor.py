"""Inductor's lowering of the scale of a tensor: a reduction, and integer operations on its result."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import ops

import fpsim.scaling.definitions  # noqa: F401  (registers the operator)
from fpsim.rounding.carriers import CARRIERS, working_dtype
from fpsim.rounding.inductor import LaneOps, Lanes
from fpsim.scaling.rules import factor_codes

aten = torch.ops.aten


@lowering.register_lowering(torch.ops.fpsim.power_of_two_scale.default, type_promotion_kind=None)
def _lower_scale(x: ir.TensorBox, maximum: float, source: str) -> ir.TensorBox:
    dtype, device, size = x.get_dtype(), x.get_device(), [sympy.Integer(2)]
    if any(length == 0 for length in x.get_size()):
        return lowering.lowerings[aten.full.default](size, 1.0, dtype=dtype, device=device)
    amax = lowering.lowerings[aten.amax.default](lowering.lowerings[aten.abs.default](x))
    amax.realize()
    load = amax.make_loader()
    working = working_dtype(dtype)
    lane_ops = LaneOps(working)

    def factor(index: Any) -> Any:
        value = ops.to_dtype(load([]), working, src_dtype=dtype)
        code = Lanes(ops.to_dtype_bitcast(value, lane_ops.integer, working), lane_ops.integer)
        scale, inverse = factor_codes(code, maximum, CARRIERS[working], lane_ops)
        first = ops.eq(ops.index_expr(index[0], torch.int32), ops.constant(0, torch.int32))
        value = ops.to_dtype_bitcast(ops.where(first, scale.value, inverse.value), working, lane_ops.integer)
        return ops.to_dtype(value, dtype, src_dtype=working)

    factors = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=factor, ranges=size)
    factors.realize()  # compute them once, not for every element that is scaled
    return factors
