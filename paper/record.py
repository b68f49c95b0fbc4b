"""The record of one training step, and the moving average of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

#: Span of the moving average of the loss, in steps: a share of the run, and at least this many.
SMOOTHING_SHARE, SMOOTHING_LEAST = 0.01, 10


@dataclass(frozen=True)
class Record:
    """The numbers of one step. Losses are in nats per token; those of a diverged run are not finite.

    A field that was not measured at the step is None. Logits are those of the last token of each window of the batch.

    Attributes:
        step: updates made so far, from 1.
        loss: training loss of this step's batch, before its update.
        gradient_norm: 2-norm of the whole gradient, before clipping.
        learning_rate: that of this update.
        validation_loss: after this update; None at steps without validation.
        seconds: the time of forward, backward and update, without data and validation. Not part of equality.
        smoothed_loss: exponential moving average of the losses so far, over 1 % of the run's steps and at least ten.
        sharpness_5e4, sharpness_1e3: logit sharpness in boxes of half-width 5e-4 and 1e-3, exact, mean over tokens.
        lbfgsb_5e4, lbfgsb_1e3: the same, found by ten iterations of L-BFGS-B.
        max_abs_logit: largest |z| over all logits z.
        mean_logit: mean of z.
        hessian_eigenvalue: the largest eigenvalue of the Hessian, before this update.
        saturated_activation, saturated_weight, saturated_gradient: share of the operands rounded in that role that are
            finite, exceed the format's largest finite value as their cast scales them, and became finite. An operand
            counts once for every matrix product that reads it.
        underflowed_activation, underflowed_weight, underflowed_gradient: share of the same operands that are not zero
            and became zero.
        sharpness_seconds: the time of measuring the logits. Not part of equality.
        loss_scale: the factor by which a recipe's optimizer scales the loss of this step; None if none does. Such an
            optimizer skips a step whose gradients are not finite.
        max_attention_logit: the largest score of a query and a key that it sees, before this update.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    validation_loss: float | None
    seconds: float = field(compare=False)
    smoothed_loss: float | None = None
    sharpness_5e4: float | None = None
    sharpness_1e3: float | None = None
    lbfgsb_5e4: float | None = None
    lbfgsb_1e3: float | None = None
    max_abs_logit: float | None = None
    mean_logit: float | None = None
    hessian_eigenvalue: float | None = None
    saturated_activation: float | None = None
    saturated_weight: float | None = None
    saturated_gradient: float | None = None
    underflowed_activation: float | None = None
    underflowed_weight: float | None = None
    underflowed_gradient: float | None = None
    sharpness_seconds: float | None = field(default=None, compare=False)
    loss_scale: float | None = None
    max_attention_logit: float | None = None


def step_seconds(history: Sequence[Record]) -> float:
    """Median seconds of a step without the first, which compiles; NaN if there is no other."""
    return median(record.seconds for record in history[1:]) if len(history) > 1 else math.nan


def smoothed_loss(before: float | None, loss: float, *, step: int, steps: int) -> float:
    """The moving average of the losses of a run of ``steps`` after its ``step`` (from 1).

    The newest loss has the weight ``2 / (span + 1)``, or ``1 / step`` where that is more: the average begins as a mean.

    Args:
        before: the average after the previous step; None at the first.
    """
    if before is None:
        return loss
    weight = max(2 / (smoothing_span(steps) + 1), 1 / step)
    return before + weight * (loss - before)


def smoothing_span(steps: int) -> int:
    """Steps over which losses are averaged in a run of ``steps``."""
    return max(SMOOTHING_LEAST, round(SMOOTHING_SHARE * steps))
