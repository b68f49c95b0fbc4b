"""Simulate any reduced-precision floating-point format in any PyTorch model, exactly.

This module only hands names on. ``fpsim.reference``, ``fpsim.curvature``, ``fpsim.sharpness``, ``fpsim.testing`` and
what needs the compiler backend are imported on first use, because they are slow to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

import fpsim.rounding.cuda  # noqa: F401  (registers the operators' kernels for CUDA)
from fpsim.formats import FloatFormat, parse_format
from fpsim.policy.policy import Policy
from fpsim.rounding.api import decode, encode, round
from fpsim.rounding.packing import pack, unpack
from fpsim.scaling.ops import power_of_two_scale

if TYPE_CHECKING:
    from fpsim import curvature, reference, sharpness, testing
    from fpsim.compile_backend import Profiler, audit, explain, profile
    from fpsim.training.gradients import check_same_policy, round_gradients_hook
    from fpsim.training.optimizers import round_optimizer, round_parameters

__all__ = [
    "FloatFormat",
    "Policy",
    "Profiler",
    "audit",
    "check_same_policy",
    "curvature",
    "decode",
    "encode",
    "explain",
    "pack",
    "parse_format",
    "power_of_two_scale",
    "profile",
    "reference",
    "round",
    "round_gradients_hook",
    "round_optimizer",
    "round_parameters",
    "sharpness",
    "testing",
    "unpack",
]

_LAZY_MODULES = ("curvature", "reference", "sharpness", "testing")
_LAZY = {
    "Profiler": "fpsim.compile_backend",
    "audit": "fpsim.compile_backend",
    "check_same_policy": "fpsim.training.gradients",
    "explain": "fpsim.compile_backend",
    "profile": "fpsim.compile_backend",
    "round_gradients_hook": "fpsim.training.gradients",
    "round_optimizer": "fpsim.training.optimizers",
    "round_parameters": "fpsim.training.optimizers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"fpsim.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fpsim' has no attribute {name!r}")
