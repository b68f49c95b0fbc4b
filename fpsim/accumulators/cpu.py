"""The products of narrow accumulators on the CPU: a C++ kernel, built when it is first called, and its arguments.

Inductor's own builder compiles `kernel.cpp` for the vectors of this processor and keeps the library in its cache.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator
from fpsim.formats import FloatFormat, split_rounding
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import round_op

_ORDERS = {
    "sequential": 0, "multiply_add": 0, "chunked": 1, "pairwise": 2, "interleaved": 3, "aligned": 4, "late": 5,
}  # fmt: skip
_ROUNDINGS = {
    "nearest_even": 0, "nearest_away": 1, "toward_zero": 2, "up": 3, "down": 4, "to_odd": 5, "stochastic": 6,
    "stochastic_b": 7, "stochastic_c": 8,
}  # fmt: skip
_CLAMP = 9
_FLOAT64_BITS = 53
#: An exponent below that of every product of two float32 numbers, and of every sum of them that is not zero.
_NO_FLOOR = -400
_NAN_BITS = 0x7FC00000
#: How many elements share one scale of NVFP4, which is a value of e4m3fn. Larger blocks have powers of two.
NV_BLOCK = 16

_INTEGERS = (
    "order", "length", "block", "promote", "exact", "round_products", "flush", "bounded", "cuts", "narrow", "rounding",
    "mantissa_bits", "random_bits", "roundings", "first_sum", "key", "nan_bits", "lanes", "scale_block", "group",
    "rescale", "first_element",
)  # fmt: skip
_NUMBERS = (
    "start", "smallest_normal", "least_power", "largest", "infinite_from", "overflow_up", "overflow_down", "infinity",
    "least_a", "least_b", "kept", "floor", "late_kept",
)  # fmt: skip


class Specification(ctypes.Structure):
    """The arguments of the kernel, in the order of the struct of the same name in `kernel.cpp`."""

    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_double) for name in _NUMBERS]


@lru_cache(maxsize=1)
def _library() -> Any:
    """The compiled kernel. IEEE arithmetic must not be reordered or contracted, whatever Inductor's flags are."""
    from torch._inductor.codecache import CppCodeCache

    flags = ("-ffp-contract=off", "-fno-unsafe-math-optimizations", "-fsigned-zeros", "-fno-finite-math-only")
    library = CppCodeCache.load(Path(__file__).with_name("kernel.cpp").read_text(), extra_flags=flags)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.fpsim_accumulate.argtypes = [ctypes.POINTER(Specification), *[pointer] * 7, *[count] * 5]
    library.fpsim_accumulate.restype = None
    return library


def accumulate_on_cpu(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    first: FloatFormat,
    second: FloatFormat,
    key: Tensor | None,
    scales: tuple[Tensor, Tensor] | None = None,
    scale_block: int = 0,
    first_element: int = 0,
    counts: Tensor | None = None,
) -> Tensor:
    """The product of ``a`` (batches, M, K) and ``b`` (batches, K, N), with values of these formats, in their dtype.

    Args:
        key: of stochastic rounding.
        scales: of blocks, (batches, M, blocks) and (batches, blocks, N), float32. They multiply the elements on a
            machine whose sums take them in. On others they multiply the partial sums, which move to float32 after every
            block.
        scale_block: how many elements share a scale.
        first_element: the number of the first element of the result, on which its random numbers depend.
        counts: three int64 numbers, to which are added: the sums that stagnated, because a step left them as they were
            although its products do not add up to zero; such steps; and all steps whose products do not add up to zero.
    """
    batches, rows, depth = a.shape
    columns = b.shape[2]
    spec = _specification(accumulator, first, second, depth)
    if key is not None:
        low, high = (int(half) & 0xFFFFFFFF for half in key)
        spec.key = _signed(low | high << 32)
    wide = a.dtype == torch.float64 or accumulator.integer_bits is not None
    out = torch.empty(batches, rows, columns, dtype=torch.float64 if wide else torch.float32)
    factors = [scale.contiguous() for scale in scales or ()]  # kept alive while the kernel reads them
    spec.scale_block, spec.first_element = scale_block, first_element
    left, right = a, b
    if accumulator.machine is not None and accumulator.machine.blocks:
        left, right = (_times_scales(a, factors[0], scale_block, 2), _times_scales(b, factors[1], scale_block, 1))
    elif factors:
        spec.rescale, spec.promote = 1, scale_block
    left, right = (x.to(torch.float32).contiguous() for x in (left, right))
    if spec.group > 1:  # the exponents are those of the scales, whose least one is that of e4m3fn or E8M0
        spec.least_a = spec.least_b = 2.0 ** (-6 if scale_block == NV_BLOCK else -127)
    if out.numel():
        pointers = (None, out.data_ptr()) if wide else (out.data_ptr(), None)
        _library().fpsim_accumulate(
            ctypes.byref(spec), left.data_ptr(), right.data_ptr(),
            *(factors[i].data_ptr() if factors else None for i in (0, 1)), *pointers,
            None if counts is None else counts.data_ptr(), batches, rows, columns, depth, torch.get_num_threads(),
        )  # fmt: skip
    if accumulator.integer_bits is not None:
        return _integer_result(out, accumulator, a.dtype)
    return out.to(a.dtype)


