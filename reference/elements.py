"""The numbers that the elements of a scaled block can be: a floating-point format, integers, or a codebook."""

from __future__ import annotations

from fractions import Fraction
from typing import TypeAlias

from fpsim.formats import FloatFormat, format_name, parse_format

from .codebooks import CODEBOOKS, Codebook, parse_codebook, round_codebook
from .decoding import largest
from .integers import Integers, parse_integers, round_integer
from .rounding import round
from .values import Number, Value, floor_log2, scale_b

Element: TypeAlias = FloatFormat | Integers | Codebook


def parse_element(name: str | Element) -> Element:
    """The element that ``name`` denotes; an element is returned unchanged, and a dtype of torch is its format.

    Raises:
        ValueError: there is none.
    """
    name = format_name(name)
    if not isinstance(name, str):
        return name
    if name in CODEBOOKS or name.startswith("codebook:"):
        return parse_codebook(name)
    if name.startswith(("int", "uint", "mxint")):
        return parse_integers(name)
    return parse_format(name)


def round_element(
    value: Number,
    element: Element,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Value:
    """``value`` rounded to a value of ``element``, by `round`, `round_integer` or `round_codebook`.

    Raises:
        ValueError: as these; or an overflow mode other than ``sat_finite`` for integers and codebooks, which have
            neither infinity nor NaN, or a rounding other than ``nearest_even`` for a codebook, which names its ties.
    """
    if isinstance(element, FloatFormat):
        return round(value, element, rounding, overflow, random=random)
    if overflow not in (None, "sat_finite"):
        raise ValueError(f"overflow={overflow!r} needs an infinity or a NaN: use 'sat_finite'")
    if isinstance(element, Integers):
        return round_integer(value, element, rounding, random=random)
    if rounding != "nearest_even" or random is not None:
        raise ValueError(f"a codebook rounds to the nearest value, got rounding={rounding!r}, random={random}")
    return round_codebook(value, element)


def largest_magnitude(element: Element) -> Fraction:
    """The largest finite magnitude ``max`` of the element. (Of ``int8:full`` it is 127, the largest of both signs.)"""
    return largest(element) if isinstance(element, FloatFormat) else element.largest


def smallest_magnitude(element: Element) -> Fraction:
    """The smallest magnitude above zero."""
    if isinstance(element, FloatFormat):
        return scale_b(1, element.smallest_exponent)
    if isinstance(element, Integers):
        return element.unit
    return min(abs(value) for value in element.values if value)


def mantissa_bits(element: Element) -> int:
    """The mantissa bits M of the largest value: in its binade, values are ``2**M`` steps apart.

    Raises:
        ValueError: ``element`` is a codebook, whose values have no even steps.
    """
    if isinstance(element, FloatFormat):
        return element.mantissa_bits
    if isinstance(element, Integers):
        return floor_log2(element.largest / element.unit)
    raise ValueError("a codebook has no mantissa bits: use the rule floor, ceil or rceil")
