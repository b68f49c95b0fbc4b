"""Scaled operands in compiled models: values of hardware, one scale per tensor, derivatives, statistics."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as functorch_config
from torch.func import grad
from torch.utils.checkpoint import checkpoint

import fpsim
from fpsim import Policy
from fpsim.compile_backend.functional import functional
from tests.shared.models import assert_all_equal, dyadic

SCALED = {"policy": "fp8_hybrid", "scale": "power_of_two"}
BACKENDS = ("fpsim", "fpsim_eager")

#: Small integers of both signs, so that sums of their products are exact.
integers = partial(dyadic, top=7, unit=1.0)


def scaled(x: Tensor, format: str) -> Tensor:
    return fpsim.round(x, format, overflow="sat_finite", scale="power_of_two")


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return {"y": y.detach(), "x": leaf.grad, **gradients}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_layer_is_torch_scaled_mm(backend: str) -> None:
    """`torch._scaled_mm` multiplies FP8 codes, then multiplies the result by both reciprocal scales, as a chip does."""
    layer = nn.Linear(32, 16, bias=False)
    layer.weight.data = integers(16, 32, seed=1) * 2.0**-20
    x = integers(48, 32, seed=2) * 2.0**30

    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = fpsim.power_of_two_scale(x, "e4m3fn")
        return (x * scale).to(torch.float8_e4m3fn), 1 / scale

    (a, a_scale), (b, b_scale) = codes(x), codes(layer.weight.detach())
    want = torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.float32)
    got = torch.compile(layer, backend=backend, options=SCALED)(x)
    assert torch.equal(got, want)
    assert not torch.equal(got, torch.compile(layer, backend=backend)(x))  # all saturated


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_layers_are_those_of_torchao(backend: str) -> None:
    """torchao's Float8Linear with scales rounded to powers of two, emulated, forward and all gradients.

    Skipped without torchao (0.18.0 was compared): transformers imports it wherever it is installed, in seconds.
    """
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True, round_scales_to_power_of_2=True)
    for power in (-20, 0, 30):
        model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 16, bias=False))
        model[0].weight.data = integers(64, 32, seed=20) * 2.0**-power
        model[1].weight.data = integers(16, 64, seed=21, top=31) * 2.0**-9
        x, dy = integers(48, 32, seed=22, top=31) * 2.0**power, integers(48, 16, seed=23, top=100) * 2.0**-30
        want = step(float8.convert_to_float8_training(deepcopy(model), config=config), x, dy)
        got = step(torch.compile(model, backend=backend, options=SCALED), x, dy)
        assert_all_equal({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operand_has_its_own_scale(backend: str) -> None:
    """Queries, keys and values are slices of one tensor, and of very different magnitudes."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.qkv.weight.data = integers(24, 8, seed=3) * torch.tensor([1.0, 2.0**-12, 2.0**12]).repeat_interleave(
                8
            ).unsqueeze(1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(-1, -2)) @ v

    x = integers(2, 6, 8, seed=4)

    def by_hand(model: Attention) -> Tensor:
        q, k, v = F.linear(scaled(x, "e4m3fn"), scaled(model.qkv.weight, "e4m3fn")).chunk(3, -1)
        q, k, v = (scaled(part, "e4m3fn") for part in (q, k, v))
        return scaled(q @ k.transpose(-1, -2), "e4m3fn") @ v

    model = Attention()
    assert torch.equal(torch.compile(model, backend=backend, options=SCALED)(x), by_hand(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions(backend: str) -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False)
    layer.weight.data = integers(6, 4, 3, 3, seed=5) * 2.0**-18
    x, dy = integers(2, 4, 7, 7, seed=6) * 2.0**20, integers(2, 6, 5, 5, seed=7) * 2.0**-40
    got = step(torch.compile(layer, backend=backend, options=SCALED), x, dy)
    a, w, g = scaled(x, "e4m3fn"), scaled(layer.weight.detach(), "e4m3fn"), scaled(dy, "e5m2")
    want = {
        "y": F.conv2d(a, w),
        "x": torch.nn.grad.conv2d_input(x.shape, w, g),
        "_orig_mod.weight": torch.nn.grad.conv2d_weight(a, w.shape, g),
    }
    assert_all_equal(got, want)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_what_is_recomputed_is_scaled_as_before(rounding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x, dy = torch.randn(10, 16), torch.randn(10, 8) * 1e-6
    options = {**SCALED, "rounding": rounding}

    def result(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {name.removeprefix("model."): value for name, value in step(model, x, dy).items()}

    want = result(torch.compile(model, backend="fpsim_eager", options=options))
    again = result(torch.compile(Checkpointed(model), backend="fpsim_eager", options=options))
    assert_all_equal({name.replace("model.", ""): value for name, value in again.items()}, want)
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=0.0):
        assert_all_equal(result(torch.compile(model, backend="fpsim_eager", options=options)), want)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_compiled_bits_are_interpreted_bits(rounding: str) -> None:
    torch.manual_seed(0)
    layer, options = nn.Linear(24, 16, bias=False), {**SCALED, "rounding": rounding}
    x, dy = integers(8, 24, seed=8) / 3, integers(8, 16, seed=9) * 1e-12
    results = []
    for backend in BACKENDS:
        torch.manual_seed(2)
        results.append(step(torch.compile(layer, backend=backend, options=options), x, dy))
    assert_all_equal(*results)


def test_scales_follow_new_shapes_and_numbers() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data = integers(4, 8, seed=10)
    compiled = torch.compile(layer, backend="fpsim", options=SCALED, dynamic=True)
    for rows, power in ((3, 0), (5, 20), (9, -30)):
        x = integers(rows, 8, seed=rows, top=100) * 2.0**power
        assert torch.equal(compiled(x), F.linear(scaled(x, "e4m3fn"), scaled(layer.weight, "e4m3fn")))


def test_under_autocast_what_is_cast_is_scaled() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data = integers(4, 8, seed=11)
    x = integers(5, 8, seed=12, top=100) * 2.0**30
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(layer, backend="fpsim", options=SCALED)(x)
    want = F.linear(scaled(x.bfloat16(), "e4m3fn"), scaled(layer.weight.bfloat16(), "e4m3fn"))
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_derivatives_pass_the_scale_by() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    state = {name: value.detach() for name, value in model.named_parameters()}
    x = torch.randn(7, 6, dtype=torch.float64) * 1e-3
    call = functional(model, Policy(format="e4m3fn", scale="power_of_two"))

    def by_hand(state: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(F.linear(scaled(x, "e4m3fn"), scaled(state["0.weight"], "e4m3fn"), state["0.bias"]))
        return F.linear(scaled(h, "e4m3fn"), scaled(state["2.weight"], "e4m3fn"), state["2.bias"])

    torch.testing.assert_close(call(state, (x,), {}), by_hand(state), rtol=1e-12, atol=0)
    got = grad(lambda state: call(state, (x,), {}).square().sum())(state)
    want = grad(lambda state: by_hand(state).square().sum())(state)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_the_plan_names_the_scale() -> None:
    plan = fpsim.explain(nn.Linear(4, 3), torch.randn(2, 4), policy={"gradient": "e5m2/power_of_two", "weight": "bf16"})
    casts = {(site.kind, site.role): str(site.cast) for site in plan.sites}
    assert casts["wgrad", "gradient"] == "e5m2/nearest_even/ovf_inf/power_of_two"
    assert casts["fprop", "weight"] == "e8m7/nearest_even/ovf_inf"


def test_the_profile_counts_in_the_scaled_numbers() -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[448.0, 2.0**-9, 2.0**-6, 0.0], [1.0, 2.0**-10, 3.0, 2.0**-12]]) * 2.0**40
    profile = fpsim.profile(layer, torch.ones(3, 4), policy=SCALED)
    (weight,) = [site.statistics for site in profile.sites if (site.kind, site.role) == ("fprop", "weight")]
    assert (weight.elements, weight.zeros, weight.underflows, weight.subnormals) == (8, 1, 2, 1)
    assert (weight.saturations, weight.overflows, weight.amax) == (0, 0, 448 * 2.0**40)
    plain = fpsim.profile(layer, torch.ones(3, 4), policy={})
    (weight,) = [site.statistics for site in plain.sites if (site.kind, site.role) == ("fprop", "weight")]
    assert weight.saturations == 7


def test_float16_operands_are_refused() -> None:
    layer = nn.Linear(4, 2).half()
    with pytest.raises((ValueError, BackendCompilerFailed), match="convert them to bfloat16 or float32"):
        torch.compile(layer, backend="fpsim_eager", options=SCALED)(torch.ones(3, 4).half())
