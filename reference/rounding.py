"""Rounding an exact number into a format, written as the standards define it.

In the order of IEEE 754-2019 clauses 4.3 and 7.4 and of IEEE P3109: round to the precision of the format as if
exponents had no upper bound, then check whether the result is in range. Every step works on fractions and integers.
"""

from __future__ import annotations

import builtins
import math
import reprlib
from fractions import Fraction
from typing import NamedTuple

from fpsim.formats import FloatFormat, Overflow, parse_format, resolve_overflow, split_rounding

from . import substitutes
from .decoding import largest, smallest
from .values import (
    INFINITIES,
    NAN,
    Number,
    Value,
    as_value,
    floor_log2,
    is_negative,
    magnitude,
    scale_b,
    with_sign,
)


def round(
    value: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``value`` rounded to a value of ``format``.

    1. Round to the precision of the format, with an exponent that has no upper bound. The least quantum is that of the
       subnormals; in a format without subnormals there is no least quantum.
    2. In a format without subnormals, flush a result below the smallest normal number to zero, in every direction.
       (In a format without zero, raise it to the smallest number instead.)
    3. Check the range. `resolve_overflow` says what stands for a result beyond the largest finite value, or below zero
       in an unsigned format.

    ``nearest_even`` rounds ties to the neighbour whose code is even. ``to_odd`` rounds to the neighbour whose code is
    odd. In formats without mantissa bits, the parity of the code is that of the exponent field. (ml_dtypes and torch
    round ties to ``e8m0fnu`` up: that is ``nearest_away``.)

    A zero result keeps the sign of ``value`` where the format has -0. NaN stays NaN; in a format without NaN it
    becomes the largest finite value, as in NVIDIA's PTX ``cvt`` to such formats (OCP MX 1.0 leaves this open).

    Arguments:
        value: an int, Fraction, float (taken exactly) or `Special`.
        format: a name or a `FloatFormat`.
        rounding: one of `fpsim.formats.ROUNDINGS`, or a stochastic one (`fpsim.formats.split_rounding`).
        overflow: one of `fpsim.formats.OVERFLOWS`; None takes the default of the format.
        random: the random number of stochastic rounding, an int with 0 <= random < 2**random_bits. Other roundings take
            none.

    Raises:
        ValueError: no such format, rounding or overflow mode, or an overflow mode that needs an infinity or a NaN
            where the format has neither; ``random`` missing, out of range, or given without stochastic rounding.
        TypeError: ``value``, ``format`` or ``random`` is none of the above.

    Source: IEEE 754-2019 clauses 4.3 (directions), 7.4 (overflow) and 7.5 (underflow); IEEE P3109 (saturation
    modes, parity of the code); S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008) (``to_odd``).

    >>> round(Fraction(1, 3), "e4m3fn")
    Fraction(11, 32)
    >>> round(70000, "fp16"), round(70000, "fp16", "toward_zero")
    (INFINITY, Fraction(65504, 1))
    """
    fmt = parse_format(format)
    name, draw = drawn(rounding, random)
    mode = resolve_overflow(fmt, overflow)
    value = as_value(value)
    if value is NAN:
        return substitutes.for_nan(fmt)
    negative = is_negative(value)
    if value in INFINITIES:
        return substitutes.for_infinity(fmt, mode, negative=negative)
    exact = magnitude(value)
    if exact == 0:
        return substitutes.for_zero(fmt, mode, negative=negative)
    return into_range(flush(to_precision(exact, fmt, name, negative, draw), fmt), fmt, name, mode, negative)


class Draw(NamedTuple):
    """The random number of one stochastic rounding, an integer of ``bits`` bits."""

    number: int
    bits: int

    def takes_above(self, fraction: Fraction, rounding: str) -> bool:
        """Whether a number at ``fraction`` of the way from the neighbour below rounds to the neighbour above."""
        scaled, full = fraction * (1 << self.bits), 1 << self.bits
        match rounding:
            case "stochastic":
                return math.floor(scaled) + self.number >= full
            case "stochastic_b":
                return scaled + self.number + Fraction(1, 2) >= full
            case "stochastic_c":
                return builtins.round(scaled) + self.number >= full  # of a Fraction: ties to even
        raise ValueError(f"{rounding!r} is not stochastic")


def drawn(rounding: str, random: int | None) -> tuple[str, Draw | None]:
    """The name of a rounding, and the `Draw` of a stochastic one; the errors are those of `round`."""
    name, bits = split_rounding(rounding)
    if random is not None and not isinstance(random, int):
        raise TypeError(f"random is an int, got {reprlib.repr(random)} of {type(random)}: use int(x)")
    if not bits:
        if random is not None:
            raise ValueError(f"random={random} has no meaning with rounding={rounding!r}: use 'stochastic:BITS'")
        return name, None
    if random is None or not 0 <= random < 1 << bits:
        raise ValueError(f"rounding={rounding!r} needs a random number from 0 to {(1 << bits) - 1}, got {random}")
    return name, Draw(random, bits)


def to_precision(
    exact: Fraction, fmt: FloatFormat, rounding: str, negative: bool, draw: Draw | None = None
) -> Fraction:
    """Step 1: the magnitude ``exact`` > 0 rounded to the precision of ``fmt``, no upper bound on the exponent."""
    exponent = floor_log2(exact)
    if fmt.subnormals:
        exponent = max(exponent, fmt.emin)
    quantum = scale_b(1, exponent - fmt.mantissa_bits)
    significand, rest = divmod(exact, quantum)
    if rest == 0:
        return exact
    # The code of the neighbour below. The neighbour above has the next code, also across binades. Only the parity of
    # the code matters, so it may be negative or beyond the codes of the format.
    code = ((exponent + fmt.bias) << fmt.mantissa_bits) + significand - (1 << fmt.mantissa_bits)
    return (significand + takes_above(rest, quantum, code % 2 == 1, rounding, negative, draw)) * quantum


def takes_above(rest: Fraction, quantum: Fraction, odd: bool, rounding: str, negative: bool, draw: Draw | None) -> bool:
    """Whether a magnitude between two neighbours rounds to the one above.

    Arguments:
        rest: the distance from the neighbour below, above 0 and below ``quantum``.
        quantum: the distance of the two neighbours.
        odd: whether the code of the neighbour below is odd.
        rounding, draw: as `drawn` returns them.
        negative: whether the number itself is negative.
    """
    match rounding:
        case "nearest_even":
            return 2 * rest > quantum or (2 * rest == quantum and odd)
        case "nearest_away":
            return 2 * rest >= quantum
        case "toward_zero":
            return False
        case "up":
            return not negative
        case "down":
            return negative
        case "to_odd":
            return not odd
        case _:
            if draw is None:
                raise ValueError(f"rounding {rounding!r} needs a random number")
            return draw.takes_above(rest / quantum, rounding)


def flush(rounded: Fraction, fmt: FloatFormat) -> Fraction:
    """Step 2: in a format without subnormals, a magnitude below the smallest normal number becomes the smallest."""
    if not fmt.subnormals and rounded < scale_b(1, fmt.emin):
        return smallest(fmt)  # zero, except in a format without it
    return rounded


def into_range(rounded: Fraction, fmt: FloatFormat, rounding: str, overflow: Overflow, negative: bool) -> Value:
    """Step 3: the magnitude ``rounded`` with its sign, or the value that the format has in its place."""
    if rounded == 0:
        return substitutes.for_zero(fmt, overflow, negative=negative)
    if negative and not fmt.signed:
        return substitutes.for_negative(fmt, overflow)
    if rounded > largest(fmt):
        return substitutes.for_overflow(fmt, rounding, overflow, negative=negative)
    return with_sign(rounded, negative)
