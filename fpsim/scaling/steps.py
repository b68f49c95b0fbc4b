"""Rounding with block, row, ratio and NVFP4 scales, step by step, for tensors and for Inductor's lowerings.

Powers of two move the grid of a format: every step is an integer operation on bits. Ratios are floating-point numbers:
every step is one operation in float32 (float64 for the elements of float64 tensors), in the order that
`fpsim.reference` writes down. No step gives a number below 2^-126, so that a process that flushes subnormals to zero
gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from fpsim.formats import CODEBOOKS, CodebookFormat, ElementFormat, FloatFormat, IntegerFormat
from fpsim.rounding.carriers import CODES_OF, working_dtype
from fpsim.rounding.ops import SOURCE, round_op, round_with_words_op
from fpsim.scaling.groups import Call, Groups, OnTensors, split
from fpsim.scaling.rules import E8M0_BIAS, NAN_MARK
from fpsim.scaling.scale import AFFINE_RULES, FOUR_OVER_SIX_RULES, MX_RULES, NV_RULES, Scale

aten, prims = torch.ops.aten, torch.ops.prims

_SMALLEST_NORMAL = 2.0**-126
#: The smallest ratio: with it no quotient or product of interest is subnormal in float32.
SMALLEST_RATIO = 2.0**-100
#: The smallest ratio of the rule ``range``, which is FracTrain's.
_SMALLEST_RANGE = 1e-8
_LARGEST = float.fromhex("0x1.fffffep127")
#: What the largest magnitude of a tensor becomes in NVFP4: that of e2m1fn times that of the scales of blocks, which is
#: 256 under Four Over Six, so that a scale times 1.5 is in range.
_NV_RANGE, _FOUR_OVER_SIX_RANGE = 6.0 * 448.0, 6.0 * 256.0
#: 1/6 rounded to float32.
_SIXTH = float.fromhex("0x1.555556p-3")
_LARGEST_BF16 = float.fromhex("0x1.fep127")
#: Roundings in which a quotient below 2^-26 becomes zero in every format that takes ratios.
_NEAREST = ("nearest_even", "nearest_away", "toward_zero")
#: The element format and the scale of ratios that are quantized again, after their mean is subtracted (QLoRA).
DOUBLE_ELEMENT, DOUBLE_SCALE = CODEBOOKS["dynamic8"], Scale("fp32", "group:256")
#: Ratios are rounded to multiples of this part of a power of two before their mean is taken. Then every sum is exact.
_MEAN_UNIT = 2.0**-28
#: The bits of the exponent of float32.
_EXPONENT_MASK = 0x7F800000
#: From this number of values on, a codebook is searched by bisection.
_LONG_CODEBOOK = 33


def round_scaled(
    x: Any,
    dtype: torch.dtype,
    element: ElementFormat,
    rounding: str,
    overflow: str,
    scale: Scale | None,
    axes: list[int],
    words: Any,
    call: Call,
    factor: Any = None,
    outside: bool = False,
) -> Any:
    """``x`` rounded to ``element`` with ``scale``.

    Args:
        x: a tensor, or a value that stands for one.
        dtype: the dtype of ``x``: float64, float32 or bfloat16.
        axes: as for `fpsim.scaling.groups.split`.
        words: for stochastic rounding the random words of the elements, in the shape of ``x``; else None.
        call: runs the operators.
        factor: for a timed scale the factor in use (`fpsim.scaling.history.in_use`), float32 without axes.
        outside: whether the result is not yet multiplied by `outer_scale`. The scale is a ratio, or NVFP4's.
    """
    if scale is None:
        return Elements(element, rounding, overflow, words, call).rounded(x, dtype)
    groups = split(call.stored(x), scale, axes, call)
    if words is not None:
        words = split(words, scale, axes, call).values
    elements = Elements(element, rounding, overflow, words, call)
    scales = scales_of_groups(groups.values, dtype, element, scale, groups.axes, call) if factor is None else (factor,)
    if scale.rule in MX_RULES:
        return groups.restore(elements.in_mx_groups(groups.values, scales[0], scale.rule))
    working = working_dtype(dtype)
    q = quantized(groups.values, dtype, elements, scale, scales)
    if outside:
        value = call(aten.mul.Tensor, q, scales[0]) if scale.rule in NV_RULES else q
    else:
        value = dequantized(q, scale, scales, call)
    if dtype != working:
        value = call(round_op, value, "e8m7", "nearest_even", "ovf_inf", SOURCE)
        value = call(prims.convert_element_type.default, value, dtype)
    return groups.restore(value)


def outer_scale(x: Any, dtype: torch.dtype, element: ElementFormat, scale: Scale, axes: list[int], call: Call) -> Any:
    """The factor of `round_scaled` that may multiply the result of a product instead of an operand.

    It is the ratio of a tensor or row, or the inverse of NVFP4's scale of the tensor (for ``torchao`` the scale),
    in the working dtype. The scale of a tensor has no axes. That of rows has the axes of ``x``, with size 1 along
    ``axes``.
    """
    groups = split(call.stored(x), scale, axes, call)
    scales = scales_of_groups(groups.values, dtype, element, scale, groups.axes, call)
    factor = scales[1] if scale.rule in NV_RULES else scales[0]
    if scale.rule in NV_RULES and scale.rule != "torchao":
        factor = call(aten.div.Tensor, call.constant(1.0, factor), factor)
    factor = factor if scale.kind == "row" else call(aten.reshape.default, factor, [])
    return call.stored(call(prims.convert_element_type.default, factor, working_dtype(dtype)))


def quantized(x: Any, dtype: torch.dtype, elements: Elements, scale: Scale, scales: tuple[Any, ...]) -> Any:
    """The values of the element format that stand for the groups ``x``, before they are scaled back."""
    call = elements.call
    working, exact_zero = working_dtype(dtype), elements.rounding in _NEAREST
    wide = x if dtype == working else call(prims.convert_element_type.default, x, working)
    wide = wide if exact_zero else _flushed(wide, call)
    if scale.rule in NV_RULES:
        scaled = call(aten.mul.Tensor, wide, nv_factor(scales[0], scales[1], scale, call))
        scaled = scaled if exact_zero else _flushed(scaled, call)
        return elements.rounded(scaled, working)
    if scale.rule == "range":
        wide = call(aten.sub.Tensor, wide, scales[1])
    if scale.rule == "encode":
        y = call(aten.mul.Tensor, wide, scales[1])
    else:
        y = call(aten.mul.Tensor if scale.order else aten.div.Tensor, wide, scales[0])
    y = y if exact_zero else _flushed(y, call)
    if scale.rule in AFFINE_RULES:
        return elements.codes(y, scales[1] if scale.rule == "asymmetric" else None)
    return elements.rounded(y, working)


def dequantized(q: Any, scale: Scale, scales: tuple[Any, ...], call: Call) -> Any:
    """The values for which `quantized` ones stand, in the working dtype."""
    if scale.rule in NV_RULES:
        back = aten.mul.Tensor if scale.rule == "torchao" else aten.div.Tensor
        return call(back, call(aten.mul.Tensor, q, scales[0]), scales[1])
    if scale.rule == "asymmetric":
        q = call(aten.sub.Tensor, q, scales[1])
    if scale.order:
        inverse = call.stored(call(aten.div.Tensor, call.constant(1.0, scales[0]), scales[0]))
        return call(aten.mul.Tensor, q, inverse)
    value = call(aten.mul.Tensor, q, scales[1] if scale.rule == "double" else scales[0])
    return call(aten.add.Tensor, value, scales[1]) if scale.rule == "range" else value


def scales_of_groups(
    x: Any, dtype: torch.dtype, element: ElementFormat, scale: Scale, axes: list[int], call: Call
) -> tuple[Any, ...]:
    """The scales of the groups of ``x``, of size 1 along ``axes``.

    Returns:
        For powers of two, the multipliers in the dtype of ``x`` (`fpsim.scaling.rules.mx_multiplier_code`). For ratios,
        the ratios, for ``encode`` also the factors before rounding, for ``asymmetric`` also the zero points, and for
        ``range`` also the least elements. For ``double``, the ratios, the ratios as they are restored, and the ratios
        that are quantized. For NVFP4, the scales of the blocks and the one of the tensor. All but the multipliers are
        float32.
    """
    if scale.rule in MX_RULES:
        return (mx_multiplier(x, dtype, element, scale.rule, axes, call),)
    if dtype == torch.bfloat16:  # Inductor cannot compile two equal maxima of bfloat16 in one loop
        x, dtype = call(prims.convert_element_type.default, x, torch.float32), torch.float32
    if scale.rule in NV_RULES:
        return nv_scales(x, dtype, scale, axes, call)
    if scale.rule == "asymmetric":
        return asymmetric_scale(x, unsigned_of(element), axes, call)
    if scale.rule == "range":
        return range_scale(x, unsigned_of(element), axes, call)
    amax = call(prims.convert_element_type.default, amax_of(x, dtype, axes, call), torch.float32)
    if scale.rule == "encode":
        factor = encode_scale(amax, element, call)
        return call.stored(call(aten.div.Tensor, call.constant(1.0, factor), factor)), factor
    ratio = ratio_scale(amax, element, scale.rule, call)
    if scale.rule == "double":
        ratios = call.stored(call(aten.where.ScalarSelf, call(aten.lt.Scalar, amax, _SMALLEST_NORMAL), 0.0, ratio))
        return ratio, call.stored(restored_ratios(*quantized_ratios(ratios, call), call)), ratios
    return (ratio,)


@dataclass(frozen=True)
class Elements:
    """Rounding of scaled numbers to an element format.

    Attributes:
        element, rounding, overflow: the format and the modes.
        words: as for `round_scaled`, arranged in the groups.
        call: runs the operators.
    """

    element: ElementFormat
    rounding: str
    overflow: str
    words: Any
    call: Call

    def _round(self, x: Any, fmt: FloatFormat, *scale: Any) -> Any:
        if self.words is None:
            return self.call(round_op, x, fmt.name, self.rounding, self.overflow, SOURCE, *scale)
        return self.call(round_with_words_op, x, self.words, fmt.name, self.rounding, self.overflow, SOURCE, *scale)

    def on_shifted_grid(self, x: Any, multiplier: Any) -> Any:
        """``x`` rounded to the grid of the format divided by ``multiplier``, powers of two."""
        return self._round(x, self._grid(), multiplier)

    def in_mx_groups(self, x: Any, multiplier: Any, rule: str) -> Any:
        """`on_shifted_grid` for the multipliers of `mx_multiplier`; NaN where the scale is NaN."""
        call = self.call
        if self.words is None:
            name = self._grid().name
            return call(
                torch.ops.fpsim.round_mx.default, x, multiplier, name, self.rounding, self.overflow, rule, SOURCE
            )
        is_nan = call(aten.eq.Scalar, multiplier, NAN_MARK)
        return call(aten.where.ScalarSelf, is_nan, math.nan, self.on_shifted_grid(x, multiplier))

    def _grid(self) -> FloatFormat:
        """The floating-point format with the values of the element format."""
        assert not isinstance(self.element, CodebookFormat), "casts with codebooks have ratios"
        return self.element.grid() if isinstance(self.element, IntegerFormat) else self.element

    def rounded(self, y: Any, working: torch.dtype) -> Any:
        """``y`` rounded to the format."""
        call, element = self.call, self.element
        if isinstance(element, FloatFormat):
            return self._round(y, element)
        if isinstance(element, CodebookFormat):
            return _nearest_in_codebook(y, element, working, call)
        q = self._round(y, element.grid())
        if not element.is_symmetric:
            unit = 2.0**element.unit_exponent
            q = _clamped(q, element.min_integer * unit, element.max_integer * unit, call)
        return q

    def codes(self, y: Any, zero: Any) -> Any:
        """``y`` rounded to integers, plus the integers ``zero`` if given, limited to the codes from 0 upwards."""
        unsigned = unsigned_of(self.element)
        q = self._round(y, unsigned.grid())
        q = q if zero is None else self.call(aten.add.Tensor, q, zero)
        return _clamped(q, 0.0, float(unsigned.max_integer), self.call)


def unsigned_of(element: ElementFormat) -> IntegerFormat:
    """The unsigned integers of the width of ``element``: the codes that zero points shift."""
    assert isinstance(element, IntegerFormat), "casts with zero points have integers"
    return IntegerFormat(element.bits, signed=False)


def amax_of(x: Any, dtype: torch.dtype, axes: list[int], call: Call, subnormals: bool = False) -> Any:
    """The largest magnitudes along ``axes``, which stay with size 1; NaN where there is a NaN.

    ``subnormals`` tells whether those of subnormal numbers matter. A comparison of floats takes them for zeros where
    the process does so.
    """
    # Codes of magnitudes are in their order. Across vectors, their maximum takes fewer operations than that of floats.
    is_across = dtype == torch.float32 and len(call.shape(x)) - 1 not in axes
    if not (subnormals or is_across):
        return call.stored(call(aten.amax.default, call(aten.abs.default, x), axes, True))
    integer = CODES_OF[dtype]
    codes = call(aten.bitwise_and.Scalar, call(aten.view.dtype, x, integer), torch.iinfo(integer).max)
    return call(aten.view.dtype, call.stored(call(aten.amax.default, codes, axes, True)), dtype)


def mx_multiplier(x: Any, dtype: torch.dtype, element: ElementFormat, rule: str, axes: list[int], call: Call) -> Any:
    """The powers of two by which the groups of ``x`` are multiplied: see `fpsim.scaling.rules.mx_multiplier_code`."""
    assert not isinstance(element, CodebookFormat), "casts with codebooks have ratios"
    subnormals = element.max_exponent < 1  # otherwise all of them have the smallest scale
    amax = amax_of(x, dtype, axes, call, subnormals)
    return call.stored(call(torch.ops.fpsim.mx_multiplier.default, amax, element.name, rule, SOURCE))


def ratio_scale(amax: Any, element: ElementFormat, rule: str, call: Call) -> Any:
    """The ratios of the largest magnitudes ``amax`` of the groups and of the format, both float32.

    NaN where a group holds a NaN or an infinity. For a group of zeros, 1; the smallest ratio if the format has no zero.
    """
    largest = range_of(element)
    ratio = call(aten.div.Tensor, amax, call.constant(largest, amax))
    if rule == "bf16":
        ratio = call(round_op, ratio, "e8m7", "nearest_even", "ovf_inf", SOURCE)
    ratio = call(aten.clamp_max.default, ratio, _LARGEST_BF16 if rule == "bf16" else _LARGEST)
    has_zero = not isinstance(element, CodebookFormat) or 0 in element.values
    return call.stored(_usable(ratio, amax, call, 1.0 if has_zero else SMALLEST_RATIO))


def encode_scale(amax: Any, element: ElementFormat, call: Call) -> Any:
    """The ratios of the largest magnitudes of the format and of the groups, ``amax``, both float32.

    1 for a group of zeros, and for one that holds a NaN or an infinity. At most 2^100 and at least 2^-126, so that the
    reciprocals are normal numbers.

    Source: Transformer Engine, ``recipe_common.cuh`` (where the bound is the largest float32).
    """
    factor = call(aten.div.Tensor, call.constant(range_of(element), amax), amax)
    factor = call(aten.clamp_max.default, factor, 1 / SMALLEST_RATIO)
    factor = call(aten.clamp_min.default, factor, _SMALLEST_NORMAL)
    factor = call(aten.where.ScalarOther, call(aten.ge.Scalar, amax, _SMALLEST_NORMAL), factor, 1.0)
    return call.stored(call(aten.where.ScalarOther, call(aten.le.Scalar, amax, _LARGEST), factor, 1.0))


def quantized_ratios(ratios: Any, call: Call) -> tuple[Groups, Any, Any]:
    """The ratios of a tensor, quantized to 8 bits after their mean is subtracted (QLoRA's double quantization).

    Returns:
        The values of `DOUBLE_ELEMENT` that stand for the ratios, in groups; the ratios of these groups; and the mean.
        All are float32.

    Source: bitsandbytes, ``quantize_4bit(compress_statistics=True)``.
    """
    offset = _mean(ratios, call)
    groups = split(call.stored(call(aten.sub.Tensor, ratios, offset)), DOUBLE_SCALE, [], call)
    elements = Elements(DOUBLE_ELEMENT, "nearest_even", "sat_finite", None, call)
    scales = scales_of_groups(groups.values, torch.float32, DOUBLE_ELEMENT, DOUBLE_SCALE, groups.axes, call)
    q = quantized(groups.values, torch.float32, elements, DOUBLE_SCALE, scales)
    return replace(groups, values=q), scales[0], offset


def restored_ratios(groups: Groups, scales: Any, offset: Any, call: Call) -> Any:
    """The ratios for which the results of `quantized_ratios` stand. Magnitudes below `SMALLEST_RATIO` become zero."""
    restored = groups.restore(call.stored(call(aten.mul.Tensor, groups.values, scales)))
    ratios = call(aten.add.Tensor, restored, offset)
    small = call(aten.lt.Scalar, call(aten.abs.default, ratios), SMALLEST_RATIO)
    return call(aten.where.ScalarSelf, small, 0.0, ratios)


def _mean(ratios: Any, call: Call) -> Any:
    """The mean of float32 numbers, as a float32 number of size 1 along all axes.

    The numbers are rounded to multiples of `_MEAN_UNIT` times a power of two. Their sum is exact then, in any order (up
    to 2^24 numbers). Its quotient by their count is rounded to float64, and then to float32.
    """
    axes = list(range(len(call.shape(ratios))))
    largest = call.stored(call(aten.clamp_min.default, call(aten.amax.default, ratios, axes, True), SMALLEST_RATIO))
    bits = call(aten.bitwise_and.Scalar, call(aten.view.dtype, largest, torch.int32), _EXPONENT_MASK)
    power = call(prims.convert_element_type.default, call(aten.view.dtype, bits, torch.float32), torch.float64)
    unit = call.stored(call(aten.mul.Scalar, power, _MEAN_UNIT))
    units = call(prims.convert_element_type.default, ratios, torch.float64)
    units = call(aten.round.default, call(aten.div.Tensor, units, unit))
    ones = call(aten.add.Scalar, call(aten.mul.Scalar, units, 0.0), 1.0)
    total, count = (call.stored(call(aten.sum.dim_IntList, x, axes, True)) for x in (units, ones))
    mean = call(aten.mul.Tensor, call(aten.div.Tensor, total, count), unit)
    return call.stored(call(prims.convert_element_type.default, mean, torch.float32))


def range_of(element: ElementFormat) -> float:
    """The magnitude that the largest magnitude of a group becomes: half the range if it is not symmetric."""
    if isinstance(element, IntegerFormat) and element.full:
        return (element.max_integer + 0.5) * 2.0**element.unit_exponent
    return element.max


def _usable(ratio: Any, amax: Any, call: Call, of_zeros: float = 1.0) -> Any:
    """``ratio`` limited from below; ``of_zeros`` for zeros, NaN for infinities and NaNs."""
    ratio = call(aten.clamp_min.default, ratio, SMALLEST_RATIO)
    ratio = call(aten.where.ScalarSelf, call(aten.lt.Scalar, amax, _SMALLEST_NORMAL), of_zeros, ratio)
    return call(aten.where.ScalarSelf, call(aten.gt.Scalar, amax, _LARGEST), math.nan, ratio)


def asymmetric_scale(x: Any, element: IntegerFormat, axes: list[int], call: Call) -> tuple[Any, Any]:
    """The ratios and the zero points of the groups of ``x``, both float32 and of size 1 along ``axes``."""
    high = call(aten.amax.default, call(aten.clamp_min.default, x, 0.0), axes, True)
    low = call(aten.amin.default, call(aten.clamp_max.default, x, 0.0), axes, True)
    high, low = (call.stored(call(prims.convert_element_type.default, v, torch.float32)) for v in (high, low))
    width = call(aten.sub.Tensor, high, low)
    ratio = call(aten.div.Tensor, width, call.constant(float(element.max_integer), width))
    ratio = call(aten.clamp_max.default, ratio, _LARGEST)
    amax = call(aten.maximum.default, high, call(aten.neg.default, low))
    ratio = call.stored(_usable(ratio, amax, call))
    zero = call(aten.div.Tensor, call(aten.neg.default, low), ratio)
    zero = call(round_op, zero, element.grid().name, "nearest_even", "sat_finite", SOURCE)
    return ratio, call.stored(_clamped(zero, 0.0, float(element.max_integer), call))


def range_scale(x: Any, element: IntegerFormat, axes: list[int], call: Call) -> tuple[Any, Any]:
    """The ratios and the least elements of the groups of ``x``, both float32 and of size 1 along ``axes``.

    The ratio is (max - min) / (2^b - 1), and at least 1e-8. NaN where a group holds a NaN or an infinity.

    Source: FracTrain (Fu et al., NeurIPS 2020), ``modules/quantize.py``.
    """
    high, low = (call(op, x, axes, True) for op in (aten.amax.default, aten.amin.default))
    high, low = (call.stored(call(prims.convert_element_type.default, v, torch.float32)) for v in (high, low))
    low = call(aten.where.ScalarSelf, call(aten.lt.Scalar, call(aten.abs.default, low), _SMALLEST_NORMAL), 0.0, low)
    width = call(aten.sub.Tensor, high, low)
    ratio = call(aten.div.Tensor, width, call.constant(float(element.max_integer), width))
    ratio = call(aten.clamp_max.default, ratio, _LARGEST)
    ratio = call(aten.clamp_min.default, ratio, _SMALLEST_RANGE)
    amax = call(aten.maximum.default, call(aten.abs.default, high), call(aten.abs.default, low))
    ratio = call(aten.where.ScalarSelf, call(aten.gt.Scalar, amax, _LARGEST), math.nan, ratio)
    return call.stored(ratio), call.stored(low)


def nv_scales(x: Any, dtype: torch.dtype, scale: Scale, axes: list[int], call: Call) -> tuple[Any, Any]:
    """NVFP4's scales of the blocks, values of e4m3fn, and the scale of the tensor: both float32.

    The tensor's scale multiplies (``te``: 2688 / amax, ``mae`` and ``mse``: 1536 / amax) or divides (``torchao``:
    amax / 2688) the elements.
    """
    amax = call(prims.convert_element_type.default, amax_of(x, dtype, axes, call), torch.float32)
    every = list(range(len(call.shape(amax))))
    total = call.stored(call(aten.amax.default, amax, every, True))
    usable = call(aten.le.Scalar, total, _LARGEST)  # not NaN either
    limited = call(aten.clamp_min.default, total, SMALLEST_RATIO)
    most = call.constant(_FOUR_OVER_SIX_RANGE if scale.rule in FOUR_OVER_SIX_RULES else _NV_RANGE, total)
    if scale.rule == "torchao":
        whole = call(aten.div.Tensor, limited, most)
    else:
        whole = call(aten.clamp_max.default, call(aten.div.Tensor, most, limited), _LARGEST)
    small = call(aten.lt.Scalar, total, _SMALLEST_NORMAL)
    whole = call(aten.where.ScalarSelf, small, 1.0, whole)
    whole = call.stored(call(aten.where.ScalarOther, usable, whole, 1.0))
    return nv_block_scale(x, amax, whole, total, scale, axes, call), whole


def nv_block_scale(x: Any, amax: Any, whole: Any, total: Any, scale: Scale, axes: list[int], call: Call) -> Any:
    """NVFP4's scales of blocks.

    Args:
        x: the blocks.
        amax: their largest magnitudes, float32.
        whole, total: the scale and the largest magnitude of the tensor, float32.
        axes: the axes along which the elements of a block lie.
    """
    if scale.rule == "te":
        factor = call(aten.mul.Tensor, whole, call.constant(_SIXTH, whole))
        return call.stored(_as_scale(call(aten.mul.Tensor, amax, factor), call))
    sixth = call(aten.div.Tensor, amax, call.constant(6.0, amax))
    if scale.rule == "torchao":
        block = call(aten.clamp_min.default, call(aten.div.Tensor, sixth, whole), 2.0**-6)
        return call.stored(_as_scale(block, call))
    base = call(aten.mul.Tensor, sixth, whole)
    four = call.stored(_as_scale(call(aten.mul.Tensor, base, call.constant(1.5, base)), call))
    six = call.stored(_as_scale(base, call))
    errors = [_error(x, block, whole, total, scale, axes, call) for block in (four, six)]
    return call.stored(call(aten.where.self, call(aten.lt.Tensor, *errors), four, six))


def _as_scale(block: Any, call: Call) -> Any:
    """``block`` rounded to the format of NVFP4's scales of blocks."""
    return call(round_op, block, "e4m3fn", "nearest_even", "sat_finite", SOURCE)


