"""NF4 and FP4 weights with double quantization, as bitsandbytes stores them for QLoRA and for inference."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.post_training import RoundedWeights
from fpsim.recipes.recipe import Recipe

FORMATS = ("nf4", "fp4_bnb")


def nf4(*, format: str = "nf4", group: int = 64, double: bool = True, compute: str | None = "bf16") -> Recipe:
    """Each group of the flattened weight is divided by its largest magnitude, and rounded to 16 values.

    Args:
        format: ``nf4``, or ``fp4_bnb`` for the FP4 of bitsandbytes, which is not that of OCP.
        group: how many elements share a scale: 32 to 4096 in bitsandbytes.
        double: whether the scales are quantized to 8 bits, in groups of 256 (QLoRA's double quantization).
        compute: the format of the operands and results of the products, or None for the dtype of the model.

    Raises:
        ValueError: ``format`` is another one.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: use one of {', '.join(FORMATS)}")
    return Recipe(
        name="nf4",
        source="Dettmers et al., QLoRA, arXiv 2305.14314; bitsandbytes, functional.py and csrc/kernels.cu",
        policy=None
        if compute is None
        else Policy(fprop=dict.fromkeys(("activation", "weight", "output"), compute), **LINEAR),
        preparation=RoundedWeights(f"{format}/group:{group}" + ":double" * double, method="nearest"),
        notes=(
            "The weights are rounded once, before the model is compiled, and keep their dtype.",
            "Groups follow the flattened weight (outputs, inputs) and may cross rows, as in bitsandbytes.",
            "The mean of the scales is exact here; the order of the float32 sum in bitsandbytes is open.",
        ),
        exclusions=None if compute is None else Exclusions(head=True),
    )
