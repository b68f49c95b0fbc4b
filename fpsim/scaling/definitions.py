"""The operator ``torch.ops.fpsim.power_of_two_scale``: its schema, and a kernel for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.rounding.carriers import CARRIERS, working_dtype
from fpsim.rounding.tensors import TorchOps
from fpsim.scaling.rules import factor_codes

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("power_of_two_scale(Tensor x, float maximum, str source) -> Tensor")


@torch.library.impl(_library, "power_of_two_scale", "CompositeExplicitAutograd")
def _scale(x: Tensor, maximum: float, source: str) -> Tensor:
    if x.numel() == 0:
        return x.new_ones(2)
    return _factors(x.abs().amax(), maximum)


def _factors(amax: Tensor, maximum: float) -> Tensor:
    """The scale and its reciprocal, from the largest magnitude of a tensor and the largest value of a format."""
    working = working_dtype(amax.dtype)
    ops = TorchOps(working)
    codes = factor_codes(amax.to(working).view(ops.integer), maximum, CARRIERS[working], ops)
    return torch.stack([code.view(working).to(amax.dtype) for code in codes])
