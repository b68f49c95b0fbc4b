"""HALO: Hadamard rotations around 8-bit products for fine-tuning."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, kept_in, results
from fpsim.recipes.recipe import Recipe

_FORMATS = {"fp8": "e4m3fn", "int8": "int8", "fp6": "e3m2fn"}


def halo(
    *,
    level: int = 0,
    format: str = "fp8",
    block: int | None = None,
    head: bool | str = True,
    high: str | None = "bf16",
) -> Recipe:
    """HALO: one scale per tensor, amax / max, and rotations by a normalised Hadamard matrix.

    - Level 0: no rotation. All products have the same codes of a tensor.
    - Level 1: both operands of fprop are rotated along the summed axis; backward rounds the plain tensors.
    - Level 2: level 1, and in dgrad the gradient is rotated along the tokens, and the result rotated back.

    The paper recommends level 2 for INT8 and levels 0 and 1 for FP8.

    Args:
        level: 0, 1 or 2.
        format: ``"fp8"`` (e4m3fn for all operands, gradients too), ``"int8"`` or ``"fp6"`` (e3m2fn).
        block: the elements of a rotated block; None rotates the whole axis, whose length then has to be that of a known
            Hadamard matrix: of the channels for level 1, of the tokens for level 2 too.
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of results and of what stays high; None leaves both in the model's dtype.

    Raises:
        ValueError: an argument is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r} is none of HALO's: use one of {', '.join(_FORMATS)}")
    if level not in (0, 1, 2):
        raise ValueError(f"level={level!r}: use 0, 1 or 2")
    if level == 0 and block is not None:
        raise ValueError(f"level 0 rotates nothing, got block={block}: leave block out, or give level=1 or 2")
    rotation = f"hadamard:{block or 'full'}"
    transforms: dict[str, Any] = {"fprop": rotation} if level else {}
    if level == 2:
        transforms["dgrad"] = f"{rotation}:kept"
    policy = Policy(
        format=f"{_FORMATS[format]}/tensor",
        transform=transforms,
        **results(high),
        **LINEAR,
    )
    return Recipe(
        name="halo",
        source="Ashkboos et al., HALO: Hadamard-Assisted Low-Precision Optimization, arXiv 2501.02625; "
        "IST-DASLab/HALO d8c1dc9",
        policy=policy,
        notes=(
            "The code's scale is a bfloat16 tensor. This has it in float32.",
            "The code has Hadamard matrices of 2^k times 1, 12, 20, 28, 36, 40, 44, 52, 60, 100, 108, 140, 156 and 172 "
            "rows. This builds those of Paley's constructions; block=16 takes any length.",
            "The rotated weights that the FSDP variants keep for backward are not simulated.",
        ),
        exclusions=Exclusions(head=head, policy=kept_in(high)) if head else None,
    )
