"""The sources of each value in a graph: the kinds of parameters, buffers, inputs and gradients that it depends on."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import NNModuleSource, UnspecializedNNModuleSource

from fpsim.compile_backend.graph.nodes import is_float
from fpsim.compile_backend.graph.products import Multiplication
from fpsim.compile_backend.graph.recognition import has_weight, multiplication_of, operands_of


class Source(enum.Flag):
    """The kinds of graph inputs that a value depends on."""

    NONE = 0
    PARAMETER = enum.auto()
    BUFFER = enum.auto()
    INPUT = enum.auto()  #: a floating-point input of the model
    INTEGER_INPUT = enum.auto()
    TANGENT = enum.auto()  #: a gradient that comes from outside the graph
    PRODUCT = enum.auto()  #: the result of a matrix product that belongs to no table of constants
    LAYER = enum.auto()  #: the result of a linear layer or a convolution


#: The sources that vary. A value with none of these belongs to the definition of the model, like a table of angles.
VARIABLE = Source.PARAMETER | Source.INPUT | Source.TANGENT | Source.PRODUCT | Source.LAYER


def sources_of_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Source]:
    """The sources of the inputs of a Dynamo graph, in their order."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [_source(node, value) for node, value in zip(placeholders, example_inputs, strict=True)]


def _source(node: fx.Node, value: Any) -> Source:
    if isinstance(value, torch.nn.Parameter):
        return Source.PARAMETER
    if not isinstance(value, torch.Tensor):
        return Source.NONE
    if _is_of_module(getattr(node, "_dynamo_source", None)):
        return Source.BUFFER
    return Source.INPUT if value.is_floating_point() or value.is_complex() else Source.INTEGER_INPUT


def _is_of_module(origin: Any) -> bool:
    """Whether Dynamo took an input from a module: from its buffers, or from another of its attributes."""
    while origin is not None and not isinstance(origin, UnspecializedNNModuleSource | NNModuleSource):
        origin = getattr(origin, "base", None)
    return origin is not None


def find_sources(graph: fx.Graph, input_sources: Sequence[Source]) -> dict[fx.Node, Source]:
    """The sources of every node of ``graph``; ``input_sources``: the kinds of the inputs of the traced function."""
    sources: dict[fx.Node, Source] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            sources[node] = _placeholder_source(node, input_sources)
        elif node.op == "get_attr":
            sources[node] = Source.BUFFER
        else:
            result = Source.NONE
            for argument in node.all_input_nodes:
                result |= sources[argument]
            multiplication = multiplication_of(node)
            if multiplication is not None and not is_constant(node, multiplication, sources):
                result |= Source.LAYER if has_weight(node, multiplication) else Source.PRODUCT
            sources[node] = result
    return sources


def is_constant(node: fx.Node, multiplication: Multiplication, sources: Mapping[fx.Node, Source]) -> bool:
    """Whether the product whose value is ``node`` belongs to a table that the model computes from constants alone.

    Integers that the model is given vary, unless the product is an outer one: then they are positions, of which the
    model makes a table of angles.
    """
    first, second = operands_of(node, multiplication)
    source = sources[first] | sources[second]
    if source & VARIABLE:
        return False
    return not source & Source.INTEGER_INPUT or (
        _is_outer(first, multiplication) and not has_weight(node, multiplication)
    )


def _is_outer(first: fx.Node, multiplication: Multiplication) -> bool:
    shape = first.meta["val"].shape
    return all(shape[axis] == 1 for axis in multiplication.contracted[0])


def _placeholder_source(node: fx.Node, input_sources: Sequence[Source]) -> Source:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return Source.NONE  # sizes
    description: Any = node.meta.get("desc")
    while hasattr(description, "base"):  # a view or a subclass: go to the tensor that it was made of
        description = description.base
    name = type(description).__name__
    if name == "TangentAOTInput":
        return Source.TANGENT
    if name == "ParamAOTInput":
        return Source.PARAMETER
    if name == "BufferAOTInput":
        return Source.BUFFER
    if name == "PlainAOTInput":
        return input_sources[description.idx]
    return Source.INPUT if is_float(value) else Source.INTEGER_INPUT


def is_backward(node: fx.Node, sources: Mapping[fx.Node, Source]) -> bool:
    """Whether ``node`` belongs to the backward pass."""
    return bool(sources[node] & Source.TANGENT) or node.meta.get("partitioner_tag") == "is_backward"


def forward_by_number(graph: fx.Graph, sources: Mapping[fx.Node, Source]) -> dict[int, fx.Node]:
    """From the sequence numbers that autograd gives to operations to the first node of forward with that number."""
    found: dict[int, fx.Node] = {}
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if number is not None and not is_backward(node, sources):
            found.setdefault(number, node)
    return found


def operation_of(node: fx.Node, forward: Mapping[int, fx.Node]) -> fx.Node | None:
    """The operation of forward of which ``node`` computes the derivative; None if it is unknown.

    torch gives another number, and no tag, to the nodes of a backward that the user has written.
    """
    return forward.get(node.meta.get("seq_nr", -1)) if node.meta.get("partitioner_tag") == "is_backward" else None


def find_input(graph: fx.Graph, position: int) -> fx.Node:
    """The placeholder of ``graph`` that is input number ``position`` of the traced function."""
    for node in graph.nodes:
        description = node.meta.get("desc")
        if type(description).__name__ == "PlainAOTInput" and description.idx == position and node.op == "placeholder":
            return node
    raise LookupError(f"the traced graph has no input number {position}")
