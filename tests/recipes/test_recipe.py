"""Recipes as values: text, JSON, equality; exclusions; and what `Recipe.apply` calls, in which order."""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import fpsim
from fpsim import recipes
from fpsim.policy.presets import MORE_THAN_POLICIES
from fpsim.recipes import RECIPES, Exclusions, Recipe, RoundedState
from fpsim.training.schedules import Piecewise

BF16 = fpsim.Policy.preset("bf16")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


# -- names -------------------------------------------------------------------------------------------------------------

#: Imports a run's configuration and one recipe, and says which modules of recipes that has imported.
LAZY = """
import sys
import fpsim.paper.config
own = lambda: sorted(name for name in sys.modules if name.startswith(("fpsim.recipes.", "fpsim.posttraining")))
print(*own())
import fpsim
fpsim.recipes.RECIPES["te_current"]
print(*own())
"""


def test_a_configuration_of_the_study_imports_no_recipe() -> None:
    """Every worker of a study imports it."""
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    before, after = (line.split() for line in done.stdout.splitlines())
    assert before == ["fpsim.recipes.description", "fpsim.recipes.exclusions", "fpsim.recipes.recipe"]
    assert set(after) - set(before) == {"fpsim.recipes.parts", "fpsim.recipes.te"}


def test_every_name_is_there_and_visible() -> None:
    assert dir(recipes) == sorted(recipes.__all__) and {"RECIPES", "Recipe", *RECIPES} <= set(dir(recipes))
    for name in recipes.__all__:
        assert name == "RECIPES" or getattr(recipes, name).__name__ == name
    for name in RECIPES:
        assert getattr(recipes, name) is RECIPES[name]
    with pytest.raises(AttributeError, match=r"module 'fpsim\.recipes' has no attribute 'mxpf8'"):
        recipes.mxpf8  # noqa: B018


