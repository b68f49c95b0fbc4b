"""FracTrain: integers whose width grows in the course of training."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.recipe import Recipe
from fpsim.training.schedules import Progressive


def fractrain(
    *,
    forward: tuple[int, ...] = (3, 4, 6, 8),
    backward: tuple[int, ...] = (6, 6, 8, 8),
    interval: int = 400,
    threshold: float = 0.05,
    decay: float = 0.3,
) -> Recipe:
    """Progressive fractional quantization (PFQ): the next widths come when the loss stands still.

    Integers count from the least element, in steps of the range divided by their number. Activations and gradients have
    one range for the tensor, weights have one for each output channel. Gradients are rounded
    stochastically. With one width in each tuple the precision is static. The compiled model is told of every step:
    ``model.step(loss)`` (`fpsim.training.schedules.Scheduled`).

    Args:
        forward: the widths of weights and activations, 2 to 16 bits, one for each stage.
        backward: the widths of gradients.
        interval: the number of steps whose mean loss counts as one loss.
        threshold, decay: those of `Progressive`. The defaults are those of the README; the code has 0.15 and 0.4.

    Raises:
        ValueError: the tuples have different lengths. Otherwise the errors of `fpsim.Policy` and `Progressive`.
    """
    if len(forward) != len(backward) or not forward:
        raise ValueError(f"forward and backward have one width for each stage, got {forward} and {backward}")
    stages = [_fields(bits, gradient_bits) for bits, gradient_bits in zip(forward, backward, strict=True)]
    return Recipe(
        name="fractrain",
        source="Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for Efficient "
        "DNN Training, NeurIPS 2020; GATECH-EIC/FracTrain 1113ec2, modules/quantize.py, train_pfq.py",
        policy=Policy(**stages[0], **LINEAR),
        schedule=Progressive(tuple(stages), threshold, decay, interval),
        notes=(
            "Zero is no value of these integers, so that the zeros of a ReLU become small numbers, as in the code.",
            "Dynamic fractional quantization (DFQ) is left out: there an LSTM beside the model, which is trained with "
            "it, chooses one of five pairs of widths for each image and each residual block.",
            "The code takes as the greatest activation and gradient the least of the samples' greatest ones, and "
            "clips the others. This takes the greatest.",
            "In evaluation the code takes running means of the ranges. This takes the range of the batch.",
            "Nothing forces a switch: if the loss never stands still, the last width never comes, as in the code.",
        ),
        exclusions=Exclusions(last_layer=True),
    )


def _fields(bits: int, gradient_bits: int) -> dict[str, Any]:
    return {
        "activation": f"uint{bits}/tensor:range",
        "weight": f"uint{bits}/channel:range",
        "gradient": f"uint{gradient_bits}/stochastic/tensor:range",
    }
