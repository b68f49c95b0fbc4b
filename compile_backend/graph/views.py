"""Views and other rearrangements of a value, with which rounding commutes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from operator import getitem
from typing import cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

#: Operators that only rearrange their first operand: rounding commutes with them.
VIEWS = frozenset(
    {
        aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.t, aten.transpose, aten.unsqueeze,
        aten.squeeze, aten.expand, aten.alias, aten.detach, aten.clone,
    }
)  # fmt: skip


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` only rearranges its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in VIEWS


def mapped_axes(view: fx.Node, axes: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of the base that are the axes ``axes`` of a view; None if the view splits, joins or reorders them.

    An axis of the view is one of the base if both have the same length, and the elements before and after it are the
    same. Axes are counted from the front.
    """
    if not axes:
        return ()
    shape, base_shape = view.meta["val"].shape, view.args[0].meta["val"].shape  # type: ignore[union-attr]
    match view.target.overloadpacket:  # type: ignore[union-attr]
        case aten.alias | aten.detach | aten.clone:
            return tuple(axes)
        case aten.expand:
            mapped = tuple(axis - (len(shape) - len(base_shape)) for axis in axes)
            return mapped if min(mapped) >= 0 else None
        case aten.t:
            order = list(reversed(range(len(shape))))
        case aten.permute:
            order = [axis % len(shape) for axis in cast(list[int], view.args[1])]
        case aten.transpose:
            order = list(range(len(shape)))
            first, second = (axis % len(shape) for axis in cast(tuple[int, int], view.args[1:]))
            order[first], order[second] = order[second], order[first]
        case _:
            return _axes_of_same_elements(shape, base_shape, axes)
    mapped = tuple(order[axis] for axis in axes)
    return mapped if list(mapped) == sorted(mapped) else None


def _axes_of_same_elements(shape: torch.Size, base_shape: torch.Size, axes: Sequence[int]) -> tuple[int, ...] | None:
    """`mapped_axes` for views that keep the elements in row-major order."""
    mapped = []
    for axis in axes:
        for other, length in enumerate(base_shape):
            before = statically_known_true(prod(shape[:axis]) == prod(base_shape[:other]))
            if before and statically_known_true(shape[axis] == length) and length != 1:
                mapped.append(other)
                break
        else:
            return None
    return tuple(mapped)


def rearrangements(node: fx.Node) -> Iterator[fx.Node]:
    """``node``, the value that it rearranges if it is a rearrangement, and so on up to a value that is none."""
    yield node
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
        yield node


def base(node: fx.Node) -> fx.Node:
    """The value that ``node`` rearranges; ``node`` itself if it is no rearrangement."""
    return list(rearrangements(node))[-1]


#: Operators that select elements of their first operand, or convert them to another type.
_SELECTIONS = frozenset(
    {
        aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.narrow, aten.diagonal,
        aten._to_copy, torch.ops.prims.convert_element_type, torch.ops.prims.device_put,
    }
)  # fmt: skip


def whole(node: fx.Node) -> fx.Node:
    """The value of which ``node`` is a part: selected, rearranged or converted; ``node`` itself if it is none."""
    while is_view(node) or node.target is getitem or getattr(node.target, "overloadpacket", None) in _SELECTIONS:
        node = node.args[0]  # type: ignore[assignment]
    return node
