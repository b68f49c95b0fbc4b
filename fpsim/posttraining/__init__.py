"""Low precision after training: weights rounded with calibration data, caches of keys and values, sorted channels.

round_weights(model, "int4/block:128", batches)
model.generate(inputs, past_key_values=RoundedCache("int4/block:32", "int4/block:32"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fpsim.posttraining.attention import round_attention
from fpsim.posttraining.calibrated_layers import RoundedInput, RoundedWeight, fold_batch_norms, round_layers
from fpsim.posttraining.constraints import power_of_two_ratios, power_of_two_scales
from fpsim.posttraining.gptq import gptq
from fpsim.posttraining.hessians import input_hessians
from fpsim.posttraining.layers import LinearLayer, linear_layers
from fpsim.posttraining.low_rank import CompensatedLinear, low_rank_factors
from fpsim.posttraining.outlier_channels import SplitLinear, split_outlier_channels
from fpsim.posttraining.sorted_keys import sort_key_channels
from fpsim.posttraining.weights import round_weights

if TYPE_CHECKING:
    from fpsim.posttraining.cache import RoundedCache

__all__ = [
    "CompensatedLinear",
    "LinearLayer",
    "RoundedCache",
    "RoundedInput",
    "RoundedWeight",
    "SplitLinear",
    "fold_batch_norms",
    "gptq",
    "input_hessians",
    "linear_layers",
    "low_rank_factors",
    "power_of_two_ratios",
    "power_of_two_scales",
    "round_attention",
    "round_layers",
    "round_weights",
    "sort_key_channels",
    "split_outlier_channels",
]


def __getattr__(name: str) -> Any:
    if name == "RoundedCache":  # its file imports transformers
        value = importlib.import_module("fpsim.posttraining.cache").RoundedCache
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fpsim.posttraining' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
