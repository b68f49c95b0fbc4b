"""Codes and scales of tensors in formats whose elements share scales, as hardware and checkpoints store them."""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

from fpsim.casts import Cast, check_cast, parse_cast, refuse_timed
from fpsim.formats import CodebookFormat, ElementFormat, FloatFormat, IntegerFormat
from fpsim.rounding.carriers import check_tensor, working_dtype
from fpsim.rounding.flushing import keeping_subnormals
from fpsim.rounding.packing import pack, unpack
from fpsim.scaling.groups import Groups, OnTensors, split
from fpsim.scaling.rules import E8M0_BIAS, NAN_MARK
from fpsim.scaling.scale import AFFINE_RULES, MX_RULES, NV_RULES, Scale
from fpsim.scaling.steps import (
    DOUBLE_ELEMENT,
    DOUBLE_SCALE,
    Elements,
    dequantized,
    quantized,
    quantized_ratios,
    restored_ratios,
    round_scaled,
    scales_of_groups,
)
from fpsim.tensor_functions import counted_axes, decode, encode

#: The code of a NaN scale in E8M0.
NAN_CODE = 255

Scales = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


@keeping_subnormals
def encode_blocks(
    x: Tensor, format: str | Cast, axis: int | tuple[int, ...] = -1, *, packed: bool = True
) -> tuple[Tensor, Scales]:
    """The codes and the scales of ``x`` rounded to ``format``.

    Args:
        x: float64, float32 or bfloat16, any shape with at least one element per axis.
        format: a format with scales: ``mxfp8``, ``nvfp4``, ``int8``, ``nf4``, ``e4m3fn/block:128``. Stochastic rounding
            is not taken here.
        axis: the axis along which rows and blocks lie.
        packed: whether 4-bit and 6-bit codes of floating-point elements are packed into bytes along the last axis
            (`fpsim.pack`), two or four thirds of a code to a byte. Otherwise each code has a byte.

    Returns:
        The codes, uint8 (int32 for elements of more than 8 bits): of the shape of ``x``, but for packing. Codes of
        integers are two's complement, or those that include the zero point. Codes of a codebook are its own.

        The scales. Those of ``mx`` are E8M0 codes, uint8: 2**(code - 127), and 255 for NaN. Ratios are float32. NVFP4
        has a pair: e4m3fn codes (uint8), and the float32 scale of the tensor, which multiplies elements before
        rounding (``te``) or after it (``torchao``). ``asymmetric`` has a pair of ratios and zero points, and ``range``
        one of ratios and least elements, all float32. ``double`` has three: the codes of the ratios (uint8, in the
        order of the values of ``dynamic8``), the float32 ratio of every 256 of these, and the float32 mean of the
        ratios. The shape is that of ``x`` with the number of blocks in place of the length of each axis that is split,
        and 1 in place of one along which all elements share a scale; for ``group`` it is the number of groups.

    Raises:
        ValueError: the format has no scale of blocks, rows, groups or tensors by ratio; packed codes do not fill whole
            bytes; or a NaN has no code, and no scale by rule ``encode`` is NaN in its place. Otherwise the errors of
            `fpsim.round`.
        TypeError: in the same cases as `fpsim.round`.

    Source: OCP Microscaling Formats (MX) 1.0, section 5; Transformer Engine's NVFP4 recipe.

    >>> codes, scales = encode_blocks(torch.tensor([1.0, -0.5, 6.0, 3.0]), "mxfp4")
    >>> codes, scales
    (tensor([146,  87], dtype=torch.uint8), tensor([127], dtype=torch.uint8))
    """
    cast, scale = _scaled_cast(format)
    dtype = check_tensor(x, "encode")
    check_cast(dtype, cast)
    axes = list(counted_axes(axis, x.dim(), str(scale))) if scale.has_axis else []
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no elements, and so no blocks: leave it out")
    x, call = x.detach(), OnTensors()
    if scale.rule in MX_RULES:
        x = x.double()  # holds every decoded value
    groups = split(x, scale, axes, call)
    scales = scales_of_groups(groups.values, x.dtype, cast.format, scale, groups.axes, call)
    if scale.rule in MX_RULES:
        rounded = round_scaled(x, x.dtype, cast.format, cast.rounding, cast.overflow, scale, axes, None, call)
        q = (split(rounded, scale, axes, call).values * scales[0]).nan_to_num(0.0)
    else:
        elements = Elements(cast.format, cast.rounding, cast.overflow, None, call)
        q = quantized(groups.values, dtype, elements, scale, scales)
        if scale.rule != "encode":
            q = q.nan_to_num(0.0)  # the scale is NaN
        elif q.isnan().any() and not (isinstance(cast.format, FloatFormat) and cast.format.has_nan):
            raise ValueError(f"{cast.format.name} has no code for NaN, and a scale by rule 'encode' is never NaN")
    codes = _encode_elements(groups.restore(q), cast.format, scale)
    if packed and _is_packed(cast.format):
        codes = pack(codes, cast.format.name)
    return codes, _encode_scales(scales, scale, groups)


