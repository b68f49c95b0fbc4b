"""The rounding algorithm: integer arithmetic on the bits of a carrier, written once for every executor.

The functions below use only Python's integer operators and a few helpers (`Ops`). So the same source runs on torch
tensors, on values of Inductor's intermediate language, and on plain ints. Integer operations alone decide every bit
(with one exact integer-to-float conversion, for formats that reach into the carrier's subnormals). A compiler's
contraction, unsafe-math and flush-to-zero flags therefore cannot change a result. `fpsim.rounding.float_forms` has
shorter forms for the modes and flags where these provably give the same bits.

Notation. The *carrier* (float32 or float64) holds the values; a *code* is its bit pattern read as an integer.
Codes of non-negative numbers are in the order of their values, and a carry out of the mantissa moves to the next
binade, so that rounding is "add, then mask". A *unit* is the difference between the codes of neighbouring values of
the format. A mask says for each element whether a condition holds. Docstrings of functions that return a mask name the
elements where it is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fpsim.formats import FloatFormat, split_rounding

FLOAT32 = FloatFormat(8, 23)
FLOAT64 = FloatFormat(11, 52)

Int = Any  #: an integer, or an array of integers of the carrier's width
Mask = Any  #: truth values, in a form that the executor chooses


class Ops(Protocol):
    """The helpers of an executor, besides ``+ - & | ^ ~ << >>`` on its integers and ``& | ~`` on its masks."""

    def clamp(self, a: Int, low: int | None, high: int | None) -> Int:
        """``a`` limited to ``low`` from below and to ``high`` from above (None: no bound)."""

    def larger(self, a: Int, b: Int) -> Int:
        """The larger of two integers."""

    def less(self, a: Int, bound: Int) -> Mask:
        """Where ``a < bound``; ``bound`` may be a plain int."""

    def choose(self, mask: Mask, a: Int, b: Int) -> Int:
        """``a`` where the mask is set, ``b`` elsewhere; ``a`` or ``b`` may be plain ints."""

    def code_of_integer(self, a: Int) -> Int:
        """The carrier's code of the integer ``a``, 0 <= a < 2**mantissa_bits; undefined for other integers."""


