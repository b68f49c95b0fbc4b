"""Whole models: compiled and interpreted code give the same bits in all usual settings."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim
from fpsim.compile_backend import UnroundedError
from fpsim.compile_backend.passes.rounding_pass import RoundingPass


class AttentionBlock(nn.Module):
    """A pre-norm transformer block whose arithmetic between products is the same in any executor."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        a = F.relu(q @ k.mT) @ v  # attention without softmax: elementwise functions differ between executors
        x = x + self.out(a.permute(0, 2, 1, 3).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(x)))


def exact_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model small dyadic parameters, so that sums are exact and their order cannot matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator) * 0.25)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert p.dtype == q.dtype and torch.equal(p, q), f"result {i}: {(p != q).sum()} of {p.numel()} differ"


OPTIONS = {"activation": "e4m2", "weight": "e2m1fn", "gradient": "e4m1", "overflow": "sat_finite"}


def inputs(batch: int = 2, length: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-4, 5, (batch, length, 16), generator=generator) * 0.25).to(dtype)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_compiled_and_interpreted_give_the_same_bits(dtype: torch.dtype) -> None:
    model, x = exact_(AttentionBlock()).to(dtype), inputs(dtype=dtype)
    compiled = step(torch.compile(model, backend="fpsim", options=OPTIONS), x)
    same_bits(compiled, step(torch.compile(model, backend="fpsim_eager", options=OPTIONS), x))
    assert not torch.equal(compiled[0], step(model, x)[0])


class Returning(nn.Module):
    """A model that also returns views of its intermediate values, whose memory backward needs."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(16, 64), nn.Linear(64, 64), forward

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "slices":
            h = torch.tanh(self.first(x))
            y = self.last(h)
            return y.square().sum(), h[:, -1].detach(), y.T.detach()
        if self.how == "flat":
            h = F.relu(self.first(x))
            y = torch.sigmoid(self.last(h))
            return y.sum(), h.view(-1)[3:].detach(), y.unsqueeze(0).detach()
        if self.how == "pieces":
            h = torch.softmax(self.first(x), -1)
            y = torch.exp(self.last(h)) * h
            return y.sum(), h.split(32, 1)[0].detach(), y.permute(1, 0).detach()
        h = self.first(x)
        y = self.last(h * h)
        return y.exp().sum(), h.reshape(4, -1).detach(), y[1:].detach()


class All(nn.Module):
    """A model for each way of returning views, in one graph: the compiler is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([Returning(forward) for forward in ("slices", "flat", "pieces", "products")])

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        losses, returned = [], []
        for model, x in zip(self.models, inputs, strict=True):
            loss, *views = model(x)
            losses.append(loss)
            returned += views
        return torch.stack(losses).sum(), *returned


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"format": "bf16"}, marks=pytest.mark.exhaustive),
        pytest.param({"format": "bf16", "output": "bf16"}, marks=pytest.mark.exhaustive),
        pytest.param({"format": "bf16", "elementwise": {"forward": "bf16"}}, marks=pytest.mark.exhaustive),
        pytest.param({"format": "none", "elementwise": {"backward": "bf16"}}, marks=pytest.mark.exhaustive),
        {"format": "bf16", "output": "bf16", "elementwise": "bf16"},
    ],
    ids=str,
)
def test_backward_does_not_write_over_what_was_returned(options: dict[str, Any]) -> None:
    """Backward may reuse memory that nothing else uses, so that a view of a rounded result must count as a view."""
    torch.manual_seed(0)
    model = torch.compile(All(), backend="fpsim", options=options)
    loss, *returned = model([torch.randn(32, 16) for _ in range(4)])
    before = [tensor.clone() for tensor in returned]
    loss.backward()
    assert len(returned) == 8 and all(map(torch.equal, returned, before))


