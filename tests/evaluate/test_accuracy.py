"""`accuracy` against errors that are computed in another way: by ml_dtypes, by mpmath directly, or planted."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import mpmath
import numpy
import pytest
import torch

import fpsim
from fpsim.evaluate import accuracy


def ulps_by_hand(values, exact, dtype) -> numpy.ndarray:
    """Errors in the spacing of ``dtype`` at the exact values, by numpy."""
    spacing = numpy.abs(numpy.spacing(exact.astype(dtype))).astype(float)
    below = numpy.abs(exact.astype(dtype).astype(float)) > numpy.abs(exact)  # rounded up, perhaps into the next binade
    power = numpy.log2(numpy.abs(exact.astype(dtype).astype(float))) % 1 == 0
    return (values - exact) / numpy.where(below & power, spacing / 2, spacing)


def test_all_inputs_of_half_precision_are_measured_against_double_precision():
    result = accuracy(torch.exp, "fp16", low=-3, high=3)
    codes = numpy.arange(2**16, dtype=numpy.uint16).view(numpy.float16)
    x = numpy.unique(codes[(numpy.abs(codes) <= 3)].astype(float))
    assert result.exhaustive and result.inputs.tolist() == x.tolist()
    exact = numpy.exp(x)
    got = torch.exp(torch.from_numpy(x).half()).double().numpy()
    want = ulps_by_hand(got, exact, numpy.float16)
    numpy.testing.assert_allclose(result.errors.numpy(), want, atol=1e-9)
    floor = numpy.abs(ulps_by_hand(exact.astype(numpy.float16).astype(float), exact, numpy.float16))
    assert result.maximum == pytest.approx(numpy.abs(want).max(), abs=1e-9)
    assert result.median == pytest.approx(numpy.median(numpy.abs(want)), abs=1e-9)
    assert (result.floor_maximum, result.floor_median) == pytest.approx((floor.max(), numpy.median(floor)), abs=1e-9)
    assert result.correct == numpy.mean(got == exact.astype(numpy.float16))
    assert (result.undefined, result.unexpected, result.nonfinite, result.seams) == (0, 0, 0, ())


def test_formats_without_a_dtype_get_their_values_in_float32():
    seen = []

    def scaled(x):
        seen.append(x)
        return x * 1.03

    result = accuracy(scaled, "e4m3fn", low=-448, high=448, exact=lambda x: x * mpmath.mpf(103) / 100)
    values = numpy.arange(256, dtype=numpy.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)
    values = numpy.unique(values[numpy.isfinite(values)])
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == values.tolist()
    x = values[(values > 1) & (values < 200)]
    unit = 2.0 ** (numpy.floor(numpy.log2(x * 1.03)) - 3)
    got = {a: e for a, e in zip(result.inputs.tolist(), result.errors.tolist(), strict=True)}
    want = (numpy.float32(x) * numpy.float32(1.03) - x * 1.03) / unit
    assert [got[a] for a in x] == pytest.approx(want.tolist(), abs=1e-6)


def test_worst_inputs_have_their_codes_and_exact_values():
    result = accuracy(torch.special.i0e, "fp32", low=0, high=50, samples=300, worst=3)
    assert not result.exhaustive and result.count > 300 and result.inputs.max() == 50
    assert [w.ulps for w in result.worst] == sorted(result.errors.abs().tolist(), reverse=True)[:3]
    for worst in result.worst:
        assert torch.tensor(int(worst.code, 16), dtype=torch.int32).view(torch.float32) == worst.input
        with mpmath.workdps(40):
            exact = mpmath.exp(-mpmath.mpf(worst.input)) * mpmath.besseli(0, worst.input)
            assert abs(mpmath.mpf(worst.exact) / exact - 1) < mpmath.mpf(10) ** -19
            unit = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(exact, 2)) - 23)
            assert worst.ulps == pytest.approx(float(abs(worst.result - exact) / unit), rel=1e-9)
        assert torch.special.i0e(torch.tensor(worst.input, dtype=torch.float32)) == worst.result
    again = accuracy(torch.special.i0e, "fp32", low=0, high=50, samples=300)
    assert torch.equal(again.errors, result.errors)


def test_a_planted_seam_is_found_where_it_is():
    def planted(x):
        exact = torch.exp(x.double())
        return torch.where(x > 1.5, torch.nextafter(exact.half(), torch.tensor(9e4).half()), exact.half())

    result = accuracy(planted, "fp16", low=1, high=2, exact="exp")
    (seam,) = result.seams
    assert seam.below == 1.5 and seam.above == 1.5 + 2**-10 and seam.jump == 1
    assert 1 < result.maximum <= 1.5


def test_functions_by_name_by_mpmath_and_of_rows():
    def gelu(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    def softmax(x):
        return torch.stack([x, torch.zeros_like(x)], -1).softmax(-1)[..., 0]

    def log_bessel(x, order=500):
        s = torch.sqrt(order * order + x * x)
        p = order / s
        log = s + order * torch.log(x / (order + s)) - 0.5 * torch.log(2 * torch.pi * s)
        return log + torch.log1p((3 * p - 5 * p**3) / (24 * order))

    def exact_log_bessel(x):
        return mpmath.log(mpmath.besseli(500, x))

    tanh, erf = (accuracy(gelu, "bf16", low=-6, high=-2, exact=name) for name in ("gelu_tanh", "gelu"))
    assert tanh.maximum < erf.maximum and erf.maximum > 20  # the tanh form is another function far from zero
    assert accuracy(softmax, "fp16", low=-1, high=1, exact="sigmoid").maximum < 0.51
    result = accuracy(log_bessel, "fp32", low=100, high=1000, samples=50, exact=exact_log_bessel)
    worst = result.worst[0]
    with mpmath.workdps(30):
        exact = mpmath.log(mpmath.besseli(500, worst.input))
        ulp = 2.0 ** (math.floor(mpmath.log(abs(exact), 2)) - 23)
        assert worst.ulps == pytest.approx(float(abs(worst.result - exact)) / ulp, rel=1e-9)
    assert result.maximum > 1 > result.floor_maximum
    assert accuracy(torch.sinh, "e5m2", low=-4, high=4, exact="sinh").maximum == pytest.approx(
        accuracy(torch.sinh, "e5m2", low=-4, high=4).maximum
    )


def test_domains_infinities_and_nan_are_counted():
    result = accuracy(torch.log, "fp16", low=-1, high=1)
    assert result.undefined == 0x3C00 and result.unexpected == 0 and result.count == 0x3C01
    assert result.errors[0] == 0  # the logarithm of zero
    result = accuracy(lambda x: x.abs().sqrt(), "e5m2", low=-1, high=1, exact="sqrt")
    assert result.unexpected == result.undefined == 60
    large = accuracy(torch.exp, "fp16", low=11, high=12)
    assert large.nonfinite == 0 and large.maximum < 1 and (large.errors[-1], large.floor_maximum < 0.51) == (0, True)
    result = accuracy(lambda x: torch.where(x == 1, torch.nan, x.exp()), "e5m2", low=0.5, high=2, exact="exp")
    assert result.nonfinite == 1 and result.maximum == math.inf and result.worst[0].input == 1
    assert math.isfinite(result.median)


def test_double_precision_and_compiled_functions():
    compiled = torch.compile(lambda x: x * x + x, backend="eager")
    result = accuracy(compiled, "fp64", low=-2, high=-1, samples=50, exact=lambda x: x * x + x)
    for point, error in zip(result.inputs.tolist(), result.errors.tolist(), strict=True):
        exact = Fraction(point) ** 2 + Fraction(point)
        got = Fraction(point * point + point)
        if exact:
            unit = Fraction(2) ** (math.frexp(float(exact))[1] - 53)
            assert error == pytest.approx(float((got - exact) / unit), rel=1e-9)
    assert result.worst[0].code.startswith("0xbff")


def test_exact_values_that_cancel_get_more_digits():
    def gelu(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    with mpmath.workdps(700):
        u = mpmath.sqrt(2 / mpmath.pi) * (20 + mpmath.mpf(20) ** 3 * 44715 / 10**6)
        exact = -20 / (1 + mpmath.exp(2 * u))  # 1 - tanh(u) without the difference, 1e-261
        ulps = float(-exact / mpmath.mpf(2) ** (mpmath.floor(mpmath.log(-exact, 2)) - 52))
    assert gelu(torch.tensor(-20.0).double()) == 0
    assert accuracy(gelu, "fp64", low=-20, high=-20, exact="gelu_tanh").maximum == pytest.approx(ulps, rel=1e-12)
    half = accuracy(
        lambda x: x * 0 + 0.5, "fp32", low=1e-30, high=1.000001e-30, exact=lambda x: (1 - mpmath.cos(x)) / x**2
    )
    assert half.count == 11 and half.maximum < 1e-50
    with pytest.raises(ValueError, match=r"with 960 digits at 1\.0, and .* with 1920: choose a form"):
        accuracy(torch.exp, "e4m3fn", low=1, high=1, exact=lambda x: x + mpmath.mpf(10) ** -mpmath.mp.dps - x)
    zero = accuracy(torch.relu, "e4m3fn", low=-1, high=1, exact=lambda x: x if x > 0 else 0.0)
    assert zero.maximum == 0 and zero.count == 113
    third = accuracy(lambda x: x / 3, "e4m3fn", low=1, high=1, exact=lambda x: Fraction(1, 3))
    assert third.worst[0].exact == "0.33333333333333333333"
    pi = accuracy(lambda x: x * math.pi, "fp64", low=1, high=1, exact=lambda x: mpmath.pi)
    assert pi.correct == 1 and pi.maximum == pytest.approx(1.2246467991473532e-16 / 2**-51)


def test_exact_functions_are_called_about_once_for_each_input():
    calls = []

    def exp(x):
        calls.append(x)
        return mpmath.exp(x)

    result = accuracy(torch.exp, "bf16", low=1, high=2, exact=exp)
    assert result.count == 129 and len(calls) == 129 + 9 + 5 - 1  # every 16th, and the five listed, of which one is
    assert result.maximum == accuracy(torch.exp, "bf16", low=1, high=2).maximum

    def wrong_with_few_digits(x):
        return x + (mpmath.mpf(10) ** (58 - mpmath.mp.dps) if x == 1 + 3 / 128 else 0)

    assert accuracy(lambda x: x, "bf16", low=1, high=2, exact=wrong_with_few_digits).maximum < 1e-50


def test_ranges_may_be_those_of_the_whole_format():
    whole = accuracy(torch.exp, "e8m1", low=-3e38, high=3e38)
    assert whole.count == 2 * 509 + 1 and whole.nonfinite == 0 and whole.maximum < 1
    assert whole.errors[-1] == 0 and whole.errors[0] == 0
    huge = accuracy(lambda x: x.exp().clamp(max=1), "e8m1", low=2.0**127, high=2.0**127, exact="exp")
    with mpmath.workdps(60):
        assert (huge.maximum, huge.worst[0].exact) == (2, mpmath.nstr(mpmath.exp(2**127), 20))
    mixed = accuracy(lambda x: x, "fp64", low=-1.7e308, high=1.7e308, samples=2000, exact=lambda x: x)
    starts = mixed.inputs.abs().frexp().mantissa.sub(0.75).abs() > 0.2499999  # of binades, and their neighbours
    drawn = mixed.inputs[~starts]
    assert len(drawn) > 1900 and 0.45 < (drawn > 0).double().mean() < 0.55
    saturated = accuracy(lambda x: torch.where(x > 6, torch.nan, x.exp()), "e4m3fn", low=6, high=7, exact="exp")
    assert (saturated.nonfinite, saturated.count) == (2, 3)  # 448 stands for what lies above


def test_results_are_shown_as_text_html_and_plots():
    pytest.importorskip("matplotlib")
    result = accuracy(torch.tanh, "e4m3fn", low=-2, high=2)
    for text in (str(result), result._repr_html_()):
        assert all(word in text for word in ("tanh in e4m3", "correctly rounded", result.worst[0].code, "ulps"))
    assert result.plot().get_lines()[0].get_ydata().tolist() == result.errors.tolist()


def test_wrong_input_is_refused_with_a_remedy():
    cases = [
        (torch.exp, {"low": 2, "high": 1}, ValueError, "low at most high"),
        (torch.exp, {"low": 0, "high": math.inf}, ValueError, "must be finite"),
        (torch.exp, {"low": 1.01, "high": 1.02}, ValueError, r"e4m3fn has no value from 1\.01 to 1\.02"),
        (torch.log, {"low": -2, "high": -1}, ValueError, "all inputs from -2 to -1 lie outside of the domain"),
        (lambda x: x, {"low": 0, "high": 1}, ValueError, "pass exact="),
        (lambda x: x, {"low": 0, "high": 1, "exact": "expp"}, ValueError, "unknown exact function 'expp'.*exp"),
        (lambda x: x[:2], {"low": 0, "high": 1, "exact": "exp"}, ValueError, r"elementwise: it returns shape \(2,\)"),
        (lambda x: x > 0, {"low": 0, "high": 1, "exact": "exp"}, TypeError, r"got torch\.bool"),
        (lambda x: 3.0, {"low": 0, "high": 1, "exact": "exp"}, TypeError, "got float"),
        (torch.exp, {"low": 1, "high": 1, "exact": math.exp}, TypeError, "got 2.718281828459045: Python's own floats"),
        (torch.exp, {"low": 1, "high": 1, "exact": lambda x: x > 0}, TypeError, "must return a number .* got True"),
        (
            torch.exp,
            {"low": 1, "high": 1, "exact": torch.exp},
            TypeError,
            r"exact function fails at 1\.0: .* one number of",
        ),
        (torch.exp, {"low": 1, "high": 1, "exact": lambda x: None}, TypeError, "must return a number .* got None"),
        (
            torch.add,
            {"low": 0, "high": 1, "exact": "exp"},
            ValueError,
            r"add fails on a tensor .* take one tensor .*\(add",
        ),
        (
            math.exp,
            {"low": 0, "high": 1, "exact": "exp"},
            ValueError,
            "exp fails on a tensor of 57 inputs of dtype torch.float32",
        ),
        (torch.exp, {"low": 0, "high": 1, "samples": -1}, ValueError, "must not be negative, got -1 and 5"),
        (torch.exp, {"low": 0, "high": 1, "worst": -1}, ValueError, "must not be negative, got 4096 and -1"),
    ]
    for function, options, error, message in cases:
        with pytest.raises(error, match=message):
            accuracy(function, "e4m3fn", **options)
    with pytest.raises(ValueError, match="unknown format"):
        accuracy(torch.exp, "fp17", low=0, high=1)
    assert fpsim.evaluate.accuracy is accuracy
