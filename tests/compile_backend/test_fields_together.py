"""Policies with several fields at once: saved copies, sums, other operations, accumulators, tiles, modules.

The judge is the model in plain torch, forward and backward, with the roundings that the fields name written out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim

#: The fields that hold in the whole model, and those of one module in their place.
FIELDS: dict[str, Any] = {
    "format": "e4m3fn/power_of_two",
    "accumulator": "hopper_fp8",
    "elementwise": "e8m10",
    "reductions": "bf16",
    "saved": {"product": "e5m2", "elementwise": "e4m3fn/mx:4"},
    "modules": {"second": {"format": "bf16", "wgrad": {"activation": "e4m3fn"}, "saved": "e5m2/tensor"}},
}


def product(a: Tensor, b: Tensor) -> Tensor:
    return fpsim.matmul(a, b, accumulator="hopper_fp8", format="e4m3fn/power_of_two")


def result(x: Tensor) -> Tensor:
    return fpsim.round(x, "e8m10")


def added(x: Tensor, axis: int) -> Tensor:
    """The sum along an axis in bf16, from the first number to the last one."""
    total = torch.zeros_like(x.select(axis, 0), dtype=torch.float64)
    for each in x.unbind(axis):
        total = fpsim.round(total + each.double(), "bf16")
    return total.unsqueeze(axis).to(x.dtype)


def saved(x: Tensor) -> Tensor:
    return fpsim.round(x, "e5m2")


def blocks(x: Tensor) -> Tensor:
    return fpsim.round(x, "e4m3fn/mx:4")


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class Layers(nn.Module):
    """Two linear layers, and a softmax and a product of activations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.softmax(h, -1) * h)


def by_hand(model: Layers, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The result, and the gradients of ``x`` and of the parameters."""
    (w, b), (w2, b2) = ((layer.weight.detach(), layer.bias.detach()) for layer in (model.first, model.second))
    h = product(x, w.T) + b
    exponentials = (h - h.amax(-1, keepdim=True)).exp()
    p = result(exponentials / added(exponentials, -1))
    q = result(p * h)
    y = torch.addmm(b2, bf16(q), bf16(w2).T)
    of_q = bf16(gradient) @ bf16(w2)
    of_w2 = fpsim.round(fpsim.round(q, "e5m2/tensor"), "e4m3fn").T @ bf16(gradient)
    of_p, of_h = result(of_q * blocks(h)), result(of_q * blocks(p))
    through = of_p * blocks(p)
    of_h = result(of_h + result(through - blocks(p) * added(through, -1)))
    of_w = product(saved(x).T, of_h)
    of_b = result(added(of_h, 0)[0])
    return [y, product(of_h, w), of_w.T, of_b, of_w2.T, gradient.sum(0)]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_field_rounds_what_the_others_have_made() -> None:
    torch.manual_seed(0)
    model, x, gradient = Layers(), drawn(6, 8, seed=1).requires_grad_(), drawn(6, 4, seed=2)
    y = torch.compile(model, backend="fpsim_eager", options=FIELDS)(x)
    y.backward(gradient)
    got = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    for name, one, other in zip(
        ("y", "x", "w", "b", "w2", "b2"), got, by_hand(model, x.detach(), gradient), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_profile_measures_copies_and_the_products_that_read_them() -> None:
    torch.manual_seed(0)
    model, x = Layers(), drawn(6, 8, seed=1).requires_grad_()
    sites = fpsim.profile(model, x, policy=FIELDS).sites
    [copy] = [site for site in sites if site.role == "saved" and site.path == "first"]
    [operand] = [site for site in sites if (site.kind, site.role, site.path) == ("wgrad", "activation", "first")]
    noise = (saved(x.detach()) - x.detach()).double().norm()
    torch.testing.assert_close(copy.statistics.noise, float(noise), rtol=1e-6, atol=0)
    kept = saved(x.detach())
    noise = (fpsim.round(kept, "e4m3fn/power_of_two") - kept).double().norm()
    torch.testing.assert_close(operand.statistics.noise, float(noise), rtol=1e-6, atol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def test_attention_in_tiles_reads_copies_in_backward_and_its_own_logarithms() -> None:
    """It multiplies matrices: its copies are those of products. Nothing else of the policy applies inside."""
    torch.manual_seed(0)
    model, x, gradient = Attention(), drawn(1, 10, 8, seed=1), drawn(1, 10, 8, seed=2)
    tiles = fpsim.FlashAttention(accumulator="bf16", block_q=4, block_k=4)
    fields = {name: value for name, value in FIELDS.items() if name != "modules"}
    compiled = torch.compile(model, backend="fpsim_eager", options={**fields, "attention": tiles})
    y = compiled(x)
    y.backward(gradient)
    layers = [model.q, model.k, model.v]
    q, k, v = (product(x[0], layer.weight.detach().T)[None] for layer in layers)
    call = (None, None, False, scale_of(8), 0, str(tiles), "")
    output, logarithms = torch.ops.fpsim.flash_attention(q, k, v, *call)
    assert torch.equal(y, output)
    copies = [saved(each) for each in (q, k, v, output)]
    gradients = torch.ops.fpsim.flash_attention_backward(gradient, *copies, logarithms, *call)
    for layer, of_result in zip(layers, gradients, strict=True):
        assert torch.equal(layer.weight.grad, product(saved(x[0]).T, of_result[0]).T)


def scale_of(length: int) -> float:
    """1 / sqrt(length) in float32."""
    return float(torch.tensor(length, dtype=torch.float64).rsqrt().float())
