"""From codes to values: what each code of a format stands for.

The fields are those of IEEE 754-2019 clause 3.4: sign, biased exponent, trailing significand. The convention of the
format says which codes are infinities and NaNs: IEEE 754, the OCP FP8 and MX specifications, or ml_dtypes' fnuz.
"""

from __future__ import annotations

import operator
from fractions import Fraction
from functools import cache

from fpsim.formats import FloatFormat, parse_format

from .values import INFINITY, NAN, Value, negate, rational, scale_b


def decode(code: int, format: str | FloatFormat) -> Value:
    """The value that ``code`` stands for in ``format``.

    Arguments:
        code: the bits of the datum as an integer from 0 to ``2**bits - 1``, with the sign in the top bit.
        format: a name or a `FloatFormat`.

    Raises:
        ValueError: no such code, or no such format.
        TypeError: ``code`` is not an integer.

    Source: IEEE 754-2019 clause 3.4; OCP 8-bit Floating Point Specification (OFP8) 1.0 section 5; OCP Microscaling
    Formats (MX) 1.0 section 5.3.

    >>> decode(0x7E, "e4m3fn"), decode(0x7F, "e4m3fn"), decode(0x80, "e4m3fn")
    (Fraction(448, 1), NAN, NEGATIVE_ZERO)
    """
    fmt = parse_format(format)
    code = operator.index(code)
    if not 0 <= code < 1 << fmt.bits:
        raise ValueError(f"code {code} is outside of {fmt.name}, whose codes are 0 to {(1 << fmt.bits) - 1}")
    if fmt.is_nan_code(code):
        return NAN
    value = _decode_magnitude(code & ~fmt.sign_code, fmt)
    if code & fmt.sign_code and (value or fmt.has_negative_zero):
        return negate(value)
    return value


def _decode_magnitude(code: int, fmt: FloatFormat) -> Value:
    if code == fmt.infinity_code:
        return INFINITY
    field, mantissa = divmod(code, 1 << fmt.mantissa_bits)
    if field == 0 and fmt.zero:
        return scale_b(mantissa if fmt.subnormals else 0, fmt.emin - fmt.mantissa_bits)
    return normal(code, fmt)


def normal(code: int, fmt: FloatFormat) -> Fraction:
    """The value of a magnitude ``code`` read as a normal number, whatever its exponent field is.

    The field may exceed that of the format, or be zero or negative: the exponent range of this reading is unbounded. A
    result is rounded with such an exponent before its range is checked.
    """
    field, mantissa = divmod(code, 1 << fmt.mantissa_bits)
    return scale_b((1 << fmt.mantissa_bits) + mantissa, field - fmt.bias - fmt.mantissa_bits)


@cache
def largest(fmt: FloatFormat) -> Fraction:
    """The largest finite value of ``fmt``."""
    return rational(decode(fmt.max_code, fmt))


@cache
def smallest(fmt: FloatFormat) -> Fraction:
    """The finite value of ``fmt`` nearest to zero: zero itself where the format has it."""
    return rational(decode(0, fmt))
