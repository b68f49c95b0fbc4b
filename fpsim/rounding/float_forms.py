"""Shorter forms of rounding, which let the carrier's own sums and products do the work of many integer operations.

`fpsim.rounding.kernel` defines every result. The forms give the same bits (``fpsim verify --exhaustive`` proves it)
where `suits` says so, in executors that compute each sum and product as IEEE 754 does, rounded to nearest.

- A sum with ``c``, the power of two whose unit in the last place is the format's unit, rounds to that unit:
  ``(a + c) - c``. No product is near, so contraction cannot touch it; reassociation (unsafe mathematics) would.
- The sum ``t`` is ``c`` plus n units, so the code of ``t`` is the code of ``c`` plus n, and n can be corrected there.
- For stochastic rounding ``a`` is divided by ``2**-bits`` units. The quotient is truncated to an integer, to which the
  random integer is added. Both products are exact.

Only numbers that become zero anyway are subnormal in the carrier, or lead to subnormal products. So it does not matter
whether a process flushes these to zero.
"""

from __future__ import annotations

from typing import Protocol

from fpsim.formats import split_rounding
from fpsim.rounding.kernel import Grid, Int, Mask, Ops, becomes_infinity


class FloatOps(Ops, Protocol):
    """Operations on codes of the carrier's numbers, in the carrier's own arithmetic."""

    def sum(self, a: Int, b: Int) -> Int:
        """The code of the sum of two numbers."""

    def difference(self, a: Int, b: Int) -> Int:
        """The code of the difference of two numbers."""

    def product(self, a: Int, b: Int) -> Int:
        """The code of the product of two numbers."""

    def truncated(self, a: Int) -> Int:
        """The integer part of a number that is not negative."""


def suits(grid: Grid, rounding: str) -> bool:
    """Whether `round_with_floats` gives the bits of `fpsim.rounding.kernel.round_code`.

    In a scaled grid that also depends on the scale: see `scale_suits`.
    """
    fmt, carrier = grid.fmt, grid.carrier
    rounding, random_bits = split_rounding(rounding)
    if random_bits:
        bits = _fraction_bits(rounding, random_bits)
        fits = rounding != "stochastic_c" and carrier.bits == 32 and bits + fmt.mantissa_bits + 1 < carrier.bits - 1
    elif rounding == "nearest_even":
        fits = grid.shift >= 1
    else:
        fits = grid.shift >= 2 and (not grid.scaled or rounding in ("nearest_away", "toward_zero"))
    return (
        fits
        and fmt.signed
        and fmt.subnormals
        and fmt.mantissa_bits >= 1  # otherwise a tie goes to the even code, which is not the even multiple of the unit
        and _largest_power(grid, rounding, random_bits) >= 0
        and fmt.max_exponent + 1 + grid.shift <= carrier.max_exponent
    )


def scale_suits(scale: Int, grid: Grid, rounding: str, ops: Ops) -> Mask:
    """The scales, given by their codes, with which `round_with_floats` gives the bits of ``round_code``."""
    power = min(_largest_power(grid, *split_rounding(rounding)), grid.carrier.bias)
    bound = ((grid.carrier.bias + power) << grid.carrier.mantissa_bits) + 1
    # Code 0 stands for a power that is no normal number of the carrier. One comparison of unsigned numbers excludes it.
    sign = grid.carrier.sign_code
    return ops.less((scale - grid.implicit) ^ -sign, bound - grid.implicit - sign)


def _fraction_bits(rounding: str, random_bits: int) -> int:
    return random_bits + (rounding == "stochastic_b")


def _largest_power(grid: Grid, rounding: str, random_bits: int) -> int:
    """The largest k so that numbers below 2**k times the carrier's smallest normal become zero."""
    dropped = _fraction_bits(rounding, random_bits) if random_bits else 1
    return grid.fmt.emin - grid.fmt.mantissa_bits - dropped - grid.carrier.emin


def round_with_floats(
    code: Int, grid: Grid, rounding: str, overflow: str, ops: FloatOps, word: Int = 0, scale: Int | None = None
) -> Int:
    """`fpsim.rounding.kernel.round_code` with the same arguments and results, where `suits` and `scale_suits` hold."""
    fmt, carrier = grid.fmt, grid.carrier
    rounding, random_bits = split_rounding(rounding)
    infinity = carrier.max_code + 1
    magnitude = code & (carrier.sign_code - 1)
    nearest_overflows = overflow == "ovf_inf" and (rounding in ("nearest_even", "nearest_away") or random_bits > 0)
    next_binade = (fmt.max_exponent + 1 + carrier.bias) << carrier.mantissa_bits
    a = magnitude if scale is None else ops.product(magnitude, scale)
    a = ops.clamp(a, None, next_binade if nearest_overflows else grid.plain_max)
    binade = ops.clamp(a & infinity, grid.first_field << carrier.mantissa_bits, None)  # a power of two

    if random_bits:
        r = _stochastic(a, binade, grid, rounding, _fraction_bits(rounding, random_bits), ops, word)
    else:
        r = _deterministic(a, binade, code, grid, rounding, ops)
    becomes: Mask = None
    if nearest_overflows:
        becomes = ~ops.less(r, grid.plain_max + 1)
    elif overflow != "sat_finite":
        becomes = becomes_infinity(
            magnitude, ~ops.less(magnitude, grid.plain_max + 1), code, grid, rounding, overflow, ops
        )
    if scale is not None:
        r = ops.product(r, (carrier.bias << (carrier.mantissa_bits + 1)) - scale)

    is_nan = ~ops.less(magnitude, infinity + 1)
    if becomes is not None and fmt.has_infinity:
        r = ops.choose(becomes, infinity, r)
    elif becomes is not None:
        is_nan = is_nan | becomes
    # The exclusive-or of three takes no constant. Without a negative zero, -r has the sign bit unless r is 0.
    r = r ^ code ^ magnitude if fmt.has_negative_zero else r | ((code ^ magnitude) & -r)
    return ops.choose(is_nan, carrier.nan_code if fmt.has_nan else grid.plain_max, r)


def _deterministic(a: Int, binade: Int, code: Int, grid: Grid, rounding: str, ops: FloatOps) -> Int:
    c = binade + (grid.shift << grid.carrier.mantissa_bits)
    if rounding == "nearest_even":
        return ops.difference(ops.sum(a, c), c)
    beyond = a | 1  # no tie and no multiple of the unit, and between the same two of these as `a`
    if rounding == "nearest_away":
        return ops.difference(ops.sum(beyond, c), c)
    t = ops.larger(ops.sum(beyond, c - 1), c)  # the number before c is half a unit below it
    r = ops.difference(t, c)
    if rounding == "toward_zero":
        return r
    inexact = ops.less(r, a)
    if rounding == "to_odd":
        return ops.difference(ops.choose(inexact, t | 1, t), c)
    negative = ops.less(code, 0)
    return ops.difference(ops.choose(inexact & (~negative if rounding == "up" else negative), t + 1, t), c)


def _stochastic(a: Int, binade: Int, grid: Grid, rounding: str, bits: int, ops: FloatOps, word: Int) -> Int:
    m, bias = grid.carrier.mantissa_bits, grid.carrier.bias
    unit = binade - (grid.fmt.mantissa_bits << m)
    quotient = ops.truncated(ops.product(a, ((2 * bias + bits) << m) - unit))
    fraction = (word >> (grid.carrier.bits - bits)) & ((1 << bits) - 1)
    if rounding == "stochastic_b":
        fraction = fraction | 1  # half of the random integer's unit
    return ops.product(ops.code_of_integer((quotient + fraction) >> bits), unit)
