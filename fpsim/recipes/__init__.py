"""Published ways to train or run a model in low precision, by name.

Each function returns a frozen `Recipe`. Its method ``apply`` changes a model and its optimizer by public calls.

>>> import fpsim
>>> recipe = fpsim.recipes.te_current()
>>> recipe.policy.cast("dgrad", "gradient").written
'e5m2/nearest_even/sat_finite/tensor:encode'
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from fpsim.recipes.fractrain import fractrain, fractrain_dynamic
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

#: The recipes by name, each with the module of this package that holds it.
_RECIPES = {
    "amp_bf16": "amp",
    "amp_fp16": "amp",
    "aqt": "aqt",
    "bf16_rope": "bf16_rope",
    "coat": "coat",
    "comet": "comet",
    "deepseek_v3": "deepseek",
    "dfp16": "dfp16",
    "fp8_federated": "federated",
    "fp8_lm": "fp8_lm",
    "fp8_trillion": "fp8_trillion",
    "fractrain": "fractrain",
    "fractrain_dynamic": "fractrain",
    "galore8bit": "galore",
    "halo": "halo",
    "int8_qat": "int8_qat",
    "k_sort": "k_sort",
    "low_precision_rl": "low_precision_rl",
    "mcu_fp16": "mcu_fp16",
    "mosaic_layernorm": "mosaic_layernorm",
    "mxfp8": "mxfp8",
    "nf4": "nf4",
    "nvfp4": "nvfp4",
    "switchback": "switchback",
    "te_current": "te",
    "te_delayed": "te",
    "torchao_rowwise": "torchao_float8",
    "torchao_rowwise_gw_hp": "torchao_float8",
    "torchao_tensorwise": "torchao_float8",
    "zeroquant_fp": "zeroquant_fp",
}

#: The module of every public name but `RECIPES`.
_HOMES = {
    **_RECIPES,
    "CalibratedLayers": "post_training",
    "Exclusions": "exclusions",
    "Recipe": "recipe",
    "RoundedAttention": "post_training",
    "RoundedState": "rounded_state",
    "RoundedWeights": "post_training",
    "SplitChannels": "post_training",
}

#: Modules that documentation names by their path, such as ``fpsim.recipes.rotary.shift_distance``.
_MODULES = ("recipe", "rotary")

__all__ = [
    "RECIPES",
    "CalibratedLayers",
    "Exclusions",
    "Recipe",
    "RoundedAttention",
    "RoundedState",
    "RoundedWeights",
    "SplitChannels",
    "amp_bf16",
    "amp_fp16",
    "aqt",
    "bf16_rope",
    "coat",
    "comet",
    "deepseek_v3",
    "dfp16",
    "fp8_federated",
    "fp8_lm",
    "fp8_trillion",
    "fractrain",
    "fractrain_dynamic",
    "galore8bit",
    "halo",
    "int8_qat",
    "k_sort",
    "low_precision_rl",
    "mcu_fp16",
    "mosaic_layernorm",
    "mxfp8",
    "nf4",
    "nvfp4",
    "switchback",
    "te_current",
    "te_delayed",
    "torchao_rowwise",
    "torchao_rowwise_gw_hp",
    "torchao_tensorwise",
    "zeroquant_fp",
]


class _Recipes(Mapping[str, "Callable[..., Recipe]"]):
    """The recipes by name. The module of a recipe is imported when the recipe is looked up."""

    def __getitem__(self, name: str) -> Callable[..., Recipe]:
        function: Callable[..., Recipe] = getattr(importlib.import_module(f"{__name__}.{_RECIPES[name]}"), name)
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(_RECIPES)

    def __len__(self) -> int:
        return len(_RECIPES)


#: The recipes by name. Each takes its options as keyword arguments, and has a default for each.
RECIPES: Mapping[str, Callable[..., Recipe]] = _Recipes()


class _Package(ModuleType):
    """This package, in which the name of a recipe is the recipe where a module has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType):  # Python binds an imported module to its name
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
