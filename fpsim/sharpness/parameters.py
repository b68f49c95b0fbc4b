"""Sharpness in parameter space: the largest loss in a box (Keskar) or a ball (SAM, ASAM) around the parameters.

None of these maxima has a closed form. Each function returns the loss at the best point that it found, and that point,
so every sharpness is a lower bound.

Under simulated precision, with `fpsim.round` inside the loss, all *values* are those of the rounded model, while the
*gradients* that guide the search are those of its straight-through surrogate. The result is a lower bound of the
rounded model's sharpness. Parameters are moved in their own dtype. Keep them in float32: in a narrower dtype, a small
step is lost in the spacing of its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpsim.curvature.vectors import Layout, layout
from fpsim.sharpness.box import EPSILON, ITERATIONS, check_search, lbfgsb
from fpsim.sharpness.steps import (
    Loss,
    PyTree,
    accumulation_dtype,
    direction_pieces,
    evaluate,
    moved,
    normal_like,
    total_norm,
    value_and_gradient,
    why_it_changes,
)
from fpsim.showing import Shown

Search = Literal["lbfgsb", "pga"]
SEARCHES: tuple[str, ...] = ("lbfgsb", "pga")

_AT_CORNER = "the slope points out of the box in every coordinate"
_STATIONARY = "the gradient is zero at the best point seen: pass random_start=True, or another generator"


@dataclass(frozen=True)
class KeskarResult(Shown):
    """The result of `keskar`.

    Attributes:
        sharpness: 100 * (maximum - loss) / (1 + loss), percent; a lower bound.
        loss: the loss at the parameters.
        maximum: the largest loss that the search found in the box.
        evaluations: the number of evaluations of the loss; all but the last, which shows whether the loss changes from
            call to call, compute its gradient as well.
        converged: whether the search ended because the gradient points out of the box in every coordinate, or is zero,
            and the loss does not change from call to call.
        message: why the search ended, or that the loss changes.
        perturbation: the difference of that point from the parameters, a pytree like them.
    """

    sharpness: float
    loss: float
    maximum: float
    evaluations: int
    converged: bool
    message: str
    perturbation: PyTree = field(repr=False, compare=False)


@dataclass(frozen=True)
class SamResult(Shown):
    """The result of `sam`.

    Attributes:
        sharpness: perturbed_loss - loss, in units of the loss.
        loss: the loss at the parameters.
        perturbed_loss: the loss after the step.
        predicted: the increase that the gradient predicts: rho times the gradient's norm (the scaled norm if
            adaptive).
        gradient_norm: Euclidean norm of the gradient.
        evaluations: the number of evaluations of the loss; one of them computes the gradient, and one is a second one
            at the parameters, which shows whether the loss changes from call to call.
        converged: whether a step was taken; False if the gradient is zero or not finite, or the loss changes from call
            to call.
        message: why ``converged`` is False; empty if it is True.
        perturbation: the step, a pytree like the parameters.
    """

    sharpness: float
    loss: float
    perturbed_loss: float
    predicted: float
    gradient_norm: float
    evaluations: int
    converged: bool
    message: str
    perturbation: PyTree = field(repr=False, compare=False)


def sam(loss: Loss, params: PyTree, *, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01) -> SamResult:
    """The rise of the loss in one step of sharpness-aware minimisation: ``rho`` along the normalised gradient.

    Under simulated precision, the step follows the straight-through surrogate's gradient, and both losses are the
    rounded model's.

    Args:
        loss: from a pytree like ``params`` to a scalar tensor.
        params: a pytree of tensors, usually ``dict(model.named_parameters())``; frozen parameters do not move.
        rho: the radius of the ball, in units of the parameters; relative to them if adaptive (usually 0.5 to 2).
        adaptive: ASAM measures lengths in units of T = |parameter| + eta, so the result does not change when one layer
            is scaled up and the next one down. The step is rho * T**2 g / ||T g||.
        eta: lets parameters near zero move; ASAM uses 0.01. It is only used if adaptive.

    Raises:
        ValueError: rho is not positive, eta is negative, or the loss is not a scalar, not finite or without gradient.

    Source: arXiv 2010.01412 equation 2; ASAM: arXiv 2102.11600 section 3.

    >>> sam(lambda x: 0.5 * (x**2).sum(), torch.tensor([3.0, 4.0]), rho=1.0).sharpness
    5.5
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, got {rho}: SAM uses 0.05")
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must not be negative, got {eta}: ASAM uses 0.01")
    arranged = layout(params)
    value, gradient = value_and_gradient(loss, arranged, arranged.values)
    if not math.isfinite(value):
        raise ValueError(f"the loss at params is {value}: no step from there has a rise")
    gradient_norm = total_norm(gradient)
    gradient = [part.to(accumulation_dtype(part.dtype)) for part in gradient]
    if adaptive:
        scales = [tensor.abs().to(part.dtype) + eta for tensor, part in zip(arranged.values, gradient, strict=True)]
        gradient = [part * scale for part, scale in zip(gradient, scales, strict=True)]
        length = total_norm(gradient)
        gradient = [part * scale for part, scale in zip(gradient, scales, strict=True)]
    else:
        length = gradient_norm
    taken = 0 < length < math.inf
    step = [part * (rho / length) if taken else torch.zeros_like(part) for part in gradient]
    perturbed = evaluate(loss, arranged, moved(arranged.values, step, 1.0))
    message = why_it_changes(loss, arranged, value)
    if not taken:
        message = "the gradient is zero or not finite, so there is no direction for a step"
    return SamResult(
        sharpness=perturbed - value,
        loss=value,
        perturbed_loss=perturbed,
        predicted=rho * length,
        gradient_norm=gradient_norm,
        evaluations=3,
        converged=not message,
        message=message,
        perturbation=arranged.unflatten(arranged.join(step)),
    )


