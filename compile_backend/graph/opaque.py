"""Operators that may hold matrix products which this backend cannot reach."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from fpsim.attention.ops import TENSORS
from fpsim.compile_backend.graph.families import is_known
from fpsim.compile_backend.graph.nodes import is_float, is_tensor, operator_name, operator_of
from fpsim.compile_backend.graph.products import product_operator
from fpsim.compile_backend.graph.recognition import is_product


def find_opaque(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The nodes whose operators may hold products that cannot be rounded, with their names."""
    return [(node, operator_name(node)) for node in graph.nodes if node.op == "call_function" and is_opaque(node)]


def is_opaque(node: fx.Node) -> bool:
    """Whether the operator of ``node`` may hold products that this backend cannot reach.

    An operator is trusted if it is in the table of products, or known to hold none. Any other operator is opaque,
    whatever the types of its inputs.
    """
    target = operator_of(node)
    if not isinstance(target, torch._ops.OperatorBase):
        return target is not getitem and any(map(is_tensor, node.all_input_nodes))  # else arithmetic of sizes
    if not isinstance(target, torch._ops.OpOverload):
        return True  # a higher-order operator
    if target in TENSORS:
        return False  # attention in tiles rounds its products itself
    if product_operator(target) is not None:
        return _has_float_result(node) and not is_product(node)
    return not is_known(target) or _weighs_embeddings(node) or _may_multiply_points(node)


def _has_float_result(node: fx.Node) -> bool:
    values = node.meta.get("val")
    return any(map(is_float, values if isinstance(values, list | tuple) else [values]))


def _weighs_embeddings(node: fx.Node) -> bool:
    """Whether ``node`` is a bag of embeddings, or its derivative, with a weight for each sample."""
    return _arguments(node).get("per_sample_weights") is not None


def _may_multiply_points(node: fx.Node) -> bool:
    """Whether ``node`` computes distances that torch may take from a product of matrices.

    Those are Euclidean distances, unless the call asks for the sums of the squared differences.
    """
    given = _arguments(node)
    return node.target is torch.ops.aten._cdist_forward.default and given["p"] == 2 and given["compute_mode"] != 2


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs
