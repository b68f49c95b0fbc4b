"""The operands that each recipe rounds in a model, and how: tables from the sources, compared with `fpsim.explain`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim import recipes
from fpsim.casts import parse_cast
from fpsim.compile_backend.plan import Plan

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

E4M3, E5M2, BF16 = "e4m3fn/tensor:encode", "e5m2/tensor:encode", "bf16"
#: The operands of linear layers, in the order of the tables.
PLACES = (
    ("fprop", "activation"), ("fprop", "weight"), ("dgrad", "gradient"), ("dgrad", "weight"), ("wgrad", "gradient"),
    ("wgrad", "activation"),
)  # fmt: skip
DELAYED = "e4m3fn/tensor/history:1024", "e5m2/tensor/history:1024"
ROW, BLOCK, TILE = "e4m3fn/row:power_of_two", "e4m3fn/block:128:power_of_two", "e4m3fn/block:128x128:power_of_two"
NV, NV_TILE, NV_SR = "e2m1fn/nv", "e2m1fn/nv:16x16", "e2m1fn/stochastic:8/nv"
INT16, HALO = "int16/power_of_two", "e4m3fn/tensor"

#: For each recipe: the casts at `PLACES` in an inner layer; those in the head; the formats of results.
TABLE: dict[str, tuple[tuple[str | None, ...], tuple[str | None, ...], tuple[str | None, ...]]] = {
    "amp_bf16": ((BF16,) * 6, (BF16,) * 6, (BF16,) * 3),
    "amp_fp16": (("fp16",) * 6, ("fp16",) * 6, ("fp16",) * 3),
    "aqt": (
        ("int5/down/column:encode", "int4/channel:encode", None, "int4/channel:encode", None, "int5/down/row:encode"),
        ("int8/column:encode", "int8/channel:encode", None, "int8/channel:encode", None, "int8/row:encode"),
        (None,) * 3,
    ),
    "deepseek_v3": ((BLOCK, TILE, BLOCK, TILE, BLOCK, BLOCK), (BF16,) * 6, (BF16, BF16, None)),
    "dfp16": ((INT16,) * 6, (INT16,) * 6, (INT16, INT16, None)),
    "halo": ((HALO,) * 6, (BF16,) * 6, (BF16,) * 3),
    "mxfp8": (("e4m3fn/mx:32:rceil",) * 6, (BF16,) * 6, (BF16,) * 3),
    "nvfp4": ((NV, NV_TILE, NV_SR, NV_TILE, NV_SR, NV), (BF16,) * 6, (BF16, BF16, None)),
    "switchback": (
        ("int8/row:encode", "int8/tensor:encode", "int8/row:encode", "int8/tensor:encode", BF16, BF16),
        (BF16,) * 6,
        (BF16,) * 3,
    ),
    "te_current": ((E4M3, E4M3, E5M2, E4M3, E5M2, E4M3), (E4M3, E4M3, E5M2, E4M3, E5M2, E4M3), (BF16,) * 3),
    "te_delayed": (
        (DELAYED[0], DELAYED[0], DELAYED[1], DELAYED[0], DELAYED[1], DELAYED[0]),
        (DELAYED[0], DELAYED[0], DELAYED[1], DELAYED[0], DELAYED[1], DELAYED[0]),
        (BF16,) * 3,
    ),
    "torchao_rowwise": ((ROW,) * 6, (ROW,) * 6, (BF16,) * 3),
    "torchao_rowwise_gw_hp": (
        (ROW, ROW, ROW, "e4m3fn/sat_finite/power_of_two", BF16, BF16),
        (ROW, ROW, ROW, "e4m3fn/sat_finite/power_of_two", BF16, BF16),
        (BF16,) * 3,
    ),
    "torchao_tensorwise": ((E4M3, E4M3, E5M2, E4M3, E5M2, E4M3), (E4M3, E4M3, E5M2, E4M3, E5M2, E4M3), (BF16,) * 3),
}
#: The recipes that leave the products of attention alone: all but the baselines.
KEEPS_ATTENTION = set(TABLE) - {"amp_bf16", "amp_fp16"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        return x + self.mlp(nn.functional.scaled_dot_product_attention(y, y, y)).relu()


class Language(nn.Module):
    """A language model of two blocks, whose head is tied to the embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 32, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), ids.flatten())


