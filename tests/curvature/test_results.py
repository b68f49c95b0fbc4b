"""Results are frozen, are float64 and have plots; the progress bar changes nothing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from fpsim.curvature import density, eigenpairs, function_trace, trace
from tests.curvature.small_models import network_spectrum, spectrum_matrix

MATRIX = spectrum_matrix(network_spectrum(50)).float()


def results():
    return [
        eigenpairs(MATRIX, 2, which="both"),
        trace(MATRIX),
        function_trace(MATRIX, torch.exp, steps=5),
        density(MATRIX, steps=10),
    ]


def test_results_are_frozen_and_count_their_products():
    for result in results():
        assert isinstance(result.products, int) and result.products > 0
        assert isinstance(result.converged, bool)
        with pytest.raises(FrozenInstanceError):
            result.products = 0


def test_scalars_are_float64_for_a_float32_operator():
    eigen, plain, _, spectrum = results()
    assert eigen.eigenvalues.dtype == eigen.residuals.dtype == torch.float64
    assert eigen.eigenvectors.dtype == torch.float32
    assert plain.samples.dtype == spectrum.density.dtype == spectrum.nodes.dtype == torch.float64


def test_results_have_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for result in results():
        axes = result.plot()
        assert axes.get_xlabel() and axes.get_ylabel()
        assert result.plot(axes) is axes
        pyplot.close(axes.figure)


def test_a_progress_bar_changes_nothing(capsys):
    shown = eigenpairs(MATRIX, progress=True)
    plain = eigenpairs(MATRIX)
    assert torch.equal(shown.eigenvalues, plain.eigenvalues) and shown.products == plain.products
    assert trace(MATRIX, progress=True).estimate == trace(MATRIX).estimate
    assert torch.equal(density(MATRIX, steps=3, progress=True).density, density(MATRIX, steps=3).density)