def _times_scales(elements: Tensor, scales: Tensor, block: int, axis: int) -> Tensor:
    each = scales.double().repeat_interleave(block, axis).narrow(axis, 0, elements.shape[axis])
    return elements.double() * each


def _integer_result(sums: Tensor, accumulator: Accumulator, dtype: torch.dtype) -> Tensor:
    """Sums of integers in float64, wrapped around, in ``dtype``."""
    if not sums.isfinite().all():
        raise ValueError(f"an operand of accumulator {str(accumulator)!r} is infinite or NaN: integers are neither")
    if accumulator.overflow == "wrap":
        width = 2.0 ** (accumulator.integer_bits or 0)
        sums = sums - width * torch.floor(sums / width + 0.5)
    if dtype == torch.float64:
        return sums
    return round_op(sums, CARRIERS[dtype].name, "nearest_even", "ovf_inf").to(dtype)


@lru_cache(maxsize=1024)
def _sized(accumulator: Accumulator, first: FloatFormat, second: FloatFormat, depth: int) -> Specification:
    spec = Specification(
        length=accumulator.length, promote=accumulator.promote or 0, order=_ORDERS[accumulator.order], lanes=1, group=1,
        nan_bits=_NAN_BITS, infinite_from=math.inf, infinity=math.inf, floor=2.0**_NO_FLOOR,
        least_a=2.0**first.emin, least_b=2.0**second.emin,
    )  # fmt: skip
    fmt = accumulator.format
    spec.exact = _is_exact(first, second, accumulator, depth)
    if fmt is None:
        _describe_integer(spec, accumulator, depth)
        return spec
    name, spec.random_bits = split_rounding(accumulator.rounding)
    spec.rounding, spec.mantissa_bits = _ROUNDINGS[name], fmt.mantissa_bits
    spec.start = 0.0 if name == "down" or accumulator.order == "aligned" else -0.0
    spec.smallest_normal = 0.0 if fmt.subnormals else fmt.smallest_normal
    spec.least_power = 2.0 ** (fmt.emin if fmt.subnormals else _NO_FLOOR)
    _describe_overflow(spec, fmt, name, accumulator.overflow)
    spec.round_products = accumulator.order == "multiply_add"
    spec.kept = 2.0**accumulator.fraction_bits
    if accumulator.order == "aligned":
        spec.infinite_from = 2.0 ** (fmt.max_exponent + 1)
    if accumulator.machine is not None:
        _describe_machine(spec, accumulator, first, second)
    spec.bounded = spec.exact and name == "nearest_even" and _is_bounded(first, second, fmt, depth)
    # A format whose largest number is just below a power of two is cut by a mask: nothing overflows but by that power.
    spec.cuts = name == "toward_zero" and fmt.has_infinity and fmt == FloatFormat(fmt.exponent_bits, fmt.mantissa_bits)
    spec.first_sum = depth if accumulator.order == "multiply_add" else 0
    spec.roundings = _roundings(accumulator, depth)
    return spec


def _specification(accumulator: Accumulator, first: FloatFormat, second: FloatFormat, depth: int) -> Specification:
    """The kernel's arguments without a random key: a copy that the caller may change."""
    return Specification.from_buffer_copy(_sized(accumulator, first, second, depth))