def _error(x: Any, block: Any, whole: Any, total: Any, scale: Scale, axes: list[int], call: Call) -> Any:
    """The errors of blocks that are rounded to nearest with the scales ``block``, for Four Over Six.

    The sum of magnitudes (``mae``) or squares (``mse``) of the differences, all steps in float32. It runs along a row
    of a tile, and then over the rows as a tree: rows i and i + 8 first.

    Source: Transformer Engine, ``quantize_4over6_nvfp4.cuh`` and ``custom_recipes/reference_nvfp4.py``.
    """
    wide = _flushed(call(prims.convert_element_type.default, x, torch.float32), call)
    q = call(aten.mul.Tensor, wide, nv_factor(block, whole, scale, call))
    q = call(round_op, q, "e2m1fn", "nearest_even", "sat_finite", SOURCE)
    value = call(aten.mul.Tensor, q, block)
    value = call(aten.mul.Tensor, value, call(aten.clamp_min.default, total, SMALLEST_RATIO))
    value = call(aten.div.Tensor, value, call.constant(_FOUR_OVER_SIX_RANGE, value))
    error = call(aten.abs.default, _flushed(call(aten.sub.Tensor, value, wide), call))
    if scale.rule == "mse":
        error = _flushed(call(aten.mul.Tensor, error, error), call)
    error = call.stored(error)
    parts = _slices(error, axes[-1], call)
    rows = parts[0]
    for part in parts[1:]:
        rows = call(aten.add.Tensor, rows, part)
    rows = call.stored(rows)
    parts = _slices(rows, axes[0], call)
    while len(parts) > 1:
        half = 1 << (len(parts) - 1).bit_length() - 1
        added = [call(aten.add.Tensor, *pair) for pair in zip(parts, parts[half:], strict=False)]
        parts = [*added, *parts[len(added) : half]]
    return call.stored(parts[0])


