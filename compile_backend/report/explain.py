"""`fpsim.explain`: the values that the backend would round in a model, listed before the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.graph.module_paths import module_paths, near_modules
from fpsim.compile_backend.plan import Gap, Plan
from fpsim.compile_backend.report.running import (
    ISOLATED,
    as_policy,
    no_recompile_limit,
    refuse_policy_fields,
    state_kept,
    uncompiled,
)
from fpsim.compile_backend.torch_settings import apply_settings
from fpsim.policy import Policy

#: The gap of a model of which nothing is compiled.
NOTHING = Gap("", "(model)", "nothing was compiled: torch.compile found no graph, so nothing would be rounded")


def explain(
    model: Callable[..., Any], /, *args: Any, policy: Policy | Mapping[str, Any] | str | None = None, **kwargs: Any
) -> Plan:
    """The values that the backend would round in ``model(*args, **kwargs)``, and the products that it would not.

    The model is traced with these inputs, forward and backward (forward only under ``torch.no_grad()``), and the
    forward pass runs once, interpreted, with its products rounded. Parameters, buffers (also of modules that a
    function closes over or is given), gradients and random state are left unchanged. A place at which compiling would
    fail is listed as a gap.

    Args:
        model: an `nn.Module` or a function, compiled or not.
        args, kwargs: the inputs of the model.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.

    Returns:
        A `Plan`: its sites are the operands and results that would be rounded, or that the policy leaves unrounded, and
        its gaps are the products that stay unrounded, each with the reason. Its sums are the products whose sums have
        a narrow accumulator. Shapes are those of the operands as the
        product gets them: a weight of shape (out, in) may be listed as in x out.

    Raises:
        ValueError: a bad policy, or a format that a dtype of the model cannot carry.
        TypeError: fields of a policy among the inputs (``explain(model, x, format=...)``).
    """
    policy = as_policy(policy)
    refuse_policy_fields(model, kwargs)
    plans: list[Plan] = []
    paths: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        paths.update(module_paths(gm))
        return compile_with_rounding(gm, example_inputs, policy, interpret=True, observer=plans.append, strict=False)

    apply_settings()
    breaks_before = Counter(counters["graph_break"])
    with no_recompile_limit(), state_kept(model, args, kwargs):
        torch.compile(uncompiled(model), backend=backend, **ISOLATED)(*args, **kwargs)
    sites = tuple(site for plan in plans for site in plan.sites)
    gaps = tuple(gap for plan in plans for gap in plan.gaps)
    breaks = Counter(counters["graph_break"]) - breaks_before
    gaps += tuple(break_gap(reason) for reason in breaks)
    gaps += tuple(_glob_gap(glob, paths) for glob in policy.unmatched_globs(paths))
    sums = tuple(each for plan in plans for each in plan.sums)
    return Plan(sites, gaps if plans else (*gaps, NOTHING), sums)


def _glob_gap(glob: str, paths: Iterable[str]) -> Gap:
    near = "".join(f", near {name!r}" for name in near_modules(glob, paths))
    return Gap("", f"(glob {glob!r})", f"matches no module: an error{near}")


def break_gap(reason: str) -> Gap:
    """The gap of a graph break."""
    first_line = reason.strip().splitlines()[0]
    return Gap("", "(graph break)", f"{first_line}: code there runs uncompiled and unrounded; fpsim.audit lists it")