def _is_exact(first: FloatFormat, second: FloatFormat, accumulator: Accumulator, depth: int) -> bool:
    """Whether all sums of ``depth`` products, and of an accumulator and products, are exact in float64.

    All terms are multiples of one unit, the product of the smallest numbers, and so is an accumulator: its own unit is
    smaller or a multiple. Rounded to nearest or toward zero, it is at most twice the exact sum of the magnitudes. In
    other directions small terms may raise it to its largest number.
    """
    fmt = accumulator.format
    if fmt is not None and not fmt.subnormals:
        return False
    units = first.smallest_exponent + second.smallest_exponent
    largest = first.max_exponent + second.max_exponent + 2 + max(depth, 1).bit_length() + 1
    if fmt is not None and accumulator.rounding not in ("nearest_even", "nearest_away", "toward_zero"):
        largest = max(largest, fmt.max_exponent + 2)
    return largest - units <= _FLOAT64_BITS


def _is_bounded(first: FloatFormat, second: FloatFormat, fmt: FloatFormat, depth: int) -> bool:
    """Whether no operand is infinite, and no sum of ``depth`` products leaves the range of ``fmt``."""
    largest = first.max_exponent + second.max_exponent + 2 + max(depth, 1).bit_length() + 1
    return not (first.has_infinity or second.has_infinity) and largest <= fmt.max_exponent


def _describe_overflow(spec: Specification, fmt: FloatFormat, rounding: str, overflow: str) -> None:
    """The values that stand for infinities and for finite numbers beyond the largest one."""
    spec.largest = fmt.max
    spec.infinity = fmt.max if overflow == "sat_finite" else math.inf if fmt.has_infinity else math.nan
    beyond = math.inf if fmt.has_infinity else math.nan
    to_largest = {"toward_zero": (True, True), "to_odd": (True, True), "up": (False, True), "down": (True, False)}
    above, below = to_largest.get(rounding, (False, False))
    saturates = overflow != "ovf_inf"
    spec.overflow_up = fmt.max if saturates or above else beyond
    spec.overflow_down = fmt.max if saturates or below else beyond


def _describe_integer(spec: Specification, accumulator: Accumulator, depth: int) -> None:
    """Exact sums, which are clamped in every step or wrap around at the end."""
    if not spec.exact:
        raise ValueError(f"{depth} products are too many for {accumulator}: sum them in parts")
    spec.rounding, spec.start = _CLAMP, 0.0
    if accumulator.overflow == "wrap":
        spec.order, spec.length = _ORDERS["chunked"], max(depth, 1)
        spec.largest, spec.overflow_down = math.inf, -math.inf
    else:
        half = 2.0 ** ((accumulator.integer_bits or 0) - 1)
        spec.largest, spec.overflow_down = half - 1, -half


def _describe_machine(spec: Specification, accumulator: Accumulator, first: FloatFormat, second: FloatFormat) -> None:
    machine, fmt = accumulator.machine, accumulator.format
    assert machine is not None and fmt is not None, "the accumulator is that of a machine"
    length = machine.length(first, second)
    spec.order, spec.length, spec.lanes = _ORDERS[machine.order], length, machine.lanes
    spec.start, spec.nan_bits = 0.0, machine.nan_bits
    spec.flush, spec.round_products = machine.flushes, machine.rounds_products
    spec.kept, spec.late_kept = 2.0**machine.fraction_bits, 2.0**machine.late_bits
    spec.group = machine.group
    if machine.order in ("pairwise", "interleaved"):
        spec.block, spec.length = length, machine.lanes
    if machine.order == "aligned":
        spec.floor = 2.0 ** (fmt.emin - machine.floor)
        # All products of fp8 and their sums are far from the ends of float32's range, and 15 + 6 bits are exact.
        spec.narrow = fmt.mantissa_bits == machine.fraction_bits == 13 and accumulator.rounding == "toward_zero"
        if spec.narrow:
            spec.floor = 2.0**-60
    else:
        spec.infinite_from = math.inf


def _roundings(accumulator: Accumulator, depth: int) -> int:
    """How many roundings a result has, in the count of `fpsim.reference.sum`, but without the last conversion."""
    if accumulator.order == "chunked":
        return -(-depth // accumulator.length)
    if accumulator.order == "pairwise":
        return max(depth, 1)
    return 2 * depth if accumulator.order == "multiply_add" else depth


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
