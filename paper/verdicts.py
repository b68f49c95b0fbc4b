"""Whether a run diverged, spiked or trained, by the rules that ``preregistration.toml`` fixed beforehand.

Everything here takes arrays and returns values; nothing is fitted to the results that it judges.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from .storage import Run


@dataclass(frozen=True)
class Rules:
    """The numbers of ``preregistration.toml``, one table each."""

    diverged: Mapping[str, float]
    spiked: Mapping[str, float]
    trained: Mapping[str, float]
    prediction: Mapping[str, Any]
    sensitivity: Mapping[str, float]
    experiments: Mapping[str, Mapping[str, Any]]
    claims: Mapping[str, Mapping[str, Any]]


def preregistration() -> str:
    """The text of the file with the registered rules."""
    return resources.files(__package__).joinpath("preregistration.toml").read_text()


@lru_cache(maxsize=1)
def rules() -> Rules:
    """The registered rules."""
    return Rules(**tomllib.loads(preregistration()))


@dataclass(frozen=True)
class Verdict:
    """The verdict on one run.

    Attributes:
        diverged_at: the step at which it diverged, or None.
        spikes: the first step of every spike.
        final_loss: smoothed training loss at the end, nats per token; it may be NaN or infinite.
        final_validation_loss: the last one; NaN if there is none.
        rising_since: the step from which the loss of a run that did not diverge is too high until the end, which comes
            too early to call that divergence; None where the loss is not too high at the end.
    """

    diverged_at: int | None
    spikes: tuple[int, ...]
    final_loss: float
    final_validation_loss: float
    rising_since: int | None = None

    @property
    def undecided(self) -> bool:
        """Whether the run ended before it was clear that it diverges."""
        return self.rising_since is not None

    @property
    def diverged(self) -> bool:
        """Whether the run diverged."""
        return self.diverged_at is not None

    @property
    def spiked(self) -> bool:
        """Whether the loss spiked at least once."""
        return bool(self.spikes)


def judge(run: Run, by: Rules | None = None) -> Verdict:
    """The verdict on ``run`` by the registered rules, or others."""
    by = by or rules()
    steps, warmup = run.config.steps, run.config.warmup
    validation = run["validation_loss"][~np.isnan(run["validation_loss"])]
    onset = divergence(run["loss"], run["smoothed_loss"], _norms_of_updates(run), steps=steps, by=by)
    return Verdict(
        onset,
        spikes(run["loss"], run["smoothed_loss"], warmup=warmup, by=by),
        float(run["smoothed_loss"][-1]),
        float(validation[-1]) if len(validation) else math.nan,
        rising_since(run["smoothed_loss"], by=by) if onset is None else None,
    )


def _norms_of_updates(run: Run) -> np.ndarray:
    """The gradient norm of each step; 0 where a scaled loss overflows, since that step is skipped."""
    norms = run["gradient_norm"]
    return np.where(np.isfinite(run["loss_scale"]) & ~np.isfinite(norms), 0.0, norms)


def divergence(
    loss: np.ndarray, smoothed: np.ndarray, gradient_norm: np.ndarray, *, steps: int, by: Rules
) -> int | None:
    """The step (from 1) at which a run diverged; None if it did not.

    Args:
        loss, smoothed, gradient_norm: one value per step, float64.
        steps: the planned steps of the run, which may have ended early.
    """
    onsets = []
    broken = ~(np.isfinite(loss) & np.isfinite(gradient_norm))
    if broken.any():
        onsets.append(int(broken.argmax()) + 1)
    needed = max(int(by.diverged["steps_least"]), math.ceil(by.diverged["steps_share"] * steps))
    for start, length in _stretches(_too_high(smoothed, by)):
        if length >= needed:
            onsets.append(start + 1)
            break
    return min(onsets, default=None)


def rising_since(smoothed: np.ndarray, *, by: Rules) -> int | None:
    """The first step (from 1) of the stretch in which a run's loss is too high, if the run ends in one; else None."""
    stretches = _stretches(_too_high(smoothed, by))
    return stretches[-1][0] + 1 if stretches and sum(stretches[-1]) == len(smoothed) else None


def _too_high(smoothed: np.ndarray, by: Rules) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return smoothed - np.fmin.accumulate(smoothed) >= by.diverged["rise"]


def spikes(loss: np.ndarray, smoothed: np.ndarray, *, warmup: int, by: Rules) -> tuple[int, ...]:
    """The steps (from 1) at which the loss spiked: the first step of every spike."""
    found: list[int] = []
    last = -math.inf
    square = math.nan
    for index, (value, before) in enumerate(zip(loss.tolist()[1:], smoothed.tolist(), strict=False), 1):
        excess = value - before
        is_spike = excess >= by.spiked["rise"] and excess >= by.spiked["deviations"] * math.sqrt(square)
        if is_spike and index >= warmup:
            if index - last > by.spiked["apart"]:
                found.append(index + 1)
            last = index
        elif math.isfinite(excess):  # a spike does not widen the deviation that counts as noise
            weight = max(0.02, 1 / index)
            square = excess * excess if math.isnan(square) else square + weight * (excess * excess - square)
    return tuple(found)


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of every run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def trained(runs: Sequence[Run], verdicts: Sequence[Verdict], reference: str, by: Rules | None = None) -> list[bool]:
    """Whether each run trained: it did not diverge, is decided, and is not far above ``reference`` at its rate."""
    by = by or rules()
    levels = _reference_levels(runs, verdicts, reference)
    best = min(levels.values(), default=math.nan)
    return [
        not verdict.diverged
        and not verdict.undecided
        and not verdict.final_loss > levels.get(run.config.learning_rate, best) + by.trained["margin"]
        for run, verdict in zip(runs, verdicts, strict=True)
    ]


def _reference_levels(runs: Sequence[Run], verdicts: Sequence[Verdict], reference: str) -> dict[float, float]:
    finals: dict[float, list[float]] = {}
    for run, verdict in zip(runs, verdicts, strict=True):
        if run.condition == reference and not verdict.diverged and not verdict.undecided:
            finals.setdefault(run.config.learning_rate, []).append(verdict.final_loss)
    return {rate: float(np.median(values)) for rate, values in finals.items()}
