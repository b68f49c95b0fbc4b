"""Curvature with rounding inside the loss: it is the straight-through surrogate's, and symmetric unless gradients
are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import fpsim
from fpsim.curvature import (
    check_determinism,
    check_symmetry,
    eigenpairs,
    functional_loss,
    functional_outputs,
    gauss_newton,
    hessian,
    layout,
)
from tests.curvature.small_models import case, dense_hessian, relative, token_loss


class RoundedLinear(nn.Linear):
    """A linear layer whose input and weight are rounded."""

    def forward(self, x):
        return functional.linear(fpsim.round(x, "e8m3"), fpsim.round(self.weight, "e8m3"), self.bias)


class RoundGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return fpsim.round(g, "e8m3")

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Embedding(16, 4), RoundedLinear(4, 8), nn.LayerNorm(8), nn.GELU(), RoundedLinear(8, 16)
        )
        batch = (torch.randint(0, 16, (40,)), torch.randint(0, 16, (40,)))
    return model, dict(model.named_parameters()), batch


@pytest.mark.parametrize("mode", ["reverse", "forward", "double_backward"])
def test_rounded_forward_is_symmetric(mode):
    model, params, batch = network()
    operator = hessian(functional_loss(model, token_loss, batch=batch), params, mode=mode)
    assert operator.symmetry_error(pairs=3) <= 1e-5
    assert check_symmetry(operator).symmetric
    assert eigenpairs(operator).converged


@pytest.mark.parametrize("cast", ["mxfp8", "nvfp4", "int8", "e4m3fn/tensor", "uint8", "nf4/group:8:double"])
def test_losses_with_scaled_operands(cast):
    """Values are those of the compiled model; derivatives are those of a model with straight-through operands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 3))
    params = {name: p.detach() for name, p in model.named_parameters()}
    batch, tangent = (torch.randn(9, 40), torch.randn(9, 3)), {name: torch.randn_like(p) for name, p in params.items()}

    def squares(outputs, target):
        return (outputs - target).square().sum()

    def straight_through(x):
        return x + (fpsim.round(x.detach(), cast) - x.detach())

    def linear(x, weight, bias):
        return functional.linear(straight_through(x), straight_through(weight), bias)

    def emulated(p):
        hidden = linear(batch[0], p["0.weight"], p["0.bias"]).tanh()
        return squares(linear(hidden, p["2.weight"], p["2.bias"]), batch[1])

    for dtype in (torch.bfloat16, torch.float32):
        narrow = model.to(dtype)
        narrow.load_state_dict(params)
        inputs = tuple(x.to(dtype) for x in batch)
        rounded = functional_loss(narrow, squares, batch=inputs, policy={"format": cast})
        torch._dynamo.reset()
        compiled = torch.compile(narrow, backend="fpsim_eager", options={"format": cast})
        own = {name: p.to(dtype) for name, p in params.items()}
        assert torch.equal(rounded(own), squares(compiled(inputs[0]), inputs[1]))
        assert torch.func.grad(rounded)(own)["0.weight"].isfinite().all()
    gradients = [torch.func.grad(loss)(params) for loss in (rounded, emulated)]
    products = [torch.func.jvp(torch.func.grad(loss), (params,), (tangent,))[1] for loss in (rounded, emulated)]
    for mine, theirs in (gradients, products):
        assert all(relative(mine[name], theirs[name]) < 1e-4 for name in params)


def test_rounded_gradients_are_reported_as_not_symmetric():
    model, params, (tokens, targets) = network()

    def loss(p):
        x = functional_call(model[:3], {k: v for k, v in p.items() if int(k[0]) < 3}, (tokens,))
        hidden = functional.gelu(RoundGradient.apply(x))
        return token_loss(functional.linear(hidden, p["4.weight"], p["4.bias"]), targets)

    operator = hessian(loss, params)
    assert operator.symmetry_error(pairs=3) > 1e-3
    assert not check_symmetry(operator).symmetric
    assert eigenpairs(operator, max_products=20).asymmetry > 1e-4


