"""A shorter form of rounding in blocks whose scales are powers of two.

`fpsim.rounding.float_forms` multiplies a number by the inverse of the scale, rounds the product, and multiplies it
back. Here the number stays, and the constants of the grid move. These are the same for a whole block. Under the rules
whose scales reach the largest magnitude, no number exceeds the largest value of the grid either.

`fpsim.rounding.kernel` defines every result. The form gives the same bits where `suits` and `unsuitable` say so: its
sum and its difference are those of the scaled numbers times a power of two, and none of them overflows or is subnormal.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fpsim.formats import FloatFormat
from fpsim.rounding import float_forms
from fpsim.rounding.carriers import CARRIERS, grid_of, working_dtype
from fpsim.rounding.cpp_functions import CppOps, CppText
from fpsim.rounding.float_forms import FloatOps
from fpsim.rounding.kernel import Grid, Int, round_code
from fpsim.scaling.rules import nan_mark_code

#: The rules with which no element of a block exceeds the largest value of the format, times the scale.
_REACHING = ("rceil", "ceil")


def suits(grid: Grid, rounding: str, overflow: str, rule: str) -> bool:
    """Whether `round_on_moved_grid` gives the bits of `fpsim.rounding.kernel.round_code` for some multipliers."""
    # In float64 the multiplier of NaN scales would be suitable, and the largest scale does not reach all numbers.
    is_limited = grid.carrier.bits == 32 and (rule in _REACHING or overflow == "sat_finite")
    return is_limited and rounding == "nearest_even" and float_forms.suits(grid, rounding)


def unsuitable(magnitude: Int, multiplier: Int, grid: Grid) -> Int:
    """Not zero where `round_on_moved_grid` may give other bits, or where the multiplier stands for a NaN scale.

    Args:
        magnitude: the code of the number's magnitude.
        multiplier: the code of the power of two.
    """
    fmt, carrier = grid.fmt, grid.carrier
    lowest = fmt.max_exponent + grid.shift - carrier.bias  # below it the power of two that is added overflows
    highest = fmt.emin - fmt.mantissa_bits - 1 - carrier.emin  # above it a subnormal of the carrier may stay
    m, sign = carrier.mantissa_bits, carrier.bits - 1
    too_low = (multiplier - ((lowest + carrier.bias) << m)) >> sign  # all bits, or none
    too_high = (((highest + carrier.bias) << m) - multiplier) >> sign
    return too_low | (too_high & magnitude)  # zero stays zero with any scale


def round_on_moved_grid(code: Int, multiplier: Int, grid: Grid, rule: str, ops: FloatOps) -> Int:
    """`fpsim.rounding.kernel.round_code` to nearest even, where `suits` holds and `unsuitable` does not.

    Args:
        code: the code of the number.
        multiplier: the code of the power of two by which numbers are scaled.
        grid: the grid, for scaled numbers.
        rule: the rule of the scale.
        ops: the executor.
    """
    carrier, m = grid.carrier, grid.carrier.mantissa_bits
    moved = multiplier - (carrier.bias << m)
    magnitude = code & (carrier.sign_code - 1)
    a = magnitude
    if rule not in _REACHING:
        limit = grid.plain_max - moved
        a = limit + ops.clamp(a - limit, None, 0)
    binade = a & (carrier.max_code + 1)
    c = ops.larger(binade + (grid.shift << m), ((grid.first_field + grid.shift) << m) - moved)
    r = ops.difference(ops.sum(a, c), c)
    # The exclusive-or of three takes no constant. Without a negative zero, -r has the sign bit unless r is 0.
    return r ^ code ^ magnitude if grid.fmt.has_negative_zero else r | ((code ^ magnitude) & -r)


@lru_cache(maxsize=1024)
def block_function(fmt: FloatFormat, rounding: str, overflow: str, rule: str, dtype: torch.dtype) -> str:
    """The body of a C++ function of a number and of its block's multiplier; the arguments are those of `suits`."""
    working = working_dtype(dtype)
    carrier, grid = CARRIERS[working], grid_of(fmt, dtype, scaled=True)
    text = CppText(bits=carrier.bits)
    ops = CppOps(text)
    code, multiplier = (text.name(f"c10::bit_cast<U>(x{i})") for i in range(2))
    if working != dtype:
        # Inductor keeps 16-bit intermediates in float32, unrounded: round them to their own dtype first.
        code = round_code(code, Grid(CARRIERS[dtype], carrier), "nearest_even", "ovf_inf", ops)
    text.lines.append(f"if (none((I){unsuitable(code & (carrier.sign_code - 1), multiplier, grid)})) {{")
    text.give(round_on_moved_grid(code, multiplier, grid, rule, ops))
    text.lines.append("}")
    rounded = round_code(code, grid, rounding, overflow, ops, 0, multiplier)
    mark = nan_mark_code(grid)
    is_nan = ops.less(multiplier, mark + 1) & ~ops.less(multiplier, mark)
    assert carrier.nan_code is not None, "carriers have a NaN"
    text.give(ops.choose(is_nan, carrier.nan_code, rounded))
    return "\n".join(text.lines)
