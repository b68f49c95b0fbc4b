"""The rounding algorithm: integer arithmetic on the bits of a carrier, written once for every executor.

The functions below know only integers with Python's operators and a few helpers (`Ops`), so the same text runs
on torch tensors, on values of Inductor's intermediate language, and on plain ints. Integer operations alone
decide every bit (with one exact integer-to-float conversion, for formats that reach into the carrier's
subnormals): a compiler's contraction, unsafe-math and flush-to-zero flags cannot change a result.

Notation. The *carrier* (float32 or float64) holds the values; a *code* is its bit pattern read as an integer.
Codes of non-negative numbers are in the order of their values, and a carry out of the mantissa moves to the next
binade by itself, so that rounding is "add, then mask". A *unit* is the code difference between neighbouring
values of the format. Truth values are masks and choices are made with them: on CPUs a comparison with its
select costs several times as much as the three integer operations that replace it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fpsim.formats import FloatFormat

FLOAT32 = FloatFormat(8, 23)
FLOAT64 = FloatFormat(11, 52)

Int = Any  #: an integer, or an array of integers of the carrier's width
Mask = Any  #: truth values as integers: -1 (all bits set) or 0


class Ops(Protocol):
    """What an executor supplies besides the operators ``+ - & | ^ ~ << >>`` on its integers."""

    def clamp(self, a: Int, low: int | None, high: int | None) -> Int:
        """``a``, but not below ``low`` and not above ``high`` (None: no bound)."""

    def code_of_integer(self, a: Int) -> Int:
        """The carrier's code of the number ``a``, an integer with 0 <= a < 2**mantissa_bits (others: anything)."""


@dataclass(frozen=True)
class Grid:
    """Where a format's values lie among its carrier's codes: the constants of the functions below.

    Where rounding needs the exponent of numbers that are subnormal in the carrier, codes are *extended*: the
    exponent field goes on below 1, so that every number but zero has its leading bit implicit.
    """

    fmt: FloatFormat
    carrier: FloatFormat

    @cached_property
    def first_field(self) -> int:
        """The carrier's exponent field of the format's smallest normal; below 1 if that is subnormal there."""
        return self.fmt.emin + self.carrier.bias

    @cached_property
    def extended(self) -> bool:
        """Whether codes are extended."""
        return self.first_field < 1 or (self.first_field == 1 and not self.fmt.subnormals)

    @cached_property
    def implicit(self) -> int:
        """The implicit leading bit: one binade, as a difference of codes."""
        return 1 << self.carrier.mantissa_bits

    @cached_property
    def quantum_power(self) -> int:
        """The exponent of the carrier's quantum, ``log2`` of its smallest subnormal."""
        return self.carrier.emin - self.carrier.mantissa_bits

    @cached_property
    def extended_zero(self) -> int:
        """What stands for zero among extended codes: below every number, and where `_unextend` gives 0."""
        return self.quantum_power << self.carrier.mantissa_bits

    @cached_property
    def zero(self) -> int:
        """The (extended) code of zero."""
        return self.extended_zero if self.extended else 0

    def code_of(self, value: float) -> int:
        """The (extended) code of ``value >= 0``, a number of the carrier."""
        return self.zero if value == 0 else self._code(value, None if self.extended else self.carrier.emin)

    def plain_code_of(self, value: float) -> int:
        """The carrier's own code of ``value >= 0``."""
        return 0 if value == 0 else self._code(value, self.carrier.emin)

    def _code(self, value: float, emin: int | None) -> int:
        exponent = math.frexp(value)[1] - 1
        exponent = exponent if emin is None else max(exponent, emin)
        significand = int(math.ldexp(value, self.carrier.mantissa_bits - exponent))
        return ((exponent + self.carrier.bias - 1) << self.carrier.mantissa_bits) + significand

    @cached_property
    def max(self) -> int:
        """The code of the format's largest finite value."""
        return self.code_of(self.fmt.max)

    @cached_property
    def shift(self) -> int:
        """``log2`` of the unit of the format's normals: the mantissa bits that they leave empty."""
        return self.carrier.mantissa_bits - self.fmt.mantissa_bits

    @cached_property
    def depth(self) -> int:
        """How many binades of subnormals the format has with larger units than its normals have."""
        if not self.fmt.subnormals:
            return 0
        return self.fmt.mantissa_bits if self.extended else min(self.fmt.mantissa_bits, self.first_field - 1)

    @cached_property
    def tiny(self) -> bool:
        """Whether numbers below the smallest subnormal need a rule of their own: there a unit is over a binade."""
        quantum = self.fmt.emin - self.fmt.mantissa_bits
        return self.fmt.subnormals and (self.extended or quantum > self.carrier.emin)

    @cached_property
    def parity_offset(self) -> int:
        """Added to a code, makes the bit at the unit the parity of the format's code where a unit is a binade.

        There the bit is the lowest of the carrier's exponent field. It must be 1 for the format's code 1.
        """
        field_of_first_value = self.first_field - self.fmt.mantissa_bits
        return 0 if field_of_first_value % 2 == self.fmt.zero else self.implicit


