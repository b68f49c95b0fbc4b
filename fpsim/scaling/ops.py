"""Scaling by powers of two: one factor for a tensor, chosen from its largest magnitude as it is rounded.

What FP8 training does before it rounds an operand ("current" or "just-in-time" scaling). The factor is a power of two,
so that multiplying by it and dividing again are exact, and the product of operands that were divided again is what
hardware gets that scales the product of the codes. Any other factor would be rounded along the way, in another place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.kernel import Int, Ops
from fpsim.rounding.ops import CARRIERS, SOURCE, TorchOps, check_carrier, working_dtype

SCALES = ("power_of_two",)


def check_scale(scale: str | None) -> None:
    """Refuse what is no way to scale.

    Raises:
        ValueError: ``scale`` is neither None nor one of `SCALES`.
    """
    if scale is not None and scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: use one of {', '.join(SCALES)}, or None")


def check_scaled_carrier(dtype: torch.dtype, fmt: FloatFormat, scale: str | None = SCALES[0]) -> None:
    """Refuse a dtype that cannot carry ``fmt``, or numbers scaled into its range and back; ``scale`` None: unscaled.

    Raises:
        TypeError, ValueError: as `fpsim.rounding.ops.check_carrier`.
        ValueError: float16, whose exponents do not suffice: scaled numbers would overflow.
    """
    check_carrier(dtype, fmt)
    if scale is not None and dtype == torch.float16:
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


# -- the operator ------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("power_of_two_scale(Tensor x, float maximum, str source) -> Tensor")


@torch.library.impl(_library, "power_of_two_scale", "CompositeExplicitAutograd")
def _scale(x: Tensor, maximum: float, source: str) -> Tensor:
    if x.numel() == 0:
        return x.new_ones(2)
    return _factors(x.abs().amax(), maximum)


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


def _factors(amax: Tensor, maximum: float) -> Tensor:
    """The scale and its reciprocal, from the largest magnitude of a tensor and the largest value of a format."""
    working = working_dtype(amax.dtype)
    ops = TorchOps(working)
    codes = factor_codes(amax.to(working).view(ops.integer), maximum, CARRIERS[working], ops)
    return torch.stack([code.view(working).to(amax.dtype) for code in codes])


def factor_codes(amax: Int, maximum: float, carrier: FloatFormat, ops: Ops) -> tuple[Int, Int]:
    """The codes of the scale and of its reciprocal.

    Args:
        amax: the code of the largest magnitude, in the terms of `fpsim.rounding.kernel`.
        maximum: the largest finite value of the format.
        carrier: float32 or float64.
        ops: does the arithmetic.
    """
    width, bias = carrier.mantissa_bits, carrier.bias
    fraction, exponent = math.frexp(maximum)
    mantissa = int((2 * fraction - 1) * (1 << width))
    # A subnormal number is an integer number of units, its code; as a number of its own that integer is normal.
    subnormal = ops.less(amax, 1 << width)
    normal = ops.choose(subnormal, ops.code_of_integer(amax), amax)
    power = exponent - 1 + bias - (normal >> width) - ops.choose(subnormal, carrier.emin - width, 0)
    power = power - ops.choose(ops.less((normal & ((1 << width) - 1)), mantissa + 1), 0, 1)
    usable = ops.less(amax, ((1 << carrier.exponent_bits) - 1) << width) & ~ops.less(amax, 1)
    power = ops.choose(usable, ops.clamp(power, 1 - bias, bias - 1), 0)
    return (bias + power) << width, (bias - power) << width


scale_op: Callable[[Tensor, float, str], Tensor] = torch.ops.fpsim.power_of_two_scale.default
