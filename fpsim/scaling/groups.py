"""Splitting a tensor into the groups of elements that share a scale.

A `Call` runs an operator of aten. Tensors and Inductor's lowerings both go through the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fpsim.scaling.scale import Scale

aten = torch.ops.aten


class Call(Protocol):
    """Runs operators on tensors, or on values that stand for them."""

    def __call__(self, operator: Any, *arguments: Any) -> Any:
        """``operator(*arguments)``, for an overload of aten, prims or fpsim."""

    def shape(self, x: Any) -> Sequence[Any]:
        """The shape of ``x``; sizes may be symbolic."""

    def blocks(self, length: Any, size: int) -> tuple[Any, Any]:
        """The number of blocks of ``size`` in an axis, and the number of zeros that fill the last one."""

    def stored(self, x: Any) -> Any:
        """``x``, computed once and in its own dtype, if a compiler would compute it again or in a wider type."""

    def constant(self, value: float, like: Any) -> Any:
        """A float32 number on the device of ``like``, as a value without axes."""

    def step_function(self, y: Any, thresholds: Sequence[float], values: Sequence[float], dtype: torch.dtype) -> Any:
        """The value at index n, for each of the numbers ``y`` of ``dtype``; n ascending thresholds are at most it."""


class OnTensors:
    """Runs operators on tensors."""

    def __call__(self, operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    def shape(self, x: torch.Tensor) -> Sequence[int]:
        return x.shape

    def blocks(self, length: int, size: int) -> tuple[int, int]:
        return -(-length // size), -length % size

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def constant(self, value: float, like: torch.Tensor) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float32, device=like.device)

    def step_function(
        self, y: torch.Tensor, thresholds: Sequence[float], values: Sequence[float], dtype: torch.dtype
    ) -> torch.Tensor:
        limits, results = (torch.tensor(each, dtype=dtype, device=y.device) for each in (thresholds, values))
        return results[torch.bucketize(y, limits, right=True)]


@dataclass(frozen=True)
class Groups:
    """A tensor arranged so that the elements that share a scale lie along some of its axes.

    Attributes:
        values: the arranged tensor. Zeros fill the last block of an axis.
        axes: the axes along which the elements share a scale.
        restore: rearranges a tensor like ``values`` into the shape of the original.
        splits: whether these axes are parts of axes of the tensor.
    """

    values: Any
    axes: list[int]
    restore: Callable[[Any], Any]
    splits: bool = False


def across(axis: int, dims: int) -> int:
    """The axis that forms matrices with ``axis``: the other one of the last two, else the one before, else 1."""
    if axis >= dims - 2:
        return 2 * dims - 3 - axis
    return axis - 1 if axis else 1


def split(x: Any, scale: Scale, axes: Sequence[int], call: Call) -> Groups:
    """``x`` arranged into the groups of ``scale``.

    Args:
        x: a tensor, or a value that stands for one.
        axes: the axes along which a product sums; blocks run over them in row-major order. If there is none, every
            element is a group of its own.

    Raises:
        ValueError: the tensor lacks an axis.
    """
    dims = len(call.shape(x))
    if scale.has_axis and any(not -dims <= axis < dims for axis in axes):
        raise ValueError(f"scale {str(scale)!r} lies along {tuple(axes)}, and a tensor has only {dims} axes")
    if not dims:
        return Groups(call(aten.reshape.default, x, [1]), [0], lambda y: call(aten.reshape.default, y, []))
    axes = sorted({axis % dims for axis in axes})
    if scale.kind == "tensor":
        return Groups(x, list(range(dims)), lambda y: y)
    if scale.kind == "group":
        return _in_blocks(x, call(aten.reshape.default, x, [-1]), {0: scale.sizes[0]}, call)
    if scale.kind == "channel":
        return split(x, Scale(scale.rule, "row"), range(1, dims), call)
    if not axes:
        return Groups(call(aten.unsqueeze.default, x, dims), [dims], lambda y: call(aten.squeeze.dim, y, dims), True)
    if scale.kind == "row":
        return Groups(x, list(axes), lambda y: y)
    if len(axes) > 1:
        return _joined(x, scale, axes, call)
    axis = axes[0]
    other = across(axis, dims) if dims > 1 else None
    if scale.kind == "column":
        return split(x, Scale(scale.rule, "row"), [] if other is None else [other], call)
    sizes = {axis: scale.sizes[-1]}
    if scale.kind == "tile" and other is not None:
        sizes[other] = scale.sizes[0]
    return _in_blocks(x, x, sizes, call)


def _joined(x: Any, scale: Scale, axes: Sequence[int], call: Call) -> Groups:
    """`split` along several axes, which become one axis at the end."""
    shape = list(call.shape(x))
    order = [axis for axis in range(len(shape)) if axis not in axes] + list(axes)
    moved = call(aten.permute.default, x, order)
    ordered = [shape[axis] for axis in order]
    flat = call(aten.reshape.default, moved, [*ordered[: len(order) - len(axes)], -1])
    groups = split(flat, scale, [len(call.shape(flat)) - 1], call)

    def restore(y: Any) -> Any:
        y = call(aten.reshape.default, groups.restore(y), ordered)
        return call(aten.permute.default, y, [order.index(axis) for axis in range(len(order))])

    return Groups(groups.values, groups.axes, restore, groups.splits)


def _in_blocks(original: Any, x: Any, sizes: dict[int, int], call: Call) -> Groups:
    """``x`` with every axis in ``sizes`` split into blocks of that size."""
    shape = list(call.shape(x))
    padding = [0] * (2 * len(shape))
    arranged: list[Any] = []
    inner: list[int] = []
    for axis, length in enumerate(shape):
        if axis not in sizes:
            arranged.append(length)
            continue
        size = sizes[axis]
        if isinstance(length, int) and length < size:
            size = max(length, 1)
        count, padding[2 * (len(shape) - 1 - axis) + 1] = call.blocks(length, size)
        inner.append(len(arranged) + 1)
        arranged += [count, size]
    padded = call(aten.constant_pad_nd.default, x, padding) if any(p != 0 for p in padding) else x
    values = call(aten.reshape.default, padded, arranged)

    def restore(y: Any) -> Any:
        # Inductor splits a loop over an axis into blocks, and leaves out the elements of a last block that is not full.
        y = y if padded is x else call.stored(y)
        y = call(aten.reshape.default, y, list(call.shape(padded)))
        if padded is not x:
            for axis, length in enumerate(shape):
                y = call(aten.slice.Tensor, y, axis, 0, length)
        return y if original is x else call(aten.reshape.default, y, list(call.shape(original)))

    return Groups(values, inner, restore, True)


def count(shape: Sequence[int], scale: Scale, axes: Sequence[int]) -> int:
    """The number of groups of elements that share a scale in a tensor of this shape."""
    x = torch.empty(shape, device="meta")
    if x.numel() == 0:
        return 0
    groups = split(x, scale, axes, OnTensors())
    return math.prod(size for axis, size in enumerate(groups.values.shape) if axis not in groups.axes)
