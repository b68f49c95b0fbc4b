"""The products of narrow accumulators on GPUs: a Triton kernel with the bits of `kernel.cpp`.

Every step is the one of the C++ kernel, in float64. Products of two float32 numbers are exact there, so that a compiler
may contract a product and a sum. Orders with a tree of additions, and exact sums that float64 does not hold, are for
the CPU alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpsim.accumulators.specification import NUMBERS, ORDERS, ROUNDINGS, Specification

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 32

_SEQUENTIAL, _CHUNKED, _ALIGNED, _LATE = (
    tl.constexpr(ORDERS[name]) for name in ("sequential", "chunked", "aligned", "late")
)
_NEAREST_AWAY, _UP, _DOWN, _TO_ODD, _STOCHASTIC, _STOCHASTIC_B, _STOCHASTIC_C = (
    tl.constexpr(ROUNDINGS[name])
    for name in ("nearest_away", "up", "down", "to_odd", "stochastic", "stochastic_b", "stochastic_c")
)
_NEAREST_EVEN, _CLAMP = tl.constexpr(ROUNDINGS["nearest_even"]), tl.constexpr(max(ROUNDINGS.values()) + 1)
_EXPONENT, _MAGNITUDE, _SIGN = (
    tl.constexpr(0x7FF0000000000000), tl.constexpr(0x7FFFFFFFFFFFFFFF), tl.constexpr(-(1 << 63))
)  # fmt: skip
(
    _START, _SMALLEST_NORMAL, _LEAST_POWER, _LARGEST, _INFINITE_FROM, _OVERFLOW_UP, _OVERFLOW_DOWN, _INFINITY, _, _,
    _KEPT, _FLOOR, _LATE_KEPT,
) = (tl.constexpr(i) for i in range(len(NUMBERS)))  # fmt: skip


@triton.jit
def _bits(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int64, bitcast=True)


@triton.jit
def _float(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _power(x):  # type: ignore[no-untyped-def]
    return _float(_bits(x) & _EXPONENT)


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    return _float(_bits(x) & _MAGNITUDE)


@triton.jit
def _with_sign(magnitude, x):  # type: ignore[no-untyped-def]
    return _float(_bits(magnitude) | (_bits(x) & _SIGN))


@triton.jit
def _inverse(power):  # type: ignore[no-untyped-def]
    return _float((2046 << 52) - _bits(power))


@triton.jit
def _cut(x):  # type: ignore[no-untyped-def]
    return _with_sign(tl.floor(_magnitude(x)), x)


@triton.jit
def _to_odd(s, error):  # type: ignore[no-untyped-def]
    """``s``, which is inexact by ``error``, rounded to odd."""
    bits = _bits(s)
    inexact = (error > 0) | (error < 0)
    outward = ((bits ^ _bits(error)) & _SIGN) == 0
    step = tl.where(outward, 1, -1).to(tl.int64)
    return _float(tl.where(inexact & ((bits & 1) == 0), bits + step, bits))


@triton.jit
def _add(a, b, EXACT: tl.constexpr, ROUNDING: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a + b`` rounded to odd. A zero is -0 in rounding down, unless both are +0."""
    s = a + b
    if not EXACT:
        t = s - a
        s = _to_odd(s, (a - (s - t)) + (b - t))
    if ROUNDING == _DOWN:
        s = tl.where(s == 0, _float((_bits(a) | _bits(b)) & _SIGN), s)
    return s


@triton.jit
def _to_float32(x):  # type: ignore[no-untyped-def]
    """``x`` rounded to float32, to nearest even, as float64."""
    magic = tl.minimum(tl.maximum(_power(x), 1.1754943508222875e-38), 8.452712498170644e270) * 805306368.0
    r = (_magnitude(x) + magic) - magic
    return _with_sign(tl.where(r >= 3.402823669209385e38, float("inf"), r), x)


