"""DeepSeek-V3's FP8 training: blocks of 128, tiles of 128 by 128, sums promoted every 128 products."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, by_role, kept_in, results
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState


def deepseek_v3(
    *,
    scales: str = "power_of_two",
    accumulator: str | None = "hopper_fp8",
    state: str | None = "bf16",
    head: bool | str = True,
    router: bool = True,
    high: str | None = "bf16",
) -> Recipe:
    """DeepSeek-V3: e4m3fn for every operand, in blocks of 128 along the summed axis, and weights in tiles.

    Activations and gradients are rounded for every axis along which a product sums, each time from high precision. The
    sum of 128 products is Hopper's (13 bits below the largest term); times both scales it is added in float32. Both
    moments of AdamW are in bfloat16, gradients of weights and master weights in float32.

    Args:
        scales: ``"power_of_two"`` (Transformer Engine's default, and DeepGEMM's UE8M0) or ``"fp32"``, amax / max.
        accumulator: that of the sums of 128 products; None for the sums of torch.
        state: the format of the states ``exp_avg`` and ``exp_avg_sq``; None leaves them alone.
        head, router: whether the output layer (or the glob of its path) and the routers of experts stay high.
        high: the format of results and of what stays high; None leaves both in the model's dtype.

    Raises:
        ValueError: ``scales`` is unknown. Otherwise the errors of `fpsim.Policy`.
    """
    if scales not in ("power_of_two", "fp32"):
        raise ValueError(f"scales={scales!r}: use 'power_of_two' or 'fp32'")
    block, tile = f"e4m3fn/block:128:{scales}", f"e4m3fn/block:128x128:{scales}"
    policy = Policy(
        **by_role(block, tile, block),
        **results(high, "fprop", "dgrad"),
        **LINEAR,
        accumulator=accumulator,
        promote=None if accumulator is None else 128,
    )
    return Recipe(
        name="deepseek_v3",
        source="DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437; deepseek-ai/DeepGEMM 54e2261; "
        "NVIDIA/TransformerEngine d0067d0",
        policy=policy,
        optimizer=None if state is None else RoundedState({"exp_avg": state, "exp_avg_sq": state}),
        notes=(
            "DeepSeek's inference code takes amax as at least 1e-4, which makes a block of small gradients zero. "
            "Transformer Engine does not: this follows it.",
            "The report keeps the inputs of the layer after attention in a 12-bit format (E5M6) for wgrad. This rounds "
            "them to e4m3fn.",
        ),
        exclusions=Exclusions(head=head, router=router, policy=kept_in(high)) if head or router else None,
    )
