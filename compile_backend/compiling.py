"""Compiling one Dynamo graph under a policy.

The graph goes to Inductor with a `RoundingPass` added to the passes over the joint graph. Inductor does the rest.
No state is kept between calls.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.profiler import record_function

from fpsim.compile_backend import guards
from fpsim.compile_backend.attention import decompose_attention
from fpsim.compile_backend.graph.composites import recorded
from fpsim.compile_backend.graph.dynamo import copied, has_layer
from fpsim.compile_backend.graph.operations import decompositions
from fpsim.compile_backend.graph.sources import Source, sources_of_inputs
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.passes.flash import Expansion
from fpsim.compile_backend.passes.products import rounds_only_weights
from fpsim.compile_backend.passes.rounding_pass import Observer, RoundingPass
from fpsim.compile_backend.scale_states import HANDLE, ScaleStates, current
from fpsim.compile_backend.switches import Lazy, Switches
from fpsim.compile_backend.torch_settings import apply_settings
from fpsim.compile_backend.watching import graph_runs, own_work
from fpsim.policy import Policy
from fpsim.policy.ranks import refuse_other_policy
from fpsim.rounding.ops import draw_seed

#: The profiler's name for a forward run of a graph that fpsim rewrote; `fpsim.audit` looks for it.
GRAPH_EVENT = "fpsim: rewritten graph"
#: The settings under which Inductor keeps the values of the model. An explicit cast is a precision boundary: without
#: the setting Inductor keeps 16-bit values in float32 between fused operators, and the rounding would see numbers that
#: the model never had.
SETTINGS_OF_INDUCTOR = {"emulate_precision_casts": True}
#: The name of the input of a graph that is the seed of stochastic rounding.
_SEED = "fpsim_seed"


def compile_with_rounding(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    *,
    interpret: bool = False,
    observer: Observer | None = None,
    strict: bool = True,
    recorder: Recorder | None = None,
    keep: Callable[[fx.GraphModule, Sequence[Any], Any], None] | None = None,
    switches: Switches | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph with the rounding that ``policy`` asks for.

    Args:
        gm, example_inputs: a graph and examples of its inputs, as Dynamo passes them to a backend.
        policy: the casts of every product and operation, by module.
        interpret: whether to run the rewritten graphs in an interpreter instead of compiling them.
        observer: called with the plan of every graph; only with ``interpret``, since compiled code that comes from a
            cache has no plan.
        strict: whether a gap that the policy does not allow is an error.
        recorder: gathers the statistics of the graph's sites when it runs; only with ``interpret``.
        keep: called after every run of a graph with the graph, its inputs and its results; only with ``interpret``.
        switches: what turns the roundings of its policies on and off; ``policy`` is the first of them.
        settings: of Inductor, such as those of a mode of `torch.compile`.

    Raises: the errors of `fpsim.compile_backend.fpsim`.
    """
    apply_settings()
    policy.check_names_format()
    guards.refuse_settings(policy)
    guards.refuse_inner_gradients(gm)
    if strict:
        guards.check_globs(gm, policy)
        guards.check_gaps(policy)
        refuse_other_policy(policy, hashlib.sha256(gm.code.encode()).hexdigest())
    input_sources, identity = sources_of_inputs(gm, example_inputs), list(_identity(gm, policy))
    policies = (policy,) if switches is None else switches.policies
    seed_device = _device(example_inputs) if any(each.is_stochastic for each in policies) else None
    seed_input = handle_input = None
    if seed_device is not None:
        seed_input = len(input_sources)
        seed = torch.zeros(1, dtype=torch.int64, device=seed_device)
        gm, example_inputs = _with_input(gm, _SEED, seed), [*example_inputs, seed]
        input_sources.append(Source.NONE)
    if policy.is_timed:
        handle_input = len(input_sources)
        gm, example_inputs = _with_input(gm, "fpsim_scales", HANDLE), [*example_inputs, HANDLE]
        input_sources.append(Source.NONE)
    switches_input = None
    if switches is not None:
        switches_input = len(input_sources)
        switches.state = switches.state.to(_device(example_inputs))
        gm, example_inputs = _with_input(gm, "fpsim_switches", switches.state), [*example_inputs, switches.state]
        input_sources.append(Source.NONE)
    own_states = ScaleStates()  # for runs outside of a call of a compiled model
    gm, attention = decompose_attention(gm, policy, _SEED)
    rounding = RoundingPass(
        policy,
        input_sources,
        identity,
        observer,
        strict,
        seed_input,
        handle_input,
        recorder,
        switches,
        switches_input,
    )
    patches: dict[str, Any] = {
        **(settings or {}),
        "joint_custom_pre_pass": _after_user_passes(inductor_config.joint_custom_pre_pass, rounding),
        "post_grad_custom_pre_pass": _after_user_passes(inductor_config.post_grad_custom_pre_pass, Expansion()),
        "use_joint_graph_passes": True,  # without them the rounding would not run
        **SETTINGS_OF_INDUCTOR,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_work())
        stack.enter_context(attention)
        stack.enter_context(recorded(with_bias=any(each.rounds_results or each.accumulates for each in policies)))
        # The pass warns if a policy for weights finds none, and numbers switches. It does not run for code that comes
        # from the cache.
        if interpret or switches is not None or (rounds_only_weights(policy) and not has_layer(gm, policy)):
            stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
            patches["fx_graph_cache"] = False
        compiler: dict[str, Any] = {"inner_compile": interpreter(recorder, keep, switches)} if interpret else {}
        if any(each.rounds_results or each.rounds_saved for each in policies):
            compiler["decompositions"] = decompositions()
        compiled = cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches, **compiler))

    @functools.wraps(compiled)
    def run(*inputs: Any) -> Any:
        added = [] if seed_device is None else [draw_seed(seed_device)]
        states = current()
        with contextlib.ExitStack() as stack:
            if policy.is_timed:
                if states is None:
                    states = own_states
                    stack.enter_context(states.running())
                added.append(states.handle(inputs))
            if switches is not None:
                added.append(switches.state)
            stack.enter_context(record_function(GRAPH_EVENT))
            stack.enter_context(graph_runs())
            return compiled(*inputs, *added)

    return run