def test_all_modes_see_the_same_surrogate():
    model, params, batch = network()
    loss = functional_loss(model.double(), token_loss, batch=batch)
    params = dict(model.named_parameters())
    dense = {mode: hessian(loss, params, mode=mode).to_dense() for mode in ("reverse", "forward", "double_backward")}
    want = dense_hessian(loss, params)
    for got in dense.values():
        assert relative(got, want) <= 1e-12


def test_the_surrogate_is_the_loss_at_the_rounded_values():
    """If only the parameters are rounded, it is the Hessian of the unrounded loss at the rounded parameters."""
    small = case("layer norm")
    rounded = {name: fpsim.round(value.detach(), "e4m3fn") for name, value in small.params.items()}
    surrogate = hessian(lambda p: small.loss({k: fpsim.round(v, "e4m3fn") for k, v in p.items()}), small.params)
    assert relative(surrogate.to_dense(), hessian(small.loss, rounded).to_dense()) <= 1e-14


def test_gauss_newton_of_a_rounded_model_is_symmetric():
    model, params, batch = network()
    operator = gauss_newton(functional_outputs(model, batch=batch), lambda z: token_loss(z, batch[1]), params)
    assert operator.symmetry_error(pairs=3) <= 1e-5


def test_finite_differences_are_refused():
    model, params, batch = network()
    with pytest.raises(ValueError, match=r"rounds \(fpsim::round.*mode='reverse'"):
        hessian(functional_loss(model, token_loss, batch=batch), params, mode="finite_difference")


def test_finite_differences_are_refused_under_a_policy():
    small = case("layer norm")
    rounded = functional_loss(small.model, token_loss, batch=small.batch, policy={"format": "e4m3fn"})
    with pytest.raises(ValueError, match=r"rounds \(fpsim::round.*mode='reverse'"):
        hessian(rounded, small.params, mode="finite_difference")


@pytest.mark.parametrize("name", ["padding row", "padding row, tied"])
def test_rows_of_padding_are_constants_under_a_policy(name):
    """The embedding runs in a traced graph, not in the module."""
    small = case(name)
    rounded = functional_loss(small.model, token_loss, batch=small.batch, policy={"format": "e4m3fn"})
    reverse, forward = (hessian(rounded, small.params, mode=mode).to_dense() for mode in ("reverse", "forward"))
    assert relative(forward, reverse) <= 1e-12
    assert relative(forward.T, forward) <= 1e-12
    assert relative(reverse, dense_hessian(small.loss, small.params)) > 1e-3


def test_a_loss_under_a_policy_is_deterministic():
    small = case("layer norm")
    rounded = functional_loss(small.model, token_loss, batch=small.batch, policy={"format": "e4m3fn"})
    assert check_determinism(rounded, small.params).deterministic


def test_products_compile():
    """Compiled and eager products of a small loss agree, with and without rounding."""
    params = {"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    x = torch.ones(2, 4)
    torch._dynamo.reset()

    def loss(p, batch):
        return torch.tanh(batch @ p["w"]).pow(2).sum()

    eager = hessian(loss, params, batches=[x], weight="equal")
    compiled = hessian(loss, params, batches=[x], weight="equal", mode="forward", compile=True)
    v = torch.randn(layout(params).size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled @ v, eager @ v)
    rounded = hessian(lambda p: loss({"w": fpsim.round(p["w"], "e4m3fn")}, x), params, mode="forward", compile=True)
    want = hessian(lambda p: loss({"w": fpsim.round(p["w"], "e4m3fn")}, x), params)
    torch.testing.assert_close(rounded @ v, want @ v)
    assert float((want @ v - eager @ v).abs().max()) > 1e-3
    torch._dynamo.reset()


def test_compiled_modules_are_refused():
    model, _, batch = network()
    with pytest.raises(ValueError, match="_orig_mod"):
        functional_loss(torch.compile(model), token_loss, batch=batch)
