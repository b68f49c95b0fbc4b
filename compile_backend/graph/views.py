"""Views and other rearrangements of a value, with which rounding commutes."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem

import torch
from torch import fx

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
