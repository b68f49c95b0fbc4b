"""round against the implementations of others: ml_dtypes, numpy, mpmath, MPFR through gmpy2, and gfloat.

Where one of them differs by design, or by mistake, the test says so and asserts the difference.
"""

import math
from fractions import Fraction
from functools import cache
from random import Random

import gfloat
import gfloat.formats
import ml_dtypes
import mpmath.libmp
import numpy as np
import pytest

from fpsim.formats import FloatFormat, parse_format
from fpsim.reference import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, as_value, decode, round, to_float
from tests.shared.peers import GFLOAT_FORMATS, GFLOAT_MODES, ML_DTYPES


@cache
def interesting(name: str, carrier: type = np.float32) -> list[Fraction]:
    """Positive values of a format, the middles after them, some numbers further out, and the next ones in ``carrier``.

    The mantissas are the least, the greatest and the middle ones.
    """
    fmt = parse_format(name)
    top = (1 << fmt.mantissa_bits) - 1
    mantissas = sorted({0, 1, 2, top // 2, top // 2 + 1, top - 1, top} & set(range(top + 1)))
    codes = [field << fmt.mantissa_bits | m for field in range(1 << fmt.exponent_bits) for m in mantissas]
    values = [Fraction(decode(code, fmt)) for code in codes if code <= fmt.max_code]
    middles = [v + half_ulp(v, fmt) for v in values]
    largest = Fraction(fmt.max)
    beyond = [largest + half_ulp(largest, fmt) * step for step in (Fraction(1, 2), 1, Fraction(3, 2), 2, 3, 4, 99)]
    extremes = [2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127, 0.1, 1e-20, 1e20, 8 * largest]
    with np.errstate(all="ignore"):
        points = np.array([float(p) for p in (*values, *middles, *beyond, *extremes)]).astype(carrier)
        around = np.concatenate([points, np.nextafter(points, carrier(np.inf)), np.nextafter(points, carrier(0))])
    return [Fraction(float(x)) for x in np.unique(around) if 0 < x < np.inf]


def half_ulp(value: Fraction, fmt: FloatFormat) -> Fraction:
    exponent = max(math.frexp(value)[1] - 1, fmt.emin) if value else fmt.emin
    return Fraction(2) ** (exponent - fmt.mantissa_bits - 1)


def same(name: str, inputs: list, outputs: list, *arguments: str) -> None:
    """Assert that the reference gives ``outputs`` for ``inputs``, and name the inputs for which it does not."""
    wrong = [
        f"{float(x)!r}: reference {got}, other {want}"
        for x, want in zip(inputs, outputs, strict=True)
        if (got := round(x, name, *arguments)) != want
    ]
    assert not wrong, wrong[:10]


def cast(dtype: type, inputs: list) -> list:
    """``inputs`` as numpy casts them from float32 to ``dtype``."""
    with np.errstate(all="ignore"):
        result = np.array([to_float(x) for x in inputs], np.float32).astype(dtype).astype(np.float64)
    return [as_value(float(x)) for x in result]


# -- ml_dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if name != "float8_e8m0fnu"])
def test_nearest_even_is_that_of_ml_dtypes(name):
    positive = interesting(name)
    inputs = [*positive, *(-x for x in positive), Fraction(0), NEGATIVE_ZERO, INFINITY, NEGATIVE_INFINITY]
    overflow = "ovf_inf" if parse_format(name).has_nan else "sat_finite"
    same(name, inputs, cast(getattr(ml_dtypes, name), inputs), "nearest_even", overflow)


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if parse_format(name).has_nan])
def test_nan_is_that_of_ml_dtypes(name):
    assert cast(getattr(ml_dtypes, name), [NAN]) == [NAN]


def test_ml_dtypes_rounds_to_e8m0fnu_with_ties_up():
    """torch does so too. Our nearest_even rounds to the even code; theirs is our nearest_away."""
    inputs = [x for x in interesting("e8m0fnu") if not Fraction(1, 2**127) < x < Fraction(3, 2**128)]
    inputs += [Fraction(0), NEGATIVE_ZERO, Fraction(-1), Fraction(-1, 2**149), INFINITY, NEGATIVE_INFINITY, NAN]
    expected = cast(ml_dtypes.float8_e8m0fnu, inputs)
    same("e8m0fnu", inputs, expected, "nearest_away", "ovf_inf")
    ties = {Fraction(3, 2) * decode(code, "e8m0fnu") for code in range(255)}
    assert ties < set(inputs)
    others = [(x, want) for x, want in zip(inputs, expected, strict=True) if x not in ties]
    same("e8m0fnu", [x for x, _ in others], [want for _, want in others], "nearest_even", "ovf_inf")


