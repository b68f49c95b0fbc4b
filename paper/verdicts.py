"""What became of a run, by rules fixed beforehand in ``preregistration.toml``, and statistics over many runs.

Everything here takes arrays and returns values; nothing is fitted to the results that it judges.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from scipy import stats

from .storage import Run

#: Signals that may warn of divergence: name, and what they are called.
SIGNALS = {
    "sharpness_5e4": "logit sharpness, ε = 5e-4",
    "sharpness_1e3": "logit sharpness, ε = 1e-3",
    "lbfgsb_5e4": "logit sharpness by L-BFGS-B, ε = 5e-4",
    "gradient_norm": "gradient norm",
    "max_abs_logit": "max |z|",
    "hessian_eigenvalue": "Hessian eigenvalue",
    "loss_variance": "variance of the loss",
    "loss": "loss itself",
}


@dataclass(frozen=True)
class Rules:
    """The numbers of ``preregistration.toml``, one table each."""

    diverged: Mapping[str, float]
    spiked: Mapping[str, float]
    trained: Mapping[str, float]
    prediction: Mapping[str, Any]


def preregistration() -> str:
    """The text of the file that fixes what counts as what."""
    return resources.files(__package__).joinpath("preregistration.toml").read_text()


@lru_cache(maxsize=1)
def rules() -> Rules:
    """The registered rules."""
    return Rules(**tomllib.loads(preregistration()))


@dataclass(frozen=True)
class Verdict:
    """What became of one run.

    Attributes:
        diverged_at: the step at which it diverged, or None.
        spikes: the first step of every spike.
        final_loss: smoothed training loss at the end, nats per token; NaN or infinite where it is.
        final_validation_loss: the last one; NaN if there is none.
    """

    diverged_at: int | None
    spikes: tuple[int, ...]
    final_loss: float
    final_validation_loss: float

    @property
    def diverged(self) -> bool:
        """Whether the run diverged."""
        return self.diverged_at is not None

    @property
    def spiked(self) -> bool:
        """Whether the loss spiked at least once."""
        return bool(self.spikes)


def judge(run: Run, by: Rules | None = None) -> Verdict:
    """What became of ``run``."""
    by = by or rules()
    steps, warmup = run.config.steps, run.config.warmup
    validation = run["validation_loss"][~np.isnan(run["validation_loss"])]
    return Verdict(
        divergence(run["loss"], run["smoothed_loss"], run["gradient_norm"], steps=steps, by=by),
        spikes(run["loss"], run["smoothed_loss"], warmup=warmup, by=by),
        float(run["smoothed_loss"][-1]),
        float(validation[-1]) if len(validation) else math.nan,
    )


def divergence(
    loss: np.ndarray, smoothed: np.ndarray, gradient_norm: np.ndarray, *, steps: int, by: Rules
) -> int | None:
    """The step (from 1) at which a run diverged; None if it did not.

    Args:
        loss, smoothed, gradient_norm: one value per step, float64.
        steps: of the whole run, which may have ended early.
    """
    onsets = []
    broken = ~(np.isfinite(loss) & np.isfinite(gradient_norm))
    if broken.any():
        onsets.append(int(broken.argmax()) + 1)
    needed = max(int(by.diverged["steps_least"]), math.ceil(by.diverged["steps_share"] * steps))
    with np.errstate(invalid="ignore"):
        above = smoothed - np.fmin.accumulate(smoothed) >= by.diverged["rise"]
    for start, length in _stretches(above):
        if length >= needed:
            onsets.append(start + 1)
            break
    return min(onsets, default=None)


def spikes(loss: np.ndarray, smoothed: np.ndarray, *, warmup: int, by: Rules) -> tuple[int, ...]:
    """The steps (from 1) at which the loss spiked: the first of neighbouring ones."""
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
        elif math.isfinite(excess):  # a spike does not widen what counts as noise
            weight = max(0.02, 1 / index)
            square = excess * excess if math.isnan(square) else square + weight * (excess * excess - square)
    return tuple(found)


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of every run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


# -- conditions --------------------------------------------------------------------------------------------------------


def trained(runs: Sequence[Run], verdicts: Sequence[Verdict], reference: str, by: Rules | None = None) -> list[bool]:
    """Which runs trained: not diverged, and not far above the condition ``reference`` at their learning rate."""
    by = by or rules()
    levels = _reference_levels(runs, verdicts, reference)
    best = min(levels.values(), default=math.nan)
    return [
        not verdict.diverged
        and not verdict.final_loss > levels.get(run.config.learning_rate, best) + by.trained["margin"]
        for run, verdict in zip(runs, verdicts, strict=True)
    ]


def _reference_levels(runs: Sequence[Run], verdicts: Sequence[Verdict], reference: str) -> dict[float, float]:
    finals: dict[float, list[float]] = {}
    for run, verdict in zip(runs, verdicts, strict=True):
        if run.condition == reference and not verdict.diverged:
            finals.setdefault(run.config.learning_rate, []).append(verdict.final_loss)
    return {rate: float(np.median(values)) for rate, values in finals.items()}


@dataclass(frozen=True)
class Share:
    """A share of runs with its exact (Clopper and Pearson) interval."""

    count: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.count}/{self.total} [{self.low:.2f}, {self.high:.2f}]"


def share(flags: Sequence[bool], level: float | None = None) -> Share:
    """How many of ``flags`` are true, with an interval of the registered level.

    >>> str(share([True] * 18 + [False] * 170))
    '18/188 [0.06, 0.15]'
    """
    count, total = sum(map(bool, flags)), len(flags)
    found = stats.binomtest(count, total).proportion_ci(level or rules().prediction["level"], method="exact")
    return Share(count, total, float(found.low), float(found.high))


@dataclass(frozen=True)
class Comparison:
    """Fisher's exact test between two conditions: one-sided (the first more often), two-sided, and the odds ratio."""

    first: Share
    second: Share
    p_greater: float
    p_two_sided: float
    odds_ratio: float


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Fisher's exact test of how often ``first`` and ``second`` are true.

    >>> round(compare([True] * 18 + [False] * 170, [False] * 70).p_greater, 4)
    0.0027
    """
    table = [[sum(map(bool, flags)), len(flags) - sum(map(bool, flags))] for flags in (first, second)]
    greater = stats.fisher_exact(table, alternative="greater")
    both = stats.fisher_exact(table)
    return Comparison(share(first), share(second), float(greater[1]), float(both[1]), float(both[0]))


# -- prediction --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """How well a signal tells, step by step, whether a run diverges within the next steps.

    Attributes:
        signal: one of `SIGNALS`.
        score: ``value``, or ``rise`` over its own median so far.
        horizon: steps.
        auc: area under the ROC curve; 0.5 is chance; NaN where there is nothing to tell apart.
        low, high: bootstrap interval over runs.
        positives, negatives: steps with and without divergence ahead.
        runs: diverging runs that contribute a positive step.
    """

    signal: str
    score: str
    horizon: int
    auc: float
    low: float
    high: float
    positives: int
    negatives: int
    runs: int


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The probability that a positive scores above a negative, ties counted half; NaN without both.

    Args:
        scores: float64, shape (n,), no NaN.
        labels: bool, shape (n,).
        weights: how often each counts, float64, shape (n,).
    """
    return _ranked(scores, labels)(np.ones(len(scores)) if weights is None else weights)


