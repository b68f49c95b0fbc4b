"""Inductor's lowerings of the rounding operators: pointwise operations that fuse with their neighbours.

Importing this module registers the lowerings. On the CPU a rounding is one function of C++
(`fpsim.rounding.cpp_functions`). Elsewhere the lowerings run `fpsim.rounding.kernel` on values of Inductor's
intermediate language, so that the generated code does the same integer arithmetic as an eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor import config, ir, lowering
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

import fpsim.rounding.definitions  # noqa: F401  (registers the operators)
from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.carriers import CARRIERS, INTEGER_OF, grid_of, working_dtype
from fpsim.rounding.cpp_functions import AVAILABLE, inline, rounding_function, word_function
from fpsim.rounding.kernel import Grid, round_code
from fpsim.rounding.random_words import random_key, random_word


@dataclass(frozen=True)
class Lanes:
    """An integer value of the intermediate language, with the operators that `fpsim.rounding.kernel` uses."""

    value: Any
    dtype: torch.dtype

    def lift(self, other: Lanes | int) -> Any:
        """``other`` as a value of the intermediate language; an int becomes a constant."""
        return other.value if isinstance(other, Lanes) else ops.constant(other, self.dtype)

    def apply(self, op: Any, *others: Lanes | int) -> Lanes:
        """``op(self, *others)``, with the same dtype."""
        return Lanes(op(self.value, *(self.lift(other) for other in others)), self.dtype)

    def __add__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.add, other)

    __radd__ = __add__

    def __mul__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.mul, other)

    def __sub__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.sub, other)

    def __rsub__(self, other: int) -> Lanes:
        return Lanes(self.lift(other), self.dtype) - self

    def __and__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_and, other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_or, other)

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_xor, other)

    def __invert__(self) -> Lanes:
        return self.apply(ops.bitwise_not)

    def __neg__(self) -> Lanes:
        return 0 - self

    def __rshift__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_right_shift, other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self.apply(ops.bitwise_left_shift, other)

    def __rlshift__(self, other: int) -> Lanes:
        return Lanes(self.lift(other), self.dtype) << self


@dataclass(frozen=True)
class LaneMask:
    """A truth value of the intermediate language."""

    value: Any

    def __and__(self, other: LaneMask) -> LaneMask:
        return LaneMask(ops.logical_and(self.value, other.value))

    def __or__(self, other: LaneMask) -> LaneMask:
        return LaneMask(ops.logical_or(self.value, other.value))

    def __invert__(self) -> LaneMask:
        return LaneMask(ops.logical_not(self.value))


class LaneOps:
    """The kernel's executor on `Lanes` (`fpsim.rounding.kernel.Ops`)."""

    def __init__(self, floating: torch.dtype) -> None:
        self.floating, self.integer = floating, INTEGER_OF[floating]

    def clamp(self, a: Lanes, low: int | None, high: int | None) -> Lanes:
        if low is not None:
            a = a.apply(ops.maximum, low)
        return a if high is None else a.apply(ops.minimum, high)

    def larger(self, a: Lanes, b: Lanes) -> Lanes:
        return a.apply(ops.maximum, b)

    def less(self, a: Lanes, bound: Lanes | int) -> LaneMask:
        return LaneMask(ops.lt(a.value, a.lift(bound)))

    def choose(self, mask: LaneMask, a: Lanes | int, b: Lanes | int) -> Lanes:
        values = (x.value if isinstance(x, Lanes) else ops.constant(x, self.integer) for x in (a, b))
        return Lanes(ops.where(mask.value, *values), self.integer)

    def code_of_integer(self, a: Lanes) -> Lanes:
        as_float = ops.to_dtype(a.value, self.floating, src_dtype=self.integer)
        return Lanes(ops.to_dtype_bitcast(as_float, self.integer, self.floating), self.integer)


