"""The operators of ``torch.ops.fpsim`` on CUDA tensors: one Triton kernel per call.

Importing this module registers them; Triton and the compiler backend are imported at the first call. Where Triton is
not installed the operators run as the torch operations that define them: the same bits, many times slower.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fpsim.rounding.ops import _checked, _checked_stochastic, _round_stochastic, round_with_torch_ops

_library = torch.library.Library("fpsim", "IMPL")


@lru_cache(maxsize=1)
def _triton_rounding() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("fpsim.rounding.triton_functions")


@torch.library.impl(_library, "round", "CUDA")
def _round_cuda(x: Tensor, format: str, rounding: str, overflow: str, source: str = "") -> Tensor:
    fmt = _checked(x, format, rounding, overflow)
    written = _triton_rounding()
    if written is None:
        return torch.empty_like(x).copy_(round_with_torch_ops(x, fmt, rounding, overflow))
    with torch.cuda.device_of(x):
        return written.round_dense(x, format, rounding, overflow)


@torch.library.impl(_library, "round_stochastic", "CUDA")
def _round_stochastic_cuda(x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str) -> Tensor:
    _checked_stochastic(x, format, rounding, overflow)
    written = _triton_rounding()
    if written is None:
        return _round_stochastic(x, key, format, rounding, overflow, source)
    with torch.cuda.device_of(x):
        return written.round_stochastic_dense(x, key, format, rounding, overflow)
