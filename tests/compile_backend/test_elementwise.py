"""Rounding the results of operations that are no matrix products: where they end, and the values that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fpsim
from fpsim.compile_backend.graph.operations import operations
from tests.shared.models import assert_all_equal, case

aten = torch.ops.aten
BACKENDS = ["fpsim_eager", "fpsim"]
FORWARD, BACKWARD = "e4m3fn", "e5m2"
OPTIONS = {"format": "none", "elementwise": {"forward": FORWARD, "backward": BACKWARD}, "overflow": "sat_finite"}


def forward(x: Tensor) -> Tensor:
    return fpsim.round(x, FORWARD)


def backward(x: Tensor) -> Tensor:
    return fpsim.round(x, BACKWARD, overflow="sat_finite")


def sites(model: Callable, *args: Tensor, policy: dict = OPTIONS) -> list[tuple[str, str, str, str]]:
    plan = fpsim.explain(model, *args, policy=policy)
    return [
        (site.path, site.step, site.operator.removeprefix("aten."), str(site.cast or "").partition("/")[0])
        for site in plan.sites
        if site.role == "result"
    ]


class NormAndSoftmax(nn.Module):
    """Two uses of one value, so that two gradients are added up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return (F.softmax(F.gelu(h), -1) * h).sum(1)


