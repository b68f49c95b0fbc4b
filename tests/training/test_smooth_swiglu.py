"""Smooth-SwiGLU, judged by the gated unit that it takes the place of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim.training.smooth_swiglu import smooth_swiglu


class TinyMLP(nn.Module):
    """A gated unit as Llama has it, with biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(6, 10, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(10, 6, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TinyMLP(), TinyMLP(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def model(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    tiny = Tiny().to(dtype)
    with torch.no_grad():
        tiny.second.up_proj.weight[:, 0] *= 50  # an outlier
    x = torch.randn(2, 3, 6, dtype=dtype)
    x[0, 0] = 0  # in the first unit with zero biases, a token of zeros has no magnitude
    return tiny, x


@pytest.mark.parametrize("granularity", ["token", "channel"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_results_and_gradients_are_those_of_the_unit(granularity: str, detach: bool) -> None:
    plain, x = model()
    smooth = smooth_swiglu(copy.deepcopy(plain), granularity, detach=detach)  # type: ignore[arg-type]
    assert smooth.state_dict().keys() == plain.state_dict().keys()
    results = [module(x) for module in (plain, smooth)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)
    for result in results:
        result.square().sum().backward()
    for p, q in zip(plain.parameters(), smooth.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_with_powers_of_two_the_bits_are_those_of_the_unit(granularity: str) -> None:
    plain, x = model(torch.float32)
    wanted = plain(x)
    smooth = smooth_swiglu(copy.deepcopy(plain), granularity, power_of_two=True)  # type: ignore[arg-type]
    assert torch.equal(smooth(x), wanted)


def input_of_down_proj(module: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    module.second.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(x)
    return seen[0]


def test_what_is_rounded_has_no_quadratic_outlier() -> None:
    """A token's product divided by its linear branch is at most the gate; a channel divided by its own is at most 1."""
    plain, x = model()
    product = input_of_down_proj(copy.deepcopy(plain), 100 * x)
    token, channel = (input_of_down_proj(smooth_swiglu(copy.deepcopy(plain), g), 100 * x) for g in ("token", "channel"))
    inner = 100 * x + plain.first(100 * x)
    gate, up = plain.second.act_fn(plain.second.gate_proj(inner)), plain.second.up_proj(inner)
    torch.testing.assert_close(token, gate * up / up.abs().amax(-1, keepdim=True), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(channel, product / product.abs().amax((0, 1)), rtol=1e-12, atol=1e-13)
    assert product.abs().max() > 50 * token.abs().max() and channel.abs().max() == 1


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_the_backend_rounds_the_scaled_product_in_down_proj(granularity: str) -> None:
    """One scale for each product of FP8: the bits are those of rounded operands, multiplied eagerly."""
    torch.manual_seed(0)
    unit = smooth_swiglu(TinyMLP(bias=False), granularity, power_of_two=True)  # type: ignore[arg-type]
    module, tokens = nn.Sequential(nn.Embedding(9, 6), unit), torch.tensor([3, 1, 4, 8])
    options = {"modules": {"1.down_proj": {"activation": "e4m3fn/tensor", "weight": "e4m3fn/row"}}}
    plan = fpsim.explain(module, tokens, policy=options)
    assert {(site.path, site.role) for site in plan.sites if site.kind == "fprop" and site.cast} == {
        ("1.down_proj", "activation"),
        ("1.down_proj", "weight"),
    }
    got = torch.compile(module, backend="fpsim_eager", options={"policy": fpsim.Policy(**options)})(tokens)
    x = module[0](tokens)
    gate, up = unit.act_fn(unit.gate_proj(x)), unit.up_proj(x)
    largest = up.abs().amax(-1, keepdim=True) if granularity == "token" else (gate * up).abs().amax(0)
    scale = torch.exp2(torch.floor(torch.log2(largest.double())) + 1).float()
    weight = unit.down_proj.weight if granularity == "token" else unit.down_proj.weight * scale
    h = fpsim.round(gate * (up / scale) if granularity == "token" else gate * up / scale, "e4m3fn/tensor")
    wanted = h.double() @ fpsim.round(weight, "e4m3fn/row").double().T
    wanted = wanted * scale if granularity == "token" else wanted
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_units_are_found_and_others_are_refused() -> None:
    assert type(smooth_swiglu(TinyMLP())).__name__ == "SmoothSwiGLU"
    with pytest.raises(ValueError, match="Linear has no gated unit"):
        smooth_swiglu(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown granularity 'tensor'"):
        smooth_swiglu(TinyMLP(), "tensor")  # type: ignore[arg-type]
