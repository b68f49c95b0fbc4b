"""The pass that applies a policy: it rewrites the joint graph of forward and backward.

The pass runs after decomposition and before Inductor's own joint-graph passes and the partitioner. Autograd has
been traced by then, so that every inserted rounding is straight-through. Each value is rounded once per cast, and its
users share the result. The partitioner is free to save the rounded tensor for backward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fpsim.compile_backend.graph.composites import find_weight_marks
from fpsim.compile_backend.graph.finding import find_products
from fpsim.compile_backend.graph.metadata import is_alias, update_aliases
from fpsim.compile_backend.graph.nodes import is_body
from fpsim.compile_backend.graph.operation_ends import find_marks, replace_mark
from fpsim.compile_backend.graph.recognition import note_gradients
from fpsim.compile_backend.graph.sources import Source, find_input, find_sources
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.passes.accumulators import Summed, insert_accumulators
from fpsim.compile_backend.passes.flash import flash_sites
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.operations import round_operations
from fpsim.compile_backend.passes.products import opaque_gaps, round_products, warn_if_no_weight_is_found
from fpsim.compile_backend.passes.reductions import replace_sums
from fpsim.compile_backend.passes.saved import insert_saved, remove_saved, round_saved
from fpsim.compile_backend.passes.switches import round_switched
from fpsim.compile_backend.plan import Gap, Plan
from fpsim.compile_backend.switches import Switches
from fpsim.policy import Policy
from fpsim.rounding.ops import SOURCE

#: A function that is called with the plan of every rewritten graph.
Observer = Callable[[Plan], None]


class RoundingPass(CustomGraphPass):
    """The rounding that a policy asks for, as a pass of Inductor over one joint or inference graph.

    Args:
        policy: the casts of every product and operation, by module.
        input_sources: the kinds of the inputs of the traced function, in order.
        identity: the other facts that the pass reads from the graph and that Inductor's cache key lacks.
        observer: called with the plan of every graph that the pass rewrites.
        strict: whether a gap that the policy does not allow is an error.
        seed_input: the position of the input that is the seed of stochastic rounding.
        handle_input: the position of the input that tells where the states of timed scales are.
        recorder: observes every site (for graphs that are interpreted).
        switches: what turns the roundings of its policies on and off, in place of those of ``policy``.
        switches_input: the position of the input that holds them.
    """

    def __init__(
        self,
        policy: Policy,
        input_sources: Sequence[Source],
        identity: Sequence[str],
        observer: Observer | None = None,
        strict: bool = True,
        seed_input: int | None = None,
        handle_input: int | None = None,
        recorder: Recorder | None = None,
        switches: Switches | None = None,
        switches_input: int | None = None,
    ) -> None:
        self.policy = policy
        self.input_sources = tuple(input_sources)
        self.identity = tuple(identity)
        self.observer = observer
        self.strict = strict
        self.seed_input = seed_input
        self.handle_input = handle_input
        self.recorder = recorder
        self.switches = switches
        self.switches_input = switches_input

    def __call__(self, graph: fx.Graph) -> None:
        if is_body(graph):
            return
        seed, handle, state = (
            None if position is None else find_input(graph, position)
            for position in (self.seed_input, self.handle_input, self.switches_input)
        )
        plan = rewrite(
            graph,
            self.policy,
            self.input_sources,
            strict=self.strict,
            seed=seed,
            handle=handle,
            recorder=self.recorder,
            switches=None if self.switches is None or state is None else (self.switches, state),
        )
        if self.observer is not None:
            self.observer(plan)

    def uuid(self) -> str:
        """The key under which compiled code is cached: a hash of everything that the pass depends on."""
        sources = [source.value for source in self.input_sources]
        facts = [SOURCE, self.policy.canonical(), sources, self.identity, self.seed_input, self.handle_input]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def rewrite(
    graph: fx.Graph,
    policy: Policy,
    input_sources: Sequence[Source],
    *,
    strict: bool = True,
    seed: fx.Node | None = None,
    handle: fx.Node | None = None,
    recorder: Recorder | None = None,
    switches: tuple[Switches, fx.Node] | None = None,
) -> Plan:
    """Insert the roundings of ``policy`` into ``graph``, in place, and return the plan: its sites and gaps.

    Args:
        seed: the input of the graph that is the seed of stochastic rounding.
        handle: the input that tells where the states of timed scales are.
        recorder: observes every site.
        switches: what turns the roundings of its policies on and off, and the input that holds them. ``policy`` is the
            first of them then. The plan does not list the products that they leave unrounded.

    Raises:
        UnroundedError: with ``strict``, an operator whose products cannot be rounded and which the policy does not
            list as a gap, or a product whose module is unknown while the policy has rules for modules.
        ValueError: a format with values that the dtype of an operand lacks.
    """
    note_gradients(graph)
    refused = opaque_gaps(graph, policy, strict)
    copies = insert_saved(graph, policy, input_sources, strict)
    views = {node for node in graph.nodes if is_alias(node)}
    sources = find_sources(graph, input_sources)
    inserter = Inserter(graph, sources, seed, handle, recorder, switches)
    products = find_products(graph, sources, input_sources)
    for node in find_weight_marks(graph):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
        views.discard(node)
    attended, attended_sums = flash_sites(graph, recorder)
    other_sums, sum_gaps, bias_gradients = replace_sums(graph, policy, sources, products, inserter, strict)
    results = round_operations(graph, policy, sources, products, inserter, strict, bias_gradients)
    gaps: Sequence[Gap] = ()
    sums: Sequence[Summed] = ()
    if switches is None:
        operands, gaps, sums = round_products(products, policy, inserter, strict)
    else:
        operands = round_switched(products, switches[0], inserter, strict)
    saved = round_saved(copies, inserter)
    if strict:
        warn_if_no_weight_is_found(products, [*results, *operands], policy)
    inserter.release_shapes()
    if recorder is not None:
        recorder.insert(graph)
    insert_accumulators(sums, inserter)
    remove_saved(copies)
    for node in find_marks(graph):
        replace_mark(node, node.args[0])  # type: ignore[arg-type]
    graph.eliminate_dead_code()
    update_aliases(graph, views)
    graph.lint()
    all_sums = (*(each.sum for each in sums), *other_sums, *attended_sums)
    return Plan((*results, *operands, *saved, *attended), (*refused, *gaps, *sum_gaps), all_sums)
