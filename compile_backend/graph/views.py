"""Views and other rearrangements of a value, with which rounding commutes."""

from __future__ import annotations

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


def base(node: fx.Node) -> fx.Node:
    """The value that ``node`` rearranges; ``node`` itself if it is no rearrangement."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
