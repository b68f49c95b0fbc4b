"""Operators are compared with dense float64 matrices from two reverse passes of autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.curvature import (
    CrossEntropy,
    CurvatureError,
    empirical_fisher,
    functional_loss,
    functional_outputs,
    gauss_newton,
    hessian,
    inverse,
    layout,
)
from tests.curvature.small_models import MODELS, case, dense_hessian, relative, token_loss

EXACT = ("reverse", "forward", "double_backward")


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_hessian_is_the_dense_one(name, mode):
    small = case(name)
    dense = hessian(small.loss, small.params, mode=mode).to_dense()
    assert relative(dense, dense_hessian(small.loss, small.params)) <= 1e-12
    assert relative(dense.T, dense) <= 1e-12


@pytest.mark.parametrize(
    "names",
    [
        ["layer norm", "padding row, tied"],
        pytest.param(["padding row", "batch norm, training", "grouped attention"], marks=pytest.mark.exhaustive),
    ],
    ids=", ".join,
)
def test_compiled_products_are_those_of_the_dense_one(names):
    """Several models in one process: the shapes of one must not affect the compilation of the next."""
    for name in names:
        small = case(name)
        compiled = hessian(small.loss, small.params, mode="forward", compile=True)
        vector = torch.randn(compiled.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        want = dense_hessian(small.loss, small.params) @ vector
        assert relative(compiled @ vector, want) <= 1e-12, name


def test_compiled_products_of_batches_of_few_shapes():
    params = {"w": torch.arange(1.0, 4.0, dtype=torch.float64)}
    batches = [torch.ones(length, 3, dtype=torch.float64) for length in (1, 2, 4)]

    def operator(limit):
        options = {"weight": len, "mode": "forward", "compile": True}
        return hessian(lambda p, x: ((x @ p["w"]) ** 3).mean(), params, batches=batches[:limit], **options)

    assert torch.equal(operator(3) @ torch.ones(3), torch.full((3,), 6 * 6 * 3.0, dtype=torch.float64))
    with torch._dynamo.config.patch(recompile_limit=2):
        operator(2) @ torch.ones(3)
        with pytest.raises(CurvatureError, match="more than 2 shapes, each compiled apart: pad them"):
            operator(3) @ torch.ones(3)


@pytest.mark.parametrize(
    ("keep", "reason"),
    [(True, "the parameters changed in place after the first product"), (False, "the loss changes from call to call")],
)
def test_parameters_that_change_in_place_are_a_doubt(keep, reason):
    weight, vector = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    operator = hessian(lambda p: (p["w"] ** 3).sum(), {"w": weight}, keep=keep)
    assert torch.equal(operator @ vector, 6 * weight)
    assert inverse(operator, vector, damping=1.0).converged
    weight.add_(1)
    found = inverse(operator, vector, damping=1.0)
    assert not found.converged
    assert [each for each in found.reasons if each.startswith(reason)], found.reasons


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences_come_close(name):
    small = case(name)
    dense = hessian(small.loss, small.params, mode="finite_difference").to_dense()
    assert relative(dense, dense_hessian(small.loss, small.params)) <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_symmetry_error_of_a_symmetric_operator_is_rounding_error(name):
    small = case(name)
    assert hessian(small.loss, small.params).symmetry_error() <= 1e-12


def test_torch_func_hessian_disagrees_on_layer_norm():
    """The reason why `fpsim.curvature.products` avoids it. If this test fails, torch is fixed: delete the test."""
    small = case("layer norm")
    arranged = layout(small.params)
    start = arranged.join(arranged.values)
    public = torch.func.hessian(lambda v: small.loss(arranged.point(v)))(start)
    assert relative(public, dense_hessian(small.loss, small.params)) > 1e-3


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["gelu", "layer norm", "tied", "grouped attention", "batch norm, evaluation"])
def test_gauss_newton_is_the_dense_one(name, mode):
    small = case(name)
    targets = small.batch[1]
    outputs = functional_outputs(small.model, batch=small.batch)
    want = dense_gauss_newton(small, outputs, targets)
    for loss in (lambda z: token_loss(z, targets), CrossEntropy(targets), CrossEntropy(targets, chunk=4)):
        got = gauss_newton(outputs, loss, small.params, mode=mode).to_dense()
        assert relative(got, want) <= 1e-12
        assert float(torch.linalg.eigvalsh(got).min()) >= -1e-12


def dense_gauss_newton(small, outputs, targets):
    arranged = layout(small.params)
    point = arranged.join(arranged.values)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(lambda v: outputs(arranged.point(v)), point)
        logits = outputs(small.params).detach()
    inner = torch.autograd.functional.hessian(lambda z: token_loss(z, targets), logits)
    jacobian = jacobian.reshape(-1, len(point))
    return jacobian.T @ inner.reshape(len(jacobian), len(jacobian)) @ jacobian


def test_gauss_newton_of_squared_error_of_a_linear_model_is_its_hessian():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    params = dict(model.named_parameters())
    loss = functional_loss(model, lambda z, y: ((z - y) ** 2).sum(-1).mean() / 2, batch=(x, y))
    got = gauss_newton(functional_outputs(model, batch=(x, y)), "squared", params).to_dense()
    assert relative(got, dense_hessian(loss, params)) <= 1e-12


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_empirical_fisher_is_the_mean_outer_product(mode):
    small = case("layer norm")
    tokens, targets = small.batch

    def losses(params):
        logits = functional_call(small.model, params, (tokens,))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0), reduction="none")

    arranged = layout(small.params)
    point = arranged.join(arranged.values)
    rows = torch.autograd.functional.jacobian(lambda v: losses(arranged.point(v)), point)
    got = empirical_fisher(losses, small.params, mode=mode).to_dense()
    assert relative(got, rows.T @ rows / len(rows)) <= 1e-12


def test_parameters_without_influence_give_zeros():
    params = {"used": torch.randn(3).double(), "unused": torch.randn(2).double(), "linear": torch.randn(1).double()}
    for mode in (*EXACT, "finite_difference"):
        dense = hessian(lambda p: (p["used"] ** 3).sum() + p["linear"].sum(), params, mode=mode).to_dense()
        assert torch.count_nonzero(dense[3:]) == torch.count_nonzero(dense[:, 3:]) == 0
        assert relative(dense[:3, :3], torch.diag(6 * params["used"])) <= 1e-6


def test_a_loss_that_is_linear_has_a_hessian_of_zero():
    params = {"x": torch.ones(3)}
    for mode in EXACT:
        assert torch.count_nonzero(hessian(lambda p: 2 * p["x"].sum(), params, mode=mode).to_dense()) == 0


def test_frozen_and_unselected_parameters_are_constants():
    small = case("gelu")
    small.model.embed.weight.requires_grad_(False)
    full = hessian(small.loss, small.params)
    assert "embed.weight" not in full.layout.names
    part = hessian(small.loss, small.params, select=["inner.*", "!*.bias"])
    assert part.layout.names == ("inner.0.weight", "inner.2.weight")
    mask = full.layout.mask(part.layout.names)
    dense = full.to_dense()
    assert relative(part.to_dense(), dense[mask][:, mask]) <= 1e-12
    assert relative(full.block(["inner.*", "!*.bias"]).to_dense(), dense[mask][:, mask]) <= 1e-12


def test_mixed_dtypes_give_vectors_of_the_widest():
    params = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(2, dtype=torch.bfloat16)}
    operator = hessian(lambda p: (p["a"] ** 3).sum() + (p["b"].double() ** 3).sum(), params)
    assert operator.dtype == torch.float64
    want = torch.cat([6 * params["a"], 6 * params["b"].double()])
    torch.testing.assert_close(operator @ torch.ones(5), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close((operator @ torch.ones(5))[:3], want[:3])
    assert hessian(lambda p: p["b"].pow(2).sum(), {"b": params["b"]}).dtype == torch.float32


def test_vectors_may_have_another_dtype_than_the_parameters():
    small = case("layer norm")
    params = {name: value.float() for name, value in small.params.items()}
    operator = hessian(small.loss, params, vector_dtype=torch.float64, vector_device="cpu")
    got = operator @ torch.ones(operator.size)
    assert got.dtype == torch.float64
    want = dense_hessian(small.loss, small.params) @ torch.ones(operator.size).double()
    assert relative(got, want) <= 1e-5


def test_any_pytree_and_nothing_is_changed():
    params = [torch.randn(2, 2), {"deep": (torch.randn(3), 5, torch.arange(2))}]
    before = [params[0].clone(), params[1]["deep"][0].clone()]
    operator = hessian(lambda p: (p[0] ** 2).sum() * p[1]["deep"][0].prod() + p[1]["deep"][1], params)
    assert operator.layout.names == ("0", "1.deep.0")
    operator.to_dense()
    assert torch.equal(params[0], before[0]) and torch.equal(params[1]["deep"][0], before[1])


def test_the_model_keeps_its_state():
    small = case("batch norm, training")
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    hessian(small.loss, small.params).to_dense()
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert small.model.training and all(p.grad is None for p in small.model.parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000), st.sampled_from(EXACT))
def test_products_are_linear_and_symmetric(inputs, outputs, seed, mode):
    generator = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)}
    x = torch.randn(3, inputs, generator=generator, dtype=torch.float64)
    operator = hessian(lambda p: torch.tanh(x @ p["w"]).pow(2).sum(), params, mode=mode)
    v, w = torch.randn(2, operator.size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(operator @ (2 * v - 3 * w), 2 * (operator @ v) - 3 * (operator @ w))
    torch.testing.assert_close(v @ (operator @ w), w @ (operator @ v))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_loss_that_chooses_its_own_attention_kernel_is_an_error_that_names_it(mode):
    small = case("attention")

    def loss(params):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return small.loss(params)

    with pytest.raises(CurvatureError, match=r"attention.*sdpa_kernel|attention.*eager"):
        hessian(loss, small.params, mode=mode).matvec(torch.ones(layout(small.params).size))
    hessian(loss, small.params, mode="finite_difference").matvec(torch.ones(layout(small.params).size))


def test_checkpointing_works_by_double_backward_and_is_named_otherwise():
    from torch.utils.checkpoint import checkpoint

    small = case("gelu")
    inner = small.model.inner
    small.model.inner = Checkpointed(inner, checkpoint)
    params = small.params
    got = hessian(small.loss, params, mode="double_backward").to_dense()
    small.model.inner = inner
    assert relative(got, dense_hessian(small.loss, small.params)) <= 1e-12
    small.model.inner = Checkpointed(inner, checkpoint)
    for mode in ("reverse", "forward"):
        with pytest.raises(CurvatureError, match=r"checkpointing.*double_backward"):
            hessian(small.loss, params, mode=mode).matvec(torch.ones(got.shape[0]))


def test_checkpointing_never_computes_again_with_other_parameters():
    """Backward runs after the parameters have been substituted, and forward again with those of the module."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = Checkpointed(layers, checkpoint)
    params, x = dict(model.named_parameters()), torch.randn(5, 3, dtype=torch.float64)
    loss = functional_loss(model, lambda outputs: outputs.square().sum(), batch=x)
    moved = {name: (value + 0.1).detach().requires_grad_() for name, value in params.items()}
    product = hessian(loss, params, mode="finite_difference")
    for derive in (lambda: loss(moved), lambda: product.matvec(torch.ones(product.size, dtype=torch.float64))):
        with pytest.raises(CurvatureError, match="compute the forward pass again with the module's own parameters"):
            derive()
    with torch.no_grad():
        assert loss(moved) > 0  # a value needs no second forward pass
    own = torch.autograd.grad(layers(x).square().sum(), list(params.values()))
    for got, want in zip(torch.autograd.grad(loss(params), list(params.values())), own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    model.use_reentrant = True
    x.requires_grad_()
    for mode in ("reverse", "double_backward", "forward", "finite_difference"):
        with pytest.raises(CurvatureError, match="use_reentrant=False"):
            hessian(loss, params, mode=mode).matvec(torch.ones(product.size, dtype=torch.float64))


class Checkpointed(nn.Module):
    def __init__(self, inner, checkpoint, use_reentrant=False):
        super().__init__()
        self.inner, self.checkpoint, self.use_reentrant = inner, checkpoint, use_reentrant

    def forward(self, x):
        return self.checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def test_batch_norm_without_functional_loss_is_an_error_with_the_remedy():
    model = nn.BatchNorm1d(3)
    with pytest.raises(CurvatureError, match="functional_loss"):
        hessian(lambda p: functional_call(model, p, (torch.randn(4, 3),)).sum(), dict(model.named_parameters())).matvec(
            torch.ones(6)
        )


def test_an_operation_without_second_derivative_is_named():
    params = {"x": torch.rand(16, 16)}
    experts = torch.ones(1, 16, 16, dtype=torch.bfloat16)

    def grouped(p):
        return torch._grouped_mm(p["x"].to(torch.bfloat16), experts, offs=torch.tensor([16]).int()).float().pow(2).sum()

    def hard(p):
        return functional.hardsigmoid(p["x"]).pow(2).sum()

    hessian(grouped, params).matvec(torch.ones(256))
    for loss, mode, message in (
        (grouped, "forward", r"_grouped_mm.*no forward-mode derivative: use mode='reverse'"),
        (hard, "reverse", r"hardsigmoid_backward.*no second derivative"),
        (hard, "forward", r"hardsigmoid_backward.*finite_difference"),
    ):
        with pytest.raises(CurvatureError, match=message):
            hessian(loss, params, mode=mode).matvec(torch.ones(256))


def test_a_refusal_of_torch_func_names_a_remedy():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    params = {"x": torch.rand(3)}
    with pytest.raises(CurvatureError, match=r"autograd\.Function.*double_backward"):
        hessian(lambda p: Cube.apply(p["x"]).sum(), params).matvec(torch.ones(3))
    double = hessian(lambda p: Cube.apply(p["x"]).sum(), params, mode="double_backward")
    torch.testing.assert_close(double @ torch.ones(3), 6 * params["x"])


def test_options_that_exclude_each_other():
    params = {"x": torch.ones(2)}

    def loss(p):
        return p["x"].pow(2).sum()

    for options, message in (
        ({"mode": "backward"}, "unknown mode 'backward'"),
        ({"compile": True}, "mode='forward'"),
        ({"mode": "forward", "keep": True}, "no graph to keep"),
        ({"step": 0.1}, "finite_difference"),
        ({"select": "y"}, "did you mean x"),
        ({"vector_dtype": torch.bfloat16}, "float32 or float64"),
        ({"weight": "equal"}, "pass batches"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(loss, params, **options)
    with pytest.raises(ValueError, match="one number"):
        hessian(lambda p: p["x"], params).matvec(torch.ones(2))
    with pytest.raises(TypeError, match="must be a tensor"):
        hessian(lambda p: 3.0, params).matvec(torch.ones(2))
    with pytest.raises(ValueError, match=r"expected a vector of shape \(2,\)"):
        hessian(loss, params).matvec(torch.ones(3))
    with pytest.raises(ValueError, match="no parameter varies"):
        hessian(loss, {"x": nn.Parameter(torch.ones(2), requires_grad=False)})
    with pytest.raises(ValueError, match="unknown loss 'l1'"):
        gauss_newton(lambda p: p["x"], "l1", params)
    with pytest.raises(ValueError, match="modes 'reverse' and 'forward'"):
        empirical_fisher(lambda p: p["x"], params, mode="double_backward")
    with pytest.raises(ValueError, match=r"finite differences of parameters in torch\.bfloat16"):
        hessian(loss, {"x": torch.ones(2, dtype=torch.bfloat16)}, mode="finite_difference").matvec(torch.ones(2))
