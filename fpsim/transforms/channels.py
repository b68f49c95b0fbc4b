"""Magnitudes of channels: the slices of an operand at one index along the axis over which its product sums."""

from __future__ import annotations

import reprlib

import torch
from torch import Tensor


def amax_of_channels(x: Tensor, axis: int) -> Tensor:
    """The largest magnitude of each channel, float64, of shape (channels,); NaN where there is a NaN."""
    others = _other_axes(x, axis)
    if x.numel() == 0:
        return torch.zeros(x.shape[axis], dtype=torch.float64, device=x.device)
    largest = x.abs().amax(others) if others else x.abs()
    return largest.double()


def squares_of_channels(x: Tensor, axis: int) -> Tensor:
    """The sum of the squares of each channel, float64, of shape (channels,)."""
    squares = x.double().square()
    others = _other_axes(x, axis)
    return squares.sum(others) if others else squares


def along(parameters: Tensor, x: Tensor, axis: int) -> Tensor:
    """``parameters``, one for each index along ``axis``, in a shape that broadcasts with ``x``."""
    return parameters.view([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _other_axes(x: Tensor, axis: int) -> list[int]:
    return [i for i in range(x.dim()) if i != axis % x.dim()]


def check_length(name: str, given: int, length: int) -> None:
    """Raise ValueError if a list of ``given`` items does not fit an axis of ``length`` elements."""
    if given != length:
        raise ValueError(
            f"{reprlib.repr(name)} has {given} items, and the product sums over {length} elements: give one item for "
            "each, or name this transform for other modules or kinds of product"
        )
