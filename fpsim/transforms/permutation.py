"""Permutation: both operands of a product take the elements that it sums over in another order.

Source: K-sort (arXiv 2403.20137): blocks that share a scale then hold channels of similar magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fpsim.transforms.channels import amax_of_channels, check_length, squares_of_channels
from fpsim.transforms.transform import Transform

ORDERS = ("amax", "norm")
OPERANDS = ("first", "second")


@dataclass(frozen=True)
class Permutation(Transform):
    """An order of the channels of a product: element i of the permuted axis is element ``order[i]`` of the axis.

    Attributes:
        by: the channels are sorted by the largest magnitude (``amax``) or the Euclidean norm (``norm``) of each, the
            largest first. Equal channels keep their order, and NaN is larger than all numbers. The squares are summed
            in float64. None if `order` is given.
        operand_of: the operand that determines the order, ``first`` or ``second``.
        order: a given order, a permutation of 0, 1, ..., as a sequence or a tensor.

    Raises:
        ValueError: ``order`` is no permutation, ``by`` or ``operand_of`` is unknown, or both or neither are given.
    """

    by: Literal["amax", "norm"] | None = "amax"
    operand_of: Literal["first", "second"] = "first"
    order: tuple[int, ...] = ()

    is_of_products: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    parameters_are_indices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        order = _indices(self.order)
        object.__setattr__(self, "order", order)
        if sorted(order) != list(range(len(order))):
            missing = min(set(range(len(order))) - set(order))
            raise ValueError(
                f"the order of a permutation of {len(order)} elements has each index from 0 to {len(order) - 1} once, "
                f"and {missing} is missing"
            )
        if self.operand_of not in OPERANDS:
            raise ValueError(f"unknown operand {self.operand_of!r} of a permutation: use {' or '.join(OPERANDS)}")
        if self.by not in (None, *ORDERS) or (self.by is None) != bool(order):
            raise ValueError(
                f"a permutation is sorted by {' or '.join(ORDERS)}, or has a given order and by=None, got by="
                f"{self.by!r} and {len(order)} indices"
            )

    def __str__(self) -> str:
        if self.by is None:
            return f"permute:order={','.join(map(str, self.order))}"
        return f"permute:{self.by}" + ":second" * (self.operand_of == "second")

    def check_axis(self, length: int) -> None:
        if self.order:
            check_length(str(self), len(self.order), length)

    def parameters(self, first: Tensor, second: Tensor, axes: tuple[int, int]) -> Tensor:
        if self.by is None:
            self.check_axis(first.shape[axes[0]])
            return torch.tensor(self.order, dtype=torch.int64, device=first.device)
        number = OPERANDS.index(self.operand_of)
        measure = amax_of_channels if self.by == "amax" else squares_of_channels
        return torch.sort(measure((first, second)[number], axes[number]), stable=True, descending=True).indices

    def operand(self, x: Tensor, number: int, axis: int, parameters: Tensor | None, out: Tensor) -> None:
        assert parameters is not None, "permutations have parameters"
        out.copy_(x.index_select(axis, parameters))

    def linear(self, x: Tensor, number: int, axis: int, parameters: Tensor | None = None) -> Tensor:
        assert parameters is not None, "permutations have parameters"
        return x.index_select(axis, parameters)


def _indices(given: Any) -> tuple[int, ...]:
    items = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(items, Iterable) or isinstance(items, str):
        raise TypeError(f"the order of a permutation is a list or a tensor of indices, got {given!r}")
    items = tuple(items)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in items):
        raise TypeError(f"the order of a permutation is a list or a tensor of indices, got {given!r}")
    return items
