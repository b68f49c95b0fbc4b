"""`fpsim.audit`: the matrix products of one real step that ran without rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from fpsim.compile_backend.calls import unwatched
from fpsim.compile_backend.compiling import GRAPH_EVENT
from fpsim.compile_backend.graph.products import product_events
from fpsim.compile_backend.plan import render
from fpsim.compile_backend.report.running import as_policy, gradients_kept, state_kept, uncompiled
from fpsim.policy import Policy

#: The profiler's names for the autograd function of a compiled graph, and for the backward of any autograd function.
#: The two events of one call have the same sequence number.
_COMPILED_EVENT = "CompiledFunction"
_BACKWARD_EVENT = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Escape:
    """A matrix product that ran without rounding.

    Attributes:
        operator: the operator, such as ``aten.mm``.
        shapes: the shapes of its tensor arguments.
        count: how many times it ran with these shapes.
        inside: whether it ran inside a graph that fpsim rewrote, as a gap that the policy allows.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    inside: bool


@dataclass(frozen=True)
class Audit:
    """The matrix products of one real step that escaped: they ran where fpsim could not round them.

    Attributes:
        escaped: the products that ran outside of the graphs that fpsim rewrote, or fused inside one.
        covered: the number of calls in graphs that fpsim rewrote, those included that the policy leaves unrounded
            (`fpsim.explain` lists these). One call may compute several products: the backward
            pass of a convolution computes two.
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


def audit(
    model: Callable[..., Any], /, *args: Any, policy: Policy | Mapping[str, Any] | str | None = None, **kwargs: Any
) -> Audit:
    """Run one real forward and backward under the profiler and report the matrix products that were not rounded.

    The audit finds products that no graph shows: in code that `torch.compile` skipped, in code after a graph break, and
    in code that another backend compiled. The loss is the sum of all floating-point outputs that need a gradient.
    Parameters, buffers (also of modules that a function closes over or is given), gradients and random state are left
    unchanged.

    Args:
        model: an `nn.Module` or a function. If it or a module in it was compiled (`torch.compile`,
            ``module.compile()``), it runs unchanged, and ``policy`` must be None. Otherwise it is compiled with backend
            ``"fpsim"`` and ``policy``.
        args, kwargs: the inputs of the model.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.

    Returns:
        An `Audit`.

    Raises:
        ValueError: a policy for a model that is already compiled.
    """
    compiled = model
    if not _is_compiled(model):
        options: dict[str, Any] = {"policy": as_policy(policy)}
        compiled = torch.compile(model, backend="fpsim", options=options)
    elif policy is not None:
        raise ValueError("the model is already compiled and keeps its policy: audit it without policy")
    with state_kept(model, args, kwargs), unwatched():
        _warm_up(compiled, args, kwargs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            _step(compiled, args, kwargs)
    events = profiler.events()
    ours = {event.sequence_nr for event in events if event.name == _COMPILED_EVENT and _within(GRAPH_EVENT, event)}
    can_be_rounded = product_events()
    products = [event for event in events if event.name in can_be_rounded and not _within_any(can_be_rounded, event)]
    found: Counter[tuple[str, tuple[tuple[int, ...], ...], bool]] = Counter()
    covered = 0
    for event in products:
        inside = _within_our_graph(event, ours)
        if inside and can_be_rounded[event.name]:
            covered += 1
            continue
        shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape)
        found[event.name.replace("::", "."), shapes, inside] += 1
    return Audit(tuple(Escape(name, shapes, n, inside) for (name, shapes, inside), n in found.items()), covered)


def _warm_up(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run steps until one compiles nothing, because compiling runs products too, on made-up numbers."""
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


def _ancestors(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _within(name: str, event: Any) -> bool:
    return any(ancestor.name == name for ancestor in _ancestors(event))


def _within_our_graph(event: Any, ours: set[int]) -> bool:
    """Whether ``event`` lies in the forward of a graph of fpsim, or in a backward whose number is in ``ours``."""
    return _within(GRAPH_EVENT, event) or any(
        ancestor.name.startswith(_BACKWARD_EVENT) and ancestor.sequence_nr in ours for ancestor in _ancestors(event)
    )


def _within_any(names: Container[str], event: Any) -> bool:
    return any(ancestor.name in names for ancestor in _ancestors(event))


def _is_compiled(model: Callable[..., Any]) -> bool:
    """Whether ``model``, or a module in it, was compiled, by `torch.compile` or in place."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(uncompiled(part) is not part or getattr(part, "_compiled_call_impl", None) for part in parts)
