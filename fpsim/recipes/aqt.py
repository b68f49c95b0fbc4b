"""4-bit training of ResNets with AQT."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.recipe import Recipe


def aqt(
    *, bits: int = 4, end_bits: int | None = 8, activations: str = "positive", granularity: str = "channel"
) -> Recipe:
    """AQT: integers of few bits in fprop; backward has the same integers and unrounded gradients.

    Weights share a factor in each output channel: (2^(bits-1)-1) / amax. Activations share one in each channel, or in
    the tensor. After a ReLU they are positive and round down, to codes from 0 to 2^bits - 1; ``symmetric`` ones are
    rounded as weights are. Backward products see the rounded operands of fprop (a straight-through estimate).

    Args:
        bits: the width of weights and activations, 2 to 8.
        end_bits: the width in the first and the last layer; None leaves them unrounded.
        activations: ``"positive"`` if the inputs of all layers but the first have no sign, as after a ReLU, or
            ``"symmetric"``.
        granularity: ``"channel"`` or ``"tensor"``, of activations.

    Raises:
        ValueError: an argument is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    if activations not in ("positive", "symmetric") or granularity not in ("channel", "tensor"):
        raise ValueError(
            f"activations={activations!r}, granularity={granularity!r}: use 'positive' or 'symmetric', and 'channel' "
            "or 'tensor'"
        )
    return Recipe(
        name="aqt",
        source="Abdolrashidi et al., Pareto-Optimal Quantized ResNet Is Mostly 4-bit, arXiv 2105.03536; "
        "google/aqt 034b0e2, aqt/jax_legacy",
        policy=_integers(bits, activations, granularity),
        notes=(
            "The code fixes the bounds of activations at step 7500, as averages of batches' maxima, and does not round "
            "them before. This takes the maxima of the current batch.",
            "The code has 2^bits steps below the bound of positive activations and clips the last, this 2^bits - 1.",
            "The code rounds floor(x + 1/2), this rounds ties to even.",
        ),
        exclusions=Exclusions(
            head=True,
            first_layer=True,
            policy=None if end_bits is None else _integers(end_bits, "symmetric", granularity),
        ),
    )


def _integers(bits: int, activations: str, granularity: str) -> Policy:
    # One more bit for the sign that positive numbers do not have.
    element = f"int{bits + 1}/down" if activations == "positive" else f"int{bits}"
    across, along = ("column", "row") if granularity == "channel" else ("tensor", "tensor")
    return Policy(
        fprop={"activation": f"{element}/{across}:encode", "weight": f"int{bits}/channel:encode"},
        dgrad={"weight": f"int{bits}/channel:encode"},
        wgrad={"activation": f"{element}/{along}:encode"},
        **LINEAR,
    )