def _ranked(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    """`auc` as a function of the weights, with the sorting done once."""
    order = np.argsort(scores, kind="stable")
    _, ties = np.unique(scores[order], return_inverse=True)
    is_positive = labels[order].astype(float)

    def area(weights: np.ndarray) -> float:
        ordered = weights[order]
        positive = np.bincount(ties, weights=ordered * is_positive)
        negative = np.bincount(ties, weights=ordered * (1 - is_positive))
        below = np.cumsum(negative) - negative
        total = positive.sum() * negative.sum()
        return float((positive * (below + negative / 2)).sum() / total) if total else math.nan

    return area


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates over all thresholds, from (0, 0) to (1, 1)."""
    thresholds, ties = np.unique(-scores, return_inverse=True)
    true = np.bincount(ties, weights=labels, minlength=len(thresholds)).cumsum()
    false = np.bincount(ties, weights=~labels, minlength=len(thresholds)).cumsum()
    return np.concatenate([[0], false / max(false[-1], 1)]), np.concatenate([[0], true / max(true[-1], 1)])


def signal_values(run: Run, signal: str) -> np.ndarray:
    """``signal`` at every step, NaN where it was not measured."""
    if signal != "loss_variance":
        return run[signal]
    window = int(rules().prediction["variance_window"])
    result = np.full(len(run["loss"]), math.nan)
    if len(result) >= window:
        with np.errstate(invalid="ignore"):
            result[window - 1 :] = np.lib.stride_tricks.sliding_window_view(run["loss"], window).var(axis=1)
    return result


def scored_steps(
    runs: Sequence[Run], verdicts: Sequence[Verdict], signal: str, *, score: str, horizon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps at which ``signal`` was measured, after the warmup and before divergence.

    All signals are looked at in the same steps: those with a measurement of the logits, where there are any.

    Args:
        horizon: share of the run within which it diverges, or not.

    Returns:
        Scores (larger: more alarming), labels, and the index of the run, each of shape (steps,).
    """
    scores, labels, groups = [], [], []
    for index, (run, verdict) in enumerate(zip(runs, verdicts, strict=True)):
        values, steps = signal_values(run, signal), run["step"]
        measured = ~np.isnan(run["sharpness_5e4"])
        known = np.isfinite(values) & (steps > run.config.warmup) & (measured if measured.any() else True)
        onset = verdict.diverged_at or math.inf
        known &= steps < onset
        chosen = values[known]
        if score == "rise":
            with np.errstate(divide="ignore"):
                logarithms = np.log(np.maximum(chosen, np.finfo(float).tiny))
            chosen = logarithms - _running_median(logarithms)
        scores.append(chosen)
        labels.append(onset - steps[known] <= horizon * run.config.steps)
        groups.append(np.full(len(chosen), index))
    return np.concatenate(scores), np.concatenate(labels), np.concatenate(groups)


def _running_median(values: np.ndarray) -> np.ndarray:
    return np.array([np.median(values[: index + 1]) for index in range(len(values))])


def predict(
    runs: Sequence[Run], verdicts: Sequence[Verdict], signal: str, *, score: str = "value", horizon: float | None = None
) -> Prediction:
    """The `Prediction` of ``signal``; its interval resamples whole runs, with a fixed seed."""
    by = rules().prediction
    horizon = by["main_horizon"] if horizon is None else horizon
    scores, labels, groups = scored_steps(runs, verdicts, signal, score=score, horizon=horizon)
    area = _ranked(scores, labels)
    low, high = bootstrap(lambda weights: area(weights[groups]), len(runs), by["bootstrap"], by["level"])
    ahead = round(horizon * runs[0].config.steps)
    return Prediction(
        signal,
        score,
        ahead,
        auc(scores, labels),
        low,
        high,
        int(labels.sum()),
        int((~labels).sum()),
        len(np.unique(groups[labels])),
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, level: float, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``statistic``, a function of how often each of ``count`` units was drawn."""
    generator = np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples))
    values = np.array([statistic(weights.astype(float)) for weights in drawn])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - level) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


@dataclass(frozen=True)
class Warning:
    """How early a signal raises the alarm before runs diverge.

    Attributes:
        signal: one of `SIGNALS`.
        threshold: the registered quantile of its values in runs that do not diverge.
        warned: diverging runs with an alarm before they diverge.
        false_alarms: other runs with an alarm at any step.
        lead: median steps between the first alarm and divergence, over the runs that were warned.
    """

    signal: str
    threshold: float
    warned: Share
    false_alarms: Share
    lead: float


def warn(runs: Sequence[Run], verdicts: Sequence[Verdict], signal: str) -> Warning | None:
    """The `Warning` of ``signal``; None where no run diverged, all did, or it was never measured."""
    calm, leads, warned, false_alarms = [], [], [], []
    pairs = [
        (np.where(run["step"] > run.config.warmup, signal_values(run, signal), math.nan), run, verdict)
        for run, verdict in zip(runs, verdicts, strict=True)
    ]
    for values, _, verdict in pairs:
        if not verdict.diverged:
            calm.append(values[np.isfinite(values)])
    if not calm or len(calm) == len(runs) or not len(np.concatenate(calm)):
        return None
    threshold = float(np.quantile(np.concatenate(calm), rules().prediction["alarm_quantile"]))
    for values, run, verdict in pairs:
        alarms = run["step"][values > threshold]
        if verdict.diverged_at is None:
            false_alarms.append(len(alarms) > 0)
            continue
        early = alarms[alarms < verdict.diverged_at]
        warned.append(len(early) > 0)
        if len(early):
            leads.append(verdict.diverged_at - int(early[0]))
    return Warning(
        signal, threshold, share(warned), share(false_alarms), float(np.median(leads)) if leads else math.nan
    )
