"""Steps in parameter space: points near the parameters, the loss and its gradient there, and directions.

A point is a tuple of tensors like the pieces of a `fpsim.curvature.Layout`. No function here changes its arguments or
``.grad``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpsim.curvature.losses import scalar_loss
from fpsim.curvature.vectors import Layout

#: Any nesting of dicts, lists and tuples with tensors at its leaves.
PyTree = Any
#: From parameters to a scalar tensor.
Loss = Callable[[PyTree], Tensor]


def evaluate(loss: Loss, layout: Layout, point: Sequence[Tensor]) -> float:
    """The loss at ``point``, computed without a graph, unless the loss takes derivatives itself."""
    try:
        with torch.no_grad():
            return scalar_loss(loss(layout.substitute(point))).item()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return scalar_loss(loss(layout.substitute([piece.detach().requires_grad_() for piece in point]))).item()


def value_and_gradient(loss: Loss, layout: Layout, point: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The loss at ``point`` and its gradient, which is zero for tensors that the loss does not use.

    Raises:
        ValueError: the loss is not a scalar, or has no gradient.
        TypeError: the loss is not a tensor.
    """
    variables = [piece.detach().requires_grad_() for piece in point]
    with torch.enable_grad():
        value = scalar_loss(loss(layout.substitute(variables)))
        if not value.requires_grad:
            raise ValueError(
                "the loss has no gradient: compute it from the params that it gets "
                "(as fpsim.curvature.functional_loss does for a module), and not under torch.no_grad()"
            )
        gradient = torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)
    return value.item(), list(gradient)


def why_it_changes(loss: Loss, layout: Layout, value: float) -> str:
    """Why ``value``, the loss at the parameters, is not the loss there when it is computed again; empty if it is.

    It takes one evaluation. Differences that rounding errors explain do not count.
    """
    again = evaluate(loss, layout, layout.values)
    tolerance = max(min(1000 * torch.finfo(piece.dtype).eps, 0.02) for piece in layout.values)
    if abs(again - value) <= tolerance * abs(value):
        return ""
    return (
        f"the loss changes from call to call (from {value:.6g} to {again:.6g}): dropout is active, it draws other "
        "random numbers, or it keeps a state. Call model.eval(); fpsim.curvature.check_determinism says more"
    )


def direction_pieces(layout: Layout, direction: PyTree, name: str) -> list[Tensor]:
    """The pieces of ``direction``: a pytree like the parameters, or one flat vector of ``layout.size`` numbers.

    Raises:
        ValueError: the structure or a shape is another one; the message calls the direction ``name``.
    """
    if isinstance(direction, Tensor) and direction.shape == (layout.size,):
        parts = direction.detach().split([value.numel() for value in layout.values])
        return [part.view(value.shape).to(value.device) for part, value in zip(parts, layout.values, strict=True)]
    leaves, spec = pytree.tree_flatten(direction)
    if spec != layout.spec:
        got = f"a tensor of shape {tuple(direction.shape)}" if isinstance(direction, Tensor) else str(spec)
        raise ValueError(f"{name} must be a pytree like params, or a flat vector of {layout.size} numbers, got {got}")
    pieces = [leaves[places[0]] for places in layout.places]
    for piece, value in zip(pieces, layout.values, strict=True):
        if not isinstance(piece, Tensor) or piece.shape != value.shape:
            shape = tuple(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(f"{name} must have the shapes of params, got {shape} for {tuple(value.shape)}")
    return [piece.detach().to(value.device) for piece, value in zip(pieces, layout.values, strict=True)]


def moved(point: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> list[Tensor]:
    """``point + step * direction`` in the dtypes of ``point``; half-precision sums are float32 and rounded once."""
    return [
        torch.add(piece.to(dtype), part.to(dtype), alpha=step).to(piece.dtype)
        for piece, part in zip(point, direction, strict=True)
        for dtype in [accumulation_dtype(piece.dtype)]
    ]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for itself, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def total_norm(pieces: Sequence[Tensor]) -> float:
    """The Euclidean norm of all ``pieces`` together, summed in float64."""
    return math.hypot(*[torch.linalg.vector_norm(piece, dtype=torch.float64).item() for piece in pieces])


def normal_like(
    pieces: Sequence[Tensor], generator: torch.Generator | None, *, count: int | None = None
) -> list[Tensor]:
    """Standard normal float32 tensors in the shapes of ``pieces``; a ``count`` is a new first dimension.

    They are drawn on the generator's device, so a seed gives the same numbers on every device of the parameters.

    Raises:
        ValueError: there is no generator.
    """
    if generator is None:
        raise ValueError("random directions need a generator: pass generator=torch.Generator().manual_seed(0)")
    lead = () if count is None else (count,)
    return [
        torch.randn((*lead, *piece.shape), generator=generator, device=generator.device, dtype=torch.float32).to(
            piece.device
        )
        for piece in pieces
    ]
