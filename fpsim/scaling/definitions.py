"""The operators that compute scales, and the one that rounds with them: schemas, and kernels for any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpsim.formats import parse_element, parse_format
from fpsim.rounding.carriers import CARRIERS, CODES_OF, working_dtype
from fpsim.rounding.definitions import pieces
from fpsim.rounding.ops import round_op
from fpsim.rounding.tensors import TorchOps
from fpsim.scaling.groups import OnTensors
from fpsim.scaling.rules import NAN_MARK, mx_multiplier_code, power_of_two_code
from fpsim.scaling.scale import parse_scale
from fpsim.scaling.steps import outer_scale, round_scaled

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("power_of_two_scale(Tensor x, str format, str source) -> Tensor")
_library.define("mx_multiplier(Tensor amax, str element, str rule, str source) -> Tensor", tags=(torch.Tag.pointwise,))
_library.define(
    "round_mx(Tensor x, Tensor multiplier, str format, str rounding, str overflow, str rule, str source) -> Tensor",
    tags=(torch.Tag.pointwise,),
)
_library.define(
    "round_scaled(Tensor x, str element, str rounding, str overflow, str scale, int[] axes, str source, "
    "Tensor? words=None, Tensor? factor=None, bool outside=False) -> Tensor"
)
_library.define("outer_scale(Tensor x, str element, str scale, int[] axes, str source) -> Tensor")


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


@torch.library.impl(_library, "mx_multiplier", "CompositeExplicitAutograd")
def _mx_multiplier(amax: Tensor, element: str, rule: str, source: str) -> Tensor:
    working = working_dtype(amax.dtype)
    ops = TorchOps(working)
    magnitude = amax.to(working).view(ops.integer) & (CARRIERS[working].sign_code - 1)
    code = mx_multiplier_code(magnitude, parse_element(element), rule, CARRIERS[working], ops)  # type: ignore[arg-type]
    return code.view(working).to(amax.dtype)


@torch.library.impl(_library, "round_mx", "CompositeExplicitAutograd")
def _round_mx(
    x: Tensor, multiplier: Tensor, format: str, rounding: str, overflow: str, rule: str, source: str
) -> Tensor:
    rounded = round_op(x, format, rounding, overflow, source, multiplier)
    return torch.where(multiplier == NAN_MARK, math.nan, rounded)


@torch.library.impl(_library, "round_scaled", "CompositeExplicitAutograd")
def _round_scaled(
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    axes: list[int],
    source: str,
    words: Tensor | None = None,
    factor: Tensor | None = None,
    outside: bool = False,
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    parsed, fmt, call = parse_scale(scale or None), parse_element(element), OnTensors()
    return out.copy_(round_scaled(x, x.dtype, fmt, rounding, overflow, parsed, axes, words, call, factor, outside))


@torch.library.impl(_library, "outer_scale", "CompositeExplicitAutograd")
def _outer_scale(x: Tensor, element: str, scale: str, axes: list[int], source: str) -> Tensor:
    shape = shape_of_outer_scale(x.shape, scale, axes)
    if x.numel() == 0:
        return x.new_ones(shape, dtype=working_dtype(x.dtype))
    parsed = parse_scale(scale)
    assert parsed is not None, "the scale has a name"
    return outer_scale(x, x.dtype, parse_element(element), parsed, axes, OnTensors()).clone()


def shape_of_outer_scale(shape: Sequence[Any], scale: str, axes: Sequence[int]) -> list[Any]:
    """The shape of `fpsim.scaling.steps.outer_scale` of a tensor of this shape."""
    parsed, counted = parse_scale(scale), {axis % len(shape) for axis in axes}
    if parsed is None or parsed.kind != "row":
        return []
    return [1 if axis in counted else size for axis, size in enumerate(shape)]
