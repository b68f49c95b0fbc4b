"""MXFP8: blocks of 32 elements with E8M0 scales, as in Transformer Engine."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, by_role, kept_in, results
from fpsim.recipes.recipe import Recipe


def mxfp8(
    *,
    rule: str = "rceil",
    hybrid: bool = False,
    square_weights: bool = False,
    head: bool | str = True,
    high: str | None = "bf16",
) -> Recipe:
    """MXFP8: every operand is e4m3fn, and 32 elements along the axis that a product sums over share a power of two.

    Each tensor is rounded once for every axis along which products sum, both times from high precision. The paper finds
    that a scale which is rounded up matches bfloat16 while that of the OCP specification (``floor``) may diverge;
    Transformer Engine computes the former (``rceil``), and so does this.

    Args:
        rule: the rule of the scales: ``"rceil"``, ``"floor"``, ``"ceil"`` or ``"even"``.
        hybrid: whether gradients are e5m2 (``Format.HYBRID``).
        square_weights: whether weights have tiles of 32 by 32, so that both orientations have the same codes.
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of results and of what stays high; None leaves both in the model's dtype.

    Raises: the errors of `fpsim.Policy`.
    """
    element = f"e4m3fn/mx:32:{rule}"
    weight = f"e4m3fn/mx:32x32:{rule}" if square_weights else element
    gradient = f"e5m2/mx:32:{rule}" if hybrid else element
    return Recipe(
        name="mxfp8",
        source="Mishra et al., Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027; "
        "NVIDIA/TransformerEngine d0067d0",
        policy=Policy(**by_role(element, weight, gradient), **results(high), **LINEAR),
        notes=(
            "The OCP specification rounds scales down. Paper and code round them up: this follows them.",
            "The policy named 'mxfp8' also rounds the products of attention and the head, and no results.",
        ),
        exclusions=Exclusions(head=head, policy=kept_in(high)) if head else None,
    )
