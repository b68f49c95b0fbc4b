"""FracTrain: integers whose width grows in the course of training, or is chosen for each sample."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.recipes.dynamic_precision import GatedBlocks, TrainedGates
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.recipe import Recipe
from fpsim.training.schedules import Progressive

SOURCE = (
    "Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for Efficient DNN "
    "Training, NeurIPS 2020; GATECH-EIC/FracTrain 1113ec2, modules/quantize.py"
)


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
    stages = [_fields(bits, gradient_bits, bits) for bits, gradient_bits in zip(forward, backward, strict=True)]
    return Recipe(
        name="fractrain",
        source=f"{SOURCE}, train_pfq.py",
        policy=Policy(**stages[0], **LINEAR),
        schedule=Progressive(tuple(stages), threshold, decay, interval),
        notes=(
            "Zero is no value of these integers, so that the zeros of a ReLU become small numbers, as in the code.",
            "The code takes as the greatest activation and gradient the least of the samples' greatest ones, and "
            "clips the others. This takes the greatest.",
            "In evaluation the code takes running means of the ranges. This takes the range of the batch.",
            "Nothing forces a switch: if the loss never stands still, the last width never comes, as in the code.",
        ),
        exclusions=Exclusions(last_layer=True),
    )


def fractrain_dynamic(
    *,
    forward: tuple[int, ...] = (3, 4, 4, 6, 6),
    backward: tuple[int, ...] = (6, 6, 8, 8, 12),
    weight: int = 4,
    blocks: tuple[str, ...] | str = (),
    channel_axis: int = 1,
) -> Recipe:
    """Dynamic fractional quantization (DFQ): a gate in each block chooses the widths for each sample.

    The gates are a small LSTM (`fpsim.training.dynamic_precision`). The integers are those of `fractrain`. Blocks exist
    once for each pair of widths. Their copies share all parameters. Nothing outside of the blocks is rounded. Add
    ``CostTarget(0.03).term(model)`` to the loss in each step: without it nothing makes a choice cheap.

    ``apply`` needs ``batches``, of which the first shows the order of the blocks and their channels.

    Args:
        forward: the widths of activations, 2 to 16 bits, one for each choice.
        backward: the widths of gradients.
        weight: the width of weights; the README has 4 for CIFAR and 6 for ImageNet.
        blocks: globs of the paths of the blocks; none finds the members of lists of modules of one class.
        channel_axis: the axis of the channels in the inputs of blocks: 1 for images, -1 for (batch, tokens, channels).

    Raises:
        ValueError: the tuples have different lengths, or there is one choice only. Otherwise the errors of
            `fpsim.Policy`.
    """
    if len(forward) != len(backward) or len(forward) < 2:
        raise ValueError(
            f"forward and backward have one width for each of two or more choices, got {forward} and {backward}"
        )
    widths = tuple(zip(forward, backward, strict=True))
    rules = {f"*.precisions.{k}": {**_fields(a, g, weight), **LINEAR} for k, (a, g) in enumerate(widths)}
    blocks = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    return Recipe(
        name="fractrain_dynamic",
        source=f"{SOURCE}, models.py, train_dfq.py",
        policy=Policy(**LINEAR, modules=rules),
        preparation=GatedBlocks(widths, weight, blocks, channel_axis),
        optimizer=TrainedGates(),
        notes=(
            "The integers differ from those of the code as the notes of fractrain say.",
            "All copies of a block compute all samples, as in the code: costs are counted and not saved.",
            "A copy that only some samples choose rounds the zero gradients of the others too, to numbers whose mean "
            "is zero. The code takes zero as the greatest gradient of such a copy, and so clips its positive ones.",
            "Where several probabilities are the greatest, the code adds their copies. This takes the first.",
            "The code's option ada_beta, which bounds the term for the cost, is left out.",
        ),
    )


def _fields(bits: int, gradient_bits: int, weight_bits: int) -> dict[str, Any]:
    return {
        "activation": f"uint{bits}/tensor:range",
        "weight": f"uint{weight_bits}/channel:range",
        "gradient": f"uint{gradient_bits}/stochastic/tensor:range",
    }
