"""The spectral density of an operator, the distribution of its eigenvalues, by stochastic Lanczos quadrature.

Lin, Saad, Yang 2016, section 3.2; Ghorbani, Krishnan, Xiao 2019, algorithm 1. Each random probe gives the nodes and
weights of a Gauss quadrature of its own spectral measure. The mean of these measures over probes is the density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpsim.curvature.counting import as_operator, products_of
from fpsim.curvature.linear import Operator
from fpsim.curvature.results import DensityResult
from fpsim.curvature.traces import Probe, check_probes, probe_spectrum
from fpsim.curvature.vectors import seeded


def density(
    operator: Operator | Tensor,
    *,
    steps: int = 60,
    probes: int = 4,
    max_probes: int | None = None,
    tol: float = 0.05,
    sigma: float | None = None,
    grid: Tensor | int = 1000,
    probe: Probe = "rademacher",
    reorthogonalise: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> DensityResult:
    """The spectral density of a symmetric operator, with error bars.

    Args:
        operator: an `Operator`, or a dense symmetric matrix.
        steps: the Lanczos steps per probe, one product each; more steps resolve more detail.
        probes: the first number of probes, at least 2 for error bars.
        max_probes: while the error is above ``tol``, probes are added up to this number; None is ``probes``.
        tol: the tolerance of the integral of the standard error (the integral of the density is 1).
        sigma: the standard deviation of the smoothing; None is a hundredth of the spectrum's width.
        grid: the eigenvalues at which to give the density (float64, shape ``(points,)``), or how many to spread
            evenly.
        probe: the distribution of the probes' entries.
        reorthogonalise: False saves the memory of ``steps`` vectors; a smoothed density hardly changes (measured).
        generator: the source of the probes; None is a fresh one with seed 0.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a choice is unknown, or a number is out of range.
    """
    operator = as_operator(operator)
    most = probes if max_probes is None else max_probes
    check_probes(probe, tol)
    if steps < 1 or probes < 2 or most < probes:
        raise ValueError(f"need steps >= 1 and 2 <= probes <= max_probes, got {steps}, {probes}, {most}")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    generator = seeded(generator)
    rows: list[tuple[Tensor, Tensor]] = []
    with products_of(operator, f"density of the {operator.name}", steps * most, progress) as products:
        while True:
            found, _ = probe_spectrum(products, steps, probe, generator, reorthogonalise=reorthogonalise)
            rows.append(found.ritz())
            if len(rows) < probes:
                continue
            nodes, weights = _padded([row[0] for row in rows]), _padded([row[1] for row in rows], 0.0)
            width = _width(nodes) if sigma is None else sigma
            points = _spread(nodes, width, grid) if isinstance(grid, int) else grid.to("cpu", torch.float64)
            each = torch.stack([_widened(points, n, w, width) for n, w in zip(nodes, weights, strict=True)])
            stderr = each.std(0) / len(rows) ** 0.5
            converged = float(torch.trapezoid(stderr, points)) <= tol
            if converged or len(rows) >= most:
                break
    return DensityResult(points, each.mean(0), stderr, width, nodes, weights, operator.size, products.count, converged)


def _padded(rows: list[Tensor], value: float | None = None) -> Tensor:
    """Rows of unequal length as a matrix, padded with ``value``, or for None with each row's last entry."""
    longest = max(map(len, rows))
    tails = (float(row[-1]) if value is None else value for row in rows)
    return torch.stack(
        [torch.cat([row, row.new_full((longest - len(row),), tail)]) for row, tail in zip(rows, tails, strict=True)]
    )


def _width(nodes: Tensor) -> float:
    """A hundredth of the spectrum's width; if all eigenvalues are equal, a hundredth of their magnitude, or 0.01."""
    spread = float(nodes.max() - nodes.min())
    size = float(nodes.abs().max())
    return 0.01 * (spread if spread > 1e-6 * size else size or 1.0)


def _spread(nodes: Tensor, sigma: float, count: int) -> Tensor:
    """``count`` points, evenly spaced from five standard deviations below the nodes to five above."""
    low, high = float(nodes.min()) - 5 * sigma, float(nodes.max()) + 5 * sigma
    return torch.linspace(low, high, count, dtype=torch.float64)


def _widened(points: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    shapes = torch.exp(-((points.unsqueeze(1) - nodes) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return shapes @ weights
