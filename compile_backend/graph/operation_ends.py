"""Marks in a traced graph. A mark is an identity at the end of an operation; it holds the operator's name.

Tracing inserts the marks (`fpsim.compile_backend.graph.operations`), and the rounding pass removes them.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor import lowering
from torch._ops import OpOverload

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("mark(Tensor x, str operator) -> Tensor")
_library.impl("mark", lambda x, operator: x.clone(), "CompositeExplicitAutograd")
_library._register_fake("mark", lambda x, operator: torch.empty_like(x))

#: The identity of a tensor ``x``, at the end of ``operator``.
mark: OpOverload = torch.ops.fpsim.mark.default
lowering.register_lowering(mark, type_promotion_kind=None)(lambda x, operator: x)


def find_marks(graph: fx.Graph) -> list[fx.Node]:
    """The marks in ``graph``, in the order of its nodes."""
    return graph.find_nodes(op="call_function", target=mark)


def replace_mark(node: fx.Node, value: fx.Node) -> None:
    """Replace a mark by ``value``."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
