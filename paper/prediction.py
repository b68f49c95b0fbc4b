"""How well the signals of a run predict that it diverges, and how early they warn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import Share, bootstrap, share
from .storage import Run
from .verdicts import Verdict, rules

#: Signals that may warn of divergence, with their names in tables.
SIGNALS = {
    "sharpness_5e4": "logit sharpness, ε = 5e-4",
    "sharpness_1e3": "logit sharpness, ε = 1e-3",
    "lbfgsb_5e4": "logit sharpness by L-BFGS-B, ε = 5e-4",
    "gradient_norm": "gradient norm",
    "max_abs_logit": "max |z|",
    "max_attention_logit": "max attention logit",
    "hessian_eigenvalue": "Hessian eigenvalue",
    "loss_variance": "variance of the loss",
    "loss": "loss itself",
}


@dataclass(frozen=True)
class Prediction:
    """How well the value of a signal at one step predicts that the run diverges within the next steps.

    Attributes:
        signal: one of `SIGNALS`.
        score: ``value``, or ``rise`` over its own median so far.
        horizon: the number of next steps.
        auc: area under the ROC curve; 0.5 is chance; NaN without both positive and negative steps.
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
    """The probability that a positive scores above a negative, where a tie counts half; NaN without both.

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
    """The values of ``signal`` at every step: float64, shape (steps,), NaN where it was not measured."""
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

    All signals are scored at the same steps: those with a measurement of the logits, if there are any. The last steps
    of an undecided run, from the horizon before its rise on, are left out: what is ahead of them is not known.

    Args:
        score: ``value``, or ``rise`` over the median of the run's own past.
        horizon: a share of the run; a step is labelled true if the run diverges within it.

    Returns:
        Scores (larger is more alarming), labels, and indices of runs, each of shape (steps,).
    """
    scores, labels, groups = [], [], []
    for index, (run, verdict) in enumerate(zip(runs, verdicts, strict=True)):
        values, steps = signal_values(run, signal), run["step"]
        measured = ~np.isnan(run["sharpness_5e4"])
        known = np.isfinite(values) & (steps > run.config.warmup) & (measured if measured.any() else True)
        onset = verdict.diverged_at or math.inf
        known &= steps < onset
        if verdict.rising_since is not None:
            known &= verdict.rising_since - steps > horizon * run.config.steps
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


@dataclass(frozen=True)
class Warning:
    """How early a signal raises the alarm before runs diverge.

    Attributes:
        signal: one of `SIGNALS`.
        threshold: the registered quantile of its values in runs that do not diverge.
        warned: diverging runs with an alarm before they diverge.
        false_alarms: runs that do not diverge, undecided ones left out, with an alarm at any step.
        lead: median steps between the first alarm and divergence, over the runs that were warned.
    """

    signal: str
    threshold: float
    warned: Share
    false_alarms: Share
    lead: float


def warn(runs: Sequence[Run], verdicts: Sequence[Verdict], signal: str) -> Warning | None:
    """The `Warning` of ``signal``; None if no run diverged, if all did, or if the signal was never measured."""
    calm, leads, warned, false_alarms = [], [], [], []
    pairs = [
        (np.where(run["step"] > run.config.warmup, signal_values(run, signal), math.nan), run, verdict)
        for run, verdict in zip(runs, verdicts, strict=True)
        if not verdict.undecided
    ]
    for values, _, verdict in pairs:
        if not verdict.diverged:
            calm.append(values[np.isfinite(values)])
    if not calm or len(calm) == len(pairs) or not len(np.concatenate(calm)):
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
