"""Which modules or sites of a model lose most when they are rounded: `sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from fpsim.compile_backend.functional import functional
from fpsim.compile_backend.report.running import no_recompile_limit
from fpsim.compile_backend.switches import CAPACITY, Place, Switches
from fpsim.curvature import hessian
from fpsim.curvature.results import new_axes
from fpsim.evaluate.batches import (
    Mean,
    Weight,
    check_model,
    loss_of,
    mean,
    plain_errors,
    refuse_nonfinite,
    refuse_unrepeated,
    same_draws,
    weighed,
)
from fpsim.evaluate.policies import PolicyLike, forward_only, parse_policy
from fpsim.evaluate.switched import SwitchedModel
from fpsim.evaluate.tables import Printed, data_frame
from fpsim.evaluate.texts import unfused
from fpsim.policy import Policy
from fpsim.showing import counted

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

#: What is switched together: all forward or all backward sites of a module, or the sites of one kind and role in it.
By = Literal["module", "site"]

#: The Hessian products per batch for the estimates of second order.
PROBES = 2


@dataclass(frozen=True, order=True)
class Unit:
    """The sites that are switched together.

    Attributes:
        path: the module, ``""`` for the root.
        direction: ``forward`` or ``backward``.
        step: for ``by="site"`` the kind of the product, or the direction of another operation; else ``""``.
        role: for ``by="site"`` the role of the value; else ``""``.
    """

    path: str
    direction: str
    step: str = ""
    role: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.path or "(root)", self.step, self.role)))


@dataclass(frozen=True)
class GradientChange:
    """The change of the gradient of one layer, or of the whole model.

    Attributes:
        relative: ``|g' - g| / |g|`` for the exact gradient g and the gradient g' with rounding.
        cosine: the cosine of the angle between them.
        norm: ``|g'| / |g|``.
    """

    relative: Mean
    cosine: Mean
    norm: Mean


@dataclass(frozen=True)
class Effect:
    """What the rounding of one unit does. Forward units have the first five fields, backward units the others.

    Attributes:
        unit: the module or the site.
        alone: the change of the loss when only this unit is rounded.
        without: the change of the loss when all forward units but this one are rounded.
        first: the estimate ``g . e`` of ``alone`` from the gradient g at the site and the error of rounding e.
        second: the estimate ``g . e + e . H e / 2`` from the Hessian H too.
        size: the root mean square over batches of the change of the loss, or of the relative change of the gradient:
            changes of either sign count.
        nonfinite: the number of batches on which the loss or the gradient is infinite or NaN when only this unit is
            rounded. Means are then infinite or NaN too.
        gradient: the change of the gradient of all parameters when only this unit is rounded.
        layers: the change of the gradient of every layer: of the parameters that a module holds itself.
    """

    unit: Unit
    alone: Mean | None = None
    without: Mean | None = None
    first: Mean | None = None
    second: Mean | None = None
    size: float = 0.0
    nonfinite: int = 0
    gradient: GradientChange | None = None
    layers: Mapping[str, GradientChange] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity(Printed):
    """The result of `sensitivity`. ``print(result)`` and ``rich.print(result)`` show tables, the worst unit first.

    Attributes:
        by: ``module`` or ``site``.
        policy: the policy.
        loss: the loss of the unrounded model.
        rounded: the change of the loss when everything is rounded.
        gradient: the change of the gradient when everything is rounded, forward and backward; None if no gradient was
            measured.
        forward: the effects of the units of the forward pass, the largest first (`Effect.size`).
        backward: the effects of the units of the backward pass, the largest first.
        batches: the number of batches.
    """

    by: By
    policy: Policy
    loss: Mean
    rounded: Mean
    gradient: GradientChange | None
    forward: tuple[Effect, ...]
    backward: tuple[Effect, ...]
    batches: int

    def __getitem__(self, path: str) -> Effect:
        """The effect of the forward unit of the module ``path``, for ``by="site"`` the worst of its units."""
        found = next((effect for effect in self.forward if effect.unit.path == path), None)
        if found is None:
            known = sorted({effect.unit.path for effect in self.forward})
            raise KeyError(f"no module {path!r} is rounded: there are {', '.join(known)}")
        return found

    def to_dict(self) -> list[dict[str, Any]]:
        """One flat mapping for each unit, those of the forward pass first."""
        return [_flat(effect) for effect in (*self.forward, *self.backward)]

    def to_pandas(self) -> pandas.DataFrame:
        """`to_dict` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.to_dict())

    def tables(self) -> list[Table]:
        """A table of the forward units and, if gradients were measured, one of the backward units."""
        count = counted(self.batches, "batch", "batches")
        forward = Table(
            box=box.SIMPLE_HEAD,
            title=f"loss {self.loss}, all rounded {_signed(self.rounded)} ({count})",
            caption="change of the loss when only this is rounded, and when all but this are; estimates of the former",
        )
        forward.add_column(self.by, overflow="fold")
        for column in ("only this", "all but this", "g.e", "g.e + e.He/2", "not finite"):
            forward.add_column(column, justify="right")
        for effect in self.forward:
            numbers = (effect.alone, effect.without, effect.first, effect.second)
            forward.add_row(str(effect.unit), *map(_signed, numbers), str(effect.nonfinite or ""))
        if not self.backward:
            return [forward]
        total = "" if self.gradient is None else f", all rounded: {self.gradient.relative}"
        backward = Table(
            box=box.SIMPLE_HEAD,
            title=f"change of the gradient{total}",
            caption="|g' - g| / |g|, cosine and |g'| / |g| when only this is rounded, and the layer that changes most",
        )
        backward.add_column(self.by, overflow="fold")
        for column in ("change", "cosine", "norm", "worst layer", "its change", "not finite"):
            backward.add_column(column, justify="right")
        for effect in self.backward:
            change = effect.gradient
            assert change is not None, "a backward unit changes gradients"
            name, worst = max(effect.layers.items(), key=lambda item: _worse(item[1].relative.value))
            backward.add_row(
                str(effect.unit), str(change.relative), change.cosine.plain, change.norm.plain,
                name or "(root)", worst.relative.plain, str(effect.nonfinite or ""),
            )  # fmt: skip
        return [forward, backward]

    def plot(self, axes: Axes | None = None, *, most: int = 30) -> Axes:
        """The changes of the loss of the worst ``most`` forward units, with their estimates. It needs matplotlib."""
        axes = axes or new_axes()
        effects = self.forward[:most]
        places = range(len(effects))
        for name, marker in (("alone", "o"), ("first", "x"), ("second", "+")):
            means: list[Mean | None] = [getattr(effect, name) for effect in effects]
            values = [math.nan if each is None else each.value for each in means]
            errors = [0.0 if each is None or math.isnan(each.stderr) else each.stderr for each in means]
            label = {"alone": "measured", "first": "g.e", "second": "g.e + e.He/2"}[name]
            axes.errorbar(values, places, xerr=errors if name == "alone" else None, fmt=marker, capsize=2, label=label)
        axes.set_yticks(places, [str(effect.unit) for effect in effects])
        axes.invert_yaxis()
        axes.set(xlabel="change of the loss")
        axes.legend()
        return axes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.tables()


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    policy: PolicyLike,
    loss: Callable[..., Any] | None = None,
    by: By = "module",
    gradients: bool = True,
    estimates: bool = True,
    weight: Weight | None = None,
    backend: str = "fpsim_eager",
    progress: Callable[[int], object] | None = None,
) -> Sensitivity:
    """What the rounding of every module or site does to the loss, and what it does to the gradient.

    The model is compiled once: an input of the graph switches every rounding. For every unit of the forward pass the
    loss is measured when only this unit is rounded, and when all others are. For every unit of the backward pass the
    gradient is measured when only this unit is rounded.

    A batch costs two forward passes per forward unit, a gradient per backward unit, and less than six gradients for the
    estimates of all units: two forward passes, one gradient, and two Hessian products with random signs, whose terms
    between units have mean zero.

    Args:
        model: an uncompiled module in evaluation mode, which torch can compile as one graph.
        batches: as for `fpsim.evaluate.compare`. They are read once.
        policy: a policy (`fpsim.evaluate.policies.parse_policy`), without accumulators and without scales that depend
            on other steps.
        loss: as for `fpsim.evaluate.compare`.
        by: ``module`` switches all forward, or all backward, sites of a module together; ``site`` switches those of one
            kind of product and one role (``fprop weight``).
        gradients: whether to measure the units of the backward pass.
        estimates: whether to estimate changes from derivatives. Estimates are NaN where a value rounds to an infinity.
            They take errors as constants, which those of stochastic rounding in the forward pass are not.
        weight: a function from a batch to its weight in means, such as `fpsim.curvature.label_count`; None: all alike.
        backend: ``fpsim_eager``, or ``fpsim``, which compiles.
        progress: called with the number of batches that are done.

    Raises:
        ValueError: a policy that rounds nothing or that has no switches; a loss without a gradient; estimates for
            stochastic rounding in the forward pass; an unknown ``by``; and as `fpsim.evaluate.compare`.
        FloatingPointError: the loss of the unrounded model, or its gradient, is not finite.
        fpsim.curvature.CurvatureError: the loss cannot be differentiated twice: pass ``estimates=False``.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    >>> batches = [(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(3)]
    >>> result = sensitivity(model, batches, policy="e2m1fn", loss=nn.functional.mse_loss)
    >>> sorted(effect.unit.path for effect in result.forward)
    ['0', '2']
    """
    check_model(model)
    if by not in ("module", "site"):
        raise ValueError(f"unknown by {by!r}: use 'module' or 'site'")
    parsed = parse_policy(policy)
    if parsed is None:
        raise ValueError("the policy rounds nothing: name one, such as 'e4m3fn'")
    forward = forward_only(parsed)
    if estimates and forward.is_stochastic:
        raise ValueError(
            "estimates take the errors of rounding as constants, and stochastic rounding draws new ones each time: "
            "pass estimates=False, which measures one draw for each batch, or round to nearest"
        )
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad} if gradients else {}
    measured = _Measured(model, parsed, loss, by, parameters, backend)
    estimated = _Estimated(model, forward, loss, by) if estimates else None
    weights = []
    with unfused(), no_recompile_limit(), plain_errors("the policy"):
        for number, batch, own in weighed(model, batches, weight, measured.repeat):
            weights.append(own)
            with torch.set_grad_enabled(bool(parameters)):
                measured.add(number, batch)
            if estimated is not None:
                estimated.add(number, batch)
            if progress is not None:
                progress(number + 1)
    return _result(by, parsed, measured, estimated, weights)