@triton.jit
def _random_word(key, index):  # type: ignore[no-untyped-def]
    low = (key ^ index).to(tl.uint32)
    high = ((key ^ index) >> 32).to(tl.uint32)
    word = low * 0xED5AD4BB
    word ^= word >> 15
    word = (word ^ high) * 0xAC4C1B51
    word ^= word >> 14
    word = word * 0x31848BAB
    return word ^ (word >> 17)


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    x, numbers, key, index, ROUNDING: tl.constexpr, MANTISSA_BITS: tl.constexpr, RANDOM_BITS: tl.constexpr
):
    """``x`` rounded to the accumulator; ``index`` is that of the random numbers."""
    if ROUNDING == _CLAMP:
        low, high = tl.load(numbers + _OVERFLOW_DOWN), tl.load(numbers + _LARGEST)
        return tl.where(x < low, low, tl.where(x > high, high, x))
    size = _magnitude(x)
    p = tl.minimum(tl.maximum(_power(x), tl.load(numbers + _LEAST_POWER)), 1.0715086071862673e301)
    magic = p * (1.5 * (1 << (52 - MANTISSA_BITS)))
    r = (size + magic) - magic
    if ROUNDING != _NEAREST_EVEN:
        unit = p * (1.0 / (1 << MANTISSA_BITS))
        below = tl.where(r > size, r - unit, r)
        inexact = below < size
        if ROUNDING == _NEAREST_AWAY:
            up = size - below >= unit * 0.5
        elif ROUNDING == _UP:
            up = inexact & (x > 0)
        elif ROUNDING == _DOWN:
            up = inexact & (x < 0)
        elif ROUNDING == _TO_ODD:
            up = inexact & ((below + (magic + magic)) - (magic + magic) == below)
        elif RANDOM_BITS > 0:
            drawn = (_random_word(key, index) >> (32 - RANDOM_BITS)).to(tl.float64)
            full = 1.0 * (1 << RANDOM_BITS)
            scaled = (size - below) * (full / unit)
            needed = full - drawn
            if ROUNDING == _STOCHASTIC:
                scaled = tl.floor(scaled)
            if ROUNDING == _STOCHASTIC_B:
                needed = needed - 0.5
            if ROUNDING == _STOCHASTIC_C:
                scaled = (scaled + 6755399441055744.0) - 6755399441055744.0
            up = inexact & (scaled >= needed)
        else:
            up = below != below
        r = tl.where(up, below + unit, below)
    smallest = tl.load(numbers + _SMALLEST_NORMAL)
    r = tl.where(r < smallest, 0.0, r)
    overflow = tl.where(x < 0, tl.load(numbers + _OVERFLOW_DOWN), tl.load(numbers + _OVERFLOW_UP))
    r = tl.where(r > tl.load(numbers + _LARGEST), overflow, r)
    r = tl.where(size >= tl.load(numbers + _INFINITE_FROM), tl.load(numbers + _INFINITY), r)
    return _with_sign(r, x)


