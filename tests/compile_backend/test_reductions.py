"""Sums that are no products: softmax, norms, losses and gradients have the sums of the reference, in any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim
from fpsim.compile_backend.functional import functional
from fpsim.reference import reductions, sum, to_float
from fpsim.rounding.random_words import random_word

#: Few bits, so that almost every sum differs from that of torch; and three of its orders.
ORDERS: dict[str, Any] = {"e5m4": "sequential", "e5m4 chunk=3": ("chunked", 3), "e5m4 order=pairwise": "pairwise"}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function: Callable[..., Any], *arguments: Tensor, reductions: str = "e5m4", **options: Any) -> Any:
    backend = options.pop("backend", "fpsim_eager")
    return torch.compile(function, backend=backend, options={"reductions": reductions, **options})(*arguments)


def summed(x: Tensor, axes: tuple[int, ...], reductions: str = "e5m4", judge: Callable[..., Any] = sum) -> Tensor:
    """The sums along ``axes``, which stay, by the reference; or its means or variances."""
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    rows = x.permute(*kept, *axes).reshape(-1, *[x.shape[axis] for axis in axes]).flatten(1).tolist()
    results = [to_float(judge(row, "fp32", accumulator="e5m4", order=ORDERS[reductions])) for row in rows]
    return torch.tensor(results).reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def mean(x: Tensor, axes: tuple[int, ...], reductions_: str = "e5m4") -> Tensor:
    return summed(x, axes, reductions_, reductions.mean)


def variance(x: Tensor, axes: tuple[int, ...], correction: int = 1) -> Tensor:
    def judge(*arguments: Any, **named: Any) -> Any:
        return reductions.variance(*arguments, correction=correction, **named)

    return summed(x, axes, "e5m4", judge)


X = numbers(3, 4, 5, seed=1)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_and_means_are_those_of_the_reference(order: str) -> None:
    """Over one axis, several in row-major order, and all; with and without the axes of size 1; NaN and infinity."""
    special = X.clone()
    special[0, 0, 0], special[1, 0, 1], special[2, 1, 0] = torch.nan, torch.inf, -0.0

    def sums(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            x.sum(-1), x.sum((0, 2), keepdim=True), x.sum(), x.mean(1), x.mean((2, 1)), x.mean(),
            y.sum(0, keepdim=True), y[:, :, :0].sum(2),
        ]  # fmt: skip

    wanted = [
        summed(X, (2,), order)[..., 0], summed(X, (0, 2), order), summed(X, (0, 1, 2), order).squeeze(),
        mean(X, (1,), order)[:, 0], mean(X, (1, 2), order)[:, 0, 0], mean(X, (0, 1, 2), order).squeeze(),
        summed(special, (0,), order), torch.zeros(3, 4),
    ]  # fmt: skip
    for backend in ("fpsim_eager", *(["fpsim"] if order == "e5m4" else [])):
        for got, expected in zip(run(sums, X, special, reductions=order, backend=backend), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_variances_are_computed_in_two_passes() -> None:
    def variances(x: Tensor) -> list[Tensor]:
        return [*torch.var_mean(x, 2), x.var((0, 1), correction=0, keepdim=True), x.std(2), x.var(0, correction=3)]

    own = variance(X, (2,))[..., 0]
    wanted = [own, mean(X, (2,))[..., 0], variance(X, (0, 1), 0), own.sqrt(), variance(X, (0,), 3)[0]]
    for got, expected in zip(run(variances, X), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_softmax_norms_and_losses_take_their_sums_from_the_reference() -> None:
    """Every other step is that of torch, in float32."""
    weight, bias, targets = numbers(5, seed=2), numbers(5, seed=3), torch.tensor([1, 4, 0])
    exponentials = (X - X.amax(-1, keepdim=True)).exp()
    shifted = X[:, 0] - X[:, 0].amax(-1, keepdim=True)
    logarithms = shifted - summed(shifted.exp(), (1,)).log()
    losses = -logarithms[torch.arange(3), targets]
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]] = [
        (lambda x: x.softmax(-1), (X,), exponentials / summed(exponentials, (2,))),
        (lambda x, w, b: F.layer_norm(x, (5,), w, b), (X, weight, bias),
         (X - mean(X, (2,))) * (variance(X, (2,), 0) + 1e-5).rsqrt() * weight + bias),
        (lambda x, w: F.rms_norm(x, (5,), w, 1e-5), (X, weight),
         X * (mean(X * X, (2,)) + 1e-5).rsqrt() * weight),
        (lambda x, t: F.cross_entropy(x[:, 0], t), (X, targets), summed(losses, (0,))[0] / 3),
        (lambda x: F.mse_loss(x, 2 * x), (X,), mean((X - 2 * X).square(), (0, 1, 2)).squeeze()),
        (lambda x: torch.linalg.vector_norm(x, dim=-1), (X,), summed(X * X, (2,))[..., 0].sqrt()),
    ]  # fmt: skip
    for number, (function, arguments, wanted) in enumerate(cases):
        torch.testing.assert_close(run(function, *arguments), wanted, rtol=2**-21, atol=0, msg=str(number))


def test_backward_sums_have_the_accumulator_too() -> None:
    """Gradients of a bias, of a broadcast tensor, through a softmax, and of the bias of a convolution."""
    x, bias, gradient = (numbers(*shape, seed=seed) for seed, shape in enumerate(((6, 5), (5,), (6, 5))))
    for own in (x, bias):
        own.requires_grad_()
    run(lambda x, b: (x + b).softmax(-1), x, bias).backward(gradient)
    shifted = (x + bias).detach()
    exponentials = (shifted - shifted.amax(-1, keepdim=True)).exp()
    result = exponentials / summed(exponentials, (1,))
    of_x = gradient * result - result * summed(gradient * result, (1,))
    torch.testing.assert_close(x.grad, of_x, rtol=2**-18, atol=1e-7)
    torch.testing.assert_close(bias.grad, summed(x.grad, (0,))[0], rtol=0, atol=0)

    layer, image = nn.Conv1d(2, 3, 2), numbers(2, 2, 5, seed=4)
    tangent = numbers(2, 3, 4, seed=5)
    run(layer, image).backward(tangent)
    assert torch.equal(layer.bias.grad, summed(tangent, (0, 2))[0, :, 0])
    layer.zero_grad()
    run(layer, image, elementwise="e5m2", format="e4m3fn").backward(tangent)
    assert torch.equal(layer.bias.grad, fpsim.round(summed(tangent, (0, 2))[0, :, 0], "e5m2"))


def test_sixteen_bit_tensors_are_added_in_the_accumulator_and_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = X.to(dtype)
        assert torch.equal(run(lambda x: x.sum(-1), x), summed(x.float(), (2,))[..., 0].to(dtype))
        assert torch.equal(run(lambda x: x.mean(-1), x), mean(x.float(), (2,))[..., 0].to(dtype))
        assert torch.equal(run(lambda x: x.sum(-1, dtype=torch.float32), x), summed(x.float(), (2,))[..., 0])


def test_stochastic_sums_draw_one_number_for_each_addition() -> None:
    """The first key of the run: that of the seed which torch's generator gives."""
    x = numbers(7, 3, seed=6)
    compiled = torch.compile(lambda x: x.sum(0), backend="fpsim_eager", options={"reductions": "e5m4/stochastic:8"})
    torch.manual_seed(1)
    first = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first) and not torch.equal(compiled(x), first)
    key = torch.ops.fpsim.random_key(torch.tensor([3]), 0)
    got = torch.ops.fpsim.accumulate_sum(x, [0], False, key, "e5m4/stochastic:8", "")

    def number(element: int, step: int) -> int:
        index = torch.tensor(element * 7 + step, dtype=torch.int32)
        return (int(random_word(key[0] ^ index, key[1])) & 0xFFFFFFFF) >> 24 if step < 7 else 0

    for j, column in enumerate(x.T.tolist()):
        wanted = sum(
            column, "fp32", "stochastic:8", accumulator="e5m4", random=lambda step, j=j: number(j, step)
        )  # fmt: skip
        assert got[j].item() == to_float(wanted)