def _unit(place: Place, by: str) -> Unit:
    direction = "forward" if place.is_forward else "backward"
    return Unit(place.path, direction) if by == "module" else Unit(place.path, direction, place.step, place.role)


def _grouped(places: Iterable[Place], by: str) -> dict[Unit, list[Place]]:
    units: dict[Unit, list[Place]] = {}
    for place in places:
        units.setdefault(_unit(place, by), []).append(place)
    return units


#: For each layer, and for all together under the name None: relative change, cosine and ratio of norms.
_Changes = dict[str | None, tuple[float, float, float]]


class _Measured:
    """The changes of the loss and the gradient on every batch."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        loss: Callable[..., Any] | None,
        by: str,
        parameters: Mapping[str, Tensor],
        backend: str,
    ) -> None:
        self.model = SwitchedModel(model, [policy], backend)
        self.loss, self.by, self.parameters = loss, by, parameters
        self.losses: list[float] = []
        self.rounded: list[float] = []
        self.alone: dict[Unit, list[float]] = {}
        self.without: dict[Unit, list[float]] = {}
        self.changes: dict[Unit | None, list[_Changes]] = {}

    def add(self, number: int, batch: Any) -> None:
        """Measure on one more batch."""
        exact, gradient = self._run(number, batch, [])
        refuse_nonfinite(exact, number)
        if gradient is not None:
            for name, value in gradient.items():
                if not torch.isfinite(value).all():
                    raise FloatingPointError(
                        f"the gradient of {name} in the unrounded model is not finite on batch {number}: pass "
                        "gradients=False, or look for a derivative that is infinite, such as that of a root at zero"
                    )
        units = _grouped(self.model.places, self.by)
        if not units:
            raise ValueError(
                "the policy rounds nothing in this model: look at fpsim.explain(model, ..., policy=...)"
                if self.parameters
                else "the policy rounds nothing in the forward pass of this model: name a format for activations or "
                "weights, or measure gradients too"
            )
        forward = [place for place in self.model.places if place.is_forward]
        self.losses.append(exact)
        self.rounded.append(self._loss(number, batch, forward) - exact)
        if gradient is not None:
            self._add_change(None, gradient, self._run(number, batch, self.model.places)[1])
        for unit, places in units.items():
            if unit.direction == "forward":
                others = [place for place in forward if place not in places]
                self.alone.setdefault(unit, []).append(self._loss(number, batch, places) - exact)
                self.without.setdefault(unit, []).append(self._loss(number, batch, others) - exact)
            elif gradient is not None:
                self._add_change(unit, gradient, self._run(number, batch, places)[1])

    def repeat(self, batch: Any) -> None:
        """Refuse a model whose unrounded loss on the first batch is another one by now."""
        with torch.set_grad_enabled(bool(self.parameters)):  # a graph for the other mode would be compiled
            again = self._loss(0, batch, [])
        refuse_unrepeated(self.losses[0], again, 0)

    def _loss(self, number: int, batch: Any, places: Sequence[Place]) -> float:
        self.model.turn(places)
        with same_draws(number):
            return float(loss_of(self.model, batch, self.loss).detach())

    def _run(self, number: int, batch: Any, places: Sequence[Place]) -> tuple[float, dict[str, Tensor] | None]:
        """The loss and, if there are parameters, its gradient, when ``places`` are rounded."""
        self.model.turn(places)
        with same_draws(number):
            loss = loss_of(self.model, batch, self.loss)
            if not self.parameters:
                return float(loss), None
            if not loss.requires_grad:
                raise ValueError(
                    "the loss has no gradient, so that none can be measured: compute it from the model's outputs by "
                    "functions of torch without detach, or pass gradients=False and estimates=False"
                )
            found = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        return float(loss.detach()), dict(zip(self.parameters, found, strict=True))

    def _add_change(self, unit: Unit | None, exact: Mapping[str, Tensor], other: Mapping[str, Tensor] | None) -> None:
        assert other is not None, "gradients are measured"
        parts = {name: _products(exact[name], other[name]) for name in exact}
        layers: dict[str | None, Tensor] = {None: sum(parts.values(), torch.zeros(4, dtype=torch.float64))}
        for name, part in parts.items():
            layer = name.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + part
        self.changes.setdefault(unit, []).append({layer: _change(part) for layer, part in layers.items()})


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``a.a``, ``b.b``, ``a.b`` and ``(b - a).(b - a)`` in float64."""
    a, b = a.detach().double(), b.detach().double()
    return torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), (b - a).square().sum()]).cpu()