def adaptive(loss: Loss, params: PyTree, *, rho: float = 0.5, eta: float = 0.01) -> SamResult:
    """ASAM's sharpness: `sam` with ``adaptive=True``, under simulated precision as well."""
    return sam(loss, params, rho=rho, adaptive=True, eta=eta)


def keskar(
    loss: Loss,
    params: PyTree,
    *,
    epsilon: float = EPSILON,
    method: Search = "lbfgsb",
    subspace: int | Sequence[PyTree] | None = None,
    iterations: int = ITERATIONS,
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> KeskarResult:
    """Keskar's (epsilon, A)-sharpness: the largest loss in a box around the parameters, in percent of 1 + loss.

    The box is |y[i]| <= epsilon * (|(pinv(A) x)[i]| + 1), and the loss is evaluated at x + A y. In the full space A is
    the identity. Under simulated precision, the values are the rounded model's, and the gradients that guide the
    search are the straight-through surrogate's.

    Args:
        loss: from a pytree like ``params`` to a scalar tensor greater than -1.
        params: a pytree of tensors, usually ``dict(model.named_parameters())``; frozen parameters do not move.
        epsilon: half the width of the box, relative to |x| + 1. Keskar uses 1e-3 and 5e-4.
        method: ``lbfgsb``, as Keskar, in float64 on the CPU; or ``pga``, projected gradient ascent by signs on the
            parameters' device. ``pga`` is cheaper, and in the full space usually as good.
        subspace: None for the full space; or a number of random directions (Keskar: 100) with independent standard
            normal entries, each of which takes as much memory as the parameters; or the columns of A, each a pytree
            like ``params`` or a flat vector.
        iterations: the iterations of the search. L-BFGS-B may evaluate the loss several times in each, projected
            ascent once.
        random_start: whether to start at a random point of the box instead of the parameters, as a stationary point
            requires.
        generator: the source of random directions and starts.

    Raises:
        ValueError: epsilon or the number of iterations or directions is not positive, the method is unknown, the loss
            is not a scalar greater than -1, or a generator is missing.

    Source: arXiv 1609.04836, metric 2.1 (equations 3 and 4) and section 2.2.2. Keskar's text does not say
    how the columns of a random A are scaled.

    >>> result = keskar(lambda x: (3 * x).sum(), torch.tensor([0.0, 1.0]), epsilon=0.1, method="pga")
    >>> f"{result.sharpness:.3f}", result.converged
    ('22.500', True)
    """
    check_search(epsilon, iterations, method, SEARCHES)
    arranged = layout(params)
    space = _FullSpace(arranged) if subspace is None else _Subspace(arranged, _columns(arranged, subspace, generator))
    bounds = [epsilon * (centre.abs() + 1) for centre in space.centre]
    start = [torch.zeros_like(bound) for bound in bounds]
    search = _Climb(loss, arranged, space, start)
    if random_start:
        start = [
            (2 * torch.special.ndtr(part) - 1) * b
            for part, b in zip(normal_like(start, generator), bounds, strict=True)
        ]
        search.at(start)
    converged, message = (_ascend if method == "pga" else _lbfgsb_search)(search, bounds, iterations)
    changes = why_it_changes(loss, arranged, search.initial)
    if changes:
        converged, message = False, changes
    return KeskarResult(
        sharpness=100 * (search.best - search.initial) / (1 + search.initial),
        loss=search.initial,
        maximum=search.best,
        evaluations=search.evaluations + 1,
        converged=converged,
        message=message,
        perturbation=arranged.unflatten(arranged.join(space.step(search.best_y))),
    )


class _FullSpace:
    """Every parameter is a coordinate."""

    def __init__(self, arranged: Layout) -> None:
        self.centre = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in arranged.values]

    def step(self, y: Sequence[Tensor]) -> list[Tensor]:
        return list(y)

    def pull(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        return [part.to(centre.dtype) for part, centre in zip(gradient, self.centre, strict=True)]


class _Subspace:
    """A float64 vector of coordinates along given directions (the columns of A)."""

    def __init__(self, arranged: Layout, columns: list[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in arranged.values]
        self._columns = [column.flatten(1) for column in columns]
        device = arranged.values[0].device
        gram = sum((c := column.double()).mm(c.T).to(device) for column in self._columns)
        self.centre = [torch.linalg.pinv(gram, hermitian=True) @ self.pull(arranged.values)[0]]

    def step(self, y: Sequence[Tensor]) -> list[Tensor]:
        return [
            (y[0].to(column) @ column).view(shape) for column, shape in zip(self._columns, self._shapes, strict=True)
        ]

    def pull(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        device = gradient[0].device
        parts = [
            column.double().mv(part.flatten().to(column.device, torch.float64)).to(device)
            for column, part in zip(self._columns, gradient, strict=True)
        ]
        return [torch.stack(parts).sum(0)]


def _columns(arranged: Layout, subspace: int | Sequence[PyTree], generator: torch.Generator | None) -> list[Tensor]:
    """The columns of A: for each leaf, its parts of all columns stacked along a new first dimension."""
    if isinstance(subspace, int):
        if subspace < 1:
            raise ValueError(f"subspace must be a number of directions, got {subspace}: Keskar takes 100")
        stacks = normal_like(arranged.values, generator, count=subspace)
        return [stack.to(accumulation_dtype(value.dtype)) for stack, value in zip(stacks, arranged.values, strict=True)]
    directions = [
        direction_pieces(arranged, direction, f"subspace[{index}]") for index, direction in enumerate(subspace)
    ]
    if not directions:
        raise ValueError("subspace holds no direction: give a number, or at least one direction")
    return [
        torch.stack(parts).to(accumulation_dtype(value.dtype))
        for value, *parts in zip(arranged.values, *directions, strict=True)
    ]


class _Climb:
    """The loss as a function of the coordinates, and the best point of all evaluated ones."""

    def __init__(self, loss: Loss, arranged: Layout, space: _FullSpace | _Subspace, origin: list[Tensor]) -> None:
        self._loss, self._arranged, self._space = loss, arranged, space
        self.evaluations = 0
        self.best = -math.inf
        self.initial, _ = self.at(origin)
        if not -1 < self.initial < math.inf:
            raise ValueError(
                f"Keskar's sharpness is relative to 1 + loss: the loss must be above -1 and finite, got {self.initial}"
            )

    def at(self, y: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss and its gradient with respect to the coordinates."""
        point = moved(self._arranged.values, self._space.step(y), 1.0)
        value, gradient = value_and_gradient(self._loss, self._arranged, point)
        slope = self._space.pull(gradient)
        self.evaluations += 1
        if value > self.best:
            self.best, self.best_y, self.best_slope = value, y, slope
        return value, slope

    @property
    def stationary(self) -> bool:
        return not any(bool(part.any()) for part in self.best_slope)

    def at_corner(self, bounds: Sequence[Tensor]) -> bool:
        """Whether the gradient at the best point points out of the box in every coordinate."""
        further = _projected(self.best_y, self.best_slope, bounds, 2.0)
        return all(torch.equal(a, b) for a, b in zip(further, self.best_y, strict=True))


def _projected(y: Sequence[Tensor], slope: Sequence[Tensor], bounds: Sequence[Tensor], step: float) -> list[Tensor]:
    """The point ``step`` half-widths uphill in every coordinate, clamped to the box."""
    return [
        torch.clamp(point + step * bound * part.sign(), -bound, bound)
        for point, part, bound in zip(y, slope, bounds, strict=True)
    ]


def _ascend(search: _Climb, bounds: list[Tensor], iterations: int) -> tuple[bool, str]:
    """Steepest ascent from the best point in the norm whose unit ball is the box.

    The first step leads to the corner, and a step that does not climb is halved. Two half-widths lead from any point
    to the corner: for a convex loss every such step climbs until it ends at the same corner.
    """
    if search.stationary:
        return False, _STATIONARY
    step = 1.0
    for _ in range(iterations):
        if not all(bool(part.isfinite().all()) for part in search.best_slope):
            return False, "the gradient is not finite"
        if search.at_corner(bounds):
            return True, _AT_CORNER
        before = search.best
        search.at(_projected(search.best_y, search.best_slope, bounds, step))
        step = min(2 * step, 2.0) if search.best > before else step / 2
    if search.at_corner(bounds):
        return True, _AT_CORNER
    return False, f"{iterations} iterations"


def _lbfgsb_search(search: _Climb, bounds: list[Tensor], iterations: int) -> tuple[bool, str]:
    """scipy's L-BFGS-B from the best point."""
    if search.stationary:
        return False, _STATIONARY

    def flat(tensors: Sequence[Tensor]) -> np.ndarray:
        return torch.cat([tensor.flatten().to("cpu", torch.float64) for tensor in tensors]).numpy()

    def negative_rise(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parts = torch.from_numpy(vector.copy()).split([bound.numel() for bound in bounds])
        y = [part.view(bound.shape).to(bound) for part, bound in zip(parts, bounds, strict=True)]
        # The tensors may be narrower than float64, so their conversion may leave the box.
        value, slope = search.at([torch.clamp(part, -b, b) for part, b in zip(y, bounds, strict=True)])
        return -value, -flat(slope)

    found = lbfgsb(negative_rise, flat(search.best_y), flat(bounds), iterations)
    if search.at_corner(bounds):
        return True, _AT_CORNER
    return found.status == 0, str(found.message)
