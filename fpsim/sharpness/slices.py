"""Loss-landscape slices: the loss along one or two directions in parameter space, as data and as pictures.

A slice uses only values of the loss. Under simulated precision it shows the loss of the rounded model, with its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fpsim.curvature.results import new_axes
from fpsim.curvature.vectors import Layout, layout
from fpsim.sharpness.steps import Loss, PyTree, accumulation_dtype, direction_pieces, evaluate, moved, normal_like
from fpsim.showing import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Normalize = Literal["filter", "layer", "none"]
NORMALIZATIONS: tuple[str, ...] = ("filter", "layer", "none")
#: A function of (points done, points).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Slice1D(Shown):
    """The loss at ``params + x * direction``.

    Attributes:
        x: float64, shape (points,).
        losses: float64, shape (points,).
        direction: the normalised direction, a pytree like the parameters.
    """

    x: Tensor
    losses: Tensor
    direction: PyTree

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the loss."""
        return self.losses.numel()

    def plot(self, axes: Axes | None = None, **style: Any) -> Axes:
        """Draw the loss over x on matplotlib's ``axes`` (default: new axes), and return the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        axes = axes if axes is not None else new_axes()
        axes.plot(self.x.numpy(), self.losses.numpy(), **style)
        axes.set(xlabel="step along the direction", ylabel="loss")
        return axes


@dataclass(frozen=True, eq=False)
class Slice2D(Shown):
    """The loss at ``params + x * directions[0] + y * directions[1]``.

    Attributes:
        x, y: float64, shapes (columns,) and (rows,).
        losses: float64, shape (rows, columns): ``losses[i, j]`` is the loss at ``x[j]``, ``y[i]``.
        directions: the two normalised directions, pytrees like the parameters.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    directions: tuple[PyTree, PyTree]

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the loss."""
        return self.losses.numel()

    def plot(self, axes: Axes | None = None, *, levels: int = 20, **style: Any) -> Axes:
        """Draw contours of the loss on matplotlib's ``axes`` (default: new axes), and return the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        axes = axes if axes is not None else new_axes()
        lines = axes.contour(self.x.numpy(), self.y.numpy(), self.losses.numpy(), levels=levels, **style)
        axes.clabel(lines, fontsize="small")
        axes.set(xlabel="step along the first direction", ylabel="step along the second direction", title="loss")
        return axes