@dataclass(frozen=True)
class Grid:
    """The positions of a format's values among its carrier's codes: the constants of the functions below.

    If rounding needs the exponent of numbers that are subnormal in the carrier, codes are *extended*: the exponent
    field continues below 1, so that every number except zero has an implicit leading bit.
    """

    fmt: FloatFormat
    carrier: FloatFormat
    scaled: bool = False  # whether numbers are scaled before they are rounded: then codes are extended
    nan_code: int | None = None  # the carrier's code of a NaN result, as a signed integer; None: the usual one

    @cached_property
    def first_field(self) -> int:
        """The exponent field of the format's smallest normal in the carrier; below 1 if it is subnormal there."""
        return self.fmt.emin + self.carrier.bias

    @cached_property
    def extended(self) -> bool:
        """Whether codes are extended."""
        return self.scaled or self.first_field < 1 or (self.first_field == 1 and not self.fmt.subnormals)

    @cached_property
    def implicit(self) -> int:
        """The implicit leading bit. As a difference of codes it is one binade."""
        return 1 << self.carrier.mantissa_bits

    @cached_property
    def quantum_power(self) -> int:
        """The exponent of the carrier's quantum, ``log2`` of its smallest subnormal."""
        return self.carrier.emin - self.carrier.mantissa_bits

    @cached_property
    def extended_zero(self) -> int:
        """The extended code of zero: it is below the code of every other number, and `_unextend` maps it to 0."""
        return self.quantum_power << self.carrier.mantissa_bits

    @cached_property
    def zero(self) -> int:
        """The code of zero, extended if codes are."""
        return self.extended_zero if self.extended else 0

    def code_of(self, units: int) -> int:
        """The code of ``units * 2**-1074``, a number of the carrier; extended if codes are."""
        return self._code(units, None if self.extended else self.carrier.emin) if units else self.zero

    def plain_code_of(self, units: int) -> int:
        """The carrier's code of ``units * 2**-1074``, never extended."""
        return self._code(units, self.carrier.emin) if units else 0

    def _code(self, units: int, emin: int | None) -> int:
        exponent = units.bit_length() - 1 - 1074
        exponent = exponent if emin is None else max(exponent, emin)
        shift = exponent - self.carrier.mantissa_bits + 1074
        significand = units >> shift if shift > 0 else units << -shift
        return ((exponent + self.carrier.bias - 1) << self.carrier.mantissa_bits) + significand

    @cached_property
    def max(self) -> int:
        """The code of the format's largest finite value."""
        return self.code_of(self.fmt.max_units)

    @cached_property
    def plain_max(self) -> int:
        """The carrier's code of the format's largest finite value, never extended."""
        return self.plain_code_of(self.fmt.max_units)

    @cached_property
    def smallest(self) -> int:
        """The code of the format's smallest positive value."""
        return self.code_of(1 << (self.fmt.smallest_exponent + 1074))

    @cached_property
    def shift(self) -> int:
        """``log2`` of the unit of the format's normals: the number of the carrier's mantissa bits that they leave 0."""
        return self.carrier.mantissa_bits - self.fmt.mantissa_bits

    @cached_property
    def depth(self) -> int:
        """The number of binades of subnormals whose unit is larger than the unit of the format's normals."""
        if not self.fmt.subnormals:
            return 0
        return self.fmt.mantissa_bits if self.extended else min(self.fmt.mantissa_bits, self.first_field - 1)

    @cached_property
    def carries_to_infinity(self) -> bool:
        """Whether the code after the largest finite value is the carrier's infinity, in the format too."""
        return self.fmt.has_infinity and self.plain_max + (1 << self.shift) == self.carrier.max_code + 1

    @cached_property
    def tiny(self) -> bool:
        """Whether numbers below the smallest subnormal need a separate rule, because a unit exceeds a binade there."""
        quantum = self.fmt.emin - self.fmt.mantissa_bits
        return self.fmt.subnormals and (self.extended or quantum > self.carrier.emin)

    @cached_property
    def parity_offset(self) -> int:
        """The exclusive-or mask that turns the unit's bit into the parity of the format's code, if a unit is a binade.

        That bit is then the lowest bit of the carrier's exponent field. The mask makes it 1 for the format's code 1.
        """
        field_of_first_value = self.first_field - self.fmt.mantissa_bits
        return 0 if field_of_first_value % 2 == self.fmt.zero else self.implicit


