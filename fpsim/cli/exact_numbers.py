"""Exact numbers as text: reads what users type, and writes decimals, fractions, powers of two and bits."""

from __future__ import annotations

import itertools
import re
from decimal import Context, Decimal, Inexact
from fractions import Fraction

from fpsim.formats import FloatFormat
from fpsim.reference import Value, to_float
from fpsim.reference.values import INFINITY, NAN, negate

# Magnitudes, in lower case.
_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(e(?P<exponent>[+-]?\d+))?", re.ASCII)
_FRACTION = re.compile(r"\d+/\d+", re.ASCII)
_HEXADECIMAL = re.compile(
    r"0x(?=\.?[0-9a-f])(?P<whole>[0-9a-f]*)\.?(?P<part>[0-9a-f]*)(p(?P<exponent>[+-]?\d+))?", re.ASCII
)
#: The largest exponent that `parse_number` takes: a number with a larger one could fill the memory.
MAX_EXPONENT = 4000


def show_ratio(ratio: Fraction) -> str:
    """``ratio`` exactly; a fraction is followed by an approximation.

    >>> show_ratio(Fraction(1, 5)), show_ratio(Fraction(-1, 3))
    ('0.2', '-1/3 = -0.333333')
    """
    exact = show_number(ratio)
    return f"{exact} = {show_approximately(ratio)}" if "/" in exact else exact


def parse_number(text: str) -> Value:
    """The exact value of a decimal (``-2.5e-3``), fraction (``1/3``), hexadecimal number (``0x1.8p3``), inf or nan.

    Raises:
        ValueError: ``text`` is none of these, or its exponent is beyond `MAX_EXPONENT`.

    >>> parse_number("0.1"), parse_number("-0x.8p-1"), parse_number("-0")
    (Fraction(1, 10), Fraction(-1, 4), NEGATIVE_ZERO)
    """
    plain = text.strip().lower()
    negative, magnitude = plain.startswith("-"), plain.lstrip("+-")
    if plain[1:] != magnitude and plain != magnitude:
        raise _not_a_number(text)
    if magnitude in ("inf", "infinity", "nan"):
        value: Value = NAN if magnitude == "nan" else INFINITY
    else:
        value = _parse_magnitude(magnitude, text)
    return negate(value) if negative else value


def _parse_magnitude(magnitude: str, text: str) -> Fraction:
    match = _DECIMAL.fullmatch(magnitude) or _HEXADECIMAL.fullmatch(magnitude)
    if match is not None and abs(int(match["exponent"] or 0)) > MAX_EXPONENT:
        raise ValueError(
            f"the exponent of {text!r} is beyond {MAX_EXPONENT}, far outside of every format: use inf or 0"
        )
    if match is not None and match.re is _DECIMAL:
        return Fraction(magnitude)
    if match is not None:
        digits = int(match["whole"] + match["part"], 16)
        return digits * Fraction(2) ** (int(match["exponent"] or 0) - 4 * len(match["part"]))
    if _FRACTION.fullmatch(magnitude):
        numerator, denominator = map(int, magnitude.split("/"))
        if denominator:
            return Fraction(numerator, denominator)
    raise _not_a_number(text)


def _not_a_number(text: str) -> ValueError:
    return ValueError(
        f"cannot read {text!r} as a number: use a decimal (0.1, -2.5e-3), a fraction (1/3), a hexadecimal number "
        "(0x1.8p3), inf or nan"
    )


def show_number(value: Value) -> str:
    """``value`` in short: as a decimal of at most 20 digits, else as a short fraction, else approximately after ``~``.

    >>> show_number(Fraction(13, 128)), show_number(Fraction(-1, 3)), show_number(Fraction(1, 3**50))
    ('0.1015625', '-1/3', '~1.39296e-24')
    """
    if not isinstance(value, Fraction):
        return str(value)
    if value.denominator == 1 and abs(value.numerator) < 10**20:
        return str(value.numerator)
    context = Context(prec=20)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    if not context.flags[Inexact]:
        return _without_plus(quotient)
    if value.numerator.bit_length() + value.denominator.bit_length() < 64:
        return str(value)
    return f"~{show_approximately(value)}"


