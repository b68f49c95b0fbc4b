"""Looking at what the backend does to a model: `explain` before running it, `audit` while it runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from fpsim.compile_backend.backend import GRAPH_EVENT, compile_with_rounding
from fpsim.compile_backend.graph.products import JOINT_PRODUCTS, PRODUCTS
from fpsim.compile_backend.guards import module_paths, near_modules, unmatched_globs
from fpsim.compile_backend.plan import Gap, Plan, render
from fpsim.policy import Policy

#: Names under which the profiler reports matrix products.
_PRODUCT_EVENTS = frozenset(
    "aten::" + name
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "convolution", "convolution_backward",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable", "_transformer_encoder_layer_fwd",
        "_native_multi_head_attention", "_cdist_forward", "_cdist_backward", "_trilinear", "_grouped_mm", "_scaled_mm",
        "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn",
        "_cudnn_rnn_backward", "_addmm_activation",
    )
)  # fmt: skip

#: What the profiler calls the autograd function of a compiled graph, and the run of any function's backward; the two
#: have the same sequence number.
_COMPILED_EVENT = "CompiledFunction"
_BACKWARD_EVENT = "autograd::engine::evaluate_function: "

#: Keeps what `explain` compiles apart from what the user compiles (since torch 2.13), so that it counts against no
#: limit there.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


@dataclass(frozen=True)
class Escape:
    """A matrix product that ran without rounding.

    Attributes:
        operator: the operator, such as ``aten.mm``.
        shapes: of its tensor arguments.
        count: how many times it ran with these shapes.
        inside: whether it ran inside a graph that fpsim rewrote (a gap that the policy allows) or outside of all.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    inside: bool


@dataclass(frozen=True)
class Audit:
    """The matrix products of one real step that were not rounded; ``covered`` counts the calls in fpsim's graphs.

    One call may compute several products: the backward pass of a convolution, two.
    """

    escaped: tuple[Escape, ...]
    covered: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.covered} matrix products ran inside graphs that fpsim rewrote")
        if not self.escaped:
            yield Text("no matrix product escaped", style="green")
            return
        table = Table(title=f"{sum(e.count for e in self.escaped)} matrix products escaped", title_justify="left")
        for name in ("operator", "shapes", "count", "where"):
            table.add_column(name, overflow="fold")
        for escape in self.escaped:
            shapes = ", ".join("x".join(map(str, shape)) for shape in escape.shapes)
            where = "inside, a gap of the policy" if escape.inside else "outside of fpsim's graphs"
            table.add_row(escape.operator, shapes, str(escape.count), where)
        yield table

    def __str__(self) -> str:
        return render(self)


def explain(
    model: Callable[..., Any], /, *args: Any, policy: Policy | Mapping[str, Any] | str | None = None, **kwargs: Any
) -> Plan:
    """Every operand that the backend would round in ``model(*args, **kwargs)``, and everything that it would not.

    The model is traced with these inputs, forward and backward (forward only under ``torch.no_grad()``), and the
    forward pass runs once, interpreted, with its products rounded. Parameters, buffers (also of modules that a
    function closes over or is given), gradients and random state are left as they were. What would be an error when
    compiling is listed as a gap.

    Args:
        model: an `nn.Module` or a function, compiled or not.
        args, kwargs: its inputs.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.

    Raises:
        ValueError: a bad policy, or a format that a dtype of the model cannot carry.
    """
    policy = as_policy(policy)
    plans: list[Plan] = []
    paths: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        paths.update(module_paths(gm))
        return compile_with_rounding(gm, example_inputs, policy, interpret=True, observer=plans.append, strict=False)

    breaks_before = Counter(counters["graph_break"])
    with no_recompile_limit(), state_kept(model, args, kwargs):
        torch.compile(uncompiled(model), backend=backend, **ISOLATED)(*args, **kwargs)
    sites = tuple(site for plan in plans for site in plan.sites)
    gaps = tuple(gap for plan in plans for gap in plan.gaps)
    breaks = Counter(counters["graph_break"]) - breaks_before
    gaps += tuple(break_gap(reason) for reason in breaks)
    gaps += tuple(_glob_gap(glob, paths) for glob in unmatched_globs(policy, paths))
    return Plan(sites, gaps if plans else (*gaps, NOTHING))


NOTHING = Gap("", "(model)", "nothing was compiled: torch.compile found no graph, so nothing would be rounded")


def _glob_gap(glob: str, paths: Iterable[str]) -> Gap:
    near = "".join(f", near {name!r}" for name in near_modules(glob, paths))
    return Gap("", f"(glob {glob!r})", f"matches no module: an error{near}")


def break_gap(reason: str) -> Gap:
    first_line = reason.strip().splitlines()[0]
    return Gap("", "(graph break)", f"{first_line}: code there runs uncompiled and unrounded; fpsim.audit tells what")


