"""A result has converged only if its operator is the symmetric matrix of one function; if not, it says why.

A loss that is not finite is an error. Losses that take derivatives themselves work in the modes that can.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.loss import MSELoss
from torch.utils.data import DataLoader, TensorDataset

from fpsim.curvature import (
    CrossEntropy,
    CurvatureError,
    Operator,
    check_determinism,
    cross_entropy,
    density,
    eigenpairs,
    empirical_fisher,
    function_trace,
    functional_loss,
    functional_outputs,
    gauss_newton,
    hessian,
    layout,
    trace,
)
from fpsim.curvature.products import MODES
from tests.curvature.small_models import case, dense_hessian, network_spectrum, relative, spectrum_matrix, token_loss

#: Every algorithm, as a function of an operator.
ALGORITHMS = {
    "lanczos": eigenpairs,
    "both ends": lambda a: eigenpairs(a, which="both"),
    "lobpcg": lambda a: eigenpairs(a, method="lobpcg"),
    "power": lambda a: eigenpairs(a, method="power", which="magnitude", tol=0.1),
    "hutchinson": lambda a: trace(a, method="hutchinson", tol=10),
    "hutch++": lambda a: trace(a, tol=10),
    "exact trace": lambda a: trace(a, sketch=a.size, max_products=2 * a.size),
    "function": lambda a: function_trace(a, torch.exp, tol=10),
    "density": lambda a: density(a, tol=10),
    "density without reorthogonalisation": lambda a: density(a, tol=10, reorthogonalise=False),
}
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


@algorithms
def test_a_matrix_that_is_not_symmetric_has_not_converged(algorithm):
    matrix = spectrum_matrix(network_spectrum(60))
    skew = torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    good = ALGORITHMS[algorithm](Operator.of_matrix(matrix))
    assert good.converged and good.reasons == ()
    bad = ALGORITHMS[algorithm](Operator.of_matrix(matrix + 0.02 * (skew - skew.T)))
    assert not bad.converged and "not symmetric" in " ".join(bad.reasons)


def dropout_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
        return model, torch.randn(8, 4).double(), torch.randn(8, 3).double()


@algorithms
def test_dropout_has_not_converged(algorithm):
    """The graph is kept, so every product is one with the same matrix; it belongs to one draw of many."""
    model, x, y = dropout_network()
    operator = hessian(functional_loss(model, functional.mse_loss, batch=(x, y)), dict(model.named_parameters()))
    torch.manual_seed(0)
    result = ALGORITHMS[algorithm](operator)
    assert not result.converged and "dropout" in result.reasons[-1] and "model.eval()" in result.reasons[-1]
    model.eval()
    operator = hessian(functional_loss(model, functional.mse_loss, batch=(x, y)), dict(model.named_parameters()))
    assert "dropout" not in " ".join(ALGORITHMS[algorithm](operator).reasons)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_seen_in_every_mode_and_with_several_batches(mode):
    model, x, y = dropout_network()
    params = dict(model.named_parameters())
    torch.manual_seed(0)
    one = hessian(functional_loss(model, functional.mse_loss, batch=(x, y)), params, mode=mode)
    several = hessian(
        functional_loss(model, functional.mse_loss),
        params,
        batches=[(x[:5], y[:5]), (x[5:], y[5:])],
        weight=lambda batch: len(batch[0]),
        mode=mode,
    )
    for operator in (one, several):
        assert any("dropout" in reason for reason in eigenpairs(operator, max_products=3).reasons)


def test_dropout_is_seen_by_gauss_newton_and_fisher_and_in_sums():
    model, x, y = dropout_network()
    params = dict(model.named_parameters())
    torch.manual_seed(0)
    outputs = functional_outputs(model, batch=x)
    fisher = empirical_fisher(lambda p: (outputs(p) - y).square().sum(1), params)
    for operator in (
        gauss_newton(outputs, "squared", params),
        fisher,
        2 * fisher + 1 - fisher.block("*.bias").layout.size,
    ):
        assert any("dropout" in reason for reason in eigenpairs(operator).reasons)
    still = hessian(lambda p: p["0.weight"].square().sum(), params)
    assert any("dropout" in reason for reason in eigenpairs(still + fisher).reasons)


def test_a_shuffled_loader_has_not_converged():
    small = case("gelu")
    loss = functional_loss(small.model, token_loss)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*torch.randint(0, 5, (2, 12, 6), generator=generator))
    torch.manual_seed(0)
    for shuffle in (True, False):
        loader = DataLoader(data, batch_size=5, shuffle=shuffle)
        for keep in (False, True):
            operator = hessian(loss, small.params, batches=loader, weight=lambda b: len(b[0]), keep=keep)
            result = eigenpairs(operator, tol=0.05)
            assert result.converged != shuffle
            assert any("shuffle" in reason for reason in result.reasons) == shuffle


def test_a_loss_with_a_state_has_not_converged():
    calls = []

    def loss(params):
        calls.append(0)
        return params["x"].pow(2).sum() * len(calls)

    assert "keeps a state" in eigenpairs(hessian(loss, {"x": torch.ones(3)})).reasons[-1]


def test_a_limit_on_products_is_a_reason():
    (reason,) = eigenpairs(spectrum_matrix(network_spectrum(60)), max_products=3).reasons
    assert "after 3 products" in reason and "raise max_products" in reason


INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
IGNORED = torch.full((6,), -100)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(mode, value):
    """The curvature of the mean over no labels would be zero in every direction."""
    model = nn.Linear(4, 5)
    params = dict(model.named_parameters())
    ignored = functional_loss(model, functional.cross_entropy, batch=(INPUTS, IGNORED))
    for loss in (ignored, lambda p: ignored(p).nan_to_num() + value):
        with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf)"):
            hessian(loss, params, mode=mode) @ torch.ones(25)


@algorithms
def test_a_nan_loss_is_an_error_in_every_algorithm(algorithm):
    model = nn.Linear(4, 5)
    loss = functional_loss(model, functional.cross_entropy, batch=(INPUTS, IGNORED))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        ALGORITHMS[algorithm](hessian(loss, dict(model.named_parameters())))


def test_a_nan_loss_is_an_error_elsewhere():
    model = nn.Linear(4, 5)
    params = dict(model.named_parameters())
    outputs, broken = (functional_outputs(model, batch=x) for x in (INPUTS, INPUTS * float("nan")))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        check_determinism(functional_loss(model, cross_entropy, batch=(INPUTS, IGNORED)), params)
    for mode in ("reverse", "forward"):
        for function, loss, message in (
            (outputs, CrossEntropy(IGNORED), "all targets are -100"),
            (outputs, lambda z: functional.cross_entropy(z, IGNORED), "the loss is nan"),
            (broken, "squared", "the outputs have nan"),
        ):
            with pytest.raises(FloatingPointError, match=message):
                gauss_newton(function, loss, params, mode=mode) @ torch.ones(25)
        with pytest.raises(FloatingPointError, match="the outputs have nan"):
            empirical_fisher(lambda p: broken(p).sum(1), params, mode=mode) @ torch.ones(25)
        with pytest.raises(ValueError, match="the outputs are empty"):
            empirical_fisher(lambda p: outputs(p)[:0], params, mode=mode) @ torch.ones(25)


def targets_with(value: int) -> torch.Tensor:
    targets = torch.zeros(len(INPUTS), dtype=torch.int64)
    targets[1] = value
    return targets


WRONG_TARGETS = {
    "too large": (
        targets_with(5),
        IndexError,
        "target 5 is no class of logits with 5 classes: pass targets from 0 to 4",
    ),
    "negative": (targets_with(-1), IndexError, "target -1 is no class of logits with 5 classes"),
    "fractions": (targets_with(1).float(), TypeError, "targets must be int64, got torch.float32"),
    "nan": (torch.full((len(INPUTS),), float("nan")), TypeError, "targets must be int64, got torch.float32"),
    "int32": (targets_with(1).int(), TypeError, "targets must be int64, got torch.int32"),
}


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_wrong_targets_are_errors_although_the_hessian_of_cross_entropy_lacks_them(name, mode):
    targets, kind, message = WRONG_TARGETS[name]
    model = nn.Linear(4, 5)
    outputs, params = functional_outputs(model, batch=INPUTS), dict(model.named_parameters())
    with pytest.raises(kind, match=message):
        gauss_newton(outputs, CrossEntropy(targets), params, mode=mode) @ torch.ones(25)
    with pytest.raises((IndexError, RuntimeError)) as error:  # torch's own, which names no mode
        gauss_newton(outputs, lambda z: functional.cross_entropy(z, targets), params, mode=mode) @ torch.ones(25)
    assert "mode=" not in str(error.value)


def test_targets_that_do_not_count_need_be_no_class():
    model = nn.Linear(4, 5)
    outputs, params, v = functional_outputs(model, batch=INPUTS), dict(model.named_parameters()), torch.ones(25)
    targets = targets_with(7)
    closed = gauss_newton(outputs, CrossEntropy(targets, ignore_index=7), params) @ v
    by_torch = gauss_newton(outputs, lambda z: functional.cross_entropy(z, targets, ignore_index=7), params) @ v
    torch.testing.assert_close(closed, by_torch)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_an_error_of_the_loss_itself_is_not_taken_for_one_of_the_mode(mode):
    model = nn.Linear(4, 5)
    outputs, params = functional_outputs(model, batch=INPUTS), dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"Class values must be smaller than num_classes\.$"):
        gauss_newton(
            outputs, lambda z: (z - functional.one_hot(targets_with(9), 5)).square().mean(), params, mode=mode
        ) @ torch.ones(25)


def test_losses_that_are_no_functions_of_the_parameters_are_errors():
    model = nn.Linear(2, 1)
    params = {"x": torch.ones(2)}
    for loss in (lambda p: torch.ones(()), lambda p: model(torch.ones(2)).sum(), lambda p: p["x"].detach().sum()):
        for mode in MODES:
            with pytest.raises(ValueError, match="does not depend on the params"):
                hessian(loss, params, mode=mode) @ torch.ones(2)
    with pytest.raises(TypeError, match=r"real floating-point tensor, got torch\.complex64"):
        hessian(lambda p: p["x"].sum() * 1j, params) @ torch.ones(2)
    with pytest.raises(TypeError, match=r"real floating-point tensor, got torch\.int64"):
        gauss_newton(lambda p: p["x"].long(), "squared", params) @ torch.ones(2)


class Empty:
    """A loader without a length and without batches."""

    def __iter__(self):
        return iter(())


def test_a_loader_without_batches_is_an_error_everywhere():
    arguments = (lambda p, b: (p["x"] * b).sum(), {"x": torch.ones(2)})
    for mode in MODES:
        with pytest.raises(ValueError, match="there is no data"):
            hessian(*arguments, batches=Empty(), weight="equal", mode=mode) @ torch.ones(2)
    with pytest.raises(ValueError, match="there is no data"):
        check_determinism(*arguments, batches=Empty(), weight="equal")


@pytest.mark.parametrize("select", [[], (), set(), {}])
def test_an_empty_selection_is_an_error(select):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    operator = hessian(lambda p: p["a"].square().sum(), params)
    for choose in (
        lambda: layout(params, select=select),
        lambda: hessian(lambda p: p["a"].sum(), params, select=select),
        lambda: operator.block(select),
        lambda: operator.layout.mask(select),
    ):
        with pytest.raises(ValueError, match="select is empty"):
            choose()


SITES = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)


def residual(derivative):
    """The loss of a physics-informed network for u'' + u = sin x, where ``derivative`` differentiates u at x."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Softplus(), nn.Linear(4, 1)).double()

    def loss(params):
        second, u, x = derivative(lambda x: torch.func.functional_call(net, params, (x,)))
        return ((second + u - torch.sin(x)) ** 2).mean()

    return loss, dict(net.named_parameters())