def round_code(
    code: Int, grid: Grid, rounding: str, overflow: str, ops: Ops, word: Int = 0, scale: Int | None = None
) -> Int:
    """Round a number of the carrier to ``grid.fmt``.

    Args:
        code: the carrier's bits, as signed integers.
        grid: the format, and a carrier that has all its values.
        rounding: any rounding that `fpsim.formats.split_rounding` takes.
        overflow: one of `fpsim.formats.OVERFLOWS`, resolved for the format.
        ops: the executor.
        word: for stochastic rounding, integers of the carrier's width. The topmost bits are random, as many as
            ``rounding`` states. The other bits do not affect the result.
        scale: None, or if ``grid.scaled`` the codes of powers of two. The number is multiplied by the power before it
            is rounded, and the result is divided by it. The product is exact. The quotient is rounded to the carrier,
            ties to even. The power is the one that `fpsim.scaling.rules` computes for this magnitude or a larger one.

    Returns:
        The carrier's codes of the rounded numbers.
    """
    fmt, carrier = grid.fmt, grid.carrier
    rounding, random_bits = split_rounding(rounding)
    if random_bits:
        word = _random_fraction(word, rounding, random_bits, carrier)
    infinity = carrier.max_code + 1

    magnitude = code & (carrier.sign_code - 1)
    is_nan = ~ops.less(magnitude, infinity + 1)
    # Clamp large magnitudes: a signed sum that overflows is undefined in C++, and its compilers exploit that.
    nearest_overflows = overflow == "ovf_inf" and (rounding in ("nearest_even", "nearest_away") or random_bits > 0)
    binades: Int = 0
    if scale is None:
        exceeds = None if nearest_overflows else ~ops.less(magnitude, grid.plain_max + 1)
        a = ops.clamp(magnitude, None, infinity if nearest_overflows else grid.plain_max)
        if grid.extended:
            a = extend(a, grid, ops)
    else:
        binades = scale - (carrier.bias << carrier.mantissa_bits)  # as a difference of codes
        a = extend(ops.clamp(magnitude, 1, None), grid, ops) + binades
        a = ops.choose(ops.less(magnitude, 1), grid.zero, a)
        exceeds = None if nearest_overflows else ~ops.less(a, grid.max + 1)
        a = ops.clamp(a, None, infinity if nearest_overflows else grid.max)

    linear = (
        grid.tiny
        and bool(random_bits)
        and rounding != "stochastic_c"
        and random_bits < carrier.mantissa_bits + (rounding == "stochastic")
    )
    r = _round_magnitude(a, code, grid, rounding, ops, word, random_bits, linear)
    if nearest_overflows:
        overflows = None if scale is None and grid.carries_to_infinity else ~ops.less(r, grid.max + 1)
    else:
        overflows = becomes_infinity(magnitude, exceeds, code, grid, rounding, overflow, ops)
    smallest = grid.smallest
    if grid.tiny and not linear:
        if random_bits:
            becomes_zero = ops.less(a, smallest) & ~_randomly_up(a, grid, rounding, ops, word, random_bits)
        else:
            becomes_zero = _becomes_zero(a, code, grid, rounding, ops)
        r = ops.choose(becomes_zero, grid.zero, ops.clamp(r, smallest, None))
    elif not fmt.zero:
        r = ops.clamp(r, smallest, None)
    elif linear or not fmt.subnormals:
        r = ops.choose(ops.less(r, smallest), grid.zero, r)
    is_zero: Mask = None
    if scale is not None:
        is_zero = ops.less(r, grid.zero + 1)
        r = ops.choose(is_zero, 0, _unextend_rounded(ops.clamp(r, grid.smallest, None) - binades, grid, ops))
    elif grid.extended:
        r = _unextend(r, grid, ops)
    if overflows is not None and fmt.has_infinity:
        r = ops.choose(overflows, infinity, r)
    elif overflows is not None:
        is_nan = is_nan | overflows

    if fmt.has_negative_zero:
        r = r | (code ^ magnitude)
    elif fmt.signed:
        r = r | ((code ^ magnitude) & -r)  # -r has the sign bit unless r is 0
    else:
        negative = ops.less(code, 0)
        if fmt.zero:
            below = negative & ~(ops.less(r, 1) if is_zero is None else is_zero)
        else:
            below = negative | ops.less(magnitude, 1)
        lowest: Int = 0
        if not fmt.zero and scale is None:
            lowest = grid.plain_code_of(1 << (fmt.emin + 1074))
        elif not fmt.zero:
            lowest = _unextend_rounded(grid.smallest - binades, grid, ops)
        r = ops.choose(below, lowest, r)
        if overflow == "ovf_inf" and fmt.has_nan:
            is_nan = is_nan | below
        elif overflow == "sat_propagate" and fmt.has_nan:
            is_nan = is_nan | (negative & ~ops.less(magnitude, infinity))
    nan_code = carrier.nan_code if grid.nan_code is None else grid.nan_code
    return ops.choose(is_nan, nan_code if fmt.has_nan else grid.plain_max, r)


