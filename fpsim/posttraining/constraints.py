"""Scales whose ratios are powers of two, so that products of scaled elements need no multiplication by a scale.

Source: ZeroQuant-FP (arXiv 2307.09782), section 3, M1 and M2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def power_of_two_scales(ratios: Tensor) -> Tensor:
    """M1: the least powers of two that are at least the ratios.

    Args:
        ratios: the ratios amax / max of groups, positive and finite; 0 for a group of zeros.

    Returns:
        A tensor of the shape and dtype of ``ratios``; 1 for 0. No element saturates that did not before.

    >>> power_of_two_scales(torch.tensor([0.3, 0.5, 0.0]))
    tensor([0.5000, 0.5000, 1.0000])
    """
    _check(ratios)
    usable = torch.where(ratios == 0, 1.0, ratios)
    mantissa, exponent = torch.frexp(usable)
    return _power(torch.where(mantissa == 0.5, exponent - 1, exponent), usable)


def power_of_two_ratios(ratios: Tensor, rows: int | None = None, *, up: bool = False) -> Tensor:
    """M2: ratios that differ by powers of two from the largest one of their compute block, which stays as it is.

    With d the largest ratio of the block, d_i becomes d / 2^ceil(log2(d / d_i)). That is at most d_i, so the largest
    elements of a group may saturate, by less than a factor of two. With ``up`` the exponent is rounded down in place of
    up: nothing saturates.

    Args:
        ratios: as for `power_of_two_scales`, of shape (rows, groups).
        rows: the number of consecutive rows in a compute block; None means all. A block has all given groups.
        up: whether ratios are rounded up.

    Returns:
        A tensor of the shape and dtype of ``ratios``; the largest ratio of the block for 0, or 1 if all are 0.

    >>> power_of_two_ratios(torch.tensor([[3.0], [1.0], [0.75]])).flatten()
    tensor([3.0000, 0.7500, 0.7500])
    >>> power_of_two_ratios(torch.tensor([[3.0], [1.0], [0.75]]), up=True).flatten()
    tensor([3.0000, 1.5000, 0.7500])
    """
    _check(ratios)
    if ratios.dim() != 2:
        raise ValueError(f"ratios have the shape (rows, groups), got {tuple(ratios.shape)}")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"a compute block has 1 row or more, got rows={rows!r}")
    return torch.cat([_of_block(block, up) for block in ratios.split(rows or max(len(ratios), 1))])


def _of_block(ratios: Tensor, up: bool) -> Tensor:
    largest = torch.where(ratios.amax() == 0, 1.0, ratios.amax())
    # The quotient of two float32 numbers in float64 is a power of two only if it is one in exact arithmetic.
    mantissa, exponent = torch.frexp(largest.double() / torch.where(ratios == 0, largest, ratios).double())
    exponent = exponent - 1 if up else torch.where(mantissa == 0.5, exponent - 1, exponent)
    return largest * _power(-exponent, largest)


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=like.dtype), exponent)


def _check(ratios: Any) -> None:
    if not isinstance(ratios, Tensor) or ratios.dtype != torch.float32:
        raise TypeError(f"ratios are a float32 tensor, got {getattr(ratios, 'dtype', type(ratios).__name__)}")
    if not (ratios.isfinite().all() and (ratios >= 0).all()):
        raise ValueError("ratios are finite, and positive or 0")
