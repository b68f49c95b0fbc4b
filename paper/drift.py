"""Which layers' weights leave those of the reference: the runs of a sweep, trained once more in pairs.

A sweep keeps no weights. A run is a pure function of its configuration, so that training it again gives them. One-sided
rounding errors of attention show as weights whose spectral norm grows (arXiv 2510.04212).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from .choices import check_choice
from .comparison import pairs
from .compiled_loss import Compile
from .config import RunConfig
from .data import Data
from .figures import Judged, Line, drift_lines
from .intervals import mean_and_half
from .progress import progress_bars, say
from .record import Record
from .storage import Run
from .trainer import Trainer
from .training import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Difference:
    """The weights of one layer in a pair of runs, after the same number of updates.

    Attributes:
        step: updates made.
        layer: name of the parameter in the network.
        growth: the spectral norm (of a vector: the 2-norm) over that in the reference's run, minus 1.
        distance: the Frobenius norm of the difference over that of the reference's weights.
    """

    step: int
    layer: str
    growth: float
    distance: float


@dataclass(frozen=True)
class Drift:
    """The mean `Difference` over pairs of runs, with halves of Student's intervals of the registered level.

    Attributes:
        condition: the condition that is compared with the reference.
        step, layer: as in `Difference`.
        pairs: the number of pairs that reached the step, both with finite weights.
        growth, growth_half: the mean, and half of its interval (NaN for a single pair).
        distance, distance_half: the same.
    """

    condition: str
    step: int
    layer: str
    pairs: int
    growth: float
    growth_half: float
    distance: float
    distance_half: float


def differences(
    own: RunConfig,
    reference: RunConfig,
    *,
    every: int,
    data: Data | None = None,
    compile: Compile | None = None,
    after_step: Callable[[Record, Record], object] = lambda *_: None,
) -> Iterator[Difference]:
    """Train two runs side by side, and compare their weights every ``every`` steps and after the last one.

    Nothing is yielded for a step at which a weight of either run is not finite, nor once one of the runs has ended.

    Args:
        own, reference: runs of the same network.
        data, compile: as `fpsim.paper.training.records` takes them.
        after_step: called with the records of both runs after each step.

    Raises:
        ValueError: the networks have other layers, or ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"the number of steps between comparisons must be at least 1, got {every}")
    trainers: list[Trainer] = []
    runs = [records(config, data, compile=compile, at_start=trainers.append) for config in (own, reference)]
    for record, other in zip(*runs, strict=False):
        after_step(record, other)
        if record.step % every == 0 or record.step == own.steps:
            yield from _compare(record.step, *(trainer.model.network for trainer in trainers))


def _compare(step: int, own: nn.Module, reference: nn.Module) -> list[Difference]:
    weights, others = (
        {name: parameter.detach().double() for name, parameter in network.named_parameters()}
        for network in (own, reference)
    )
    if weights.keys() != others.keys():
        raise ValueError(
            f"the networks have other layers ({', '.join(sorted(weights.keys() ^ others.keys()))}), "
            "so that their weights cannot be compared"
        )
    if not all(torch.isfinite(weight).all() for weight in (*weights.values(), *others.values())):
        return []
    return [
        Difference(
            step,
            name,
            growth=float(_norm(weight) / _norm(others[name])) - 1,
            distance=float((weight - others[name]).norm() / others[name].norm()),
        )
        for name, weight in weights.items()
    ]


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.flatten(1), 2) if weight.dim() > 1 else torch.linalg.vector_norm(weight)


def summary(condition: str, found: Sequence[Difference]) -> list[Drift]:
    """The means over all pairs of ``condition``, by step and layer in the order in which they were found."""
    places: dict[tuple[int, str], list[Difference]] = {}
    for each in found:
        places.setdefault((each.step, each.layer), []).append(each)
    return [
        Drift(
            condition,
            step,
            layer,
            len(several),
            *mean_and_half([each.growth for each in several]),
            *mean_and_half([each.distance for each in several]),
        )
        for (step, layer), several in sorted(places.items(), key=lambda place: place[0][0])
    ]


