"""Recipes that change the optimizer, the model or the exchange of gradients: FP8-LM, COAT and others, by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fpsim
from fpsim import reference
from fpsim.recipes import Recipe
from fpsim.recipes.clipped_updates import ClippedUpdates
from fpsim.recipes.fp8_lm import NarrowGradients
from fpsim.training.galore import GaLore
from fpsim.training.hypot_adam import HypotAdam
from fpsim.training.learned_clipping import clipping_values, messages
from fpsim.training.wire import AutomaticFactor, NarrowExchange

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "coat": [{}, {"expansion": "kernel"}, {"expansion": None, "activations": False, "head": False}],
    "fp8_federated": [{}, {"mantissa_bits": 2, "exponent_bits": 5, "activations": False}],
    "fp8_lm": [{}, {"level": "O1"}, {"level": "O3", "processes": True, "factor": "automatic"}, {"high": None}],
    "fp8_trillion": [{}, {"smooth": "channel", "stochastic": False}, {"smooth": None, "state": False}],
    "galore8bit": [{}, {"rank": 8, "state": False, "high": None}],
    "low_precision_rl": [{}, {"format": "e4m7", "kahan": False, "scale": None}],
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


@pytest.mark.parametrize(("name", "options"), [(name, each) for name, options in VARIANTS.items() for each in options])
def test_recipes_are_values_that_json_and_print_show(name: str, options: dict[str, Any]) -> None:
    recipe = fpsim.recipes.RECIPES[name](**options)
    assert Recipe.from_json(recipe.to_json()) == recipe == fpsim.recipes.RECIPES[name](**options)
    assert recipe.name == name and "arXiv" in recipe.source
    assert all(str(part)[:30] in str(recipe) for part in recipe.parts.values())


@pytest.mark.parametrize("name", ["coat", "fp8_trillion"])
def test_a_llama_learns_with_recipes_of_its_activations(name: str) -> None:
    """The loss of one batch falls by more than in one step and stays finite."""
    model, tokens = llama(), torch.arange(16).view(2, 8)
    compiled, optimizer = fpsim.recipes.RECIPES[name]().apply(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), backend="fpsim_eager"
    )
    losses = []
    for _ in range(4):
        loss = compiled(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[3] > 0


# -- FP8-LM ------------------------------------------------------------------------------------------------------------


def floor2(x: float) -> float:
    return 2.0 ** (math.frexp(x)[1] - 1)


def scaled(x: np.ndarray, format: str) -> np.ndarray:
    """Numbers rounded with the scale 2^floor(log2(largest / amax)), in exact arithmetic."""
    largest = {"e4m3fn": 448.0, "e5m2": 57344.0, "fp16": 65504.0}[format]
    s = floor2(largest / np.abs(x).max())
    return np.vectorize(lambda v: float(reference.round(v * s, format)) / s)(x)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_steps_of_fp8_lm_by_hand(level: str) -> None:
    """A linear layer whose result has the gradient G: dW = Q(Q(G)^T Q(X)), and AdamW in float64."""
    lr, beta1, beta2, eps, decay = 2.0**-4, 0.5, 0.75, 2.0**-20, 2.0**-3
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.bias.fill_(1 / 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    start = layer.weight.detach().numpy().copy()
    model, optimizer = fpsim.recipes.fp8_lm(level, high=None).apply(layer, optimizer, backend="fpsim_eager")
    master = scaled(start, "fp16")
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    for t in range(1, 4):
        weight = scaled(master, "e4m3fn") if level == "O3" else master
        np.testing.assert_array_equal(layer.weight.detach().numpy(), weight)
        random = np.random.default_rng(t)
        x, g = random.standard_normal((6, 4)), 1e-3 * random.standard_normal((6, 3))
        optimizer.zero_grad()
        y = model(torch.tensor(x))
        wanted = scaled(x, "e4m3fn") @ scaled(weight, "e4m3fn").T + layer.bias.detach().numpy()
        np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-14)
        y.backward(torch.tensor(g))
        dw = scaled(scaled(g, "e5m2").T @ scaled(x, "e4m3fn"), "e4m3fn")
        np.testing.assert_array_equal(layer.weight.grad.numpy(), dw)
        optimizer.step()
        m, v = m + (1 - beta1) * (dw - m), v * beta2 + (1 - beta2) * dw * dw
        denominator = np.sqrt(v) / math.sqrt(1 - beta2**t) + eps
        master = scaled(master * (1 - lr * decay) - lr / (1 - beta1**t) * (m / denominator), "fp16")
        if level != "O1":
            m, v = scaled(m, "e4m3fn"), scaled(v, "fp16")
        np.testing.assert_array_equal(optimizer.state[layer.weight]["exp_avg"].numpy(), m)
        np.testing.assert_array_equal(optimizer.state[layer.weight]["exp_avg_sq"].numpy(), v)
    assert not torch.equal(layer.bias, fpsim.round(layer.bias, "fp16/power_of_two"))  # only weights are narrow


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone. (`tests/training/test_wire.py` has two processes.)"""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_gradients_of_weights_are_exchanged_in_fp8() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    weight, bias = (p.grad.clone() for p in layer.parameters() if p.grad is not None)
    layer.zero_grad()
    parallel = DistributedDataParallel(layer)
    part = fpsim.recipes.fp8_lm("O1", processes=True).gradients
    assert part is not None
    exchange = part.apply(parallel, torch.optim.AdamW(layer.parameters()))
    parallel(x).square().sum().backward()
    np.testing.assert_array_equal(layer.weight.grad.numpy(), scaled(weight.double().numpy(), "e4m3fn"))
    assert torch.equal(layer.bias.grad, bias)
    assert isinstance(exchange, NarrowExchange) and (exchange.elements, exchange.factor) == (12, None)
    automatic = NarrowGradients("e5m2", "automatic").apply(DistributedDataParallel(nn.Linear(2, 2)), None)
    assert automatic is not None and automatic.factor == AutomaticFactor()
    with pytest.raises(ValueError, match="got Linear: wrap the model"):
        part.apply(nn.Linear(2, 2), None)