def becomes_infinity(
    magnitude: Int, exceeds: Mask, code: Int, grid: Grid, rounding: str, overflow: str, ops: Ops
) -> Mask | None:
    """Numbers that become infinity, or NaN if the format has none, in modes where rounding does not produce it.

    ``exceeds`` are the numbers above the format's largest finite value. The result is None if there are none. For NaNs
    it is undefined.
    """
    if overflow == "sat_finite":
        return None
    is_infinity = ~ops.less(magnitude, grid.carrier.max_code + 1)
    if overflow == "sat_propagate" or rounding in ("toward_zero", "to_odd"):
        return is_infinity
    return is_infinity | (exceeds & (~ops.less(code, 0) if rounding == "up" else ops.less(code, 0)))


def _round_magnitude(
    a: Int,
    code: Int,
    grid: Grid,
    rounding: str,
    ops: Ops,
    word: Int = 0,
    random_bits: int = 0,
    linear: bool = False,
) -> Int:
    """``a`` rounded to the format's precision, without an upper bound of the exponent.

    If the format has no subnormals, the exponent has no lower bound either. If it has, the results for numbers below
    the smallest subnormal are undefined, but not above the smallest subnormal: `_becomes_zero` and `_randomly_up`
    decide these numbers. If ``linear`` is set, the result for such a number is the smallest subnormal if it is rounded
    up, and an undefined number below the smallest subnormal if it becomes zero.
    """
    shift: Int = grid.shift
    if grid.depth:
        field = ops.clamp(a >> grid.carrier.mantissa_bits, grid.first_field - grid.depth, grid.first_field)
        shift = (grid.first_field + grid.shift) - field
    if linear:
        a = _linear_below(a, grid, ops)
    kept_bits = -1 << shift
    dropped_bits = ~kept_bits

    if rounding == "toward_zero":
        return a & kept_bits
    if random_bits:
        if rounding == "stochastic_c":
            surplus = shift - random_bits
            a = _nearest_multiple(a, ops.clamp(surplus, 0, None) if grid.depth else max(surplus, 0))
        spare = grid.carrier.bits - shift
        fraction = word >> spare if grid.shift else (word >> 1) >> (spare - 1)  # a shift by all bits is undefined
        return (a + (fraction & dropped_bits)) & kept_bits
    addend: Int
    if rounding == "nearest_away":
        addend = (dropped_bits >> 1) + (dropped_bits & 1)
    elif rounding == "up":
        addend = ops.choose(ops.less(code, 0), 0, dropped_bits)
    elif rounding == "down":
        addend = ops.choose(ops.less(code, 0), dropped_bits, 0)
    else:
        even = ((a ^ ~grid.parity_offset) >> shift) & 1  # 1 if truncation gives an even code
        if rounding == "to_odd":
            addend = -even & dropped_bits
        elif grid.shift:
            return (a - (kept_bits >> 1) - even) & kept_bits  # a tie goes up if the result is even
        else:  # without dropped bits the addend is 0
            addend = ((dropped_bits + 1) >> 1) - (even & dropped_bits)
    return (a + addend) & kept_bits


def _becomes_zero(a: Int, code: Int, grid: Grid, rounding: str, ops: Ops) -> Mask:
    """Numbers that become zero, if a unit exceeds a binade below the format's smallest subnormal."""
    smallest = grid.smallest
    half = smallest - grid.implicit
    if rounding == "nearest_even":
        return ops.less(a, half + 1)  # the tie goes to zero, because its code is even
    if rounding == "nearest_away":
        return ops.less(a, half)
    if rounding == "toward_zero":
        return ops.less(a, smallest)
    if rounding == "to_odd":
        return ops.less(a, grid.zero + 1)
    toward_zero = ops.less(code, 0) if rounding == "up" else ~ops.less(code, 0)
    return ops.less(a, grid.zero + 1) | (toward_zero & ops.less(a, smallest))


