"""Keskar's, SAM's and ASAM's sharpness for losses with known maxima: linear, quadratic, and cross-entropy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpsim
from fpsim.curvature import functional_loss
from fpsim.sharpness import adaptive, critical, keskar, logit, sam, slice_1d

METHODS = ("lbfgsb", "pga")


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Quadratic:
    """x'Ax/2 + b'x + 1 over a tree of two pieces, with A positive definite."""

    def __init__(self, generator: torch.Generator, size: int = 6) -> None:
        root = randn(generator, size, size)
        self.a, self.b = root @ root.T + torch.eye(size), randn(generator, size)
        self.x = randn(generator, size)
        self.gradient = self.a @ self.x + self.b

    @property
    def params(self) -> dict[str, object]:
        return {"first": self.x[:2].view(2, 1), "rest": [self.x[2:]]}

    def flat(self, params) -> Tensor:
        return torch.cat([params["first"].flatten(), params["rest"][0]])

    def at(self, x: Tensor) -> Tensor:
        return x @ self.a @ x / 2 + self.b @ x + 1

    def __call__(self, params) -> Tensor:
        return self.at(self.flat(params))


@pytest.fixture
def quadratic(generator) -> Quadratic:
    return Quadratic(generator)


def positive(generator: torch.Generator) -> Quadratic:
    """A quadratic whose value at its x is positive, as Keskar's normalisation needs a loss above -1."""
    while True:
        quadratic = Quadratic(generator)
        if quadratic.at(quadratic.x) > 0:
            return quadratic


# -- SAM and ASAM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1e-3, 0.05, 2.0])
def test_sam_on_a_quadratic_is_the_textbook_formula(quadratic, rho):
    result = sam(quadratic, quadratic.params, rho=rho)
    g = quadratic.gradient
    unit = g / g.norm()
    want = rho * g.norm() + rho**2 / 2 * unit @ quadratic.a @ unit
    assert result.sharpness == pytest.approx(want.item(), rel=1e-10)
    assert result.loss == pytest.approx(quadratic.at(quadratic.x).item(), rel=1e-13)
    assert result.sharpness == result.perturbed_loss - result.loss
    assert result.gradient_norm == pytest.approx(g.norm().item(), rel=1e-13)
    assert result.predicted == pytest.approx(rho * g.norm().item(), rel=1e-13)
    torch.testing.assert_close(quadratic.flat(result.perturbation), rho * unit, rtol=1e-13, atol=1e-15)
    assert (result.evaluations, result.converged) == (3, True)


@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_asam_on_a_quadratic_is_the_textbook_formula(quadratic, eta):
    rho = 0.5
    result = sam(quadratic, quadratic.params, rho=rho, adaptive=True, eta=eta)
    scale = quadratic.x.abs() + eta
    step = rho * scale**2 * quadratic.gradient / (scale * quadratic.gradient).norm()
    want = quadratic.gradient @ step + step @ quadratic.a @ step / 2
    assert result.sharpness == pytest.approx(want.item(), rel=1e-11)
    found = quadratic.flat(result.perturbation)
    torch.testing.assert_close(found, step, rtol=1e-12, atol=0)
    assert (found / scale).norm().item() == pytest.approx(rho, rel=1e-12)  # on the boundary of its ball
    assert result.predicted == pytest.approx((quadratic.gradient @ step).item(), rel=1e-12)
    assert adaptive(quadratic, quadratic.params, eta=eta) == result


def test_asam_is_invariant_to_a_rescaling_that_preserves_the_function(generator):
    u, v = randn(generator, 5), randn(generator, 5)

    def loss(params):
        return ((params[0] * params[1] - 1) ** 2).sum()

    balanced, tilted = (u, v), (8 * u, v / 8)
    assert adaptive(loss, tilted, eta=0.0).sharpness == pytest.approx(adaptive(loss, balanced, eta=0.0).sharpness)
    assert sam(loss, tilted).sharpness != pytest.approx(sam(loss, balanced).sharpness, rel=0.1)