def slice_1d(
    loss: Loss,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    x: Tensor | Sequence[float] | None = None,
    normalize: Normalize | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Slice1D:
    """The loss along a line through ``params``; under simulated precision, the loss of the rounded model.

    Args:
        loss: from a pytree like ``params`` to a scalar tensor.
        params: a pytree of tensors, usually ``dict(model.named_parameters())``; frozen parameters do not move.
        direction: a pytree like ``params`` or a flat vector (an eigenvector, or the difference of two models); None
            is a random direction with independent standard normal entries.
        x: the steps along the direction; None is 41 steps from -1 to 1.
        normalize: ``filter`` gives each filter of the direction (each index of a tensor's first dimension) the norm of
            the parameters' filter; tensors of less than two dimensions (biases and gains) do not move. ``layer`` does
            the same with whole tensors of any dimension. ``none`` leaves the direction unchanged. The default is
            ``filter`` for random directions and ``none`` for given ones.
        generator: the source of random directions.
        progress: called with (points done, points) after each point.

    Raises:
        ValueError: the normalisation is unknown, the direction does not fit, x is not one row of numbers, or a random
            direction has no generator.

    Source: arXiv 1712.09913, section 4.

    >>> slice_1d(lambda p: (p**2).sum(), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), x=[-1, 0, 1]).losses
    tensor([1., 1., 5.], dtype=torch.float64)
    """
    arranged = layout(params)
    along = _direction(arranged, direction, "direction", normalize, generator)
    steps = _steps(x, "x", 41)
    losses = _losses(loss, arranged, [along], steps.unsqueeze(1), progress)
    return Slice1D(steps, losses, arranged.unflatten(arranged.join(along)))


def slice_2d(
    loss: Loss,
    params: PyTree,
    directions: tuple[PyTree, PyTree] | None = None,
    *,
    x: Tensor | Sequence[float] | None = None,
    y: Tensor | Sequence[float] | None = None,
    normalize: Normalize | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Slice2D:
    """The loss on a plane through ``params``; under simulated precision, the loss of the rounded model.

    Args:
        directions: two directions, each as in `slice_1d`; None is two random directions.
        x, y: the steps along the first and the second direction; None is 21 steps from -1 to 1.

    The other arguments and the errors are those of `slice_1d`.

    >>> plane = slice_2d(lambda p: p.sum(), torch.zeros(2), tuple(torch.eye(2)), x=[0, 1], y=[0, 10])
    >>> plane.losses
    tensor([[ 0.,  1.],
            [10., 11.]], dtype=torch.float64)
    """
    arranged = layout(params)
    if directions is not None and len(directions) != 2:
        raise ValueError(f"directions must be two, got {len(directions)}")
    first, second = [
        _direction(arranged, given, f"directions[{index}]", normalize, generator)
        for index, given in enumerate(directions or (None, None))
    ]
    columns, rows = _steps(x, "x", 21), _steps(y, "y", 21)
    grid = torch.cartesian_prod(rows, columns).flip(-1)
    losses = _losses(loss, arranged, [first, second], grid, progress)
    trees = tuple(arranged.unflatten(arranged.join(along)) for along in (first, second))
    return Slice2D(columns, rows, losses.view(len(rows), len(columns)), (trees[0], trees[1]))


def _steps(given: Tensor | Sequence[float] | None, name: str, points: int) -> Tensor:
    if given is None:
        return (2 * torch.arange(points, dtype=torch.float64) - (points - 1)) / (points - 1)  # exactly 0 in the middle
    steps = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    if steps.dim() != 1 or not steps.numel():
        raise ValueError(f"{name} must be one row of numbers, got shape {tuple(steps.shape)}")
    return steps


def _direction(
    arranged: Layout, given: PyTree | None, name: str, normalize: str | None, generator: torch.Generator | None
) -> list[Tensor]:
    if normalize is None:
        normalize = "filter" if given is None else "none"
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalize!r}: use one of {', '.join(NORMALIZATIONS)}")
    pieces = normal_like(arranged.values, generator) if given is None else direction_pieces(arranged, given, name)
    if normalize == "none":
        return pieces
    return [_normalized(piece, value, normalize) for piece, value in zip(pieces, arranged.values, strict=True)]


def _normalized(piece: Tensor, value: Tensor, normalize: str) -> Tensor:
    """``piece`` with the norm of each filter of ``value``, or with its total norm; a zero norm stays zero."""
    if normalize == "filter" and value.dim() < 2:
        return torch.zeros_like(piece)
    dims = tuple(range(1 if normalize == "filter" else 0, value.dim()))
    piece, value = piece.to(accumulation_dtype(piece.dtype)), value.to(accumulation_dtype(value.dtype))
    length, wanted = (_norms(tensor, dims) for tensor in (piece, value))
    return piece * torch.where(length > 0, wanted / length, 0.0)


def _norms(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True) if dims else tensor.abs()


def _losses(
    loss: Loss, arranged: Layout, directions: list[list[Tensor]], steps: Tensor, progress: Progress | None
) -> Tensor:
    """The losses at the rows of ``steps``, float64 of shape (points,)."""
    losses = []
    for row in steps.tolist():
        # The steps are summed first, so that a narrow parameter is rounded once.
        along = [
            sum(
                (step * part.to(accumulation_dtype(part.dtype)) for step, part in zip(row, parts, strict=True)),
                start=torch.zeros(()),
            )
            for parts in zip(*directions, strict=True)
        ]
        losses.append(evaluate(loss, arranged, moved(arranged.values, along, 1.0)))
        if progress is not None:
            progress(len(losses), len(steps))
    return torch.tensor(losses, dtype=torch.float64)