def test_a_recipe_goes_by_its_name_although_a_module_has_it_too() -> None:
    """Python binds a module of a package to its name, also one that is imported after the recipe."""
    module = importlib.import_module("fpsim.recipes.mosaic_layernorm")
    setattr(recipes, "mosaic_layernorm", module)  # noqa: B010
    assert recipes.mosaic_layernorm is module.mosaic_layernorm is RECIPES["mosaic_layernorm"]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_value(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe == RECIPES[name]() and hash(recipe) == hash(RECIPES[name]())
    assert recipe.name == name and recipe.notes and recipe.source
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    for text in (recipe.to_json(), json.dumps(json.loads(recipe.to_json()))):
        assert Recipe.from_json(text) == recipe and str(Recipe.from_json(text)) == str(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "another"  # type: ignore[misc]


@pytest.mark.parametrize("name", RECIPES)
def test_the_text_of_a_recipe_is_short_and_names_its_casts(name: str) -> None:
    recipe = RECIPES[name]()
    lines = str(recipe).splitlines()
    assert len(lines) <= 20 and all(len(line) <= 120 for line in lines)
    headings = [line.split()[0] for line in lines if line[2:3].strip()]
    assert headings[0] == name and {"source", "note"} <= set(headings)
    assert recipe.policy is None or {"fprop", "dgrad", "wgrad"} <= set(headings)
    page = recipe._repr_html_()
    assert page.startswith("<pre ") and html.unescape(re.sub(r"<[^>]*>", "", page)) == str(recipe)


def test_four_over_six_chooses_for_activations_and_weights() -> None:
    policy = recipes.nvfp4(four_over_six="mae").policy
    assert policy is not None and str(policy.cast("wgrad", "activation")) == "e2m1fn/nearest_even/sat_finite/nv:16:mae"
    assert str(policy.cast("dgrad", "weight")) == "e2m1fn/nearest_even/sat_finite/nv:16x16:mae"
    assert str(policy.cast("dgrad", "gradient")) == "e2m1fn/stochastic:8/sat_finite/nv:16:te"
    assert recipes.nvfp4().policy == replace(policy, activation="nvfp4", weight="e2m1fn/nv:16x16")


def test_the_text_of_nvfp4() -> None:
    text = str(recipes.nvfp4(last_blocks=4))
    assert "  fprop        activation e2m1fn/nv:16:te; weight e2m1fn/nv:16x16:te; result bf16\n" in text
    assert (
        "wgrad        gradient e2m1fn/stochastic:8/nv:16:te; activation e2m1fn/nv:16:te; both hadamard:16:te\n" in text
    )
    assert (
        "  attention    its products are not rounded\n  kept high    head, first 3.2% of blocks, last 4 blocks: bf16\n"
        in text
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_name_of_a_policy_is_that_of_the_recipe_or_an_error_says_what_to_use(name: str) -> None:
    recipe = RECIPES[name]()
    if recipe.is_policy:
        assert fpsim.Policy.preset(name) == fpsim.Policy.from_options({"policy": name}) == recipe.policy
    elif name in ("mxfp8", "nvfp4"):  # policies of these names are older, and know no model
        assert fpsim.Policy.preset(name).cast("fprop", "weight") == recipe.policy.cast("fprop", "weight")  # type: ignore
    else:
        assert name in MORE_THAN_POLICIES
        with pytest.raises(ValueError, match=rf"'{name}' is more than a policy: use fpsim\.recipes\.{name}\(\)\.apply"):
            fpsim.Policy.from_options({"policy": name})


def test_a_recipe_that_is_a_policy_is_an_option_of_torch_compile() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    y = torch.compile(layer, backend="fpsim_eager", options={"policy": "te_current"})(x)
    compiled, optimizer = recipes.te_current().apply(layer, backend="fpsim_eager")
    assert optimizer is None and torch.equal(compiled(x), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "this recipe has version 2, this fpsim reads version 1: upgrade fpsim"),
        ({"polcy": {}}, "unknown field 'polcy' of a recipe \\(did you mean 'policy'\\?\\): use name, source"),
        ({"optimizer": {"part": "Adam"}}, "unknown part 'Adam' of a recipe: use one of .*RoundedState"),
        (
            {"optimizer": {"part": "RoundedState", "stat": "bf16"}},
            r"wrong fields of part 'RoundedState' .*: it has state",
        ),
        ({"source": None}, "a recipe has a source, a string"),
        ({"notes": "one"}, "the notes of a recipe are a list of strings, got 'one'"),
        ({"exclusions": {"heads": True}}, "unknown field 'heads' of exclusions \\(did you mean 'head'\\?\\): use head"),
        ({"policy": {"format": "e9m9x"}}, "unknown format 'e9m9x'"),
    ],
)
def test_wrong_json_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    given = {**json.loads(recipes.deepseek_v3().to_json()), **change}
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps(given))
    with pytest.raises(ValueError, match="a recipe must be"):
        Recipe.from_json("[1]")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.deepseek_v3(scales="e8m0"), "scales='e8m0': use 'power_of_two' or 'fp32'"),
        (lambda: recipes.switchback(format="int4"), "format='int4' is none of SwitchBack's: use 'int8' or 'fp8'"),
        (lambda: recipes.halo(format="int4"), "format='int4' is none of HALO's: use one of fp8, int8, fp6"),
        (lambda: recipes.halo(level=3), "level=3: use 0, 1 or 2"),
        (lambda: recipes.dfp16(overflow="saturate"), "overflow='saturate': use 'spill' or 'wrap'"),
        (lambda: recipes.dfp16(overflow="wrap", chain=2), "sums that wrap around have no chains, got chain=2"),
        (lambda: recipes.aqt(activations="signed"), "activations='signed', granularity='channel': use 'positive'"),
        (lambda: recipes.te_delayed(algorithm="mean"), "mean"),
        (
            lambda: recipes.nvfp4(last_blocks=2.5),
            "last_blocks is a number of blocks or a share between 0 and 1, got 2.5",
        ),
        (lambda: recipes.mxfp8(rule="nearest"), "mx:32:nearest"),
        (lambda: recipes.nvfp4(four_over_six="max"), "four_over_six='max': use 'mae', 'mse' or None"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(call: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- modules that stay high --------------------------------------------------------------------------------------------


def test_exclusions_become_rules_of_the_policy_before_its_own() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4)), "head": mlp()})
    policy = fpsim.Policy(format="e4m3fn", modules={"layers.1": "bf16"})
    kept = Exclusions(head=True, last_blocks=0.25, modules="layers.2", policy=BF16)
    assert kept.paths(model) == ["layers.2", "head", "layers.3"]
    assert kept.within(policy, model) == fpsim.Policy(
        format="e4m3fn",
        modules={"layers.2": "bf16", "head": BF16, "layers.3": BF16, "layers.1": "bf16"} | {"layers.2": BF16},
    )
    unrounded = dataclasses.replace(kept, policy=None).within(policy, model)
    assert unrounded.skip == ("layers.2", "head", "layers.3") and unrounded.at("layers.3") is None


def test_the_first_and_the_last_layer_are_those_with_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Linear(4, 4), nn.Softmax(-1))
    assert Exclusions(first_layer=True, last_layer=True).paths(model) == ["1", "3"]
    with pytest.raises(ValueError, match="ReLU has no linear layer or convolution to keep"):
        Exclusions(first_layer=True).paths(nn.ReLU())


