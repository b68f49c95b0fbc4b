"""Inductor's lowering of rotations along an axis that is not the last one: one kernel instead of one per stage."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.ops import SOURCE
from fpsim.transforms.definitions import named
from fpsim.transforms.hadamard import Hadamard, factor_of, inverse_root, signs_of

aten = torch.ops.aten
_operand = torch.ops.fpsim.transform_operand.default

#: The largest block that is rotated in one kernel, which reads every element this number of times.
_LARGEST = 32

_fallback = lowering.fallback_handler(_operand, add_to_fallback_set=False)


@lowering.register_lowering(_operand, type_promotion_kind=None)
def _lower_operand(
    x: ir.TensorBox, transform: str, number: int, axis: int, source: str, parameters: ir.TensorBox | None = None
) -> Any:
    parsed, shape = named(transform), list(x.get_size())
    if not isinstance(parsed, Hadamard) or not _is_fast(parsed, shape, axis % len(shape)):
        return _fallback(x, transform, number, axis, source, parameters)
    return _rotated(x, parsed, shape, axis % len(shape))


def _is_fast(hadamard: Hadamard, shape: list[Any], axis: int) -> bool:
    n = hadamard.size
    if n is None or not 1 < n <= _LARGEST or factor_of(n) > 1 or any(length == 0 for length in shape):
        return False
    return axis < len(shape) - 1 and V.graph.sizevars.statically_known_multiple_of(shape[axis], n)


def _rotated(x: ir.TensorBox, hadamard: Hadamard, shape: list[Any], axis: int) -> ir.TensorBox:
    n, dtype, working = hadamard.size, x.get_dtype(), working_dtype(x.get_dtype())
    assert n is not None, "only blocks are rotated here"
    x.realize()
    load = x.make_loader()
    signs = signs_of(hadamard.signs, n)

    def rotated(index: Any) -> Any:
        before, block, place, after = index[:axis], index[axis], index[axis + 1], index[axis + 2 :]
        values = []
        for j in range(n):
            value = ops.to_dtype(load([*before, block * n + j, *after]), working, src_dtype=dtype)
            values.append(ops.neg(value) if signs and signs[j] < 0 else value)
        h = 1
        while h < n:
            # A product with 1 or -1 is exact: a fused multiplication and addition gives the bits of the two.
            sign = ops.to_dtype(ops.index_expr(1 - 2 * ModularIndexing(place, h, 2), torch.int32), working)
            values = [ops.add(a, ops.mul(sign, b)) for a, b in zip(values[::2], values[1::2], strict=True)]
            h *= 2
        return ops.mul(values[0], ops.constant(inverse_root(n), working))

    ranges = [*shape[:axis], FloorDiv(shape[axis], n), n, *shape[axis + 1 :]]
    result = ir.Pointwise.create(device=x.get_device(), dtype=working, inner_fn=rotated, ranges=ranges)
    result.realize()
    result = lowering.lowerings[aten.reshape.default](result, shape)
    if hadamard.bf16:
        return lowering.lowerings[torch.ops.fpsim.round.default](result, "e8m7", "nearest_even", "ovf_inf", SOURCE)
    return result