def drifts(
    judged: Judged, conditions: Sequence[str] | None = None, *, seeds: int, every: int, console: Console
) -> list[Drift]:
    """Train runs of a sweep again, each with the reference's run of the same seed and learning rate.

    On another machine, or with other versions of the packages, the losses may be others than the sweep's. A line on the
    console says so, and names conditions of which no weights are left to compare.

    Args:
        judged: the sweep.
        conditions: those to compare; None means all but the reference.
        seeds: how many seeds to take, the lowest first, at all learning rates.
        every: as in `differences`.
        console: where the progress is shown.

    Raises:
        ValueError: a condition that the sweep does not have, no pair of its runs, or none with finite weights.
    """
    check_choice("reference", judged.reference, judged.conditions)
    others = [name for name in judged.conditions if name != judged.reference]
    chosen = {name: _first(pairs(judged, name), judged, seeds) for name in conditions or others}
    for name, several in chosen.items():
        check_choice("condition", name, others)
        if not several:
            raise ValueError(f"no run of {name} has the seed and the learning rate of one of {judged.reference}")
    found: list[Drift] = []
    changed = 0
    with _threads(int(judged.runs[0].facts["threads"])), progress_bars(console) as progress:
        task = progress.add_task("pairs", total=sum(map(len, chosen.values())), state="")
        for name, several in chosen.items():
            torch._dynamo.reset()  # a process keeps the code of two conditions at a time
            measured: list[Difference] = []
            for index, other in several:
                run, reference = judged.runs[index], judged.runs[other]
                progress.update(task, state=f"{name}, rate {run.config.learning_rate:g}, seed {run.config.seed}")
                own, has_losses = _again(run, reference, every)
                measured += own
                changed += not has_losses
                progress.advance(task)
            if not measured:
                say(console, f"{name}: no pair of runs has finite weights to compare")
            found += summary(name, measured)
    if changed:
        total = sum(map(len, chosen.values()))
        say(console, f"{changed} of {total} pairs have other losses than in the sweep: it ran on another machine")
    if not found:
        raise ValueError(f"no pair of runs has finite weights after {every} steps: compare more often")
    return found


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """A block with this number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _again(run: Run, reference: Run, every: int) -> tuple[list[Difference], bool]:
    """The differences of two runs that are trained again, and whether they have the losses of the sweep."""
    steps: list[tuple[Record, Record]] = []
    found = list(differences(run.config, reference.config, every=every, after_step=lambda *both: steps.append(both)))
    histories = zip(*steps, strict=True)
    return found, all(_has_losses(each, history) for each, history in zip((run, reference), histories, strict=True))


def _has_losses(run: Run, history: Sequence[Record]) -> bool:
    """Whether ``run`` has the losses of ``history`` in its first steps."""
    return np.array_equal(run["loss"][: len(history)], [record.loss for record in history], equal_nan=True)


def _first(found: Sequence[tuple[int, int]], judged: Judged, seeds: int) -> list[tuple[int, int]]:
    """The pairs of the lowest ``seeds`` seeds."""
    lowest = sorted({judged.runs[index].config.seed for index, _ in found})[:seeds]
    return [pair for pair in found if judged.runs[pair[0]].config.seed in lowest]


def markdown(found: Sequence[Drift], reference: str) -> str:
    """A table of the last step of each condition, the layer that grows most first."""
    lines = [
        f"Weights against those of {reference}, over pairs of runs with the same seed and learning rate.",
        "",
        "| condition | step | layer | pairs | growth of the spectral norm, % | distance, % |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for condition in dict.fromkeys(each.condition for each in found):
        own = [each for each in found if each.condition == condition]
        last = [each for each in own if each.step == own[-1].step]
        lines += [
            f"| {condition} | {each.step} | `{each.layer}` | {each.pairs} | {_percent(each.growth, each.growth_half)} "
            f"| {_percent(each.distance, each.distance_half)} |"
            for each in sorted(last, key=lambda each: -each.growth)
        ]
    return "\n".join([*lines, ""])


def _percent(mean: float, half: float) -> str:
    return f"{100 * mean:.3g} ± {100 * half:.2g}"


def figure(found: Sequence[Drift]) -> Figure:
    """The growth of every layer's spectral norm over the steps, a panel for each condition."""
    panels: dict[str, list[Line]] = {}
    for condition, layer in dict.fromkeys((each.condition, each.layer) for each in found):
        own = [each for each in found if (each.condition, each.layer) == (condition, layer)]
        growth = [100 * each.growth for each in own]
        halves = [100 * each.growth_half for each in own]
        low, high = ([g + sign * h for g, h in zip(growth, halves, strict=True)] for sign in (-1, 1))
        panels.setdefault(condition, []).append(Line(layer, [each.step for each in own], growth, low, high))
    return drift_lines(panels)
