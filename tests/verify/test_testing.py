"""`fpsim.testing` names every class of difference, catches wrong kernels, and its strategies draw only valid things."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fpsim
from fpsim import reference, testing, verify
from fpsim.formats import ROUNDINGS, SPECIALS, parse_format
from fpsim.rounding.carriers import CARRIERS
from fpsim.verify.codes import codes_of, tensor_of

ONE, SMALLEST, LARGEST, INFINITY, NAN = 0x3C00, 0x0001, 0x7BFF, 0x7C00, 0x7E00
MINUS = 0x8000


def half(*codes: int) -> torch.Tensor:
    return tensor_of(np.array(codes, np.uint16), torch.float16)


def report(*args, **kwargs) -> list[str]:
    with pytest.raises(AssertionError) as caught:
        testing.assert_bitwise_equal(*args, **kwargs)
    return str(caught.value).splitlines()


# -- classes of difference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want", "kind"),
    [
        (NAN, ONE, "NaN instead of a number"),
        (NAN, INFINITY, "NaN instead of a number"),
        (ONE, NAN, "number instead of NaN"),
        (INFINITY, NAN, "number instead of NaN"),
        (NAN | 1, NAN, "NaN payload"),
        (NAN | MINUS, NAN, "NaN payload"),
        (MINUS, 0, "sign of zero"),
        (0, MINUS, "sign of zero"),
        (ONE | MINUS, ONE, "sign"),
        (INFINITY, INFINITY | MINUS, "sign"),
        (INFINITY, LARGEST, "infinity instead of finite"),
        (LARGEST, INFINITY, "finite instead of infinity"),
        (ONE, INFINITY | MINUS, "finite instead of infinity"),
        (0, SMALLEST, "subnormal flushed to zero"),
        (MINUS, 0x83FF, "subnormal flushed to zero"),
        (0, 0x0400, "zero instead of a number"),
        (ONE, 0, "number instead of zero"),
        (SMALLEST, MINUS, "number instead of zero"),
        (ONE + 1, ONE, "one ulp off"),
        (ONE - 1, ONE, "one ulp off"),
        (LARGEST, LARGEST - 1, "one ulp off"),
        (ONE + 2, ONE, "value"),
        (SMALLEST | MINUS, SMALLEST + 1, "value"),
    ],
)
def test_every_class_of_difference_is_told_by_its_name(got, want, kind):
    got, want = (codes_of(half(ONE, code)) for code in (got, want))
    [difference] = testing.classify_differences(got, want, torch.float16)
    assert (difference.kind, difference.positions.tolist()) == (kind, [1])


@pytest.mark.parametrize(
    ("got", "want", "kind"),
    [
        (480.0, 448.0, "beyond the format"),
        (416.0, 448.0, "one unit of the format off"),
        (1.0, 1.125, "one unit of the format off"),
        (1.0, 0.9375, "one unit of the format off"),
        (1.25, 1.0, "value"),
        (-1.0, 1.125, "value"),
        (0.0, 2.0**-9, "subnormal flushed to zero"),
        (0.0, 2.0**-6, "zero instead of a number"),
    ],
)
def test_a_format_tells_more_classes(got, want, kind):
    codes = [codes_of(torch.tensor([each])) for each in (got, want)]
    [difference] = testing.classify_differences(*codes, torch.float32, "e4m3fn")
    assert difference.kind == kind


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_different_codes_belong_to_one_class_and_equal_ones_to_none(got, want):
    found = testing.classify_differences(codes_of(half(got)), codes_of(half(want)), torch.float16)
    assert len(found) == (got != want)
    assert all(each.kind in testing.DIFFERENCES for each in found)


def test_the_report_counts_the_classes_and_shows_bits_codes_values_and_inputs():
    got = half(ONE, MINUS, ONE, ONE, ONE + 1, NAN).reshape(2, 3)
    want = half(ONE, 0, ONE, ONE + 1, ONE, NAN | 1).reshape(2, 3)
    inputs = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert report(got, want, inputs=inputs, examples=1, message="mine") == [
        "mine: 3 of 6 elements differ (float16): 1 sign of zero, 2 one ulp off",
        "  sign of zero: two zeros of different signs",
        "    [0, 1] got 1|00000|0000000000 = 0x8000 = -0.0",
        "          want 0|00000|0000000000 = 0x0000 = 0.0",
        "          from 0|01111111|00000000000000000000000 = 0x3f800000 = 1.0",
        "  one ulp off: got a neighbour of what is due, among the numbers of the dtype",
        "    [1, 0] got 0|01111|0000000000 = 0x3c00 = 1.0",
        "          want 0|01111|0000000001 = 0x3c01 = 1.0009765625",
        "          from 0|10000000|10000000000000000000000 = 0x40400000 = 3.0",
        "    and 1 more",
    ]


def test_nan_payloads_and_signs_of_zero_count_if_asked_to():
    testing.assert_bitwise_equal(half(NAN, 0), half(NAN | 5, MINUS), signed_zeros=False)
    assert report(half(NAN), half(NAN | 5), nan_payloads=True)[0].endswith("1 NaN payload")
    assert report(half(0), half(MINUS))[0].endswith("1 sign of zero")


@pytest.mark.parametrize("dtype", list(CARRIERS), ids=str)
def test_equal_tensors_and_arrays_of_every_kind_pass(dtype):
    x = torch.tensor([[1.0, -0.0, float("nan")], [float("inf"), 3.5, 2.0**-14]], dtype=dtype)
    testing.assert_bitwise_equal(x.clone().requires_grad_(), x)
    testing.assert_bitwise_equal(x.t().contiguous().t(), x)
    if dtype != torch.bfloat16:
        testing.assert_bitwise_equal(x.numpy(), x)
        testing.assert_bitwise_equal(np.asfortranarray(x.numpy()), x.numpy())
    else:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        testing.assert_bitwise_equal(x.float().numpy().astype(ml_dtypes.bfloat16), x)
    testing.assert_bitwise_equal(x[0, 0], x[0, 0])
    testing.assert_bitwise_equal(x[:0], x[:0])


def test_other_dtypes_and_shapes_are_differences_and_other_things_are_errors():
    assert report(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == ["got torch.float32, want torch.float64"]
    assert report(torch.zeros(2), torch.zeros(3)) == ["got shape (2,), want (3,)"]
    assert report(torch.zeros(2), torch.zeros(2), inputs=torch.zeros(3))[0].startswith("inputs have shape (3,)")
    with pytest.raises(TypeError, match=r"got must be a tensor or an array of float64, .*, got Tensor of torch.int32"):
        testing.assert_bitwise_equal(torch.zeros(2, dtype=torch.int32), torch.zeros(2))
    with pytest.raises(TypeError, match=r"want must be .* got list: convert it first"):
        testing.assert_bitwise_equal(torch.zeros(2), [0.0, 0.0])


# -- functions -----------------------------------------------------------------------------------------------------


def ties_away_and_up_to_480(x: torch.Tensor) -> torch.Tensor:
    """A kernel with errors of other simulators: ties go away, the NaN code stands for 480, zero has no sign."""
    exponent = torch.frexp(x)[1] - 1
    unit = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    rounded = (x.sign() * (x.abs() / unit + 0.5).floor() * unit).clamp(-480, 480)
    return torch.where(x.isnan(), x, rounded)


def test_a_wrong_kernel_is_caught_and_its_errors_told_apart():
    with pytest.raises(AssertionError) as caught:
        testing.assert_rounds(ties_away_and_up_to_480, "e4m3fn", samples=1000, examples=1)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("e4m3fn nearest_even sat_finite on float32: ")
    kinds = [line.strip().partition(":")[0] for line in rest if line.startswith("  ") and line[2] != " "]
    assert kinds == ["sign of zero", "number instead of zero", "beyond the format", "one unit of the format off"]
    tie = "= 0x3a800000 = 0.0009765625"  # half of the smallest value, which goes to zero
    with pytest.raises(AssertionError, match=f"from .*{tie}"):
        testing.assert_rounds(ties_away_and_up_to_480, "e4m3fn", samples=0, examples=100)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("e5m2", torch.float16), ("e2m1fn", torch.float64), ("tf32", torch.float32)]
)
def test_right_kernels_pass(name, dtype, rounding):
    def function(x):
        return fpsim.round(x, name, rounding=rounding)

    testing.assert_rounds(function, name, rounding, dtype=dtype, samples=1000)
    other = "toward_zero" if rounding != "toward_zero" else "up"
    with pytest.raises(AssertionError, match=f"{other} .* on {str(dtype)[6:]}: .* elements differ"):
        testing.assert_rounds(function, name, other, dtype=dtype, samples=1000)


def test_a_kernel_may_return_an_array_and_work_in_place():
    testing.assert_rounds(lambda x: x.copy_(fpsim.round(x, "e4m3fn")).numpy(), "e4m3fn", samples=10)


def test_torch_rounds_to_the_formats_that_it_has():
    for name in ("bf16", "fp16"):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        testing.assert_rounds(lambda x, dtype=dtype: x.to(dtype).to(x.dtype), name, samples=4096)


def test_wrong_arguments_of_assert_rounds_are_errors():
    for arguments, message in [
        (("e4m3fm",), "did you mean e4m3fn"),
        (("e4m3fn", "stochastic"), "stochastic rounding depends on a random number"),
        (("e4m3fn", "up", "wrap"), "unknown overflow mode 'wrap'"),
    ]:
        with pytest.raises(ValueError, match=message):
            testing.assert_rounds(torch.clone, *arguments)
    with pytest.raises(ValueError, match="convert it to"):
        testing.assert_rounds(torch.clone, "bf16", dtype=torch.float16)


# -- strategies ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(testing.formats(max_bits=9))
def test_formats_are_formats_that_float32_carries(fmt):
    assert fmt.bits <= 9
    assert fmt.is_subset_of(CARRIERS[torch.float32])
    assert parse_format(fmt.name) == fmt
    assert fpsim.round(torch.tensor([0.3]), fmt, overflow="sat_finite").isfinite().all()


def test_formats_come_with_every_convention():
    seen = set()

    @settings(max_examples=400, deadline=None, database=None)
    @given(testing.formats(max_bits=6, named=False))
    def collect(fmt):
        seen.update([fmt.specials, ("subnormals", fmt.subnormals), ("signed", fmt.signed)])
        seen.add(("usual bias", fmt.bias == fmt.default_bias))

    collect()
    flags = {(name, value) for name in ("subnormals", "signed", "usual bias") for value in (True, False)}
    assert seen >= {*SPECIALS} | flags


@settings(deadline=None)
@given(st.sampled_from(["e4m3fn", "e2m1fn", "e5m2"]), st.sampled_from(ROUNDINGS), st.data())
def test_values_near_boundaries_are_near_a_change_of_the_result_or_a_result(name, rounding, data):
    number = data.draw(testing.values_near_boundaries(name, rounding, radius=1, allow_nan=False))
    carrier = CARRIERS[torch.float32]
    code = int(codes_of(torch.tensor([number]))[0])
    assert torch.tensor([number]).double().item() == number
    judged = verify.judge(name, rounding)
    around = np.array([(code + step) % (1 << 32) for step in (-2, -1, 0, 1, 2)], np.uint32)
    results = judged.expected(around)
    special = {0, 1 << carrier.mantissa_bits, carrier.max_code + 1, carrier.nan_code, carrier.sign_code - 1}
    specials = special | {code | carrier.sign_code for code in special}
    is_near = len(set(results.tolist())) > 1 or set(around.tolist()) & (set(judged.results.tolist()) | specials)
    assert is_near, hex(code)


@settings(deadline=None)
@given(testing.tensors("e3m2fn", dtype=torch.float16))
def test_tensors_of_a_format_hold_its_values_alone(x):
    assert x.dtype == torch.float16 and x.is_contiguous() and x.dim() <= 3 and all(size <= 5 for size in x.shape)
    testing.assert_bitwise_equal(fpsim.round(x, "e3m2fn"), x)


@settings(deadline=None)
@given(testing.tensors(torch.bfloat16, (2, 3), allow_nan=False, allow_infinity=False))
def test_tensors_of_a_dtype_have_the_shape_and_the_numbers_asked_for(x):
    assert x.dtype == torch.bfloat16 and x.shape == (2, 3)
    assert x.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(testing.tensors("fp64", st.tuples(st.integers(1, 4))), testing.tensors("tf32", ()))
def test_tensors_take_strategies_of_shapes_and_wide_formats(x, y):
    assert (x.dtype, x.dim(), y.dtype, y.shape) == (torch.float64, 1, torch.float32, ())
    assert reference.is_nan(y.item()) or reference.round(y.item(), "tf32") == reference.as_value(y.item())


def test_wrong_arguments_of_strategies_are_errors():
    for call, error, message in [
        (lambda: testing.formats(max_bits=2), ValueError, "use 3 or more"),
        (lambda: testing.formats(dtype=torch.int8), TypeError, "torch.int8 is not a carrier"),
        (lambda: testing.values_near_boundaries("fp32"), ValueError, "too many values for a table"),
        (lambda: testing.values_near_boundaries("e4m3fn", radius=-1), ValueError, "radius=-1"),
        (lambda: testing.tensors(torch.int8), TypeError, "torch.int8 is not a carrier"),
        (lambda: testing.tensors(torch.float16, dtype=torch.float32), TypeError, "two dtypes"),
        (lambda: testing.tensors("bf16", dtype=torch.float16), ValueError, "convert it to torch.float32"),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("call", [testing.formats, lambda: testing.values_near_boundaries("e4m3fn"), testing.tensors])
def test_strategies_without_hypothesis_say_what_to_install(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install hypothesis, or pip install 'fpsim-torch\[dev\]'"):
        call()
