"""`Policy.saved`: backward reads rounded copies of activations, and forward does not.

The judge is plain torch: `torch.autograd.graph.saved_tensors_hooks` rounds what autograd saves, by torch's own casts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fpsim

Round = Callable[[Tensor], Tensor]


def fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def mx(x: Tensor) -> Tensor:
    """Blocks of 16 along the last axis, with the scales of OCP's rule: e4m3fn has its largest exponent at 8.

    A transposed view has its blocks where the tensor has them that it is a view of.
    """
    if x.stride(-1) != 1:
        return mx(x.mT).mT
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    scales = 2.0 ** (blocks.abs().amax(-1, keepdim=True).frexp().exponent - 1 - 8)
    return ((blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scales).reshape(x.shape)


def gradient_of(y: Tensor) -> Tensor:
    return ((torch.arange(y.numel()) * 5 % 17 - 8) / 4).reshape(y.shape).to(y.dtype)


def outcome(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The result for ``x``, and the gradients of ``x`` and of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x) if call is None else call(x)
    y.backward(gradient_of(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextlib.contextmanager
def saving(model: nn.Module, rounded: Round):
    """What autograd saves is rounded, except parameters, their views, tables, and one number for each row."""
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor:
        is_fixed = x.untyped_storage().data_ptr() in fixed or x.shape == getattr(model, "table_shape", None)
        return rounded(x) if x.is_floating_point() and not is_fixed and x.shape[-1] != 1 else x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), (x - y).abs().max()


def dyadic(*shape: int, unit: float = 1 / 8) -> Tensor:
    """Multiples of ``unit``, in float64: their products and sums are exact, whatever the order of additions."""
    return torch.randint(-int(1 / unit), int(1 / unit) + 1, shape).double() * unit


def exact(model: nn.Module) -> nn.Module:
    """The model in float64 with parameters and buffers that are multiples of 1/8."""
    model = model.double()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = dyadic(*tensor.shape)
    return model


class Gated(nn.Module):
    """Products, activation functions that save their argument or result, a product of two activations, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.register_buffer("table", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(x).square() * torch.relu(self.up(x)) * self.table
        y = self.down(h)
        z = y @ x.mT @ y
        return torch.tanh(z / 64) * torch.sigmoid(z / 256)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).square())


class Checkpointed(nn.Module):
    """Two checkpointed regions, one after the other, and a layer that reads what comes out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def block(self, x: Tensor, number: int) -> Tensor:
        return torch.relu(self.layers[number](x)).square() * x

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[3](x)
        for number in range(2):
            x = checkpoint(self.block, x, number, use_reentrant=False)
        return self.layers[2](x / 2**16)


class Deep(nn.Module):
    """One region in which every value has two ways to the input, 25 times."""

    def forward(self, x: Tensor) -> Tensor:
        def residual(x: Tensor) -> Tensor:
            for _ in range(25):
                x = x + torch.relu(x).square() / 1024
            return x

        return checkpoint(residual, x.square(), use_reentrant=False).square()


class Cube(torch.autograd.Function):
    """A backward that computes with what was saved before it meets the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * (x * x) * gradient


class Cubed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(super().forward(x))


class Halves(nn.Linear):
    """Several results of one operator, each of which is saved."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = super().forward(x).chunk(2, -1)
        return a.square() * b.square()


class Tokens(nn.Module):
    """Integers are inputs too: the embeddings are activations, the angles of their positions are a table."""

    table_shape = (16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 16), nn.Linear(16, 16)
        self.register_buffer("frequencies", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        tokens, positions = (x.detach()[..., 0] * 3).long().abs(), torch.arange(x.shape[1], dtype=x.dtype)
        angles = (positions[:, None] * self.frequencies).exp2()
        return self.head(self.embed(tokens).square() * angles) + x[..., :16].square()


CASES: list[tuple[Any, tuple[int, ...]]] = [
    (Gated, (2, 16, 16)),
    (Checkpointed, (16, 16)),
    (lambda: Cubed(16, 16), (16, 16)),
    (Tokens, (2, 16, 32)),
]
MORE: list[tuple[Any, tuple[int, ...]]] = [
    (Convolution, (2, 2, 16, 16)),
    (Deep, (2, 16)),
    (lambda: Halves(16, 8), (4, 16)),
]
ALL = [
    *((kind, shape, "e4m3fn/mx:16:floor", mx) for kind, shape in CASES),
    *((kind, shape, "e4m3fn", fp8) for kind, shape in (*CASES, *MORE)),
]


@pytest.mark.parametrize(("kind", "shape", "cast", "rounded"), ALL)
def test_backward_reads_what_hooks_round(kind: Any, shape: tuple[int, ...], cast: str, rounded: Round) -> None:
    torch.manual_seed(0)
    model, x = exact(kind()), dyadic(*shape, unit=1 / 64)
    with saving(model, rounded):
        want = outcome(model, x)
    assert not all(map(torch.equal, want, outcome(model, x))), "the rounding matters"
    compiled = torch.compile(model, backend="fpsim_eager", options={"saved": cast})
    same(outcome(model, x, compiled), want)


class Layer(torch.autograd.Function):
    """A linear layer by hand: fprop in e4m3fn, the saved copy in bfloat16, and wgrad reads it in e5m2."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(bf16(x), weight)
        return fp8(x) @ fp8(weight).mT

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ fp8(weight), gradient.mT @ x.to(torch.float8_e5m2).to(x.dtype)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(fp8(x))
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).square())


