"""Traces of operators and of functions of them: the estimates are unbiased, and the standard errors are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from scipy.stats import t as student

from fpsim.curvature import Operator, function_trace, hessian, log_determinant, trace
from fpsim.curvature.results import mean_interval
from fpsim.curvature.traces import LEAST, PILOT
from fpsim.curvature.vectors import rademacher
from tests.curvature.coverage import coverage
from tests.curvature.small_models import case, dense_hessian, network_spectrum, spectrum_matrix

VALUES = network_spectrum(120)
MATRIX = spectrum_matrix(VALUES)
TRACE = float(MATRIX.trace())


def seeds(count: int):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_within_three_standard_errors_in_99_of_100_seeds(method, probe):
    results = [
        trace(MATRIX, method=method, probe=probe, tol=0, max_products=150, sketch=20, generator=g) for g in seeds(100)
    ]
    assert all(r.products == 150 for r in results)
    assert sum(abs(r.estimate - TRACE) <= 3 * r.stderr for r in results) >= 99
    mean = sum(r.estimate for r in results) / 100
    spread = torch.tensor([r.estimate for r in results]).std()
    assert abs(mean - TRACE) <= 3 * float(spread) / 10
    stated = sum(r.stderr for r in results) / 100
    assert 0.75 < stated / float(spread) < 1.33


def test_hutch_plus_plus_is_better_where_few_eigenvalues_dominate():
    def error(method):
        results = [trace(MATRIX, method=method, tol=0, max_products=60, generator=g) for g in seeds(30)]
        return sum((r.estimate - TRACE) ** 2 for r in results) ** 0.5

    assert error("hutch++") < 0.6 * error("hutchinson")


def test_adaptive_stop_at_the_tolerance():
    loose, tight = (trace(MATRIX, tol=tol, max_products=2000) for tol in (0.1, 0.01))
    assert loose.converged and tight.converged and loose.products < tight.products
    assert tight.stderr <= 0.01 * abs(tight.estimate)
    assert abs(tight.estimate - TRACE) <= 4 * tight.stderr
    assert not trace(MATRIX, method="hutchinson", tol=1e-6, max_products=30).converged


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_a_sketch_of_full_rank_is_exact(size, seed):
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = matrix + matrix.T
    result = trace(matrix, sketch=size, max_products=100)
    assert abs(result.estimate - float(matrix.trace())) < 1e-10
    assert result.stderr == 0 and result.converged and result.products == size


def test_signs_are_exact_on_a_diagonal_matrix():
    result = trace(torch.diag(VALUES), method="hutchinson", max_products=12)
    assert abs(result.estimate - float(VALUES.sum())) < 1e-9 and result.stderr < 1e-9 and result.products == 12
    again = trace(torch.diag(VALUES), method="hutchinson")
    assert again.stderr < 1e-9 and again.products == PILOT + LEAST == 40 and len(again.samples) == LEAST


def test_trace_of_a_network():
    small = case("layer norm")
    want = float(dense_hessian(small.loss, small.params).trace())
    result = trace(hessian(small.loss, small.params), tol=0.01, max_products=1500)
    assert abs(result.estimate - want) <= 4 * result.stderr


@pytest.mark.parametrize(
    ("spectrum", "estimate", "seeds", "least"),
    [
        ("network", "hutchinson, loose", 150, 0.90),
        ("one dominates", "hutchinson, loose", 150, 0.90),
        ("network", "hutch++, small sketch", 150, 0.90),
        ("flat", "function", 40, 0.85),
        ("one dominates", "density, more probes", 40, 0.85),
    ],
)
def test_intervals_contain_the_trace_as_often_as_they_say(spectrum, estimate, seeds, least):
    """The part of seeds whose intervals of 95 % contain the trace is above ``least`` with a probability of 0.99.

    `python -m tests.curvature.coverage` takes more seeds. With a stop as soon as the error looked small, the part was
    0.88.
    """
    inside, near, _, _ = coverage(spectrum, estimate, seeds)
    assert inside > least
    assert near > least - 0.04  # 1.96 standard errors leave out Student's quantile and skewness


def test_the_number_of_probes_does_not_depend_on_the_probes_that_count():
    """The estimate is the mean of the probes after the pilot, redrawn here from the same generator."""
    result = trace(MATRIX, method="hutchinson", tol=0.2, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    draws = [rademacher(len(VALUES), torch.float64, torch.device("cpu"), generator) for _ in range(result.products)]
    samples = torch.stack([z @ MATRIX @ z for z in draws])
    torch.testing.assert_close(result.samples, samples[PILOT:])
    variance = float(samples[:PILOT].var())
    planned = 9 / chi2.ppf(0.1, 9) * variance / (0.2 * float(samples[:PILOT].mean())) ** 2
    assert max(LEAST, planned * 0.999) <= len(result.samples) <= max(LEAST, planned * 1.001 + 1)


def test_an_interval_is_that_of_student_or_wider():
    generator = torch.Generator().manual_seed(0)
    symmetric = torch.randn(8, dtype=torch.float64, generator=generator)
    symmetric = torch.cat([symmetric, -symmetric]) + 3
    for level in (0.8, 0.95):
        want = student.interval(level, 15, loc=3, scale=float(symmetric.std()) / 4)
        torch.testing.assert_close(torch.stack(mean_interval(symmetric, level)), torch.tensor(want).double())
    skewed = torch.cat([torch.zeros(15), torch.ones(1)]).double()
    low, high = student.interval(0.95, 15, loc=1 / 16, scale=float(skewed.std()) / 4)
    found = mean_interval(torch.stack([skewed, -skewed], dim=1), 0.95)
    assert float(found[0][0]) == pytest.approx(low) and float(found[1][0]) > 1.2 * high
    assert float(found[1][1]) == pytest.approx(-low) and float(found[0][1]) < -1.2 * high
    one = mean_interval(torch.ones(1).double(), 0.95)
    assert [float(end) for end in one] == [-float("inf"), float("inf")]
    assert [float(end) for end in mean_interval(torch.ones(5).double(), 0.95)] == [1.0, 1.0]
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        mean_interval(symmetric, 95)


def test_intervals_of_exact_traces_are_points_and_quadrature_errors_widen():
    exact = trace(MATRIX, sketch=len(VALUES), max_products=240)
    assert exact.interval() == (exact.estimate, exact.estimate)
    rough = function_trace(MATRIX, torch.exp, steps=3, max_probes=5)
    low, high = mean_interval(rough.samples, 0.95)
    assert rough.interval() == (float(low) - rough.quadrature_error, float(high) + rough.quadrature_error)


@pytest.mark.parametrize("function", [torch.exp, torch.square, torch.sin], ids=lambda f: f.__name__)
def test_traces_of_functions(function):
    want = float(function(VALUES).sum())
    result = function_trace(MATRIX, function, tol=0.01, max_probes=400, steps=20)
    assert abs(result.estimate - want) <= 4 * result.stderr + result.quadrature_error + 1e-9
    assert result.products == 20 * (PILOT + len(result.samples))


def test_log_determinant_of_a_shifted_hessian():
    shift = 2.0
    want = float(torch.log(VALUES + shift).sum())
    result = log_determinant(MATRIX, shift=shift, tol=0.01, max_probes=200)
    assert result.converged and abs(result.estimate - want) <= 4 * result.stderr + result.quadrature_error
    with pytest.raises(ValueError, match=r"eigenvalues, but there is one near -1\.2.*use a shift above 1\.2"):
        log_determinant(MATRIX)


def test_quadrature_error_shows_too_few_steps():
    spread = torch.logspace(-3, 0, 300, dtype=torch.float64)
    few, many = (log_determinant(torch.diag(spread), steps=steps, max_probes=10) for steps in (4, 60))
    want = float(spread.log().sum())
    assert few.quadrature_error > 10 * many.quadrature_error
    assert abs(many.estimate - want) <= 4 * many.stderr + 2 * many.quadrature_error


def test_functions_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="not finite at"):
        function_trace(MATRIX, torch.sqrt)


def test_traces_are_linear_in_the_operator():
    operator = Operator.of_matrix(MATRIX)
    a, b = (trace(x, method="hutchinson", tol=0, max_products=20) for x in (operator, -2 * operator + 1))
    assert abs(b.estimate - (-2 * a.estimate + len(VALUES))) < 1e-9


def test_impossible_choices_are_errors():
    for options, message in (
        ({"method": "xtrace"}, "unknown method 'xtrace'"),
        ({"probe": "sphere"}, "unknown probe 'sphere'"),
        ({"tol": float("nan")}, "tol must not be negative"),
        ({"sketch": 50, "max_products": 90}, "at least 102 products"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(MATRIX, **options)
    with pytest.raises(ValueError, match="at least 1"):
        function_trace(MATRIX, torch.exp, steps=0)