@triton.jit
def _finite_power(x, least, OF_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The power of ``x``, at least ``least``; 1 for infinities and NaN. Zeros have ``least``, or 0 as asked."""
    p = _power(x)
    known = tl.maximum(p, least)
    if not OF_ZERO:
        known = tl.where(x != 0, known, 0.0)
    return tl.where(p > 1.0715086071862673e301, 1.0, known)


@triton.jit
def _floor_to(x, scale):  # type: ignore[no-untyped-def]
    return tl.floor(x * scale) * _inverse(scale)


@triton.jit
def _product(a, b, k, rows, columns):  # type: ignore[no-untyped-def]
    return tl.load(a + k * rows)[:, None] * tl.load(b + k * columns)[None, :]


@triton.jit
def _aligned_step(  # type: ignore[no-untyped-def]
    c, a, b, power_a, power_b, k, end, rows, columns, numbers, GROUP: tl.constexpr
):
    """The sum of one step of a matrix unit, before it is rounded."""
    kept = tl.load(numbers + _KEPT)
    top = tl.zeros_like(c) + tl.load(numbers + _FLOOR)
    for i in range(k, end):
        top = tl.maximum(top, _product(power_a, power_b, i, rows, columns))
    top = tl.maximum(top, _finite_power(c, tl.load(numbers + _LEAST_POWER), False))
    scale = kept * _inverse(top)
    s = _cut(c * scale)
    for i in range(k, end, GROUP):
        term = _product(a, b, i, rows, columns)
        for j in range(i + 1, tl.minimum(i + GROUP, end)):
            term += _product(a, b, j, rows, columns)
        s += _cut(term * scale)
    return s * (top * (1.0 / kept))


@triton.jit
def _late_step(  # type: ignore[no-untyped-def]
    c, a, b, power_a, power_b, k, end, rows, columns, numbers, LANES: tl.constexpr
):
    """The sum of one step of a unit of CDNA 3, before it is rounded."""
    kept, late, least = tl.load(numbers + _KEPT), tl.load(numbers + _LATE_KEPT), tl.load(numbers + _LEAST_POWER)
    floor = tl.zeros_like(c) + tl.load(numbers + _FLOOR)
    top, s, other_top, other = floor, tl.zeros_like(c), floor, tl.zeros_like(c)
    for lane in tl.static_range(LANES):
        own, total = floor, tl.zeros_like(c)
        for i in range(k + lane, end, LANES):
            own = tl.maximum(own, _product(power_a, power_b, i, rows, columns))
        scale = kept * _inverse(own)
        for i in range(k + lane, end, LANES):
            p = _product(a, b, i, rows, columns)
            infinite = _with_sign(tl.zeros_like(c) + float("inf"), p)
            total += tl.where(_magnitude(p) >= 3.402823669209385e38, infinite, _cut(p * scale))
        if lane == 0:
            top, s = own, total
        else:
            other_top, other = own, total
    if LANES == 2:
        joined = tl.maximum(top, other_top)
        s = tl.floor(s * (top * _inverse(joined))) + tl.floor(other * (other_top * _inverse(joined)))
        top = joined
    own = _finite_power(c, least, True)
    joined = tl.maximum(top, own)
    old = _floor_to(c, kept * _inverse(joined))
    if LANES == 2:
        old = tl.where((own * (2.0 * kept) < joined) & (_magnitude(c) < float("inf")), 0.0, old)
    x = _floor_to(s * (top * (1.0 / kept)), 2.0 * late * _inverse(joined)) + old
    return tl.where(x == 0, 0.0, _floor_to(x, late * _inverse(_finite_power(x, least, True))))


@triton.jit
def _accumulate(  # type: ignore[no-untyped-def]
    a, b, power_a, power_b, scales_a, scales_b, out, numbers, rows, columns, depth, promote, key, roundings, first_sum,
    first_element,
    ORDER: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, RANDOM_BITS: tl.constexpr, EXACT: tl.constexpr, ROUND_PRODUCTS: tl.constexpr,
    RESCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the result. ``a`` (batches, K, M), ``b`` (batches, K, N) and their powers are float64."""
    strips = tl.cdiv(columns, BLOCK_COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    place = (batch * rows + row)[:, None] * columns + column[None, :]
    index = (first_element + place) * roundings
    of_a, of_b = batch * depth * rows + row, batch * depth * columns + column
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float64)
    parts = tl.cdiv(depth, promote)
    for number in range(0, parts):
        first = number * promote
        last = tl.minimum(first + promote, depth)
        c = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float64)
        c = _float(_bits(c) | _bits(tl.load(numbers + _START)))  # -0 + 0 would be +0
        if ORDER == _SEQUENTIAL:
            for k in range(first, last):
                p = _product(a + of_a, b + of_b, k, rows, columns)
                if ROUND_PRODUCTS:
                    p = _round(p, numbers, key, index + k, ROUNDING, MANTISSA_BITS, RANDOM_BITS)
                s = _add(c, p, EXACT, ROUNDING)
                c = _round(s, numbers, key, index + first_sum + k, ROUNDING, MANTISSA_BITS, RANDOM_BITS)
        else:
            for k in range(first, last, LENGTH):
                end = tl.minimum(k + LENGTH, last)
                step = index + k // LENGTH
                if ORDER == _CHUNKED:
                    signs = _bits(c)
                    for i in range(k, end):
                        p = _product(a + of_a, b + of_b, i, rows, columns)
                        signs |= _bits(p)
                        c += p
                    if ROUNDING == _DOWN:
                        c = tl.where(c == 0, _float(signs & _SIGN), c)
                    c = _round(c, numbers, key, step, ROUNDING, MANTISSA_BITS, RANDOM_BITS)
                elif ORDER == _ALIGNED:
                    x = _aligned_step(
                        c, a + of_a, b + of_b, power_a + of_a, power_b + of_b, k, end, rows, columns, numbers, GROUP
                    )
                    c = _round(x, numbers, key, step, ROUNDING, MANTISSA_BITS, RANDOM_BITS) + 0.0
                else:
                    x = _late_step(
                        c, a + of_a, b + of_b, power_a + of_a, power_b + of_b, k, end, rows, columns, numbers, LANES
                    )
                    c = _round(x, numbers, key, step, ROUNDING, MANTISSA_BITS, RANDOM_BITS)
        if RESCALE:
            scale_a = tl.load(scales_a + (batch * rows + row) * parts + number).to(tl.float64)
            scale_b = tl.load(scales_b + (batch * parts + number) * columns + column).to(tl.float64)
            scale = _to_float32(scale_a[:, None] * scale_b[None, :])
            total = _to_float32(_add(total, c * scale, False, _NEAREST_EVEN))
        elif number == 0:
            total = c
        else:
            total = _to_float32(total + c)
    tl.store(out + place, total, mask=inside)


