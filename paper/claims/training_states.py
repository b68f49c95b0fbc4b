"""Claims about training with narrow states: the model, run and baseline of `fpsim.paper.claims.training`."""

from __future__ import annotations

from dataclasses import replace

from fpsim import recipes
from fpsim.recipes import Recipe, RoundedState

from .claim import Claim
from .training import gaps


def _with_states(recipe: Recipe, name: str, states: RoundedState) -> Recipe:
    return replace(recipe, name=name, optimizer=states)


def _weights_in_fp8() -> Recipe:
    """FP8-LM with weights in e4m3fn and no wider master copy, which its paper finds to fail."""
    states = RoundedState(weights="e4m3fn/power_of_two", linear_only=True)
    return _with_states(recipes.fp8_lm("O1"), "fp8_lm, weights in FP8", states)


def _second_moment_in_narrow_range() -> Recipe:
    """The second moment in e4m3 with one scale for the tensor, which has too few exponents."""
    states = RoundedState({"exp_avg": "e4m3/tensor:encode", "exp_avg_sq": "e4m3/tensor:encode"})
    return _with_states(recipes.fp8_trillion(), "fp8_trillion, second moment in E4M3", states)


def _coarse_moments() -> Recipe:
    """COAT's recipe with moments in e2m1fn, one scale for the tensor: no codec at all."""
    states = RoundedState({"exp_avg": "e2m1fn/tensor", "exp_avg_sq": "e2m1fn/tensor"})
    return _with_states(recipes.coat(), "coat, moments in E2M1", states)


_BED = "the Llama, data and rates of the other training claims, gaps to amp_bf16 in nats"

CLAIMS = (
    Claim(
        "fp8_lm_trains",
        "fp8_lm",
        "FP8 gradients, moments and scaled FP16 weights train to the loss of BF16, and FP8 weights alone do not",
        "FP8-LM (arXiv 2310.18313), sections 2.2 and 3.3",
        f"{_BED}; levels O2 and O3; control: weights in FP8 without a master copy",
        lambda seed: gaps(seed, gap=recipes.fp8_lm("O2"), third_level=recipes.fp8_lm("O3"), control=_weights_in_fp8()),
    ),
    Claim(
        "coat_trains",
        "coat",
        "FP8 moments with range expansion and FP8 activations train to the loss of BF16",
        "COAT (arXiv 2410.19313), section 6",
        f"{_BED}; control: moments in E2M1 with one scale per tensor",
        lambda seed: gaps(seed, gap=recipes.coat(), control=_coarse_moments()),
    ),
    Claim(
        "fp8_moments_train",
        "fp8_trillion",
        "both moments in FP8, the second one in E5M2, train to the loss of BF16",
        "Fishman et al. (arXiv 2409.12517), section 5",
        f"{_BED}; control: the second moment in E4M3",
        lambda seed: gaps(seed, gap=recipes.fp8_trillion(), control=_second_moment_in_narrow_range()),
    ),
)
