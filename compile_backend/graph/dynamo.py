"""Graphs as Dynamo passes them to a backend."""

from __future__ import annotations

from copy import deepcopy

from torch import fx


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed. Dynamo still reads its own graph later."""
    copy = fx.GraphModule(gm, deepcopy(gm.graph))
    copy.meta = gm.meta
    originals = gm.graph.find_nodes(op="placeholder")
    for node, original in zip(copy.graph.find_nodes(op="placeholder"), originals, strict=True):
        node._dynamo_source = original._dynamo_source
    return copy
