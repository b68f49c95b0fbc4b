"""Scaling FP8 training to trillions of tokens: Smooth-SwiGLU, and both moments of the optimizer in FP8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fpsim.policy import Policy
from fpsim.recipes.parts import LINEAR, results
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState
from fpsim.training.smooth_swiglu import SmoothSwiGLU, smooth_swiglu


@dataclass(frozen=True)
class SmoothUnits:
    """The gated units of the model with Smooth-SwiGLU (`fpsim.training.smooth_swiglu`).

    Attributes:
        granularity: ``token`` as in the code, or ``channel`` as in the paper.
        detach: whether no gradient flows through the scales.
    """

    granularity: str = "token"
    detach: bool = True

    def __post_init__(self) -> None:
        if self.granularity not in ("token", "channel"):
            raise ValueError(f"granularity={self.granularity!r} of Smooth-SwiGLU: use 'token' or 'channel'")

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change ``model`` in place; ``batches`` is not used. A model that has it already stays as it is.

        Raises:
            ValueError: the model has no gated unit, or has Smooth-SwiGLU with other options.
        """
        there = {(m.granularity, m.detach, m.power_of_two) for m in model.modules() if isinstance(m, SmoothSwiGLU)}
        if there == {(self.granularity, self.detach, False)}:
            return model
        if there:
            raise ValueError(
                f"the model has Smooth-SwiGLU with other options (granularity, detach, power_of_two): {sorted(there)}: "
                "make the model anew"
            )
        return smooth_swiglu(model, self.granularity, detach=self.detach)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"Smooth-SwiGLU, one scale per {self.granularity}" + ", without gradients" * self.detach


def fp8_trillion(
    *,
    smooth: str | None = "token",
    detach: bool = True,
    history: int = 1024,
    stochastic: bool = True,
    state: bool = True,
    high: str | None = "bf16",
) -> Recipe:
    """FP8 for 2 trillion tokens on Gaudi2: delayed scales that are powers of two, Smooth-SwiGLU, FP8 moments.

    Activations and weights are e4m3 (up to 240, as on Gaudi2) in forward. Backward reads second copies of them in e5m2,
    and gradients in e5m2, rounded stochastically. After AdamW's step weights become FP16, first moments e4m3 and second
    moments e5m2, each multiplied by max / amax of the tensor and rounded to nearest, as in the script of the 7B model.

    Args:
        smooth: ``"token"`` as in the code, ``"channel"`` as in the paper, or None for no Smooth-SwiGLU.
        detach: whether no gradient flows through its scales, as in the script of the 7B model.
        history: how many steps determine a scale.
        stochastic: whether gradients are rounded stochastically.
        state: whether weights and moments are rounded.
        high: the format of the results of products; None leaves them in the model's dtype.

    Raises:
        ValueError: ``smooth`` is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    scale = f"power_of_two/history:{history}"
    gradient = f"e5m2{'/stochastic' * stochastic}/{scale}"
    fields: dict[str, Any] = {
        "fprop": {"activation": f"e4m3/{scale}", "weight": f"e4m3/{scale}"},
        "dgrad": {"gradient": gradient, "weight": f"e5m2/{scale}"},
        "wgrad": {"gradient": gradient, "activation": f"e5m2/{scale}"},
        **results(high),
        **LINEAR,
    }
    codecs = {"exp_avg": "e4m3/tensor:encode", "exp_avg_sq": "e5m2/tensor:encode"}
    return Recipe(
        name="fp8_trillion",
        source="Fishman et al., Scaling FP8 training to trillion-token LLMs, arXiv 2409.12517; "
        "Anonymous1252022/Megatron-DeepSpeed 20029cf",
        policy=Policy(**fields),
        preparation=None if smooth is None else SmoothUnits(smooth, detach),
        optimizer=RoundedState(codecs, weights="fp16/tensor:encode") if state else None,
        notes=(
            "The paper scales each channel of the gated unit's product. The code scales each token, by its linear "
            "branch. smooth='token' follows the code, 'channel' the paper.",
            "The code keeps 1024 / processes micro-batches and renews a scale when they are full; in the first batch "
            "all scales are 1. Here the last 1024 steps count, and a scale changes in each step.",
            "The code rounds weights and states of the first parameter group only. This rounds all.",
            "The source takes AdamW's eps as 1e-6: give it to your optimizer.",
        ),
    )
