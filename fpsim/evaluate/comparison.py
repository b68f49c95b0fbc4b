"""A model under several policies, side by side on the same batches: `compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from fpsim.compile_backend import explain
from fpsim.compile_backend.report.running import no_recompile_limit
from fpsim.curvature.results import new_axes
from fpsim.evaluate.batches import (
    Clock,
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
from fpsim.evaluate.policies import NOTHING, UNROUNDED, PolicyLike, named_policies
from fpsim.evaluate.running import under
from fpsim.evaluate.tables import Printed, data_frame
from fpsim.evaluate.texts import unfused
from fpsim.policy import Policy
from fpsim.showing import counted

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

#: The metric that is the exponential of the mean loss.
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Row:
    """The measurements under one policy.

    Attributes:
        name: the name of the policy.
        policy: the policy; None if nothing is rounded.
        values: the loss or the metric of every batch.
        mean: their weighted mean.
        difference: the weighted mean of the differences from the unrounded model on the same batches. Its standard
            error is that of paired differences.
        nonfinite: the number of batches on which the value is infinite or NaN. Means are then infinite or NaN too.
        seconds: the mean time of a batch, forward, without the first one, which compiles.
    """

    name: str
    policy: Policy | None
    values: tuple[float, ...]
    mean: Mean
    difference: Mean
    nonfinite: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean, for losses that are cross-entropies in nats."""
        return float(torch.tensor(self.mean.value, dtype=torch.float64).exp())


