"""Marks in a traced graph: an identity at the end of an operation, with the operator's name.

They are put in while a graph is traced (`fpsim.compile_backend.graph.operations`) and taken out by the rounding pass.
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
    """The marks in ``graph``, in its order."""
    return graph.find_nodes(op="call_function", target=mark)


def replace_mark(node: fx.Node, value: fx.Node) -> None:
    """Put ``value`` in the place of a mark."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
