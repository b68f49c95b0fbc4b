"""The guards refuse rules for modules that would silently not apply, and options that change after compiling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.parallel import DistributedDataParallel

import fpsim
from fpsim.compile_backend.backend import fpsim_eager


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


X = torch.randn(3, 8)
RULES = [
    {"policy": "fp8_hybrid", "skip": ["layers.2"]},
    {"modules": {"*.up": "bf16"}},
    {"skip": ["head"], "modules": {"layers.0": "bf16", "haed": "bf16"}},
]


@pytest.mark.parametrize("options", RULES)
def test_a_glob_that_matches_no_module_is_an_error(options: dict) -> None:
    (glob,) = {"layers.2", "*.up", "haed"} & {*options.get("skip", ()), *options.get("modules", ())}
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Model(), backend="fpsim_eager", options=options)(X)
    message = str(caught.value)
    assert f"{glob!r} matches no module" in message
    assert "head, layers, layers.0, layers.0.fc, layers.1, layers.1.fc" in message


@pytest.mark.parametrize("options", RULES)
def test_explain_lists_a_glob_that_matches_no_module(options: dict) -> None:
    (gap,) = (gap for gap in fpsim.explain(Model(), X, policy=options).gaps if "glob" in gap.operator)
    assert gap.operator[7:-2] in {"layers.2", "*.up", "haed"} and "matches no module" in gap.reason


def test_a_glob_may_match_a_module_that_only_holds_others() -> None:
    plan = fpsim.explain(Model(), X, policy={"modules": {"layers": "bf16"}})
    assert {site.path for site in plan.sites if site.cast and "e8m7" in str(site.cast)} == {
        "layers.0.fc",
        "layers.1.fc",
    }


def test_rules_for_the_whole_model_are_refused_where_a_layer_is_compiled_on_its_own() -> None:
    model = Model()
    for layer in model.layers:
        layer.compile(backend="fpsim_eager", options={"modules": {"layers.0": "bf16"}})
    with pytest.raises(BackendCompilerFailed, match=r"part compiled on its own.*\n?.*fullgraph=True"):
        model(X)


def test_rules_for_the_whole_model_are_refused_after_a_graph_break_within_a_layer() -> None:
    class Broken(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            torch._dynamo.graph_break()
            return torch.relu(self.fc(x))

    model = nn.Sequential(Broken(), Broken())
    with pytest.raises(BackendCompilerFailed, match=r"'1' matches no module"):
        torch.compile(model, backend="fpsim_eager", options={"modules": {"1": "bf16"}})(X)


def test_rules_hold_below_a_function_that_calls_the_model() -> None:
    model = Model()

    def step(x: Tensor) -> Tensor:
        return model(x).square().sum()

    plan = fpsim.explain(step, X, policy={"modules": {"head": "bf16"}})
    assert {str(site.cast) for site in plan.sites if site.path == "head"} == {"e8m7/nearest_even/ovf_inf"}
    assert not plan.gaps


# -- DistributedDataParallel, which compiles a model in parts ----------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)  # less than a layer: Dynamo splits after each
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("one_process")
def test_rules_hold_in_the_parts_into_which_ddp_splits_a_model() -> None:
    options = {"modules": {"layers.1": "e5m1", "head": "e3m1"}, "skip": ["layers.0"], "format": "bf16"}
    alone = Model()
    torch.compile(alone, backend="fpsim_eager", options=options)(X).sum().backward()

    parts = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        parts.append(gm)
        return fpsim_eager(gm, inputs, options=options)

    parallel = DistributedDataParallel(Model(), bucket_cap_mb=1e-4)
    torch.compile(parallel, backend=backend)(X).sum().backward()
    assert len(parts) == 3
    got, want = gradients(parallel), gradients(alone)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.usefixtures("one_process")
def test_a_glob_that_matches_no_module_of_a_ddp_model_is_an_error() -> None:
    parallel = DistributedDataParallel(Model(), bucket_cap_mb=1e-4)
    with pytest.raises(BackendCompilerFailed, match=r"'haed' matches no module"):
        torch.compile(parallel, backend="fpsim_eager", options={"policy": "fp8_hybrid", "skip": ["haed"]})(X)


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_changed_since_compiling_are_an_error() -> None:
    options = {"format": "bf16"}
    compiled = torch.compile(Model(), backend="fpsim_eager", options=options, dynamic=False)
    compiled(X)
    options["format"] = "e5m2"
    with pytest.raises(ValueError, match=r"e5m2.* have changed since a model was compiled with them"):
        compiled(X)  # nothing is compiled
    with pytest.raises(BackendCompilerFailed, match=r"e5m2.* have changed since a model was compiled with them"):
        compiled(torch.randn(5, 8))
    options["format"] = "bf16"
    compiled(X)


def test_code_of_another_model_is_not_run_under_changed_options() -> None:
    """Dynamo takes the code of the first layer for the second one: both have the same mapping."""
    options = {"format": "e4m3fn", "modules": {}}
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    torch.compile(first, backend="fpsim_eager", options=options)(X)
    options["format"] = "e5m2"
    with pytest.raises(ValueError, match=r"e5m2.* have changed since a model was compiled with them"):
        torch.compile(second, backend="fpsim_eager", options=options)(X)
    options["format"] = "e4m3fn"
    options["modules"]["weight"] = "bf16"
    with pytest.raises(ValueError, match=r"weight.* have changed since a model was compiled with them"):
        torch.compile(second, backend="fpsim_eager", options=options)(X)


def test_equal_options_may_be_used_again() -> None:
    options = {"format": "bf16"}
    for _ in range(2):
        torch.compile(Model(), backend="fpsim_eager", options=options)(X)
    options["format"] = "e8m7"  # the same format
    torch.compile(Model(), backend="fpsim_eager", options=options)(X)


# -- settings of torch -------------------------------------------------------------------------------------------------


@pytest.fixture
def products_of_less_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("products_of_less_precision", ["high"], indirect=True)
@pytest.mark.parametrize("format", ["e5m11", "fp32", "none"])
def test_operands_that_tf32_does_not_hold_are_refused(format: str, products_of_less_precision: None) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"'high'.*set_float32_matmul_precision\('highest'\)"):
        torch.compile(Model(), backend="fpsim_eager", options={"format": format})(X)


@pytest.mark.parametrize(
    ("products_of_less_precision", "options"),
    [("high", {"format": "fp16"}), ("high", {"format": "e8m10"}), ("medium", {}), ("medium", {"format": "bf16"})],
    indirect=["products_of_less_precision"],
)
def test_operands_that_shorter_products_hold_are_not(options: dict, products_of_less_precision: None) -> None:
    torch.compile(Model(), backend="fpsim_eager", options=options)(X)


@pytest.mark.parametrize("format", ["e5m2/stochastic", "e5m2"])
@pytest.mark.parametrize("setting", ["freezing", "efficient_conv_bn_eval_fx_passes"])
def test_settings_that_change_the_operands_of_products_are_refused(setting: str, format: str) -> None:
    """Inductor multiplies constants into weights: into rounded ones, or before they are rounded."""
    with (
        torch._inductor.config.patch({setting: True}),
        pytest.raises(BackendCompilerFailed, match=rf"torch._inductor.config.{setting} multiplies .*set it to False"),
    ):
        torch.compile(Model(), backend="fpsim_eager", options={"format": format})(X)


@pytest.mark.parametrize("options", ["paper:e8m3", {"products": "weights", "format": "bf16"}, {"weight": "e8m3"}])
def test_a_policy_for_weights_that_finds_none_says_so(options: Any) -> None:
    options = {"policy": options} if isinstance(options, str) else options
    with pytest.warns(UserWarning, match="fpsim rounds nothing in this graph.*none of its 1 products has a weight"):
        torch.compile(lambda a, b: a @ b, backend="fpsim_eager", options=options)(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "paper:e8m3"},
        {"weight": "e8m3"},
        {"policy": "paper:e8m3", "skip": "layer"},  # where the only weight is
    ],
)
def test_it_says_so_of_code_from_a_warm_cache_too(options: dict[str, Any]) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2) if "skip" in options else nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x @ x

    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            with pytest.warns(UserWarning, match="fpsim rounds nothing in this graph"):
                torch.compile(Squared(), backend="fpsim", options=options)(torch.ones(2, 2))


@pytest.mark.parametrize("options", [{"policy": "paper:e8m3"}, {"weight": "e8m3"}, {"policy": "fp8_hybrid"}])
def test_a_model_with_weights_comes_from_the_cache(options: dict[str, Any]) -> None:
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            with torch.no_grad():
                torch.compile(nn.Linear(2, 2), backend="fpsim", options=options)(torch.ones(2, 2))
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


@pytest.mark.parametrize("options", [{"format": "none"}, {"format": "bf16", "skip": ["*"]}, {"weight": "e8m3"}])
def test_a_policy_that_finds_what_it_names_says_nothing(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fpsim")
        torch.compile(Model(), backend="fpsim_eager", options=options)(X)


def test_a_graph_without_products_says_nothing_of_weights() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fpsim")
        torch.compile(lambda x: x + 1, backend="fpsim_eager", options={"policy": "paper:e8m3"})(X)


@pytest.mark.parametrize("setting", ["use_joint_graph_passes", "joint_graph_constant_folding", "pattern_matcher"])
def test_passes_that_are_turned_off_leave_the_rounding_on(setting: str) -> None:
    want = torch.compile(Model(), backend="fpsim_eager")(X)
    torch._dynamo.reset()
    with torch._inductor.config.patch({setting: False}):
        assert torch.equal(torch.compile(Model(), backend="fpsim_eager")(X), want)
    assert not torch.equal(Model()(X), want)


# -- functions of torch.func -------------------------------------------------------------------------------------------


def test_vmap_is_no_derivative() -> None:
    x, w = torch.randint(-64, 64, (3, 8)) / 8, torch.randint(-64, 64, (8, 8)) / 8  # whose sums are exact
    function = torch.compile(lambda x: torch.vmap(lambda row: w @ row)(x), backend="fpsim_eager")
    assert torch.equal(function(x), fpsim.round(x, "e4m3fn") @ fpsim.round(w, "e4m3fn").T)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_derivatives_inside_the_compiled_function_are_refused(transform: Callable) -> None:
    function = torch.compile(lambda x: transform(lambda y: (y @ y.T).sum())(x), backend="fpsim_eager")
    with pytest.raises(BackendCompilerFailed, match="takes derivatives itself"):
        function(X)


# -- products with weights only ----------------------------------------------------------------------------------------


def test_products_of_weights_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.mT).softmax(-1) @ v)

    plan = fpsim.explain(Attention(), torch.randn(2, 3, 8, requires_grad=True), policy="paper:e8m3")
    assert {(site.path, site.kind, site.cast and str(site.cast)) for site in plan.sites} == {
        (path, kind, "e8m3/toward_zero/sat_propagate")
        for path in ("qkv", "out")
        for kind in ("fprop", "dgrad", "wgrad")
    }
    reasons = [gap.reason for gap in plan.gaps]
    assert reasons.count("fprop of two activations left unrounded by the policy") == 2
    assert reasons.count("dgrad of two activations left unrounded by the policy") == 4


class AsksForGradients(nn.Module):
    """What transformers does to the embeddings of a model with activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).requires_grad_())


@pytest.mark.parametrize("enabled", [False, True])
def test_a_forward_that_asks_for_gradients_takes_no_derivatives(enabled: bool) -> None:
    model, x = AsksForGradients(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="fpsim_eager", options={"activation": "e4m3fn", "weight": "e4m3fn"})
    with torch.set_grad_enabled(enabled):
        got = compiled(x)
        rounded = [fpsim.round(each, "e4m3fn") for each in (x, model.first.weight, model.second.weight)]
        want = fpsim.round(rounded[0] @ rounded[1].T, "e4m3fn") @ rounded[2].T
    assert torch.equal(got, want) and got.requires_grad == enabled
    if enabled:
        gradients = torch.autograd.grad(got.sum(), list(model.parameters()))
        emulated = torch.autograd.grad(want.sum(), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(gradients, emulated, strict=True))
