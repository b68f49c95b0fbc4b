"""The operator ``torch.ops.fpsim.power_of_two_scale``: its schema, and a kernel for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.formats import parse_format
from fpsim.rounding.carriers import CARRIERS, CODES_OF, working_dtype
from fpsim.rounding.definitions import pieces
from fpsim.rounding.tensors import TorchOps
from fpsim.scaling.rules import power_of_two_code

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("power_of_two_scale(Tensor x, str format, str source) -> Tensor")


@torch.library.impl(_library, "power_of_two_scale", "CompositeExplicitAutograd")
def _scale(x: Tensor, format: str, source: str) -> Tensor:
    if x.numel() == 0:
        return x.new_ones(())
    working = working_dtype(x.dtype)
    ops = TorchOps(working)
    # The codes of magnitudes are in their order. A comparison of floats would take subnormals for zeros where the
    # process does so.
    magnitude = CARRIERS[x.dtype].sign_code - 1
    codes = torch.stack([(part & magnitude).amax() for (part,) in pieces(x.view(CODES_OF[x.dtype]))])
    largest = codes.amax().view(x.dtype)
    code = power_of_two_code(largest.to(working).view(ops.integer), parse_format(format), CARRIERS[working], ops)
    return code.view(working).to(x.dtype)