def _lower(
    x: ir.TensorBox,
    format: str,
    rounding: str,
    overflow: str,
    scale: ir.TensorBox | None,
    word_at: Callable[[Any], Lanes] | None = None,
) -> ir.TensorBox:
    """The lowering of a rounding of ``x``; ``word_at`` returns the 32-bit random word of the element at an index."""
    carrier, fmt, device = x.get_dtype(), parse_format(format), x.get_device_or_error()
    working = working_dtype(carrier)
    integer = INTEGER_OF[working]
    load = x.make_loader()
    load_scale = None if scale is None else lowering.expand(scale, x.get_size()).make_loader()
    round_values = _round_in_cpp if is_in_cpp(device) else _round_lanes

    def rounded(index: Any) -> Any:
        value = ops.to_dtype(load(index), working, src_dtype=carrier)
        word = None if word_at is None else word_at(index)
        if word is not None and integer == torch.int64:
            word = _converted(word, torch.int64) << 32
        power = None if load_scale is None else ops.to_dtype(load_scale(index), working, src_dtype=carrier)
        return ops.to_dtype(
            round_values(value, fmt, rounding, overflow, carrier, word, power), carrier, src_dtype=working
        )

    return ir.Pointwise.create(device=device, dtype=carrier, inner_fn=rounded, ranges=list(x.get_size()))


def is_in_cpp(device: torch.device) -> bool:
    """Whether `fpsim.rounding.cpp_functions` round on this device."""
    return device.type == "cpu" and AVAILABLE


def _round_in_cpp(
    value: Any, fmt: FloatFormat, rounding: str, overflow: str, carrier: torch.dtype, word: Lanes | None, scale: Any
) -> Any:
    """A value of the working carrier, rounded by a C++ function."""
    floats = not config.cpp.enable_unsafe_math_opt_flag  # which lets compilers reorder sums
    working = working_dtype(carrier)
    function = rounding_function(fmt, rounding, overflow, carrier, word is not None, scale is not None, floats)
    # All arguments have one type, or Inductor would convert their values.
    words = [] if word is None else [ops.to_dtype_bitcast(word.value, working, word.dtype)]
    return inline(function, working, value, *words, *([] if scale is None else [scale]))


def _round_lanes(
    value: Any, fmt: FloatFormat, rounding: str, overflow: str, carrier: torch.dtype, word: Lanes | None, scale: Any
) -> Any:
    """A value of the working carrier, rounded by Inductor's operations."""
    working = working_dtype(carrier)
    lane_ops = LaneOps(working)

    def code_of(value: Any) -> Lanes:
        return Lanes(ops.to_dtype_bitcast(value, lane_ops.integer, working), lane_ops.integer)

    code = code_of(value)
    if working != carrier:
        # Inductor keeps 16-bit intermediates in float32, unrounded: round them to their own dtype first.
        code = round_code(code, Grid(CARRIERS[carrier], CARRIERS[working]), "nearest_even", "ovf_inf", lane_ops)
    powers = None if scale is None else code_of(scale)
    grid = grid_of(fmt, carrier, scale is not None)
    code = round_code(code, grid, rounding, overflow, lane_ops, 0 if word is None else word, powers)
    return ops.to_dtype_bitcast(code.value, working, lane_ops.integer)


@lowering.register_lowering(torch.ops.fpsim.round.default, type_promotion_kind=None)
def _lower_round(
    x: ir.TensorBox, format: str, rounding: str, overflow: str, source: str = "", scale: ir.TensorBox | None = None
) -> ir.TensorBox:
    return _lower(x, format, rounding, overflow, scale)


@lowering.register_lowering(torch.ops.fpsim.round_stochastic.default, type_promotion_kind=None)
def _lower_round_stochastic(
    x: ir.TensorBox,
    key: ir.TensorBox,
    format: str,
    rounding: str,
    overflow: str,
    source: str,
    scale: ir.TensorBox | None = None,
) -> ir.TensorBox:
    return _lower(x, format, rounding, overflow, scale, _word_at(x, key))


