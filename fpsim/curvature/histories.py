"""Curvature along a training run: eigenvalues by step, and how the gradient lies to the top eigenvectors.

Gur-Ari, Roberts, Dyer 2018, *Gradient Descent Happens in a Tiny Subspace*, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpsim.curvature.results import EigenResult, new_axes
from fpsim.curvature.vectors import norm
from fpsim.showing import Shown, counted, render

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class Alignment(Shown):
    """How a gradient lies to the eigenvectors of a curvature operator.

    Attributes:
        cosines: float64, shape ``(k,)``: the magnitudes of the cosines between the gradient and each eigenvector.
        share: the share of the gradient's squared norm in the space of these eigenvectors, from 0 to 1.
        cost: that of the eigenvectors in gradients, and of the gradient.
    """

    cosines: Tensor
    share: float
    cost: float


def alignment(gradient: Tensor, eigen: EigenResult) -> Alignment:
    """The alignment of ``gradient`` with the eigenvectors of ``eigen``.

    Args:
        gradient: shape ``(size,)``; ``operator.layout.flatten(tree)`` makes it of a pytree.
        eigen: of an operator of the same size.

    Raises:
        ValueError: the gradient has another size, or its norm is zero, infinite or NaN.

    >>> from fpsim.curvature import eigenpairs
    >>> found = eigenpairs(torch.diag(torch.tensor([3.0, 1.0, 0.0])), k=2)
    >>> round(alignment(torch.tensor([3.0, 0.0, 4.0]), found).share, 6)
    0.36
    """
    vectors = eigen.eigenvectors
    if gradient.shape != vectors.shape[:1]:
        raise ValueError(f"a gradient has shape ({vectors.shape[0]},), got {tuple(gradient.shape)}: use Layout.flatten")
    size = norm(gradient)
    if not 0 < size < math.inf:
        raise ValueError(f"the norm of the gradient is {size}: it has no direction")
    cosines = (vectors.double().T @ gradient.detach().to(vectors.device).double() / size).cpu()
    return Alignment(cosines.abs(), float(cosines.square().sum()), eigen.cost + 1)


@dataclass(frozen=True)
class CurvatureHistory(Shown):
    """Eigenvalues and alignments at steps of a run. `add` gives a longer history; ``print(history)`` shows a table.

    Attributes:
        steps: the steps, ascending.
        eigen: the result at each step, without its eigenvectors.
        alignments: at each step, or None if no gradient was given.

    >>> from fpsim.curvature import eigenpairs
    >>> history = CurvatureHistory()
    >>> for step in (0, 10):
    ...     history = history.add(step, eigenpairs(torch.diag(torch.tensor([2.0 + step, 1.0]))))
    >>> [round(row["eigenvalue 1"], 4) for row in history.rows()]
    [2.0, 12.0]
    """

    steps: tuple[int, ...] = ()
    eigen: tuple[EigenResult, ...] = ()
    alignments: tuple[Alignment | None, ...] = ()

    def add(self, step: int, eigen: EigenResult, gradient: Tensor | None = None) -> CurvatureHistory:
        """The history with one more step.

        Args:
            step: larger than all steps before.
            eigen: the eigenpairs at this step: as many as at the steps before, with the same ``which``, of an operator
                of the same size and name.
            gradient: the gradient at this step, shape ``(size,)``, for `alignment`.

        Raises:
            TypeError: the step is no integer.
            ValueError: the step is not the latest, or the number of eigenvalues, ``which``, the name of the operator
                or its size is another; and as `alignment`.
        """
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise TypeError(f"a step is an integer, got {step!r}")
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step {step} does not follow step {self.steps[-1]}: add steps in ascending order")
        if self.eigen and len(eigen.eigenvalues) != len(self.eigen[0].eigenvalues):
            raise ValueError(
                f"step {step} has {counted(len(eigen.eigenvalues), 'eigenvalue')} and the steps before have "
                f"{len(self.eigen[0].eigenvalues)}: ask for the same k at each step"
            )
        if self.eigen and len(eigen.eigenvectors) != len(self.eigen[0].eigenvectors):
            raise ValueError(
                f"step {step} has an operator of size {len(eigen.eigenvectors)} and the steps before of size "
                f"{len(self.eigen[0].eigenvectors)}: begin another history for it"
            )
        for attribute, what in (("which", "eigenvalues with which="), ("operator", "eigenvalues of the ")):
            own, before = (getattr(each, attribute) for each in (eigen, (self.eigen or (eigen,))[0]))
            if own != before:
                raise ValueError(
                    f"step {step} has {what}{own} and the steps before have {what}{before}: begin another history for "
                    "them"
                )
        aligned = None if gradient is None else alignment(gradient, eigen)
        small = replace(eigen, eigenvectors=eigen.eigenvectors[:, :0])
        return CurvatureHistory((*self.steps, step), (*self.eigen, small), (*self.alignments, aligned))

    @property
    def products(self) -> int:
        """The number of products with the operators."""
        return sum(each.products for each in self.eigen)

    @property
    def cost(self) -> float:
        """The cost of the products in gradients (`Operator.cost`), and of the gradients."""
        return sum(
            each.cost if aligned is None else aligned.cost
            for each, aligned in zip(self.eigen, self.alignments, strict=True)
        )

    def table(self) -> Table:
        """The `rows` as a table of rich; numbers have six digits."""
        from rich.table import Table

        rows = self.rows()
        title = (
            f"curvature at {counted(len(rows), 'step')}, {counted(self.products, 'product')}, cost of {self.cost:.4g} "
            "gradients"
        )
        names = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        table = Table(*names, title=title, title_justify="left", min_width=len(title))  # the title is one line
        for row in rows:
            values = (row.get(name, "") for name in names)
            table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values))
        return table

    def __str__(self) -> str:
        return render(self.table())

    def __rich__(self) -> Table:
        return self.table()

    def rows(self) -> list[dict[str, Any]]:
        """One mapping for each step: its cost, eigenvalues, residuals, and cosines and share if it had a gradient."""
        rows = []
        for step, eigen, aligned in zip(self.steps, self.eigen, self.alignments, strict=True):
            cost = eigen.cost if aligned is None else aligned.cost
            row: dict[str, Any] = {
                "step": step, "products": eigen.products, "cost": cost, "converged": eigen.converged
            }  # fmt: skip
            for i, (value, residual) in enumerate(zip(eigen.eigenvalues, eigen.residuals, strict=True), 1):
                row |= {f"eigenvalue {i}": float(value), f"residual {i}": float(residual)}
            if aligned is not None:
                row |= {f"cosine {i}": float(value) for i, value in enumerate(aligned.cosines, 1)}
                row["share of gradient"] = aligned.share
            rows.append(row)
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("CurvatureHistory.to_pandas needs pandas: pip install pandas, or use rows") from error
        return pandas.DataFrame(self.rows())

    def plot(self, axes: Axes | None = None, *, rate: float | None = None) -> Axes:
        """The eigenvalues by step, and with a second axis the share of the gradient in their space.

        Args:
            axes: where to plot; None makes new ones.
            rate: a learning rate of plain gradient descent; a line shows ``2 / rate``, above which a quadratic loss
                diverges (Cohen et al. 2021).
        """
        axes = axes or new_axes()
        values = torch.stack([each.eigenvalues for each in self.eigen]) if self.eigen else torch.zeros(0, 0)
        for i, column in enumerate(values.T, 1):
            axes.plot(self.steps, column.numpy(), marker="o", label=f"eigenvalue {i}")
        if rate is not None:
            axes.axhline(2 / rate, linestyle="--", color="grey", label="2 / learning rate")
        axes.set(xlabel="step", ylabel="eigenvalue")
        shares = [(step, each.share) for step, each in zip(self.steps, self.alignments, strict=True) if each]
        if shares:
            other = axes.twinx()
            other.plot(*zip(*shares, strict=True), color="black", linestyle=":", label="share of the gradient")
            other.set(ylabel="share of the gradient", ylim=(0, 1))
        axes.legend()
        return axes
