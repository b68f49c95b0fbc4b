"""Inductor's lowering of rotations along an axis that is not the last one: one kernel instead of one per stage."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv

from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.ops import SOURCE
from fpsim.transforms.definitions import named
from fpsim.transforms.hadamard import Hadamard, factor_of, inverse_root, signs_of

_operand = torch.ops.fpsim.transform_operand.default

#: The largest block whose elements are in registers at the same time.
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


@ir.ir_dataclass
class _Blocks(ir.Pointwise):
    """Operations that compute all elements of a block along an axis together. Their loops go over blocks.

    ``inner_fn`` returns the ``length`` values of the block at an index.
    """

    axis: int
    length: int

    def get_size(self) -> list[Any]:
        return [size * self.length if i == self.axis else size for i, size in enumerate(self.ranges)]

    def store_output(self, output_name: str | None, indexer: Any, vars: Any) -> Any:
        for j, value in enumerate(self.inner_fn(vars)):
            index = [self.length * i + j if axis == self.axis else i for axis, i in enumerate(vars)]
            ops.store(output_name or "unnamed", indexer(index), value)


def _rotated(x: ir.TensorBox, hadamard: Hadamard, shape: list[Any], axis: int) -> ir.TensorBox:
    n, dtype, working = hadamard.size, x.get_dtype(), working_dtype(x.get_dtype())
    assert n is not None, "only blocks are rotated here"
    x.realize()
    load = x.make_loader()
    signs = signs_of(hadamard.signs, n)

    def rotated(index: Any) -> list[Any]:
        before, block, after = index[:axis], index[axis], index[axis + 1 :]
        values = [ops.to_dtype(load([*before, block * n + j, *after]), working, src_dtype=dtype) for j in range(n)]
        values = [ops.neg(value) if signs and signs[j] < 0 else value for j, value in enumerate(values)]
        h = 1
        while h < n:
            values = [
                ops.sub(values[j - h], values[j]) if j & h else ops.add(values[j], values[j + h]) for j in range(n)
            ]
            h *= 2
        return [ops.mul(value, ops.constant(inverse_root(n), working)) for value in values]

    ranges = [*shape[:axis], FloorDiv(shape[axis], n), *shape[axis + 1 :]]
    result = _Blocks.create(device=x.get_device(), dtype=working, inner_fn=rotated, ranges=ranges, axis=axis, length=n)
    result.realize()
    if hadamard.bf16:
        return lowering.lowerings[torch.ops.fpsim.round.default](result, "e8m7", "nearest_even", "ovf_inf", SOURCE)
    return result
