"""COAT: moments of the optimizer in FP8 with their range expanded, and activations kept in FP8."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, by_role, kept_in
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState


def coat(
    *,
    expansion: str | None = "nonzero",
    activations: bool = True,
    group: int = 16,
    head: bool | str = True,
    high: str | None = "bf16",
) -> Recipe:
    """COAT: both moments of AdamW in e4m3fn, in flat groups of 128 with dynamic range expansion; activations in e4m3fn.

    Operands of linear layers have one bf16 scale for the tensor, their results and the copies that other operations
    keep for backward one for every 16 elements of a row ("mixed granularity"). Gradients are e5m2, weights are rounded
    just in time from their dtype. The step uses the moments before they are rounded.

    Args:
        expansion: the power map of the moments. ``"nonzero"``: the least magnitude of a group is that of its nonzero
            elements, as the paper intends. ``"kernel"``: the one that the released kernel finds, in which some zeros
            count and others hide magnitudes. None: plain groups of 128.
        activations: False keeps results and saved copies as they are, so that only operands and moments are rounded.
        group: the number of elements that share a scale in results and saved copies.
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of what stays high; None leaves it in the model's dtype.

    Raises:
        ValueError: ``expansion`` is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    maps = {"nonzero": "/expand", "kernel": "/expand:kernel", None: ""}
    if expansion not in maps:
        raise ValueError(f"expansion={expansion!r} is none of COAT's: use 'nonzero', 'kernel' or None")
    state = f"e4m3fn/group:128{maps[expansion]}"
    kept, back = f"e4m3fn/block:{group}:bf16", f"e5m2/block:{group}:bf16"
    fields: dict[str, Any] = {**by_role("e4m3fn/tensor:bf16", "e4m3fn/tensor:bf16", "e5m2/tensor:bf16"), **LINEAR}
    if activations:
        fields |= {"fprop": {"output": kept}, "dgrad": {"output": back}, "saved": {"elementwise": kept}}
    return Recipe(
        name="coat",
        source="Xi et al., COAT: Compressing Optimizer States and Activations for Memory-Efficient FP8 Training, arXiv "
        "2410.19313; NVlabs/COAT 80ec99f",
        policy=Policy(**fields),
        optimizer=RoundedState({"exp_avg": state, "exp_avg_sq": state}),
        notes=(
            "The paper computes the power of a group from its range. The kernel gives NaN for half of the groups whose "
            "elements are equal, and takes some zeros as the least magnitude. This follows the paper; "
            "expansion='kernel' has the zeros of the kernel, and no NaN.",
            "The code divides by a group's float32 scale and keeps it in bf16. This divides by what it keeps.",
            "The code adds 1e-10 to amax. This does not.",
            "The code keeps what fused attention reads in bf16. Here its copies are rounded like all others.",
            "The code's norms and activation functions read the rounded copy in forward too. Here forward reads the "
            "activations, of which those that products return are rounded.",
        ),
        exclusions=Exclusions(head=head, policy=kept_in(high)) if head else None,
    )