def plan_of(recipe: recipes.Recipe, model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
    torch._dynamo.reset()
    return fpsim.explain(model, *args, policy=recipe.policy_for(model), **kwargs)


def casts_in(plan: Plan, path: str) -> tuple[str | None, ...]:
    """The casts at `PLACES` and of the three results in a module; products of attention have none there."""
    found = {
        (site.kind, site.role): None if site.cast is None else str(site.cast)
        for site in plan.sites
        if site.path == path
    }
    results = ((kind, "output") for kind in ("fprop", "dgrad", "wgrad"))
    return tuple(found.get(place) for place in (*PLACES, *results))


def canonical(texts: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if text is None else str(parse_cast(text)) for text in texts)


@pytest.mark.parametrize("name", TABLE)
def test_the_operands_of_each_product_have_the_casts_of_the_source(name: str) -> None:
    model, ids = Language(), torch.arange(32).view(2, 16) % 32
    recipe = recipes.RECIPES[name]()
    inner, head, results = TABLE[name]
    plan = plan_of(recipe, model, ids)
    assert casts_in(plan, "blocks.0.mlp") == canonical((*inner, *results))
    outside = (BF16,) * 3 if head == (BF16,) * 6 else (None,) * 3 if name == "aqt" else results
    assert casts_in(plan, "lm_head") == canonical((*head, *outside))
    in_attention = {site.path for site in plan.sites if site.path in ("blocks.0", "") and site.kind is not None}
    assert bool(in_attention) == (name not in KEEPS_ATTENTION)
    ends = {"nvfp4": (False, True), "aqt": (True, False)}.get(name, (False, False))
    first_layer, last_block = casts_in(plan, "blocks.0.qkv"), casts_in(plan, "blocks.1.mlp")
    assert tuple(casts != casts_in(plan, "blocks.0.mlp") for casts in (first_layer, last_block)) == ends
    if name == "nvfp4":
        assert last_block == canonical((BF16,) * 9)
        assert {str(site.transform) for site in plan.sites if site.transform} == {"hadamard:16:te"}
        assert {site.kind for site in plan.sites if site.transform} == {"wgrad"}
    sums = {"deepseek_v3": "hopper_fp8 promote=128, scales of 128 times partial sums",
            "dfp16": "e8m23/nearest_even/ovf_inf chunk=2 promote=2"}  # fmt: skip
    assert {each.accumulator for each in plan.sums} == ({sums[name]} if name in sums else set())


# -- models of Hugging Face --------------------------------------------------------------------------------------------


def hugging_face(name: str, blocks: int) -> nn.Module:
    import transformers

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if name == "llama":
        llama = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=blocks, **heads, **ends
        )
        return transformers.LlamaForCausalLM(llama)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=blocks, n_head=2, n_positions=16, **ends)
    )


#: For each model: the paths of the blocks, and the modules with weights in a block.
MODELS = {
    "llama": ("model.layers", ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}
#: Testing every pair of recipe and model takes minutes; these take all paths through exclusions.
OFTEN = {("nvfp4", "llama"), ("nvfp4", "gpt2")}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, model, marks=[] if (name, model) in OFTEN else pytest.mark.exhaustive)
        for name in TABLE
        for model in MODELS
    ],
)
def test_models_of_hugging_face_have_these_casts(name: str, architecture: str) -> None:
    model, ids = hugging_face(architecture, 2), torch.arange(16).view(2, 8)
    recipe = recipes.RECIPES[name]()
    inner, head, results = TABLE[name]
    plan = plan_of(recipe, model, input_ids=ids, labels=ids)
    blocks, layers = MODELS[architecture]
    for layer in layers[1:]:  # AQT keeps the first one
        assert casts_in(plan, f"{blocks}.0.{layer}") == canonical((*inner, *results)), layer
        last = (BF16,) * 9 if name == "nvfp4" else (*inner, *results)
        assert casts_in(plan, f"{blocks}.1.{layer}") == canonical(last), layer
    assert casts_in(plan, "lm_head")[:6] == canonical(head)


@pytest.mark.parametrize("architecture", MODELS)
def test_kept_modules_are_found_in_models_of_hugging_face(architecture: str) -> None:
    model = hugging_face(architecture, 12)
    blocks, _ = MODELS[architecture]
    kept = recipes.Exclusions(head=True, first_blocks=1, last_blocks=2).paths(model)
    assert kept == ["lm_head", f"{blocks}.0", f"{blocks}.10", f"{blocks}.11"]
    nvfp4 = recipes.nvfp4().exclusions
    assert nvfp4 is not None and nvfp4.paths(model) == ["lm_head", f"{blocks}.10", f"{blocks}.11"]


def test_the_shares_of_nvfp4_are_those_of_the_paper_in_its_model() -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(1, 1)
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(1, 1), nn.ReLU()) for _ in range(62))
    exclusions = recipes.nvfp4().exclusions
    assert exclusions is not None
    assert exclusions.paths(model) == ["lm_head", *(f"layers.{i}" for i in (0, 1, *range(54, 62)))]


def test_routers_are_kept_beside_experts_and_not_gates_of_mlps() -> None:
    import transformers

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, **heads
    )
    model = transformers.MixtralForCausalLM(mixtral)
    exclusions = recipes.deepseek_v3().exclusions
    assert exclusions is not None
    assert exclusions.paths(model) == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert exclusions.paths(hugging_face("llama", 1)) == ["lm_head"]