@pytest.mark.parametrize(
    ("exclusions", "message"),
    [
        (Exclusions(head=True), r"no output layer found in Sequential.*: give head='its\.path', or head=False"),
        (Exclusions(last_blocks=1), "no list of blocks found in Sequential: give blocks='path.of.the.list', or first_"),
        (Exclusions(last_blocks=1, blocks="layers"), "blocks='layers' is no module of Sequential"),
    ],
)
def test_a_module_that_is_not_found_is_an_error(exclusions: Exclusions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exclusions.paths(mlp())


def test_lists_of_blocks_that_are_ambiguous_or_too_short_are_errors() -> None:
    def stack(n: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(n))

    model = nn.ModuleDict({"encoder": stack(2), "decoder": stack(3)})
    with pytest.raises(ValueError, match=r"several lists of blocks \(encoder, decoder\) found in ModuleDict"):
        Exclusions(last_blocks=1).paths(model)
    assert Exclusions(last_blocks=1, blocks="decoder").paths(model) == ["decoder.2"]
    with pytest.raises(ValueError, match="ModuleDict has 3 blocks, and 2 first and 1 last ones are to stay in high"):
        Exclusions(first_blocks=2, last_blocks=1, blocks="decoder").paths(model)


# -- applying ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A part that records the calls of its method."""

    name: str
    calls: list[tuple[str, Any]] = dataclasses.field(default_factory=list, compare=False)

    def apply(self, first: Any, *others: Any) -> Any:
        self.calls.append((self.name, (first, *others)))
        return first


def test_apply_calls_the_parts_in_order_with_the_model_as_it_is() -> None:
    calls: list[tuple[str, Any]] = []
    names = ("preparation", "gradients", "schedule", "optimizer")
    parts: dict[str, Any] = {name: Recording(name, calls) for name in names}
    recipe = Recipe("r", "s", fpsim.Policy(format="bf16"), **parts, exclusions=Exclusions(modules=("2",)))
    model, batches = mlp(), [torch.ones(1)]
    optimizer = torch.optim.SGD(model.parameters())
    assert recipe.apply(model, optimizer, batches=batches) == (model, optimizer)
    policy = fpsim.Policy(format="bf16", skip="2")
    assert calls == [
        ("preparation", (model, batches)), ("gradients", (model, optimizer)), ("schedule", (model, policy, "fpsim")),
        ("optimizer", (optimizer, model)),
    ]  # fmt: skip
    with pytest.raises(TypeError, match=r"Recording is no part that JSON can name: enter it in fpsim\.recipes"):
        recipe.to_json()


def test_a_backend_that_would_leave_the_policy_out_is_an_error() -> None:
    """torch's own ``eager`` takes options, and ignores them."""
    model = mlp()
    for recipe in (recipes.te_current(), replace(recipes.te_current(), schedule=Piecewise(((0, "bf16"),)))):
        with pytest.raises(ValueError, match="backend 'eager' knows no policy: use one of fpsim, fpsim_eager"):
            recipe.apply(model, backend="eager")
    with pytest.raises(ValueError, match="backend 'eager' knows no policy"):
        Piecewise(((0, "bf16"),)).apply(model, backend="eager")


@dataclass(frozen=True)
class Replacing:
    """A preparation that replaces the parameters of the first layer."""

    def apply(self, model: nn.Sequential, batches: Any) -> nn.Sequential:
        model[0] = nn.Linear(8, 16)
        return model


def test_a_preparation_that_takes_parameters_from_the_optimizer_is_an_error() -> None:
    recipe = Recipe("r", "s", None, preparation=Replacing())
    model = mlp()
    with pytest.raises(ValueError, match="the preparation of r replaces parameters that the optimizer has"):
        recipe.apply(model, torch.optim.SGD(model.parameters()))
    assert recipe.apply(model)[0] is model


def test_deepseek_keeps_both_moments_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"lm_head": mlp()}), torch.randn(4, 8)
    model.forward = lambda x: model["lm_head"](x)  # type: ignore[method-assign, assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    compiled, same = recipes.deepseek_v3(router=False).apply(model, optimizer, backend="fpsim_eager")
    for _ in range(2):
        compiled(x).square().mean().backward()
        optimizer.step()
    assert same is optimizer
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], state[name].bfloat16().float()) and state[name].any()
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_a_state_that_the_optimizer_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="SGD keeps no state"):
        RoundedState({"exp_avg": "bf16"}).apply(torch.optim.SGD(mlp().parameters()), mlp())
    assert (
        str(RoundedState("bf16", weights="bf16", kahan=True)) == "state bf16, weights bf16, weights compensated (Kahan)"
    )
