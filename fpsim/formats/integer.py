"""Integer formats as frozen values: signed integers of a restricted or the full range, and unsigned integers."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass

from fpsim.formats.float import FloatFormat, float64_of

_NAME = re.compile(r"(?P<sign>u?)int(?P<bits>[0-9]{1,2})(?P<full>:full)?(?::unit=(?P<unit>-?[0-9]{1,3}))?")


@dataclass(frozen=True)
class IntegerFormat:
    """The integers of a width, times a unit. They have neither NaN nor infinity, and one zero.

    Attributes:
        bits: the width, 2 to 16.
        signed: whether there are negative integers.
        full: whether ``-2**(bits-1)`` is a value too. Symmetric quantization usually leaves it out: the range is then
            ``-(2**(bits-1)-1)`` to ``2**(bits-1)-1``.
        unit_exponent: ``log2`` of the unit. MXINT8 has the unit 2^-6 (OCP MX 1.0, section 5.3.4).

    Raises:
        TypeError: the width or the exponent is not an int.
        ValueError: the width is not 2 to 16, the unit is not 2^-128 to 2^64, or an unsigned format is ``full``.

    >>> IntegerFormat(8).max, IntegerFormat(8, unit_exponent=-6).max
    (127.0, 1.984375)
    """

    bits: int
    signed: bool = True
    full: bool = False
    unit_exponent: int = 0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or type(self.unit_exponent) is not int:
            raise TypeError(f"the width and the exponent are ints, got {reprlib.repr((self.bits, self.unit_exponent))}")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"an integer format has 2 to 16 bits, got {self.bits}")
        if not -128 <= self.unit_exponent <= 64:
            raise ValueError(f"the unit of an integer format is 2**-128 to 2**64, got 2**{self.unit_exponent}")
        if self.full and not self.signed:
            raise ValueError("an unsigned integer format always has its full range: leave out 'full'")

    @property
    def name(self) -> str:
        """The name that `parse_integer` reads."""
        unit = f":unit={self.unit_exponent}" if self.unit_exponent else ""
        return f"{'' if self.signed else 'u'}int{self.bits}{':full' if self.full else ''}{unit}"

    @property
    def max_integer(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def min_integer(self) -> int:
        """The smallest integer."""
        return -self.max_integer - self.full if self.signed else 0

    @property
    def max(self) -> float:
        """The largest value."""
        return float64_of(self.max_units)

    @property
    def max_units(self) -> int:
        """The largest value in units of 2**-1074, the smallest subnormal of float64."""
        return self.max_integer << (self.unit_exponent + 1074)

    @property
    def max_exponent(self) -> int:
        """The exponent of the leading bit of the largest value."""
        return self.max_integer.bit_length() - 1 + self.unit_exponent

    @property
    def mantissa_bits(self) -> int:
        """The bits of the largest integer after its leading bit."""
        return self.max_integer.bit_length() - 1

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest positive value, the unit."""
        return self.unit_exponent

    @property
    def is_symmetric(self) -> bool:
        """Whether the negative of every value is a value."""
        return self.signed and not self.full

    def grid(self) -> FloatFormat:
        """A format without infinities and -0 whose finite values are the values of this format.

        If the range is not symmetric, it holds the integers up to twice the largest magnitude, with both signs.
        """
        m = self.bits - 2 if self.is_symmetric else self.bits
        return FloatFormat(1, m, bias=1 - self.unit_exponent - m, specials="fnuz")


def parse_integer(name: str) -> IntegerFormat | None:
    """The integer format with this name (``int8``, ``int4:full``, ``uint8``, ``int8:unit=-6``); None if it is none.

    Raises:
        ValueError: the name has the form of one, but there is no such format.
    """
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        return None
    return IntegerFormat(int(match["bits"]), not match["sign"], bool(match["full"]), int(match["unit"] or 0))
