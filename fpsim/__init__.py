"""Simulate any reduced-precision floating-point format in any PyTorch model, exactly.

This module only hands names on. ``fpsim.reference``, ``fpsim.curvature``, ``fpsim.sharpness``, ``fpsim.testing`` and
what needs the compiler backend are imported on first use, because they are slow to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fpsim.formats import FloatFormat, parse_format
from fpsim.packing import pack, unpack
from fpsim.policy import Policy
from fpsim.rounding import decode, encode, round

if TYPE_CHECKING:
    from fpsim import curvature, reference, sharpness, testing
    from fpsim.compile_backend import audit, explain

__all__ = [
    "FloatFormat",
    "Policy",
    "audit",
    "curvature",
    "decode",
    "encode",
    "explain",
    "pack",
    "parse_format",
    "reference",
    "round",
    "sharpness",
    "testing",
    "unpack",
]

_LAZY_MODULES = ("curvature", "reference", "sharpness", "testing")
_LAZY = {"audit": "fpsim.compile_backend", "explain": "fpsim.compile_backend"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"fpsim.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fpsim' has no attribute {name!r}")
