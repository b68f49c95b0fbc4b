"""Inserting the rounding: one pass over the joint graph of forward and backward.

The pass runs after decomposition and before Inductor's own joint-graph passes and the partitioner. Autograd has
been traced by then, so an inserted rounding is straight-through by itself. Each value is rounded once per cast
and the result is shared between its users; the partitioner is free to save the rounded tensor for backward.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

import fpsim.rounding.inductor  # noqa: F401  (the operator must have its lowering before Inductor meets it)
from fpsim.casts import Cast, apply_cast, check_cast
from fpsim.compile_backend.graph import convolution
from fpsim.compile_backend.graph.marks import find_marks, replace_mark
from fpsim.compile_backend.graph.products import (
    JOINT_PRODUCTS,
    VARIABLE,
    Product,
    Source,
    find_input,
    find_opaque,
    find_products,
    find_sources,
    is_attention,
    is_backward,
    is_body,
    is_product,
    is_view,
    module_path,
    remedy,
)
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.plan import Gap, Plan, Site
from fpsim.policy import Policy
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import random_key_op
from fpsim.scaling.ops import scale_op
from fpsim.source import source_hash

aten = torch.ops.aten

# What a rounding takes over from the value that is rounded, and from where it is needed.
_COPIED = ("partitioner_tag", "recompute", "ac_graph_id", "seq_nr", "stack_trace")
_PLACES = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace")

# The operators of a cast that do not go element by element: backward keeps their small results.
_OF_WHOLE_TENSORS = (scale_op, aten.select.int)

#: Told of every rewritten graph's plan.
Observer = Callable[[Plan], None]


class UnroundedError(RuntimeError):
    """The policy asks for rounding that the backend cannot do; nothing is left unrounded silently."""


class RoundingPass(CustomGraphPass):
    """The rounding that a policy asks for, as a pass of Inductor over one joint or inference graph.

    Args:
        policy: what is rounded where.
        input_sources: what each input of the traced function is.
        identity: everything else that the pass reads from the graph and that Inductor's cache key does not know.
        observer: told of the plan of every graph that the pass rewrites.
        strict: whether a gap that the policy does not allow is an error.
        seed_input: the position of the input that is the seed of stochastic rounding.
        recorder: observes every site (for graphs that are interpreted).
    """

    def __init__(
        self,
        policy: Policy,
        input_sources: Sequence[Source],
        identity: Sequence[str],
        observer: Observer | None = None,
        strict: bool = True,
        seed_input: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.policy = policy
        self.input_sources = tuple(input_sources)
        self.identity = tuple(identity)
        self.observer = observer
        self.strict = strict
        self.seed_input = seed_input
        self.recorder = recorder

    def __call__(self, graph: fx.Graph) -> None:
        if is_body(graph):
            return
        seed = None if self.seed_input is None else find_input(graph, self.seed_input)
        plan = rewrite(graph, self.policy, self.input_sources, strict=self.strict, seed=seed, recorder=self.recorder)
        if self.observer is not None:
            self.observer(plan)

    def uuid(self) -> str:
        """The key under which compiled code is cached: all that decides what the pass does."""
        sources = [source.value for source in self.input_sources]
        facts = [source_hash(), self.policy.canonical(), sources, self.identity, self.seed_input]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def rewrite(
    graph: fx.Graph,
    policy: Policy,
    input_sources: Sequence[Source],
    *,
    strict: bool = True,
    seed: fx.Node | None = None,
    recorder: Recorder | None = None,
) -> Plan:
    """Round in ``graph``, in place, what ``policy`` asks for; return what was and was not rounded.

    ``seed``: the input of the graph that is the seed of stochastic rounding. ``recorder``: observes every site.

    Raises:
        UnroundedError: with ``strict``, an operator whose products cannot be rounded and which the policy does not
            list as a gap, or a product whose module is unknown while the policy has rules for modules.
        ValueError: a format with values that the dtype of an operand lacks.
    """
    views = {node for node in graph.nodes if _is_alias(node)}
    gaps = [_opaque_gap(node, name, policy, strict) for node, name in find_opaque(graph)]
    sites: list[Site] = []
    sources = find_sources(graph, input_sources)
    inserter = _Inserter(graph, sources, seed, recorder)
    products = find_products(graph, sources, input_sources)
    sites += _round_operations(graph, policy, sources, products, inserter, strict)
    for product in products:
        what = f"{product.kind} product {product.node.name} ({product.operator})"
        local = _policy_at(product.path, what, policy, strict)
        if product.constant:
            reason = "constant: depends on no parameter and no floating-point input (such as rotary angles)"
            gaps.append(Gap(product.path or "", product.operator, reason))
        elif local is None:
            gaps.append(Gap(product.path or "", product.operator, f"{product.kind} left unrounded by the policy"))
        elif local.products == "weights" and not product.has_weight:
            reason = f"{product.kind} of two activations left unrounded by the policy"
            gaps.append(Gap(product.path or "", product.operator, reason))
        else:
            sites += _round_product(product, local, inserter)
    inserter.release_shapes()
    if recorder is not None:
        recorder.insert(graph)
    for node in find_marks(graph):
        replace_mark(node, node.args[0])  # type: ignore[arg-type]
    graph.eliminate_dead_code()
    _update_aliases(graph, views)
    graph.lint()
    return Plan(tuple(sites), tuple(gap for gap in gaps if gap is not None))


def _policy_at(path: str | None, what: str, policy: Policy, strict: bool) -> Policy | None:
    """The policy for ``what``, in the module ``path``; None where nothing is rounded."""
    if path is None and policy.uses_paths and strict:
        raise UnroundedError(
            f"cannot tell which module the {what} belongs to, and the policy has rules for modules: give one policy "
            "for the whole model, or use autograd's own backward instead of a custom autograd.Function"
        )
    return policy.at(path or "")


def _round_operations(
    graph: fx.Graph,
    policy: Policy,
    sources: Mapping[fx.Node, Source],
    products: Sequence[Product],
    inserter: _Inserter,
    strict: bool,
) -> list[Site]:
    """Put rounding in the place of the marks at the ends of operations, or nothing where the policy wants none.

    The marks at the ends of matrix products stay. The gradient of a convolution's bias is an operation of its own, the
    sum that it is in a linear layer.
    """
    sites = []
    for node in convolution.find_bias_gradients(graph):
        path = module_path(convolution.backward_of(node))
        local = _policy_at(path, f"gradient of a bias {node.name}", policy, strict)
        cast = None if local is None else local.elementwise_cast("backward")
        if cast is not None:
            sites.append(_operand_site(path or "", "aten.sum", "backward", "result", node, cast))
            inserter.round_result(node, cast, sites[-1])
    of_products = {node for product in products for node in (product.value, product.result)}
    for node in find_marks(graph):
        value, operator = node.args
        assert isinstance(value, fx.Node)
        if node in of_products:
            continue
        cast = None
        if sources[node] & VARIABLE and value not in of_products:
            direction = "backward" if is_backward(node, sources) else "forward"
            path = module_path(node)
            if path is None and (direction == "forward" or node.meta.get("is_gradient_acc")):
                path = ""  # forward code records every module but the root; gradients are added up outside of modules
            local = _policy_at(path, f"{direction} operation {node.name} ({operator})", policy, strict)
            cast = None if local is None else local.elementwise_cast(direction)
        if cast is not None:
            sites.append(_operand_site(path or "", str(operator), direction, "result", value, cast))
            value = inserter.rounded_result(value, cast, node, sites[-1])
        replace_mark(node, value)
    return sites


def _opaque_gap(node: fx.Node, name: str, policy: Policy, strict: bool) -> Gap | None:
    path = module_path(node) or ""
    if policy.at(path) is None:
        return Gap(path, name, "left unrounded by the policy")
    if is_attention(name) and policy.attention == "keep":
        return Gap(path, name, "attention kept fused by the policy")
    if policy.allows_gap(name):
        return Gap(path, name, "allowed by the policy's gaps")
    if strict:
        where = f" in module {path!r}" if path else ""
        both = re.sub("_(forward|backward)$", "", name) + "*"
        raise UnroundedError(
            f"{name}{where} may multiply matrices that fpsim cannot round. {remedy(name)}, or accept it unrounded: "
            f"gaps=[{both!r}], or skip=[{path or '<module>'!r}]; fpsim.explain lists all such places"
        )
    return Gap(path, name, "cannot be rounded: an error unless listed in the policy's gaps")


def _round_product(product: Product, policy: Policy, inserter: _Inserter) -> list[Site]:
    """Round the operands and the result of one product, and report on them."""
    sites, dtype = [], product.result.meta["val"].dtype
    operands: list[fx.Node] = [product.node.args[i] for i in product.operands]  # type: ignore[misc]
    if not all(operand.meta["val"].dtype in CARRIERS for operand in operands):
        raise UnroundedError(f"{product.operator} in {product.path!r} multiplies {dtype} numbers")
    casts = [policy.cast(product.kind, role) for role in product.roles]
    for position, operand, role, cast in zip(product.operands, operands, product.roles, casts, strict=True):
        sites.append(_site(product, role, operand, cast))
        if cast is not None:
            inserter.round_operand(product, position, cast)
    if inserter.recorder is not None:
        inserter.recorder.add_product(product, operands, sites, casts)
    result = policy.output_cast(product.kind)
    if result is not None:
        sites.append(_site(product, "output", product.result, result))
        inserter.round_result(product.result, result, sites[-1])
    return sites


def _site(product: Product, role: str, value: fx.Node, cast: Cast | None) -> Site:
    return _operand_site(product.path or "", product.operator, product.kind, role, value, cast)


def _operand_site(path: str, operator: str, kind: str, role: str, value: fx.Node, cast: Cast | None) -> Site:
    tensor = value.meta["val"]
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Site(path, operator, kind, role, shape, dtype, str(cast) if cast else None)


class _Inserter:
    """Inserts rounding nodes into a graph, one per value and cast."""

    def __init__(
        self, graph: fx.Graph, sources: dict[fx.Node, Source], seed: fx.Node | None, recorder: Recorder | None
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.done: dict[tuple[fx.Node, Cast], fx.Node] = {}
        # Calls split off a joint one: where each takes an operand for its shape only, and the call that multiplies it.
        self.separate: dict[fx.Node, tuple[int, fx.Node | None]] = {}
        self.seed = seed
        self.keys = 0
        self.recorder = recorder

    def round_operand(self, product: Product, position: int, cast: Cast) -> None:
        """Let ``product``, and no product that is computed together with it, see its operand rounded."""
        operand: fx.Node = product.node.args[position]  # type: ignore[assignment]
        rounded = self.rounded(operand, cast, near=product.node)
        if rounded is operand:
            return
        if product.node.target in JOINT_PRODUCTS and product.node not in self.separate:
            self.separate |= convolution.split(product.node)
        product.node.update_arg(position, rounded)

    def release_shapes(self) -> None:
        """Keep no operand for backward of which only the shape is used: one that is there anyway has the same shape.

        Calls that then have the same operands become one again.
        """
        for call, (position, other) in self.separate.items():
            operand: fx.Node = call.args[position]  # type: ignore[assignment]
            if other is not None:
                operand = other.args[position]  # type: ignore[assignment]
            elif not self._is_at_hand_in_backward(operand):
                operand = next((rounded for (value, _), rounded in self.done.items() if value is operand), operand)
            call.update_arg(position, operand)
        convolution.join(self.separate)

    def rounded(self, value: fx.Node, cast: Cast, near: fx.Node) -> fx.Node:
        """The node that holds ``value`` rounded.

        Rounding commutes with rearrangement, so the value is rounded as it first arose and rearranged again: the
        operand of fprop and its transpose in dgrad and wgrad share one rounding. ``near`` says where it is needed.
        """
        if _is_exact(value.meta["val"].dtype, cast):
            return value
        if (value, cast) not in self.done:
            if is_view(value):
                self.done[value, cast] = self._rearranged(value, cast, near)
            else:
                self.done[value, cast] = self._insert(value, cast, near)
        return self.done[value, cast]

    def rounded_result(self, value: fx.Node, cast: Cast, near: fx.Node, site: Site) -> fx.Node:
        """The node that holds ``value`` rounded, which is the result of an operation, as `rounded`."""
        result = self.rounded(value, cast, near)
        if self.recorder is not None:
            self.recorder.add_result(value, result, site, cast)
        return result

    def round_result(self, node: fx.Node, cast: Cast, site: Site) -> None:
        """Let every user of ``node`` see it rounded."""
        check_cast(node.meta["val"].dtype, cast)
        users = list(node.users)
        result = self._insert(node, cast, node)
        for user in users:
            user.replace_input_with(node, result)
        if self.recorder is not None:
            self.recorder.add_result(node, result, site, cast)

    def _rearranged(self, view: fx.Node, cast: Cast, near: fx.Node) -> fx.Node:
        source = self.rounded(view.args[0], cast, near)  # type: ignore[arg-type]
        with self.graph.inserting_after(view):
            copy = self.graph.call_function(
                view.target,  # type: ignore[arg-type]
                map_arg(view.args, lambda node: source if node is view.args[0] else node),
                view.kwargs,
            )
        copy.meta = {**view.meta, "val": _value(copy)}
        self.sources[copy] = self.sources[view]
        return copy

    def _insert(self, value: fx.Node, cast: Cast, near: fx.Node) -> fx.Node:
        """The node that holds ``value`` rounded, behind it or, if it is an input, behind all inputs."""
        check_cast(value.meta["val"].dtype, cast)
        last = value
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        key = self._random_key(value) if cast.is_stochastic else None
        if key is not None and last.op == "placeholder":
            last = key
        meta = {key: value.meta[key] for key in _COPIED if key in value.meta}
        meta |= {name: near.meta[name] for name in _PLACES if name in near.meta}
        pointwise = dict(meta)
        if self._is_at_hand_in_backward(value):
            pointwise.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)

        def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
            nonlocal last
            with self.graph.inserting_after(last):
                last = self.graph.call_function(target, arguments)
            last.meta = dict(meta if target in _OF_WHOLE_TENSORS else pointwise)
            _describe(last)
            self.sources[last] = self.sources[value]
            return last

        exact = value
        order = _order_in_memory(value) if key is None else None  # the numbers drawn follow the order of dimensions
        if order is not None:
            exact = call(aten.permute.default, exact, order)
        rounded = apply_cast(exact, cast, key=key, call=call)
        if order is not None:
            rounded = call(aten.permute.default, rounded, [order.index(i) for i in range(len(order))])
        return rounded

    def _random_key(self, value: fx.Node) -> fx.Node:
        """A key of its own for the rounding of ``value``: the number of the rounding in the graph is the salt.

        The seed is an input of the graph, not a node: whatever is recomputed in backward draws the same.
        """
        assert self.seed is not None, "the policy is stochastic, so the graph has a seed"
        self.keys += 1
        last_input = next(node for node in self.graph.nodes if node.next.op != "placeholder")
        with self.graph.inserting_after(last_input):
            key = self.graph.call_function(random_key_op, (self.seed, self.keys))
        _describe(key)
        device = value.meta["val"].device
        if device != key.meta["val"].device:
            with self.graph.inserting_after(key):
                key = self.graph.call_function(torch.ops.prims.device_put.default, (key, device))
            _describe(key)
        return key

    def _is_at_hand_in_backward(self, value: fx.Node) -> bool:
        """Whether backward has ``value`` anyway, so that rounding it again beats keeping the rounded copy.

        It has parameters, and whatever the derivative of an elementwise function uses: the result of a softmax, or of a
        relu, of which it needs to know where it is zero (a table of booleans in its place would be smaller, but
        Inductor's C++ writes one a hundred times slower than numbers).
        """
        if self.sources.get(value, Source.NONE) == Source.PARAMETER:
            return True
        for user in value.users:
            if is_view(user):
                if self._is_at_hand_in_backward(user):
                    return True
            elif not is_product(user) and self._is_used_with_gradients(user):
                return True
        return False

    def _is_used_with_gradients(self, node: fx.Node) -> bool:
        if self.sources.get(node, Source.NONE) & Source.TANGENT:
            return True
        is_condition = isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype == torch.bool
        return is_condition and any(map(self._is_used_with_gradients, node.users))


def _order_in_memory(value: fx.Node) -> list[int] | None:
    """The dimensions of what an opaque operator (attention) returns, as they lie in memory; None if in their own order.

    Inductor lays out the result of a rounding in the order of its dimensions. What was a view of the operator's result
    would be a copy then.
    """
    tensor = value.meta["val"]
    if value.target is not operator.getitem or not all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else None


def _describe(node: fx.Node) -> None:
    """Give a new node the metadata that passes after this one read: its value and where it comes from."""
    node.meta["val"] = _value(node)
    node.meta["original_aten"] = node.target


def _value(node: fx.Node) -> Any:
    """What ``node`` computes, as a fake tensor."""
    arguments, named = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    fakes = [argument for argument in arguments if isinstance(argument, torch._subclasses.FakeTensor)]
    mode = (
        fakes[0].fake_mode if fakes else torch._guards.detect_fake_mode([n.meta.get("val") for n in node.graph.nodes])
    )
    with mode or torch._subclasses.FakeTensorMode():
        return node.target(*arguments, **named)  # type: ignore[operator]


def _is_alias(node: fx.Node) -> bool:
    """Whether the value of ``node`` lies in the memory of one of its inputs, by their metadata."""
    if node.op != "call_function":
        return False
    return not _storages([node]).isdisjoint(_storages(node.all_input_nodes))


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    values = tree_leaves([node.meta.get("val") for node in nodes])
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor) and x.layout == torch.strided}


def _update_aliases(graph: fx.Graph, views: set[fx.Node]) -> None:
    """Let views of what is rounded now be views of it in their metadata too.

    AOTAutograd reads there which tensors saved for backward share memory with nothing that the user has, and Inductor
    writes over these in backward.
    """
    for node in graph.nodes:
        if node in views and not _is_alias(node):
            node.meta["val"] = _value(node)


def _is_exact(carrier: torch.dtype, cast: Cast) -> bool:
    """Whether every value of ``carrier``, infinities too, already is a value of the format."""
    return CARRIERS[carrier].is_subset_of(cast.format) and cast.overflow != "sat_finite"
