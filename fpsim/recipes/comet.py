"""COMET: 4-bit weights, 4-bit activations but for blocks of outlier channels, and a 4-bit cache of keys and values."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.post_training import SplitChannels
from fpsim.recipes.recipe import Recipe


def comet(
    *,
    block: int = 128,
    ratio: float = 6.0,
    most: float = 0.2,
    outliers: str = "int8",
    key_value: str | None = "int4/block:128",
    along: str = "tokens",
) -> Recipe:
    """Channels with outliers share a few blocks of INT8; the other blocks of activations, and all weights, are INT4.

    Args:
        block: how many channels form a block, with a scale for each token (activations) or output (weights).
        ratio, most: which channels are outliers (`fpsim.posttraining.split_outlier_channels`).
        outliers: the elements of activations in blocks of outliers.
        key_value: the format of keys and values; None leaves them.
        along: whether their scales lie along ``tokens`` (one for each channel) or ``head_dim``.
    """
    others = f"int4/block:{block}"
    return Recipe(
        name="comet",
        source="Liu et al., COMET: Towards Practical W4A4KV4 LLMs Serving, arXiv 2410.12168",
        policy=Policy(
            fprop={"activation": others, "weight": others},
            modules={"*.outliers": {"fprop": {"activation": f"{outliers}/block:{block}", "weight": others}, **LINEAR}},
            **LINEAR,
        ),
        preparation=SplitChannels(
            ratio=ratio,
            block=block,
            most=most,
            key=key_value,
            value=key_value,
            along=along,  # type: ignore[arg-type]
        ),
        notes=(
            "The paper gives no threshold of outliers. 'ratio' and 'most' are choices of this recipe.",
            "Each layer gathers its own channels at run time. COMET folds the permutation into the layer before.",
            "A block of keys and values along tokens is rounded when its last token is there.",
        ),
        exclusions=Exclusions(head=True),
    )
