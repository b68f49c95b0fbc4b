"""SwitchBack: 8-bit products forward and for activations' gradients, 16-bit products for weights' gradients."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.clipped_updates import ClippedUpdates
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, kept_in, results
from fpsim.recipes.recipe import Recipe


def switchback(
    *, format: str = "int8", stable: bool = True, head: bool | str = True, high: str | None = "bf16"
) -> Recipe:
    """SwitchBack: rows of activations and gradients and whole weights are scaled; wgrad stays in 16 bits.

    The sums of wgrad run over all tokens, where 8-bit rounding errors add up. Factors are 127 / amax in float32, and
    the result of a product is multiplied by their reciprocals. The optimizer is StableAdamW: AdamW with updates that
    are clipped where a second moment lags behind its gradients (`fpsim.training.clipping.clip_updates`).

    Args:
        format: ``"int8"``, or ``"fp8"``: e4m3fn activations and weights, e5m2 gradients.
        stable: whether AdamW becomes StableAdamW; False takes any optimizer.
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of results, of wgrad and of what stays high; None leaves them in the model's dtype.

    Raises:
        ValueError: ``format`` is neither. Otherwise the errors of `fpsim.Policy`.
    """
    if format not in ("int8", "fp8"):
        raise ValueError(f"format={format!r} is none of SwitchBack's: use 'int8' or 'fp8'")
    forward, backward = ("int8", "int8") if format == "int8" else ("e4m3fn", "e5m2")
    policy = Policy(
        fprop={"activation": f"{forward}/row:encode", "weight": f"{forward}/tensor:encode"},
        dgrad={"gradient": f"{backward}/row:encode", "weight": f"{forward}/tensor:encode"},
        wgrad=high or "none",
        **results(high),
        **LINEAR,
    )
    return Recipe(
        name="switchback",
        source="Wortsman et al., Stable and low-precision training for large-scale vision-language models, "
        "arXiv 2304.13013; IST-DASLab/HALO d8c1dc9, qllmt/nn/switchback.py",
        policy=policy,
        optimizer=ClippedUpdates() if stable else None,
        notes=(
            "Paper and code compute 127 x / amax, and multiply results by amax_x amax_w / 127^2. This multiplies by "
            "the float32 factor 127 / amax, and results by the reciprocals of factors: other last bits.",
            "The code keeps the amax of rows in bf16. This keeps it in float32.",
            "The paper's FP8 runs simulate e4m3fn and e5m2; it gives no code for them.",
            "LayerScale of zero, with which whole-tensor FP8 trains too in the paper, is a change of the model.",
        ),
        exclusions=Exclusions(head=head, policy=kept_in(high)) if head else None,
    )
