"""Other implementations of floating point: their names for our formats and modes, and their numbers for our values."""

from __future__ import annotations

from fractions import Fraction

import gfloat
import gfloat.formats
import gmpy2
import ml_dtypes

from fpsim.formats import FloatFormat
from fpsim.reference import NAN, Value, as_value

#: The types of ml_dtypes, by their names there, which `parse_format` takes too.
ML_DTYPES = sorted(name for name in vars(ml_dtypes) if "float" in name)

GFLOAT_FORMATS = {
    "fp32": gfloat.formats.format_info_binary32,
    "fp16": gfloat.formats.format_info_binary16,
    "bf16": gfloat.formats.format_info_bfloat16,
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
    "e4m3fn": gfloat.formats.format_info_ocp_e4m3,
    "e3m2fn": gfloat.formats.format_info_ocp_e3m2,
    "e2m3fn": gfloat.formats.format_info_ocp_e2m3,
    "e2m1fn": gfloat.formats.format_info_ocp_e2m1,
    "e8m0fnu": gfloat.formats.format_info_ocp_e8m0,
}
GFLOAT_MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}

MPFR_MODES = {
    "nearest_even": gmpy2.RoundToNearest,
    "toward_zero": gmpy2.RoundToZero,
    "up": gmpy2.RoundUp,
    "down": gmpy2.RoundDown,
}
MPFR_ARITHMETIC = {
    "add": gmpy2.add,
    "sub": gmpy2.sub,
    "mul": gmpy2.mul,
    "div": gmpy2.div,
    "sqrt": gmpy2.sqrt,
    "fma": gmpy2.fma,
}
MPFR_FUNCTIONS = {
    "exp": gmpy2.exp,
    "exp2": gmpy2.exp2,
    "log": gmpy2.log,
    "log2": gmpy2.log2,
    "sin": gmpy2.sin,
    "cos": gmpy2.cos,
    "tanh": gmpy2.tanh,
    "erf": gmpy2.erf,
}


def mpfr_like(fmt: FloatFormat, rounding: str) -> gmpy2.context:
    """MPFR with the precision, range and subnormals of ``fmt``. Its exponents are one more than ours."""
    return gmpy2.context(
        precision=fmt.precision,
        emin=fmt.emin - fmt.mantissa_bits + 1,
        emax=fmt.max_exponent + 1,
        subnormalize=True,
        round=MPFR_MODES[rounding],
    )


def to_mpfr(value: Value) -> gmpy2.mpfr:
    """``value`` as a number of MPFR, exact if 2000 bits are enough."""
    with gmpy2.context(precision=2000):
        if isinstance(value, Fraction):
            return gmpy2.mpfr(gmpy2.mpq(value.numerator, value.denominator))
        return gmpy2.mpfr(str(value))


def from_mpfr(number: gmpy2.mpfr) -> Value:
    """The value that ``number`` holds."""
    if gmpy2.is_nan(number):
        return NAN
    if gmpy2.is_infinite(number) or gmpy2.is_zero(number):
        return as_value(float(number))
    return Fraction(int((ratio := gmpy2.mpq(number)).numerator), int(ratio.denominator))