def test_inductor_may_save_what_it_likes() -> None:
    torch.manual_seed(0)
    model, x = exact(Squares()), dyadic(16, 16, unit=1 / 512)
    with saving(model, mx):
        want = outcome(model, x)
    with functorch_config.patch(activation_memory_budget=0.0):
        same(outcome(model, x, torch.compile(model, backend="fpsim", options={"saved": "e4m3fn/mx:16:floor"})), want)


def test_products_round_the_copies_that_they_read() -> None:
    torch.manual_seed(0)
    model, x = exact(Squares()), dyadic(16, 16, unit=1 / 512)
    options = {
        "activation": "e4m3fn/sat_finite",
        "weight": "e4m3fn/sat_finite",
        "wgrad": {"activation": "e5m2"},
        "saved": {"product": "bf16", "elementwise": "e4m3fn"},
    }
    compiled = torch.compile(model, backend="fpsim_eager", options=options)
    want = outcome(
        model, x, lambda x: Layer.apply(Square.apply(Layer.apply(x, model.first.weight)), model.second.weight)
    )
    same(outcome(model, x, compiled), want)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_keep_their_statistics(kind: type[nn.Module]) -> None:
    """The argument of a norm is rounded; mean and standard deviation, which it keeps for backward, are not."""
    torch.manual_seed(0)
    norm, x = kind(16, eps=1e-5).double(), torch.randn(4, 16).double()
    compiled = torch.compile(norm, backend="fpsim_eager", options={"saved": "e4m3fn"})
    y, dx, dw, *_ = outcome(norm, x, compiled)
    mean = x.mean(-1, keepdim=True) if kind is nn.LayerNorm else 0
    rstd = (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    gradient, hat = gradient_of(y), (fp8(x) - mean) * rstd
    through_mean = gradient.mean(-1, keepdim=True) if kind is nn.LayerNorm else 0
    want = rstd * (gradient - through_mean - hat * (gradient * hat).mean(-1, keepdim=True))
    torch.testing.assert_close(dx, want, rtol=1e-12, atol=1e-12)
    kept = hat if kind is nn.LayerNorm else fp8(x * rstd)  # torch composes RMSNorm of operations that save their own
    torch.testing.assert_close(dw, (gradient * kept).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(y, outcome(norm, x, torch.compile(norm, backend="fpsim_eager", options={"format": "none"}))[0])


def test_attention_reads_copies_of_its_operands_and_of_the_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 4).double().requires_grad_() for _ in range(3))
    compiled = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend="fpsim_eager", options={"saved": "e4m3fn"}
    )
    gradient = torch.randn(1, 2, 8, 4).double()
    compiled(q, k, v).backward(gradient)
    root = 2**-0.5  # torch multiplies q and k by the root of the scale, and multiplies the results
    p = torch.softmax(q @ k.mT / 2, -1).detach()
    of_p = gradient @ fp8(v).mT
    of_scores = fp8(p) * (of_p - (of_p * fp8(p)).sum(-1, keepdim=True))
    want_v = fp8(p).mT @ gradient
    want_q, want_k = (root * of_scores @ fp8(k * root), root * of_scores.mT @ fp8(q * root))
    for got, want in zip((q, k, v), (want_q, want_k, want_v), strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-11, atol=1e-11)


