"""Operators whose second derivative torch computes wrong are replaced or refused; `double_backward` finds them."""

from __future__ import annotations

import warnings
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fpsim.curvature import CurvatureError, eigenpairs, functional_loss, gauss_newton, hessian, trace
from fpsim.curvature.second_derivatives import WRONG
from tests.curvature.double_backward import (
    Sample,
    judged,
    module_samples,
    more_samples,
    operator_samples,
    product,
    scalar,
    sweep,
)
from tests.curvature.small_models import dense_hessian, relative

EXACT = ("reverse", "forward", "double_backward")
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(1))


def weight_norm(kind, layer, dim):
    if kind == "parametrization":
        return parametrizations.weight_norm(layer, dim=dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def normalised_network(kind, dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(weight_norm(kind, nn.Linear(4, 5), dim), nn.Tanh(), nn.Linear(5, 3)).double()


def by_hand(params, dim):
    """The loss of `normalised_network` with the weight written out: g v / |v|."""
    g, v = (next(value for name, value in params.items() if name.endswith(ends)) for ends in NAMES)
    lengths = v.square().sum() if dim is None else v.square().sum(dim=1 - dim, keepdim=True)
    hidden = torch.tanh(functional.linear(X, g * v / lengths.sqrt(), params["0.bias"]))
    return functional.cross_entropy(functional.linear(hidden, params["2.weight"], params["2.bias"]), Y)


#: The endings of the names of g and v, in either kind.
NAMES = (("original0", "weight_g"), ("original1", "weight_v"))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_hessian_through_weight_norm_is_that_of_the_weight_written_out(kind, dim):
    model = normalised_network(kind, dim)
    params = dict(model.named_parameters())
    loss = functional_loss(model, functional.cross_entropy, batch=(X, Y))
    want = dense_hessian(lambda p: by_hand(p, dim), params)
    for mode in EXACT:
        assert relative(hessian(loss, params, mode=mode).to_dense(), want) <= 1e-13
    top = eigenpairs(hessian(loss, params), tol=1e-8)
    assert top.converged and abs(float(top.eigenvalues[0]) - float(torch.linalg.eigvalsh(want)[-1])) <= 1e-10
    exact = trace(hessian(loss, params), sketch=len(want), max_products=100)
    assert exact.converged and abs(exact.estimate - float(want.trace())) <= 1e-12


def test_hessian_through_weight_norm_under_a_policy_is_that_of_rounded_weights_written_out():
    """The format keeps every bit of float32, so the traced graph computes the loss without a policy."""
    model = normalised_network("parametrization", 0).float()
    params = dict(model.named_parameters())
    loss = functional_loss(model, functional.cross_entropy, batch=(X.float(), Y), policy={"format": "e8m23"})
    doubles = {name: value.detach().double() for name, value in params.items()}
    want = dense_hessian(lambda p: by_hand(p, 0), doubles)
    for mode in EXACT:
        assert relative(hessian(loss, params, mode=mode).to_dense().double(), want) <= 1e-5


def test_a_module_keeps_the_weight_that_a_hook_set():
    model = normalised_network("hook", 0)
    weight = model[0].weight
    hessian(functional_loss(model, functional.cross_entropy, batch=(X, Y)), dict(model.named_parameters())).to_dense()
    assert model[0].weight is weight


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


#: For each entry of the table a sample that torch differentiates wrong, by its node.
EXAMPLES = {
    "WeightNormInterfaceBackward": Sample(lambda v, g: torch._weight_norm(v, g, 0), (X[:3], X[3:, :1])),
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy": Sample(
        lambda x, w: functional.linear_cross_entropy(x, w, Y, options=chunks()), (X, X[:3] / 2)
    ),
    "IndexReduceBackward": Sample(
        lambda x, y: torch.index_reduce(x, 0, torch.tensor([0, 0, 1]), y, "prod"), (zeros(2), zeros(3))
    ),
    "ScatterReduceBackward": Sample(
        lambda x, y: torch.scatter_reduce(x, 0, torch.tensor([0, 0, 1]), y, "prod"), (X[0, :3], X[1, :3])
    ),
    "LogcumsumexpBackward": Sample(
        lambda x: torch.logcumsumexp(x, 0), (torch.tensor([0.0, 1e4, 1e4, 0.0], dtype=torch.float64),)
    ),
    "CholeskyInverseBackward": Sample(
        lambda x: torch.cholesky_inverse(x.tril()), (torch.full((3, 3), 0.5) + 2 * torch.eye(3).double(),)
    ),
    "TriangularSolveBackward": Sample(
        lambda b, a: torch.triangular_solve(b, a).solution, (X[:3, :2], X[3:, :3] + 3 * torch.eye(3))
    ),
    "SincBackward": Sample(torch.sinc, (zeros(3),)),
    "LinalgDetBackward": Sample(torch.linalg.det, (zeros(1, 1),)),
}


def chunks():
    """Options of linear_cross_entropy, which torch has from 2.13 on."""
    return pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions()


def test_every_entry_has_an_example():
    assert {entry.node for entry in WRONG} == set(EXAMPLES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", WRONG, ids=lambda entry: entry.operator)
def test_what_torch_differentiates_wrong_is_right_or_refused(entry):
    """If torch alone is right here in another version, delete the entry."""
    function, point = scalar(EXAMPLES[entry.node])
    vector = torch.randn(len(point), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    want = judged(function, point, vector)
    assert want is not None
    seen = []
    for mode in set(entry.modes) & set(EXACT):
        try:
            seen.append(relative(product(mode, function, point, vector), want))
        except (RuntimeError, NotImplementedError):
            seen.append(float("nan"))
        try:
            got = hessian(function, point, mode=mode) @ vector
        except CurvatureError as error:
            assert entry.operator in str(error) and "finite_difference" in str(error)
        else:
            assert relative(got, want) <= 1e-7
    assert any(not error <= 1e-4 for error in seen), seen
    approximate = hessian(function, point, mode="finite_difference") @ vector
    assert relative(approximate, want) <= 1e-3


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_gauss_newton_matrix_of_a_determinant_is_refused_at_singular_matrices_alone(mode):
    """The derivative of a determinant is the transposed adjugate."""
    adjugate = torch.tensor([5.0, -2, -2, 1], dtype=torch.float64)

    def outputs(p):
        return torch.linalg.det(p["x"]).reshape(1)

    vector = torch.tensor([1.0, 0, 2, 3], dtype=torch.float64)
    params = {"x": torch.tensor([[1.0, 2], [2, 5]], dtype=torch.float64)}
    got = gauss_newton(outputs, "squared", params, mode=mode) @ vector
    torch.testing.assert_close(got, adjugate * (adjugate @ vector))
    params["x"][1, 1] = 4
    with pytest.raises(CurvatureError, match=r"linalg\.det, .*zero at singular matrices.*hessian with mode='reverse'"):
        gauss_newton(outputs, "squared", params, mode=mode) @ vector


def test_scripted_weight_norm_is_refused():
    """No Python sees its operators, so nothing replaces them; the graph of autograd shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(_scripted)
    params = {"v": X[:3], "g": X[:3, :1]}
    for mode in EXACT:
        with pytest.raises(CurvatureError, match=r"_weight_norm_interface.*takes the norms as constants"):
            hessian(lambda p: scripted(p["v"], p["g"]).pow(3).sum(), params, mode=mode) @ torch.ones(15)


def _scripted(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch._weight_norm(v, g, 0)


class Stored(torch.autograd.Function):
    """The sum of cubes, with a gradient that the forward pass computes, so that the backward is a constant."""

    @staticmethod
    def forward(x):
        return (x**3).sum(), 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return g * ctx.saved_tensors[0]


class Cubes(Stored):
    """The sum of cubes, with a backward that can be differentiated."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return g * 3 * ctx.saved_tensors[0] ** 2


class Rounded(torch.autograd.Function):
    """Rounding to integers with the derivative of the identity."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["reverse", "double_backward"])
def test_custom_functions_are_compared_with_differences(mode, dtype):
    params = {"x": torch.linspace(0.5, 1.5, 4, dtype=dtype)}
    with pytest.raises(CurvatureError, match=r"wrong in mode=.*StoredBackward"):
        hessian(lambda p: Stored.apply(p["x"])[0] + p["x"].square().sum(), params, mode=mode) @ torch.ones(4)
    right = hessian(lambda p: Cubes.apply(p["x"])[0], params, mode=mode) @ torch.ones(4)
    torch.testing.assert_close(right, 6 * params["x"])
    surrogate = hessian(lambda p: Rounded.apply(3 * p["x"]).square().sum(), params, mode=mode) @ torch.ones(4)
    assert torch.equal(surrogate, torch.full((4,), 18.0, dtype=dtype))


SOURCES = {"more": more_samples, "operators": operator_samples, "modules": module_samples}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", SOURCES)
def test_sampled_operators_are_right_or_refused(source):
    """Every sixtieth operator of torch.testing; `python -m tests.curvature.double_backward` goes through all."""
    chosen = SOURCES[source]() if source == "more" else islice(SOURCES[source](), 3, None, 60)
    for name, draw in chosen:
        found = sweep(name, draw, samples=1, seconds=5, nodes=set())
        wrong = {way: verdict for way, verdict in found.items() if way.startswith("fpsim") and "WRONG" in verdict}
        assert not wrong, (name, wrong)
