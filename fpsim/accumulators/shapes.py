"""The shapes of operands and results of `torch.matmul`, and of batches of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of `torch.matmul` as two matrices, or as two batches of matrices of one size."""
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    if right.dim() == 2:
        return left.reshape(math.prod(left.shape[:-1]), left.shape[-1]), right
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (left, right)]
    return flat[0], flat[1]


def result_shape(a: Tensor, b: Tensor) -> list[int]:
    """The shape of ``torch.matmul(a, b)``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied: they sum over other lengths, or one "
            "has no dimension"
        )
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied: their batches are not broadcast to one"
        ) from None
    return [*batch, *(a.shape[-2:-1] if a.dim() > 1 else ()), *(b.shape[-1:] if b.dim() > 1 else ())]


def each_sample(
    operator: Callable[..., Tensor], count: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Tensor, int]:
    """The results of ``operator`` for ``count`` samples, one after the other, and the dimension of the samples.

    ``in_dims`` are those of a rule of `torch.library.register_vmap`: an int for every argument that has samples.
    """
    pairs = list(zip(arguments, in_dims, strict=True))
    calls = ([x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs] for i in range(count))
    return torch.stack([operator(*call) for call in calls]), 0
