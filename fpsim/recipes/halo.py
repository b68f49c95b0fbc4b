"""HALO: Hadamard rotations around 8-bit products for fine-tuning."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, kept_in, results
from fpsim.recipes.recipe import Recipe

_FORMATS = {"fp8": "e4m3fn", "int8": "int8", "fp6": "e3m2fn"}


def halo(*, level: int = 0, format: str = "fp8", head: bool | str = True, high: str | None = "bf16") -> Recipe:
    """HALO: one scale per tensor, amax / max, and rotations by a normalised Hadamard matrix.

    - Level 0: no rotation. All products have the same codes of a tensor.
    - Level 1: both operands of fprop are rotated along the summed axis; backward rounds the plain tensors.

    Args:
        level: 0, or 1.
        format: ``"fp8"`` (e4m3fn for all operands, gradients too), ``"int8"`` or ``"fp6"`` (e3m2fn).
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of results and of what stays high; None leaves both in the model's dtype.

    Raises:
        ValueError: an argument is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r} is none of HALO's: use one of {', '.join(_FORMATS)}")
    if level not in (0, 1):
        raise ValueError(f"level={level!r}: use 0 or 1")
    policy = Policy(
        format=f"{_FORMATS[format]}/tensor",
        transform={"fprop": "hadamard:full"} if level else {},
        **results(high),
        **LINEAR,
    )
    return Recipe(
        name="halo",
        source="Ashkboos et al., HALO: Hadamard-Assisted Low-Precision Optimization, arXiv 2501.02625; "
        "IST-DASLab/HALO d8c1dc9",
        policy=policy,
        notes=("The code's scale is a bfloat16 tensor. This has it in float32.",),
        exclusions=Exclusions(head=head, policy=kept_in(high)) if head else None,
    )
