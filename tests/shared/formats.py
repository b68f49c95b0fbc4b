"""Formats and values that tests try, and the modes that formats take."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from fractions import Fraction
from functools import cache

from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import OVERFLOWS, SPECIALS, FloatFormat, parse_format
from fpsim.reference import Value, decode


def overflows(fmt: FloatFormat) -> tuple[str, ...]:
    """The overflow modes that the format takes."""
    return OVERFLOWS if fmt.has_infinity or fmt.has_nan else ("sat_finite",)


def formats_of_every_kind(shapes: Iterable[tuple[int, int, int | None]]) -> list[FloatFormat]:
    """Formats with (exponent bits, mantissa bits, bias) as given and all special values; and a few without zero."""
    with_zero = [
        FloatFormat(exponent_bits, mantissa_bits, bias, specials, subnormals, signed)
        for exponent_bits, mantissa_bits, bias in shapes
        for specials in SPECIALS
        for subnormals in (True, False)
        for signed in (True, False)
        if (signed or specials != "fnuz") and (specials != "p3109" or exponent_bits + mantissa_bits > 1)
    ]
    return with_zero + [
        FloatFormat(3, mantissa_bits, 3, specials, False, False, False)
        for mantissa_bits in (0, 2)
        for specials in ("ieee", "fn", "finite")
    ]


@cache
def finite_values(name: str) -> tuple[Fraction, ...]:
    """The finite values of a format in increasing order, with one zero."""
    values = (decode(code, name) for code in range(1 << parse_format(name).bits))
    return tuple(sorted({v for v in values if isinstance(v, Fraction)}))


@st.composite
def values_near_the_ends(draw, fmt: FloatFormat) -> Value:
    """Any code, or one near the ends of the range, near 1 or near the smallest normal number."""
    top = (1 << fmt.bits) - 1
    telling = [0, fmt.sign_code, fmt.max_code, fmt.max_code + 1, fmt.bias << fmt.mantissa_bits, 1 << fmt.mantissa_bits]
    near = st.builds(operator.add, st.sampled_from(telling), st.integers(-3, 3)).map(lambda code: code & top)
    return decode(draw(st.integers(0, top) | near), fmt)


def operand_count(operation: str) -> int:
    """How many operands an operation of the reference takes."""
    return list(inspect.signature(getattr(reference, operation)).parameters).index("format")