@keeping_subnormals
def decode_blocks(
    codes: Tensor,
    scales: Scales,
    format: str | Cast,
    axis: int | tuple[int, ...] = -1,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = True,
) -> Tensor:
    """The values for which codes and scales stand: the inverse of `encode_blocks`.

    ``decode_blocks(*encode_blocks(x, format), format, dtype=x.dtype)`` has the bits of ``fpsim.round(x, format)``.

    Args:
        codes, scales: as `encode_blocks` returns them.
        format, axis, packed: as for `encode_blocks`.
        dtype: the dtype of the result, the one that was encoded.

    Raises:
        ValueError: the shapes do not belong together, or a code is out of range. Otherwise as `encode_blocks`.
        TypeError: codes or scales are of another dtype.
    """
    cast, scale = _scaled_cast(format)
    check_cast(dtype, cast)
    if packed and _is_packed(cast.format):
        codes = unpack(codes, cast.format.name)
    axes = list(counted_axes(axis, codes.dim(), str(scale))) if scale.has_axis else []
    call, working = OnTensors(), torch.float64 if scale.rule in MX_RULES else working_dtype(dtype)
    groups = split(_decode_elements(codes, cast.format, scale, working), scale, axes, call)
    factors = _decode_scales(scales, scale, groups)
    if scale.rule in MX_RULES:
        return groups.restore(groups.values * factors[0]).to(dtype)
    return groups.restore(dequantized(groups.values, scale, factors, call)).to(dtype)


def _scaled_cast(format: str | Cast) -> tuple[Cast, Scale]:
    cast = parse_cast(format)
    if cast is None or cast.scale is None or cast.scale.rule == "power_of_two":
        raise ValueError(
            f"{reprlib.repr(format)} has no scales to encode: use a format such as 'mxfp8', or fpsim.encode"
        )
    refuse_timed(cast, "this function")
    if cast.transform is not None:
        raise ValueError(f"codes hold no transform: leave {str(cast.transform)!r} out of {reprlib.repr(format)}")
    if cast.is_stochastic:
        raise ValueError(f"{str(cast)!r} is stochastic: round first, fpsim.round(x, ..., seed=...)")
    return cast, cast.scale


def _is_packed(element: ElementFormat) -> bool:
    return isinstance(element, FloatFormat) and element.bits in (4, 6)


def _encode_elements(q: Tensor, element: ElementFormat, scale: Scale) -> Tensor:
    if isinstance(element, FloatFormat):
        return encode(q, element)
    if isinstance(element, IntegerFormat):
        codes = (q * 2.0**-element.unit_exponent).to(torch.int32) & ((1 << element.bits) - 1)
        return codes.to(torch.uint8) if element.bits <= 8 else codes
    return _codes_of(q, element)


def _codes_of(q: Tensor, element: CodebookFormat) -> Tensor:
    index = torch.searchsorted(torch.tensor(element.values, dtype=q.dtype, device=q.device), q)
    order = torch.tensor(element.codes or range(len(element.values)), device=q.device)
    return order[index].to(torch.uint8 if element.bits <= 8 else torch.int32)


