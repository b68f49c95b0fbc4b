"""The cheapest policy within a tolerance, or the best within a budget: `search`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy
import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from fpsim.compile_backend import explain
from fpsim.compile_backend.plan import Site
from fpsim.compile_backend.report.running import no_recompile_limit
from fpsim.curvature.data import fingerprint, why_batches_differ
from fpsim.curvature.results import new_axes
from fpsim.evaluate.batches import (
    Mean,
    Weight,
    check_model,
    loss_of,
    mean,
    number_of,
    plain_errors,
    refuse_nonfinite,
    refuse_unrepeated,
    same_draws,
    weighed,
)
from fpsim.evaluate.costs import COSTS, Cost
from fpsim.evaluate.policies import NOTHING, PolicyLike, named_policies
from fpsim.evaluate.running import under
from fpsim.evaluate.switched import SwitchedModel
from fpsim.evaluate.tables import Printed, data_frame
from fpsim.evaluate.texts import unfused
from fpsim.policy import Policy
from fpsim.showing import counted

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

#: Names of modules that share a format if they stand in the same module.
ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

#: The change of the loss that stands for one that is infinite or NaN.
_WORST = 1e6

#: For each group the number of its format.
_Choice = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """A choice of formats that was measured.

    Attributes:
        choices: for each group the name of its format.
        cost: its cost.
        change: the change of the loss.
    """

    choices: Mapping[str, str]
    cost: float
    change: Mean


@dataclass(frozen=True)
class SearchResult(Printed):
    """The result of `search`. ``print(result)`` shows it; ``result.policy.to_json()`` is for `fpsim.Policy.from_json`.

    Attributes:
        policy: the policy that was found.
        choices: for each group (the path of its module, or of several, joined by ``' + '``) the name of its format.
        cost: the cost of the policy.
        change: the change of the loss under the policy, measured through the backend without switches.
        met: whether the policy is within the tolerance or the budget.
        message: what was asked for, and whether it was met.
        measured: all choices that were measured, the cheapest first.
        alone: for each group and format the change of the loss when only this group is rounded.
    """

    policy: Policy
    choices: Mapping[str, str]
    cost: float
    change: Mean
    met: bool
    message: str
    measured: tuple[Point, ...] = field(repr=False)
    alone: Mapping[tuple[str, str], Mean] = field(repr=False)

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The measured choices of which none is both cheaper and better, the cheapest first."""
        best, points = math.inf, []
        for point in sorted(self.measured, key=lambda point: (point.cost, point.change.value)):
            if point.change.value < best:
                best = point.change.value
                points.append(point)
        return tuple(points)

    def to_dict(self) -> list[dict[str, Any]]:
        """One flat mapping for each point of the frontier."""
        return [
            {"cost": p.cost, "change": p.change.value, "change_stderr": p.change.stderr, **p.choices}
            for p in self.frontier
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """`to_dict` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.to_dict())

    def table(self) -> Table:
        """The formats of all groups."""
        table = Table(
            box=box.SIMPLE_HEAD,
        )
        for column in ("modules", "format"):
            table.add_column(column, overflow="fold")
        table.add_column("change of the loss alone", justify="right")
        for group, name in self.choices.items():
            alone = self.alone.get((group, name))
            table.add_row(group or "(root)", name, "" if alone is None else str(alone))
        return table

    def plot(self, axes: Axes | None = None) -> Axes:
        """Cost and change of the loss of all measured choices, with the frontier as a line. It needs matplotlib."""
        axes = axes or new_axes()
        frontier = self.frontier
        axes.plot([p.cost for p in frontier], [p.change.value for p in frontier], "-", label="frontier")
        axes.plot([p.cost for p in self.measured], [p.change.value for p in self.measured], ".", label="measured")
        axes.plot([self.cost], [self.change.value], "*", markersize=12, label="found")
        axes.set(xlabel="cost", ylabel="change of the loss")
        axes.legend()
        return axes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.message}: change of the loss {self.change}, cost {self.cost:.6g}")
        yield self.table()


def search(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    formats: Mapping[str, PolicyLike] | Iterable[PolicyLike],
    tolerance: float | None = None,
    budget: float | None = None,
    loss: Callable[..., Any] | None = None,
    cost: str | Cost = "bits",
    alike: Iterable[Iterable[str]] = ALIKE,
    weight: Weight | None = None,
    trials: int = 200,
    backend: str = "fpsim_eager",
    progress: Callable[[int], object] | None = None,
) -> SearchResult:
    """The cheapest choice of a format for every layer within a tolerance, or the best within a budget.

    The forward pass counts. All formats are compiled into one graph, whose switches choose among them. First the change
    of the loss is measured for every layer and format alone. An integer programme takes these changes as a sum, and
    proposes choices, which are measured. Then the best of them is improved: by other formats for one layer, or two.

    Args:
        model: an uncompiled module in evaluation mode, which torch can compile as one graph.
        batches: as for `fpsim.evaluate.compare`, in a list or a loader that gives the same batches each time.
        formats: the policies to choose from, by name, or as `fpsim.evaluate.policies.parse_policy` reads them; without
            rules for modules. ``unrounded`` may be among them. All must treat attention alike.
        tolerance: the greatest change of the mean loss.
        budget: the greatest cost.
        loss: as for `fpsim.evaluate.compare`.
        cost: ``bits`` or ``bytes`` of the weights with their scales, once for a module that is called several times,
            and once in each of several modules that share a weight; ``macs``: multiplications times the bits of both
            factors; or a function of the operands of a product (`fpsim.evaluate.costs`), whose costs add up over
            products.
        alike: groups of names of modules that share a format if they stand in the same module. All products of a module
            share a format, forward and backward.
        weight: a function from a batch to its weight in means, such as `fpsim.curvature.label_count`; None: all alike.
        trials: the greatest number of choices to measure, at least 1, beside the single layers.
        backend: ``fpsim_eager``, or ``fpsim``, which compiles.
        progress: called with the number of choices that have been measured, single layers included.

    Returns:
        A `SearchResult`. If no choice that was tried meets the tolerance or the budget, it holds the best that was
        found, with ``met=False``.

    Raises:
        ValueError: neither or both of tolerance and budget, fewer than two formats, a format with rules for modules,
            batches that differ from pass to pass, a cost that is negative or not finite, or a model in which nothing is
            rounded; and as `fpsim.evaluate.compare`.
        FloatingPointError: the loss of the unrounded model is not finite.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    >>> batches = [(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(2)]
    >>> found = search(model, batches, formats=["e2m1fn", "bf16"], budget=48 * 4, loss=nn.functional.mse_loss)
    >>> found.choices, found.cost
    ({'0': 'e2m1fn', '2': 'e2m1fn'}, 160.0)
    """
    check_model(model)
    if (tolerance is None) == (budget is None):
        raise ValueError("give either tolerance, the greatest change of the loss, or budget, the greatest cost")
    limit = tolerance if tolerance is not None else budget
    assert limit is not None, "one of them is given"
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"tolerance and budget are finite and not negative, got {limit}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    policies = _policies(formats)
    if isinstance(batches, Iterator):
        raise ValueError("batches can be read only once, and a search reads them many times: pass list(batches)")
    if isinstance(cost, str) and cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}: use {', '.join(COSTS)}, or a function of the operands of a product")
    price = COSTS[cost] if isinstance(cost, str) else cost
    with torch.no_grad(), unfused(), no_recompile_limit(), plain_errors("these formats"):
        trial = _Trial(model, batches, loss, weight, policies, backend, progress)
        problem = _Problem(trial, alike, price, once=cost in ("bits", "bytes"))
        found = _Within(problem, limit, trials) if tolerance is not None else _Below(problem, limit, trials)
        choice = found.run()
        policy = problem.policy(choice)
        change = trial.verified(policy)
    amount = change.value if tolerance is not None else problem.cost(choice)
    met = bool(amount <= limit)
    asked = f"tolerance {limit:g}" if tolerance is not None else f"budget {limit:g}"
    return SearchResult(
        policy=policy,
        choices=problem.named(choice),
        cost=problem.cost(choice),
        change=change,
        met=met,
        message=f"{asked} {'met' if met else 'not met by any choice that was tried'}",
        measured=tuple(
            Point(problem.named(each), problem.cost(each), value)
            for each, value in sorted(found.measured.items(), key=lambda item: problem.cost(item[0]))
        ),
        alone={
            (problem.groups[g], problem.names[f]): value for (g, f), value in problem.alone.items() if value is not None
        },
    )


def _policies(formats: Mapping[str, PolicyLike] | Iterable[PolicyLike]) -> dict[str, Policy]:
    named = named_policies(formats)
    if len(named) < 2:
        raise ValueError("a search needs at least two formats to choose from")
    for name, policy in named.items():
        if policy is not None and policy.uses_paths:
            raise ValueError(f"format {name!r} has rules for modules, which the search makes: leave them out")
    policies = {name: NOTHING if policy is None else policy for name, policy in named.items()}
    if all(policy == NOTHING for policy in policies.values()):
        raise ValueError(f"none of the formats {', '.join(policies)} rounds anything: name one, such as 'bf16'")
    return policies


class _Trial:
    """The model under all formats, and the change of its loss under any choice."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[..., Any] | None,
        weight: Weight | None,
        policies: Mapping[str, Policy],
        backend: str,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.model, self.batches, self.loss, self.weight = model, batches, loss, weight
        self.policies, self.backend, self.progress = policies, backend, progress
        rounding = [policy for policy in policies.values() if policy != NOTHING]
        self.numbers = {policy: number for number, policy in enumerate(rounding)}
        self.switched = SwitchedModel(model, rounding, backend)
        self.prints: list[tuple[str, ...]] = []
        self.exact: list[float] = []
        self.weights: list[float] = []
        self.count = 0
        for number, batch, own in weighed(model, batches, weight, self._repeat):
            if number == 0:
                self.operands = self._operands(batch)
            self.prints.append(fingerprint(batch))
            self.weights.append(own)
            self.exact.append(self._unrounded(number, batch))
            refuse_nonfinite(self.exact[-1], number)
        if not self.switched.places:
            raise ValueError("no format rounds anything in the forward pass of this model")

    def _unrounded(self, number: int, batch: Any) -> float:
        self.switched.turn([])
        with same_draws(number):
            return float(loss_of(self.switched, batch, self.loss))

    def _repeat(self, batch: Any) -> None:
        """Refuse a model whose unrounded loss on the first batch is another one by now."""
        refuse_unrepeated(self.exact[0], self._unrounded(0, batch), 0)

    def _operands(self, batch: Any) -> list[tuple[Site, Site]]:
        """The operands of all forward products of the model."""
        plans = []
        self.calls = dict.fromkeys(self.model.modules(), 0)
        policy = Policy(format="fp64", attention=next(iter(self.switched.switches.policies)).attention, gaps="*")

        def planned(*args: Any, **kwargs: Any) -> Any:
            plans.append(explain(self.model, *args, policy=policy, **kwargs))
            hooks = [module.register_forward_hook(count) for module in self.calls]
            try:
                return self.model(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()

        def count(module: nn.Module, args: Any, outputs: Any) -> None:
            self.calls[module] += 1

        number_of(planned, batch, self.loss)
        sites = [site for site in plans[0].sites if site.kind == "fprop" and site.role != "output"]
        return list(zip(sites[::2], sites[1::2], strict=True))

    def change(self, rounded: Mapping[str, Policy]) -> Mean:
        """The change of the loss when each module in ``rounded`` follows its policy, and all others none."""
        on = {path: self.numbers.get(policy) for path, policy in rounded.items()}
        self.switched.turn([place for place in self.switched.places if on.get(place.path) == place.policy])
        return self._change(self.switched)

    def verified(self, policy: Policy) -> Mean:
        """The change of the loss under ``policy``, without switches; the unrounded loss must be what it was."""
        self._repeat(next(iter(self.batches)))
        return self._change(under(self.model, policy, self.backend))

    def _change(self, model: Callable[..., Any]) -> Mean:
        prints, changes = [], []
        for number, batch in enumerate(self.batches):
            prints.append(fingerprint(batch))
            if number >= len(self.exact) or prints[-1] != self.prints[number]:
                prints += [fingerprint(each) for each in list(self.batches)[number + 1 :]]
                raise ValueError("; ".join(why_batches_differ(self.prints, prints)) or "batches differ in number")
            with same_draws(number):
                changes.append(float(loss_of(model, batch, self.loss)) - self.exact[number])
        if len(changes) != len(self.exact):
            known = counted(len(self.exact), "batch", "batches")
            raise ValueError(f"the first pass had {known}, and a later one had {len(changes)}: pass a list")
        self.count += 1
        if self.progress is not None:
            self.progress(self.count)
        return mean(changes, self.weights)


class _Problem:
    """Groups of modules, formats, costs, and the change of the loss for each group and format alone."""

    def __init__(self, trial: _Trial, alike: Iterable[Iterable[str]], price: Cost, *, once: bool) -> None:
        self.trial = trial
        named = dict(trial.model.named_modules(remove_duplicate=False))
        #: The calls of each module, by which its costs are divided where it counts once.
        self.calls = {path: max(1, trial.calls[module]) for path, module in named.items()} if once else {}
        self.names = list(trial.policies)
        self.formats = list(trial.policies.values())
        paths = list(dict.fromkeys(first.path for first, _ in trial.operands))
        self.members = _grouped(paths, [tuple(each) for each in alike])
        self.groups = list(self.members)
        self.costs = numpy.array([[self._cost(g, policy, price) for policy in self.formats] for g in self.groups])
        self.alone: dict[tuple[int, int], Mean | None] = {}
        self.changes = numpy.zeros_like(self.costs)
        for g, group in enumerate(self.groups):
            for f, policy in enumerate(self.formats):
                if policy == NOTHING:
                    self.alone[g, f] = None
                    continue
                value = trial.change(dict.fromkeys(self.members[group], policy))
                self.alone[g, f] = value
                self.changes[g, f] = max(value.value, 0.0) if math.isfinite(value.value) else _WORST

    def _cost(self, group: str, policy: Policy, price: Cost) -> float:
        total = 0.0
        for a, b in self.trial.operands:
            if a.path in self.members[group]:
                is_left = policy.products == "weights" and "weight" not in (a.role, b.role)
                casts = (None, None) if is_left else (policy.cast("fprop", a.role), policy.cast("fprop", b.role))
                total += float(price(((a, b), casts))) / self.calls.get(a.path, 1)
        if not 0 <= total < math.inf:
            raise ValueError(f"the cost of {group or 'the model'} is {total}: costs are finite and not negative")
        return total

    def cost(self, choice: _Choice) -> float:
        return float(sum(self.costs[g, f] for g, f in enumerate(choice)))

    def named(self, choice: _Choice) -> dict[str, str]:
        return {group: self.names[f] for group, f in zip(self.groups, choice, strict=True)}

    def by_path(self, choice: _Choice) -> dict[str, Policy]:
        return {
            path: self.formats[f] for group, f in zip(self.groups, choice, strict=True) for path in self.members[group]
        }

    def policy(self, choice: _Choice) -> Policy:
        """The policy of a choice. The rules of inner modules come first, because those of outer ones match them too."""
        rules = self.by_path(choice)
        base = rules.pop("", None) or max(rules.values(), key=list(rules.values()).count)
        if all(policy == base for policy in rules.values()):
            return base
        inner_first = sorted(rules, key=lambda path: -path.count("."))
        return base.with_modules({path: None if rules[path] == NOTHING else rules[path] for path in inner_first})

    def cheapest(self, allowed: float) -> _Choice | None:
        """The cheapest choice whose changes add up to at most ``allowed``; None if there is none."""
        return best_choice(self.costs, self.changes, allowed)

    def best(self, budget: float) -> _Choice | None:
        """The choice with the least sum of changes whose cost is at most ``budget``; None if there is none."""
        return best_choice(self.changes, self.costs, budget)


def best_choice(objective: Any, limited: Any, limit: float) -> _Choice | None:
    """The choice of one format for each group with the least sum of ``objective``; None if none is within ``limit``.

    A solver has tolerances relative to the largest number. Numbers above the limit are left out, and so are those above
    the optimum, as soon as a solution bounds it.

    Args:
        objective, limited: arrays of shape (groups, formats), not negative.
        limit: the greatest sum of ``limited``.
    """
    allowed, best = limited <= limit, None
    if not allowed.any(1).all():
        return None
    excess = objective - numpy.where(allowed, objective, numpy.inf).min(1, keepdims=True)
    while True:
        choice = _programme(excess, limited / (limit or 1.0), allowed)
        if choice is None:
            return best
        best, total = choice, sum(excess[g, f] for g, f in enumerate(choice))
        if total == 0 or total > 1e-3 * excess[allowed].max():
            return best
        allowed = allowed & (excess <= total)


def _programme(objective: Any, shares: Any, allowed: Any) -> _Choice | None:
    """The choice among ``allowed`` with the least sum of ``objective`` whose ``shares`` add up to at most one."""
    groups, formats = objective.shape
    unit = float(objective[allowed].max()) or 1.0
    solution = milp(
        numpy.where(allowed, objective, 0.0).reshape(-1) / unit,
        constraints=[
            LinearConstraint(numpy.kron(numpy.eye(groups), numpy.ones(formats)), 1, 1),
            LinearConstraint(numpy.where(allowed, shares, 0.0).reshape(1, -1), -numpy.inf, 1),
        ],
        integrality=numpy.ones(groups * formats),
        bounds=Bounds(0, allowed.reshape(-1).astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        return None
    return tuple(int(f) for f in solution.x.reshape(groups, formats).argmax(1))


class _Search(ABC):
    """Proposes choices, measures them, and keeps the best."""

    def __init__(self, problem: _Problem, limit: float, trials: int) -> None:
        self.problem, self.limit, self.trials = problem, limit, trials
        self.measured: dict[_Choice, Mean] = {}

    def run(self) -> _Choice:
        """The best choice that was found."""
        for choice in self.proposals():
            self.measure(choice)
            if len(self.measured) >= self.trials:
                break
        best = self.best()
        while len(self.measured) < self.trials:
            better = self._improved(best)
            if better is None:
                break
            best = better
        return best

    @abstractmethod
    def proposals(self) -> Iterator[_Choice]:
        """The choices to measure first."""

    @abstractmethod
    def rank(self, choice: _Choice) -> tuple[float, ...]:
        """The place of a choice among others, the best first."""

    @abstractmethod
    def promises(self, choice: _Choice, best: _Choice) -> bool:
        """Whether ``choice`` may rank before ``best``, as far as is known without measuring it."""

    @abstractmethod
    def order(self, choice: _Choice) -> tuple[float, ...]:
        """The order in which candidates are measured."""

    def measure(self, choice: _Choice) -> float:
        if choice not in self.measured:
            self.measured[choice] = self.problem.trial.change(self.problem.by_path(choice))
        value = self.measured[choice].value
        return value if math.isfinite(value) else math.inf

    def best(self) -> _Choice:
        return min(self.measured, key=self.rank)

    def estimate(self, choice: _Choice) -> float:
        """The sum of the changes of the groups alone."""
        return float(sum(self.problem.changes[g, f] for g, f in enumerate(choice)))

    def _improved(self, best: _Choice) -> _Choice | None:
        """A choice that ranks before ``best``, from which it differs in one group, or in two."""
        for neighbours in (self._steps(best), self._swaps(best)):
            candidates = [each for each in neighbours if each not in self.measured and self.promises(each, best)]
            for choice in sorted(candidates, key=self.order):
                if len(self.measured) >= self.trials:
                    return None
                self.measure(choice)
                if self.rank(choice) < self.rank(best):
                    return choice
        return None

    def _steps(self, choice: _Choice) -> Iterator[_Choice]:
        for g in range(len(choice)):
            for f in range(len(self.problem.formats)):
                if f != choice[g]:
                    yield (*choice[:g], f, *choice[g + 1 :])

    def _swaps(self, choice: _Choice) -> Iterator[_Choice]:
        for g, h in combinations(range(len(choice)), 2):
            for f in range(len(self.problem.formats)):
                for e in range(len(self.problem.formats)):
                    if f != choice[g] and e != choice[h]:
                        yield (*choice[:g], f, *choice[g + 1 : h], e, *choice[h + 1 :])


class _Within(_Search):
    """The cheapest choice within a tolerance of the change of the loss."""

    def proposals(self) -> Iterator[_Choice]:
        """Choices for the tolerance, and for smaller and larger sums of changes, until the measured change meets it."""
        low, high, allowed = 0.0, math.inf, self.limit
        for _ in range(8):
            choice = self.problem.cheapest(allowed)
            if choice is None:
                low = allowed
            else:
                yield choice
                low, high = (allowed, high) if self.measure(choice) <= self.limit else (low, allowed)
            allowed = max(2 * allowed, self.limit / 4, 1e-12) if high == math.inf else (low + high) / 2
        yield tuple(int(f) for f in self.problem.changes.argmin(1))

    def rank(self, choice: _Choice) -> tuple[float, ...]:
        change = self.measure(choice)
        return (0.0, self.problem.cost(choice), change) if change <= self.limit else (1.0, change, 0.0)

    def promises(self, choice: _Choice, best: _Choice) -> bool:
        return self.measure(best) > self.limit or self.problem.cost(choice) < self.problem.cost(best)

    def order(self, choice: _Choice) -> tuple[float, ...]:
        estimate = self.estimate(choice)
        return (max(estimate - self.limit, 0.0), self.problem.cost(choice), estimate)


class _Below(_Search):
    """The choice with the least change of the loss within a budget."""

    def proposals(self) -> Iterator[_Choice]:
        choice = self.problem.best(self.limit)
        yield tuple(int(f) for f in self.problem.costs.argmin(1)) if choice is None else choice

    def rank(self, choice: _Choice) -> tuple[float, ...]:
        cost = self.problem.cost(choice)
        return (0.0, self.measure(choice), cost) if cost <= self.limit else (1.0, cost, 0.0)

    def promises(self, choice: _Choice, best: _Choice) -> bool:
        return self.problem.cost(choice) <= self.limit

    def order(self, choice: _Choice) -> tuple[float, ...]:
        return (self.estimate(choice), self.problem.cost(choice))


def _grouped(paths: Sequence[str], alike: Sequence[tuple[str, ...]]) -> dict[str, list[str]]:
    """The paths that share a format, by the text that names them."""
    groups: dict[Any, list[str]] = {}
    for path in paths:
        outer, _, name = path.rpartition(".")
        key: Any = next(((outer, names) for names in alike if name in names), path)
        groups.setdefault(key, []).append(path)
    return {" + ".join(members): members for members in groups.values()}