def _device(inputs: Sequence[Any]) -> torch.device:
    """The device of the first floating-point input; the CPU if there is none."""
    floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return floats[0].device if floats else torch.device("cpu")


def _with_input(gm: fx.GraphModule, name: str, example: torch.Tensor) -> fx.GraphModule:
    """The graph with one more input: the seed of stochastic rounding, or the handle of the states of scales.

    Backward has an input, whatever the partitioner saves or recomputes. A seed drawn by a node of the graph would be
    drawn again in backward under ``activation_memory_budget=0``, and backward would silently use other random numbers.
    """
    copy = copied(gm)
    inputs = copy.graph.find_nodes(op="placeholder")
    with copy.graph.inserting_after(inputs[-1]) if inputs else copy.graph.inserting_before():
        added = copy.graph.placeholder(name)
    added._dynamo_source = ConstantSource(name)
    fake_mode = detect_fake_mode([node.meta.get("example_value") for node in inputs])
    added.meta["example_value"] = fake_mode.from_tensor(example) if fake_mode else example
    copy.recompile()
    return copy


def interpreter(
    recorder: Recorder | None,
    keep: Callable[[fx.GraphModule, Sequence[Any], Any], None] | None,
    switches: Switches | None = None,
) -> Callable[..., Any]:
    """A substitute for Inductor's compiler. It returns a function that interprets the graph and empties its argument.

    ``recorder``, ``keep`` and ``switches`` are arguments of `compile_with_rounding`.
    """

    def interpret(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        if recorder is not None:
            recorder.bind(gm)
        evaluate = gm if switches is None else Lazy(gm)

        def run(inputs: list[Any]) -> Any:
            arguments = list(inputs)
            inputs.clear()
            results = evaluate(*arguments)
            if keep is not None:
                keep(gm, arguments, results)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return interpret


class _Sequence(CustomGraphPass):
    """Passes that run one after the other. Their code can be cached if each of them has a key."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any | None:
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in keys else repr(keys)


def _after_user_passes(configured: Any, own: CustomGraphPass) -> CustomGraphPass:
    """``own``, run after the passes that the user has configured."""
    if configured is None:
        return own
    return _Sequence([*(configured if isinstance(configured, list | tuple) else [configured]), own])


def _identity(gm: fx.GraphModule, policy: Policy) -> Iterator[str]:
    """The facts that the pass reads and that torch's cache key may lack: attention, functions and module paths."""
    yield f"attention={sorted(map(str, policy.attentions))}"
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {"": ("",)}
        function = getattr(node.target, "__name__", node.target)
        yield f"{node.op} {node.name} {function} {list(stack.values())[-1][0]}"
