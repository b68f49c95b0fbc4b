"""The namespace ``torch.ops.fpsim``, which registers all operators of fpsim when one of them is looked up.

Programs of `fpsim.export` name these operators, and torch looks them up when it loads one. Registering them takes more
than a second, and most imports of fpsim load no program.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch._ops import _OpNamespace


class LazyOperators(_OpNamespace):
    """The operators that are registered, and behind them all others of fpsim."""

    __module__ = "torch.ops"  # torch makes the names of operators from it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or _is_importing():  # torch looks a name up before fpsim registers it
                raise
            importlib.import_module("fpsim.operators")
            return super().__getattr__(name)


def _is_importing() -> bool:
    """Whether a module of fpsim is being imported."""
    modules = [module for name, module in sys.modules.copy().items() if name.partition(".")[0] == "fpsim"]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules)


def look_up_lazily() -> None:
    """Let torch find all operators of fpsim by their names."""
    if not isinstance(vars(torch.ops).get("fpsim"), LazyOperators):
        torch.ops.fpsim = LazyOperators("fpsim")  # type: ignore[attr-defined]