def test_autocast_rounds_what_it_casts() -> None:
    """Under autocast an operand is first cast to bfloat16, then rounded: the cast moves each of these to a tie."""
    above_ties = torch.tensor([1.0625, 1.3125, 1.5625, 1.8125]) * (1 + 2.0**-10)
    model, x = nn.Linear(6, 4, bias=False), above_ties[torch.arange(18) % 4].view(3, 6)
    with torch.no_grad():
        model.weight.copy_(above_ties[torch.arange(24) % 4].view(4, 6))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.compile(model, backend="fpsim", options={"format": "e4m3fn"})(x)
    operands = [fpsim.round(t.detach().bfloat16(), "e4m3fn") for t in (x, model.weight)]
    assert torch.equal(got, operands[0] @ operands[1].T)
    rounded_first = [fpsim.round(t.detach(), "e4m3fn").bfloat16() for t in (x, model.weight)]
    assert all((a != b).all() for a, b in zip(operands, rounded_first, strict=True))


def test_bfloat16_results_are_rounded_before_the_next_rounding_sees_them() -> None:
    """Inductor would keep a product in float32 until it is stored; the simulated chip would not."""
    a, b = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
    identity = torch.eye(64, dtype=torch.bfloat16)
    options = {"activation": "e5m4"}
    got = torch.compile(lambda a, b, i: (a * b) @ i, backend="fpsim", options=options)(a, b, identity)
    assert torch.equal(got, fpsim.round(a * b, "e5m4"))
    unrounded_first = fpsim.round(a.float() * b.float(), "e5m4").bfloat16()
    assert not torch.equal(got, unrounded_first)


def test_every_bfloat16_operation_before_a_rounding_has_a_bfloat16_result() -> None:
    """Inductor would keep a sum in float32 until its product is rounded."""
    a, b, c = torch.randn(3, 64, 64, dtype=torch.bfloat16)
    identity = torch.eye(64, dtype=torch.bfloat16)
    got = torch.compile(lambda a, b, c, i: ((a + b) * c) @ i, backend="fpsim", options={"activation": "e5m4"})(
        a, b, c, identity
    )
    assert torch.equal(got, fpsim.round((a + b) * c, "e5m4"))
    sum_in_float32 = ((a.float() + b.float()) * c.float()).bfloat16()
    assert not torch.equal(got, fpsim.round(sum_in_float32, "e5m4"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_rounded(mode: type[contextlib.AbstractContextManager]) -> None:
    model, x = exact_(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))), inputs()
    want = step(torch.compile(model, backend="fpsim_eager", options=OPTIONS), x)[0]
    assert not torch.equal(want, model(x))
    with mode():
        got = torch.compile(model, backend="fpsim", options=OPTIONS)(x)
    assert torch.equal(got, want)


def test_dynamic_shapes_compile_once_and_stay_exact() -> None:
    model = exact_(AttentionBlock())
    compiled = torch.compile(model, backend="fpsim", options=OPTIONS, dynamic=True)
    interpreted = torch.compile(model, backend="fpsim_eager", options=OPTIONS, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch, length in [(2, 4), (3, 5), (4, 7)]:
            x = inputs(batch, length)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            got = step(compiled, x)
            if (batch, length) != (2, 4):
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
            same_bits(got, step(interpreted, x))


def test_a_tied_weight_gathers_both_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6, bias=False)
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = exact_(Twice())
    x, fmt = inputs()[0, :, :6], "e3m1"
    w = fpsim.round(model.first.weight.detach(), fmt)
    q = fpsim.round(x, fmt)
    h = q @ w.T
    dy = torch.ones(4, 6)
    dh = dy @ w
    want = dy.T @ fpsim.round(h, fmt) + fpsim.round(dh, fmt).T @ q
    got = step(torch.compile(model, backend="fpsim_eager", options={"format": fmt}), x)
    same_bits(got, [fpsim.round(h, fmt) @ w.T, fpsim.round(dh, fmt) @ w, want])


