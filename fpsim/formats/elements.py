"""All element formats under one name: floating-point formats, integers and codebooks."""

from __future__ import annotations

from typing import Any

from fpsim.formats.codebook import CodebookFormat, parse_codebook
from fpsim.formats.float import FloatFormat
from fpsim.formats.integer import IntegerFormat, parse_integer
from fpsim.formats.names import parse_format

#: The formats of the elements of a cast.
ElementFormat = FloatFormat | IntegerFormat | CodebookFormat


def parse_element(name: str | ElementFormat) -> ElementFormat:
    """The element format that ``name`` denotes: an integer, a codebook, or any format of `parse_format`.

    Raises:
        ValueError: there is no such format. The message lists similar names.
        TypeError: ``name`` is neither a string nor a format.

    >>> parse_element("int4"), parse_element("e2m1fn").max
    (IntegerFormat(bits=4, signed=True, full=False, unit_exponent=0), 6.0)
    """
    if isinstance(name, IntegerFormat | CodebookFormat):
        return name
    found: Any = (parse_integer(name) or parse_codebook(name)) if isinstance(name, str) else None
    return found or parse_format(name)