@lowering.register_lowering(torch.ops.fpsim.round_with_words.default, type_promotion_kind=None)
def _lower_round_with_words(
    x: ir.TensorBox,
    words: ir.TensorBox,
    format: str,
    rounding: str,
    overflow: str,
    source: str,
    scale: ir.TensorBox | None = None,
) -> ir.TensorBox:
    load = words.make_loader()
    return _lower(x, format, rounding, overflow, scale, lambda index: Lanes(load(index), torch.int32))


@lowering.register_lowering(torch.ops.fpsim.random_words.default, type_promotion_kind=None)
def _lower_random_words(x: ir.TensorBox, key: ir.TensorBox) -> ir.TensorBox:
    word_at = _word_at(x, key)
    return ir.Pointwise.create(
        device=x.get_device(),
        dtype=torch.int32,
        inner_fn=lambda index: word_at(index).value,
        ranges=list(x.get_size()),
    )


def _word_at(x: ir.TensorBox, key: ir.TensorBox) -> Callable[[Any], Lanes]:
    """A function that returns the random word of the element of ``x`` at an index."""
    key.realize()  # compute it once, not for every element
    load_key = key.make_loader()
    sizes = x.get_size()
    strides = ir.FlexibleLayout.contiguous_strides(sizes)
    small = V.graph.sizevars.statically_known_lt(sympy_product(sizes), 2**31)
    device = x.get_device_or_error()
    lanes = _lanes(device, sizes)

    def word_at(index: Any) -> Lanes:
        low_key, high_key = (Lanes(load_key([sympy.Integer(half)]), torch.int32) for half in (0, 1))
        linear = sum((i * stride for i, stride in zip(index, strides, strict=True)), sympy.Integer(0))
        high = high_key
        if not small:
            wide = Lanes(ops.index_expr(linear, torch.int64), torch.int64)
            low, high = low_key ^ _converted(wide, torch.int32), high_key ^ _converted(wide >> 32, torch.int32)
        elif lanes:
            lane = Lanes(ops.index_expr(ModularIndexing(linear, 1, lanes), torch.int32), torch.int32)
            vector = Lanes(ops.index_expr(FloorDiv(linear, lanes), torch.int32), torch.int32)
            low = (low_key ^ (vector << (lanes.bit_length() - 1))) ^ lane
        else:
            low = low_key ^ Lanes(ops.index_expr(linear, torch.int32), torch.int32)
        if not is_in_cpp(device):
            return random_word(low, high)
        return Lanes(inline(word_function(), torch.int32, low.value, high.value), torch.int32)

    return word_at


def _lanes(device: torch.device, sizes: Sequence[sympy.Expr]) -> int:
    """The number of elements in a CPU vector if no vector crosses the end of a row; else 0.

    If it is not 0, the index of an element is computed from the number of its vector, which is a scalar, and its lane,
    which is a constant vector. Inductor itself would assemble the vector of consecutive indices from scalars, which
    costs more than the hash of the index.
    """
    isa = pick_vec_isa() if device.type == "cpu" else None
    lanes = isa.nelements(torch.float32) if isa else 0
    if lanes and len(sizes) > 1 and not V.graph.sizevars.statically_known_multiple_of(sizes[-1], lanes):
        return 0
    return lanes


@lowering.register_lowering(torch.ops.fpsim.random_key.default, type_promotion_kind=None)
def _lower_random_key(seed: ir.TensorBox, salt: int) -> ir.TensorBox:
    load = seed.make_loader()

    def half(index: Any) -> Any:
        key = random_key(Lanes(load([sympy.Integer(0)] * len(seed.get_size())), torch.int64), salt)
        shift = Lanes(ops.index_expr(index[0] * 32, torch.int64), torch.int64)
        return _converted(key >> shift, torch.int32).value

    return ir.Pointwise.create(device=seed.get_device(), dtype=torch.int32, inner_fn=half, ranges=[sympy.Integer(2)])


def _converted(value: Lanes, dtype: torch.dtype) -> Lanes:
    """``value`` converted to integers of another width; narrowing keeps the low bits."""
    return Lanes(ops.to_dtype(value.value, dtype, src_dtype=value.dtype), dtype)
