"""From values to codes: the inverse of `decode`, after rounding."""

from __future__ import annotations

from fpsim.formats import FloatFormat, parse_format

from .rounding import round
from .values import INFINITIES, NAN, ZEROS, Number, Value, floor_log2, is_negative, magnitude, scale_b


def encode(
    value: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> int:
    """The code of ``value`` in ``format``, rounded first as `round` does it.

    NaN gets the canonical code of the format (`FloatFormat.nan_code`). ``encode(decode(code))`` is ``code``, except for
    other codes of NaN, and for zeros with mantissa bits in a format without subnormals.

    Arguments:
        value: an int, Fraction, float (taken exactly) or `Special`.
        format: a name or a `FloatFormat`.
        rounding, overflow, random: as in `round`.

    Raises:
        ValueError, TypeError: as `round`.

    Source: as `decode`.

    >>> hex(encode(-1, "fp16"))
    '0xbc00'
    """
    fmt = parse_format(format)
    return _code_of(round(value, fmt, rounding, overflow, random=random), fmt)


def _code_of(value: Value, fmt: FloatFormat) -> int:
    sign = fmt.sign_code if is_negative(value) else 0
    if value is NAN:
        assert fmt.nan_code is not None, "rounding gives NaN only where the format has one"
        return fmt.nan_code
    if value in INFINITIES:
        assert fmt.infinity_code is not None, "rounding gives infinity only where the format has one"
        return sign | fmt.infinity_code
    if value in ZEROS:
        return sign
    finite = magnitude(value)
    exponent = max(floor_log2(finite), fmt.emin)
    significand = finite / scale_b(1, exponent - fmt.mantissa_bits)
    # A subnormal has the exponent of field 1 but no leading bit; the subtraction then makes its field 0.
    return sign | ((exponent + fmt.bias) << fmt.mantissa_bits) + int(significand) - (1 << fmt.mantissa_bits)
