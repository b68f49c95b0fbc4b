"""Claims about training: a small Llama on bytes of text, trained by a recipe, a control and the baseline in pairs.

The three runs of a seed share the weights at the start, the batches and the learning rate. Losses are smoothed training
losses at the end of the run, nats per token. The baseline is `fpsim.recipes.amp_bf16`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from fpsim import recipes
from fpsim.policy import Policy
from fpsim.recipes import Recipe

from ..config import RunConfig
from ..models import ModelConfig
from ..training import run
from .claim import Claim

#: The model and the run of all training claims.
BASE = RunConfig(
    model=ModelConfig(layers=2, hidden=64, heads=2, mlp=192, context=64),
    steps=300,
    batch=8,
    learning_rate=5e-3,
    warmup=30,
    stop_nonfinite=10,
)


@lru_cache(maxsize=64)
def final_loss(recipe: str, seed: int) -> float:
    """The smoothed loss at the end of a run by the recipe with this JSON text; NaN counts as infinity."""
    config = replace(BASE, recipe=Recipe.from_json(recipe), seed=seed)
    loss = run(config)[-1].smoothed_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def gaps(seed: int, **variants: Recipe) -> Mapping[str, float]:
    """The final loss of the baseline, and for each variant its final loss minus that."""
    baseline = final_loss(recipes.amp_bf16().to_json(), seed)
    losses = {name: final_loss(variant.to_json(), seed) for name, variant in variants.items()}
    return {"baseline": baseline, **{name: loss - baseline for name, loss in losses.items()}}


def _four_bits(name: str = "four_bits", **fields: object) -> Recipe:
    """Every operand of every product of a layer in e2m1fn with one scale per tensor: no recipe at all."""
    policy = Policy.from_options({"format": "e2m1fn/tensor", "products": "weights", **fields})
    return Recipe(name, "control", policy)


def _measured(**makers: Callable[[], Recipe]) -> Callable[[int], Mapping[str, float]]:
    return lambda seed: gaps(seed, **{name: make() for name, make in makers.items()})


def _stochastic_forward() -> Recipe:
    """NVFP4 with stochastic rounding of activations and weights too, which its paper finds to diverge."""
    recipe = recipes.nvfp4()
    assert recipe.policy is not None
    policy = replace(recipe.policy, activation="nvfp4/stochastic:8", weight="e2m1fn/nv:16x16/stochastic:8")
    return replace(recipe, name="nvfp4, stochastic forward", policy=policy)


def _four_bits_in_mx() -> Recipe:
    """MXFP4 in place of NVFP4, with all else of the recipe."""
    recipe = recipes.nvfp4()
    assert recipe.policy is not None
    policy = replace(recipe.policy, activation="mxfp4", weight="mxfp4", gradient="mxfp4/stochastic:8")
    return replace(recipe, name="mxfp4", policy=policy)


_BED = (
    "Llama with 2 layers of width 64 on bytes of Shakespeare, 300 steps of 512 tokens, rate 0.005, gaps to amp_bf16 in "
    "nats; noise is the standard deviation of the baseline over seeds"
)
_CONTROL = "control: every layer in E2M1 with one scale per tensor"

CLAIMS = (
    Claim(
        "delayed_scaling_trains",
        "te_delayed",
        "FP8 with delayed scales trains to the loss of BF16",
        "Micikevicius et al. (arXiv 2209.05433)",
        f"{_BED}; {_CONTROL}",
        _measured(gap=lambda: recipes.te_delayed(history=16), control=_four_bits),
    ),
    Claim(
        "row_scales_train",
        "torchao_rowwise",
        "FP8 with row scales trains to the loss of BF16",
        "torchao float8 (README)",
        f"{_BED}; {_CONTROL}",
        _measured(gap=recipes.torchao_rowwise, control=_four_bits),
    ),
    Claim(
        "fine_scales_train",
        "deepseek_v3",
        "FP8 with scales of 128 elements trains within 0.25 % of the loss of BF16",
        "DeepSeek-V3 (arXiv 2412.19437), section 3.3",
        f"{_BED}; {_CONTROL}",
        _measured(gap=recipes.deepseek_v3, control=_four_bits),
    ),
    Claim(
        "mxfp8_trains",
        "mxfp8",
        "MXFP8 trains to the loss of BF16",
        "Mishra et al. (arXiv 2506.08027)",
        f"{_BED}; {_CONTROL}",
        _measured(gap=recipes.mxfp8, control=_four_bits),
    ),
    Claim(
        "nvfp4_trains",
        "nvfp4",
        "NVFP4 ends within 1.5 % of the loss of FP8, and below MXFP4; stochastic rounding forward is worse",
        "NVIDIA (arXiv 2509.25149), sections 3 and 4",
        f"{_BED}; control: the recipe with stochastic rounding of activations and weights too",
        lambda seed: _against(
            gaps(seed, gap=recipes.nvfp4(), mx=_four_bits_in_mx(), control=_stochastic_forward()), "gap", "mx"
        ),
    ),
    Claim(
        "switchback_trains",
        "switchback",
        "SwitchBack in INT8 trains to the loss of BF16",
        "Wortsman et al. (arXiv 2304.13013)",
        f"{_BED}; {_CONTROL}",
        _measured(gap=recipes.switchback, control=_four_bits),
    ),
)


def _against(found: Mapping[str, float], one: str, other: str) -> Mapping[str, float]:
    """The quantities with one more: the gap of ``other`` minus that of ``one``."""
    return {**found, f"{other}_minus_{one}": found[other] - found[one]}
