"""Critical sharpness: for quadratics it is d'Hd / d'g, and the search brackets it with few evaluations."""

from __future__ import annotations

import math

import pytest
import torch

import fpsim
from fpsim.sharpness import critical


@pytest.fixture
def quadratic(generator):
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    a, x = root @ root.T, torch.randn(7, generator=generator, dtype=torch.float64)
    return lambda x: x @ a @ x / 2, x, a


def test_along_the_gradient_it_is_the_weighted_mean_of_eigenvalues(quadratic):
    loss, x, a = quadratic
    gradient = a @ x
    want = (gradient @ a @ gradient / (gradient @ gradient)).item()
    result = critical(loss, x, tolerance=1e-9)
    assert result.sharpness == pytest.approx(want, rel=1e-8)
    assert result.converged
    assert result.loss == loss(x).item()
    assert want <= torch.linalg.eigvalsh(a).max()
    values, vectors = torch.linalg.eigh(a)  # along an eigenvector it is the eigenvalue
    assert critical(loss, vectors[:, -1], tolerance=1e-9).sharpness == pytest.approx(values[-1].item(), rel=1e-8)


@pytest.mark.parametrize("initial", [1e-6, 0.1, 1.0, 1e5])
@pytest.mark.parametrize("tolerance", [1 / 16, 1e-3])
def test_the_bracket_holds_the_answer_from_every_start(quadratic, generator, initial, tolerance):
    loss, x, a = quadratic
    direction = a @ x + 0.1 * torch.randn(7, generator=generator, dtype=torch.float64)
    want = (direction @ a @ direction / (direction @ a @ x)).item()
    result = critical(loss, x, direction, initial=initial, tolerance=tolerance)
    assert result.converged
    assert 1 - result.lower / result.upper <= tolerance
    low, high = result.bounds
    assert low <= want <= high
    assert low <= result.sharpness <= high
    assert result.lower_loss < result.loss
    assert result.learning_rate == pytest.approx(2 / result.sharpness)


def test_a_good_guess_needs_few_evaluations(quadratic):
    loss, x, _ = quadratic
    rate = critical(loss, x).learning_rate
    calls = []

    def counted(x):
        calls.append(x)
        return loss(x)

    result = critical(counted, x, initial=0.9 * rate)
    assert result.evaluations == len(calls) <= 8  # two at the parameters, one at twice the guess, and one per bisection


def test_a_shorter_direction_allows_a_longer_rate(quadratic):
    loss, x, a = quadratic
    unit, tenth = (critical(loss, x, scale * (a @ x), tolerance=1e-9) for scale in (1.0, 0.1))
    assert tenth.learning_rate == pytest.approx(10 * unit.learning_rate, rel=1e-8)


def test_a_loss_that_never_rises_has_no_critical_rate():
    result = critical(lambda x: x.sum(), torch.zeros(3), torch.ones(3), max_evaluations=20)
    assert (result.learning_rate, result.sharpness, result.upper) == (math.inf, 0.0, math.inf)
    assert (result.evaluations, result.converged) == (20, False)
    assert result.bounds == (0.0, 2 / result.lower)


def test_a_direction_uphill_has_none_either():
    result = critical(lambda x: x.sum(), torch.zeros(3), -torch.ones(3), max_evaluations=20)
    assert (result.learning_rate, result.sharpness, result.lower) == (0.0, math.inf, 0.0)
    assert not result.converged
    assert result.bounds == (2 / result.upper, math.inf)


def test_a_loss_that_is_not_a_number_counts_as_a_rise():
    result = critical(lambda x: -torch.sqrt(x).sum() + x.sum(), torch.ones(2) * 4, torch.ones(2), tolerance=1e-6)
    assert result.upper == pytest.approx(4, rel=1e-5)


def test_another_loss_gives_the_relative_sharpness(quadratic):
    loss, x, a = quadratic
    direction = 2 * x  # the gradient of |x|^2
    want = (direction @ a @ direction / (direction @ a @ x)).item()
    assert critical(loss, x, direction, tolerance=1e-9).sharpness == pytest.approx(want, rel=1e-8)


def test_under_rounding_it_is_the_rounded_models_own():
    def loss(x):
        return (fpsim.round(x, "e4m3fn") ** 2).sum()

    result = critical(loss, torch.tensor([1.0]), torch.tensor([1.0]), tolerance=1e-6)
    # 1 - rate rounds to -1 until it passes the middle of -1 and -1.125.
    assert result.upper == pytest.approx(2.0625, rel=1e-5)
    assert result.lower_loss == result.loss


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"initial": 0.0}, "initial must be a positive number, got 0.0"),
        ({"tolerance": 1.0}, "tolerance must lie between 0 and 1, got 1.0"),
        ({"max_evaluations": 2}, "max_evaluations must be at least 3, got 2"),
        ({"direction": torch.zeros(3)}, "the direction is zero"),
        (
            {"direction": torch.ones(2)},
            r"direction must have the shapes of params, got \(2,\)",
        ),
        ({"params": torch.tensor([math.nan, 0, 0])}, "the loss at params is nan"),
        ({"params": torch.zeros(3)}, "the direction is zero: at a stationary point, pass a direction"),
    ],
)
def test_errors_name_the_value_and_the_remedy(keywords, message):
    with pytest.raises(ValueError, match=message):
        critical(**{"loss": lambda x: (x**2).sum(), "params": torch.ones(3), **keywords})
