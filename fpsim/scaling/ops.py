"""The operator that computes scales, complete, and `fpsim.power_of_two_scale`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fpsim.scaling.definitions  # noqa: F401  (registers the operator)
from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.carriers import check_carrier
from fpsim.rounding.ops import SOURCE

#: The scale of a tensor and its reciprocal, of shape (2,), for a format with this largest value. The last argument is
#: `fpsim.rounding.ops.SOURCE`.
scale_op: Callable[[Tensor, float, str], Tensor] = torch.ops.fpsim.power_of_two_scale.default

_library = torch.library.Library("fpsim", "FRAGMENT")


def check_scaled_carrier(dtype: torch.dtype, fmt: FloatFormat) -> None:
    """Refuse a dtype that cannot carry ``fmt``, or numbers that are scaled into its range and back.

    Raises:
        TypeError, ValueError: as `fpsim.rounding.carriers.check_carrier`.
        ValueError: float16, whose exponents do not suffice: scaled numbers would overflow.
    """
    check_carrier(dtype, fmt)
    if dtype == torch.float16:
        raise ValueError(
            "scaled rounding of float16 tensors would overflow: convert them to bfloat16 or float32, or leave out the "
            "scale and scale the loss"
        )


def power_of_two_scale(x: Tensor, format: str | FloatFormat) -> Tensor:
    """The largest power of two by which ``x`` can be multiplied without passing ``format``'s largest finite value.

    ``2**floor(log2(format.max / amax))`` with ``amax`` the largest magnitude in ``x``, computed from bits, so that no
    logarithm can falsify it. 1 where ``amax`` is zero, infinite or NaN, and where ``x`` is empty. Limited to the powers
    of two of which the reciprocal is a normal number of the dtype too: 2^-126 to 2^126, in float64 2^-1022 to 2^1022.

    ``fpsim.round(x * s, format) / s`` is what ``fpsim.round(x, format, scale="power_of_two")`` gives.

    Args:
        x: float64, float32 or bfloat16, any shape, strides and device. Under `torch.vmap` each sample has its scale.
        format: a name (`fpsim.parse_format`) or a `FloatFormat`.

    Returns:
        A tensor of no dimensions, of the dtype and device of ``x``. It has no derivative.

    Raises:
        TypeError, ValueError: a format with values that the dtype of ``x`` lacks, or float16.

    Source: the code of FP8-LM (arXiv 2310.18313), MS-AMP, with a history of one step.

    >>> power_of_two_scale(torch.tensor([0.3, -1.7]), "e4m3fn")
    tensor(256.)
    """
    fmt = parse_format(format)
    check_scaled_carrier(x.dtype, fmt)
    return scale_op(x.detach(), fmt.max, SOURCE)[0]


@torch.library.register_fake("fpsim::power_of_two_scale", lib=_library)
def _scale_fake(x: Tensor, maximum: float, source: str) -> Tensor:
    if "torch._inductor.lowering" in sys.modules:  # something is being compiled
        import fpsim.scaling.inductor  # noqa: F401
    return x.new_empty(2)


@torch.library.register_vmap("fpsim::power_of_two_scale", lib=_library)
def _scale_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, maximum: float, source: str
) -> tuple[Tensor, int]:
    xs = x.movedim(in_dims[0] or 0, 0)
    return torch.stack([scale_op(each, maximum, source) for each in xs]), 0
