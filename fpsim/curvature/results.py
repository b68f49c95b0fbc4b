"""Results of the algorithms: frozen classes with an estimate, its error, its cost, and whether it converged.

Scalars and small tensors are float64 on the CPU, for every dtype and device of the operator. Every result has a method
``plot``, which needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs of a symmetric operator.

    Attributes:
        eigenvalues: float64, shape ``(k,)``: Ritz values, in the order asked for (``largest``: descending;
            ``smallest``: ascending; ``magnitude``: descending in absolute value; ``both``: the largest, descending,
            then the smallest, ascending). The largest Ritz value is a lower bound of the largest eigenvalue.
        eigenvectors: shape ``(size, k)``, orthonormal columns, in the operator's dtype and on its device.
        residuals: float64, shape ``(k,)``: ``|A x - theta x|``; some eigenvalue lies within that distance of theta.
        products: the number of products with the operator.
        converged: whether every residual met the tolerance.
        asymmetry: the largest difference between ``q_i . A q_j`` and ``q_j . A q_i`` among the vectors of Lanczos,
            relative to the largest eigenvalue. It costs no further products, and is no proof of symmetry. NaN for the
            other methods.
        method: ``lanczos``, ``lobpcg`` or ``power``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor = field(repr=False)
    residuals: Tensor
    products: int
    converged: bool
    asymmetry: float = float("nan")
    method: str = "lanczos"

    @property
    def bounds(self) -> Tensor:
        """Intervals that each contain an eigenvalue, theta minus and plus its residual: float64, shape ``(k, 2)``."""
        return torch.stack([self.eigenvalues - self.residuals, self.eigenvalues + self.residuals], dim=1)

    def plot(self, axes: Axes | None = None) -> Axes:
        """The eigenvalues with their residuals as error bars."""
        axes = axes or new_axes()
        axes.errorbar(range(len(self.eigenvalues)), self.eigenvalues, yerr=self.residuals, fmt="o", capsize=3)
        axes.set(xlabel="index", ylabel="eigenvalue")
        return axes


@dataclass(frozen=True, eq=False)
class TraceResult:
    """The trace of an operator, or of a function of it.

    Attributes:
        estimate: the estimate of the trace.
        stderr: its standard error: the standard deviation over probes, divided by the root of their number. Zero if
            the estimate is exact.
        products: the number of products with the operator.
        converged: whether ``stderr`` (and the quadrature error) met the tolerance.
        samples: float64, shape ``(probes,)``: the estimate from each probe; their mean is ``estimate``.
        quadrature_error: for functions of the operator, the change of the estimate when the last quarter of the
            Lanczos steps is omitted; zero for the plain trace.
        method: ``hutchinson``, ``hutch++`` or ``quadrature``.
    """

    estimate: float
    stderr: float
    products: int
    converged: bool
    samples: Tensor = field(repr=False)
    quadrature_error: float = 0.0
    method: str = "hutchinson"

    def plot(self, axes: Axes | None = None) -> Axes:
        """The running mean over probes with one standard error on either side."""
        axes = axes or new_axes()
        count = torch.arange(1, len(self.samples) + 1, dtype=torch.float64)
        mean = self.samples.cumsum(0) / count
        spread = ((self.samples**2).cumsum(0) / count - mean**2).clamp(min=0)
        error = (spread / (count - 1).clamp(min=1)).sqrt()
        axes.plot(count, mean)
        axes.fill_between(count, mean - error, mean + error, alpha=0.3)
        axes.set(xlabel="probes", ylabel="trace")
        return axes


@dataclass(frozen=True, eq=False)
class DensityResult:
    """The spectral density of an operator by stochastic Lanczos quadrature.

    Each probe gives a quadrature rule. Its moments up to twice its steps are those of the spectrum, up to the probe's
    sampling error. The density is the mean of the rules, where each node is smoothed to a normal distribution.

    Attributes:
        grid: float64, shape ``(points,)``: eigenvalues at which the density is given.
        density: float64, shape ``(points,)``: the density per unit of eigenvalue; it integrates to 1.
        stderr: float64, shape ``(points,)``: the standard error of the density over probes.
        sigma: the standard deviation of the smoothing, in units of the eigenvalues.
        nodes: float64, shape ``(probes, steps)``: the Ritz values of each probe.
        weights: float64, same shape: the weight of each node; each row sums to 1. A probe that took fewer steps has
            weights of zero at the end.
        size: the size of the operator; ``size`` times the density is the density of the number of eigenvalues.
        products: the number of products with the operator.
        converged: whether the integral of ``stderr`` met the tolerance.
    """

    grid: Tensor = field(repr=False)
    density: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    sigma: float
    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    size: int
    products: int
    converged: bool

    def integrate(self, function: Callable[[Tensor], Tensor]) -> TraceResult:
        """The trace of ``function`` of the operator from the same probes, without further products.

        Args:
            function: an elementwise function of eigenvalues, float64 to float64.
        """
        samples = (self.weights * function(self.nodes).where(self.weights > 0, 0.0)).sum(1) * self.size
        return TraceResult(
            float(samples.mean()), standard_error(samples), self.products, self.converged, samples, method="quadrature"
        )

    def moment(self, order: int) -> float:
        """The mean of the eigenvalues to the power ``order``; exact for these probes up to twice the steps."""
        return self.integrate(lambda x: x**order).estimate / self.size

    def plot(self, axes: Axes | None = None) -> Axes:
        """The density on a logarithmic axis, with one standard error on either side."""
        axes = axes or new_axes()
        floor = 1e-6 * float(self.density.max())
        low, high = ((self.density + sign * self.stderr).clamp(min=floor) for sign in (-1, 1))
        axes.semilogy(self.grid, self.density.clamp(min=floor))
        axes.fill_between(self.grid, low, high, alpha=0.3)
        axes.set(xlabel="eigenvalue", ylabel="density")
        return axes


def standard_error(samples: Tensor) -> float:
    """The standard error of the mean of independent ``samples``, shape ``(n,)``; infinite for one sample."""
    return float(samples.std() / len(samples) ** 0.5) if len(samples) > 1 else float("inf")


def new_axes() -> Any:
    """New empty axes of matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fpsim[paper]', or matplotlib") from error
    return plt.figure(layout="constrained").subplots()
