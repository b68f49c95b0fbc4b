"""Inserting the rounding: one pass over the joint graph of forward and backward.

The pass runs after decomposition and before Inductor's own joint-graph passes and the partitioner. Autograd has
been traced by then, so an inserted rounding is straight-through by itself. Each value is rounded once per cast
and the result is shared between its users; the partitioner is free to save the rounded tensor for backward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

import fpsim.rounding_lowering  # the operator must have its lowering before Inductor meets it
from fpsim.compile_backend.plan import Gap, Plan, Site
from fpsim.compile_backend.products import (
    PRODUCTS,
    Product,
    Source,
    find_input,
    find_opaque,
    find_products,
    find_sources,
    is_attention,
    is_view,
    module_path,
)
from fpsim.formats import split_rounding
from fpsim.policy import Cast, Policy
from fpsim.rounding_op import (
    CARRIERS,
    KERNEL,
    check_carrier,
    random_key_op,
    round_op,
    round_stochastic_op,
)

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
    """

    def __init__(
        self,
        policy: Policy,
        input_sources: Sequence[Source],
        identity: Sequence[str],
        observer: Observer | None = None,
        strict: bool = True,
        seed_input: int | None = None,
    ) -> None:
        self.policy = policy
        self.input_sources = tuple(input_sources)
        self.identity = tuple(identity)
        self.observer = observer
        self.strict = strict
        self.seed_input = seed_input

    def __call__(self, graph: fx.Graph) -> None:
        seed = None if self.seed_input is None else find_input(graph, self.seed_input)
        plan = rewrite(graph, self.policy, self.input_sources, strict=self.strict, seed=seed)
        if self.observer is not None:
            self.observer(plan)

    def uuid(self) -> str:
        """The key under which compiled code is cached: all that decides what the pass does."""
        sources = [source.value for source in self.input_sources]
        facts = [source_hash(), self.policy.to_json(), sources, self.identity, self.seed_input]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash of fpsim's own source, so that code compiled by another version is never reused."""
    digest = hashlib.sha256()
    package = Path(fpsim.rounding_lowering.__file__).parent
    for folder in (package, Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def rewrite(
    graph: fx.Graph,
    policy: Policy,
    input_sources: Sequence[Source],
    *,
    strict: bool = True,
    seed: fx.Node | None = None,
) -> Plan:
    """Round in ``graph``, in place, what ``policy`` asks for; return what was and was not rounded.

    ``seed``: the input of the graph that is the seed of stochastic rounding.

    Raises:
        UnroundedError: with ``strict``, an operator whose products cannot be rounded and which the policy does not
            list as a gap, or a product whose module is unknown while the policy has rules for modules.
        ValueError: a format with values that the dtype of an operand lacks.
    """
    gaps = [_opaque_gap(node, name, policy, strict) for node, name in find_opaque(graph)]
    sites: list[Site] = []
    sources = find_sources(graph, input_sources)
    inserter = _Inserter(graph, sources, seed)
    for product in find_products(graph, sources, input_sources):
        local = _policy_at(product, policy, strict)
        if product.constant:
            reason = "constant: depends on no parameter and no floating-point input (such as rotary angles)"
            gaps.append(Gap(product.path or "", product.operator, reason))
        elif local is None:
            gaps.append(Gap(product.path or "", product.operator, f"{product.kind} left unrounded by the policy"))
        else:
            sites += _round_product(product, local, inserter)
    graph.eliminate_dead_code()
    graph.lint()
    return Plan(tuple(sites), tuple(gap for gap in gaps if gap is not None))


def _policy_at(product: Product, policy: Policy, strict: bool) -> Policy | None:
    if product.path is None and policy.uses_paths:
        message = (
            f"cannot tell which module the {product.kind} product {product.node.name} ({product.operator}) belongs to, "
            "and the policy has rules for modules: give one policy for the whole model, or use autograd's own backward "
            "instead of a custom autograd.Function"
        )
        if strict:
            raise UnroundedError(message)
    return policy.at(product.path or "")


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
        both = name.removesuffix("_backward") + "*"  # forward and backward
        raise UnroundedError(
            f"{name}{where} may multiply matrices that fpsim cannot round. Replace it, or accept it unrounded: "
            f"gaps=[{both!r}], or skip=[{path or '<module>'!r}]; fpsim.explain lists all such places"
        )
    return Gap(path, name, "cannot be rounded: an error unless listed in the policy's gaps")


def _round_product(product: Product, policy: Policy, inserter: _Inserter) -> list[Site]:
    """Round the operands and the result of one product, and report on them."""
    node, sites = product.node, []
    if not all(node.args[i].meta["val"].dtype in CARRIERS for i in product.operands):  # type: ignore[union-attr]
        raise UnroundedError(f"{product.operator} in {product.path!r} multiplies {node.meta['val'].dtype} numbers")
    for position, role in zip(product.operands, product.roles, strict=True):
        operand = node.args[position]
        assert isinstance(operand, fx.Node)
        cast = policy.cast(product.kind, role)
        sites.append(_site(product, role, operand, cast))
        if cast is not None:
            node.update_arg(position, inserter.rounded(operand, cast, near=node))
    if policy.output_cast is not None:
        sites.append(_site(product, "output", node, policy.output_cast))
        inserter.round_result(node, policy.output_cast)
    return sites


def _site(product: Product, role: str, value: fx.Node, cast: Cast | None) -> Site:
    tensor = value.meta["val"]
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Site(product.path or "", product.operator, product.kind, role, shape, dtype, str(cast) if cast else None)


class _Inserter:
    """Inserts rounding nodes into a graph, one per value and cast."""

    def __init__(self, graph: fx.Graph, sources: Mapping[fx.Node, Source], seed: fx.Node | None) -> None:
        self.graph = graph
        self.sources = sources
        self.done: dict[tuple[fx.Node, Cast], fx.Node] = {}
        self.seed = seed
        self.keys = 0

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

    def round_result(self, node: fx.Node, cast: Cast) -> None:
        """Let every user of ``node`` see it rounded."""
        check_carrier(node.meta["val"].dtype, cast.format)
        users = list(node.users)
        result = self._insert(node, cast, node)
        for user in users:
            user.replace_input_with(node, result)

    def _rearranged(self, view: fx.Node, cast: Cast, near: fx.Node) -> fx.Node:
        source = self.rounded(view.args[0], cast, near)  # type: ignore[arg-type]
        with self.graph.inserting_after(view):
            copy = self.graph.call_function(
                view.target,  # type: ignore[arg-type]
                map_arg(view.args, lambda node: source if node is view.args[0] else node),
                view.kwargs,
            )
        copy.meta = dict(view.meta)
        return copy

    def _insert(self, value: fx.Node, cast: Cast, near: fx.Node) -> fx.Node:
        check_carrier(value.meta["val"].dtype, cast.format)
        last = value
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        modes = (cast.format.name, cast.rounding, cast.overflow, KERNEL)
        if split_rounding(cast.rounding)[1]:
            key = self._random_key(value)
            if last.op == "placeholder":
                last = key
            with self.graph.inserting_after(last):
                node = self.graph.call_function(round_stochastic_op, (value, key, *modes))
        else:
            with self.graph.inserting_after(last):
                node = self.graph.call_function(round_op, (value, *modes))
        copied = ("partitioner_tag", "recompute", "ac_graph_id", "seq_nr", "stack_trace")
        node.meta = {key: value.meta[key] for key in copied if key in value.meta}
        for name in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace"):
            if name in near.meta:
                node.meta[name] = near.meta[name]
        _describe(node)
        if self._is_at_hand_in_backward(value):
            node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        return node

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

        It has parameters, and whatever the derivative of an elementwise function uses (the result of a softmax).
        """
        if self.sources.get(value, Source.NONE) == Source.PARAMETER:
            return True
        for user in value.users:
            if is_view(user):
                if self._is_at_hand_in_backward(user):
                    return True
            elif user.target not in PRODUCTS and self.sources.get(user, Source.NONE) & Source.TANGENT:
                return True
        return False


def _describe(node: fx.Node) -> None:
    """Give a new node the metadata that passes after this one read: its value and where it comes from."""
    arguments = map_arg(node.args, lambda argument: argument.meta["val"])
    fakes = [argument for argument in arguments if isinstance(argument, torch._subclasses.FakeTensor)]
    mode = (
        fakes[0].fake_mode if fakes else torch._guards.detect_fake_mode([n.meta.get("val") for n in node.graph.nodes])
    )
    with mode or torch._subclasses.FakeTensorMode():
        node.meta["val"] = node.target(*arguments)  # type: ignore[operator]
    node.meta["original_aten"] = node.target


def _is_exact(carrier: torch.dtype, cast: Cast) -> bool:
    """Whether every value of ``carrier``, infinities too, already is a value of the format."""
    return CARRIERS[carrier].is_subset_of(cast.format) and cast.overflow != "sat_finite"
