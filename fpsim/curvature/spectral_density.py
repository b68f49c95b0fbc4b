"""The spectral density of an operator, the distribution of its eigenvalues, by stochastic Lanczos quadrature.

Lin, Saad, Yang 2016, section 3.2; Ghorbani, Krishnan, Xiao 2019, algorithm 1. Each random probe gives the nodes and
weights of a Gauss quadrature of its own spectral measure. The mean of these measures over probes is the density.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fpsim.curvature.counting import as_operator, doubts, products_of
from fpsim.curvature.lanczos import Tridiagonal
from fpsim.curvature.linear import Operator
from fpsim.curvature.results import DensityResult, smoothed
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
        probes: the number of probes, at least 2 for error bars.
        max_probes: the largest number of probes; None is ``probes``. If it is at least twice ``probes``, the first
            ``probes`` only choose how many more reach ``tol``, and those alone make the result: a stop as soon as the
            error looks small would prefer probes that happen to agree. Otherwise all ``max_probes`` are used.
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
    with products_of(operator, f"density of the {operator.name}", steps * most, progress) as products:

        def drawn(count: int) -> tuple[list[Tridiagonal], DensityResult]:
            found = [
                probe_spectrum(products, steps, probe, generator, reorthogonalise=reorthogonalise)[0]
                for _ in range(count)
            ]
            return found, _density([row.ritz() for row in found], sigma, grid, operator.size)

        count = probes
        found, result = drawn(most if most < 2 * probes else probes)
        if most >= 2 * probes:  # the first probes only choose the number of those that count
            needed = math.ceil(probes * (1.4 * _error(result) / tol) ** 2) if tol else most
            count = min(most - probes, max(probes, needed))
            found, result = drawn(count)
    reasons = doubts(operator, max(row.asymmetry for row in found))
    if _error(result) > tol:
        reasons = (
            f"the integral of the standard error is {_error(result):.2g}, above {tol:g}: raise max_probes, or sigma",
            *reasons,
        )
    return replace(result, products=products.count, converged=not reasons, reasons=reasons, cost=products.cost)


def _density(rows: list[tuple[Tensor, Tensor]], sigma: float | None, grid: Tensor | int, size: int) -> DensityResult:
    """The density from the nodes and weights of each probe, without products and verdict."""
    nodes, weights = _padded([row[0] for row in rows]), _padded([row[1] for row in rows], 0.0)
    width = _width(nodes) if sigma is None else sigma
    points = _spread(nodes, width, grid) if isinstance(grid, int) else grid.to("cpu", torch.float64)
    each = smoothed(points, nodes, weights, width)
    stderr = each.std(0) / len(rows) ** 0.5
    return DensityResult(points, each.mean(0), stderr, width, nodes, weights, size, 0, False)


def _error(result: DensityResult) -> float:
    return float(torch.trapezoid(result.stderr, result.grid))


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
