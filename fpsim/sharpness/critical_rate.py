"""Critical sharpness: curvature along one direction, from values of the loss alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fpsim.curvature.vectors import layout
from fpsim.sharpness.steps import Loss, PyTree, direction_pieces, evaluate, moved, value_and_gradient


@dataclass(frozen=True)
class CriticalResult:
    """What `critical` found.

    Attributes:
        sharpness: 2 / learning_rate.
        learning_rate: the critical one: the middle of ``lower`` and ``upper``; infinite if no step was found that
            raises the loss, zero if none was found that does not.
        lower: the largest step found that does not raise the loss, with all shorter ones that were tried.
        upper: the smallest step found that raises it.
        loss: at the parameters.
        lower_loss: at ``lower``. If it equals ``loss``, the loss is flat there to all its digits.
        evaluations: of the loss; one of them with its gradient where no direction was given.
        converged: ``lower`` and ``upper`` are within the tolerance.
    """

    sharpness: float
    learning_rate: float
    lower: float
    upper: float
    loss: float
    lower_loss: float
    evaluations: int
    converged: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """The sharpness that belongs to ``upper`` and to ``lower``: the smallest and the largest it can be."""
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

    For a quadratic loss and gradient descent it is the mean of the Hessian's eigenvalues, weighted by the squares of
    the gradient's components, at most the largest. The learning rate is bracketed by doubling or halving, then by
    bisection; on a loss that falls again behind a rise, a later crossing may be found. Only values of the loss are
    used: under simulated precision it is the rounded model's own, and without a direction the step is along the
    straight-through surrogate's gradient.

    Args:
        loss: from a pytree like ``params`` to a scalar tensor. Another loss than the direction's gives the paper's
            relative critical sharpness.
        params: a pytree of tensors, usually ``dict(model.named_parameters())``; frozen ones stay where they are.
        direction: what the optimizer subtracts, times the learning rate: steps go to params - learning_rate *
            direction. A pytree like ``params`` or a flat vector; None is the gradient.
        initial: the learning rate to begin with; the last result is a good one.
        tolerance: ends the bisection when 1 - lower / upper is as small.
        max_evaluations: ends it in any case.

    Raises:
        ValueError: an argument out of its range, a direction that is zero, a loss that is not finite at ``params``.

    Source: arXiv 2601.16979, definition 2.1 and the search of section 2.2, where the tolerance is 1/16.

    >>> import torch
    >>> result = critical(lambda x: 1.5 * (x**2).sum(), torch.tensor([1.0, -2.0]), tolerance=1e-6)
    >>> f"{result.sharpness:.4f}"
    '3.0000'
    """
    if not 0 < initial < math.inf:
        raise ValueError(f"initial must be a positive number, got {initial}: try the optimizer's learning rate")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}: the paper uses 1/16")
    if max_evaluations < 3:
        raise ValueError(f"max_evaluations must be at least 3, got {max_evaluations}")
    arranged = layout(params)
    if direction is None:
        start, along = value_and_gradient(loss, arranged, arranged.values)
    else:
        start, along = evaluate(loss, arranged, arranged.values), direction_pieces(arranged, direction, "direction")
    if not math.isfinite(start):
        raise ValueError(f"the loss at params is {start}: there is no rate at which it begins to rise")
    if not any(bool(part.any()) for part in along):
        raise ValueError("the direction is zero: at a stationary point, give one")
    evaluations = 1

    def at(rate: float) -> float:
        nonlocal evaluations
        evaluations += 1
        return evaluate(loss, arranged, moved(arranged.values, along, -rate))

    lower, upper, lower_loss, rate = 0.0, math.inf, start, initial
    while evaluations < max_evaluations and 1 - lower / upper > tolerance:
        value = at(rate)
        if value <= start:
            lower, lower_loss = rate, value
        else:  # NaN, too, is a rise
            upper = rate
        rate = 2 * lower if upper == math.inf else (lower + upper) / 2
        if rate in (0.0, math.inf):
            break
    bracketed = lower > 0 and upper < math.inf
    rate = (lower + upper) / 2 if bracketed else math.inf if lower else 0.0
    return CriticalResult(
        sharpness=_sharpness(rate),
        learning_rate=rate,
        lower=lower,
        upper=upper,
        loss=start,
        lower_loss=lower_loss,
        evaluations=evaluations,
        converged=bracketed and 1 - lower / upper <= tolerance,
    )


def _sharpness(rate: float) -> float:
    return 2 / rate if rate else math.inf
