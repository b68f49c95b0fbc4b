"""Rounding the activations that forward keeps for backward (`Policy.saved`).

Autograd saves tensors in forward, and backward reads them. In the joint graph this is every node of backward that reads
a value of forward. If that value is an activation, backward reads a copy of it, which the policy rounds; forward reads
the value itself. This holds whatever the partitioner saves or computes again.

An activation is a floating-point value that depends on an input of the model, and also on a parameter or a
floating-point input: parameters, functions of parameters alone and tables of constants are not activations. Neither are
statistics: values with one number for each row (the last axis has one element), and what a normalisation, a loss or
attention returns beside its result for its own backward.

A view of an activation is a view of its copy. Activation checkpointing saves what goes into a checkpointed region.
Backward computes the rest again, from the copy: its nodes in the graph are copied for backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

from fpsim.attention.ops import TENSORS
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.metadata import describe, value_of
from fpsim.compile_backend.graph.nodes import is_float, module_path, operator_name, original_operator
from fpsim.compile_backend.graph.opaque import is_opaque
from fpsim.compile_backend.graph.operation_ends import mark
from fpsim.compile_backend.graph.operations import ONE_RESULT
from fpsim.compile_backend.graph.products import opaque_family
from fpsim.compile_backend.graph.recognition import is_product
from fpsim.compile_backend.graph.sources import (
    VARIABLE,
    Source,
    find_sources,
    forward_by_number,
    is_backward,
    operation_of,
)
from fpsim.compile_backend.graph.views import base, is_view
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.places import policy_at, site_of_saved
from fpsim.compile_backend.plan import Site
from fpsim.policy import Policy

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("saved(Tensor x) -> Tensor")
_library._register_fake("saved", lambda x: torch.empty_like(x))
_saved = torch.ops.fpsim.saved.default

_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def insert_saved(
    graph: fx.Graph, policy: Policy, input_sources: Sequence[Source], strict: bool
) -> list[tuple[fx.Node, Site]]:
    """Let backward read copies of the activations of ``graph``, which `round_saved` will round.

    Args:
        input_sources: the kinds of the inputs of the traced function, in order.

    Returns:
        The copies, and their sites.

    Raises:
        UnroundedError: with ``strict``, a complex activation, or a module that is unknown while the policy has rules
            for modules.
    """
    if not policy.rounds_saved:
        return []
    return _Saving(graph, policy, find_sources(graph, input_sources), strict).run()


def round_saved(copies: list[tuple[fx.Node, Site]], inserter: Inserter) -> list[Site]:
    """Round the copies. It comes last, so that the random numbers of all other roundings stay as they are.

    The nodes stay, as identities of what is rounded: products and observations refer to them as their operands.
    `remove_saved` takes them out.
    """
    for node, site in copies:
        node.args = (inserter.rounded_result(node.args[0], node, site),)  # type: ignore[arg-type]
    return [site for _, site in copies]


def remove_saved(copies: list[tuple[fx.Node, Site]]) -> None:
    """Replace the nodes of the copies by the rounded values."""
    for node, _ in copies:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)


@dataclass(frozen=True)
class _Reader:
    """A node that reads activations in backward.

    Attributes:
        node: the node.
        region: the checkpointed region of its operation; None if there is none, or if it is unknown.
        policy: the policy of its module.
        path: the path of its module.
    """

    node: fx.Node
    region: Any
    policy: Policy | None
    path: str


class _Saving:
    """The state of `insert_saved` over one graph."""

    def __init__(self, graph: fx.Graph, policy: Policy, sources: Mapping[fx.Node, Source], strict: bool) -> None:
        self.graph = graph
        self.policy = policy
        self.sources = sources
        self.strict = strict
        self.backward = _backward_nodes(graph, sources)
        self.forward = forward_by_number(graph, sources)
        self.copies: list[tuple[fx.Node, Site]] = []
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.recomputed: dict[fx.Node, fx.Node] = {}

    def run(self) -> list[tuple[fx.Node, Site]]:
        for node in self.backward:
            read = [value for value in node.all_input_nodes if base(value) not in self.backward]
            if not read or is_view(node) or node.meta.get("is_gradient_acc"):
                continue  # sums of gradients lie outside of modules, and read nothing that is kept
            reader = self._reader(node)
            for value in read:
                node.replace_input_with(value, self._kept(value, reader))
        return self.copies

    def _reader(self, node: fx.Node) -> _Reader:
        """``node`` of backward as a reader."""
        operation = operation_of(node, self.forward)
        path = module_path(node)
        if path is None and operation is not None:
            path = module_path(operation) or ""
        region = operation.meta.get("ac_graph_id") if operation is not None else None
        return self._reader_at(node, region, path)

    def _reader_at(self, node: fx.Node, region: Any, path: str | None) -> _Reader:
        local = policy_at(path, f"saved activation of {node.name}", self.policy, self.strict)
        return _Reader(node, region, local, path or "")

    def _kept(self, value: fx.Node, reader: _Reader) -> fx.Node:
        """The node that ``reader`` reads in place of ``value``, a node of forward or a view of one."""
        if is_view(value):
            source: fx.Node = value.args[0]  # type: ignore[assignment]
            kept = self._kept(source, reader)
            return value if kept is source else self._copied(value, {source: kept})
        if self._is_recomputed(value, reader.region):
            return self._recomputed(value)
        kind = "product" if _multiplies(reader.node) else "elementwise"
        cast = None if reader.policy is None else reader.policy.saved_cast(kind)
        if cast is None or not self._is_activation(value):
            return value
        dtype = value.meta["val"].dtype
        if dtype.is_complex:
            if self.strict:
                raise UnroundedError(
                    f"backward of {operator_name(reader.node)} in {reader.path!r} reads an activation of {dtype}, "
                    "which saved cannot round: write it with real numbers, or give the module a rule without saved"
                )
            return value
        key = value, cast
        if key not in self.made:
            with self.graph.inserting_after(self._last_input(value)):
                copy = self.graph.call_function(_saved, (value,))
            copy.meta = {**value.meta}
            describe(copy)
            self.made[key] = copy
            self.copies.append((copy, site_of_saved(reader.path, operator_name(reader.node), value, cast)))
        return self.made[key]

    def _recomputed(self, value: fx.Node) -> fx.Node:
        """``value`` of a checkpointed region, computed from the copies of what goes into the region."""
        waiting, needed = [value], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node not in needed and node not in self.recomputed:
                needed.add(node)
                region = node.meta["ac_graph_id"]
                waiting += [x for x in map(base, node.all_input_nodes) if self._is_recomputed(x, region)]
        for node in sorted(needed, key=self.order.__getitem__):
            reader = self._reader_at(node, node.meta["ac_graph_id"], module_path(node) or "")
            self.recomputed[node] = self._copied(node, {x: self._kept(x, reader) for x in node.all_input_nodes})
        return self.recomputed[value]

    def _copied(self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A copy of ``node`` that reads other values; ``node`` itself if they are the same."""
        if all(value is other for value, other in replaced.items()):
            return node
        key = node, *replaced.values()
        if key not in self.made:
            with self.graph.inserting_after(node):
                copy = self.graph.node_copy(node, lambda x: replaced.get(x, x))
            if isinstance(copy.target, OpOverload) or copy.target is getitem:
                copy.meta["val"] = value_of(copy)  # in memory of its own
            self.made[key] = copy
        return self.made[key]

    def _is_recomputed(self, value: fx.Node, region: Any) -> bool:
        """Whether checkpointing lets backward compute ``value`` again within the checkpointed ``region``."""
        if value.op != "call_function" or value.meta.get("recompute") not in _RECOMPUTED:
            return False
        is_random = torch.Tag.nondeterministic_seeded in getattr(value.target, "tags", ())
        return region is not None and region == value.meta.get("ac_graph_id") and not is_random

    def _is_activation(self, value: fx.Node) -> bool:
        source = self.sources[value]
        depends = bool(source & (Source.INPUT | Source.INTEGER_INPUT)) and bool(source & VARIABLE)
        return depends and is_float(value.meta.get("val")) and not _is_statistic(value)

    def _last_input(self, value: fx.Node) -> fx.Node:
        """``value`` or, if it is an input, the last input: what may follow it."""
        while value.op == "placeholder" and value.next.op == "placeholder":
            value = value.next
        return value


