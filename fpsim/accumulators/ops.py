"""The operator ``fpsim::accumulate_mm``: a product of matrices, or of batches of matrices, with a narrow accumulator.

It has kernels for CPUs and GPUs, and a rule for shapes. Like the rounding operators it has no derivative: callers give
it detached tensors, and the compiler backend inserts it after autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.accumulators.product import accumulate
from fpsim.accumulators.shapes import each_sample
from fpsim.formats import parse_format
from fpsim.rounding.carriers import CARRIERS

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "accumulate_mm(Tensor a, Tensor b, Tensor? key, str accumulator, str first, str second, str source) -> Tensor"
)
_library.define(
    "accumulate_grouped_mm(Tensor a, Tensor b, Tensor ends, Tensor? key, Tensor? scales_a, Tensor? scales_b, "
    "int block, str accumulator, str first, str second, str source) -> Tensor"
)
_library.define(
    "accumulate_scaled_mm(Tensor a, Tensor b, Tensor scales_a, Tensor scales_b, int block, str accumulator, str first, "
    "str second, str source) -> Tensor"
)

#: The product of ``a`` (M, K) and ``b`` (K, N), or of batches of these, in their dtype. ``accumulator`` is the text of
#: an `Accumulator`, ``first`` and ``second`` are the names of formats that have all values of the operands, ``key`` is
#: that of stochastic rounding or None, and ``source`` is `fpsim.rounding.ops.SOURCE`.
accumulate_op: Callable[..., Tensor] = torch.ops.fpsim.accumulate_mm.default

#: The same for elements of which every ``block`` along the summed axis share a scale, float32: (M, blocks) and
#: (blocks, N), or batches of these. The scales join the sums of a machine that takes them, and else multiply the
#: partial sum of every block (`fpsim.accumulators.scaled`).
accumulate_scaled_op: Callable[..., Tensor] = torch.ops.fpsim.accumulate_scaled_mm.default

#: Products of groups, as `torch.nn.functional.grouped_mm` has them: ``ends``, int32, are the ends of the groups along
#: the rows of ``a`` (T, K), with ``b`` (groups, K, N); along the columns of ``b`` (K, T), with ``a`` (groups, M, K); or
#: along the axis that is summed, of ``a`` (M, T) and ``b`` (T, N). Elements outside of all groups are 0. With scales,
#: as above, groups along the summed axis end where blocks do.
accumulate_grouped_op: Callable[..., Tensor] = torch.ops.fpsim.accumulate_grouped_mm.default


@torch.library.register_fake("fpsim::accumulate_mm", lib=_library)
def _accumulate_fake(
    a: Tensor, b: Tensor, key: Tensor | None, accumulator: str, first: str, second: str, source: str
) -> Tensor:
    _check_operands(a, b)
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@torch.library.impl(_library, "accumulate_mm", "CompositeExplicitAutograd")
def _accumulate(
    a: Tensor, b: Tensor, key: Tensor | None, accumulator: str, first: str, second: str, source: str
) -> Tensor:
    _check_operands(a, b)
    formats = parse_format(first), parse_format(second)
    left, right = (x if x.dim() == 3 else x.unsqueeze(0) for x in (a, b))
    product = accumulate(left, right, parse_accumulator(accumulator), *formats, key)
    return product if a.dim() == 3 else product.squeeze(0)


@torch.library.register_fake("fpsim::accumulate_scaled_mm", lib=_library)
def _accumulate_scaled_fake(a: Tensor, b: Tensor, *others: Any) -> Tensor:
    _check_operands(a, b)
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@torch.library.impl(_library, "accumulate_scaled_mm", "CompositeExplicitAutograd")
def _accumulate_scaled(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    block: int,
    accumulator: str,
    first: str,
    second: str,
    source: str,
) -> Tensor:
    _check_operands(a, b)
    formats = parse_format(first), parse_format(second)
    left, right, *scales = (x if x.dim() == 3 else x.unsqueeze(0) for x in (a, b, scales_a, scales_b))
    pair = (scales[0], scales[1])
    product = accumulate(left, right, parse_accumulator(accumulator), *formats, None, pair, block)
    return product if a.dim() == 3 else product.squeeze(0)


@torch.library.register_vmap("fpsim::accumulate_scaled_mm", lib=_library)
def _accumulate_scaled_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    return each_sample(accumulate_scaled_op, info.batch_size, in_dims, arguments)


@torch.library.register_fake("fpsim::accumulate_grouped_mm", lib=_library)
def _accumulate_grouped_fake(a: Tensor, b: Tensor, ends: Tensor, *others: Any) -> Tensor:
    return a.new_empty(_shape_of_groups(a, b, ends))


@torch.library.impl(_library, "accumulate_grouped_mm", "CompositeExplicitAutograd")
def _accumulate_grouped(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    key: Tensor | None,
    scales_a: Tensor | None,
    scales_b: Tensor | None,
    block: int,
    accumulator: str,
    first: str,
    second: str,
    source: str,
) -> Tensor:
    result = a.new_zeros(_shape_of_groups(a, b, ends))
    arguments = parse_accumulator(accumulator), parse_format(first), parse_format(second), key
    for group in groups_of(a, b, ends, scales_a, scales_b, block):
        product = accumulate(group.a, group.b, *arguments, group.scales, block, group.element)
        result[group.place] = product.squeeze(0)
    return result


@dataclass(frozen=True)
class Group:
    """One product of groups.

    Attributes:
        a, b: the operands, (1, M, K) and (1, K, N).
        scales: those of their blocks, or None.
        element: the number of the first element of its result, on which random numbers depend.
        place: the index of its result in the result of all groups.
    """

    a: Tensor
    b: Tensor
    scales: tuple[Tensor, Tensor] | None
    element: int
    place: Any


def groups_of(
    a: Tensor, b: Tensor, ends: Tensor, scales_a: Tensor | None, scales_b: Tensor | None, block: int
) -> Iterator[Group]:
    """The products of `accumulate_grouped_op`.

    Raises:
        ValueError: a group along the summed axis ends within a block whose elements share a scale.
    """
    shape, stops = _shape_of_groups(a, b, ends), ends.tolist()
    place: tuple[Any, ...]
    for number, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        scales = None
        if scales_a is not None and scales_b is not None:
            if a.dim() == b.dim() and stop % block and stop < a.shape[1]:
                raise ValueError(
                    f"a group ends after {stop} elements, within a block of {block} that share a scale: pad groups to "
                    f"multiples of {block}"
                )
            scales = _part(scales_a, scales_b, number, (start, stop), (start // block, -(-stop // block)))
        operands = _part(a, b, number, (start, stop), (start, stop))
        if a.dim() == b.dim():
            element, place = number * shape[1] * shape[2], (number,)
        elif a.dim() == 2:
            element, place = start * shape[1], (slice(start, stop),)
        else:
            element, place = start * shape[0], (slice(None), slice(start, stop))
        yield Group(*operands, scales, element, place)


def _part(a: Tensor, b: Tensor, number: int, free: tuple[int, int], summed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The operands of one group, which begins and ends at ``free`` along an axis of the result, or at ``summed``."""
    part, along = slice(*free), slice(*summed)
    if a.dim() == b.dim():
        a, b = a[:, along], b[along]
    else:
        a, b = (a[part], b[number]) if a.dim() == 2 else (a[number], b[:, part])
    return a.unsqueeze(0), b.unsqueeze(0)


