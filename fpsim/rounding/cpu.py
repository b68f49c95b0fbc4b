"""Eager rounding on the CPU: float32 shortcuts that give the bits of the general kernel in a third of the time.

Importing this module registers the CPU kernel of ``fpsim::round``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpsim.formats import FloatFormat
from fpsim.rounding.definitions import CHUNK, check_arguments, scales_of
from fpsim.rounding.kernel import FLOAT32
from fpsim.rounding.tensors import round_with_torch_ops

_library = torch.library.Library("fpsim", "IMPL")

_MAGNITUDE = (1 << 31) - 1  # all bits of a float32 except the sign


@torch.library.impl(_library, "round", "CPU")
def _round_cpu(
    x: Tensor, format: str, rounding: str, overflow: str, source: str = "", scale: Tensor | None = None
) -> Tensor:
    fmt = check_arguments(x, format, rounding, overflow)
    out = torch.empty_like(x)
    if out.stride() != x.stride():
        x = torch.empty_like(x).copy_(x)  # dense and in the order of `out`, but another tensor: `out` is overwritten
    if scale is not None and scale.numel() > 1:
        scale = _flat(torch.empty_like(x).copy_(scale))
    values, result = _flat(x), _flat(out)
    chunk = CHUNK * torch.get_num_threads()
    pieces = zip(values.split(chunk), result.split(chunk), scales_of(scale, values, chunk), strict=False)
    for piece, target, factor in pieces:
        if factor is None:
            done = _round_quickly(piece, fmt, rounding, overflow, target)
        else:
            done = _round_scaled_quickly(piece, factor, fmt, rounding, overflow, target)
        if not done:
            target.copy_(round_with_torch_ops(piece, fmt, rounding, overflow, scale=factor))
    return out


def _round_quickly(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, out: Tensor) -> bool:
    """Round ``x`` into ``out`` by a shortcut, if one gives the bits of the kernel. Whether one does."""
    if x.dtype != torch.float32:
        return False
    if can_round_by_scaling(fmt, overflow) and not (rounding in ("up", "down", "to_odd") and has_subnormal(x)):
        round_by_scaling(x, fmt, rounding, overflow, out)
        return True
    if has_one_unit(fmt, overflow):
        round_at_one_unit(x, fmt, rounding, out)
        return True
    return False


def _round_scaled_quickly(
    x: Tensor, scale: Tensor, fmt: FloatFormat, rounding: str, overflow: str, out: Tensor
) -> bool:
    """`_round_quickly` between a multiplication by ``scale`` and a division by it.

    Both are exact, whether subnormals are flushed or not, unless an operand or a result is subnormal.
    """
    if x.dtype != torch.float32 or scale.numel() > 1:
        return False
    power = (int(scale.view(torch.int32)) >> FLOAT32.mantissa_bits) - FLOAT32.bias
    if power < FLOAT32.emin:  # the code of zero stands for 2^-127
        return False
    if has_magnitude_below(x, (1 + max(0, -power)) << FLOAT32.mantissa_bits):
        return False
    if not _round_quickly(x * scale, fmt, rounding, overflow, out):
        return False
    if has_magnitude_below(out, (1 + max(0, power)) << FLOAT32.mantissa_bits):
        return False
    out.div_(scale)
    return True


def has_one_unit(fmt: FloatFormat, overflow: str) -> bool:
    """Whether `round_at_one_unit` gives the kernel's bits: the format is float32 with fewer mantissa bits."""
    return overflow == "ovf_inf" and fmt == FloatFormat(8, fmt.mantissa_bits) and 1 <= fmt.mantissa_bits <= 22


def round_at_one_unit(x: Tensor, fmt: FloatFormat, rounding: str, out: Tensor) -> None:
    """Round float32 ``x`` into ``out`` by adding and masking, for formats whose unit is the same for all codes.

    This takes a third of the kernel's operations. The sums do not reach the sign bit, and a carry out of the largest
    value gives infinity. All NaNs are replaced by the canonical one first, whose sums do not carry into the sign.
    """
    torch.nan_to_num(x, nan=math.nan, posinf=math.inf, neginf=-math.inf, out=out)
    code = out.view(torch.int32)
    shift = FLOAT32.mantissa_bits - fmt.mantissa_bits
    dropped_bits = (1 << shift) - 1
    if rounding == "nearest_even":
        code.add_((code >> shift).bitwise_and_(1)).add_(dropped_bits >> 1)
    elif rounding == "nearest_away":
        code.add_((dropped_bits >> 1) + 1)
    elif rounding == "up":
        code.add_((code >> 31).bitwise_not_().bitwise_and_(dropped_bits))
    elif rounding == "down":
        code.add_((code >> 31).bitwise_and_(dropped_bits))
    elif rounding == "to_odd":
        code.bitwise_or_((code & dropped_bits).add_(dropped_bits))  # the sum has the unit's bit set where x is inexact
    code.bitwise_and_(~dropped_bits)