def _backward_nodes(graph: fx.Graph, sources: Mapping[fx.Node, Source]) -> dict[fx.Node, None]:
    """The nodes of backward, in order. Those of a backward that the user has written have no tag, and come last."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    tags = [node.meta.get("partitioner_tag") for node in calls]
    forward = max((i for i, tag in enumerate(tags) if tag == "is_forward"), default=len(calls))
    return {
        node: None for i, node in enumerate(calls) if is_backward(node, sources) or (tags[i] is None and i > forward)
    }


def _multiplies(node: fx.Node) -> bool:
    """Whether ``node`` is a matrix product, or an operator that contains some: attention in tiles or kept fused."""
    return is_product(node) or node.target in TENSORS or is_opaque(node)


def _is_statistic(value: fx.Node) -> bool:
    """Whether ``value`` has one number for each row, or is what its operator returns beside its result for backward.

    Tracing marks the result of an operator that is decomposed.
    """
    shape = value.meta["val"].shape
    if not shape or statically_known_true(shape[-1] == 1):
        return True
    name, is_part = getattr(original_operator(value), "__name__", ""), value.target is getitem
    family = opaque_family(f"aten.{name}")
    is_tiled = is_part and any(each.target in TENSORS for each in value.all_input_nodes)
    if is_tiled or (family is not None and family.is_attention):
        return is_part and bool(value.args[1])
    return name in ONE_RESULT and value.target is not mark
