"""Number formats as frozen values, their names, and the words for rounding and overflow."""

from fpsim.formats.float import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    SPECIALS,
    STOCHASTIC_ROUNDINGS,
    FloatFormat,
    Overflow,
    Rounding,
    check_rounding,
    full_rounding,
    parse_format,
    resolve_overflow,
    split_rounding,
)

__all__ = [
    "NAMED_FORMATS",
    "OVERFLOWS",
    "ROUNDINGS",
    "SPECIALS",
    "STOCHASTIC_ROUNDINGS",
    "FloatFormat",
    "Overflow",
    "Rounding",
    "check_rounding",
    "full_rounding",
    "parse_format",
    "resolve_overflow",
    "split_rounding",
]