def audit(
    model: Callable[..., Any], /, *args: Any, policy: Policy | Mapping[str, Any] | str | None = None, **kwargs: Any
) -> Audit:
    """Run one real forward and backward under the profiler and report the matrix products that were not rounded.

    Finds what no graph shows: products in code that `torch.compile` skipped, disabled or broke out of, or compiled
    with another backend. The loss is the sum of all floating-point outputs that need a gradient. Parameters, buffers
    (also of modules that a function closes over or is given), gradients and random state are left as they were.

    Args:
        model: an `nn.Module` or a function. If it or a module in it was compiled (`torch.compile`,
            ``module.compile()``), it runs as it is and ``policy`` must be None; else it is compiled with backend
            ``"fpsim"`` and ``policy``.
        args, kwargs: its inputs.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.

    Raises:
        ValueError: a policy for a model that is already compiled.
    """
    compiled = model
    if not _is_compiled(model):
        options: dict[str, Any] = {"policy": as_policy(policy)}
        compiled = torch.compile(model, backend="fpsim", options=options)
    elif policy is not None:
        raise ValueError("the model is already compiled and keeps its policy: audit it without policy")
    with state_kept(model, args, kwargs):
        _warm_up(compiled, args, kwargs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            _step(compiled, args, kwargs)
    events = profiler.events()
    ours = {event.sequence_nr for event in events if event.name == _COMPILED_EVENT and _within(GRAPH_EVENT, event)}
    products = [event for event in events if event.name in _PRODUCT_EVENTS and not _within_product(event)]
    found: Counter[tuple[str, tuple[tuple[int, ...], ...], bool]] = Counter()
    covered = 0
    for event in products:
        inside = _within_our_graph(event, ours)
        if inside and not _is_fused(event.name):
            covered += 1
            continue
        shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape)
        found[event.name.replace("::", "."), shapes, inside] += 1
    return Audit(tuple(Escape(name, shapes, n, inside) for (name, shapes, inside), n in found.items()), covered)


def _warm_up(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run steps until one compiles nothing: compiling runs products too, on no real numbers."""
    graphs = -1
    while graphs != counters["stats"]["unique_graphs"]:
        graphs = counters["stats"]["unique_graphs"]
        _step(model, args, kwargs)


def _step(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    outputs = model(*args, **kwargs)
    leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    losses = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if losses:
        loss = torch.stack([loss.float() for loss in losses]).sum()
        with gradients_kept(loss):
            loss.backward()


@contextlib.contextmanager
def gradients_kept(loss: Tensor) -> Iterator[None]:
    """Restore the gradients that a backward pass from ``loss`` accumulates: of parameters and of inputs."""
    leaves = [node.variable for node in _autograd_nodes(loss) if hasattr(node, "variable")]
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


def _autograd_nodes(loss: Tensor) -> set[Any]:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return seen


def _ancestors(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _within(name: str, event: Any) -> bool:
    return any(ancestor.name == name for ancestor in _ancestors(event))


def _within_our_graph(event: Any, ours: set[int]) -> bool:
    """Whether ``event`` is within a run of a graph of fpsim, or the backward of one of them: ``ours``, by number."""
    return _within(GRAPH_EVENT, event) or any(
        ancestor.name.startswith(_BACKWARD_EVENT) and ancestor.sequence_nr in ours for ancestor in _ancestors(event)
    )


def _within_product(event: Any) -> bool:
    return any(ancestor.name in _PRODUCT_EVENTS for ancestor in _ancestors(event))


def _is_fused(name: str) -> bool:
    """Whether the event is one whose inner products the backend cannot round."""
    return all(name != f"aten::{op._opname}" for op in (*PRODUCTS, *JOINT_PRODUCTS))


def as_policy(policy: Policy | Mapping[str, Any] | str | None) -> Policy:
    return Policy.from_options(policy if policy is None else {"policy": policy})


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def _is_compiled(model: Callable[..., Any]) -> bool:
    """Whether ``model``, or a module in it, was compiled, by `torch.compile` or in place."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(uncompiled(part) is not part or getattr(part, "_compiled_call_impl", None) for part in parts)


def _modules(*values: Any) -> Iterator[nn.Module]:
    """The modules among ``values``, and those that functions among them close over, are bound to or refer to."""
    for value in pytree.tree_leaves(values):
        value = uncompiled(value)
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            yield from _modules(value.func, value.args, value.keywords)
        elif inspect.isfunction(value) or inspect.ismethod(value):
            variables = inspect.getclosurevars(value)
            held = (*variables.nonlocals.values(), *variables.globals.values(), getattr(value, "__self__", None))
            yield from (module for module in held if isinstance(module, nn.Module))


@contextlib.contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Every call of `explain` compiles anew: let none of them fall back to running uncompiled."""
    with dynamo_config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20):
        yield


@contextlib.contextmanager
def state_kept(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Restore what running a model forward changes: buffers and random state.

    Parameters are not copied: of one that the model itself writes in place a warning is given.
    """
    modules = list(_modules(model, args, dict(kwargs)))
    buffers = [buffer for module in modules for buffer in module.buffers()]
    values = [buffer.clone() for buffer in buffers]
    parameters = [named for module in modules for named in module.named_parameters() if not named[1].is_inference()]
    versions = [parameter._version for _, parameter in parameters]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        pairs = zip(parameters, versions, strict=True)
        changed = sorted({name for (name, parameter), version in pairs if parameter._version != version})
        if changed:
            warnings.warn(
                f"the model's forward writes its own parameters {', '.join(changed)}, and this run has changed them "
                "too: give a copy of the model if that matters",
                stacklevel=4,
            )
