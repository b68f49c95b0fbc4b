"""`fpsim.audit`: the matrix products of one real step that ran without rounding.

The audit does not rest on the tables of the pass. It watches operators run, knows which of them hold no products by a
list of its own (`witness`), and compares the graphs of fpsim with an eager run of the same step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from fpsim.compile_backend.calls import policy_options
from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.graph.products import product_events
from fpsim.compile_backend.plan import Gap, Plan
from fpsim.compile_backend.report.comparison import allowed_gaps, left_by_policy, missing
from fpsim.compile_backend.report.running import (
    ISOLATED,
    as_policy,
    gradients_kept,
    no_recompile_limit,
    refuse_policy_fields,
    state_kept,
    uncompiled,
)
from fpsim.compile_backend.report.seen import MULTIPLYING, Call, seen
from fpsim.compile_backend.watching import unwatched
from fpsim.policy import Policy
from fpsim.showing import Shown, render

#: Why an operator has escaped inside a graph, if no gap of the policy says so.
_UNKNOWN = "inside, and not taken for a product"
_MISSING = "computed by an eager run, and rounded by no graph of fpsim (or its result is unused)"

#: Libraries whose kernels Inductor calls in the place of products of a graph.
_KERNELS = ("inductor.", "mkldnn.", "mkldnn_prepacked.", "onednn.")


@dataclass(frozen=True)
class Escape:
    """A matrix product that ran without rounding, or an operator that may hold one.

    Attributes:
        operator: the operator, such as ``aten.mm``.
        shapes: the shapes of its tensor arguments.
        count: how many times it ran with these shapes.
        inside: whether it ran inside a graph that fpsim rewrote: as a gap that the policy allows, or as an operator
            that the pass does not take for a product.
        reason: where it ran and why it is listed.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    inside: bool
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class Audit(Shown):
    """The matrix products of one real step that escaped: they ran where fpsim could not round them.

    Attributes:
        escaped: the operators that may hold products, and that ran outside of the graphs that fpsim rewrote, or fused
            inside one; and the products of an eager run that no graph of fpsim has. An operator counts as free of
            products only if it is known to be.
        covered: the number of calls in graphs that fpsim rewrote, without those that the policy leaves unrounded. One
            call may compute several products: the backward pass of a convolution computes two.
        unrounded: the products in these graphs that the policy leaves unrounded, and the operators that its gaps allow
            and that hold a product for other inputs; each with the reason.
        compiled: whether any graph ran that fpsim rewrote.
        compared: whether the graphs were compared with an eager run. They are not if parts of the model are compiled
            one by one.
    """

    escaped: tuple[Escape, ...]
    covered: int
    unrounded: tuple[Gap, ...] = field(default=(), compare=False)
    compiled: bool = field(default=True, compare=False)
    compared: bool = field(default=True, compare=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.covered} matrix products ran inside graphs that fpsim rewrote")
        if self.escaped:
            yield _table(
                f"{sum(escape.count for escape in self.escaped)} matrix products escaped",
                ("operator", "shapes", "count", "where"),
                [(each.operator, _written(each.shapes), str(each.count), _where(each)) for each in self.escaped],
            )
        elif self.compiled:
            yield Text("no matrix product escaped", style="green")
        if self.unrounded:
            yield _table(
                f"{len(self.unrounded)} matrix products that the policy leaves unrounded",
                ("module", "operator", "reason"),
                [(gap.path or "(root)", gap.operator, gap.reason) for gap in self.unrounded],
            )
        if not self.compiled:
            yield Text("nothing was compiled: no graph ran that fpsim rewrote, and nothing was rounded", style="red")
        if not self.compared:
            yield Text("not compared with an eager run, because only parts of the model are compiled by fpsim")
        yield Text(
            "seen are operators of torch and of libraries that register theirs, but no numpy and no bare kernels"
        )

    def __str__(self) -> str:
        return render(self)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as text: "[" is no markup
    return table