def test_the_plan_lists_sums_and_modules_have_their_own() -> None:
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.Softmax(-1))
    policy = {"format": "e4m3fn", "reductions": "bf16 chunk=2", "modules": {"2": {"reductions": "fp16"}, "1": "e4m3fn"}}
    plan = fpsim.explain(model, X[0], policy=policy)
    assert [(each.path, each.operator, each.kind, each.accumulator) for each in plan.sums] == [
        ("0", "aten.native_layer_norm", "forward", "e8m7/nearest_even/ovf_inf chunk=2"),
        ("2", "aten._softmax", "forward", "e5m10/nearest_even/ovf_inf"),
        ("2", "aten._softmax_backward_data", "backward", "e5m10/nearest_even/ovf_inf"),
        *[("0", "aten.native_layer_norm_backward", "backward", "e8m7/nearest_even/ovf_inf chunk=2")] * 2,
    ]
    assert "5 other sums with accumulators" in str(plan)
    assert fpsim.audit(model, X[0], policy=policy).escaped == ()
    read = fpsim.Policy.from_json(fpsim.Policy.from_options(policy).to_json())
    assert read == fpsim.Policy.from_options(policy) and read.canonical() != fpsim.Policy(format="e4m3fn").canonical()


def test_any_number_of_rows_and_functional_losses() -> None:
    compiled = torch.compile(
        lambda x: x.var(0) + x.mean((0, 1)) + x.sum(),
        backend="fpsim_eager",
        options={"reductions": "e5m4"},
        dynamic=True,
    )
    for rows in (3, 4, 6):
        x = numbers(rows, 5, seed=rows)
        wanted = variance(x, (0,))[0] + mean(x, (0, 1)).squeeze() + summed(x, (0, 1)).squeeze()
        assert torch.equal(compiled(x), wanted)
    model = nn.Sequential(nn.Linear(5, 5), nn.Softmax(-1))
    call = functional(model, fpsim.Policy(reductions="e5m4"))
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    assert torch.equal(call(parameters, (X,), {}), run(model, X))
    gradients = torch.func.grad(lambda p: call(p, (X,), {}).square().sum())(parameters)
    exact = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().sum())(parameters)
    torch.testing.assert_close(gradients, exact, rtol=0.2, atol=0.02)