def _shape_of_groups(a: Tensor, b: Tensor, ends: Tensor) -> tuple[int, ...]:
    if a.dtype not in CARRIERS or a.dtype != b.dtype:
        raise TypeError(f"operands have one dtype, a floating-point carrier, got {a.dtype} and {b.dtype}")
    dims = a.dim(), b.dim()
    if dims not in ((2, 3), (3, 2), (2, 2)) or a.shape[-1] != b.shape[-2] or ends.dim() != 1:
        raise ValueError(f"shapes {tuple(a.shape)}, {tuple(b.shape)} and {tuple(ends.shape)} are none of groups")
    if dims == (2, 2):
        return ends.shape[0], a.shape[0], b.shape[1]
    return (a.shape[0], b.shape[2]) if dims == (2, 3) else (a.shape[1], b.shape[1])


@torch.library.register_vmap("fpsim::accumulate_mm", lib=_library)
def _accumulate_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    a: Tensor,
    b: Tensor,
    key: Tensor | None,
    accumulator: str,
    first: str,
    second: str,
    source: str,
) -> tuple[Tensor, int]:
    """The batch becomes one of matrices. With one key every sample has draws of its own."""
    if in_dims[2] is not None:
        raise NotImplementedError(
            f"accumulator {accumulator!r} under torch.vmap takes one seed for all samples, got {info.batch_size}: give "
            "all of them one seed, with which each draws numbers of its own, or call it in a loop"
        )
    samples = [
        (x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape))
        for x, dim in zip((a, b), in_dims[:2], strict=True)
    ]
    left, right = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in samples)
    product = accumulate_op(left, right, key, accumulator, first, second, source)
    return product.reshape(*samples[0].shape[:-1], product.shape[-1]), 0


def _check_operands(a: Tensor, b: Tensor) -> None:
    if a.dtype not in CARRIERS or a.dtype != b.dtype:
        raise TypeError(f"operands have one dtype, a floating-point carrier, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"operands are on one device, got {a.device} and {b.device}")
    if a.dim() not in (2, 3) or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied: (M, K) and (K, N)")
