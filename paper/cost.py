"""What an experiment costs: a few measured steps of each condition, times the tokens of all its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from .config import RunConfig
from .data import Data
from .record import step_seconds
from .sweeps import Planned
from .training import run


@dataclass(frozen=True)
class Cost:
    """The measured and the extrapolated time of a condition.

    Attributes:
        condition: its name.
        runs: the number of its runs.
        tokens: the training tokens of a run.
        seconds_per_token: of a step: forward, backward and update, on the device of the run, after compilation.
        seconds_to_compile: what the first step takes more than a later one.
    """

    condition: str
    runs: int
    tokens: int
    seconds_per_token: float
    seconds_to_compile: float

    @property
    def hours(self) -> float:
        """Hours of the device for all runs, compiled once: the others find the code in Inductor's cache."""
        return (self.runs * self.tokens * self.seconds_per_token + self.seconds_to_compile) / 3600


def costs(plan: Sequence[Planned], *, windows: int | None = None, steps: int = 3) -> Iterator[Cost]:
    """Measure one condition after the other, each with its first run's configuration.

    The runs train on random tokens and measure nothing: validation and sharpness are not counted. Time is taken to be
    proportional to tokens, and all runs of a condition to stop at their last step.

    Args:
        windows: per measured step; None is the batch of the runs. Gradients are not accumulated.
        steps: measured steps after the first, which compiles. Their median counts.

    Raises:
        ValueError: no windows, no steps, or a device that this machine lacks.
    """
    if steps < 1 or (windows is not None and windows < 1):
        raise ValueError(f"steps and windows must be at least 1, got {steps} and {windows}")
    for name in dict.fromkeys(planned.condition for planned in plan):
        configs = [planned.config for planned in plan if planned.condition == name]
        yield _cost(name, configs, windows or configs[0].batch, steps)


def _cost(name: str, configs: Sequence[RunConfig], windows: int, steps: int) -> Cost:
    first = configs[0]
    if torch.device(first.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("these runs are for a GPU, and this machine has none: add --device cpu to measure here")
    measured = replace(
        first,
        batch=windows,
        accumulate=1,
        steps=steps + 1,
        validate_every=steps + 1,
        validation_batches=1,
        measure_every=0,
        attention_every=0,
        lbfgsb_every=0,
        hessian_every=0,
        ranges_every=0,
    )
    size = first.model.vocabulary
    tokens = torch.randint(size, (4 * windows * (first.model.context + 1),), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(torch.uint16 if size > 256 else torch.uint8)
    history = run(measured, Data(tokens, tokens))
    seconds = step_seconds(history)
    return Cost(
        name,
        runs=len(configs),
        tokens=first.steps * first.batch * first.accumulate * first.model.context,
        seconds_per_token=seconds / (windows * first.model.context),
        seconds_to_compile=history[0].seconds - seconds,
    )


def table(found: Sequence[Cost]) -> Table:
    """The costs by condition, and their sum."""
    shown = Table("condition", title="Cost, extrapolated from a few steps")
    for column in ("runs", "tokens of a run", "ms per 1000 tokens", "compilation, s", "hours of all runs"):
        shown.add_column(column, justify="right")
    for cost in found:
        shown.add_row(
            cost.condition,
            str(cost.runs),
            f"{cost.tokens:.3g}",
            f"{1e6 * cost.seconds_per_token:.4g}",
            f"{cost.seconds_to_compile:.3g}",
            f"{cost.hours:.3g}",
        )
    shown.add_section()
    shown.add_row("all", str(sum(cost.runs for cost in found)), "", "", "", f"{sum(cost.hours for cost in found):.3g}")
    return shown
