"""Eigenpairs: accuracy, residuals, both ends, repeated eigenvalues, no ghosts, restarts, limits on products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim.curvature import Operator, eigenpairs, hessian
from fpsim.curvature.lanczos import lanczos
from tests.curvature.small_models import case, dense_hessian, network_spectrum, spectrum_matrix

VALUES = network_spectrum()
MATRIX = spectrum_matrix(VALUES)
WAYS = [
    ("lanczos", "largest"),
    ("lanczos", "smallest"),
    ("lanczos", "both"),
    ("lanczos", "magnitude"),
    ("lobpcg", "largest"),
    ("lobpcg", "smallest"),
    ("power", "magnitude"),
]


def expected(values, which, k):
    if which == "largest":
        return values.flip(0)[:k]
    if which == "smallest":
        return values[:k]
    if which == "both":
        return torch.cat([values.flip(0)[:k], values[:k]])
    return values[values.abs().argsort(descending=True)][:k]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("method", "which"), WAYS)
def test_an_eigenvalue_is_within_each_residual(method, which, k):
    result = eigenpairs(MATRIX, k, which=which, method=method)
    assert result.converged and result.method == method
    assert result.eigenvalues.dtype == result.residuals.dtype == torch.float64
    distance = (VALUES.unsqueeze(0) - result.eigenvalues.unsqueeze(1)).abs().amin(1)
    assert bool((distance <= result.residuals + 1e-12).all())
    assert bool((result.residuals <= 1e-2 * result.eigenvalues.abs()).all())
    vectors = result.eigenvectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]).double())
    true = (MATRIX @ vectors - vectors * result.eigenvalues).norm(dim=0)
    torch.testing.assert_close(true, result.residuals, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("method", "which"), WAYS)
def test_the_eigenvalues_asked_for_are_found(method, which, k):
    result = eigenpairs(MATRIX, k, which=which, method=method, tol=2e-3, max_products=1000)
    assert result.converged
    torch.testing.assert_close(result.eigenvalues, expected(VALUES, which, k), rtol=1e-4, atol=0)


def test_close_eigenvalues_are_rarely_taken_for_each_other():
    """The first two are 4 % apart; the rule of two products in a row halves the mistakes of a plain residual rule."""
    results = [eigenpairs(MATRIX, generator=torch.Generator().manual_seed(seed)) for seed in range(100)]
    error = torch.cat([1 - r.eigenvalues / VALUES[-1] for r in results])
    assert int((error > 1e-3).sum()) <= 6
    assert sum(r.products for r in results) / 100 < 14


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_residuals_of_float32_vectors_are_right(method):
    result = eigenpairs(MATRIX.float(), 2, method=method)
    vectors = result.eigenvectors.double()
    true = (MATRIX @ vectors - vectors * result.eigenvalues).norm(dim=0)
    torch.testing.assert_close(true, result.residuals, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("method", "budget"), [("lanczos", 200), ("lobpcg", 1500)])
def test_top_five_to_1e_10(method, budget):
    result = eigenpairs(MATRIX, 5, tol=1e-10, method=method, max_products=budget)
    assert result.converged
    assert bool(((result.eigenvalues - VALUES.flip(0)[:5]).abs() <= 1e-10).all())


def test_no_ghosts_in_200_steps():
    start = torch.randn(len(VALUES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def copies(reorthogonalise):
        found = lanczos(lambda v: MATRIX @ v, start, 200, reorthogonalise=reorthogonalise)
        ritz, _ = found.ritz()
        return int(((ritz - VALUES[-1]).abs() < 1e-6).sum())

    assert copies(True) == 1
    assert copies(False) > 1  # reorthogonalisation avoids this


def test_top_five_of_a_network():
    small = case("layer norm")
    result = eigenpairs(hessian(small.loss, small.params), 5, tol=1e-12)
    want = torch.linalg.eigvalsh(dense_hessian(small.loss, small.params)).flip(0)[:5]
    assert bool(((result.eigenvalues - want).abs() <= 1e-10).all())
    assert result.asymmetry < 1e-12


@pytest.mark.parametrize("max_basis", [8, 12, 25])
def test_restarts_bound_the_memory_and_find_the_same(max_basis):
    result = eigenpairs(MATRIX, 3, which="both" if max_basis > 12 else "largest", max_basis=max_basis, tol=1e-9)
    want = expected(VALUES, "both" if max_basis > 12 else "largest", 3)
    assert result.converged and result.products > max_basis
    assert bool(((result.eigenvalues - want).abs() <= 1e-9).all())
    assert result.asymmetry < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=3, max_size=12), st.integers(1, 3), st.integers(0, 100))
def test_whole_spectra_of_small_integers(integers, k, seed):
    """Repeated eigenvalues in small dimensions: LOBPCG finds each copy, and Lanczos finds no extra ones."""
    values = torch.tensor(integers, dtype=torch.float64).sort().values
    matrix = spectrum_matrix(values, seed)
    result = eigenpairs(matrix, k, tol=1e-8)
    assert abs(float(result.eigenvalues[0] - values[-1])) < 1e-7
    assert float((values.unsqueeze(0) - result.eigenvalues.unsqueeze(1)).abs().amin(1).max()) < 1e-7
    for value in set(integers):
        assert int(((result.eigenvalues - value).abs() < 1e-7).sum()) <= integers.count(value)
    if 3 * k <= len(values):
        result = eigenpairs(matrix, k, tol=1e-8, method="lobpcg")
        torch.testing.assert_close(result.eigenvalues, values.flip(0)[:k], rtol=0, atol=1e-6)


def test_lanczos_continues_after_an_invariant_subspace():
    result = eigenpairs(spectrum_matrix(torch.tensor([5.0, 5.0, 5.0] + [1.0] * 20)), 3)
    torch.testing.assert_close(result.eigenvalues, torch.full((3,), 5.0).double())
    first = eigenpairs(MATRIX, tol=1e-13).eigenvectors[:, 0]
    result = eigenpairs(MATRIX, 3, start=first, tol=1e-6)
    torch.testing.assert_close(result.eigenvalues, VALUES.flip(0)[:3])


@pytest.mark.parametrize("matrix", [torch.zeros(4, 4), torch.eye(4), torch.tensor([[2.0]]), torch.ones(5, 5)])
def test_degenerate_matrices(matrix):
    k = 1 if len(matrix) == 1 else 2
    result = eigenpairs(matrix, k)
    want = torch.linalg.eigvalsh(matrix.double()).flip(0)[:k]
    torch.testing.assert_close(result.eigenvalues, want, rtol=0, atol=1e-5)
    assert result.converged and bool(torch.isfinite(result.eigenvectors).all())
    for method, which in (("lobpcg", "largest"), ("power", "magnitude")):
        if len(matrix) >= 3 * k or method == "power":
            again = eigenpairs(matrix, 1, method=method, which=which)
            torch.testing.assert_close(again.eigenvalues, want[:1], rtol=0, atol=1e-5)


def test_without_convergence_the_bound_still_holds():
    for method, which in WAYS:
        result = eigenpairs(MATRIX, 1, which=which, method=method, max_products=3)
        assert not result.converged and result.products <= 3
        distance = (VALUES.unsqueeze(0) - result.eigenvalues.unsqueeze(1)).abs().amin(1)
        assert bool((distance <= result.residuals + 1e-12).all())


def test_the_largest_ritz_value_is_a_lower_bound():
    for products in range(1, 12):
        result = eigenpairs(MATRIX, max_products=products)
        assert float(result.eigenvalues[0]) <= float(VALUES[-1]) + 1e-12
        assert result.bounds.shape == (1, 2)


def test_an_absolute_residual_would_have_stopped_at_the_start():
    """A random unit vector has a small residual if most eigenvalues are small, so the stop rule is relative."""
    values = torch.cat([torch.full((3999,), 1e-4), torch.tensor([11.37])]).double()
    diagonal = Operator(4000, lambda v: values * v)
    assert abs(float(eigenpairs(diagonal, method="lobpcg").eigenvalues[0]) - 11.37) < 0.01
    assert abs(float(eigenpairs(diagonal).eigenvalues[0]) - 11.37) < 0.01


def test_a_start_near_the_answer_saves_products():
    first = eigenpairs(MATRIX, tol=1e-4)
    again = eigenpairs(MATRIX, tol=1e-4, start=first.eigenvectors[:, 0])
    assert again.products < first.products


def test_results_repeat_and_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = eigenpairs(MATRIX)
    state = torch.random.get_rng_state()
    second = eigenpairs(MATRIX)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(state, torch.random.get_rng_state())
    other = eigenpairs(MATRIX, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.eigenvectors, other.eigenvectors)


def test_lanczos_measures_asymmetry():
    skew = torch.randn(len(VALUES), len(VALUES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert eigenpairs(MATRIX + 0.05 * (skew - skew.T)).asymmetry > 1e-2
    assert eigenpairs(MATRIX).asymmetry < 1e-14


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="product 1 with the broken"):
        eigenpairs(Operator(3, lambda v: v * float("nan"), name="broken"))


def test_impossible_choices_are_errors():
    for options, message in (
        ({"method": "qr"}, "unknown method 'qr'"),
        ({"which": "middle"}, "unknown which 'middle'"),
        ({"method": "power"}, "method='power' finds magnitude"),
        ({"method": "lobpcg", "which": "both"}, "largest or smallest"),
        ({"k": 401}, "401 eigenpairs of an operator of size 400"),
        ({"k": 201, "which": "both"}, "402 eigenpairs"),
        ({"k": 140, "method": "lobpcg"}, "3 k = 420"),
        ({"tol": -1.0}, "tol must not be negative"),
        ({"max_products": 0}, "max_products must be at least 1"),
        ({"max_basis": 3}, "at least the pairs plus 3"),
        ({"start": torch.ones(2)}, r"shape \(400,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            eigenpairs(MATRIX, **options)
    with pytest.raises(TypeError, match="Operator or a matrix"):
        eigenpairs([[1.0]])
    with pytest.raises(ValueError, match="start vector is zero"):
        lanczos(lambda v: v, torch.zeros(3), 2)
