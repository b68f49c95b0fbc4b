"""The operators of transforms: schemas, and kernels for any device.

Compiled code calls the same kernels: their bits are those of eager tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.formats import parse_element
from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.flushing import keeping_subnormals
from fpsim.scaling.scale import parse_scale
from fpsim.transforms.names import parse_transform
from fpsim.transforms.transform import Transform

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("transform_parameters(Tensor first, Tensor second, str transform, int[] axes, str source) -> Tensor")
_library.define(
    "transform_operand(Tensor x, str transform, int number, int axis, str source, Tensor? parameters=None) -> Tensor"
)
_library.define(
    "round_transformed(Tensor x, str element, str rounding, str overflow, str scale, str transform, int[] axes, "
    "str source, Tensor? words=None) -> Tensor"
)


@torch.library.impl(_library, "transform_parameters", "CompositeExplicitAutograd")
@keeping_subnormals
def _parameters(first: Tensor, second: Tensor, transform: str, axes: list[int], source: str) -> Tensor:
    return named(transform).parameters(first, second, (axes[0], axes[1]))


@torch.library.impl(_library, "transform_operand", "CompositeExplicitAutograd")
@keeping_subnormals
def _operand(
    x: Tensor, transform: str, number: int, axis: int, source: str, parameters: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(x, dtype=working_dtype(x.dtype))  # compiled code relies on the strides of this tensor
    named(transform).operand(x, number, axis, parameters, out)
    return out


@torch.library.impl(_library, "round_transformed", "CompositeExplicitAutograd")
@keeping_subnormals
def _round_transformed(
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    transform: str,
    axes: list[int],
    source: str,
    words: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    parsed = parse_scale(scale or None)
    rounded = named(transform).rounded(x, parse_element(element), rounding, overflow, parsed, axes, words)
    return out.copy_(rounded)


def named(name: str) -> Transform:
    """The transform of this name."""
    transform = parse_transform(name)
    assert transform is not None, "a name denotes a transform"
    return transform
