"""Published ways to train or run a model in low precision, by name.

Each function returns a frozen `Recipe`. Its method ``apply`` changes a model and its optimizer by public calls.

>>> import fpsim
>>> recipe = fpsim.recipes.te_current()
>>> recipe.policy.cast("dgrad", "gradient").written
'e5m2/nearest_even/sat_finite/tensor:encode'
"""

from __future__ import annotations

from collections.abc import Callable

from fpsim.recipes.amp import amp_bf16, amp_fp16
from fpsim.recipes.aqt import aqt
from fpsim.recipes.bf16_rope import bf16_rope
from fpsim.recipes.coat import coat
from fpsim.recipes.comet import comet
from fpsim.recipes.deepseek import deepseek_v3
from fpsim.recipes.dfp16 import dfp16
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.federated import fp8_federated
from fpsim.recipes.fp8_lm import fp8_lm
from fpsim.recipes.fp8_trillion import fp8_trillion
from fpsim.recipes.fractrain import fractrain
from fpsim.recipes.galore import galore8bit
from fpsim.recipes.halo import halo
from fpsim.recipes.int8_qat import int8_qat
from fpsim.recipes.k_sort import k_sort
from fpsim.recipes.low_precision_rl import low_precision_rl
from fpsim.recipes.mcu_fp16 import mcu_fp16
from fpsim.recipes.mosaic_layernorm import mosaic_layernorm
from fpsim.recipes.mxfp8 import mxfp8
from fpsim.recipes.nf4 import nf4
from fpsim.recipes.nvfp4 import nvfp4
from fpsim.recipes.post_training import CalibratedLayers, RoundedAttention, RoundedWeights, SplitChannels
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState
from fpsim.recipes.switchback import switchback
from fpsim.recipes.te import te_current, te_delayed
from fpsim.recipes.torchao_float8 import torchao_rowwise, torchao_rowwise_gw_hp, torchao_tensorwise
from fpsim.recipes.zeroquant_fp import zeroquant_fp

#: The recipes by name. Each takes its options as keyword arguments, and has a default for each.
RECIPES: dict[str, Callable[..., Recipe]] = {
    "amp_bf16": amp_bf16,
    "amp_fp16": amp_fp16,
    "aqt": aqt,
    "bf16_rope": bf16_rope,
    "coat": coat,
    "comet": comet,
    "deepseek_v3": deepseek_v3,
    "dfp16": dfp16,
    "fp8_federated": fp8_federated,
    "fp8_lm": fp8_lm,
    "fp8_trillion": fp8_trillion,
    "fractrain": fractrain,
    "galore8bit": galore8bit,
    "halo": halo,
    "int8_qat": int8_qat,
    "k_sort": k_sort,
    "low_precision_rl": low_precision_rl,
    "mcu_fp16": mcu_fp16,
    "mosaic_layernorm": mosaic_layernorm,
    "mxfp8": mxfp8,
    "nf4": nf4,
    "nvfp4": nvfp4,
    "switchback": switchback,
    "te_current": te_current,
    "te_delayed": te_delayed,
    "torchao_rowwise": torchao_rowwise,
    "torchao_rowwise_gw_hp": torchao_rowwise_gw_hp,
    "torchao_tensorwise": torchao_tensorwise,
    "zeroquant_fp": zeroquant_fp,
}

__all__ = [
    "RECIPES",
    "CalibratedLayers",
    "Exclusions",
    "Recipe",
    "RoundedAttention",
    "RoundedState",
    "RoundedWeights",
    "SplitChannels",
    *RECIPES,
]


def __dir__() -> list[str]:
    return sorted(__all__)