@pytest.mark.usefixtures("group")
def test_kept_modules_are_found_behind_data_parallelism() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model = nn.ModuleDict({"body": model, "head": nn.Linear(2, 2)})
    model.forward = lambda x: model["head"](model["body"](x))  # type: ignore[method-assign, assignment]
    recipe = fpsim.recipes.deepseek_v3(router=False, accumulator=None, state=None)
    parallel = DistributedDataParallel(model)
    assert recipe.policy_for(parallel) == recipe.policy_for(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = recipe.apply(model, backend="fpsim_eager")[0](x)
        assert torch.equal(recipe.apply(parallel, backend="fpsim_eager")[0](x), expected)


def test_gradients_that_nothing_would_round_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"got Linear: wrap the model, or take fp8_lm\(processes=False\)"):
        NarrowGradients().apply(nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    ("name", "optimizer", "options", "message"),
    [
        ("galore8bit", torch.optim.Adam, {"weight_decay": 0.1}, "Adam adds the decay to gradients: use AdamW"),
        ("galore8bit", torch.optim.AdamW, {"maximize": True}, "neither amsgrad nor maximize"),
        ("low_precision_rl", torch.optim.Adam, {"maximize": True}, "neither amsgrad nor maximize"),
        ("low_precision_rl", torch.optim.Adam, {"amsgrad": True}, "neither amsgrad nor maximize"),
        ("low_precision_rl", torch.optim.AdamW, {}, "hAdam adds weight decay to gradients"),
        (
            "low_precision_rl",
            torch.optim.Adam,
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            "hAdam adds weight decay to gradients",
        ),
    ],
)
def test_an_option_of_the_optimizer_that_its_successor_lacks_is_an_error(
    name: str, optimizer: Any, options: dict[str, Any], message: str
) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        fpsim.recipes.RECIPES[name]().optimizer.apply(optimizer(layer.parameters(), **options), layer)


def test_a_model_with_another_smooth_swiglu_is_an_error() -> None:
    model, part = llama(), fpsim.recipes.fp8_trillion().preparation
    assert part is not None and part.apply(part.apply(model, None), None) is model
    for other in ({"smooth": "channel"}, {"detach": False}):
        second = fpsim.recipes.fp8_trillion(**other).preparation
        assert second is not None
        with pytest.raises(ValueError, match=r"Smooth-SwiGLU with other options .*: \[\('token', True, False\)\]"):
            second.apply(model, None)


