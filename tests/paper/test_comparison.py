"""The comparison of recipes: memory by hand, and gaps over pairs of runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fpsim import recipes
from fpsim.casts import parse_cast
from fpsim.paper.comparison import compare_recipes
from fpsim.paper.config import RunConfig
from fpsim.paper.figures import Judged
from fpsim.paper.footprint import Footprint, bits_per_element, footprint
from fpsim.paper.storage import Run
from fpsim.paper.verdicts import Verdict
from fpsim.policy import Policy
from fpsim.recipes import Recipe, RoundedState


@pytest.mark.parametrize(
    ("cast", "bits"),
    [
        ("e4m3fn", 8),
        ("mxfp8", 8 + 8 / 32),  # OCP MX: an E8M0 scale for 32 elements
        ("mxfp4", 4.25),
        ("nvfp4", 4 + 8 / 16 + 32 / 4096**2),  # an e4m3fn scale for 16, a float32 for the tensor
        ("int4/group:64", 4 + 32 / 64),
        ("e4m3fn/block:1x128:bf16", 8 + 16 / 128),
        ("e4m3fn/row", 8 + 32 / 4096),
        ("nf4/group:64:double", 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2),  # 4.127 in QLoRA, section 3
        ("e4m3fn/group:128/expand", 8 + 32 / 128 + 8 / 128),
    ],
)
def test_bits_of_an_element_with_its_share_of_the_scales(cast: str, bits: float) -> None:
    assert bits_per_element(parse_cast(cast)) == pytest.approx(bits, rel=1e-12)
    assert bits_per_element(None) == 32


def test_memory_of_a_recipe() -> None:
    policy = Policy(format="mxfp8", saved={"product": "e2m1fn/mx"})
    part = RoundedState({"exp_avg": "e4m3fn", "exp_avg_sq": "bf16"}, weights="bf16", master="fp16")
    assert footprint(Recipe("mine", "", policy, optimizer=part)) == Footprint(4.0, 3.0, 4.25 / 8)
    assert footprint(recipes.amp_bf16()) == Footprint(4.0, 8.0, 2.0)
    # GaLore at rank 1/4: two moments of 8 bits with a float32 for 256, and a projection in float32.
    moments = (2 * (8 + 32 / 256) + 32) / 4 / 8
    assert footprint(recipes.galore8bit()).moments == pytest.approx(moments)
    assert footprint(recipes.galore8bit()).parameter == pytest.approx(4 + moments)


def test_every_recipe_has_a_footprint() -> None:
    for name, make in recipes.RECIPES.items():
        assert math.isfinite(footprint(make()).parameter), name


def test_gaps_are_those_of_pairs_that_did_not_diverge() -> None:
    losses = {"fp32": (2.0, 3.0, 4.0), "mine": (2.1, 3.3, 9.0)}
    runs, verdicts = [], []
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            config = RunConfig(seed=seed, recipe=recipes.amp_bf16() if name == "mine" else None)
            seconds = 2.0 if name == "mine" else 1.0
            columns = {"seconds": np.array([9.0, seconds, seconds]), "sharpness_5e4": np.array([np.nan, 0.5, np.nan])}
            runs.append(Run(f"{name}{seed}", name, config, columns, {}))
            verdicts.append(Verdict(2 if loss == 9.0 else None, (), loss, loss))
    reference, mine = compare_recipes(Judged(runs, verdicts, [True] * 6, "fp32"))
    assert (reference.gap.mean, reference.memory) == (0.0, None)
    assert (mine.gap.pairs, mine.diverged.count, mine.cost, mine.sharpness) == (2, 1, 2.0, 0.5)
    half = 12.7062047 * math.sqrt(0.02) / math.sqrt(2)  # Student, one degree of freedom
    assert (mine.gap.mean, mine.gap.high) == (pytest.approx(0.2), pytest.approx(0.2 + half, rel=1e-6))
    assert mine.memory == Footprint(4.0, 8.0, 2.0)
    lonely = [replace(run, config=replace(run.config, seed=7)) for run in runs[3:]]
    assert math.isnan(compare_recipes(Judged(runs[:3] + lonely, verdicts, [True] * 6, "fp32"))[1].gap.mean)