def can_round_by_scaling(fmt: FloatFormat, overflow: str) -> bool:
    """Whether `round_by_scaling` gives the same bits as the kernel."""
    overflows_to_next_binade = fmt.has_infinity and fmt.specials != "p3109" and 1 <= fmt.max_exponent < 127
    return (
        (overflow == "sat_finite" or fmt.has_infinity)
        and (overflow != "ovf_inf" or overflows_to_next_binade)
        and fmt.subnormals
        and fmt.signed
        and fmt.exponent_bits > 1
        and 1 <= fmt.mantissa_bits <= 22  # with 0, ties go to the even code, not to the even multiple
        and FLOAT32.emin < fmt.emin - fmt.mantissa_bits <= 0  # only the input can be a float32 subnormal
    )


def round_by_scaling(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, out: Tensor) -> None:
    """Round float32 ``x`` into ``out`` by dividing by the unit of its binade and rounding to an integer.

    This takes a third of the kernel's operations. It is for eager CPU calls only: there torch divides and multiplies
    in IEEE arithmetic, which is exact for a power of two. It is correct under flush-to-zero too, except that `up`,
    `down` and `to_odd` must not be given float32 subnormals (`has_subnormal`).
    """
    nearest = rounding in ("nearest_even", "nearest_away")
    overflows = [overflow == "ovf_inf" and (nearest or rounding == side) for side in ("down", "up")]
    lowest, highest = (2.0 ** (fmt.max_exponent + 1) if beyond else fmt.max for beyond in overflows)
    of_magnitude = rounding in ("nearest_away", "toward_zero", "to_odd")
    if of_magnitude:
        torch.abs(x, out=out).clamp_(max=highest)
    else:
        torch.clamp(x, -lowest, highest, out=out)

    exponent = (out.view(torch.int32) & (FLOAT32.max_code + 1)).clamp_(min=(fmt.emin + FLOAT32.bias) << 23)
    unit = exponent.sub_((fmt.mantissa_bits - (rounding == "to_odd")) << 23).view(torch.float32)
    out.div_(unit)
    if rounding == "nearest_even":
        out.round_()
    elif rounding == "nearest_away":
        out.add_(0.5 - 2.0**-25).floor_()  # adding 0.5 would round the number just below 0.5 to 1
    elif rounding == "up":
        out.ceil_()
    elif rounding in ("down", "toward_zero"):
        out.floor_()
    else:  # the unit is doubled: even multiples stay, every number between two of them becomes the odd one
        even = out.floor()
        torch.add(even, out.sub_(even).ceil_(), alpha=0.5, out=out)
    out.mul_(unit)

    if any(overflows):
        scale = 2.0 ** (FLOAT32.max_exponent - fmt.max_exponent)
        out.mul_(scale).mul_(1 / scale)
    keeps_infinities = overflow != "sat_finite" and not all(overflows)
    if keeps_infinities:
        out.add_(torch.nn.functional.hardshrink(x, FLOAT32.max))  # 0 except for infinities and NaN
    if of_magnitude or keeps_infinities:
        out.copysign_(x)
    if not fmt.has_negative_zero:
        out.add_(0.0)
    out.nan_to_num_(nan=math.nan if fmt.has_nan else fmt.max, posinf=math.inf, neginf=-math.inf)


def has_subnormal(x: Tensor) -> bool:
    """Whether any element of a float32 tensor is subnormal, decided from its bits."""
    return has_magnitude_below(x, 1 << FLOAT32.mantissa_bits)


def has_magnitude_below(x: Tensor, code: int) -> bool:
    """Whether any element of a float32 tensor is not zero and has a magnitude whose code is less than ``code``."""
    before = (x.view(torch.int32) & _MAGNITUDE).sub_(1).bitwise_and_(_MAGNITUDE)
    return x.numel() > 0 and int(before.amin()) < code - 1


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    return x.as_strided((x.numel(),), (1,))
