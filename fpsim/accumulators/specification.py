"""The numbers that describe an accumulator to the kernels of products: how each step adds and rounds."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

from fpsim.accumulators.accumulator import Accumulator
from fpsim.formats import FloatFormat, split_rounding

ORDERS = {
    "sequential": 0, "multiply_add": 0, "chunked": 1, "pairwise": 2, "interleaved": 3, "aligned": 4, "late": 5,
}  # fmt: skip
ROUNDINGS = {
    "nearest_even": 0, "nearest_away": 1, "toward_zero": 2, "up": 3, "down": 4, "to_odd": 5, "stochastic": 6,
    "stochastic_b": 7, "stochastic_c": 8,
}  # fmt: skip
_CLAMP = 9
_FLOAT64_BITS = 53
_FLOAT32_BITS = 24
#: The most bits that a unit may keep below the largest power, so that int32 holds the sum of sixteen products.
_INT32_KEEPS = 25
#: An exponent below that of every product of two float32 numbers, and of every sum of them that is not zero.
_NO_FLOOR = -400
_NAN_BITS = 0x7FC00000
#: How many elements share one scale of NVFP4, which is a value of e4m3fn. Larger blocks have powers of two.
NV_BLOCK = 16

INTEGERS = (
    "order", "length", "block", "promote", "exact", "round_products", "flush", "bounded", "cuts", "narrow",
    "short_products", "rounding", "mantissa_bits", "random_bits", "roundings", "first_sum", "key", "nan_bits", "lanes",
    "scale_block", "group", "rescale", "first_element",
)  # fmt: skip
NUMBERS = (
    "start", "smallest_normal", "least_power", "largest", "infinite_from", "overflow_up", "overflow_down", "infinity",
    "least_a", "least_b", "kept", "floor", "late_kept",
)  # fmt: skip


class Specification(ctypes.Structure):
    """The arguments of the kernels, in the order of the struct of the same name in `kernel.cpp`.

    `INTEGERS` and `NUMBERS` name them.
    """

    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [(name, ctypes.c_double) for name in NUMBERS]


@lru_cache(maxsize=1024)
def _sized(accumulator: Accumulator, first: FloatFormat, second: FloatFormat, depth: int) -> Specification:
    spec = Specification(
        length=accumulator.length, promote=accumulator.promote or 0, order=ORDERS[accumulator.order], lanes=1, group=1,
        nan_bits=_NAN_BITS, infinite_from=math.inf, infinity=math.inf, floor=2.0**_NO_FLOOR,
        least_a=2.0**first.emin, least_b=2.0**second.emin,
    )  # fmt: skip
    fmt = accumulator.format
    spec.exact = _is_exact(first, second, accumulator, depth)
    if fmt is None:
        _describe_integer(spec, accumulator, depth)
        return spec
    name, spec.random_bits = split_rounding(accumulator.rounding)
    spec.rounding, spec.mantissa_bits = ROUNDINGS[name], fmt.mantissa_bits
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


def specification(
    accumulator: Accumulator,
    first: FloatFormat,
    second: FloatFormat,
    depth: int,
    scale_block: int = 0,
    first_element: int = 0,
) -> Specification:
    """The arguments for ``depth`` products of operands in these formats, without a random key.

    Args:
        scale_block: how many elements share a scale; 0 if there are no scales.
        first_element: the number of the first element of the result, on which its random numbers depend.
    """
    spec = Specification.from_buffer_copy(_sized(accumulator, first, second, depth))
    spec.scale_block, spec.first_element = scale_block, first_element
    if scale_block and not joins_scales(accumulator):
        spec.rescale, spec.promote = 1, scale_block
    if spec.group > 1:  # the exponents are those of the scales, whose least one is that of e4m3fn or E8M0
        spec.least_a = spec.least_b = 2.0 ** (-6 if scale_block == NV_BLOCK else -127)
    return spec


def joins_scales(accumulator: Accumulator) -> bool:
    """Whether the sums take scales in, so that elements are multiplied by them."""
    return accumulator.machine is not None and bool(accumulator.machine.blocks)


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
        spec.order, spec.length = ORDERS["chunked"], max(depth, 1)
        spec.largest, spec.overflow_down = math.inf, -math.inf
    else:
        half = 2.0 ** ((accumulator.integer_bits or 0) - 1)
        spec.largest, spec.overflow_down = half - 1, -half


def _describe_machine(spec: Specification, accumulator: Accumulator, first: FloatFormat, second: FloatFormat) -> None:
    machine, fmt = accumulator.machine, accumulator.format
    assert machine is not None and fmt is not None, "the accumulator is that of a machine"
    length = machine.length(first, second)
    spec.order, spec.length, spec.lanes = ORDERS[machine.order], length, machine.lanes
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
    aligned = machine.order in ("aligned", "late") and machine.group == 1 and machine.fraction_bits <= _INT32_KEEPS
    native = spec.block and fmt.mantissa_bits == _FLOAT32_BITS - 1 and machine.rounding == "nearest_even"
    spec.short_products = (aligned or native) and first.mantissa_bits + second.mantissa_bits + 2 <= _FLOAT32_BITS


def _roundings(accumulator: Accumulator, depth: int) -> int:
    """How many roundings a result has, in the count of `fpsim.reference.sum`, but without the last conversion."""
    if accumulator.order == "chunked":
        return -(-depth // accumulator.length)
    if accumulator.order == "pairwise":
        return max(depth, 1)
    return 2 * depth if accumulator.order == "multiply_add" else depth