def round_code(code: Int, grid: Grid, rounding: str, overflow: str, ops: Ops) -> Int:
    """The carrier's code of the number ``code`` rounded to ``grid.fmt``.

    Args:
        code: the carrier's bits, as signed integers.
        grid: the format, and a carrier of which it is a subset.
        rounding: one of `fpsim.formats.ROUNDINGS`.
        overflow: one of `fpsim.formats.OVERFLOWS`, resolved for the format.
        ops: the executor.
    """
    fmt, carrier = grid.fmt, grid.carrier
    infinity = carrier.max_code + 1
    magnitude_bits = carrier.sign_code - 1

    magnitude = code & magnitude_bits
    is_nan = _greater(magnitude, infinity, grid, ops)
    a = ops.clamp(magnitude, None, infinity)  # keeps the sums below from wrapping
    if grid.extended:
        a = _extend(a, grid, ops)

    r = _round_magnitude(a, code, grid, rounding, ops)
    becomes_infinity = _becomes_infinity(a, r, code, grid, rounding, overflow, ops)
    smallest = grid.code_of(fmt.smallest_subnormal)
    if not fmt.zero or grid.tiny:
        r = ops.clamp(r, smallest, grid.max)
    else:
        r = ops.clamp(r, None, grid.max)
    if grid.tiny:
        r = _choose(_survives(a, code, grid, rounding, ops), r, grid.zero)
    elif fmt.zero and not fmt.subnormals:
        r = _choose(_less(r, smallest, grid, ops), grid.zero, r)
    if grid.extended:
        r = _unextend(r, grid, ops)
    if becomes_infinity is not None and fmt.has_infinity:
        r = _choose(becomes_infinity, infinity, r)
    elif becomes_infinity is not None:
        is_nan = is_nan | becomes_infinity

    if fmt.signed:
        sign = code & ~magnitude_bits
        if not fmt.has_negative_zero:
            sign = sign & -r  # -r has the sign bit unless r is 0
        if not fmt.has_nan:
            sign = sign & ~is_nan
        r = r | sign
    else:
        below = _negative(code, grid)
        below = below & _greater(r, 0, grid, ops) if fmt.zero else below | ~_greater(magnitude, 0, grid, ops)
        r = _choose(below, 0 if fmt.zero else grid.plain_code_of(fmt.smallest_normal), r)
        if overflow == "ovf_inf":
            is_nan = is_nan | below
        elif overflow == "sat_propagate":
            is_nan = is_nan | (_negative(code, grid) & ~_less(magnitude, infinity, grid, ops))
    if not fmt.has_nan:  # then NaN becomes the largest finite value, as it has already where overflow saturates
        return r if overflow == "sat_finite" and fmt.signed else _choose(is_nan, grid.plain_code_of(fmt.max), r)
    return r | (is_nan & carrier.nan_code)


