"""The three recipes of torchao's ``Float8LinearConfig.from_recipe_name``."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.parts import LINEAR, by_role, results, split_in_backward
from fpsim.recipes.recipe import Recipe

_SOURCE = "pytorch/ao 36027d8, torchao/float8/config.py and float8_utils.py"
_NOTES = (
    "torchao computes the factor in float64 and rounds it to float32, which is the float32 quotient; and it bounds "
    "amax by 1e-12 from below, where this has factors of at most 2^100.",
    "torchao converts every linear layer, unless a filter says otherwise: recipe.policy.with_modules({'lm_head': "
    "'bf16'}).",
)
_ROW = "e4m3fn/row:power_of_two"


def torchao_tensorwise(*, high: str | None = "bf16", accumulator: str | None = None) -> Recipe:
    """One scale per tensor, max / amax in float32: e4m3fn activations and weights, e5m2 gradients.

    Args:
        high: the format of the results of products; None leaves them in the model's dtype.
        accumulator: that of all sums, such as ``"hopper_fp8"``; backward sums are split every 128 products, as torchao
            asks for fast accumulation in fprop alone.

    Raises: the errors of `fpsim.Policy`.
    """
    casts = by_role("e4m3fn/tensor:encode", "e4m3fn/tensor:encode", "e5m2/tensor:encode")
    policy = Policy(**casts, **results(high), **LINEAR, **split_in_backward(accumulator))
    return Recipe("torchao_tensorwise", _SOURCE, policy, notes=_NOTES)


def torchao_rowwise(*, high: str | None = "bf16") -> Recipe:
    """One scale per row along the axis that a product sums over, a power of two: e4m3fn for every operand.

    Args:
        high: the format of the results of products; None leaves them in the model's dtype.

    Raises: the errors of `fpsim.Policy`.
    """
    return Recipe("torchao_rowwise", _SOURCE, Policy(format=_ROW, **results(high), **LINEAR), notes=_NOTES)


def torchao_rowwise_gw_hp(*, high: str | None = "bf16") -> Recipe:
    """`torchao_rowwise` with wgrad in high precision: dgrad has rows for the gradient and one scale for the weight.

    Args:
        high: the format of results and of the operands of wgrad; None leaves both in the model's dtype.

    Raises: the errors of `fpsim.Policy`.
    """
    policy = Policy(
        fprop=_ROW,
        dgrad={"gradient": _ROW, "weight": "e4m3fn/sat_finite/power_of_two"},
        wgrad=high or "none",
        **results(high),
        **LINEAR,
    )
    return Recipe("torchao_rowwise_gw_hp", _SOURCE, policy, notes=_NOTES)