def _change(products: Tensor) -> tuple[float, float, float]:
    """Relative change, cosine and ratio of norms; an exact gradient of zero that stays zero has not changed."""
    aa, bb, ab, dd = products.tolist()
    if aa == bb == 0:
        return 0.0, 1.0, 1.0
    if aa == 0 or math.isnan(aa):
        return math.inf, math.nan, math.inf
    return math.sqrt(dd / aa), ab / (math.sqrt(aa) * math.sqrt(bb)) if bb else 0.0, math.sqrt(bb / aa)


class _Estimated:
    """The estimates of the changes of the loss on every batch, from derivatives by the switches."""

    def __init__(self, model: nn.Module, policy: Policy, loss: Callable[..., Any] | None, by: str) -> None:
        self.switches = Switches([policy], is_blended=True)
        self.call = functional(model, policy, self.switches)
        self.state = {name: value.detach() for name, value in model.named_parameters()}
        self.dtype = next((v.dtype for v in self.state.values() if v.dtype == torch.float64), torch.float32)
        self.device = next((value.device for value in self.state.values()), torch.device("cpu"))
        self.loss, self.by = loss, by
        self.first: dict[Unit, list[float]] = {}
        self.second: dict[Unit, list[float]] = {}

    def add(self, number: int, batch: Any) -> None:
        """Estimate on one more batch."""
        with torch.no_grad():
            self._loss(torch.zeros(CAPACITY, dtype=self.dtype, device=self.device), number, batch)  # it is traced
        units = _grouped(self.switches.numbers, self.by)
        if not units:
            return
        numbers = {place: index for index, unit in enumerate(units) for place in units[unit]}
        owners = torch.tensor([numbers[place] for place in self.switches.numbers], device=self.device)
        gradients: list[Tensor] = []

        def loss(params: Mapping[str, Tensor]) -> Tensor:
            parts = params["parts"]
            # The first of the gradients that a product with the Hessian computes is that of the loss.
            parts.register_hook(lambda gradient: gradients.append(gradient.detach()))
            return self._loss(parts[owners], number, batch)

        parts = torch.zeros(len(units), dtype=self.dtype, device=self.device)
        operator = hessian(loss, {"parts": parts}, mode="double_backward", keep=True)
        generator = torch.Generator().manual_seed(number)
        diagonal = torch.zeros(len(units), dtype=torch.float64)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, (len(units),), generator=generator).double() * 2 - 1
            diagonal += signs * (operator @ signs).double().cpu() / PROBES
        lost = {_unit(place, self.by) for place, n in self.switches.numbers.items() if n in self.switches.overflowed}
        first = gradients[0].double().cpu()
        for index, unit in enumerate(units):
            one = math.nan if unit in lost else float(first[index])
            self.first.setdefault(unit, []).append(one)
            self.second.setdefault(unit, []).append(one + float(diagonal[index]) / 2)

    def _loss(self, weights: Tensor, number: int, batch: Any) -> Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            return self.call(self.state, args, kwargs, weights)

        with same_draws(number):
            return loss_of(model, batch, self.loss)


