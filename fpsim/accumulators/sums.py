"""The operator ``fpsim::accumulate_sum``: a sum of the elements of a tensor with a narrow accumulator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator, AccumulatorLike, parse_accumulator
from fpsim.accumulators.ops import accumulate_op
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "accumulate_sum(Tensor x, int[] axes, bool keepdim, Tensor? key, str accumulator, str source) -> Tensor"
)

#: The sums of the elements of ``x`` (float32, bfloat16 or float16) along ``axes``, in float32. The elements of several
#: axes are added in row-major order. The other arguments are those of `fpsim.accumulators.ops.accumulate_op`.
accumulate_sum_op: Callable[..., Tensor] = torch.ops.fpsim.accumulate_sum.default


def parse_reduction(given: AccumulatorLike) -> Accumulator:
    """The accumulator of sums that are no products: a format with a rounding, and an order.

    Raises:
        ValueError: as `parse_accumulator`; or it is a machine, an integer or an aligned order, which add products.
    """
    accumulator = parse_accumulator(given)
    if (
        accumulator.format is None
        or accumulator.machine is not None
        or accumulator.order in ("aligned", "multiply_add")
    ):
        raise ValueError(
            f"{str(accumulator)!r} adds products, and reductions are sums of numbers: use a format with an order, such "
            "as 'e8m13', 'fp16 chunk=32' or 'bf16 order=pairwise'"
        )
    return accumulator


@torch.library.register_fake("fpsim::accumulate_sum", lib=_library)
def _accumulate_sum_fake(
    x: Tensor, axes: Sequence[int], keepdim: bool, key: Tensor | None, accumulator: str, source: str
) -> Tensor:
    counted = {axis % x.dim() for axis in axes}
    sizes = [1 if axis in counted else size for axis, size in enumerate(x.shape) if keepdim or axis not in counted]
    return x.new_empty(sizes, dtype=torch.float32)


@torch.library.impl(_library, "accumulate_sum", "CompositeExplicitAutograd")
def _accumulate_sum(
    x: Tensor, axes: Sequence[int], keepdim: bool, key: Tensor | None, accumulator: str, source: str
) -> Tensor:
    if x.dtype not in CARRIERS or not CARRIERS[x.dtype].is_subset_of(FloatFormat(8, 23)):
        raise TypeError(f"numbers to add are float32, bfloat16 or float16, got {x.dtype}")
    ones, columns, formats = product_with_ones(x, axes)
    result = accumulate_op(ones, columns, key, accumulator, *formats, source)
    counted = {axis % x.dim() for axis in axes}
    sizes = [1 if axis in counted else size for axis, size in enumerate(x.shape) if keepdim or axis not in counted]
    return result.reshape(sizes)


def product_with_ones(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """The sums of ``x`` along ``axes`` as a product: ones (1, K), the numbers (K, N), float32, and their formats."""
    summed = sorted({axis % x.dim() for axis in axes})
    kept = [axis for axis in range(x.dim()) if axis not in summed]
    count, sums = (math.prod(x.shape[axis] for axis in each) for each in (summed, kept))
    columns = x.permute(*summed, *kept).reshape(count, sums).float()
    return torch.ones(1, count, device=x.device), columns, ("e2m1fn", CARRIERS[x.dtype].name)
