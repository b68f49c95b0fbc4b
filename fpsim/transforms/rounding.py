"""Rounding of transformed numbers inside a cast."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.formats import ElementFormat
from fpsim.rounding.ops import SOURCE, round_op
from fpsim.scaling.groups import OnTensors
from fpsim.scaling.ops import SCALE_OPERATORS, round_scaled_op
from fpsim.scaling.scale import Scale
from fpsim.scaling.steps import Elements


def rounded_plainly(
    x: Tensor,
    element: ElementFormat,
    rounding: str,
    overflow: str,
    scale: Scale | None,
    axes: list[int],
    words: Tensor | None,
) -> Tensor:
    """``x`` rounded by a cast without a transform. ``words`` are the random words of its elements, if it draws any."""
    if scale is not None and scale.rule in SCALE_OPERATORS:
        factor = SCALE_OPERATORS[scale.rule](x, element.name, SOURCE)
        return Elements(element, rounding, overflow, words, OnTensors()).on_shifted_grid(x, factor)
    name = "" if scale is None else str(scale)
    return round_scaled_op(x, element.name, rounding, overflow, name, axes, SOURCE, words)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x``, of a dtype at least as wide, rounded once to ``dtype``, to nearest even."""
    if x.dtype == dtype:
        return x
    names = {torch.float32: "e8m23", torch.bfloat16: "e8m7", torch.float16: "e5m10"}
    return round_op(x, names[dtype], "nearest_even", "ovf_inf", SOURCE).to(dtype)