def _written(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _where(escape: Escape) -> str:
    return escape.reason or ("inside, a gap of the policy" if escape.inside else "outside of fpsim's graphs")


def audit(
    model: Callable[..., Any], /, *args: Any, policy: Policy | Mapping[str, Any] | str | None = None, **kwargs: Any
) -> Audit:
    """Run real forward and backward passes under the profiler and report the matrix products that were not rounded.

    The audit finds products that no graph shows: in code that `torch.compile` skipped, in code after a graph break, and
    in code that another backend compiled. It also runs the same step eagerly, and names every product there that the
    graphs of fpsim do not have. An operator that is not known to be free of products is named too. Products in numpy
    and in kernels that are called directly are not seen.

    The loss is the sum of all floating-point outputs that need a gradient. Parameters, buffers (also of modules that a
    function closes over or is given), gradients and random state are left unchanged.

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
        TypeError: fields of a policy among the inputs (``audit(model, x, format=...)``).
    """
    refuse_policy_fields(model, kwargs)
    compiled = model
    if not _is_compiled(model):
        options: dict[str, Any] = {"policy": as_policy(policy)}
        compiled = torch.compile(model, backend="fpsim", options=options)
    elif policy is not None:
        raise ValueError("the model is already compiled and keeps its policy: audit it without policy")
    with state_kept(model, args, kwargs), unwatched():
        _warm_up(compiled, args, kwargs)
        calls, is_compiled = seen(lambda: _step(compiled, args, kwargs))
        plan = _plan(compiled, args, kwargs) if is_compiled else None
        eager: list[Call] = []
        if plan is not None:
            with torch.compiler.set_stance("force_eager"):
                eager, _ = seen(lambda: _step(compiled, args, kwargs))
    return _judged(calls, is_compiled, plan, eager)


def _judged(calls: Sequence[Call], is_compiled: bool, plan: Plan | None, eager: Sequence[Call]) -> Audit:
    """The audit of ``calls``, which the compiled model made; ``plan`` and ``eager`` are None and empty if unknown."""
    can_be_rounded = {name.replace("::", ".") for name, is_rounded in product_events().items() if is_rounded}
    can_be_rounded.update(MULTIPLYING)
    calls = [call for call in calls if call.is_inside or call.operator not in MULTIPLYING]  # a user's own calls
    covered = [
        call
        for call in calls
        if call.is_inside and (call.operator in can_be_rounded or call.operator.startswith(_KERNELS))
    ]
    gaps = {gap.operator for gap in plan.gaps} if plan is not None else set()
    found = Counter(
        (call.operator, call.shapes, call.is_inside, _UNKNOWN if call.is_inside and call.operator not in gaps else "")
        for call in calls
        if call not in covered
    )
    left: tuple[Gap, ...] = ()
    unrounded = 0
    if plan is not None:
        named = {(operator, shapes) for operator, shapes, _, _ in found}
        unknown = [call for call in missing(plan, eager) if (call.operator, call.shapes) not in named]
        found.update((call.operator, call.shapes, True, _MISSING) for call in unknown)
        covered = [call for call in covered if replace(call, is_inside=False) not in unknown]
        left, share = left_by_policy(plan)
        left += tuple(
            gap for gap in allowed_gaps(plan) if gap.operator not in {operator for operator, _, _, _ in found}
        )
        unrounded = sum(
            round(n * share.get(operator, 0)) for operator, n in Counter(call.operator for call in covered).items()
        )
    return Audit(
        escaped=tuple(Escape(name, shapes, n, inside, why) for (name, shapes, inside, why), n in found.items()),
        covered=len(covered) - unrounded,
        unrounded=left,
        compiled=is_compiled,
        compared=plan is not None or not is_compiled,
    )


def _plan(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan | None:
    """The plan of all graphs in one step; None if not the whole model is compiled by fpsim."""
    options = policy_options(compiled)
    if options is None:
        return None
    plans: list[Plan] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        policy = Policy.from_options(options[0])
        return compile_with_rounding(gm, example_inputs, policy, interpret=True, observer=plans.append, strict=False)

    is_in_place = getattr(compiled, "_compiled_call_impl", None) is not None
    plain = compiled.forward if is_in_place else uncompiled(compiled)  # type: ignore[attr-defined]
    with no_recompile_limit():
        _step(torch.compile(plain, backend=backend, **ISOLATED), args, kwargs)
    sites, gaps, sums = ([each for plan in plans for each in getattr(plan, name)] for name in ("sites", "gaps", "sums"))
    return Plan(tuple(sites), tuple(gaps), tuple(sums))


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


def _is_compiled(model: Callable[..., Any]) -> bool:
    """Whether ``model``, or a module in it, was compiled, by `torch.compile` or in place."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(
        uncompiled(part) is not part
        or hasattr(getattr(part, "_compiled_call_impl", None), "_torchdynamo_orig_callable")
        for part in parts
    )