def _negative(a: Int, grid: Grid) -> Mask:
    """The mask of ``a < 0``."""
    return a >> (grid.carrier.bits - 1)


def _less(a: Int, b: int, grid: Grid, ops: Ops) -> Mask:
    """The mask of ``a < b``."""
    if grid.extended:  # the difference might overflow: clamp first
        return ops.clamp(a, b - 1, b) - b
    return _negative(a - b, grid)


def _greater(a: Int, b: int, grid: Grid, ops: Ops) -> Mask:
    """The mask of ``a > b``."""
    if grid.extended:
        return b - ops.clamp(a, b, b + 1)
    return _negative(b - a, grid)


def _choose(mask: Mask, a: Int, b: Int) -> Int:
    """``a`` where the mask is set, ``b`` elsewhere."""
    if isinstance(a, int) and a == 0:
        return b & ~mask
    if isinstance(b, int) and b == 0:
        return a & mask
    return b ^ ((a ^ b) & mask)


def _becomes_infinity(
    a: Int, r: Int, code: Int, grid: Grid, rounding: str, overflow: str, ops: Ops
) -> Mask | None:
    """Which results are an infinity (or the NaN that stands for it); None if the modes make none."""
    infinity = grid.carrier.max_code + 1
    if overflow == "sat_finite":
        return None
    was_infinity = ~_less(a, infinity, grid, ops)
    if overflow == "sat_propagate" or rounding in ("toward_zero", "to_odd"):
        return was_infinity
    overflows = _greater(r, grid.max, grid, ops)
    if rounding == "up":
        return was_infinity | (overflows & ~_negative(code, grid))
    if rounding == "down":
        return was_infinity | (overflows & _negative(code, grid))
    return overflows


def _round_magnitude(a: Int, code: Int, grid: Grid, rounding: str, ops: Ops) -> Int:
    """``a`` rounded to the format's precision, its exponent unbounded above, and below unless it has subnormals.

    Numbers below the smallest subnormal become anything not above it: see `_survives`.
    """
    shift: Int = grid.shift
    if grid.depth:
        field = ops.clamp(a >> grid.carrier.mantissa_bits, grid.first_field - grid.depth, grid.first_field)
        shift = (grid.first_field + grid.shift) - field
    kept_bits = -1 << shift
    dropped_bits = ~kept_bits

    if rounding == "toward_zero":
        return a & kept_bits
    addend: Int
    if rounding == "nearest_away":
        addend = (dropped_bits >> 1) + (dropped_bits & 1)
    elif rounding == "up":
        addend = dropped_bits & ~_negative(code, grid)
    elif rounding == "down":
        addend = dropped_bits & _negative(code, grid)
    else:
        parity = ((a + grid.parity_offset if grid.parity_offset else a) >> shift) & 1
        if rounding == "to_odd":
            addend = (parity - 1) & dropped_bits  # upwards from an even truncation
        else:
            addend = (dropped_bits >> 1) + (parity & dropped_bits if grid.shift == 0 else parity)
    return (a + addend) & kept_bits


def _survives(a: Int, code: Int, grid: Grid, rounding: str, ops: Ops) -> Mask:
    """Which numbers do not become zero, where the format's smallest subnormal is a unit of over a binade."""
    smallest = grid.code_of(grid.fmt.smallest_subnormal)
    half = smallest - grid.implicit
    if rounding == "nearest_even":
        return _greater(a, half, grid, ops)  # the tie goes to zero, whose code is even
    if rounding == "nearest_away":
        return ~_less(a, half, grid, ops)
    if rounding == "toward_zero":
        return ~_less(a, smallest, grid, ops)
    if rounding == "to_odd":
        return _greater(a, grid.zero, grid, ops)
    away = ~_negative(code, grid) if rounding == "up" else _negative(code, grid)
    return ~_less(a, smallest, grid, ops) | (away & _greater(a, grid.zero, grid, ops))