def accumulate_with_triton(
    spec: Specification,
    a: Tensor,
    b: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    key: Tensor | None,
    accumulator: str,
    block: tuple[int, int] = (_BLOCK_ROWS, _BLOCK_COLUMNS),
) -> Tensor:
    """The sums, float64, of ``a`` (batches, M, K) and ``b`` (batches, K, N), float32.

    The other arguments are those of `fpsim.accumulators.product.accumulate`. ``block`` is the size of a tile.

    Raises:
        NotImplementedError: the sums of this accumulator are simulated on the CPU alone.
    """
    _check_order(spec, accumulator)
    (batches, rows, depth), columns = a.shape, b.shape[2]
    out = torch.zeros(batches, rows, columns, dtype=torch.float64, device=a.device)
    if out.numel() == 0 or depth == 0:
        return out
    has_powers = spec.order in (ORDERS["aligned"], ORDERS["late"])
    joined = None if scales is None or spec.rescale else _each(scales, spec.scale_block, depth)
    left, power_left = _packed(spec, a.transpose(1, 2), spec.least_a, joined and joined[0].transpose(1, 2), has_powers)
    right, power_right = _packed(spec, b, spec.least_b, joined and joined[1], has_powers)
    numbers = torch.tensor([getattr(spec, name) for name in NUMBERS], dtype=torch.float64, device=a.device)
    factors = scales if scales is not None and spec.rescale else (numbers, numbers)  # which are not read
    tiles = triton.cdiv(rows, block[0]) * triton.cdiv(columns, block[1])
    _accumulate[(tiles, batches)](
        left, right, power_left, power_right, *factors, out, numbers, rows, columns, depth, spec.promote or depth,
        _whole(key), spec.roundings, spec.first_sum, spec.first_element, spec.order, spec.length, spec.group,
        spec.lanes, spec.rounding, spec.mantissa_bits, spec.random_bits, bool(spec.exact), bool(spec.round_products),
        bool(spec.rescale), *block, enable_fp_fusion=False,
    )  # fmt: skip
    nan = torch.tensor(spec.nan_bits, dtype=torch.int32, device=a.device).view(torch.float32).double()
    return torch.where(out.isnan(), nan, out)


def _check_order(spec: Specification, accumulator: str) -> None:
    known = [ORDERS[name] for name in ("sequential", "chunked", "aligned", "late")]
    is_exact_chunk = spec.order != ORDERS["chunked"] or spec.exact
    if spec.order not in known or spec.block or not is_exact_chunk:
        raise NotImplementedError(
            f"{accumulator!r} has sums that are simulated on CPUs alone, as trees of additions and exact sums beyond "
            "float64 are: use a.cpu(), order='sequential', or a machine of NVIDIA"
        )


def _each(scales: tuple[Tensor, Tensor], block: int, depth: int) -> tuple[Tensor, Tensor]:
    """The scale of every element."""
    first, second = (scale.double().repeat_interleave(block, axis) for scale, axis in zip(scales, (2, 1), strict=True))
    return first[:, :, :depth], second[:, :depth]


def _packed(
    spec: Specification, x: Tensor, least: float, scales: Tensor | None, has_powers: bool
) -> tuple[Tensor, Tensor]:
    """An operand in float64, and the powers of two of its exponents: the function ``pack`` of `kernel.cpp`."""
    values = x.double().contiguous()
    if spec.flush:
        values = torch.where(values.abs() < least, values * 0.0, values)
    if not has_powers:
        return values, values
    own = values.abs() if spec.group == 1 or scales is None else scales
    power = (own.contiguous().view(torch.int64) & _EXPONENT.value).view(torch.float64)
    smallest = torch.tensor(least, dtype=torch.float64, device=x.device)
    power = torch.maximum(power, smallest if spec.group > 1 or scales is None else smallest * scales)
    power = torch.where(power <= math.ldexp(1.0, 1000), power, 1.0)
    return values, torch.where(values == 0, 0.0, power).contiguous()


def _whole(key: Tensor | None) -> Any:
    if key is None:
        return 0
    low, high = (int(half) & 0xFFFFFFFF for half in key)
    whole = low | high << 32
    return whole - (1 << 64) if whole >> 63 else whole
