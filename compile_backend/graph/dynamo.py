"""Graphs as Dynamo passes them to a backend."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from torch import fx

from fpsim.compile_backend.graph.nodes import module_path
from fpsim.compile_backend.graph.products import LINEAR, SPLIT_IF_COMPLEX
from fpsim.policy import Policy


def all_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph, and of the bodies of its higher-order operators (a checkpointed module is one)."""
    for part in gm.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def has_layer(gm: fx.GraphModule, policy: Policy) -> bool:
    """Whether a linear layer or a convolution, which has a weight, runs under ``policy`` itself and no rule in it."""
    return any(
        getattr(node.target, "__name__", "") in LINEAR | SPLIT_IF_COMPLEX
        and policy.at(module_path(node) or "") == policy
        for node in all_nodes(gm)
    )


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed. Dynamo still reads its own graph later."""
    copy = fx.GraphModule(gm, deepcopy(gm.graph))
    copy.meta = gm.meta
    for name, body in gm.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copy, name, copied(body))
    originals = gm.graph.find_nodes(op="placeholder")
    for node, original in zip(copy.graph.find_nodes(op="placeholder"), originals, strict=True):
        if hasattr(original, "_dynamo_source"):  # the inputs of a body have none
            node._dynamo_source = original._dynamo_source
    return copy
