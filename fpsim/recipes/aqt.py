"""4-bit training of ResNets with AQT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.recipe import Recipe
from fpsim.training.fixed_bounds import Integers, fix_bounds
from fpsim.training.layers import is_linear

#: The layers that stay as they are or have another width.
_ENDS = {"head": True, "first_layer": True}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOTES_OF_CURRENT_BOUNDS = (
    "The code fixes the bounds of activations at step 7500, as averages of batches' maxima, and does not round them "
    "before: start=7500 does. This takes the maxima of the current batch.",
    "The code has 2^bits steps below the bound of positive activations and clips the last, this 2^bits - 1. start=7500 "
    "has the code's.",
    "The code rounds floor(x + 1/2), this rounds ties to even.",
)
_NOTES_OF_FIXED_BOUNDS = (
    "The code averages the maxima of several devices. This takes those of one process.",
    "The derivative is 0 where an activation is limited, and 1 elsewhere. That of the code at the limits is JAX's.",
    "The code rounds floor(x + 1/2), as this does activations with a sign. This rounds ties of weights to even.",
)


@dataclass(frozen=True)
class InputBounds:
    """Inputs of layers with bounds that are averages of batches' maxima (`fpsim.training.fixed_bounds`).

    Attributes:
        start: the step in which the bounds are fixed; before, inputs are not rounded.
        bits: the width of inputs.
        positive: whether they have no sign.
        end_bits: the width in the first layer and the output layer, with a sign; None leaves these unrounded.
        by_channel: whether each channel has a bound of its own.
    """

    start: int = 7500
    bits: int = 4
    positive: bool = True
    end_bits: int | None = 8
    by_channel: bool = True

    def apply(self, model: nn.Module, batches: Iterable[Any] | None) -> nn.Module:
        """Change the linear layers and convolutions of ``model`` in place; ``batches`` is not used.

        Raises: the errors of `fpsim.training.fixed_bounds.fix_bounds`, and those of `Exclusions.paths`.
        """
        ends = Exclusions(**_ENDS).paths(model)  # type: ignore[arg-type]
        layers = [
            path for path, module in model.named_modules() if is_linear(module) or isinstance(module, _CONVOLUTIONS)
        ]
        integers = {path: Integers(self.bits, self.positive) for path in layers if path not in ends}
        if self.end_bits is not None:
            integers |= {path: Integers(self.end_bits, False) for path in layers if path in ends}
        return fix_bounds(model, integers, by_channel=self.by_channel, start=self.start)

    def __str__(self) -> str:
        sign = "without a sign" if self.positive else "with a sign"
        ends = "unrounded" if self.end_bits is None else f"int{self.end_bits}"
        share = "channel" if self.by_channel else "tensor"
        return (
            f"inputs of layers: integers of {self.bits} bits {sign}, {ends} at the ends; one bound per {share}, fixed "
            f"in step {self.start}, unrounded before"
        )


def aqt(
    *,
    bits: int = 4,
    end_bits: int | None = 8,
    activations: str = "positive",
    granularity: str = "channel",
    start: int | None = None,
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
        start: the step in which the bounds of activations are fixed, as averages of batches' maxima: 7500 in the code.
            Before, activations are not rounded. None: their bounds are the maxima of each batch, in every step.

    Raises:
        ValueError: an argument is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    if activations not in ("positive", "symmetric") or granularity not in ("channel", "tensor"):
        raise ValueError(
            f"activations={activations!r}, granularity={granularity!r}: use 'positive' or 'symmetric', and 'channel' "
            "or 'tensor'"
        )
    of_ends = None
    if end_bits is not None:
        of_ends = _integers(end_bits, "symmetric", granularity) if start is None else _weights(end_bits)
    return Recipe(
        name="aqt",
        source="Abdolrashidi et al., Pareto-Optimal Quantized ResNet Is Mostly 4-bit, arXiv 2105.03536; "
        "google/aqt 034b0e2, aqt/jax_legacy",
        policy=_integers(bits, activations, granularity) if start is None else _weights(bits),
        preparation=None
        if start is None
        else InputBounds(start, bits, activations == "positive", end_bits, granularity == "channel"),
        notes=_NOTES_OF_CURRENT_BOUNDS if start is None else _NOTES_OF_FIXED_BOUNDS,
        exclusions=Exclusions(**_ENDS, policy=of_ends),  # type: ignore[arg-type]
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


def _weights(bits: int) -> Policy:
    """The policy of layers that round their inputs themselves: backward reads what forward read."""
    cast = {"weight": f"int{bits}/channel:encode"}
    return Policy(fprop=cast, dgrad=cast, **LINEAR)
