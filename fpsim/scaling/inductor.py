"""Inductor's lowerings of the operators that compute scales and round with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch._inductor import config, ir, lowering
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv

from fpsim.formats import ElementFormat, parse_element, parse_format
from fpsim.rounding.carriers import CARRIERS, grid_of, working_dtype
from fpsim.rounding.cpp_functions import CppOps, CppText, inline
from fpsim.rounding.inductor import LaneOps, Lanes, is_in_cpp
from fpsim.rounding.kernel import Grid, Int, Ops, round_code
from fpsim.rounding.ops import SOURCE, round_op
from fpsim.scaling.definitions import shape_of_outer_scale
from fpsim.scaling.moved_grid import block_function, suits
from fpsim.scaling.rules import NAN_MARK, mx_multiplier_code, power_of_two_code
from fpsim.scaling.scale import POWERS_OF_TWO, Scale, parse_scale
from fpsim.scaling.steps import outer_scale, round_scaled

aten, prims = torch.ops.aten, torch.ops.prims


@lowering.register_lowering(torch.ops.fpsim.power_of_two_scale.default, type_promotion_kind=None)
def _lower_scale(x: ir.TensorBox, format: str, source: str) -> ir.TensorBox:
    dtype, device, fmt = x.get_dtype(), x.get_device(), parse_format(format)
    if any(length == 0 for length in x.get_size()):
        return lowering.lowerings[aten.full.default]([], 1.0, dtype=dtype, device=device)
    working = working_dtype(dtype)
    lane_ops = LaneOps(working)
    load_x = x.make_loader()

    def magnitude(index: Any) -> Any:
        value = ops.to_dtype(load_x(index), working, src_dtype=dtype)
        code = Lanes(ops.to_dtype_bitcast(value, lane_ops.integer, working), lane_ops.integer)
        return (code & (CARRIERS[working].sign_code - 1)).value

    # The codes of magnitudes are in their order. A comparison of floats would take subnormals for zeros where the
    # process does so.
    codes = ir.Pointwise.create(device=device, dtype=lane_ops.integer, inner_fn=magnitude, ranges=list(x.get_size()))
    amax = lowering.lowerings[aten.amax.default](codes)
    amax.realize()
    load = amax.make_loader()

    def scale(index: Any) -> Any:
        value = ops.to_dtype_bitcast(load([]), working, lane_ops.integer)
        return ops.to_dtype(_scale_of(value, fmt, "power_of_two", dtype, device), dtype, src_dtype=working)

    result = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=scale, ranges=[])
    result.realize()  # compute it once, not for every element that is scaled
    return result


def _scale_of(amax: Any, element: ElementFormat, rule: str, dtype: torch.dtype, device: Any) -> Any:
    """The power of two that ``rule`` gives for a magnitude: both are values of the working carrier of ``dtype``."""
    working = working_dtype(dtype)
    if is_in_cpp(device):
        return inline(_scale_function(element, rule, dtype), working, amax)
    lane_ops = LaneOps(working)
    code = Lanes(ops.to_dtype_bitcast(amax, lane_ops.integer, working), lane_ops.integer)
    return ops.to_dtype_bitcast(_scale_code(code, element, rule, dtype, lane_ops).value, working, lane_ops.integer)


@lru_cache(maxsize=1024)
def _scale_function(element: ElementFormat, rule: str, dtype: torch.dtype) -> str:
    """The body of a C++ function with the arguments and the result of `_scale_code`."""
    text = CppText(bits=CARRIERS[working_dtype(dtype)].bits)
    text.give(_scale_code(text.name("c10::bit_cast<U>(x0)"), element, rule, dtype, CppOps(text)))
    return "\n".join(text.lines)


def _scale_code(code: Int, element: ElementFormat, rule: str, dtype: torch.dtype, executor: Ops) -> Int:
    """The code of the power of two that ``rule`` gives for the magnitude of the number with ``code``."""
    carrier = CARRIERS[working_dtype(dtype)]
    code = code & (carrier.sign_code - 1)
    if rule != "power_of_two":
        return mx_multiplier_code(code, element, rule, carrier, executor)  # type: ignore[arg-type]
    if CARRIERS[dtype] != carrier:
        # Inductor keeps 16-bit intermediates in float32, unrounded: round the largest to its own dtype first.
        code = round_code(code, Grid(CARRIERS[dtype], carrier), "nearest_even", "ovf_inf", executor)
    return power_of_two_code(code, element, carrier, executor)  # type: ignore[arg-type]


class OnLowerings:
    """Runs operators on values of Inductor's intermediate language (`fpsim.scaling.groups.Call`)."""

    def __call__(self, operator: Any, *arguments: Any) -> Any:
        return lowering.lowerings[operator](*arguments)

    def shape(self, x: ir.TensorBox) -> Sequence[Any]:
        return [int(size) if isinstance(size, int | sympy.Integer) else size for size in x.get_size()]

    def blocks(self, length: Any, size: int) -> tuple[Any, Any]:
        if isinstance(length, int):
            return -(-length // size), -length % size
        if V.graph.sizevars.statically_known_multiple_of(length, size):
            return FloorDiv(length, size), 0
        count = FloorDiv(length + (size - 1), size)
        return count, count * size - length

    def stored(self, x: ir.TensorBox) -> ir.TensorBox:
        if isinstance(x.data, ir.BaseView) and isinstance(getattr(x.data.unwrap_view(), "data", None), ir.Pointwise):
            # Store the numbers as the view has them. In the order in which they are computed, those of a block would
            # not lie side by side. All readers of the view then share what is stored.
            x.data = lowering.lowerings[aten.clone.default](x).data
        x.realize()
        dtype = x.get_dtype()
        is_input = isinstance(x.data, ir.StorageBox) and x.data.is_input_buffer()
        if is_input or dtype not in CARRIERS or working_dtype(dtype) == dtype:
            return x
        # A loop that stores 16-bit numbers goes on with them in float32, unrounded: round them to their own dtype.
        return lowering.lowerings[round_op](x, CARRIERS[dtype].name, "nearest_even", "ovf_inf", SOURCE)

    def constant(self, value: float, like: ir.TensorBox) -> ir.TensorBox:
        device = like.get_device()
        return lowering.lowerings[aten.full.default]([], value, dtype=torch.float32, device=device)

    def step_function(
        self, y: ir.TensorBox, thresholds: Sequence[float], values: Sequence[float], dtype: torch.dtype
    ) -> ir.TensorBox:
        steps = [1 << i for i in reversed(range(len(thresholds).bit_length()))]
        filled = [*thresholds, *[math.nan] * (2 * steps[0] - len(thresholds))]  # no number reaches NaN
        limits, results = (
            V.graph.add_tensor_constant(torch.tensor(each, dtype=dtype, device=y.get_device()))
            for each in (filled, values)
        )
        load, load_limit, load_result = y.make_loader(), limits.make_loader(), results.make_loader()

        def loaded(load_table: Any, position: Any, size: int) -> Any:
            return load_table([ops.indirect_indexing(position, size, check=False)])

        def value(index: Any) -> Any:
            number, position = load(index), ops.constant(0, torch.int64)
            for step in steps:  # bisection
                limit = loaded(load_limit, ops.add(position, ops.constant(step - 1, torch.int64)), len(filled))
                further = ops.add(position, ops.constant(step, torch.int64))
                position = ops.where(ops.ge(number, limit), further, position)
            return loaded(load_result, position, len(values))

        return ir.Pointwise.create(device=y.get_device(), dtype=dtype, inner_fn=value, ranges=list(y.get_size()))


@lowering.register_lowering(torch.ops.fpsim.mx_multiplier.default, type_promotion_kind=None)
def _lower_mx_multiplier(amax: ir.TensorBox, element: str, rule: str, source: str) -> ir.TensorBox:
    dtype, working, device = amax.get_dtype(), working_dtype(amax.get_dtype()), amax.get_device()
    load = amax.make_loader()

    def multiplier(index: Any) -> Any:
        value = ops.to_dtype(load(index), working, src_dtype=dtype)
        return ops.to_dtype(_scale_of(value, parse_element(element), rule, dtype, device), dtype, src_dtype=working)

    return ir.Pointwise.create(device=device, dtype=dtype, inner_fn=multiplier, ranges=list(amax.get_size()))


@lowering.register_lowering(torch.ops.fpsim.round_mx.default, type_promotion_kind=None)
def _lower_round_mx(
    x: ir.TensorBox, multiplier: ir.TensorBox, format: str, rounding: str, overflow: str, rule: str, source: str
) -> ir.TensorBox:
    dtype, device, fmt = x.get_dtype(), x.get_device_or_error(), parse_format(format)
    is_moved = suits(grid_of(fmt, dtype, scaled=True), rounding, overflow, rule)
    if not is_moved or not is_in_cpp(device) or config.cpp.enable_unsafe_math_opt_flag:  # which reorders sums
        call = OnLowerings()
        rounded = call(torch.ops.fpsim.round.default, x, format, rounding, overflow, source, multiplier)
        return call(aten.where.ScalarSelf, call(aten.eq.Scalar, multiplier, NAN_MARK), math.nan, rounded)
    working = working_dtype(dtype)
    function = block_function(fmt, rounding, overflow, rule, dtype)
    loaders = x.make_loader(), lowering.expand(multiplier, x.get_size()).make_loader()

    def rounded_at(index: Any) -> Any:
        values = (ops.to_dtype(load(index), working, src_dtype=dtype) for load in loaders)
        return ops.to_dtype(inline(function, working, *values), dtype, src_dtype=working)

    return ir.Pointwise.create(device=device, dtype=dtype, inner_fn=rounded_at, ranges=list(x.get_size()))


@lowering.register_lowering(torch.ops.fpsim.round_scaled.default, type_promotion_kind=None)
def _lower_round_scaled(
    x: ir.TensorBox,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    axes: Sequence[int],
    source: str,
    words: ir.TensorBox | None = None,
    factor: ir.TensorBox | None = None,
    outside: bool = False,
) -> ir.TensorBox:
    if any(length == 0 for length in x.get_size()):
        return lowering.lowerings[aten.clone.default](x)
    parsed = parse_scale(scale or None)
    _refuse_inexact_divisions(parsed)
    result = round_scaled(
        x,
        x.get_dtype(),
        parse_element(element),
        rounding,
        overflow,
        parsed,
        list(axes),
        words,
        OnLowerings(),
        factor,
        outside,
    )
    if all(isinstance(length, int | sympy.Integer) for length in x.get_size()):
        return result
    return lowering.lowerings[aten.clone.default](
        result
    )  # Inductor cannot order the strides of a view of unknown sizes


def _refuse_inexact_divisions(scale: Scale | None) -> None:
    if scale is not None and scale.rule not in POWERS_OF_TWO and config.cpp.enable_unsafe_math_opt_flag:
        raise RuntimeError(
            f"scale {str(scale)!r} needs divisions as IEEE 754 rounds them, and cpp.enable_unsafe_math_opt_flag gives "
            "others: turn the flag off, or use a scale of powers of two, such as mx"
        )


@lowering.register_lowering(torch.ops.fpsim.outer_scale.default, type_promotion_kind=None)
def _lower_outer_scale(x: ir.TensorBox, element: str, scale: str, axes: Sequence[int], source: str) -> ir.TensorBox:
    parsed, dtype, shape = parse_scale(scale), x.get_dtype(), list(x.get_size())
    _refuse_inexact_divisions(parsed)
    if any(length == 0 for length in shape):
        sizes = shape_of_outer_scale(shape, scale, axes)
        return lowering.lowerings[aten.full.default](sizes, 1.0, dtype=working_dtype(dtype), device=x.get_device())
    assert parsed is not None, "the scale has a name"
    return outer_scale(x, dtype, parse_element(element), parsed, list(axes), OnLowerings())
