"""The metadata of nodes: their fake values, and the memory that these share."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves


def describe(node: fx.Node) -> None:
    """Give a new node the metadata that later passes read: its fake value and its original operator."""
    node.meta["val"] = value_of(node)
    node.meta["original_aten"] = node.target


def value_of(node: fx.Node) -> Any:
    """The result of ``node`` as a fake tensor."""
    arguments, named = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    fakes = [argument for argument in arguments if isinstance(argument, torch._subclasses.FakeTensor)]
    mode = (
        fakes[0].fake_mode if fakes else torch._guards.detect_fake_mode([n.meta.get("val") for n in node.graph.nodes])
    )
    with mode or torch._subclasses.FakeTensorMode():
        return node.target(*arguments, **named)  # type: ignore[operator]


def is_alias(node: fx.Node) -> bool:
    """Whether the value of ``node`` shares memory with one of its inputs, according to their metadata."""
    if node.op != "call_function":
        return False
    return not _storages([node]).isdisjoint(_storages(node.all_input_nodes))


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    values = tree_leaves([node.meta.get("val") for node in nodes])
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor) and x.layout == torch.strided}


def update_aliases(graph: fx.Graph, views: set[fx.Node]) -> None:
    """Update the metadata of ``views`` whose base is now a rounded value, so that they share its memory.

    AOTAutograd reads from the metadata which tensors saved for backward share no memory with tensors of the user.
    Inductor reuses the memory of these in backward.
    """
    for node in graph.nodes:
        if node in views and not is_alias(node):
            node.meta["val"] = value_of(node)


def order_in_memory(value: fx.Node) -> list[int] | None:
    """The order in memory of the dimensions of one result of an opaque operator (attention); None for the usual order.

    Inductor lays out the result of a rounding in the usual order. A view of the operator's result would then become a
    copy.
    """
    tensor = value.meta["val"]
    if value.target is not operator.getitem or not all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else None
