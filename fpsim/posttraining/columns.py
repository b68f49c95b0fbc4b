"""Rounding a weight column by column: the scales of a group of columns are fixed before its first column is rounded.

A weight is a matrix of shape (rows, columns) = (outputs, inputs). A product with it sums over its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpsim.casts import UNSCALED, Cast, CastLike, apply_cast, check_cast, parse_cast, refuse_timed
from fpsim.rounding.carriers import check_tensor
from fpsim.rounding.ops import SOURCE, round_op
from fpsim.scaling.groups import OnTensors, split
from fpsim.scaling.ops import SCALE_OPERATORS
from fpsim.scaling.scale import MX_RULES, NV_RULES, Scale
from fpsim.scaling.steps import (
    Elements,
    dequantized,
    nv_block_scale,
    quantized,
    scales_of_groups,
)

#: A function of the ratios of the groups in some columns, float32 of shape (rows, 1), 0 for a group of zeros. It gives
#: the ratios in use, positive and of the same shape.
Constraint = Callable[[Tensor], Tensor]


def weight_cast(format: CastLike, function: str) -> Cast:
    """The cast that ``format`` denotes, if it can round a weight column by column.

    Raises:
        ValueError: the cast rounds nothing, draws random numbers, transforms the weight, or has a timed scale.
    """
    cast = parse_cast(format)
    if cast is None:
        raise ValueError(f"the format 'none' rounds nothing: {function} takes one such as 'int4/block:128'")
    refuse_timed(cast, function)
    if cast.transform is not None:
        raise ValueError(
            f"{function} rounds one column after the other, and transform {str(cast.transform)!r} mixes them: leave it "
            f"out of {str(cast)!r}, and transform the weight before"
        )
    if cast.is_stochastic:
        raise ValueError(f"{function} rounds to nearest values, got {cast.rounding!r}: leave it out of {str(cast)!r}")
    return cast


def name_of(cast: Cast) -> str:
    """A text from which `parse_cast` reads ``cast``; that of an unscaled ``int8`` says so."""
    return f"{cast}/{UNSCALED}" if cast.scale is None else str(cast)


def check_matrix(weight: Tensor, name: str = "weight") -> None:
    """Raise an error unless ``weight`` is a finite matrix of a floating-point dtype."""
    if not check_tensor(weight).is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{name} must be a matrix of shape (outputs, inputs), got shape {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError(f"{name} has an infinity or a NaN: there is nothing to round")


@dataclass(frozen=True)
class Columns:
    """How the columns of one weight are rounded.

    Attributes:
        cast: the cast.
        width: the number of consecutive columns that share scales; the last columns may be fewer.
        constraint: a function of the ratios, or None.
        whole: the scale of the tensor for ``power_of_two`` and NVFP4, else None.
        largest: the largest magnitude of the tensor for NVFP4, float32 without axes, else None.
        restored: for ``double`` the ratios of the whole weight and the ratios as they are restored, both of shape
            (rows, columns); else None.
    """

    cast: Cast
    width: int
    constraint: Constraint | None = None
    whole: Tensor | None = None
    largest: Tensor | None = None
    restored: tuple[Tensor, Tensor] | None = None

    def scales(self, group: Tensor, first: int) -> tuple[Tensor, ...]:
        """The scales of the columns ``group``, of which ``first`` is the number of the first; each of shape (rows, 1).

        Scales of the tensor have shape (1, 1) or none. They are float32, but for multipliers (OCP MX), which have the
        dtype of ``group``.
        """
        scale, call = self.cast.scale, OnTensors()
        if scale is None:
            return ()
        if scale.rule in SCALE_OPERATORS:
            assert self.whole is not None, "power_of_two is a scale of the tensor"
            return (self.whole,)
        if self.restored is not None:
            return tuple(each[:, first : first + 1] for each in self.restored)
        groups = split(group, scale, [1], call)
        amax = groups.values.abs().amax(groups.axes, keepdim=True).float()
        if scale.rule in NV_RULES:
            assert self.whole is not None, "NVFP4 has a scale of the tensor"
            parts = (nv_block_scale(groups.values, amax, self.whole, self.largest, scale, groups.axes, call),)
        else:
            parts = scales_of_groups(groups.values, group.dtype, self.cast.format, scale, groups.axes, call)
        spread = [groups.restore(part.expand_as(groups.values))[:, :1] for part in parts]
        if self.constraint is not None:
            is_zero = groups.restore((amax == 0).expand_as(groups.values))[:, :1]
            spread[0] = self.constraint(torch.where(is_zero, 0.0, spread[0]))
        return (*spread, self.whole) if self.whole is not None else tuple(spread)

    def round(self, columns: Tensor, scales: tuple[Tensor, ...]) -> Tensor:
        """Some columns, rounded with the scales of their group, in their own dtype."""
        cast, scale, call = self.cast, self.cast.scale, OnTensors()
        if scale is None:
            return apply_cast(columns, cast)
        if scale.rule in SCALE_OPERATORS:
            return round_op(columns, cast.arguments[0], cast.rounding, cast.overflow, SOURCE, *scales)
        elements = Elements(cast.format, cast.rounding, cast.overflow, None, call)
        if scale.rule in MX_RULES:
            return elements.on_shifted_grid(columns, scales[0])
        value = dequantized(quantized(columns, columns.dtype, elements, scale, scales), scale, scales, call)
        return value.to(columns.dtype)

    def round_all(self, weight: Tensor) -> Tensor:
        """The whole weight, each group of columns rounded with its own scales."""
        groups = [(first, weight[:, first : first + self.width]) for first in range(0, weight.shape[1], self.width)]
        return torch.cat([self.round(group, self.scales(group, first)) for first, group in groups], 1)


def columns_of(weight: Tensor, cast: Cast, constraint: Constraint | None = None) -> Columns:
    """How to round the columns of ``weight``, a finite matrix with elements.

    Raises:
        ValueError: the dtype lacks values of the format, a group of the flattened weight ends within a row, or there
            is a constraint and the scale is no ratio.
    """
    check_cast(weight.dtype, cast)
    scale, count, call = cast.scale, weight.shape[1], OnTensors()
    if constraint is not None and (scale is None or scale.rule not in ("fp32", "bf16")):
        raise ValueError(
            f"a constraint changes ratios, and {str(cast)!r} has none: use a scale such as block:256, row or tensor"
        )
    if scale is None:
        return Columns(cast, count)
    if scale.rule in SCALE_OPERATORS:
        return Columns(cast, count, whole=SCALE_OPERATORS[scale.rule](weight, cast.arguments[0], SOURCE))
    width = _width(scale, count)
    if scale.rule == "double":
        groups = split(weight, scale, [], call)
        parts = scales_of_groups(groups.values, weight.dtype, cast.format, scale, groups.axes, call)[:2]
        ratio, restored = (groups.restore(part.expand_as(groups.values)) for part in parts)
        return Columns(cast, width, restored=(ratio, restored))
    whole = largest = None
    if scale.rule in NV_RULES:
        groups = split(weight, scale, [1], call)
        parts = scales_of_groups(groups.values, weight.dtype, cast.format, scale, groups.axes, call)
        whole, largest = parts[1].reshape(()), weight.abs().amax().float()
    return Columns(cast, width, constraint, whole, largest)


def _width(scale: Scale, count: int) -> int:
    """The number of columns, of ``count``, that share scales."""
    if scale.kind == "column":
        return 1
    if scale.kind not in ("block", "tile", "group"):
        return count
    size = scale.sizes[-1]
    if scale.kind == "group" and count % size and size % count:
        raise ValueError(
            f"groups of {size} elements of the flattened weight end within its rows of {count}: use block:{size}, or a "
            f"size that divides {count}"
        )
    return min(size, count)