def encode_code(code: Int, grid: Grid, ops: Ops) -> Int:
    """The format's code, as a signed integer of the carrier's width, of a value of the format in the carrier."""
    fmt, m = grid.fmt, grid.carrier.mantissa_bits
    infinity = grid.carrier.max_code + 1
    magnitude = code & (grid.carrier.sign_code - 1)
    a = _extend(magnitude, grid, ops)

    field = (a >> m) - grid.first_field  # 0 for the smallest normals
    significand = (a & (grid.implicit - 1)) + grid.implicit
    depth = ops.clamp(-field, 0, m + 1 - grid.shift)
    r = (ops.clamp(field, 0, None) << fmt.mantissa_bits) + (significand >> (depth + grid.shift))
    if not fmt.zero:
        r = r - (1 << fmt.mantissa_bits)
    if fmt.infinity_code is not None:
        r = _choose(~_less(magnitude, infinity, grid, ops), fmt.infinity_code, r)
    if fmt.signed:
        r = r | (_negative(code, grid) & _as_signed(fmt.sign_code, grid))
    if fmt.nan_code is not None:
        r = _choose(_greater(magnitude, infinity, grid, ops), _as_signed(fmt.nan_code, grid), r)
    return r


def decode_code(code: Int, grid: Grid, ops: Ops) -> Int:
    """The carrier's code of the value of a format's code, given as a signed integer of the carrier's width."""
    fmt, m = grid.fmt, grid.carrier.mantissa_bits
    magnitude = code & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
    field, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)

    r = ((field + (grid.first_field - int(fmt.zero))) << m) + (mantissa << grid.shift)  # extended, all normal
    if fmt.zero:
        subnormal: Int = grid.extended_zero
        if fmt.subnormals:
            scaled = ops.code_of_integer(mantissa) + ((fmt.emin - fmt.mantissa_bits) << m)
            subnormal = _choose(_greater(mantissa, 0, grid, ops), scaled, grid.extended_zero)
        r = _choose(_greater(field, 0, grid, ops), r, subnormal)
    r = _unextend(r, grid, ops)
    if fmt.infinity_code is not None:
        r = _choose(~_less(magnitude, fmt.infinity_code, grid, ops), grid.carrier.max_code + 1, r)
    if fmt.signed:
        negative = _negative(code << (grid.carrier.bits - fmt.bits), grid)
        if fmt.specials == "fnuz":
            r = _choose(negative & ~_greater(magnitude, 0, grid, ops), grid.carrier.nan_code, r)
        r = r | (negative & -grid.carrier.sign_code)
    if fmt.has_nan and fmt.specials != "fnuz":
        r = r | (_greater(magnitude, fmt.max_code + fmt.has_infinity, grid, ops) & grid.carrier.nan_code)
    return r


def _as_signed(code: int, grid: Grid) -> int:
    """The signed integer of the carrier's width whose bits are ``code``."""
    return code - 2 * grid.carrier.sign_code if code >= grid.carrier.sign_code else code


def _extend(a: Int, grid: Grid, ops: Ops) -> Int:
    """The extended codes of plain codes ``a >= 0``."""
    extended = ops.code_of_integer(a) + grid.extended_zero  # of zero: `extended_zero`
    return _choose(_less(a, grid.implicit, grid, ops), extended, a)


def _unextend(r: Int, grid: Grid, ops: Ops) -> Int:
    """The plain codes of extended codes of numbers that the carrier has."""
    m = grid.carrier.mantissa_bits
    significand = (r & (grid.implicit - 1)) + grid.implicit
    shift = ops.clamp(1 - (r >> m), 0, m + 1)
    return _choose(_less(r, grid.implicit, grid, ops), significand >> shift, r)