def _decode_elements(codes: Tensor, element: ElementFormat, scale: Scale, working: torch.dtype) -> Tensor:
    if isinstance(element, FloatFormat):
        return decode(codes, element, working)
    wide = codes.to(torch.int64)
    most = len(element.values) if isinstance(element, CodebookFormat) else 1 << element.bits
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < 1 << element.bits:
        raise ValueError(f"a code is not one of {element.name}: codes are 0 to {most - 1}")
    if isinstance(element, IntegerFormat):
        if element.signed and scale.rule not in AFFINE_RULES:
            wide = wide - ((wide >> (element.bits - 1)) << element.bits)
        return wide.to(working) * 2.0**element.unit_exponent
    by_code = dict(zip(element.codes or range(len(element.values)), element.values, strict=True))
    values = [by_code.get(code, 0.0) for code in range(1 << element.bits)]
    return torch.tensor(values, dtype=working, device=codes.device)[wide]


def _encode_scales(scales: Any, scale: Scale, groups: Groups) -> Scales:
    parts = [part.squeeze(groups.axes) if groups.splits else part for part in scales]
    if scale.rule in MX_RULES:
        code = E8M0_BIAS - torch.frexp(parts[0])[1] + 1
        return torch.where(parts[0] == NAN_MARK, NAN_CODE, code).to(torch.uint8)
    if scale.rule in NV_RULES:
        return encode(parts[0], "e4m3fn"), scales[1].reshape(())
    if scale.rule == "double":
        ratios, of_ratios, offset = quantized_ratios(scales[2].reshape(-1), OnTensors())
        codes = _codes_of(ratios.restore(ratios.values).nan_to_num(0.0), DOUBLE_ELEMENT)
        return codes, of_ratios.reshape(-1), offset.reshape(())
    return (parts[0], parts[1]) if scale.rule in AFFINE_RULES else parts[0]


def _decode_scales(scales: Scales, scale: Scale, groups: Groups) -> tuple[Tensor, ...]:
    """The scales as factors that broadcast to the groups."""
    given: tuple[Tensor, ...] = scales if isinstance(scales, tuple) else (scales,)
    count = 3 if scale.rule == "double" else 2 if scale.rule in (*NV_RULES, *AFFINE_RULES) else 1
    if len(given) != count:
        raise ValueError(f"scale {str(scale)!r} has {count} tensors of scales, got {len(given)}")
    shape = [1 if axis in groups.axes else size for axis, size in enumerate(groups.values.shape)]
    stored = [size for axis, size in enumerate(shape) if not (groups.splits and axis in groups.axes)]
    blocks = given[:1] if scale.rule in (*NV_RULES, "double") else given
    for part in blocks:
        if list(part.shape) != stored:
            raise ValueError(f"scales of shape {tuple(stored)} belong to these codes, got shape {tuple(part.shape)}")
    if scale.rule in MX_RULES:
        exponents = given[0].to(torch.float64) - E8M0_BIAS
        factor = torch.where(given[0] == NAN_CODE, torch.nan, torch.exp2(exponents))
        return (factor.reshape(shape),)
    if scale.rule in NV_RULES:
        return decode(given[0], "e4m3fn").reshape(shape), given[1].to(torch.float32)
    if scale.rule == "double":
        ratios = _restored(given[0].reshape(-1), given[1], given[2]).reshape(shape)
        return ratios, ratios
    return tuple(part.to(torch.float32).reshape(shape) for part in given)


def _restored(codes: Tensor, of_ratios: Tensor, offset: Tensor) -> Tensor:
    """The ratios for which the scales of ``double`` stand."""
    values = _decode_elements(codes, DOUBLE_ELEMENT, DOUBLE_SCALE, torch.float32)
    groups = split(values, DOUBLE_SCALE, [], OnTensors())
    if of_ratios.numel() != groups.values.shape[0] or offset.numel() != 1:
        given = tuple(of_ratios.shape), tuple(offset.shape)
        raise ValueError(f"{codes.numel()} codes of scales have {len(groups.values)} ratios and one mean, got {given}")
    return restored_ratios(groups, of_ratios.float().reshape(-1, 1), offset.float().reshape(()), OnTensors())