# -- COAT and FP8 for trillions of tokens ------------------------------------------------------------------------------


def test_coat_rounds_results_and_copies_in_groups_of_16_and_keeps_the_head() -> None:
    recipe, model = fpsim.recipes.coat(), llama()
    tokens = torch.arange(16).view(2, 8)
    plan = fpsim.explain(model, tokens, policy=recipe.policy_for(model))
    casts = {
        (site.kind or site.role, site.role): site.cast.written
        for site in plan.sites
        if "lm_head" not in site.path and site.cast
    }
    kept = "e4m3fn/nearest_even/sat_finite/block:16:bf16"
    assert casts["fprop", "output"] == casts["saved", "saved"] == kept
    assert casts["dgrad", "output"] == "e5m2/nearest_even/sat_finite/block:16:bf16"
    assert casts["wgrad", "activation"] == "e4m3fn/nearest_even/sat_finite/tensor:bf16"
    assert ("wgrad", "output") not in casts
    assert {site.cast.format.name for site in plan.sites if site.path == "lm_head" and site.kind} == {"e8m7"}
    saved = {site.operator for site in plan.sites if site.role == "saved"}
    assert {"aten.sigmoid", "aten.mul"} <= saved  # the derivatives of SiLU and of products of activations


def test_moments_of_fp8_trillion_by_hand() -> None:
    """Weights in FP16, m in E4M3 up to 240 and v in E5M2: q(x s) (1/s) with s = max / amax, each step in float32."""
    p, plain = (nn.Parameter(torch.linspace(-1, 2, 40)) for _ in range(2))
    recipe = fpsim.recipes.fp8_trillion(smooth=None)
    layer = nn.Linear(1, 1)
    optimizer = recipe.optimizer.apply(torch.optim.AdamW([p], lr=0.1, foreach=False), layer)  # type: ignore[union-attr]
    twin = torch.optim.AdamW([plain], lr=0.1, foreach=False)

    def encoded(x: Tensor, format: str, largest: float) -> Tensor:
        s = np.float32(largest) / np.float32(x.abs().max())
        y = [np.float32(float(reference.round(float(np.float32(v) * s), format))) for v in x.tolist()]
        return torch.tensor([float(v * (np.float32(1) / s)) for v in y])

    with torch.no_grad():
        plain.copy_(encoded(plain, "fp16", 65504.0))
        for t in range(3):
            p.grad = torch.sin(torch.arange(40.0) * (t + 1)) * 1e-3
            plain.grad = p.grad.clone()
            optimizer.step()
            twin.step()
            plain.copy_(encoded(plain, "fp16", 65504.0))
            for name, format, largest in (("exp_avg", "e4m3", 240.0), ("exp_avg_sq", "e5m2", 57344.0)):
                twin.state[plain][name].copy_(encoded(twin.state[plain][name], format, largest))
                assert torch.equal(optimizer.state[p][name], twin.state[plain][name])
            assert torch.equal(p, plain)


# -- optimizers that take another's place ------------------------------------------------------------------------------


def test_galore_projects_the_weights_of_linear_layers() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    _, galore = fpsim.recipes.galore8bit(rank=0.5, update_gap=7).apply(model, optimizer)
    assert type(galore) is GaLore
    ranks = {tuple(p.shape): group["rank"] for group in galore.param_groups for p in group["params"]}
    assert ranks == {(32, 16): 8, (16, 16): 8, (16, 32): 8, (16,): None} | {(32, 16): 8}
    assert {p for group in galore.param_groups for p in group["params"]} == set(model.parameters())
    embedding = model.get_input_embeddings().weight
    (of_embedding,) = [group for group in galore.param_groups if any(p is embedding for p in group["params"])]
    assert of_embedding["rank"] is None
    options = {(group["lr"], group["weight_decay"], group["update_gap"]) for group in galore.param_groups}
    assert options == {(0.01, 0.1, 7), (0.01, 0.1, 200)}
    with pytest.raises(ValueError, match=r"takes the place of torch\.optim\.AdamW, got SGD"):
        fpsim.recipes.galore8bit().optimizer.apply(torch.optim.SGD(model.parameters()), model)  # type: ignore[union-attr]