@dataclass(frozen=True)
class Comparison(Printed):
    """The result of `compare`. ``print(comparison)`` and ``rich.print(comparison)`` show a table.

    Attributes:
        measure: what is measured: ``loss``, ``perplexity``, or the name of the metric.
        rows: the unrounded model first, and then one row for each policy.
        weights: the weight of each batch.
    """

    measure: str
    rows: tuple[Row, ...]
    weights: tuple[float, ...]

    def __getitem__(self, name: str) -> Row:
        """The row of the policy ``name``."""
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise KeyError(f"no policy {name!r}: there are {', '.join(row.name for row in self.rows)}")
        return found

    def to_dict(self) -> list[dict[str, Any]]:
        """One flat mapping for each row."""
        return [
            {
                "policy": row.name,
                "mean": row.mean.value,
                "stderr": row.mean.stderr,
                "difference": row.difference.value,
                "difference_stderr": row.difference.stderr,
                **({PERPLEXITY: row.perplexity} if self.measure == PERPLEXITY else {}),
                "nonfinite": row.nonfinite,
                "seconds": row.seconds,
            }
            for row in self.rows
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """`to_dict` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.to_dict())

    def table(self) -> Table:
        """The rows as a table."""
        is_perplexity = self.measure == PERPLEXITY
        what = "loss" if is_perplexity else self.measure
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"{self.measure} over {counted(len(self.weights), 'batch', 'batches')}",
            caption="mean ± standard error over batches; differences from the unrounded model, paired by batch",
        )
        table.add_column("policy", overflow="fold")
        columns = (what, "difference", *([PERPLEXITY] if is_perplexity else []), "not finite", "s / batch")
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            difference = "" if row.policy is None else f"{row.difference}"
            more = [f"{row.perplexity:.6g}"] if is_perplexity else []
            table.add_row(row.name, row.mean.plain, difference, *more, str(row.nonfinite or ""), f"{row.seconds:.3g}")
        return table

    def plot(self, axes: Axes | None = None) -> Axes:
        """The differences from the unrounded model, with standard errors as bars. It needs matplotlib."""
        axes = axes or new_axes()
        rows = [row for row in self.rows if row.policy is not None]
        axes.errorbar(
            [row.difference.value for row in rows],
            range(len(rows)),
            xerr=[0.0 if math.isnan(row.difference.stderr) else row.difference.stderr for row in rows],
            fmt="o",
            capsize=3,
        )
        axes.axvline(0.0, linewidth=0.8, color="grey")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel=f"change of the {'loss' if self.measure == PERPLEXITY else self.measure}")
        return axes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    policies: Mapping[str, PolicyLike] | Iterable[PolicyLike] | PolicyLike,
    *,
    loss: Callable[..., Any] | None = None,
    metric: Callable[..., Any] | str | None = None,
    weight: Weight | None = None,
    backend: str = "fpsim_eager",
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """The loss of ``model`` under each of ``policies`` and unrounded, on the same batches.

    Batches are read once, one after the other, and every batch runs under all policies, so that memory holds one batch
    and one number for each batch and policy. Stochastic rounding draws the same numbers in every call of `compare`. The
    unrounded model runs through the same backend, so that differences show rounding alone.

    Args:
        model: an uncompiled module in evaluation mode.
        batches: mappings, for which the loss is ``loss(model(**batch), batch)``, or ``model(**batch).loss`` without
            ``loss``; tuples, for which it is ``loss(model(batch[0]), *batch[1:])``, or ``model(*batch)``; or other
            values, for which it is ``loss(model(batch))``, or ``model(batch)``. A generator will do.
        policies: policies by name, or several policies, or one (`fpsim.evaluate.policies.parse_policy`).
        loss: a function that gives one number. It is not rounded.
        metric: ``"perplexity"`` shows the exponential of the mean loss too. A function is measured in place of the
            loss, and is called as the loss is.
        weight: a function from a batch to its weight in means, such as `fpsim.curvature.label_count`; None: all alike.
        backend: ``fpsim_eager``, or ``fpsim``, which compiles: the same bits, and faster for many batches.
        progress: called with the number of batches that are done.

    Returns:
        A `Comparison`: the unrounded model first, and then the policies in the order given.

    Raises:
        ValueError: a policy that rounds nothing in the model's forward pass or that cannot be carried out; a model that
            is compiled, in training mode, changes its buffers, or gives the first batch another loss in a second run;
            no batch, a batch that changes in use; an unknown metric or backend; and the errors of
            `fpsim.evaluate.policies.named_policies`.
        TypeError: a loss that is not a number.
        FloatingPointError: the unrounded model's loss is not finite. Under a policy this is no error: the row counts
            such batches.

    >>> model = nn.Linear(2, 1).eval()
    >>> batches = [(torch.randn(3, 2), torch.randn(3, 1)) for _ in range(4)]
    >>> [row.name for row in compare(model, batches, ["bf16", "e4m3fn"], loss=nn.functional.mse_loss).rows]
    ['unrounded', 'bf16', 'e4m3fn']
    """
    check_model(model)
    if not (metric is None or metric == PERPLEXITY or callable(metric)):
        raise ValueError(f"unknown metric {metric!r}: use 'perplexity', a function, or None")
    function = metric if callable(metric) else None
    measure = PERPLEXITY if metric == PERPLEXITY else "loss" if function is None else _name_of(function)
    what = "loss" if function is None else measure
    given = {name: policy for name, policy in named_policies(policies).items() if policy is not None}
    by_name = {UNROUNDED: NOTHING, **given}
    values: dict[str, list[float]] = {name: [] for name in by_name}
    clocks = {name: Clock() for name in by_name}
    weights = []
    with torch.no_grad(), unfused(), no_recompile_limit():
        compiled = {name: under(model, policy, backend) for name, policy in by_name.items()}

        def repeat(batch: Any) -> None:
            with same_draws(0):
                again = _number(compiled[UNROUNDED], batch, loss, function)
            refuse_unrepeated(values[UNROUNDED][0], again, 0, what)

        for number, batch, own in weighed(model, batches, weight, repeat):
            weights.append(own)
            for name, network in compiled.items():
                if number == 0 and name != UNROUNDED:
                    _refuse_empty(model, batch, name, by_name[name], function or loss)
                with same_draws(number), plain_errors(name), clocks[name].running():
                    value = _number(network, batch, loss, function)
                values[name].append(value)
                if name == UNROUNDED:
                    refuse_nonfinite(value, number, what)
            if progress is not None:
                progress(number + 1)
    exact = values[UNROUNDED]
    rows = tuple(
        Row(
            name=name,
            policy=given.get(name),
            values=tuple(values[name]),
            mean=mean(values[name], weights),
            difference=mean([a - b for a, b in zip(values[name], exact, strict=True)], weights),
            nonfinite=sum(not math.isfinite(value) for value in values[name]),
            seconds=clocks[name].seconds,
        )
        for name in by_name
    )
    return Comparison(measure, rows, tuple(weights))


def _number(network: Any, batch: Any, loss: Callable[..., Any] | None, metric: Callable[..., Any] | None) -> float:
    """The metric of ``network``, or its loss."""
    if metric is None:
        return float(loss_of(network, batch, loss))
    value = number_of(network, batch, metric)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"the metric must be one number, got a tensor of shape {tuple(value.shape)}: take its mean")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the metric must be one number, got {value!r}: return a number or a tensor of one") from error


def _refuse_empty(model: nn.Module, batch: Any, name: str, policy: Policy, function: Callable[..., Any] | None) -> None:
    """Refuse a policy that rounds nothing in the forward pass of ``model``."""
    plans = []

    def planned(*args: Any, **kwargs: Any) -> Any:
        plans.append(explain(model, *args, policy=policy, **kwargs))
        return model(*args, **kwargs)

    number_of(planned, batch, function)
    plan = plans[0]
    if not any(site.cast for site in plan.sites) and not plan.sums:
        left = f"; {plan.gaps[0].reason}" if plan.gaps else ""
        raise ValueError(
            f"policy {name!r} rounds nothing in the forward pass of the model{left}: name a format for activations or "
            "weights, and look at fpsim.explain(model, ..., policy=...)"
        )


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
