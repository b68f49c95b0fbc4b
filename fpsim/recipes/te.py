"""FP8 training as NVIDIA Transformer Engine does it: scales of whole tensors, delayed or current."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe

_SOURCE = "NVIDIA Transformer Engine d0067d0; Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433"


def te_current(*, output: str | None = "bf16") -> Recipe:
    """Current scaling: each tensor is scaled by the ratio of the format's and its own largest magnitude."""
    policy = Policy(
        activation="e4m3fn/tensor",
        weight="e4m3fn/tensor",
        gradient="e5m2/tensor",
        output=output,
        products="weights",
        attention="keep",
    )
    return Recipe("te_current", _SOURCE, policy)
