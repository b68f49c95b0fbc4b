"""Facts about single nodes of a traced graph: operator, origin, module, and kind of value."""

from __future__ import annotations

import re

import torch
from torch import fx
from torch._ops import OpOverload

from fpsim.compile_backend.graph.products import product_operator

aten = torch.ops.aten


def original_operator(node: fx.Node) -> object:
    """The operator packet from whose decomposition ``node`` comes; its own if it was not decomposed."""
    original = node.meta.get("original_aten") or node.target
    return getattr(original, "overloadpacket", original)


def operator_of(node: fx.Node) -> object:
    """The operator as which ``node`` is treated: its own, except for the product by which torch computes distances.

    The operands of that product hold vectors and also their squared lengths. No narrow format suits both.
    """
    within_distance = product_operator(node.target) is not None and original_operator(node) is aten._euclidean_dist
    return node.meta["original_aten"] if within_distance else node.target


def operator_name(node: fx.Node) -> str:
    """The name of the operator of ``node``, without its overload: ``aten.mm``, ``higher_order.cond``.

    An operator that changes its arguments is called by a higher-order operator; the name is its own.
    """
    target = operator_of(node)
    if isinstance(target, torch._ops.HigherOrderOperator) and node.args and isinstance(node.args[0], OpOverload):
        target = node.args[0]
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._opname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return getattr(target, "__name__", str(target))


def module_path(node: fx.Node) -> str | None:
    """The path of the module whose forward created ``node``: ``layers.0.attn``; None if it is not recorded."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
    if not stack:
        return None
    return stack_path(list(stack.values())[-1][0])


def stack_path(source: str) -> str:
    """The path of a module from its source in a module stack: ``L['self'].layers.0`` is ``layers.0``.

    Where a function gets the module as an argument, torch writes ``getattr(L['module'].layers, '0')`` for this, and
    ``L['args'][0].layers.0`` or ``L['self'].forward.__self__.layers.0`` where forward is wrapped, as by accelerate's
    autocast. A child of a module that has a ``__getattr__`` of its own is ``layers.__dict__['_modules']['0']``.
    """
    attribute = re.compile(r"getattr\(((?:[^()]|\([^()]*\))*), '([^']*)'\)")
    while (plain := attribute.sub(r"\1.\2", source)) != source:
        source = plain
    source = re.sub(r"\.__dict__\['_modules'\]\['([^']*)'\]", r".\1", source.replace(".forward.__self__", ""))
    return re.sub(r"^(L\['args'\]\[0\]|[LG]\['[^']*'\])(\.|$)", "", source)


def is_body(graph: fx.Graph) -> bool:
    """Whether ``graph`` is the body of a higher-order operator, which is opaque.

    AOTAutograd describes the results of whole graphs only: the output of a body has no ``desc``.
    """
    return not any("desc" in node.meta for node in graph.find_nodes(op="output"))


def is_tensor(argument: object) -> bool:
    """Whether an argument of a node is a node that holds one tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def is_float(value: object) -> bool:
    """Whether ``value`` is a tensor of floating-point or complex numbers."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
