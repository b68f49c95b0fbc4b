"""Differences between the versions of torch that fpsim supports, 2.11 and newer, and what all of them do too slowly."""

from __future__ import annotations

import re

import torch
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.utils import op_dtype_propagation_rules

#: Major and minor version of torch.
TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def keep_precision_casts_in_cpp() -> None:
    """Let Inductor's C++ round 16-bit numbers between fused operations under ``emulate_precision_casts``, as 2.13 does.

    Before, it remembers the float32 number that a 16-bit one was made of and goes on with that: sums of bfloat16
    numbers then have more bits than in the model.
    """
    if TORCH >= (2, 13):
        return
    remember = CppKernel.cache_dtype_convert

    def unless_emulated(kernel: CppKernel, *conversion: object) -> None:
        if not inductor_config.emulate_precision_casts:
            remember(kernel, *conversion)

    CppKernel.cache_dtype_convert = unless_emulated  # type: ignore[method-assign]


def keep_dtype_rules() -> None:
    """Let Inductor keep its table of dtype rules, which it builds anew, the same, for each operation in generated code.

    Roundings are many small operations, so that this is much of what a policy adds to the time of compiling.
    """
    build = DtypePropagationOpsHandler.__init__
    built_from: dict[str, object] = {}

    def build_once(self: DtypePropagationOpsHandler) -> None:
        if built_from != op_dtype_propagation_rules:
            build(self)
            built_from.clear()
            built_from.update(op_dtype_propagation_rules)

    DtypePropagationOpsHandler.__init__ = build_once  # type: ignore[method-assign]