def by_autograd(u):
    x = SITES.detach().requires_grad_()
    value = u(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return second, value, x


LEAF = SITES.clone().requires_grad_()


def by_autograd_at_a_leaf_from_outside(u):
    """With ``allow_unused``, torch.func silently takes this derivative as zero."""
    value = u(LEAF)
    (first,) = torch.autograd.grad(value.sum(), LEAF, create_graph=True, allow_unused=True, materialize_grads=True)
    return first, value, LEAF.detach()


def by_backward(u):
    x = SITES.detach().requires_grad_()
    value = u(x)
    value.sum().backward(create_graph=True)
    return x.grad, value, x.detach()


def by_torch_func(u):
    def at(x):
        return u(x.view(1, 1)).view(())

    second = torch.func.vmap(torch.func.grad(torch.func.grad(at)))(SITES.view(-1))
    return second.unsqueeze(1), u(SITES), SITES


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    "derivative",
    [by_autograd, by_autograd_at_a_leaf_from_outside, by_backward, by_torch_func],
    ids=lambda f: f.__name__,
)
def test_losses_that_take_derivatives_themselves(derivative):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss, params = residual(derivative)
    want = dense_hessian(loss, params)
    right = MODES if derivative is by_torch_func else ("double_backward", "finite_difference")
    for mode in MODES:
        operator = hessian(loss, params, mode=mode)
        if mode in right:
            assert relative(operator.to_dense(), want) <= (1e-6 if mode == "finite_difference" else 1e-12)
        else:
            with pytest.raises(CurvatureError, match=r"mode='double_backward'.*torch\.func\.grad"):
                operator.to_dense()


