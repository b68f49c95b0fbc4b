"""INT8 after training and in training, as detectors run it: weights per output channel, activations per tensor."""

from __future__ import annotations

from collections.abc import Iterable

from fpsim.recipes.post_training import CalibratedLayers
from fpsim.recipes.recipe import Recipe


def int8_qat(
    *, weight: str = "int8", activation: str = "int8", fold: bool = True, skip: str | Iterable[str] = ()
) -> Recipe:
    """Symmetric integers in all linear layers and convolutions. The model then runs as it is, or is trained further.

    Args:
        weight: a cast; its rows are the numbers of one output channel.
        activation: a signed format without a scale.
        fold: whether batch normalizations are folded into the convolutions before them.
        skip: globs of layers that stay as they are, such as the last layers of a detector.
    """
    return Recipe(
        name="int8_qat",
        source="Jacob et al., arXiv 1712.05877; Krishnamoorthi, arXiv 1806.08342; Li et al., YOLOv6, arXiv 2209.02976, "
        "and its deployment by TensorRT",
        policy=None,
        preparation=CalibratedLayers(weight, activation, fold, (skip,) if isinstance(skip, str) else tuple(skip)),
        notes=(
            "The prepared model rounds by itself: compile it by any backend, or not at all.",
            "Ranges of activations are maxima over the calibration batches and stay fixed in training. YOLOv6 also "
            "offers histograms with entropy or mean squared error.",
            "Ranges of weights follow the weights in every step.",
            "Batch normalizations are folded with their running statistics, and are not trained on.",
            "Sums, additions of branches and activation functions are not rounded.",
        ),
    )
