"""`profile` measures rounding at every site in a real step, and leaves the model unchanged."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import fpsim
from fpsim.casts import parse_cast
from fpsim.compile_backend import (
    Gap,
    ProductStatistics,
    Profile,
    Profiler,
    Site,
    SiteStatistics,
    Statistics,
)
from fpsim.compile_backend.observe.rounding_statistics import measure
from fpsim.compile_backend.report.page import page
from fpsim.compile_backend.report.profiles import bars
from fpsim.formats import parse_format
from tests.shared.models import dyadic

HYBRID = {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2/sat_finite"}


#: Random multiples of 2^-6: more bits than formats of eight bits have, yet sums of products are exact.
numbers = partial(dyadic, top=99, unit=2.0**-6)


def linear(inputs: int = 8, outputs: int = 6, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(numbers(outputs, inputs, seed=1))
        if bias:
            layer.bias.copy_(numbers(outputs, seed=2, unit=1.0))
    return layer


def only_site(profile: Profile, **attributes: Any) -> SiteStatistics:
    """The one site with these attributes."""
    (site,) = (site for site in profile.sites if all(getattr(site, key) == value for key, value in attributes.items()))
    return site


def rounded(x: Tensor, name: str) -> Tensor:
    return fpsim.round(x.detach(), name, overflow="sat_finite")


def statistics_of(x: Tensor, name: str) -> Statistics:
    """The statistics of rounding ``x``, by `measure`, which is tested against exact arithmetic."""
    return measure(x.detach(), rounded(x, name), parse_format(name))


def relative(got: Tensor, reference: Tensor) -> float:
    a, b = got.double().numpy(), reference.double().numpy()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def close(a: float) -> Any:
    return pytest.approx(a, rel=1e-12)


# -- one step ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_linear() -> tuple[nn.Linear, Tensor, Tensor, Profile]:
    """A linear layer whose gradient is not uniform, its input, the gradient of its output, and its profile."""
    layer, x, factor = linear(), numbers(5, 8, seed=3).requires_grad_(), numbers(5, 6, seed=4)
    profile = fpsim.profile(layer, x, policy=HYBRID, loss=lambda y: (y * factor).sum())
    return layer, x, factor, profile


def test_every_operand_of_a_linear_layer_is_a_site(of_linear: tuple[nn.Linear, Tensor, Tensor, Profile]) -> None:
    layer, x, gradient, profile = of_linear
    operands = {
        ("fprop", "activation"): (x, "e4m3fn"), ("fprop", "weight"): (layer.weight, "e4m3fn"),
        ("dgrad", "gradient"): (gradient, "e5m2"), ("dgrad", "weight"): (layer.weight, "e4m3fn"),
        ("wgrad", "gradient"): (gradient, "e5m2"), ("wgrad", "activation"): (x, "e4m3fn"),
    }  # fmt: skip
    assert len(profile.sites) == 6 and profile.gaps == ()
    for (kind, role), (operand, name) in operands.items():
        site = only_site(profile, kind=kind, role=role)
        assert site.statistics == statistics_of(operand, name)
        assert str(site.cast) == f"{name}/nearest_even/sat_finite"
        assert site.path == "" and site.dtype == "float32" and site.statistics.elements == operand.numel()


def test_every_product_is_compared_with_that_of_the_unrounded_operands(
    of_linear: tuple[nn.Linear, Tensor, Tensor, Profile],
) -> None:
    """Neither product contains the bias, which is much larger."""
    layer, x, gradient, profile = of_linear
    a, w, g = (rounded(t, n) for t, n in ((x, "e4m3fn"), (layer.weight, "e4m3fn"), (gradient, "e5m2")))
    exact = {
        "fprop": (a @ w.T, x.detach() @ layer.weight.detach().T),
        "dgrad": (g @ w, gradient @ layer.weight.detach()),
        "wgrad": (g.T @ a, gradient.T @ x.detach()),
    }
    assert [product.kind for product in profile.products] == ["fprop", "dgrad", "wgrad"]
    for product in profile.products:
        assert product.relative_error == close(relative(*exact[product.kind])), product.kind
        assert product.runs == 1 and product.path == ""
    assert profile.products[0].operator == "aten.addmm" and profile.products[0].shapes == ((5, 8), (8, 6))
    for site in profile.sites:
        assert profile.relative_error(site) == profile.products[site.product].relative_error
        assert profile.products[site.product].kind == site.kind


def test_the_values_are_those_of_the_backend() -> None:
    """The second layer of the profile has the inputs that rounding in the first layer produces."""
    model = nn.Sequential(linear(), nn.ReLU(), linear(6, 4))
    x = numbers(5, 8, seed=3)
    h = F.relu(F.linear(rounded(x, "e4m3fn"), rounded(model[0].weight, "e4m3fn"), model[0].bias.detach()))
    profile = fpsim.profile(model, x, policy=HYBRID)
    assert only_site(profile, path="2", kind="fprop", role="activation").statistics == statistics_of(h, "e4m3fn")
    ones = torch.ones(5, 4)
    g = torch.where(h > 0, ones @ rounded(model[2].weight, "e4m3fn"), 0)
    assert only_site(profile, path="0", kind="wgrad", role="gradient").statistics == statistics_of(g, "e5m2")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_carriers(dtype: torch.dtype) -> None:
    layer, x = linear(bias=False).to(dtype), numbers(5, 8, seed=3).to(dtype)
    profile = fpsim.profile(layer, x, policy={"format": "e3m2fn"})
    site = only_site(profile, kind="fprop", role="activation")
    assert site.dtype == str(dtype).removeprefix("torch.")
    assert site.statistics == statistics_of(x, "e3m2fn")


def test_numbers_that_are_none_and_numbers_out_of_range() -> None:
    layer = linear(bias=False)
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -500.0, 1e-40, 1e-4, 0.0]])
    got = only_site(fpsim.profile(layer, x, policy={"format": "e4m3fn"}), kind="fprop", role="activation").statistics
    assert (got.elements, got.nans, got.infinities, got.saturations, got.underflows, got.zeros) == (8, 1, 2, 2, 2, 1)
    assert got.overflows == 0 and got.amax == torch.tensor(1e30).item()
    overflowed = fpsim.profile(layer, x, policy={"format": "e5m2"})
    got = only_site(overflowed, kind="fprop", role="activation").statistics
    assert (got.saturations, got.overflows, got.sqnr) == (0, 1, -math.inf)
    assert math.isnan(overflowed.products[0].relative_error)


def test_all_zeros() -> None:
    layer = linear(bias=False)
    profile = fpsim.profile(layer, torch.zeros(3, 8), policy={"format": "e4m3fn"})
    got = only_site(profile, kind="fprop", role="activation").statistics
    assert (got.zeros, got.amax, got.sqnr, got.exponents) == (24, 0, math.inf, ())
    assert profile.products[0].relative_error == 0


def test_what_stays_unrounded_is_measured_too() -> None:
    x = numbers(5, 8, seed=3)
    profile = fpsim.profile(linear(bias=False), x, policy={"weight": "e2m1fn"})
    site = only_site(profile, kind="fprop", role="activation")
    assert site.cast is None and site.statistics == measure(x, x)
    assert site.statistics.sqnr == math.inf and site.statistics.exponents


def test_results_and_other_operations() -> None:
    layer, x = linear(), numbers(5, 8, seed=3)
    y = layer(x).detach()
    policy = {"activation": "none", "weight": "none", "gradient": "none", "format": "none", "output": "e4m3fn"}
    profile = fpsim.profile(lambda x: torch.tanh(layer(x)), x, policy=policy | {"elementwise": {"forward": "bf16"}})
    of_product = only_site(profile, role="output", kind="fprop")
    assert of_product.product is None and profile.relative_error(of_product) is None
    assert of_product.statistics == statistics_of(y, "e4m3fn")
    result = only_site(profile, operator="aten.tanh", role="result")
    h = torch.tanh(rounded(y, "e4m3fn"))
    assert (result.kind, result.direction) == (None, "forward")
    assert result.statistics == measure(h, fpsim.round(h, "bf16"), parse_format("bf16"))
    assert profile.products[0].relative_error == 0  # of the operands; the result is a site of its own


def test_stochastic_rounding_is_measured_as_it_is_drawn() -> None:
    x, layer = numbers(16, 8, seed=3), linear(bias=False)
    policy = {"format": "e3m2fn", "rounding": "stochastic"}
    torch.manual_seed(5)
    first = fpsim.profile(layer, x, policy=policy)
    assert fpsim.profile(layer, x, policy=policy) == first  # the generator is put back
    torch.manual_seed(6)
    assert fpsim.profile(layer, x, policy=policy) != first
    torch.manual_seed(5)
    y = torch.compile(layer, backend="fpsim_eager", options=policy)(x)
    assert first.products[0].relative_error == close(relative(y.detach(), (x @ layer.weight.T).detach()))


# -- every kind of product ---------------------------------------------------------------------------------------------

IMAGE = numbers(2, 4, 6, 6, seed=5)
MATRIX, OTHER, VECTOR = numbers(4, 5, seed=6), numbers(5, 3, seed=7), numbers(5, seed=8)
BATCH, BATCH2 = numbers(3, 4, 5, seed=9), numbers(3, 5, 2, seed=10)


def conv(weight: Tensor, **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, **settings)


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "mm": (torch.mm, MATRIX, OTHER),
    "bmm": (torch.bmm, BATCH, BATCH2),
    "mv": (torch.mv, MATRIX, VECTOR),
    "dot": (torch.dot, VECTOR, VECTOR.flip(0)),
    "outer": (torch.outer, VECTOR, VECTOR.flip(0)),
    "addmm": (lambda a, b: torch.addmm(100 * torch.ones(3), a, b, beta=3, alpha=0.5), MATRIX, OTHER),
    "baddbmm": (lambda a, b: torch.baddbmm(100 * torch.ones(2), a, b, beta=2, alpha=4), BATCH, BATCH2),
    "one row": (lambda a, b: torch.addmm(100 * torch.ones(3), a, b), MATRIX[:1], OTHER),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), BATCH, BATCH2),
    "conv2d": (lambda x, w: F.conv2d(x, w, 100 * torch.ones(3), padding=1), IMAGE, numbers(3, 4, 3, 3, seed=11)),
    "strided": (lambda x, w: F.conv2d(x, w, stride=2, dilation=2), IMAGE, numbers(3, 4, 2, 2, seed=11)),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), IMAGE, numbers(6, 2, 3, 3, seed=12)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4), IMAGE, numbers(4, 1, 3, 3, seed=12)),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), IMAGE, numbers(4, 3, 2, 2, seed=13)),
}  # fmt: skip


def gradients(function: Callable[..., Tensor], a: Tensor, b: Tensor, upstream: Tensor) -> list[Tensor]:
    """The product without its addend, and its two derivatives, in float64."""
    a, b = (t.detach().double().requires_grad_() for t in (a, b))
    zeros = [torch.zeros_like(t) for t in (a, b)]
    product = function(a, b) - function(*zeros)
    return [product.detach(), *torch.autograd.grad(product, (a, b), upstream.double())]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_every_kind_of_product(name: str) -> None:
    """The errors are those of the same function in float64, of rounded operands and of unrounded ones."""
    function, a, b = FUNCTIONS[name]
    torch.set_default_dtype(torch.float64)  # for the constants within the functions
    try:
        shape = function(a.double(), b.double()).shape
        upstream = numbers(*shape, seed=14)
        ra, rb, rg = (fpsim.round(t, "e4m3fn") for t in (a, b, upstream))
        exact = gradients(function, a, b, upstream)
        both = gradients(function, ra, rb, rg)
        profile = fpsim.profile(
            function,
            a.double().requires_grad_(),
            b.double().requires_grad_(),
            policy={"format": "e4m3fn"},
            loss=lambda y: (y * upstream).sum(),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    errors = sorted(product.relative_error for product in profile.products)
    assert errors == [close(e) for e in sorted(map(relative, both, exact))]


def grouped_by_hand(a: Tensor, b: Tensor, ends: list[int] | None) -> Tensor:
    """The product of each group, in float64."""
    if ends is None:
        return a @ b
    groups = [slice(i, j) for i, j in zip([0, *ends], ends, strict=False)]
    if a.dim() == b.dim():
        return torch.stack([a[:, group] @ b[group] for group in groups])
    if a.dim() == 2:
        return torch.cat([a[group] @ matrix for group, matrix in zip(groups, b, strict=True)])
    return torch.cat([matrix @ b[:, group] for group, matrix in zip(groups, a, strict=True)], dim=1)


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        ((8, 16), (2, 16, 24), [3, 8]),
        ((16, 8), (8, 16), [3, 8]),
        ((2, 4, 16), (2, 16, 24), None),
        ((2, 8, 16), (16, 24), [5, 24]),
        ((8, 16), (2, 16, 128), [3, 8]),  # large
    ],
)
def test_the_error_of_grouped_products(first: tuple, second: tuple, ends: list[int] | None) -> None:
    """Only bfloat16 has grouped products everywhere. The error contains the rounding of the result to bfloat16."""
    a, b = numbers(*first, seed=1).bfloat16(), numbers(*second, seed=2).bfloat16()
    offsets = {} if ends is None else {"offs": torch.tensor(ends, dtype=torch.int32)}

    def grouped(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, **offsets)

    (product,) = fpsim.profile(grouped, a, b, policy={"format": "e4m3fn"}).products
    result = grouped(fpsim.round(a, "e4m3fn"), fpsim.round(b, "e4m3fn"))
    expected = relative(result, grouped_by_hand(a.double(), b.double(), ends))
    assert product.relative_error == (close(expected) if second[-1] < 128 else pytest.approx(expected, rel=0.1))


def test_an_operand_that_is_expanded_counts_as_often_as_it_is_multiplied() -> None:
    """Grouped-query attention: one key for two queries."""
    q, k = numbers(1, 4, 3, 8, seed=15), numbers(1, 2, 3, 8, seed=16)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return q @ k[:, :, None].expand(1, 2, 2, 3, 8).reshape(1, 4, 3, 8).mT

    profile = fpsim.profile(scores, q, k, policy={"format": "e4m3fn"})
    second = profile.sites[1]
    assert second.statistics.elements == 2 * k.numel() == math.prod(second.shape)
    repeated = k.repeat_interleave(2, dim=1)
    assert second.statistics.exponents == statistics_of(repeated, "e4m3fn").exponents
    assert second.statistics.sqnr == close(statistics_of(repeated, "e4m3fn").sqnr)
    r = fpsim.round(q, "e4m3fn") @ fpsim.round(repeated, "e4m3fn").mT
    assert profile.products[0].relative_error == close(relative(r, q @ repeated.mT))


# -- large products are estimated --------------------------------------------------------------------------------------


def errors_of(model: nn.Module, x: Tensor, **settings: Any) -> list[float]:
    return [product.relative_error for product in fpsim.profile(model, x, policy=HYBRID, **settings).products]


@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed"])
def test_the_errors_of_large_products_are_estimated_well(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        model, x = nn.Linear(160, 144), torch.randn(150, 160)
    else:
        kind_of = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
        model, x = kind_of(40, 36, 2, padding=1), torch.randn(33, 40, 5, 5)
    x.requires_grad_()
    settings: dict[str, Any] = {"loss": lambda y: y.square().sum()}
    exact, estimated = errors_of(model, x, exact_products=True, **settings), errors_of(model, x, **settings)
    assert len(exact) == 3 and all(a != b for a, b in zip(exact, estimated, strict=True))
    assert estimated == pytest.approx(exact, rel=0.1)
    assert errors_of(model, x, **settings) == estimated  # the random signs are always the same


def test_estimates_of_several_runs_average_out() -> None:
    """Each run draws its own signs, so that the mean of many estimates is closer to the exact value than each is."""
    torch.manual_seed(0)
    model, x = nn.Linear(16, 128, bias=False), torch.randn(16, 16)
    (exact,) = (p.error for p in fpsim.profile(model, x, policy=HYBRID, exact_products=True).products[:1])
    profiler = Profiler(model, policy=HYBRID)
    with torch.no_grad():
        for _ in range(64):
            profiler(x)
    (product,) = profiler.take().products
    assert product.runs == 64
    assert product.error / 8 == pytest.approx(exact, rel=0.01)


def test_a_product_without_elements() -> None:
    (product,) = fpsim.profile(nn.Linear(8, 128), torch.zeros(0, 8), policy=HYBRID).products[:1]
    assert (product.error, product.reference, product.relative_error) == (0, 0, 0)


def test_what_is_no_number_is_never_estimated() -> None:
    x = torch.zeros(2, 8)
    x[0, 0] = math.inf
    layer = nn.Linear(8, 128, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    (product,) = fpsim.profile(layer, x, policy={"activation": "e4m3fn", "weight": "e4m3fn"}).products[:1]
    assert product.error == math.inf == product.reference


# -- what a step leaves behind -----------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """A model that changes state: dropout draws random numbers, and batch norm updates its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_nothing_is_changed() -> None:
    model, x = Stateful(), numbers(5, 8, seed=3).requires_grad_()
    model(x).sum().backward()
    before = deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    of_input, random = x.grad.clone(), torch.get_rng_state()
    fpsim.profile(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(x.grad, of_input) and torch.equal(torch.get_rng_state(), random)


def test_without_gradients_the_step_is_a_forward_pass() -> None:
    with torch.no_grad():
        profile = fpsim.profile(linear(), numbers(5, 8, seed=3))
    assert [site.kind for site in profile.sites] == ["fprop", "fprop"]


class WithLoss(nn.Module):
    """Like Hugging Face's models: a mapping with the loss and other outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"loss": (3 * y).sum(), "logits": y}


def test_the_loss_is_the_models_own_or_the_given_or_the_sum_of_all_outputs() -> None:
    model, x = WithLoss(), numbers(5, 8, seed=3)

    def gradient(model: Callable[..., Any], **settings: Any) -> float:
        return only_site(fpsim.profile(model, x, **settings), kind="wgrad", role="gradient").statistics.amax

    assert gradient(model) == 3
    assert gradient(model, loss=lambda outputs: 5 * outputs["logits"].sum()) == 5
    assert gradient(lambda x: tuple(model(x).values())) == 4  # 3 of the one, 1 of the other
    assert gradient(model.layer) == 1


@pytest.mark.parametrize("loss", [lambda y: y.detach().sum(), lambda y: 3.0])
def test_a_loss_that_is_none_is_an_error(loss: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match="loss must give a floating-point tensor that needs a gradient, got"):
        fpsim.profile(linear(), numbers(5, 8, seed=3), loss=loss)


@pytest.mark.parametrize("backend", ["fpsim", "inductor"])
def test_a_compiled_model_is_profiled_as_what_was_compiled(backend: str) -> None:
    layer, x = linear(), numbers(5, 8, seed=3)
    assert fpsim.profile(torch.compile(layer, backend=backend), x) == fpsim.profile(layer, x)


def test_the_sites_are_those_that_explain_lists() -> None:
    """In a transformer with grouped-query attention the sites have the same order, and each product has run once."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, use_cache=False, **sizes, **tokens))
    x = torch.arange(32).view(2, 16)
    plan = fpsim.explain(model, x, labels=x)
    profile = fpsim.profile(model, x, labels=x)
    names = [field.name for field in fields(Site)]
    assert [Site(**{name: getattr(site, name) for name in names}) for site in profile.sites] == list(plan.sites)
    assert len(profile.products) == 7 * 3 + 2 * 3 + 3 and {product.runs for product in profile.products} == {1}
    assert [site.product for site in profile.sites] == [i for i in range(len(profile.products)) for _ in range(2)]
    assert all(site.statistics.elements == math.prod(site.shape) for site in profile.sites)


def test_activation_checkpointing_counts_nothing_twice() -> None:
    layers, x = nn.Sequential(linear(), nn.Tanh(), linear(6, 8)), numbers(5, 8, seed=3)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(layers, x, use_reentrant=False)

    plain, again = fpsim.profile(lambda x: layers(x), x), fpsim.profile(checkpointed, x)
    assert sorted(map(str, again.products)) == sorted(map(str, plain.products))
    assert sorted(str(site.statistics) for site in again.sites) == sorted(str(site.statistics) for site in plain.sites)


def test_what_is_not_rounded_is_a_gap() -> None:
    model = nn.Sequential(linear(), linear(6, 4))
    profile = fpsim.profile(model, numbers(5, 8, seed=3), policy={"policy": "fp8_hybrid", "skip": ["1"]})
    assert {site.path for site in profile.sites} == {"0"}
    assert Gap("1", "aten.addmm", "fprop left unrounded by the policy") in profile.gaps
    assert "3 gaps are not in this table" in str(profile) and "left unrounded" in page_of(profile)


def test_the_graphs_of_a_model_that_breaks_stand_one_after_the_other() -> None:
    first, second, x = linear(), linear(6, 4), numbers(5, 8, seed=3)

    def broken(x: Tensor) -> Tensor:
        h = first(x)
        torch._dynamo.graph_break()
        return second(h)

    profile = fpsim.profile(broken, x, policy=HYBRID)
    assert [product.kind for product in profile.products] == ["fprop", "wgrad", "fprop", "dgrad", "wgrad"]
    assert [site.product for site in profile.sites] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    h = F.linear(rounded(x, "e4m3fn"), rounded(first.weight, "e4m3fn"), first.bias.detach())
    assert profile.sites[4].statistics == statistics_of(h, "e4m3fn")
    assert [gap.operator for gap in profile.gaps] == ["(graph break)"]


def test_under_autocast_the_carrier_is_the_dtype_of_the_product() -> None:
    layer, x = linear(bias=False), numbers(5, 8, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        profile = fpsim.profile(layer, x, policy=HYBRID)
    site = only_site(profile, kind="fprop", role="activation")
    assert site.dtype == "bfloat16" and site.statistics == statistics_of(x.bfloat16(), "e4m3fn")
    exact = x.bfloat16().double() @ layer.weight.detach().bfloat16().double().T
    result = (rounded(x, "e4m3fn").double() @ rounded(layer.weight, "e4m3fn").double().T).bfloat16()
    assert profile.products[0].relative_error == close(relative(result, exact))


def test_what_is_not_compiled_is_a_gap() -> None:
    hidden = torch._dynamo.disable(linear())
    profile = fpsim.profile(lambda x: hidden(x), numbers(5, 8, seed=3))
    assert profile.sites == () and profile.gaps[-1].operator == "(model)"
    assert "0 sites" in str(profile) and "<html" in page_of(profile)


def page_of(profile: Profile) -> str:
    return page(profile.rows(), profile.sites, profile.products, profile.gaps, "a model")


@pytest.mark.parametrize(
    ("policy", "error", "words"),
    [
        ({"format": "e4m3fm"}, ValueError, "did you mean e4m3"),
        ({"modules": {"layer": "bf16"}}, BackendCompilerFailed, "'layer' matches no module"),
        ({"format": "e9m3"}, BackendCompilerFailed, "e9m3 has values that torch.float32 lacks"),
    ],
)
def test_bad_policies_are_errors(policy: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fpsim.profile(nn.Sequential(linear()), numbers(5, 8, seed=3), policy=policy)


# -- training loops ----------------------------------------------------------------------------------------------------


def train(profiler: Profiler, model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        profiler(x).square().sum().backward()
        optimizer.step()


def test_a_profiler_gathers_the_steps_of_a_training_loop() -> None:
    batches = [numbers(5, 8, seed=seed) for seed in range(3)]
    model, reference = linear(), linear()
    profiler = Profiler(model, policy=HYBRID)
    train(profiler, model, batches)
    together = profiler.take()
    compiled = torch.compile(reference, backend="fpsim_eager", options=HYBRID)
    each = []
    for x in batches:
        each.append(fpsim.profile(reference, x, policy=HYBRID, loss=lambda y: y.square().sum()))
        train(compiled, reference, [x])
    assert torch.equal(model.weight, reference.weight)
    assert together == sum(each) == Profile.merge(each) and [product.runs for product in together.products] == [3, 3]
    assert profiler.take() == Profile((), ())
    profiler(batches[0])
    assert {site.kind for site in profiler.take().sites} == {"fprop"}  # no backward has run


def test_steps_add_up() -> None:
    layer, batches = linear(), [numbers(n, 8, seed=n) for n in (5, 5, 3)]
    same = [fpsim.profile(layer, x, policy=HYBRID) for x in batches[:2]]
    total = sum(same)
    site = only_site(total, kind="fprop", role="activation")
    whole = statistics_of(torch.cat(batches[:2]), "e4m3fn")
    assert site.statistics.sqnr == close(whole.sqnr) and site.shape == (5, 8)
    energies = {"signal": whole.signal, "noise": whole.noise}
    assert replace(site.statistics, **energies) == whole
    errors = [profile.products[0] for profile in same]
    assert total.products[0].error == close(math.hypot(*(p.error for p in errors)))
    assert total.products[0].reference == close(math.hypot(*(p.reference for p in errors)))
    assert total.products[0].runs == 2
    smaller = total + fpsim.profile(layer, batches[2], policy=HYBRID)
    site = only_site(smaller, kind="fprop", role="activation")
    assert site.shape == ("*", 8) and site.statistics.elements == 13 * 8
    assert smaller.products[0].shapes == (("*", 8), (8, 6))


def test_a_smaller_batch_is_merged_with_the_others() -> None:
    model = linear()
    profiler = Profiler(model, policy=HYBRID)
    for n in (5, 5, 3):
        profiler(numbers(n, 8, seed=n)).sum().backward()
    (product, _) = profiler.take().products
    assert product.runs == 3 and product.shapes == (("*", 8), (8, 6))


def test_profiles_of_different_models_do_not_add_up() -> None:
    x = numbers(5, 8, seed=3)
    one, other = fpsim.profile(linear(), x), fpsim.profile(linear(), x, policy={"format": "e3m4"})
    words = "one has fprop activation of aten.addmm in '.root.' cast to e4m3fn/.* where another has .* cast to e3m4/"
    with pytest.raises(ValueError, match=words):
        one + other
    with pytest.raises(ValueError, match="where another has nothing"):
        one + Profile((), ())
    with pytest.raises(ValueError, match="no profiles to merge"):
        Profile.merge([])
    with pytest.raises(TypeError):
        one + 3  # type: ignore[operator]


# -- handing on --------------------------------------------------------------------------------------------------------

BAD = Statistics(
    elements=100, zeros=5, underflows=20, subnormals=1, saturations=3, overflows=1, infinities=1, nans=2, amax=600.0,
    signal=10.0, noise=math.inf, exponents=((-9, 90), (8, 2)), rounded_exponents=((-6, 71), (8, 2)),
)  # fmt: skip
GOOD = Statistics(elements=4, amax=1.0, signal=2.0, exponents=((0, 4),), rounded_exponents=((0, 4),))
WEIRD = "layers.<b>[red]x[/red]</b>"
HAND_MADE = Profile(
    (
        SiteStatistics(
            "b", "aten.mm", "fprop", "forward", "activation", (2, 2), "float32", None, (1,),
            product=0, statistics=GOOD,
        ),
        SiteStatistics(
            WEIRD, "aten.mm", "dgrad", "backward", "gradient", (10, 10), "float32",
            parse_cast("e4m3fn/stochastic:23/ovf_inf"), (1,), product=1, statistics=BAD,
        ),
        SiteStatistics(
            "", "aten.tanh", None, "forward", "result", ("*",), "float64", parse_cast("e5m2"), (), product=None,
            statistics=Statistics(elements=9, signal=4.0, noise=0.1),
        ),
    ),
    (
        ProductStatistics("b", "aten.mm", "fprop", ((2, 2), (2, "*")), 1, 0.0, 3.0),
        ProductStatistics(WEIRD, "aten.mm", "dgrad", ((10, 10), (10, 10)), 2, math.nan, 3.0),
    ),
    (Gap("1", "aten._cdist_forward", "allowed & listed"),),
)  # fmt: skip


def test_rows_hold_everything() -> None:
    row = HAND_MADE.rows()[1]
    assert row["path"] == WEIRD and row["role"] == "gradient" and row["product"] == 1
    assert (row["underflows"], row["underflows_share"], row["nans_share"]) == (20, 0.2, 0.02)
    assert row["sqnr"] == -math.inf and math.isnan(row["relative_error"])
    assert row["exponents"] == ((-9, 90), (8, 2))
    assert HAND_MADE.rows()[2]["relative_error"] is None
    assert HAND_MADE.rows()[2]["sqnr"] == close(10 * math.log10(16 / 0.01))


def test_json_brings_everything_back(of_linear: tuple[nn.Linear, Tensor, Tensor, Profile]) -> None:
    assert Profile.from_json(of_linear[-1].to_json()) == of_linear[-1]
    facts = json.loads(HAND_MADE.to_json())
    assert facts["sites"][1]["sqnr"] == "-inf" and facts["products"][1]["error"] == "nan"
    back = Profile.from_json(HAND_MADE.to_json())
    assert back.sites == HAND_MADE.sites and back.gaps == HAND_MADE.gaps
    assert math.isnan(back.products[1].error) and back.products[0] == HAND_MADE.products[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"fpsim_profile": 1}', '{"fpsim_profile": 99}'])
def test_other_json_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"this is no profile that Profile\.to_json wrote"):
        Profile.from_json(text)


def test_a_data_frame_has_a_row_for_every_site() -> None:
    pytest.importorskip("pandas")
    frame = HAND_MADE.to_pandas()
    assert len(frame) == 3 and list(frame["role"]) == ["activation", "gradient", "result"]
    assert frame.loc[1, "underflows"] == 20 and frame.loc[1, "sqnr"] == -math.inf


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"Profile\.to_pandas needs pandas: pip install pandas"):
        HAND_MADE.to_pandas()


def test_the_table_shows_the_worst_first() -> None:
    lines = str(HAND_MADE).splitlines()
    assert "3 sites, 2 matrix products" in lines[0]
    rows = [line for line in lines if line.startswith("│")]
    assert "<b>[red]x" in rows[0] and "20 %" in rows[0] and "1 ovf 1 inf 2 NaN" in rows[0]
    assert "-9 " in rows[0] and "-inf" in rows[0] and "nan" in rows[0] and "e4m3fn stochastic:23 ovf_inf" in rows[0]
    second, third = (row for row in rows if "aten" in row and row is not rows[0])  # long paths take several lines
    assert "(root)" in second and "32.0" in second
    assert "unrounded" in third and "exact" in third
    console = Console(width=200, force_terminal=True, color_system="standard", _environ={})
    with console.capture() as capture:
        console.print(HAND_MADE)
    assert re.search(r"\x1b\[1;31m *20 %", capture.get()) and re.search(r"\x1b\[33m *unrounded", capture.get())


def test_the_table_is_sorted_and_cut_as_asked() -> None:
    assert next(HAND_MADE.table("zeros").columns[0].cells).plain == WEIRD
    assert [cell.plain for cell in HAND_MADE.table("elements", limit=2).columns[0].cells] == [WEIRD, "(root)"]
    assert [cell.plain for cell in HAND_MADE.table("relative_error").columns[0].cells][-1] == "(root)"
    with pytest.raises(ValueError, match=r"cannot sort by 'underflow' \(did you mean 'underflows'"):
        HAND_MADE.table("underflow")


@pytest.mark.parametrize(
    ("histogram", "text"),
    [
        ((), "-"),
        (((3, 7),), "3 █ 3"),
        (((-2, 1), (-1, 8), (1, 4)), "-2 ▁█ ▄ 1"),
        (((0, 1), (31, 2)), "0 ▄" + 14 * " " + "█ 31"),
    ],
)
def test_histograms_as_text(histogram: Any, text: str) -> None:
    assert bars(histogram) == text
