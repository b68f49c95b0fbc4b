"""Rounding to evenly spaced numbers: the integers of N bits, and the elements of OCP MXINT8.

These formats have neither infinity nor NaN, and one zero, +0. They saturate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .rounding import drawn, takes_above
from .values import INFINITIES, NAN, Number, Value, as_value, is_negative, magnitude


@dataclass(frozen=True, slots=True)
class Integers:
    """The numbers ``n * unit`` for the integers n from ``least`` to ``greatest``. Their code is n.

    >>> Integers(-127, 127, Fraction(1, 64)).largest
    Fraction(127, 64)
    """

    least: int
    greatest: int
    unit: Fraction = Fraction(1)

    @property
    def largest(self) -> Fraction:
        """The largest number."""
        return self.greatest * self.unit

    @property
    def half_range(self) -> Fraction:
        """Half of the range: the `largest` number if the range is symmetric, 127.5 for -128 to 127."""
        return Fraction(self.greatest - self.least, 2) * self.unit


_NAMED = {"mxint8": "int8:unit=-6"}


def parse_integers(name: str) -> Integers:
    """The integers that ``name`` denotes.

    ``int2`` to ``int16`` are the N-bit integers without -2**(N - 1), so that the range is symmetric. ``int2:full`` to
    ``int16:full`` include it. ``uint2`` to ``uint16`` are 0 to 2**N - 1. ``int8:unit=-6`` is n * 2**-6 for the n of
    ``int8``. It is also called ``mxint8``: the element of OCP Microscaling Formats (MX) 1.0 section 5.3.4, without the
    code -128, whose use that leaves open.

    Raises:
        ValueError: ``name`` denotes none of them.

    >>> parse_integers("int4"), parse_integers("int4:full").least
    (Integers(least=-7, greatest=7, unit=Fraction(1, 1)), -8)
    """
    match = re.fullmatch(r"(u?)int([0-9]{1,2})(:full)?(?::unit=(-?[0-9]{1,3}))?", _NAMED.get(name, name))
    if not match or not 2 <= int(match[2]) <= 16 or (match[1] and match[3]):
        raise ValueError(
            f"unknown integers {name!r}: use int2 to int16, int2:full to int16:full, uint2 to uint16, or mxint8"
        )
    bits, unit = int(match[2]), Fraction(2) ** int(match[4] or 0)
    if match[1]:
        return Integers(0, 2**bits - 1, unit)
    return Integers(-(2 ** (bits - 1)) + (not match[3]), 2 ** (bits - 1) - 1, unit)


def round_integer(
    value: Number, integers: str | Integers, rounding: str = "nearest_even", *, random: int | None = None
) -> Value:
    """``value`` rounded to one of ``integers``: to a multiple of the unit, then into the range.

    A zero result is +0. An infinity becomes the end of the range on its side. NaN stays NaN.

    Arguments:
        value: an int, Fraction, float (taken exactly) or `Special`.
        integers: a name (`parse_integers`) or an `Integers`.
        rounding, random: as in `round`. The parity of a number is that of n.

    Raises:
        ValueError, TypeError: as `round` and `parse_integers`.

    >>> round_integer(2.5, "int8"), round_integer(-200, "int8"), round_integer(-200, "int8:full")
    (Fraction(2, 1), Fraction(-127, 1), Fraction(-128, 1))
    """
    grid = parse_integers(integers) if isinstance(integers, str) else integers
    value = as_value(value)
    name, draw = drawn(rounding, random)
    if value is NAN:
        return NAN
    negative = is_negative(value)
    if value in INFINITIES:
        return (grid.least if negative else grid.greatest) * grid.unit
    whole, rest = divmod(magnitude(value) / grid.unit, 1)
    if rest:
        whole += takes_above(rest, Fraction(1), whole % 2 == 1, name, negative, draw)
    n = min(max(-whole if negative else whole, grid.least), grid.greatest)
    return n * grid.unit
