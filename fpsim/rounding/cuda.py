"""The operators of ``torch.ops.fpsim`` on CUDA tensors: one Triton kernel per call.

Importing this module registers the kernels. The first call imports Triton. If Triton is not installed, the operators
run as the torch operations that define them, which give the same bits many times slower.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fpsim.rounding.definitions import check_arguments, check_stochastic_arguments, round_generally, round_stochastic

_library = torch.library.Library("fpsim", "IMPL")


@lru_cache(maxsize=1)
def _triton_functions() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from fpsim.rounding import triton_functions

    return triton_functions


@torch.library.impl(_library, "round", "CUDA")
def _round_cuda(
    x: Tensor, format: str, rounding: str, overflow: str, source: str = "", scale: Tensor | None = None
) -> Tensor:
    check_arguments(x, format, rounding, overflow)
    kernels = _triton_functions()
    if kernels is None:
        return round_generally(x, format, rounding, overflow, source, scale)
    with torch.cuda.device_of(x):
        return kernels.round_dense(x, format, rounding, overflow, scale)


@torch.library.impl(_library, "round_stochastic", "CUDA")
def _round_stochastic_cuda(
    x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str, scale: Tensor | None = None
) -> Tensor:
    check_stochastic_arguments(x, format, rounding, overflow)
    kernels = _triton_functions()
    if kernels is None:
        return round_stochastic(x, key, format, rounding, overflow, source, scale)
    with torch.cuda.device_of(x):
        return kernels.round_stochastic_dense(x, key, format, rounding, overflow, scale)