def block_by_hand(model: NormAndSoftmax, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    weight, bias, eps = model.norm.weight, model.norm.bias, model.norm.eps
    h, mean, rstd = aten.native_layer_norm(x, [8], weight, bias, eps)
    h = forward(h)
    a = forward(F.gelu(h))
    s = forward(F.softmax(a, -1))
    y = forward(forward(s * h).sum(1))

    dm = dy.unsqueeze(1).expand(x.shape)
    ds, dh = backward(dm * h), backward(dm * s)
    da = backward(aten._softmax_backward_data(ds, s, -1, torch.float32))  # of the rounded result
    dh = backward(dh + backward(aten.gelu_backward(da, h)))
    dx, dweight, dbias = aten.native_layer_norm_backward(dh, x, [8], mean, rstd, weight, bias, [True] * 3)
    return {"y": y, "x": backward(dx), "norm.weight": backward(dweight), "norm.bias": backward(dbias)}


def run(model: nn.Module, x: Tensor, dy: Tensor, backend: str, options: dict) -> dict[str, Tensor]:
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def test_every_operation_is_rounded_once_forward_and_backward() -> None:
    model, x, dy = NormAndSoftmax(), torch.randn(3, 5, 8), torch.randn(3, 8)
    assert_all_equal(run(model, x, dy, "fpsim_eager", OPTIONS), block_by_hand(model, x, dy))


def test_the_plan_names_the_operators_as_they_were_called() -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    assert sites(NormAndSoftmax(), x) == [
        ("norm", "forward", "native_layer_norm", FORWARD),
        ("", "forward", "gelu", FORWARD),
        ("", "forward", "_softmax", FORWARD),
        ("", "forward", "mul", FORWARD),
        ("", "forward", "sum", FORWARD),
        ("", "backward", "mul", BACKWARD),
        ("", "backward", "mul", BACKWARD),
        ("", "backward", "_softmax_backward_data", BACKWARD),
        ("", "backward", "gelu_backward", BACKWARD),
        ("", "backward", "add", BACKWARD),
        *3 * [("norm", "backward", "native_layer_norm_backward", BACKWARD)],
    ]


class Exact(nn.Module):
    """Arithmetic with exact steps in float32, so that the order of sums in compiled code does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-2, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(x * self.scale) + x * 0.375).sum(0)


def exact_by_hand(model: Exact, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    scale = model.scale.detach()
    product = forward(x * scale)
    positive = forward(F.relu(product))
    y = forward(forward(positive + forward(x * 0.375)).sum(0))
    d = dy.expand(x.shape)
    dx = backward(d * 0.375)
    dproduct = backward(aten.threshold_backward(d, positive, 0))
    dx = backward(dx + backward(dproduct * scale))
    dscale = backward(backward(dproduct * x).sum(0))
    return {"y": y, "x": dx, "scale": dscale}


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_interpreted_values_are_those_by_hand(backend: str) -> None:
    x, dy = torch.randint(-64, 64, (6, 16)) / 16, torch.randint(-16, 16, (16,)) / 8
    model = Exact()
    assert_all_equal(run(model, x, dy, backend, OPTIONS), exact_by_hand(model, x, dy))


def test_compiled_code_has_no_mark_and_no_call_for_rounding() -> None:
    model = torch.compile(Exact(), backend="fpsim", options=OPTIONS, fullgraph=True)
    _, (code,) = run_and_get_code(lambda: model(torch.randn(6, 16)).detach())
    assert "fpsim.mark" not in code and "torch.ops.fpsim" not in code


def test_stochastic_results_are_the_same_compiled_and_interpreted() -> None:
    options = {"format": "none", "elementwise": "e4m3fn/stochastic:8"}
    x, dy = torch.randn(6, 16), torch.randn(16)
    results = []
    for backend in BACKENDS:
        torch.manual_seed(3)
        results.append(run(Exact(), x, dy, backend, options))
    assert_all_equal(*results)
    assert_all_equal({"y": fpsim.round(results[0]["y"], "e4m3fn")}, {"y": results[0]["y"]})


# -- what is an operation ----------------------------------------------------------------------------------------------


def test_the_table_holds_what_computes_and_nothing_else() -> None:
    names = {op._opname for op in operations()}
    assert names >= {
        "add", "sub", "mul", "div", "pow", "exp", "rsqrt", "sum", "mean", "cumsum", "var_mean", "_softmax",
        "_log_softmax", "native_layer_norm", "native_layer_norm_backward", "native_group_norm",
        "_native_batch_norm_legit_functional", "native_batch_norm_backward", "gelu", "gelu_backward", "silu",
        "silu_backward", "tanh_backward", "native_dropout", "native_dropout_backward", "nll_loss_forward",
        "nll_loss_backward", "mse_loss", "mse_loss_backward", "embedding_dense_backward", "index_add", "scatter_add",
        "avg_pool2d", "max_pool2d_with_indices_backward", "upsample_bilinear2d", "sigmoid", "clamp",
        "linalg_vector_norm",
    }  # fmt: skip
    assert not names & {
        "mm", "bmm", "addmm", "convolution", "convolution_backward", "_scaled_dot_product_flash_attention", "view",
        "clone", "_to_copy", "cat", "embedding", "index_select", "gather", "where", "masked_fill", "zeros_like",
        "softmax", "layer_norm", "linear",
    }  # fmt: skip


def test_what_moves_or_picks_numbers_is_not_rounded() -> None:
    def function(x: Tensor, index: Tensor) -> Tensor:
        a = torch.cat([x, x.flip(0)]).index_select(0, index).t().reshape(4, -1)
        return torch.where(a > 0, a, a.amax(0)).masked_fill(a > 2, 1.1).contiguous()

    x = torch.randn(3, 4)
    with torch.no_grad():
        assert sites(function, x, torch.tensor([0, 4])) == []


def test_the_results_of_products_are_left_to_output() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.outer(a @ b, b)

    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    # d(outer) is two products of a matrix and a vector; the two gradients of b are added up
    assert sites(function, a, b) == [("", "backward", "add", BACKWARD)]


def test_what_depends_on_no_parameter_and_no_input_is_left_alone() -> None:
    def function(x: Tensor) -> Tensor:
        angles = torch.arange(4.0) / 3
        return x * angles.cos()

    with torch.no_grad():
        assert sites(function, torch.randn(4)) == [("", "forward", "mul", FORWARD)]


def test_operations_between_integers_and_casts_are_not_rounded() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        return (x.bfloat16() + (n * 2 + 1)).float()

    with torch.no_grad():
        assert sites(function, torch.randn(4), torch.arange(4)) == [("", "forward", "add", FORWARD)]


def test_dropout_and_the_loss_are_operations() -> None:
    def function(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.dropout(x, 0.5), targets)

    x = torch.randn(3, 4, requires_grad=True)
    assert [operator for _, _, operator, _ in sites(function, x, torch.tensor([0, 1, 2]))] == [
        "native_dropout",
        "_log_softmax",
        "nll_loss_forward",
        "nll_loss_backward",
        "_log_softmax_backward_data",
        "native_dropout_backward",
    ]


@pytest.mark.parametrize(
    ("product", "backend"),
    [
        # Inductor compiles a matrix times a vector and a row times a matrix, with a bias, in every run.
        case(product, backend, in_every_run=backend == "fpsim_eager" or product in ("mv", "linear of one row"))
        for product in ("mv", "dot", "addmv", "linear of one row", "linear of one column", "outer")
        for backend in BACKENDS
    ],
)
def test_the_result_of_a_product_that_is_decomposed_is_rounded_after_the_sum(product: str, backend: str) -> None:
    functions = {
        "mv": (torch.mv, (5, 4), (4,)),
        "dot": (torch.dot, (6,), (6,)),
        "addmv": (lambda a, b: torch.addmv(b[:5] * 0.5, a, b), (5, 8), (8,)),
        "linear of one row": (lambda a, b: F.linear(a, b, b[:, 0]), (1, 4), (3, 4)),
        "linear of one column": (F.linear, (4, 1), (3, 1)),
        "outer": (torch.outer, (3,), (4,)),
    }
    function, *shapes = functions[product]
    a, b = ((torch.randint(-32, 32, shape) / 8).requires_grad_() for shape in shapes)
    options = {"format": "none", "output": "e4m1"}
    compiled = torch.compile(function, backend=backend, options=options, fullgraph=True)
    want = fpsim.round(function(a, b).detach(), "e4m1", overflow="sat_finite")
    with torch.no_grad():
        assert torch.equal(compiled(a, b), want)

    y = compiled(a, b)
    assert torch.equal(y.detach(), want)
    dy = torch.randint(-8, 8, y.shape) / 4
    got = torch.autograd.grad(y, (a, b), dy)
    unrounded = torch.autograd.grad(function(a, b), (a, b), dy)
    if product not in ("addmv", "linear of one row"):  # there b has a second use
        for mine, by_hand in zip(got, unrounded, strict=True):
            assert torch.equal(mine, fpsim.round(by_hand, "e4m1", overflow="sat_finite"))


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("field", ["output", "elementwise", "accumulator"])
def test_the_result_of_a_linear_layer_includes_its_bias_whatever_the_strides_of_its_input(
    field: str, shape: tuple[int, ...]
) -> None:
    """torch composes the layer of a product and an addition if its input is not contiguous."""
    dtype = torch.bfloat16 if field == "accumulator" else torch.float32  # the bias is added before the rounding to it
    x, weight, bias = (torch.randint(-64, 64, size).to(dtype) / 16 for size in (shape, (3, 8), (3,)))
    x = x.transpose(0, 1)
    exact = F.linear(x.double(), weight.double(), bias.double())
    want = {
        "output": lambda: fpsim.round(exact, "e4m1", overflow="sat_finite"),
        "elementwise": lambda: exact,  # which the layer is not
        "accumulator": lambda: exact.float(),
    }[field]()
    options = {"format": "none", field: "fp32" if field == "accumulator" else "e4m1"}
    compiled = torch.compile(F.linear, backend="fpsim_eager", options=options, fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), want.to(dtype))


@pytest.mark.parametrize(
    ("backend", "operands"),
    [
        ("fpsim_eager", "none"),
        case("fpsim", "none", in_every_run=False),
        ("fpsim_eager", "e4m1"),
        ("fpsim", "e4m1"),
    ],
)
def test_the_gradient_of_a_convolutions_bias_is_a_sum(backend: str, operands: str) -> None:
    model = nn.Conv1d(2, 3, 2)
    x, dy = torch.randint(-8, 8, (2, 2, 6)) / 4, torch.randint(-32, 32, (2, 3, 5)) / 8
    got = run(model, x, dy, backend, {"format": operands, "elementwise": {"backward": "e4m1"}})
    assert torch.equal(got["bias"], fpsim.round(dy.sum((0, 2)), "e4m1"))
    policy = {"format": operands, "elementwise": {"backward": "e4m1"}}
    assert sites(model, x.requires_grad_(), policy=policy) == [("", "backward", "sum", "e4m1")]


# -- where it holds ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GELU(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_rules_for_modules_hold_forward_and_backward() -> None:
    policy = {"format": "none", "elementwise": "bf16", "modules": {"first": {"elementwise": "e5m2"}, "second": "none"}}
    assert sites(Two(), torch.randn(4, requires_grad=True), policy=policy) == [
        ("first", "forward", "gelu", "e5m2"),
        ("", "forward", "add", "e8m7"),
        ("first", "backward", "gelu_backward", "e5m2"),
        ("", "backward", "add", "e8m7"),
    ]


def test_one_direction_alone() -> None:
    policy = {"format": "none", "elementwise": {"backward": "e5m2"}}
    assert {kind for _, kind, _, _ in sites(Two(), torch.randn(4, requires_grad=True), policy=policy)} == {"backward"}


class Tripled(torch.autograd.Function):
    """An operation with a hand-written backward, whose module torch does not record."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 3


class WithTripled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return Tripled.apply(self.inner(x))


def test_only_directions_with_a_cast_need_a_known_module() -> None:
    x, dy = torch.randn(2, 16)

    def gradient(direction: str, format: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        options = {"format": "none", "elementwise": {direction: format}, "modules": {"inner": "none"}}
        y = torch.compile(WithTripled(), backend="fpsim_eager", options=options)(leaf)
        y.backward(dy)
        return y.detach(), leaf.grad

    y, dx = gradient("forward", FORWARD)
    assert torch.equal(y, forward(x.relu() * 3)) and torch.equal(dx, dy * 3 * (x > 0))
    with pytest.raises(Exception, match="is unknown, and the policy has rules for modules"):
        gradient("backward", BACKWARD)


def test_what_backward_computes_from_forward_values_alone_belongs_to_backward() -> None:
    """The cosine in the derivative of a sine depends on no incoming gradient."""
    x, dy = torch.randn(2, 64)
    x.requires_grad_()
    y = torch.compile(torch.sin, backend="fpsim_eager", options=OPTIONS)(x)
    y.backward(dy)
    assert torch.equal(y, forward(torch.sin(x)))
    assert torch.equal(x.grad, backward(dy * backward(torch.cos(x.detach()))))


def test_a_carrier_that_lacks_the_format_is_an_error() -> None:
    with pytest.raises(Exception, match="float16 lacks"):
        fpsim.explain(lambda x: x + x, torch.randn(4, dtype=torch.float16), policy={"elementwise": "bf16"})


def test_attention_opened_is_rounded_inside() -> None:
    def function(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        inner = [operator for _, _, operator, _ in sites(function, torch.randn(1, 2, 4, 8))]
    assert "_softmax" in inner or "_safe_softmax" in inner