def test_parameters_may_change_between_calls() -> None:
    model, x = exact_(nn.Linear(16, 4, bias=False)), inputs()
    compiled = torch.compile(model, backend="fpsim", options={"format": "e3m1"})
    for seed in (1, 2):
        exact_(model, seed)
        want = fpsim.round(x, "e3m1") @ fpsim.round(model.weight.detach(), "e3m1").T
        assert torch.equal(compiled(x), want)


def test_twenty_policies_in_one_process_are_all_rounded() -> None:
    """Beyond its recompile limit (8) Dynamo would only warn, and run the model eagerly, unrounded."""
    model, x = nn.Linear(16, 4, bias=False), torch.randn(2, 16)
    for mantissa_bits in range(1, 21):
        fmt = f"e8m{mantissa_bits}"
        with torch.no_grad():
            got = torch.compile(model, backend="fpsim_eager", options={"format": fmt})(x)
        want = fpsim.round(x, fmt) @ fpsim.round(model.weight.detach(), fmt).T
        assert torch.equal(got, want), fmt


def test_a_changed_options_dict_does_not_change_compiled_code() -> None:
    model, x = nn.Linear(16, 4, bias=False), torch.randn(2, 16)
    options = {"policy": fpsim.Policy(format="e4m3fn")}
    want = fpsim.round(x, "e4m3fn") @ fpsim.round(model.weight.detach(), "e4m3fn").T
    assert torch.equal(torch.compile(model, backend="fpsim_eager", options=options)(x), want)


def test_equal_values_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers share an input. It is rounded once, as each weight is, for forward and backward."""

    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)

    rounded: list[str] = []

    def counting(self: RoundingPass, graph: torch.fx.Graph) -> None:
        original(self, graph)
        rounded.extend(n.args[1] for n in graph.nodes if n.target is torch.ops.fpsim.round.default)

    original = RoundingPass.__call__
    monkeypatch.setattr(RoundingPass, "__call__", counting)
    step(torch.compile(Fan(), backend="fpsim_eager"), inputs())
    assert sorted(rounded) == ["e4m3fn"] * 4 + ["e5m2"]


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_the_backends_are_found_without_importing_fpsim(backend: str) -> None:
    assert backend in torch._dynamo.list_backends()


def refused(model, *args: Tensor, **options) -> str:
    """The message with which compiling is refused."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        torch.compile(model, backend="fpsim", options=options)(*args)
    assert isinstance(error.value.inner_exception, UnroundedError | ValueError | TypeError)
    return str(error.value.inner_exception)


class PairwiseDistances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)


def test_what_cannot_be_rounded_is_an_error_with_the_remedy() -> None:
    message = refused(nn.Sequential(PairwiseDistances()), torch.randn(5, 3))
    assert "aten._cdist_forward" in message and "gaps=" in message and "'0'" in message


def test_a_gap_may_be_accepted() -> None:
    x = torch.randn(5, 3)
    options = {"policy": "fp8_hybrid", "gaps": ["aten._cdist*"]}
    assert torch.equal(torch.compile(PairwiseDistances(), backend="fpsim", options=options)(x), torch.cdist(x, x))


def test_an_unknown_option_is_an_error_that_lists_the_valid_ones() -> None:
    message = refused(nn.Linear(4, 4), torch.randn(2, 4), activations="e4m3fn")
    assert "'activations'" in message and "did you mean 'activation'" in message and "gradient" in message


def test_a_format_that_the_model_cannot_carry_is_an_error() -> None:
    message = refused(nn.Linear(4, 4).bfloat16(), torch.randn(2, 4, dtype=torch.bfloat16), format="fp16")
    assert "e5m10" in message and "bfloat16" in message and "float32" in message


def test_derivatives_taken_inside_the_compiled_function_are_refused() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: (t @ t).sum())(x)

    assert "takes derivatives itself" in refused(gradient, torch.randn(3, 3))


def test_a_wider_format_than_the_carrier_changes_nothing() -> None:
    model, x = nn.Linear(4, 4).bfloat16(), torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(model, backend="fpsim", options={"format": "tf32"})(x), model(x))
