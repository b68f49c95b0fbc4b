"""Inductor's lowering of the scale of a tensor: a reduction, and integer operations on its result."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import ops

import fpsim.scaling.definitions  # noqa: F401  (registers the operator)
from fpsim.formats import parse_format
from fpsim.rounding.carriers import CARRIERS, working_dtype
from fpsim.rounding.inductor import LaneOps, Lanes
from fpsim.rounding.kernel import Grid, round_code
from fpsim.scaling.rules import power_of_two_code

aten = torch.ops.aten


@lowering.register_lowering(torch.ops.fpsim.power_of_two_scale.default, type_promotion_kind=None)
def _lower_scale(x: ir.TensorBox, format: str, source: str) -> ir.TensorBox:
    dtype, device, fmt = x.get_dtype(), x.get_device(), parse_format(format)
    if any(length == 0 for length in x.get_size()):
        return lowering.lowerings[aten.full.default]([], 1.0, dtype=dtype, device=device)
    working = working_dtype(dtype)
    lane_ops = LaneOps(working)
    load_x = x.make_loader()

    def magnitude(index: Any) -> Any:
        value = ops.to_dtype(load_x(index), working, src_dtype=dtype)
        code = Lanes(ops.to_dtype_bitcast(value, lane_ops.integer, working), lane_ops.integer)
        return (code & (CARRIERS[working].sign_code - 1)).value

    # The codes of magnitudes are in their order. A comparison of floats would take subnormals for zeros where the
    # process does so.
    codes = ir.Pointwise.create(device=device, dtype=lane_ops.integer, inner_fn=magnitude, ranges=list(x.get_size()))
    amax = lowering.lowerings[aten.amax.default](codes)
    amax.realize()
    load = amax.make_loader()

    def scale(index: Any) -> Any:
        code = Lanes(load([]), lane_ops.integer)
        if working != dtype:
            # Inductor keeps 16-bit intermediates in float32, unrounded: round the largest to its own dtype first.
            code = round_code(code, Grid(CARRIERS[dtype], CARRIERS[working]), "nearest_even", "ovf_inf", lane_ops)
        code = power_of_two_code(code, fmt, CARRIERS[working], lane_ops)
        value = ops.to_dtype_bitcast(code.value, working, lane_ops.integer)
        return ops.to_dtype(value, dtype, src_dtype=working)

    result = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=scale, ranges=[])
    result.realize()  # compute it once, not for every element that is scaled
    return result