def test_sam_at_a_stationary_point_takes_no_step():
    result = sam(lambda x: (x**2).sum(), torch.zeros(3))
    assert (result.sharpness, result.gradient_norm, result.converged) == (0.0, 0.0, False)


def test_sam_under_rounding_steps_by_the_surrogate_and_compares_the_rounded_model(generator):
    x = torch.randn(50, generator=generator)

    def loss(x):
        return (fpsim.round(x, "e4m3fn") ** 2).sum()

    result = sam(loss, x, rho=1.0)
    step = 2 * fpsim.round(x, "e4m3fn")
    step = step / step.norm()
    torch.testing.assert_close(result.perturbation, step)
    assert result.perturbed_loss == loss(x + result.perturbation).item()
    assert result.loss == loss(x).item()


# -- Keskar ----------------------------------------------------------------------------------------------------


def corner_maximum(quadratic: Quadratic, epsilon: float) -> float:
    """A convex function has its maximum over a box at a corner."""
    bound = epsilon * (quadratic.x.abs() + 1)
    signs = itertools.product((-1.0, 1.0), repeat=len(bound))
    return max(quadratic.at(quadratic.x + bound * torch.tensor(s, dtype=torch.float64)).item() for s in signs)


@pytest.mark.parametrize("method", METHODS)
def test_keskar_of_a_linear_loss_is_the_sum_of_its_slopes(generator, method):
    slope, x = randn(generator, 20), randn(generator, 20)
    loss = 30.0 + float(slope @ x)
    want = 100 * (slope.abs() * 0.01 * (x.abs() + 1)).sum().item() / (1 + loss)
    result = keskar(lambda x: slope @ x + 30, x, epsilon=0.01, method=method)
    assert result.sharpness == pytest.approx(want, rel=1e-10)
    assert result.converged, result.message
    assert result.loss == pytest.approx(loss)
    torch.testing.assert_close(result.perturbation, 0.01 * (x.abs() + 1) * slope.sign(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [5e-5, 5e-4])
def test_keskar_of_a_convex_quadratic_is_the_best_corner(generator, method, epsilon):
    for _ in range(5):
        quadratic = positive(generator)
        maximum = corner_maximum(quadratic, epsilon)
        result = keskar(quadratic, quadratic.params, epsilon=epsilon, method=method, iterations=50)
        assert result.maximum == pytest.approx(maximum, rel=1e-12)
        assert result.sharpness == pytest.approx(100 * (maximum - result.loss) / (1 + result.loss), rel=1e-9)
        assert result.converged, result.message


@pytest.mark.parametrize("method", METHODS)
def test_keskar_is_a_lower_bound_that_its_perturbation_attains(generator, method):
    for epsilon in (0.3, 3.0):  # so large that several corners have local maxima
        quadratic = positive(generator)
        result = keskar(quadratic, quadratic.params, epsilon=epsilon, method=method)
        assert result.loss <= result.maximum <= corner_maximum(quadratic, epsilon) * (1 + 1e-12)
        y = quadratic.flat(result.perturbation)
        assert (y.abs() <= epsilon * (quadratic.x.abs() + 1) * (1 + 1e-14)).all()
        assert quadratic.at(quadratic.x + y).item() == pytest.approx(result.maximum, rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_keskar_finds_a_maximum_inside_the_box(generator, method):
    x = randn(generator, 4)
    peak = x + 0.2 * 0.1 * (x.abs() + 1)

    def loss(x):
        return 5 - ((x - peak) ** 2).sum()

    result = keskar(loss, x, epsilon=0.1, method=method, iterations=60)
    assert result.maximum == pytest.approx(5, abs=1e-6)


def test_keskar_of_cross_entropy_over_its_logits_is_the_logit_sharpness(generator):
    z, target = randn(generator, 12), torch.tensor(3)
    exact = logit(z, target, epsilon=1e-2).item()
    results = {m: keskar(lambda z: functional.cross_entropy(z, target), z, epsilon=1e-2, method=m) for m in METHODS}
    assert results["pga"].sharpness == pytest.approx(exact, rel=1e-11)
    assert results["pga"].evaluations == 3
    assert 0.5 * exact < results["lbfgsb"].sharpness <= exact * (1 + 1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_keskar_in_a_subspace_of_given_columns(generator, method):
    slope, x, columns = randn(generator, 9), randn(generator, 9), randn(generator, 3, 9)
    coordinates = np.linalg.pinv(columns.numpy().T) @ x.numpy()
    bound = 0.02 * (np.abs(coordinates) + 1)
    loss = 40 + float(slope @ x)
    want = 100 * float(np.abs(columns.numpy() @ slope.numpy()) @ bound) / (1 + loss)
    result = keskar(lambda x: slope @ x + 40, x, epsilon=0.02, method=method, subspace=list(columns))
    assert result.sharpness == pytest.approx(want, rel=1e-10)
    y = np.linalg.pinv(columns.numpy().T) @ result.perturbation.numpy()
    np.testing.assert_allclose(np.abs(y), bound, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_the_subspace_of_all_axes_is_the_full_space(generator, method):
    quadratic = positive(generator)
    want = keskar(quadratic, quadratic.params, epsilon=0.01, method=method)
    got = keskar(quadratic, quadratic.params, epsilon=0.01, method=method, subspace=list(torch.eye(6)))
    assert got.sharpness == pytest.approx(want.sharpness, rel=1e-9)
    torch.testing.assert_close(quadratic.flat(got.perturbation), quadratic.flat(want.perturbation))


def test_random_subspaces_repeat_with_the_generator(generator):
    quadratic = positive(generator)

    def measure(seed):
        seeded = torch.Generator().manual_seed(seed)
        return keskar(quadratic, quadratic.params, subspace=2, generator=seeded).sharpness

    assert measure(1) == measure(1) != measure(2)
    with pytest.raises(ValueError, match="pass generator="):
        keskar(quadratic, quadratic.params, subspace=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_stationary_point_is_reported_and_a_random_start_leaves_it(generator, method):
    def loss(x):
        return (x**2).sum()

    stuck = keskar(loss, torch.zeros(5), epsilon=0.1, method=method)
    assert (stuck.sharpness, stuck.converged, stuck.evaluations) == (0.0, False, 2)
    assert "random_start" in stuck.message
    free = keskar(loss, torch.zeros(5), epsilon=0.1, method=method, random_start=True, generator=generator)
    assert free.loss == 0
    assert free.sharpness == pytest.approx(100 * 5 * 0.01, rel=1e-6)
    assert free.converged


@pytest.mark.parametrize("method", METHODS)
def test_keskar_under_rounding_reports_a_loss_of_the_rounded_model(generator, method):
    x = torch.randn(30, generator=generator)

    def loss(x):
        return (fpsim.round(x, "e5m2") ** 2).sum()

    result = keskar(loss, x, epsilon=0.05, method=method)
    assert result.maximum == loss(x + result.perturbation).item()
    assert result.maximum > result.loss == loss(x).item()


def test_infinite_losses_end_the_search():
    result = keskar(lambda x: torch.exp(800 * x).sum(), torch.zeros(2), epsilon=1.0, method="pga")
    assert result.maximum == result.sharpness == math.inf
    assert not result.converged


# -- all measures ---------------------------------------------------------------------------------------------


def measures(loss, params):
    yield sam(loss, params)
    yield adaptive(loss, params)
    for method in METHODS:
        yield keskar(loss, params, method=method)


def test_modules_frozen_and_unused_parameters(generator):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x).tanh())

    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = (torch.randn(8, 3, generator=generator), torch.randint(0, 2, (8,), generator=generator))
    loss = functional_loss(model, functional.cross_entropy, batch=batch)
    with torch.no_grad():  # the caller's mode does not matter
        found = list(measures(loss, dict(model.named_parameters())))
    for result in found:
        assert result.sharpness > 0
        step = result.perturbation
        assert step["used.weight"].any()
        assert not any(step[name].any() for name in step if not name.startswith("used"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_bfloat16_parameters_are_moved_in_their_own_dtype(generator):
    x = torch.randn(40, generator=generator).bfloat16()

    def loss(x):
        assert x.dtype == torch.bfloat16
        return (x.float() ** 2).sum()

    assert sam(loss, x, rho=1.0).sharpness > 0
    assert all(keskar(loss, x, epsilon=0.05, method=method).sharpness > 0 for method in METHODS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: sam(f, x, rho=0.0), "rho must be a positive number, got 0.0"),
        (lambda f, x: sam(f, x, adaptive=True, eta=-1.0), "eta must not be negative, got -1.0"),
        (lambda f, x: keskar(f, x, epsilon=-1.0), "epsilon must be a positive number, got -1.0"),
        (lambda f, x: keskar(f, x, iterations=0), "iterations must be at least 1, got 0"),
        (lambda f, x: keskar(f, x, method="sgd"), "unknown method 'sgd': use one of lbfgsb, pga"),
        (lambda f, x: keskar(f, x, subspace=0), "subspace must be a number of directions, got 0"),
        (lambda f, x: keskar(f, x, subspace=[]), "subspace holds no direction"),
        (lambda f, x: keskar(f, x, subspace=[x, x[1:]]), r"subspace\[1\] must .* the shapes of params, got \(2,\)"),
        (lambda f, x: keskar(f, {"x": x}, subspace=[[x]]), r"subspace\[0\] must be a pytree like params"),
        (lambda f, x: keskar(lambda x: f(x) - 9, x), "the loss must be above -1 and finite, got -6"),
        (lambda f, x: keskar(lambda x: x, x), r"the loss must be one number, got a tensor of shape \(3,\)"),
        (lambda f, x: sam(lambda x: torch.zeros(()), x), "the loss has no gradient: compute it from the params"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda x: x.sum(), torch.ones(3))


def test_a_loss_that_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="the loss must be a tensor, got float"):
        sam(lambda x: x.sum().item(), torch.ones(3))


def test_a_loss_that_changes_from_call_to_call_has_not_converged():
    """The rise would be that of another draw of dropout."""
    x = torch.linspace(0.5, 1.5, 50, dtype=torch.float64)

    def loss(p):
        return 1 + functional.dropout(p, 0.5).square().sum()

    torch.manual_seed(0)
    for result in (sam(loss, x), adaptive(loss, x), keskar(loss, x), keskar(loss, x, method="pga"), critical(loss, x)):
        assert not result.converged and "dropout" in result.message


def test_losses_that_are_not_finite_are_errors():
    x = torch.ones(3)
    for value in (float("nan"), float("inf")):
        for measure in (sam, adaptive, keskar, critical):
            with pytest.raises(ValueError, match=str(value)):
                measure(lambda p, value=value: p.sum() * 0 + value, x)


def test_losses_that_take_derivatives_themselves():
    """The squared slope of p x^2 at 1, 4 p^2, and a penalty on the gradient with respect to p, 4 p^2 as well."""

    def slope(p):
        x = torch.ones((), dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(p.sum() * x**2, x, create_graph=True)
        return found**2

    def penalty(p):
        (found,) = torch.autograd.grad(p.square().sum(), p, create_graph=True)
        return found.square().sum()

    p = torch.tensor([3.0], dtype=torch.float64)
    for loss in (slope, penalty):
        assert sam(loss, p, rho=0.5).sharpness == pytest.approx(4 * (3.5**2 - 9), rel=1e-12)
        assert keskar(loss, p, epsilon=0.125, method="pga").maximum == pytest.approx(4 * 3.5**2, rel=1e-12)
        assert critical(loss, p, tolerance=1e-9).sharpness == pytest.approx(8.0, rel=1e-6)
        assert slice_1d(loss, p, torch.ones(1), x=[0, 1]).losses.tolist() == pytest.approx([36.0, 64.0])