def test_ml_dtypes_rounds_up_in_the_lowest_binade_of_e8m0fnu():
    """This is an error of ml_dtypes and torch: these subnormals of float32 are less than half-way to the next value."""
    x = Fraction(5, 4) / 2**127
    assert cast(ml_dtypes.float8_e8m0fnu, [x]) == [Fraction(1, 2**126)]
    assert round(x, "e8m0fnu", "nearest_away") == Fraction(1, 2**127)


# -- numpy and Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_nearest_even_is_that_of_numpy(name, dtype):
    """From float64, so that there are inputs between the numbers of float32 too."""
    inputs = interesting(name, np.float64)[:: 11 if name == "fp32" else 1]
    with np.errstate(all="ignore"):
        outputs = np.array([float(x) for x in inputs]).astype(dtype)
    same(name, inputs, [as_value(float(y)) for y in outputs])


def test_nearest_even_to_fp64_is_that_of_python():
    random = Random(1)
    inputs = [Fraction(random.getrandbits(200), random.getrandbits(200) + 1) for _ in range(300)]
    inputs += [Fraction(random.getrandbits(60), 1 << random.randrange(1060, 1140)) for _ in range(300)]
    inputs += [(1 + Fraction(2 * k + 1, 2**53)) * Fraction(2) ** e for k in range(4) for e in (-1022, -1, 0, 970)]
    same("fp64", inputs, [as_value(float(x)) for x in inputs])


# -- mpmath ------------------------------------------------------------------------------------------------------------

MPMATH = {"nearest_even": "n", "toward_zero": "d", "down": "f", "up": "c"}


def rationals(seed: int, fmt: FloatFormat, count: int) -> list[Fraction]:
    """Random normal numbers of both signs: rationals without finite expansion, values, ties, and their neighbours."""
    random, numbers = Random(seed), []
    for _ in range(count):
        significand = Fraction(random.getrandbits(fmt.precision + 1) | 1 << fmt.precision)  # a value or a tie
        significand += random.choice([0, Fraction(1, 3), Fraction(random.getrandbits(99), 2**99), Fraction(1, 2**200)])
        exponent = random.randrange(fmt.emin, fmt.max_exponent) - fmt.precision
        numbers.append(random.choice([1, -1]) * significand * Fraction(2) ** exponent)
    return numbers


@pytest.mark.parametrize("rounding", MPMATH)
@pytest.mark.parametrize("name", ["fp64", "fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3fn", "e3m4", "e11m40", "e6m9"])
def test_normal_results_are_those_of_mpmath(name, rounding):
    fmt = parse_format(name)
    inputs = rationals(2, fmt, 150)
    outputs = []
    for x in inputs:
        sign, man, exp, _ = mpmath.libmp.from_rational(x.numerator, x.denominator, fmt.precision, MPMATH[rounding])
        outputs.append((-1) ** sign * int(man) * Fraction(2) ** exp)
    same(name, inputs, outputs, rounding)


# -- MPFR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "down"])
@pytest.mark.parametrize("name", ["fp64", "fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3", "e3m4", "e11m40", "e6m1"])
def test_results_are_those_of_mpfr(name, rounding):
    """With the range and the subnormals of MPFR itself, and so with signed zeros, underflow and overflow."""
    gmpy2 = pytest.importorskip("gmpy2")
    modes = {"nearest_even": gmpy2.RoundToNearest, "toward_zero": gmpy2.RoundToZero}
    modes |= {"up": gmpy2.RoundUp, "down": gmpy2.RoundDown}
    fmt = parse_format(name)
    inputs = rationals(3, fmt, 100)
    inputs += [x * Fraction(2) ** (fmt.emin - fmt.mantissa_bits - 3) for x in rationals(4, FloatFormat(3, 2), 60)]
    inputs += [sign * Fraction(fmt.max) * f for sign in (1, -1) for f in (1, Fraction(2001, 2000), Fraction(3, 2), 99)]
    quantum, ulp = Fraction(2) ** (fmt.emin - fmt.mantissa_bits), Fraction(2) ** (fmt.max_exponent - fmt.mantissa_bits)
    inputs += [sign * quantum * step / 4 for sign in (1, -1) for step in range(1, 12)]
    inputs += [sign * (2**fmt.precision * quantum + quantum * step / 4) for sign in (1, -1) for step in range(-12, 9)]
    inputs += [sign * (Fraction(fmt.max) + ulp * step / 4) for sign in (1, -1) for step in range(-8, 9)]
    # MPFR's significands are less than 1, so its exponents are one more than ours
    context = gmpy2.context(
        precision=fmt.precision,
        emin=fmt.emin - fmt.mantissa_bits + 1,
        emax=fmt.max_exponent + 1,
        subnormalize=True,
        round=modes[rounding],
    )
    with context:
        results = [gmpy2.mpfr(gmpy2.mpq(x.numerator, x.denominator)) for x in inputs]
        outputs = [as_value(float(y)) for y in results]  # exact: no format here exceeds float64
    same(name, inputs, outputs, rounding)


