"""Number formats as frozen values, their names, and the names of the rounding and overflow modes."""

from fpsim.formats.codebook import CODEBOOKS, CodebookFormat
from fpsim.formats.dtypes import format_name, parse_format
from fpsim.formats.elements import WHOLE_FORMATS, ElementFormat, expand, parse_element
from fpsim.formats.float import SPECIALS, FloatFormat
from fpsim.formats.integer import IntegerFormat
from fpsim.formats.modes import (
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_ROUNDINGS,
    Overflow,
    Rounding,
    check_rounding,
    full_rounding,
    resolve_overflow,
    split_rounding,
)
from fpsim.formats.names import NAMED_FORMATS

__all__ = [
    "CODEBOOKS",
    "NAMED_FORMATS",
    "OVERFLOWS",
    "ROUNDINGS",
    "SPECIALS",
    "STOCHASTIC_ROUNDINGS",
    "WHOLE_FORMATS",
    "CodebookFormat",
    "ElementFormat",
    "FloatFormat",
    "IntegerFormat",
    "Overflow",
    "Rounding",
    "check_rounding",
    "expand",
    "format_name",
    "full_rounding",
    "parse_element",
    "parse_format",
    "resolve_overflow",
    "split_rounding",
]


def __dir__() -> list[str]:
    return sorted(__all__)