def test_a_penalty_on_the_gradient_works_in_every_mode():
    params = {"x": torch.linspace(0.5, 1.5, 3, dtype=torch.float64)}

    def loss(p):
        (gradient,) = torch.autograd.grad(p["x"].pow(3).sum(), p["x"], create_graph=True)
        return gradient.square().sum()  # 9 x^4

    for mode in MODES:
        torch.testing.assert_close(hessian(loss, params, mode=mode) @ torch.ones(3), 108 * params["x"] ** 2)


def test_an_inner_derivative_without_a_graph_is_named():
    params = {"x": torch.ones(3)}

    def loss(p):
        value = p["x"].pow(3).sum()
        (gradient,) = torch.autograd.grad(value, p["x"])
        return (gradient * p["x"]).sum() + value

    with pytest.raises(CurvatureError, match="create_graph=True"):
        hessian(loss, params, mode="double_backward") @ torch.ones(3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_error_works_in_forward_mode(reduction):
    model, x, y = dropout_network()
    model.eval()
    loss = functional_loss(model, MSELoss(reduction=reduction), batch=(x, y))
    params = dict(model.named_parameters())
    want = dense_hessian(loss, params)
    vector = torch.randn(len(want), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(hessian(loss, params, mode="forward") @ vector, want @ vector) <= 1e-12


def test_what_forward_mode_cannot_do_is_an_error_that_names_reverse():
    params = {"x": torch.linspace(0.5, 1.5, 3)}
    for loss in (
        lambda p: functional.huber_loss(p["x"], torch.zeros(3)),
        lambda p: torch.tensor_split(p["x"].pow(3), torch.tensor([1]))[1].sum(),
        lambda p: torch.index_reduce(p["x"], 0, torch.tensor([0, 1]), p["x"][:2] ** 2, "mean").pow(2).sum(),
    ):
        with pytest.raises(CurvatureError, match=r"mode='(reverse|double_backward)'"):
            hessian(loss, params, mode="forward") @ torch.ones(3)


def test_an_error_of_the_loss_itself_stays_as_it_is():
    for mode in MODES:
        with pytest.raises(RuntimeError, match=r"size|shape") as caught:
            hessian(lambda p: (p["x"] @ torch.ones(4)).sum(), {"x": torch.ones(3)}, mode=mode) @ torch.ones(3)
        assert not isinstance(caught.value, CurvatureError)
