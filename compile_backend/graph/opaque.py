"""Operators that may hold matrix products which this backend cannot reach."""

from __future__ import annotations

import torch
from torch import fx

from fpsim.compile_backend.graph.nodes import has_floats, operator_name, operator_of
from fpsim.compile_backend.graph.products import opaque_family
from fpsim.compile_backend.graph.recognition import is_product

#: Namespaces whose operators hold no products besides those of the table.
_TRANSPARENT_NAMESPACES = frozenset(
    {"aten", "prims", "fpsim", "inductor", "inductor_prims", "rngprims", "_c10d_functional", "c10d_functional"}
)


def find_opaque(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The nodes whose operators may hold floating-point products that cannot be rounded, with their names."""
    return [
        (node, name)
        for node in graph.nodes
        if node.op == "call_function" and has_floats(node) and (name := operator_name(node)) and is_opaque(node)
    ]


def is_opaque(node: fx.Node) -> bool:
    """Whether the operator of ``node`` may hold products that this backend cannot reach."""
    target = operator_of(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(target, torch._ops.OpOverload) or is_product(node):
        return False
    hidden = opaque_family(operator_name(node)) is not None or _weighs_embeddings(node)
    return target.namespace not in _TRANSPARENT_NAMESPACES or hidden


def _weighs_embeddings(node: fx.Node) -> bool:
    """Whether ``node`` is a bag of embeddings, or its derivative, with a weight for each sample."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("per_sample_weights") is not None
