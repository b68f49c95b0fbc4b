"""Simulate any reduced-precision floating-point format in any PyTorch model, exactly.

This module only hands names on. Each public name is imported from the file that holds it when it is first used, so that
``import fpsim`` changes no setting of torch and does not even import it. If torch is there already, it finds fpsim's
operators by their names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpsim import curvature, evaluate, posttraining, recipes, reference, sharpness, testing, trainers
    from fpsim.accumulators.matmul import matmul
    from fpsim.attention.flash import FlashAttention
    from fpsim.attention.ops import flash_attention
    from fpsim.block_functions import decode_blocks, encode_blocks
    from fpsim.compile_backend import (
        Profiler,
        audit,
        calibrate,
        explain,
        export,
        load_scale_state,
        package,
        profile,
        scale_state,
    )
    from fpsim.formats import CodebookFormat, FloatFormat, IntegerFormat, parse_format
    from fpsim.policy import Policy
    from fpsim.policy.ranks import check_same_policy
    from fpsim.rounding.packing import pack, unpack
    from fpsim.scaling.ops import power_of_two_scale
    from fpsim.tensor_functions import decode, encode, round
    from fpsim.training.gradients import round_gradients_hook
    from fpsim.training.optimizers import round_optimizer
    from fpsim.training.parameters import round_parameters

#: The public modules.
_MODULES = ("curvature", "evaluate", "posttraining", "recipes", "reference", "sharpness", "testing", "trainers")

#: The other public names, and the module that holds each.
_HOMES = {
    "CodebookFormat": "fpsim.formats",
    "FlashAttention": "fpsim.attention.flash",
    "FloatFormat": "fpsim.formats",
    "IntegerFormat": "fpsim.formats",
    "Policy": "fpsim.policy",
    "Profiler": "fpsim.compile_backend",
    "audit": "fpsim.compile_backend",
    "calibrate": "fpsim.compile_backend",
    "check_same_policy": "fpsim.policy.ranks",
    "decode": "fpsim.tensor_functions",
    "decode_blocks": "fpsim.block_functions",
    "encode": "fpsim.tensor_functions",
    "encode_blocks": "fpsim.block_functions",
    "explain": "fpsim.compile_backend",
    "export": "fpsim.compile_backend",
    "flash_attention": "fpsim.attention.ops",
    "load_scale_state": "fpsim.compile_backend",
    "matmul": "fpsim.accumulators.matmul",
    "pack": "fpsim.rounding.packing",
    "package": "fpsim.compile_backend",
    "parse_format": "fpsim.formats",
    "power_of_two_scale": "fpsim.scaling.ops",
    "profile": "fpsim.compile_backend",
    "round": "fpsim.tensor_functions",
    "round_gradients_hook": "fpsim.training.gradients",
    "round_optimizer": "fpsim.training.optimizers",
    "round_parameters": "fpsim.training.parameters",
    "scale_state": "fpsim.compile_backend",
    "unpack": "fpsim.rounding.packing",
}

__all__ = [
    "CodebookFormat",
    "FlashAttention",
    "FloatFormat",
    "IntegerFormat",
    "Policy",
    "Profiler",
    "audit",
    "calibrate",
    "check_same_policy",
    "curvature",
    "decode",
    "decode_blocks",
    "encode",
    "encode_blocks",
    "evaluate",
    "explain",
    "export",
    "flash_attention",
    "load_scale_state",
    "matmul",
    "pack",
    "package",
    "parse_format",
    "posttraining",
    "power_of_two_scale",
    "profile",
    "recipes",
    "reference",
    "round",
    "round_gradients_hook",
    "round_optimizer",
    "round_parameters",
    "scale_state",
    "sharpness",
    "testing",
    "trainers",
    "unpack",
]


#: Packages that documentation names by their path, such as ``fpsim.formats.split_rounding``.
_PACKAGES = ("accumulators", "attention", "compile_backend", "formats", "policy", "rounding", "scaling", "training")


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _PACKAGES:
        return importlib.import_module(f"fpsim.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fpsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


# The sources in a clone are no whole package: the backend, the reference and the study stand in folders beside it.
# Python started in the clone finds them before an installed package, and names would be missing one by one.
if importlib.util.find_spec("fpsim.compile_backend") is None:
    raise ImportError(
        f"{__path__[0]} holds sources of fpsim, which are not whole without an installation: start Python in another "
        "folder, or install the clone by pip install --editable '.[paper]'",
        name="fpsim.compile_backend",
    )

# Programs of `export` name fpsim's operators, and torch looks these up when it loads one.
if "torch" in sys.modules:
    importlib.import_module("fpsim.lazy_operators").look_up_lazily()