def fit(recipe: Recipe | None, naive: bool = False) -> float:
    """The loss of a regression whose gradients are about 1e-6, after 60 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    compiled: nn.Module = model
    if recipe is not None:
        compiled, optimizer = recipe.apply(model, optimizer, backend="fpsim_eager")
    if naive:
        compiled = model = model.half()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    y = torch.sin(x.sum(1, keepdim=True))
    for _ in range(60):
        optimizer.zero_grad()
        loss = (compiled(x.to(model[0].weight.dtype)) - y).square().mean() * 1e-5
        (loss * optimizer.param_groups[0].get("loss_scale", 1.0)).backward()
        optimizer.step()
    return float((model.float()(x) - y).detach().square().mean())


def test_float16_learns_as_float32_does_with_low_precision_rl() -> None:
    """And plain Adam in float16, on gradients whose squares are zero, does not."""
    full, half = fit(None), fit(fpsim.recipes.low_precision_rl())
    assert half <= 1.05 * full + 0.01
    naive = fit(None, naive=True)
    assert not math.isfinite(naive) or naive > 3 * full


def test_low_precision_rl_keeps_every_number_in_float16() -> None:
    model = nn.Linear(3, 2)
    adam = torch.optim.Adam(model.parameters())
    compiled, optimizer = fpsim.recipes.low_precision_rl().apply(model, adam, backend="fpsim_eager")
    assert type(optimizer) is HypotAdam and optimizer.param_groups[0]["loss_scale"] == 1e4
    for _ in range(2):
        (compiled(torch.ones(1, 3)).sum() * 1e4).backward()
        optimizer.step()
    for p in model.parameters():
        states = [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
        assert all(torch.equal(x.half().float(), x) for x in (p.detach(), *states, p.grad)) and len(states) == 3
    with pytest.raises(ValueError, match="use Adam, or weight_decay=0"):
        fpsim.recipes.low_precision_rl().optimizer.apply(torch.optim.AdamW(model.parameters()), model)  # type: ignore[union-attr]


def test_a_federated_client_learns_its_clipping_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    client, optimizer = fpsim.recipes.fp8_federated().apply(model, optimizer)
    values = clipping_values(client)
    assert len(values) == 4 and {p for p in optimizer.param_groups[1]["params"]} == set(values.values())
    x = torch.randn(32, 4)
    client(x)
    before = [value.item() for value in values.values()]
    for _ in range(5):
        optimizer.zero_grad()
        (client(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    assert all(a != value.item() for a, value in zip(before, values.values(), strict=True))
    assert list(messages(client)) == ["0.weight", "2.weight"]


def test_updates_are_clipped_by_a_part() -> None:
    p = nn.Parameter(torch.zeros(2))
    adamw = torch.optim.AdamW([p], lr=1.0, betas=(0.0, 0.5), weight_decay=0.0, eps=0.0)
    optimizer = ClippedUpdates().apply(adamw, nn.Linear(1, 1))
    for g in (1.0, 4.0):
        p.grad = torch.full((2,), g)
        optimizer.step()
    v = (0.5 * 0.5 + 0.5 * 16) / 0.75
    assert p[0].item() == pytest.approx(-1 - 4 / math.sqrt(v) / (4 / math.sqrt(v)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coat", {"expansion": "least"}, "none of COAT's"),
        ("fp8_lm", {"level": "O4"}, "none of FP8-LM's: use one of O1, O2, O3"),
        ("fp8_lm", {"processes": True, "factor": "root"}, "use a number, 'sqrt' or 'automatic'"),
        ("fp8_lm", {"factor": "automatic"}, "factor='automatic' is that of a sum over processes: give processes=True"),
        ("halo", {"block": 16}, "level 0 rotates nothing, got block=16"),
        ("zeroquant_fp", {"constraint": "m1", "rows": 4}, "rows=4 is about the compute block of M2"),
        ("fp8_trillion", {"smooth": "tensor"}, "granularity='tensor' of Smooth-SwiGLU"),
        ("galore8bit", {"rank": 1.5}, "a whole number or a share up to 1, got 1.5"),
    ],
)
def test_options_that_no_source_has_are_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fpsim.recipes.RECIPES[name](**options)