def test_sums_that_cannot_be_simulated_are_refused_unless_they_are_gaps() -> None:
    layer, tokens = nn.Embedding(5, 4), torch.tensor([1, 2, 1])
    with pytest.raises(Exception, match=r"aten.embedding_dense_backward.*gaps=\['aten.embedding_dense_backward'\]"):
        run(layer, tokens).sum().backward()
    gaps = ["aten.embedding_dense_backward"]
    run(layer, tokens, gaps=gaps).sum().backward()
    assert layer.weight.grad[1, 0] == 2
    (gap,) = fpsim.explain(layer, tokens, policy={"reductions": "bf16", "gaps": gaps}).gaps
    assert "adds numbers as torch does" in gap.reason
    for function, name in (
        (lambda x: x.cumsum(-1), "aten.cumsum"),
        (lambda x: x.prod(-1), "aten.prod"),
        (lambda x: torch.zeros(5).index_add(0, torch.tensor([0, 0, 1]), x[:, 0, 0]), "aten.index_add"),
        (lambda x: F.avg_pool1d(x, 2), "aten.avg_pool"),
    ):
        with pytest.raises(Exception, match=rf"the sums of {name}.* cannot be simulated"):
            run(function, X)
    with pytest.raises(Exception, match=r"aten.sum adds float64 numbers"):
        run(lambda x: x.sum(), X.double())
    moved = run(lambda x: (x.cumsum(-1) > 0).sum(-1), X.int())  # integers are added as usual
    assert torch.equal(moved, (X.int().cumsum(-1) > 0).sum(-1))
    for given, message in (
        ("hopper_fp8", "'hopper_fp8' adds products, and reductions are sums of numbers"),
        ("int32", "'int32/wrap' adds products"),
        ("fp16 order=aligned:4:10", "adds products"),
        ("e8m13 chunk=0", "chunk is a number of products from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fpsim.Policy(reductions=given)
