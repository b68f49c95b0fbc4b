"""The operators of transforms, and the rules that torch's compilers need for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.ops import register_lowerings
from fpsim.transforms.definitions import named

#: Arguments: the first and the second operand of a product, the name of a transform, the axis of each over which the
#: product sums, and `fpsim.rounding.ops.SOURCE`. The result is what both operands' changes share
#: (`fpsim.transforms.transform.Transform.parameters`).
transform_parameters_op: Callable[..., Tensor] = torch.ops.fpsim.transform_parameters.default
#: Arguments: an operand, the name of a transform, 0 or 1 for the first or second operand, its axis, the source, and the
#: parameters if the transform has any. The result is the changed operand in the working dtype.
transform_operand_op: Callable[..., Tensor] = torch.ops.fpsim.transform_operand.default
#: Rounds by a cast with a transform. Arguments: a tensor, the name of an element format, a rounding, an overflow mode,
#: the name of a scale or "", that of a transform, the axes along which a product sums, the source, and for stochastic
#: rounding the random words.
round_transformed_op: Callable[..., Tensor] = torch.ops.fpsim.round_transformed.default

_library = torch.library.Library("fpsim", "FRAGMENT")


def _register_lowerings() -> None:
    register_lowerings()
    if "torch._inductor.lowering" in sys.modules:  # something is being compiled
        import fpsim.transforms.inductor  # noqa: F401


@torch.library.register_fake("fpsim::transform_parameters", lib=_library)
def _parameters_fake(first: Tensor, second: Tensor, transform: str, axes: list[int], source: str) -> Tensor:
    dtype = torch.promote_types(working_dtype(first.dtype), working_dtype(second.dtype))
    _register_lowerings()
    is_index = named(transform).parameters_are_indices
    return first.new_empty([first.shape[axes[0]]], dtype=torch.int64 if is_index else dtype)


@torch.library.register_fake("fpsim::transform_operand", lib=_library)
def _operand_fake(
    x: Tensor, transform: str, number: int, axis: int, source: str, parameters: Tensor | None = None
) -> Tensor:
    _register_lowerings()
    return torch.empty_like(x, dtype=working_dtype(x.dtype))


@torch.library.register_fake("fpsim::round_transformed", lib=_library)
def _round_transformed_fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_vmap("fpsim::round_transformed", lib=_library)
def _round_transformed_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    transform: str,
    axes: list[int],
    source: str,
    words: Tensor | None = None,
) -> tuple[Tensor, int]:
    xs = _samples(x, in_dims[0], info.batch_size)
    own = [None] * len(xs) if words is None else _samples(words, in_dims[-1], info.batch_size)
    return torch.stack(
        [
            round_transformed_op(each, element, rounding, overflow, scale, transform, axes, source, drawn)
            for each, drawn in zip(xs, own, strict=True)
        ]
    ), 0


@torch.library.register_vmap("fpsim::transform_parameters", lib=_library)
def _parameters_vmap(
    info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, transform: str, axes: list[int], source: str
) -> tuple[Tensor, int]:
    pairs = zip(*(_samples(x, in_dims[i], info.batch_size) for i, x in enumerate((first, second))), strict=True)
    return torch.stack([transform_parameters_op(a, b, transform, axes, source) for a, b in pairs]), 0


@torch.library.register_vmap("fpsim::transform_operand", lib=_library)
def _operand_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    transform: str,
    number: int,
    axis: int,
    source: str,
    parameters: Tensor | None = None,
) -> tuple[Tensor, int]:
    xs = _samples(x, in_dims[0], info.batch_size)
    own = [None] * len(xs) if parameters is None else _samples(parameters, in_dims[-1], info.batch_size)
    pairs = zip(xs, own, strict=True)
    return torch.stack([transform_operand_op(a, transform, number, axis, source, b) for a, b in pairs]), 0


def _samples(x: Tensor, batch_dim: int | None, batch_size: int) -> Sequence[Tensor]:
    return [x] * batch_size if batch_dim is None else x.unbind(batch_dim)