def _random_fraction(word: Int, rounding: str, random_bits: int, carrier: FloatFormat) -> Int:
    """The random number in [0, 1) to add to the fraction of a unit, as the bits after its binary point."""
    if rounding != "stochastic" or random_bits not in (
        carrier.mantissa_bits,
        carrier.bits,
    ):  # otherwise no other bit affects the result
        word = word & (-1 << (carrier.bits - random_bits))
    return word | (1 << (carrier.bits - random_bits - 1)) if rounding == "stochastic_b" else word


def _nearest_multiple(a: Int, shift: Int) -> Int:
    """``a`` rounded to a multiple of ``1 << shift``, ties to even; unchanged where ``shift`` is 0."""
    dropped_bits = ~(-1 << shift)
    even = (~a >> shift) & 1
    return (a + (((dropped_bits + 1) >> 1) - (even & dropped_bits))) & ~dropped_bits


def _significand_below(a: Int, grid: Grid, ops: Ops) -> tuple[Int, Int]:
    """Numbers below the smallest subnormal, as fractions of the smallest subnormal; undefined for other numbers.

    Returns:
        The significand, with its leading bit, and the number of binades by which it is below the binade just below
        the smallest subnormal. The fraction is ``significand * 2**-(mantissa_bits + 1 + binades)``.
    """
    m = grid.carrier.mantissa_bits
    smallest_field = grid.smallest >> m
    significand = (a & (grid.implicit - 1)) + grid.implicit
    if (
        not grid.extended and smallest_field <= grid.carrier.bits + 1
    ):  # otherwise the carrier's subnormals are too small to matter
        significand = ops.choose(ops.less(a, grid.implicit), a << 1, significand)
    return significand, (smallest_field - 1) - (a >> m)


def _linear_below(a: Int, grid: Grid, ops: Ops) -> Int:
    """``a``, with the numbers below the smallest subnormal spread linearly over the codes of the binade below it.

    So the distance of two codes there is proportional to the distance of their numbers. Bits of a number that do not
    fit into its code are dropped.
    """
    smallest = grid.smallest
    significand, binades = _significand_below(a, grid, ops)
    spread = (significand >> ops.clamp(binades + 1, 0, grid.carrier.bits - 1)) + (smallest - grid.implicit)
    return ops.larger(a, spread)  # from the smallest subnormal on, `spread` does not exceed the code


def _randomly_up(a: Int, grid: Grid, rounding: str, ops: Ops, word: Int, random_bits: int) -> Mask:
    """Numbers below the smallest subnormal that stochastic rounding rounds up to it, computed from all their bits."""
    bits, m = grid.carrier.bits, grid.carrier.mantissa_bits
    significand, binades = _significand_below(a, grid, ops)
    if rounding == "stochastic_c":
        surplus = ops.clamp(binades, 0, None) + (m + 1 - random_bits)
        dropped = ops.clamp(surplus, 0, m + 2)
        fraction = (_nearest_multiple(significand, dropped) >> dropped) << ops.clamp(-surplus, 0, bits - 2 - m)
        drawn = (word >> (bits - random_bits)) & ((1 << random_bits) - 1)
        return ~ops.less(fraction + drawn, 1 << random_bits)
    fraction = (significand << (bits - m - 2)) >> ops.clamp(binades - 1, 0, bits - 1)
    fraction = ops.choose(ops.less(binades, 1), fraction << 1, fraction)
    # As unsigned integers, fraction + word overflows exactly if word > ~fraction.
    return ops.less(fraction ^ (grid.carrier.sign_code - 1), word ^ -grid.carrier.sign_code)


