"""FP8 with one scale per tensor, delayed or current, as in NVIDIA Transformer Engine."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.recipes.parts import LINEAR, by_role, results, split_in_backward
from fpsim.recipes.recipe import Recipe

_SOURCE = "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433; NVIDIA/TransformerEngine d0067d0"
_LEFT_TO_THE_USER = (
    "Transformer Engine rounds the layers that the user builds with it. This rounds all of them, the head too: "
    "recipe.policy.with_modules({'lm_head': 'bf16'}) keeps it."
)
_SUMS = (
    "On Hopper the sum of fprop keeps 13 bits below its largest term, and those of dgrad and wgrad move to float32 "
    "every 128 products: accumulator='hopper_fp8'. By default sums are those of torch."
)


def te_delayed(
    *,
    history: int = 1024,
    algorithm: str = "max",
    hybrid: bool = True,
    high: str | None = "bf16",
    accumulator: str | None = None,
) -> Recipe:
    """Delayed scaling: a tensor is multiplied by max / amax, with the largest magnitude of earlier steps.

    Activations, weights and gradients have histories of their own. The factor of a step comes from the steps before it:
    a magnitude that grows saturates once. The edges (zeros, infinities, modules that did not run) are those of
    ``delayed_scaling.cu`` (`fpsim.scaling.history`).

    Args:
        history: how many steps determine a factor.
        algorithm: ``"max"``, the largest magnitude of the history, or ``"most_recent"``, the last one.
        hybrid: whether gradients are e5m2 (``Format.HYBRID``), or e4m3fn.
        high: the format of the results of products; None leaves them in the model's dtype.
        accumulator: that of all sums, such as ``"hopper_fp8"``; backward sums are split every 128 products.

    Raises: the errors of `fpsim.Policy`.
    """
    timing = f"history:{history}" + ("" if algorithm == "max" else f":{algorithm}")
    policy = Policy(**_hybrid(f"tensor/{timing}", hybrid), **results(high), **LINEAR, **split_in_backward(accumulator))
    notes = (
        "The code's margin is 0 unless the user sets it, and this has none.",
        _LEFT_TO_THE_USER,
        _SUMS,
    )
    return Recipe("te_delayed", _SOURCE, policy, notes=notes)


def te_current(
    *,
    power_of_two: bool = False,
    hybrid: bool = True,
    high: str | None = "bf16",
    accumulator: str | None = None,
) -> Recipe:
    """Current scaling: a tensor is multiplied by max / amax in float32, with its own largest magnitude.

    Both orientations of a tensor have the same codes. A tensor of zeros, or with an infinity or NaN, is not scaled.

    Args:
        power_of_two: whether the mantissa of the factor is cleared (``NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1``).
        hybrid, high, accumulator: as in `te_delayed`.

    Raises: the errors of `fpsim.Policy`.
    """
    scale = "sat_finite/power_of_two" if power_of_two else "tensor:encode"
    policy = Policy(**_hybrid(scale, hybrid), **results(high), **LINEAR, **split_in_backward(accumulator))
    notes = ("The code bounds the factor by the largest float32, this by 2^100.", _LEFT_TO_THE_USER, _SUMS)
    return Recipe("te_current", _SOURCE, policy, notes=notes)


def _hybrid(scale: str, hybrid: bool) -> dict[str, Any]:
    return by_role(f"e4m3fn/{scale}", f"e4m3fn/{scale}", f"{'e5m2' if hybrid else 'e4m3fn'}/{scale}")