def _result(
    by: By, policy: Policy, measured: _Measured, estimated: _Estimated | None, weights: Sequence[float]
) -> Sensitivity:
    forward = [
        Effect(
            unit=unit,
            alone=mean(values, weights),
            without=mean(measured.without[unit], weights),
            first=None if estimated is None else mean(estimated.first[unit], weights),
            second=None if estimated is None else mean(estimated.second[unit], weights),
            size=_size(values, weights),
            nonfinite=sum(not math.isfinite(value) for value in values),
        )
        for unit, values in measured.alone.items()
    ]
    backward = [
        Effect(
            unit=unit,
            size=_size([change[None][0] for change in changes], weights),
            nonfinite=sum(not math.isfinite(change[None][0]) for change in changes),
            gradient=_mean_change([change[None] for change in changes], weights),
            layers={
                layer: _mean_change([change[layer] for change in changes], weights)
                for layer in changes[0]
                if layer is not None
            },
        )
        for unit, changes in measured.changes.items()
        if unit is not None
    ]
    total = measured.changes.get(None)
    return Sensitivity(
        by=by,
        policy=policy,
        loss=mean(measured.losses, weights),
        rounded=mean(measured.rounded, weights),
        gradient=None if total is None else _mean_change([change[None] for change in total], weights),
        forward=tuple(sorted(forward, key=lambda effect: -_worse(effect.size))),
        backward=tuple(sorted(backward, key=lambda effect: -_worse(effect.size))),
        batches=len(weights),
    )


def _mean_change(values: Sequence[tuple[float, float, float]], weights: Sequence[float]) -> GradientChange:
    return GradientChange(*(mean(column, weights) for column in zip(*values, strict=True)))


def _size(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.sqrt(mean([value * value for value in values], weights).value)


def _flat(effect: Effect) -> dict[str, Any]:
    unit = effect.unit
    row: dict[str, Any] = {"module": unit.path, "direction": unit.direction, "step": unit.step, "role": unit.role}
    change = effect.gradient
    numbers = {
        "alone": effect.alone,
        "without": effect.without,
        "first": effect.first,
        "second": effect.second,
        "gradient_change": None if change is None else change.relative,
        "gradient_cosine": None if change is None else change.cosine,
        "gradient_norm": None if change is None else change.norm,
    }
    for name, value in numbers.items():
        row[name] = None if value is None else value.value
        row[f"{name}_stderr"] = None if value is None else value.stderr
    return row | {"size": effect.size, "nonfinite": effect.nonfinite}


def _signed(value: Mean | None) -> str:
    return "" if value is None else str(value)


def _worse(value: float) -> float:
    return math.inf if math.isnan(value) else value
