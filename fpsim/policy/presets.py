"""The named policies (`fpsim.Policy.preset`): their fields. Recipes that are a policy only are among them."""

from __future__ import annotations

from typing import Any

#: The casts of the OCP FP8 hybrid recipe, by role.
HYBRID = {"activation": "e4m3fn/sat_finite", "weight": "e4m3fn/sat_finite", "gradient": "e5m2/sat_finite"}

#: The fields of a policy for linear layers and convolutions, which leaves attention alone.
LINEAR: dict[str, Any] = {"products": "weights", "attention": "keep"}


def by_role(activation: str, weight: str, gradient: str) -> dict[str, Any]:
    """The fields with the casts of the three roles."""
    return {"activation": activation, "weight": weight, "gradient": gradient}


PRESETS: dict[str, dict[str, Any]] = {
    "fp8_hybrid": {**HYBRID},
    "bf16": {"format": "bf16", "output": "bf16"},
    "fp16": {"format": "fp16", "output": "fp16"},
    "mxfp8": {"format": "mxfp8"},
    "nvfp4": {
        **by_role("nvfp4", "e2m1fn/nv:16x16", "nvfp4/stochastic:8"),
        "transform": {"wgrad": "hadamard:16:te"},
        **LINEAR,
    },
    # The recipes of `fpsim.recipes` that are a policy only, with their default arguments.
    "amp_bf16": {"format": "bf16", "output": "bf16"},
    "dfp16": {
        "format": "int16/power_of_two",
        "accumulator": "fp32 chunk=2 promote=2",
        "fprop": {"output": "int16/power_of_two"},
        "dgrad": {"output": "int16/power_of_two"},
        **LINEAR,
    },
    "te_current": {
        **by_role("e4m3fn/tensor:encode", "e4m3fn/tensor:encode", "e5m2/tensor:encode"),
        "output": "bf16",
        **LINEAR,
    },
    "te_delayed": {
        **by_role("e4m3fn/tensor/history:1024", "e4m3fn/tensor/history:1024", "e5m2/tensor/history:1024"),
        "output": "bf16",
        **LINEAR,
    },
    "torchao_rowwise": {"format": "e4m3fn/row:power_of_two", "output": "bf16", **LINEAR},
    "torchao_rowwise_gw_hp": {
        "fprop": "e4m3fn/row:power_of_two",
        "dgrad": {"gradient": "e4m3fn/row:power_of_two", "weight": "e4m3fn/power_of_two/sat_finite"},
        "wgrad": "bf16",
        "output": "bf16",
        **LINEAR,
    },
    "torchao_tensorwise": {
        **by_role("e4m3fn/tensor:encode", "e4m3fn/tensor:encode", "e5m2/tensor:encode"),
        "output": "bf16",
        **LINEAR,
    },
}

#: The recipes that are more than a policy: `fpsim.recipes.NAME(...).apply(model, optimizer)` carries them out.
MORE_THAN_POLICIES = (
    "amp_fp16", "aqt", "bf16_rope", "coat", "comet", "deepseek_v3", "fp8_federated", "fp8_lm", "fp8_trillion",
    "fractrain", "fractrain_dynamic", "galore8bit", "halo", "int8_qat", "k_sort", "low_precision_rl", "mcu_fp16",
    "mosaic_layernorm", "nf4", "switchback", "zeroquant_fp",
)  # fmt: skip