def encode_code(code: Int, grid: Grid, ops: Ops) -> Int:
    """The format's code of a value that the carrier holds with ``code``, as a signed integer of the carrier's width."""
    fmt, m = grid.fmt, grid.carrier.mantissa_bits
    infinity = grid.carrier.max_code + 1
    magnitude = code & (grid.carrier.sign_code - 1)
    a = extend(magnitude, grid, ops)

    field = (a >> m) - grid.first_field  # 0 for the smallest normals
    significand = (a & (grid.implicit - 1)) + grid.implicit
    depth = ops.clamp(-field, 0, m + 1 - grid.shift)
    r = (ops.clamp(field, 0, None) << fmt.mantissa_bits) + (significand >> (depth + grid.shift))
    if not fmt.zero:
        r = r - (1 << fmt.mantissa_bits)
    if fmt.infinity_code is not None:
        r = ops.choose(ops.less(magnitude, infinity), r, fmt.infinity_code)
    if fmt.signed:
        r = ops.choose(ops.less(code, 0), r | _as_signed(fmt.sign_code, grid), r)
    if fmt.nan_code is not None:
        r = ops.choose(ops.less(magnitude, infinity + 1), r, _as_signed(fmt.nan_code, grid))
    return r


def decode_code(code: Int, grid: Grid, ops: Ops) -> Int:
    """The carrier's code of the value with the format's ``code``, a signed integer of the carrier's width."""
    fmt, m = grid.fmt, grid.carrier.mantissa_bits
    magnitude = code & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
    field, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)

    r = ((field + (grid.first_field - int(fmt.zero))) << m) + (mantissa << grid.shift)  # extended, as if normal
    if fmt.zero:
        subnormal: Int = grid.extended_zero
        if fmt.subnormals:
            scaled = ops.code_of_integer(mantissa) + ((fmt.emin - fmt.mantissa_bits) << m)
            subnormal = ops.choose(ops.less(mantissa, 1), grid.extended_zero, scaled)
        r = ops.choose(ops.less(field, 1), subnormal, r)
    r = _unextend(r, grid, ops)
    if fmt.infinity_code is not None:
        r = ops.choose(ops.less(magnitude, fmt.infinity_code), r, grid.carrier.max_code + 1)
    if fmt.signed:
        negative = ops.less(code << (grid.carrier.bits - fmt.bits), 0)
        r = ops.choose(negative, r | -grid.carrier.sign_code, r)
        if fmt.nan_is_negative_zero:
            r = ops.choose(negative & ops.less(magnitude, 1), grid.carrier.nan_code, r)
    if fmt.has_nan and not fmt.nan_is_negative_zero:
        r = ops.choose(ops.less(magnitude, fmt.max_code + fmt.has_infinity + 1), r, grid.carrier.nan_code)
    return r


def _as_signed(code: int, grid: Grid) -> int:
    """The signed integer of the carrier's width whose bits are ``code``."""
    return code - 2 * grid.carrier.sign_code if code >= grid.carrier.sign_code else code


def extend(a: Int, grid: Grid, ops: Ops) -> Int:
    """The extended codes of plain codes ``a >= 0``."""
    extended = ops.code_of_integer(a) + grid.extended_zero  # gives `extended_zero` for zero
    return ops.choose(ops.less(a, grid.implicit), extended, a)


def _unextend(r: Int, grid: Grid, ops: Ops) -> Int:
    """The plain codes of extended codes ``r``, for numbers that the carrier has."""
    m = grid.carrier.mantissa_bits
    significand = (r & (grid.implicit - 1)) + grid.implicit
    shift = ops.clamp(1 - (r >> m), 0, m + 1)
    return ops.choose(ops.less(r, grid.implicit), significand >> shift, r)


def _unextend_rounded(r: Int, grid: Grid, ops: Ops) -> Int:
    """The plain codes of extended codes ``r``, rounded to numbers of the carrier: to nearest, ties to even."""
    m = grid.carrier.mantissa_bits
    significand = (r & (grid.implicit - 1)) + grid.implicit
    shift = ops.clamp(1 - (r >> m), 1, m + 2)  # from `implicit` on, where it would be below 1, it has no effect
    even = (~significand >> shift) & 1
    return ops.choose(ops.less(r, grid.implicit), (significand - (-1 << (shift - 1)) - even) >> shift, r)
