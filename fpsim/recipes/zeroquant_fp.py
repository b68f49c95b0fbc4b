"""ZeroQuant-FP: 4-bit floating-point weights and 8-bit floating-point activations after training."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.post_training import RoundedWeights
from fpsim.recipes.recipe import Recipe


def zeroquant_fp(
    *,
    weight: str = "e2m1fn",
    activation: str | None = "e4m3fn",
    group: int = 256,
    constraint: str | None = "m2",
    rows: int | None = None,
    rank: int = 8,
    factors: str | None = "int8",
    as_product: bool = False,
    method: str = "gptq",
) -> Recipe:
    """Weights in groups along the inputs, rounded by GPTQ, with low-rank compensation; activations scaled per token.

    Args:
        weight: the elements of the weights: ``e2m1fn``, ``e3m0finite``, ``int4``, ``e4m3fn``.
        activation: the elements of the activations, ``e4m3fn`` or ``int8``; None leaves them unrounded.
        group: how many weights of one output share a scale.
        constraint: of the scales: None, ``m1`` (powers of two), ``m2`` (powers of two times the largest of the compute
            block), or ``m2_up`` (the same, rounded up in place of down).
        rows: how many outputs a compute block of M2 has; None means all.
        rank: of the compensation; 0 for none.
        factors: the format of its factors.
        as_product: whether the compensation is a product of its own and not added to the weight.
        method: ``gptq`` or ``nearest``.
    """
    return Recipe(
        name="zeroquant_fp",
        source="Wu, Yao and He, ZeroQuant-FP, arXiv 2307.09782; LoRC: arXiv 2303.08302; GPTQ: arXiv 2210.17323",
        policy=None if activation is None else Policy(fprop={"activation": f"{activation}/row"}, **LINEAR),
        preparation=RoundedWeights(
            f"{weight}/block:{group}",
            method=method,  # type: ignore[arg-type]
            constraint=constraint,
            rows=rows,
            rank=rank,
            factors=factors,
            as_product=as_product,
        ),
        notes=(
            "The weights are rounded once, before the model is compiled, and keep their dtype.",
            "M2 is d / 2^ceil(log2(d / d_i)), which is at most the ratio d_i, so that the largest weights of a group "
            "may saturate. m2_up rounds the ratio up. The paper has no code to tell which one it means.",
            "The paper leaves the compute block open. Here it is one group of columns in 'rows' outputs, since GPTQ "
            "knows no scales of later groups.",
            "DeepSpeed's float quantizer (csrc/fp_quantizer) rounds halves away and makes small numbers the least "
            "normal one. This rounds ties to even and has subnormals.",
        ),
        exclusions=None if activation is None else Exclusions(head=True),
    )
