"""The elements of a rounded operand and the scales of their blocks, apart from each other.

A machine multiplies elements. The operator ``fpsim::scaled_part`` gives them, and gives their scales, for the arguments
with which ``fpsim::round_scaled`` gives the products of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fpsim.accumulators.shapes import each_sample
from fpsim.casts import Cast
from fpsim.formats import ElementFormat, parse_element
from fpsim.rounding.ops import SOURCE
from fpsim.scaling.groups import OnTensors, split
from fpsim.scaling.rules import NAN_MARK
from fpsim.scaling.scale import MX_RULES, NV_RULES, Scale, parse_scale
from fpsim.scaling.steps import Elements, quantized, round_scaled, scales_of_groups

#: The rules whose scales a sum can take: powers of two, ratios, and NVFP4's.
RULES = (*MX_RULES, "fp32", "bf16", *NV_RULES)

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "scaled_part(Tensor x, str element, str rounding, str overflow, str scale, int[] axes, str part, str source, "
    "Tensor? words=None) -> Tensor"
)

#: One ``part`` of ``x`` rounded to ``element`` with ``scale`` along ``axes``, in float32 and in the shape of ``x``:
#: its ``elements``, or for each of them the one of the ``scales`` of blocks by which it is multiplied. NVFP4's scale of
#: the tensor is in neither. ``words`` are the random words of stochastic rounding.
scaled_part_op: Callable[..., Tensor] = torch.ops.fpsim.scaled_part.default


@torch.library.register_fake("fpsim::scaled_part", lib=_library)
def _scaled_part_fake(x: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.impl(_library, "scaled_part", "CompositeExplicitAutograd")
def _scaled_part(
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    axes: Sequence[int],
    part: Literal["elements", "scales"],
    source: str,
    words: Tensor | None = None,
) -> Tensor:
    parsed = parse_scale(scale)
    assert parsed is not None and parsed.rule in RULES, "the scale was checked"
    if x.numel() == 0:
        return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    elements, scales = _parts(x, parse_element(element), rounding, overflow, parsed, list(axes), words)
    return (elements if part == "elements" else scales).to(torch.float32).contiguous()


@torch.library.register_vmap("fpsim::scaled_part", lib=_library)
def _scaled_part_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    return each_sample(scaled_part_op, info.batch_size, in_dims, arguments)


def parts_of(x: Tensor, cast: Cast, axis: int) -> tuple[Tensor, Tensor]:
    """The elements of ``x`` rounded by ``cast``, and for each its scale, along ``axis``."""
    arguments = (x, cast.format.name, cast.rounding, cast.overflow, str(cast.scale), [axis])
    return scaled_part_op(*arguments, "elements", SOURCE), scaled_part_op(*arguments, "scales", SOURCE)


def _parts(
    x: Tensor,
    element: ElementFormat,
    rounding: str,
    overflow: str,
    scale: Scale,
    axes: list[int],
    words: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = OnTensors()
    if scale.rule in MX_RULES and words is None:
        x = x.double()  # holds every element times its scale
    groups = split(x, scale, axes, call)
    factors = scales_of_groups(groups.values, x.dtype, element, scale, groups.axes, call)
    if scale.rule in MX_RULES:
        rounded = round_scaled(x, x.dtype, element, rounding, overflow, scale, axes, words, call).double()
        multipliers = factors[0].double()
        elements = split(rounded, scale, axes, call).values * multipliers
        scales = torch.where(factors[0] == NAN_MARK, torch.nan, 1 / multipliers)
    else:
        drawn = None if words is None else split(words, scale, axes, call).values
        elements = quantized(groups.values, x.dtype, Elements(element, rounding, overflow, drawn, call), scale, factors)
        scales = factors[0]
    # The scale of a block with a NaN is NaN.
    return groups.restore(elements.nan_to_num(0.0)), groups.restore(scales.expand_as(groups.values))
