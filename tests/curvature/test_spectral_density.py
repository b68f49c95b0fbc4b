"""The spectral density: its moments, its error bars, and its agreement with the dense spectrum."""

from __future__ import annotations

import math

import pytest
import torch

from fpsim.curvature import density, trace
from tests.curvature.small_models import network_spectrum, spectrum_matrix

VALUES = network_spectrum(300)
MATRIX = spectrum_matrix(VALUES)
SIZE = len(VALUES)


def exact(grid, sigma):
    shapes = torch.exp(-((grid.unsqueeze(1) - VALUES) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return shapes.mean(1)


def test_first_moment_is_the_trace_by_the_same_probes():
    for probe in ("rademacher", "gaussian"):
        generator = torch.Generator().manual_seed(3)
        result = density(MATRIX, steps=10, probes=12, generator=generator)
        same = trace(MATRIX, method="hutchinson", tol=0, max_products=12, generator=torch.Generator().manual_seed(3))
        if probe == "rademacher":
            assert abs(result.integrate(lambda x: x).estimate - same.estimate) < 1e-9
            assert abs(result.integrate(lambda x: x).stderr - same.stderr) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_moments_are_those_of_the_powers_of_the_matrix(order):
    power = torch.linalg.matrix_power(MATRIX, order)
    result = density(MATRIX, steps=6, probes=12, generator=torch.Generator().manual_seed(3))
    same = trace(power, method="hutchinson", tol=0, max_products=12, generator=torch.Generator().manual_seed(3))
    assert abs(result.moment(order) * SIZE - same.estimate) <= 1e-10 * abs(same.estimate)
    found = result.integrate(lambda x: x**order)
    assert abs(found.estimate - float((VALUES**order).sum())) <= 4 * found.stderr


@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_density_is_within_its_error_bars(reorthogonalise):
    result = density(MATRIX, steps=80, probes=30, reorthogonalise=reorthogonalise)
    assert abs(float(torch.trapezoid(result.density, result.grid)) - 1) < 1e-6
    gap = (result.density - exact(result.grid, result.sigma)).abs()
    assert float(torch.trapezoid(gap, result.grid)) <= 3 * float(torch.trapezoid(result.stderr, result.grid))
    inside = gap <= 4 * result.stderr + 1e-3 * float(result.density.max())
    assert float(inside.double().mean()) > 0.98


def test_intervals_contain_the_density():
    inside = []
    for seed in range(6):
        result = density(MATRIX, steps=40, probes=20, grid=20, sigma=0.5, generator=torch.Generator().manual_seed(seed))
        low, high = result.interval(0.95)
        want = exact(result.grid, result.sigma)
        inside.append(((low - 1e-6 <= want) & (want <= high + 1e-6)).double().mean())
    assert 0.88 < float(torch.stack(inside).mean()) < 0.995


def test_probes_are_added_until_the_error_is_small():
    result = density(MATRIX, steps=30, probes=2, max_probes=100, tol=0.1)
    assert result.converged and 2 < len(result.nodes) < 100
    assert float(torch.trapezoid(result.stderr, result.grid)) <= 0.1
    assert not density(MATRIX, steps=30, probes=2, tol=0.01).converged


def test_grid_and_width_may_be_given():
    grid = torch.linspace(-2, 12, 50)
    result = density(MATRIX, grid=grid, sigma=0.5, steps=20)
    assert torch.equal(result.grid, grid.double()) and result.sigma == 0.5


def test_spectra_of_one_point():
    for matrix in (torch.eye(5), torch.zeros(5, 5)):
        result = density(matrix)
        assert bool(torch.isfinite(result.density).all())
        assert abs(float(torch.trapezoid(result.density, result.grid)) - 1) < 1e-6
        assert result.products == 4  # one step exhausts the space


def test_impossible_choices_are_errors():
    for options, message in (
        ({"probes": 1}, "2 <= probes"),
        ({"probes": 5, "max_probes": 4}, "probes <= max_probes"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"probe": "x"}, "unknown probe"),
    ):
        with pytest.raises(ValueError, match=message):
            density(MATRIX, **options)
