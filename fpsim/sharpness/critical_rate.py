"""Critical sharpness: curvature along one direction, computed from values of the loss only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fpsim.curvature.vectors import layout
from fpsim.sharpness.steps import (
    Loss,
    PyTree,
    direction_pieces,
    evaluate,
    moved,
    value_and_gradient,
    why_it_changes,
)
from fpsim.showing import Shown


@dataclass(frozen=True)
class CriticalResult(Shown):
    """The result of `critical`.

    Attributes:
        sharpness: 2 / learning_rate.
        learning_rate: the critical learning rate, the middle of ``lower`` and ``upper``. It is infinite if no tried
            rate raises the loss, and zero if all of them do.
        lower: the largest tried rate below ``upper`` whose step does not raise the loss.
        upper: the smallest tried rate whose step raises the loss.
        loss: the loss at the parameters.
        lower_loss: the loss at ``lower``. If it equals ``loss``, the loss is flat there to all its digits.
        evaluations: the number of evaluations of the loss; one of them computes the gradient if no direction is given,
            and one is a second one at the parameters, which shows whether the loss changes from call to call.
        converged: whether ``lower`` and ``upper`` are within the tolerance, and the loss does not change.
        message: why ``converged`` is False; empty if it is True.
    """

    sharpness: float
    learning_rate: float
    lower: float
    upper: float
    loss: float
    lower_loss: float
    evaluations: int
    converged: bool
    message: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """The sharpness at ``upper`` and at ``lower``: a lower and an upper bound of the sharpness."""
        return _sharpness(self.upper), _sharpness(self.lower)


def critical(
    loss: Loss,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    initial: float = 1.0,
    tolerance: float = 1 / 16,
    max_evaluations: int = 64,
) -> CriticalResult:
    """Critical sharpness, 2 / (the smallest learning rate whose step along ``direction`` raises the loss).

    For a quadratic loss and gradient descent, it is the mean of the Hessian's eigenvalues, weighted by the squares of
    the gradient's components, and so at most the largest eigenvalue. The search brackets the learning rate by doubling
    or halving, then by bisection. If the loss falls again after a rise, the search may find a later crossing. It uses
    only values of the loss. Under simulated precision these are values of the rounded model; without a direction, the
    step is along the gradient of the straight-through surrogate.

    Args:
        loss: from a pytree like ``params`` to a scalar tensor. If it is another loss than the one whose gradient is
            ``direction``, the result is the source's relative critical sharpness.
        params: a pytree of tensors, usually ``dict(model.named_parameters())``; frozen parameters do not move.
        direction: the optimizer's update direction: a step goes to params - learning_rate * direction. A pytree like
            ``params`` or a flat vector; None is the gradient.
        initial: the first learning rate to try; the result of an earlier training step is a good choice.
        tolerance: the bisection ends when 1 - lower / upper is at most this.
        max_evaluations: the largest number of evaluations of the loss.

    Raises:
        ValueError: an argument is out of range, the direction is zero, or the loss is not finite at ``params``.

    Source: arXiv 2601.16979, definition 2.1 and the search of section 2.2, where the tolerance is 1/16.

    >>> import torch
    >>> result = critical(lambda x: 1.5 * (x**2).sum(), torch.tensor([1.0, -2.0]), tolerance=1e-6)
    >>> f"{result.sharpness:.4f}"
    '3.0000'
    """
    if not 0 < initial < math.inf:
        raise ValueError(f"initial must be a positive number, got {initial}: try the optimizer's learning rate")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}: arXiv 2601.16979 uses 1/16")
    if max_evaluations < 3:
        raise ValueError(f"max_evaluations must be at least 3, got {max_evaluations}")
    arranged = layout(params)
    if direction is None:
        start, along = value_and_gradient(loss, arranged, arranged.values)
    else:
        start, along = evaluate(loss, arranged, arranged.values), direction_pieces(arranged, direction, "direction")
    if not math.isfinite(start):
        raise ValueError(f"the loss at params is {start}: no rate is critical")
    if not any(bool(part.any()) for part in along):
        raise ValueError("the direction is zero: at a stationary point, pass a direction")
    changes = why_it_changes(loss, arranged, start)
    evaluations = 2

    def at(rate: float) -> float:
        nonlocal evaluations
        evaluations += 1
        return evaluate(loss, arranged, moved(arranged.values, along, -rate))

    lower, upper, lower_loss, rate = 0.0, math.inf, start, initial
    while evaluations < max_evaluations and 1 - lower / upper > tolerance:
        value = at(rate)
        if value <= start:
            lower, lower_loss = rate, value
        else:  # a NaN counts as a rise
            upper = rate
        rate = 2 * lower if upper == math.inf else (lower + upper) / 2
        if rate in (0.0, math.inf):
            break
    bracketed = lower > 0 and upper < math.inf
    rate = (lower + upper) / 2 if bracketed else math.inf if lower else 0.0
    close = bracketed and 1 - lower / upper <= tolerance
    message = changes or ("" if close else f"no critical rate within {tolerance:g} in {evaluations} evaluations")
    return CriticalResult(
        sharpness=_sharpness(rate),
        learning_rate=rate,
        lower=lower,
        upper=upper,
        loss=start,
        lower_loss=lower_loss,
        evaluations=evaluations,
        converged=not message,
        message=message,
    )


def _sharpness(rate: float) -> float:
    return 2 / rate if rate else math.inf