def show_exactly(value: Value) -> str:
    """``value`` with all its digits: as a decimal of at most 60 digits, else as a fraction, else as `show_number`.

    >>> show_exactly(Fraction(2) ** -30), show_exactly(Fraction(10**20, 3))
    ('9.31322574615478515625e-10', '100000000000000000000/3')
    """
    if not isinstance(value, Fraction):
        return str(value)
    context = Context(prec=60)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    if not context.flags[Inexact]:
        shown = show_number(value)
        return _without_plus(quotient, context) if shown.startswith("~") or "/" in shown else shown
    return str(value) if value.numerator.bit_length() + value.denominator.bit_length() < 200 else show_number(value)


def show_power(value: Value) -> str:
    """A value of a format exactly, as an odd integer times a power of two.

    >>> show_power(Fraction(13, 128)), show_power(Fraction(448)), show_power(Fraction(-1, 4)), show_power(Fraction(3))
    ('13 * 2^-7', '7 * 2^6', '-2^-2', '3')
    """
    if not isinstance(value, Fraction) or not value:
        return str(value)
    numerator, exponent = value.numerator, 1 - value.denominator.bit_length()
    zeros = (numerator & -numerator).bit_length() - 1
    odd, exponent = numerator >> zeros, exponent + zeros
    if exponent == 0:
        return str(odd)
    power = f"2^{exponent}"
    return {1: power, -1: f"-{power}"}.get(odd, f"{odd} * {power}")


def show_approximately(value: Fraction) -> str:
    """``value`` as a decimal of 6 digits.

    >>> show_approximately(Fraction(2, 3))
    '0.666667'
    """
    return _without_plus(Context(prec=6).divide(Decimal(value.numerator), Decimal(value.denominator)))


def _without_plus(number: Decimal, context: Context | None = None) -> str:
    return f"{number.normalize(context):g}".replace("e+", "e")


def show_hex(value: Value) -> str:
    """A value of a format exactly, as a hexadecimal number.

    >>> show_hex(Fraction(13, 128))
    '0x1.ap-4'
    """
    if not isinstance(value, Fraction):
        return str(value)
    return re.sub(r"\.?0+p", "p", to_float(value).hex()).replace("p+", "p") if value else "0"


def show_code(code: int, fmt: FloatFormat) -> str:
    """``code`` in hexadecimal, with as many digits as codes of ``fmt`` have.

    >>> show_code(0x1D, parse_format("e5m10"))
    '0x001d'
    """
    return f"{code:#0{-(-fmt.bits // 4) + 2}x}"


def show_bits(code: int, fmt: FloatFormat) -> str:
    """``code`` in hexadecimal and by fields."""
    return f"{show_code(code, fmt)} = {show_fields(code, fmt, ' | ')}"


def show_fields(code: int, fmt: FloatFormat, separator: str = " ") -> str:
    """The bits of ``code``, with ``separator`` between the sign, exponent and mantissa fields.

    >>> show_fields(0x1D, parse_format("e4m3fn"))
    '0 0011 101'
    """
    digits = iter(f"{code:0{fmt.bits}b}")
    widths = (int(fmt.signed), fmt.exponent_bits, fmt.mantissa_bits)
    return separator.join("".join(itertools.islice(digits, width)) for width in widths if width)


def field_names(fmt: FloatFormat) -> str:
    """The heading over `show_fields` with ``" | "`` between the fields."""
    widths = {"s": int(fmt.signed), "exponent": fmt.exponent_bits, "significand": fmt.mantissa_bits}
    return " | ".join(name for name, width in widths.items() if width)