# -- gfloat ------------------------------------------------------------------------------------------------------------


def gfloat_info(fmt: FloatFormat) -> gfloat.FormatInfo:
    """A format of ours, with subnormals and a mantissa, described to gfloat."""
    return gfloat.FormatInfo(
        fmt.name,
        k=fmt.bits,
        precision=fmt.precision,
        bias=fmt.bias,
        is_signed=fmt.signed,
        domain=gfloat.Domain.Extended if fmt.has_infinity else gfloat.Domain.Finite,
        has_nz=fmt.has_negative_zero,
        num_high_nans={"ieee": (1 << fmt.mantissa_bits) - 1, "fn": 1, "fnuz": 0, "finite": 0}[fmt.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("rounding", GFLOAT_MODES)
@pytest.mark.parametrize(
    "name", [*GFLOAT_FORMATS, "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e4m3", "e5m0", "e3m0fn", "e4m2:bias=-3"]
)
def test_results_are_those_of_gfloat(name, rounding):
    """Both of its overflow modes: sat=False is ovf_inf, sat=True sat_finite (which clamps infinities too).

    gfloat differs by design in three cases. It raises ValueError where NaN or, with sat=False, overflow has no code. It
    gives a signed zero in unsigned formats. And e8m0fnu does not stop at its smallest value. It also refuses some
    float64 by mistake (see the next test), so all inputs here are float32, except those of fp32.
    """
    fmt = parse_format(name)
    info = GFLOAT_FORMATS.get(name) or gfloat_info(fmt)
    inputs = interesting(name, np.float64 if name == "fp32" else np.float32)[:: {"fp32": 23, "bf16": 7}.get(name, 1)]
    if fmt.zero:
        inputs += [-x for x in inputs] + [Fraction(0), NEGATIVE_ZERO, NEGATIVE_INFINITY]
    else:
        inputs = [x for x in inputs if x >= fmt.smallest_normal]
    inputs.append(INFINITY)
    for overflow, saturate in (("ovf_inf", False), ("sat_finite", True)):
        if saturate or fmt.has_nan:
            results = [gfloat.round_float(info, to_float(x), GFLOAT_MODES[rounding], saturate) for x in inputs]
            same(name, inputs, [as_value(float(y)) for y in results], rounding, overflow)


def test_gfloat_computes_in_float64():
    """Two errors of gfloat: ``delta + 0.5`` rounds to 1 just below a tie, and the least float64 is scaled to zero."""
    below_tie = Fraction(float(np.nextafter(2.0**-10, 0)))
    assert gfloat.round_float(GFLOAT_FORMATS["e4m3fn"], float(below_tie), GFLOAT_MODES["nearest_away"]) == 2.0**-9
    assert round(below_tie, "e4m3fn", "nearest_away") == 0
    wide = parse_format("e4m2:bias=-3")
    assert gfloat.round_float(gfloat_info(wide), 2.0**-1074, GFLOAT_MODES["up"]) == 0
    assert round(2.0**-1074, wide, "up") == wide.smallest_subnormal == 4


@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_the_codes_of_gfloat_are_ours(name):
    if parse_format(name).bits <= 16:
        for code in range(0, 1 << parse_format(name).bits, 1 if parse_format(name).bits <= 8 else 97):
            other = gfloat.decode_float(GFLOAT_FORMATS[name], code).fval
            assert decode(code, name) == as_value(float(other)), hex(code)
