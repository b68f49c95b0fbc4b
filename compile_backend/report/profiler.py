"""`fpsim.profile` and `fpsim.Profiler`: run a model, and count at every site what rounding does to the numbers there.

A step is interpreted, as by backend ``"fpsim_eager"``: its values are those of the compiled model, up to the order of
sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch.utils import _pytree as pytree

from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.plan import Gap, Plan
from fpsim.compile_backend.report.explain import NOTHING, break_gap
from fpsim.compile_backend.report.profiles import Profile, have_same_sites, side_by_side
from fpsim.compile_backend.report.running import (
    ISOLATED,
    as_policy,
    gradients_kept,
    no_recompile_limit,
    refuse_policy_fields,
    state_kept,
    uncompiled,
)
from fpsim.compile_backend.torch_settings import apply_settings
from fpsim.policy import Policy


@dataclass(frozen=True)
class _Graph:
    """A traced graph: its code (Dynamo's frame), its gaps and its recorder."""

    code: object
    gaps: list[Gap]
    recorder: Recorder

    def take(self) -> Profile:
        sites, products = self.recorder.results()
        reductions = tuple(self.recorder.reductions())
        self.recorder.clear()
        return Profile(tuple(sites), tuple(products), tuple(self.gaps), reductions)


class Profiler:
    """A wrapper of a model that interprets it with rounding, and keeps statistics of every site.

    It is meant for training loops: the steps are real ones, with the user's own loss and optimizer.

    Args:
        model: an `nn.Module` or a function. A compiled one is interpreted too, from the model that was compiled.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.
        exact_products: whether to compare whole products, however large; see `ProductStatistics`.

    Raises: the errors of backend ``"fpsim"``: for a bad policy when it is constructed, for products that cannot be
        rounded when it is called.

    >>> model = torch.nn.Linear(4, 2)
    >>> profiler = Profiler(model, policy="bf16")
    >>> for batch in torch.randn(3, 8, 4):
    ...     profiler(batch).sum().backward()
    >>> [product.runs for product in profiler.take().products]
    [3, 3]
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        policy: Policy | Mapping[str, Any] | str | None = None,
        exact_products: bool = False,
    ) -> None:
        self._policy = as_policy(policy)
        self._exact_products = exact_products
        self._graphs: list[_Graph] = []
        apply_settings()
        self._model = torch.compile(uncompiled(model), backend=self._backend, dynamic=False, **ISOLATED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for these inputs."""
        with no_recompile_limit():
            return self._model(*args, **kwargs)

    def take(self) -> Profile:
        """The profile of all runs since the last call of `take`.

        Graphs of the same code for inputs of different shapes are merged if they have the same sites.
        """
        profiles: list[tuple[object, Profile]] = []
        for graph in self._graphs:
            new = graph.take()
            for i, (code, profile) in enumerate(profiles):
                if new.sites and code == graph.code and have_same_sites(profile, new):
                    profiles[i] = code, profile + new
                    break
            else:
                profiles.append((graph.code, new))
        return side_by_side([profile for _, profile in profiles])

    @property
    def compiled_anything(self) -> bool:
        """Whether torch has compiled a graph in any run so far."""
        return bool(self._graphs)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compile_id = CompileContext.current_compile_id()
        graph = _Graph(getattr(compile_id, "frame_id", None), [], Recorder(self._exact_products))
        self._graphs.append(graph)

        def add_gaps(plan: Plan) -> None:
            graph.gaps.extend(plan.gaps)

        return compile_with_rounding(
            gm, example_inputs, self._policy, interpret=True, observer=add_gaps, recorder=graph.recorder
        )


def profile(
    model: Callable[..., Any],
    /,
    *args: Any,
    policy: Policy | Mapping[str, Any] | str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    exact_products: bool = False,
    **kwargs: Any,
) -> Profile:
    """Run one real forward and backward, and return the statistics of rounding at every site.

    Parameters, buffers (also of modules that a function closes over or is given), gradients and random state are left
    unchanged. Stochastic rounding draws the numbers that the next step would draw. Under ``torch.no_grad()``, or if no
    output needs a gradient, the step is a forward pass.

    Args:
        model: an `nn.Module` or a function, compiled or not.
        args, kwargs: the inputs of the model.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid.
        loss: the function of the model's outputs to differentiate. None stands for the output named ``loss``, if there
            is one that needs a gradient (as in Hugging Face's models called with labels), and otherwise for the sum of
            all floating-point outputs that need one.
        exact_products: whether to compare whole products, however large. By default large products are compared by
            random combinations of their columns: see `ProductStatistics`.

    Raises:
        ValueError: a bad policy.
        TypeError: the result of ``loss`` is no floating-point tensor that needs a gradient, or fields of a policy are
            among the inputs (``profile(model, x, format=...)``).
        BackendCompilerFailed: torch's wrapper of the errors of backend ``"fpsim"``: a product that cannot be rounded, a
            glob that matches no module, a format that a dtype of the model cannot carry.

    >>> model = torch.nn.Linear(4, 2)
    >>> first = profile(model, torch.full((8, 4), 0.3), policy={"format": "e4m3fn"}).sites[0]
    >>> first.role, first.statistics.elements, first.statistics.amax
    ('activation', 32, 0.30000001192092896)
    """
    refuse_policy_fields(model, kwargs)
    profiler = Profiler(model, policy=policy, exact_products=exact_products)
    breaks_before = Counter(counters["graph_break"])
    with state_kept(model, args, kwargs):
        total = _loss(profiler(*args, **kwargs), loss)
        if total is not None:
            with gradients_kept(total):
                total.backward()
    breaks = Counter(counters["graph_break"]) - breaks_before
    result = profiler.take()
    gaps = (*result.gaps, *map(break_gap, breaks))
    return replace(result, gaps=gaps if profiler.compiled_anything else (*gaps, NOTHING))


def _loss(outputs: Any, given: Callable[[Any], Tensor] | None) -> Tensor | None:
    """The loss to differentiate; None if no output needs a gradient."""
    if given is not None:
        value = given(outputs)
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad):
            raise TypeError(f"loss must give a floating-point tensor that needs a gradient, got {value!r}")
        return value.sum()
    named = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(named, Tensor) and named.requires_grad:
        return named.sum()
    leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    totals = [leaf.sum().double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(totals).sum() if totals else None
