"""A count of an operator's products, and a progress bar on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fpsim.curvature.linear import Operator, symmetry_tolerance
from fpsim.curvature.vectors import dot, norm


class Products:
    """``v -> A v`` with a count of the calls, and their `cost` in gradients.

    Raises:
        FloatingPointError: a product is not finite; no algorithm recovers from it.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.count = 0

    @property
    def cost(self) -> float:
        """The cost of the calls so far, in gradients."""
        return self.count * self.operator.cost

    def __call__(self, vector: Tensor) -> Tensor:
        result = self.operator.matvec(vector)
        self.count += 1
        if not torch.isfinite(result.sum()):
            raise FloatingPointError(
                f"product {self.count} with the {self.operator.name} has infinities or NaN: the loss or one of its "
                "derivatives is not finite (as that of a norm at zero), or a format overflowed"
            )
        return result


class _ShownProducts(Products):
    def __init__(self, operator: Operator, title: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        from fpsim.progress import ProgressBars

        super().__init__(operator)
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = ProgressBars(*columns, transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __call__(self, vector: Tensor) -> Tensor:
        result = super().__call__(vector)
        self.bar.advance(self.task)
        return result


@contextmanager
def products_of(operator: Operator | Tensor, title: str, total: int, progress: bool) -> Iterator[Products]:
    """The counted products of ``operator`` or of a dense symmetric matrix.

    Args:
        operator: the matrix to multiply with.
        title: the text of the progress bar.
        total: the largest possible number of products.
        progress: whether to show the bar.
    """
    operator = as_operator(operator)
    if not progress:
        yield Products(operator)
        return
    shown = _ShownProducts(operator, title, total)
    with shown.bar:
        yield shown


def as_operator(operator: Operator | Tensor) -> Operator:
    """``operator``, or the operator of a dense matrix."""
    if isinstance(operator, Operator):
        return operator
    if isinstance(operator, Tensor):
        return Operator.of_matrix(operator)
    raise TypeError(f"expected an Operator or a matrix, got {type(operator).__name__}: make one with hessian(...)")


class Asymmetry:
    """An estimate of ``|A - A^T| / |A|`` from products with random vectors, each compared with the one before.

    It is that of `Operator.symmetry_error`, without products of its own; it keeps two vectors.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._difference = self._size = 0.0

    def add(self, vector: Tensor, image: Tensor) -> None:
        """Take account of ``image``, the operator times ``vector``."""
        if self._last is not None:
            other, mapped = self._last
            self._difference += (dot(other, image) - dot(vector, mapped)) ** 2
            self._size += norm(image) ** 2
        self._last = vector, image

    @property
    def error(self) -> float:
        """The estimate; zero before the second product."""
        return (self._difference / self._size) ** 0.5 if self._size else 0.0


def doubts(operator: Operator, asymmetry: float) -> tuple[str, ...]:
    """Why a result of ``operator`` cannot be trusted: it is not symmetric, or its loss or data changed.

    Args:
        operator: the operator, after its products.
        asymmetry: the relative asymmetry that the algorithm measured.
    """
    tolerance = symmetry_tolerance(operator)
    if not asymmetry > tolerance:  # NaN: not measured
        return operator.doubts()
    return (
        *operator.doubts(),
        f"the {operator.name} is not symmetric: u.Av and v.Au differ by {asymmetry:.1e} of its size, and rounding "
        f"errors by at most {tolerance:.0e}. Rounded gradients cause this, and derivatives of a custom operator that "
        "are wrong: compare with mode='finite_difference'",
    )
