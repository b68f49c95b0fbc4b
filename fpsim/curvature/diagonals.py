"""The diagonal of an operator: exactly, or by random probes (Bekas, Kokiopoulou, Saad 2007, section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fpsim.curvature.counting import Asymmetry, as_operator, doubts, products_of
from fpsim.curvature.linear import Operator
from fpsim.curvature.results import new_axes
from fpsim.curvature.vectors import Layout, rademacher, seeded
from fpsim.showing import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class DiagonalResult(Shown):
    """The diagonal of an operator.

    Attributes:
        estimate: shape ``(size,)``, in the operator's dtype and on its device.
        stderr: the standard error of each entry, same shape; zeros if the diagonal is exact.
        products: the number of products with the operator.
        converged: whether the operator is symmetric and its loss and data stayed the same; for probes also whether the
            norm of ``stderr`` met the tolerance.
        layout: which parameters the entries belong to; None if they are not parameters.
        reasons: why ``converged`` is False, in words; empty if it is True.
        cost: that of the products in gradients (`Operator.cost`).
    """

    estimate: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    products: int
    converged: bool
    layout: Layout | None = field(default=None, repr=False)
    reasons: tuple[str, ...] = ()
    cost: float = math.nan

    def by_parameter(self) -> dict[str, Tensor]:
        """The entries by the name of their parameter, in the parameters' shapes.

        Raises:
            ValueError: the operator's entries are not parameters.
        """
        if self.layout is None:
            raise ValueError("the operator has no layout of parameters: its diagonal is `estimate`")
        return dict(zip(self.layout.names, self.layout.split(self.estimate), strict=True))

    def plot(self, axes: Axes | None = None) -> Axes:
        """The magnitudes of all entries, sorted, on a logarithmic axis."""
        axes = axes or new_axes()
        axes.semilogy(self.estimate.abs().sort(descending=True).values.cpu().numpy())
        axes.set(xlabel="entry", ylabel="magnitude")
        return axes


def diagonal(
    operator: Operator | Tensor,
    *,
    method: Literal["exact", "probes"] = "probes",
    tol: float = 0.1,
    probes: int = 100,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> DiagonalResult:
    """The diagonal of a symmetric operator, such as the preconditioner of a Newton step.

    Args:
        operator: an `Operator`, or a dense symmetric matrix.
        method: ``exact`` takes one product for each row. ``probes`` takes the mean of ``z * A z`` over random signs z,
            one product each: it is unbiased, and the variance of an entry is the sum of the squares of the other
            entries in its row, divided by the number of probes.
        tol: the result has converged if the norm of the standard errors is at most this share of the diagonal's norm
            (``probes`` only).
        probes: how many, at least 2.
        generator: the source of the probes; None is a fresh one with seed 0.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the method is unknown, or a number is out of range.

    >>> diagonal(torch.diag(torch.tensor([1.0, -2.0])), probes=2).estimate
    tensor([ 1., -2.])
    """
    operator = as_operator(operator)
    if method not in ("exact", "probes"):
        raise ValueError(f"unknown method {method!r}: use 'exact' or 'probes'")
    if probes < 2 or not tol >= 0:
        raise ValueError(f"probes must be at least 2 and tol not negative, got {probes} and {tol}")
    count = operator.size if method == "exact" else probes
    generator = seeded(generator)
    asymmetry = Asymmetry()
    mean, spread = (torch.zeros(operator.size, dtype=operator.dtype, device=operator.device) for _ in range(2))
    with products_of(operator, f"diagonal of the {operator.name}", count, progress) as products:
        for index in range(count):
            if method == "exact":
                unit = torch.zeros_like(mean)
                unit[index] = 1.0
                image = products(unit)
                mean[index] = image[index]
                asymmetry.add(unit, image)
                continue
            probe = rademacher(operator.size, operator.dtype, operator.device, generator)
            image = products(probe)
            asymmetry.add(probe, image)
            step = probe * image - mean  # Welford 1962
            mean += step / (index + 1)
            spread += step * (probe * image - mean)
    stderr = spread if method == "exact" else (spread / (count - 1) / count).sqrt()
    reasons = doubts(operator, asymmetry.error)
    error, size = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (stderr, mean))
    if error > tol * size:
        reasons = (
            f"the standard error is {error / size if size else error:.3g}, above {tol:g}: use more probes",
            *reasons,
        )
    return DiagonalResult(mean, stderr, products.count, not reasons, operator.layout, reasons, products.cost)