def _slices(x: Any, axis: int, call: Call) -> list[Any]:
    """The parts of ``x`` of size 1 along ``axis``."""
    return [call(aten.slice.Tensor, x, axis, i, i + 1) for i in range(call.shape(x)[axis])]


def nv_factor(block: Any, whole: Any, scale: Scale, call: Call) -> Any:
    """The factors by which elements are multiplied before they are rounded, float32."""
    one = call.constant(1.0, whole)
    inverse = call(aten.div.Tensor, one, whole)
    if scale.rule == "torchao":
        factor = call(aten.div.Tensor, inverse, block)
    else:
        factor = call(aten.div.Tensor, one, call(aten.mul.Tensor, block, inverse))
    return call.stored(call(aten.clamp_max.default, factor, _LARGEST))


def _flushed(x: Any, call: Call) -> Any:
    """``x`` with zeros of the same sign in place of numbers below 2^-126."""
    small = call(aten.lt.Scalar, call(aten.abs.default, x), _SMALLEST_NORMAL)
    return call(aten.where.self, small, call(aten.mul.Tensor, x, 0.0), x)


def _clamped(x: Any, low: float, high: float, call: Call) -> Any:
    """``x`` limited to a range; NaN stays NaN."""
    return call(aten.clamp_max.default, call(aten.clamp_min.default, x, low), high)