class Gated(nn.Module):
    """Fused attention, whose result the derivative of a multiplication reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2, 4, 8, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * self.gate


@pytest.mark.parametrize("cast", ["e4m3fn/block:4x4", "e4m3fn/column", "e4m3fn/group:32", "e4m3fn/mx:4"])
def test_tiles_and_groups_are_those_of_the_tensor_whatever_its_strides(cast: str) -> None:
    """Fused attention returns heads that lie side by side in memory."""
    torch.manual_seed(0)
    model, qkv = Gated(), [torch.randn(2, 8, 4, 16).transpose(1, 2) for _ in range(3)]
    y = torch.nn.functional.scaled_dot_product_attention(*qkv)
    assert not y.is_contiguous()
    compiled = torch.compile(model, backend="fpsim_eager", options={"saved": cast, "attention": "keep"})
    compiled(*qkv).backward(torch.ones_like(y))
    assert torch.equal(model.gate.grad, fpsim.round(y.contiguous(), cast))


def test_forward_has_its_bits_and_its_random_numbers() -> None:
    torch.manual_seed(0)
    model, x = Squares(), torch.randn(16, 16)
    options = {"activation": "e4m3fn/stochastic", "gradient": "e5m2", "output": "bf16", "elementwise": "e5m10"}
    results = []
    for saved in ({}, {"saved": "e4m3fn/stochastic/group:16"}, {"saved": "bf16"}):
        compiled = torch.compile(model, backend="fpsim_eager", options=options | saved)
        torch.manual_seed(1)
        results.append(outcome(model, x, compiled))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][1], results[1][1])


def test_the_policy_of_the_module_that_reads_a_copy_decides() -> None:
    torch.manual_seed(0)
    model, x = exact(Squares()), dyadic(16, 16, unit=1 / 512)
    compiled = torch.compile(model, backend="fpsim_eager", options={"saved": {"product": "bf16"}, "skip": "first"})
    h = x @ model.first.weight.mT
    gradient = gradient_of(h)
    *_, first, second = outcome(model, x, compiled)
    assert torch.equal(second, gradient.mT @ bf16(h * h))
    assert torch.equal(first, (2 * h * (gradient @ model.second.weight)).mT @ x)


class Residual(nn.Module):
    """Autograd adds up two gradients of x and of h, outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(x)
        return h * h + self.second(h)


def test_sums_of_gradients_need_no_module() -> None:
    torch.manual_seed(0)
    model, x = exact(Residual()), dyadic(16, 16, unit=1 / 512)
    options = {"saved": {"elementwise": "bf16"}, "modules": {"second": {"saved": {"product": "bf16"}}}}
    compiled = torch.compile(model, backend="fpsim_eager", options=options)
    h = x + x @ model.first.weight.mT
    y, to_x, first, second = outcome(model, x, compiled)
    gradient = gradient_of(y)
    to_h = 2 * bf16(h) * gradient + gradient @ model.second.weight
    wanted = [to_h + to_h @ model.first.weight, to_h.mT @ x, gradient.mT @ bf16(h)]
    torch.testing.assert_close([to_x, first, second], wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(bf16(h), h)


def test_the_plan_lists_the_copies() -> None:
    plan = fpsim.explain(Squares(), torch.randn(4, 16), policy={"format": "bf16", "saved": "e4m3fn/block:16"})
    found = [
        (s.path, s.operator, s.direction, s.shape, s.contracted, s.scales) for s in plan.sites if s.role == "saved"
    ]
    assert sorted(found) == [
        ("", "aten.pow", "backward", (4, 16), (1,), "4 along 1"),
        ("first", "aten.mm", "backward", (4, 16), (1,), "4 along 1"),
        ("second", "aten.mm", "backward", (4, 16), (1,), "4 along 1"),
    ]
    assert "saved" in str(plan)
    assert not any(s.role == "saved" for s in fpsim.explain(Squares(), torch.randn(4, 16), policy="bf16").sites)


def test_policies_say_what_is_saved() -> None:
    policy = fpsim.Policy(saved={"product": "e5m2", "elementwise": "e4m3fn/group:16"}, modules={"a": {"saved": "bf16"}})
    assert fpsim.Policy.from_json(policy.to_json()) == policy
    assert (str(policy.saved_cast("product")), policy.is_stochastic) == ("e5m2/nearest_even/ovf_inf", False)
    assert fpsim.Policy(saved="e4m3fn/stochastic").is_stochastic
    for wrong, message in (
        ({"gradient": "e5m2"}, "unknown reader 'gradient' in saved: use product, elementwise"),
        ("e4m3fn/tensor/history:4", "saved activations have no scales that other steps determine"),
        ("e4m3fn/power:3", "unknown mode"),
    ):
        with pytest.raises(ValueError, match=message):
            fpsim.Policy(saved=wrong)


def test_complex_activations_are_refused() -> None:
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones_like(angles), angles))

    x, angles = torch.randn(4, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    with pytest.raises(Exception, match=r"activation of torch\.complex64, which saved cannot"):
        torch.compile(rotate, backend="fpsim_eager", options={"saved": "bf16"})(x, angles)