def _nearest_in_codebook(y: Any, book: CodebookFormat, working: torch.dtype, call: Call) -> Any:
    thresholds = book.thresholds(working == torch.float64)
    if len(book.values) < _LONG_CODEBOOK:
        q = call(aten.mul.Tensor, y, 0.0)  # keeps NaN
        q = call(aten.where.ScalarOther, call(aten.isnan.default, y), q, book.values[0])
        for threshold, value in zip(thresholds, book.values[1:], strict=True):
            q = call(aten.where.ScalarSelf, call(aten.ge.Scalar, y, threshold), value, q)
    else:
        q = call.step_function(y, thresholds, book.values, working)
        q = call(aten.where.self, call(aten.isnan.default, y), y, q)
    return q


@dataclass(frozen=True)
class ScaledGroups:
    """A tensor in the groups that share a scale, for statistics.

    Attributes:
        groups: the arranged tensor.
        scales: the factor by which each group is multiplied after rounding; float64, of size 1 along the groups' axes.
            In NVFP4 it is the block's own scale, a value of e4m3fn.
        factors: the factor by which each group is multiplied before rounding; float64, of the same shape. Zero points
            are left out.
    """

    groups: Groups
    scales: torch.Tensor
    factors: torch.Tensor


def scaled_groups(x: torch.Tensor, element: ElementFormat, scale: Scale, axes: list[int]) -> ScaledGroups:
    """The groups of a tensor that has elements, and their scales."""
    call = OnTensors()
    groups = split(x, scale, axes, call)
    parts = [part.double() for part in scales_of_groups(groups.values, x.dtype, element, scale, groups.axes, call)]
    if scale.rule in MX_RULES:
        factors = torch.where(parts[0] == 0, 2.0**-E8M0_BIAS, parts[0])
        factors = torch.where(parts[0] == NAN_MARK, math.nan, factors)
        return ScaledGroups(groups, 1 / factors, factors)
    if scale.rule in NV_RULES:
        factors = 1 / (parts[0] * parts[1]) if scale.rule == "torchao" else parts[1] / parts[0]
        return ScaledGroups(groups, parts[0], factors)
    if scale.rule == "encode":
        return ScaledGroups(groups, *parts)
    return ScaledGroups(groups, parts[1] if scale.rule == "double" else parts[0], 1 / parts[0])
