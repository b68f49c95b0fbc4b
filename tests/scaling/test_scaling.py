"""Scales, judged by their definition in exact rationals, and scaled rounding, judged by the reference."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.formats import FloatFormat, parse_format
from fpsim.reference import Special
from fpsim.scaling.ops import SCALE_OPERATORS
from fpsim.scaling.scale import MX_RULES, NV_RULES, RULES, Scale, parse_scale

FORMATS = ("e4m3fn", "e5m2", "e2m1fn", "e3m2fn", "e8m3", "e4m3fnuz", "e8m0fnu", "e4m3:bias=30", "e5m2:bias=-3")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LIMITS = {torch.float64: 1022, torch.float32: 126, torch.bfloat16: 126}


def suited(dtype: torch.dtype) -> list[str]:
    carriers = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    return [name for name in FORMATS if parse_format(name).is_subset_of(parse_format(carriers[dtype]))]


def exponent_of_scale(amax: Fraction, fmt: FloatFormat, limit: int) -> int:
    """The largest ``k`` with ``amax * 2**k <= fmt.max``, by trial."""
    k = math.floor(math.log2(fmt.max)) - (amax.numerator.bit_length() - amax.denominator.bit_length()) + 2
    while amax * Fraction(2) ** k > Fraction(fmt.max):
        k -= 1
    return max(-limit, min(limit, k))


def same(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, except that all NaNs count as equal."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


@given(st.data())
def test_the_scale_is_the_largest_power_of_two_within_the_range(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    fmt = parse_format(data.draw(st.sampled_from(suited(dtype))))
    width = 64 if dtype == torch.float64 else 32
    number = data.draw(st.floats(width=width, allow_nan=False, allow_infinity=False))
    x = torch.tensor([[0.0, number], [number / 3, -number]], dtype=torch.float64).to(dtype)
    amax = Fraction(float(x.abs().max())) if x.isfinite().all() else Fraction(0)
    want = 2.0 ** exponent_of_scale(amax, fmt, LIMITS[dtype]) if amax else 1.0
    got = fpsim.power_of_two_scale(x, fmt)
    assert (got.dtype, got.shape, float(got)) == (dtype, (), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beside_the_largest_value_of_the_format(dtype: torch.dtype) -> None:
    for name in suited(dtype):
        fmt = parse_format(name)
        edge = torch.tensor(fmt.max, dtype=dtype)
        above = torch.nextafter(edge, torch.tensor(math.inf, dtype=dtype))
        if above.isfinite():
            assert float(fpsim.power_of_two_scale(above[None], fmt)) == 0.5
        assert float(fpsim.power_of_two_scale(edge[None], fmt)) == 1
        assert float(fpsim.power_of_two_scale(edge[None] / 4, fmt)) == 4
        assert float(fpsim.power_of_two_scale(above[None] / 4, fmt)) == (2 if above.isfinite() else 1)


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0fnu", "e4m3:bias=30", "e2m1:bias=100", "e5m2:bias=-90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_at_the_ends_of_the_dtype(dtype: torch.dtype, name: str) -> None:
    """Every subnormal binade, the first normal ones and the last, where the scale meets its limits."""
    fmt, info = parse_format(name), torch.finfo(dtype)
    first = math.frexp(info.smallest_normal * info.eps)[1] - 1  # log2 of the smallest subnormal
    lowest = [2.0**power for power in range(first, 3 - LIMITS[dtype])]
    ends = torch.tensor([*lowest, info.smallest_normal, info.max / 2, info.max], dtype=torch.float64)
    magnitudes = torch.cat([ends, ends * (1 + info.eps), ends * 0.75]).to(dtype)
    for amax in magnitudes[magnitudes.isfinite() & (magnitudes > 0)]:
        want = 2.0 ** exponent_of_scale(Fraction(float(amax)), fmt, LIMITS[dtype])
        assert float(fpsim.power_of_two_scale(-amax[None], fmt)) == want, float(amax).hex()


@pytest.mark.parametrize("bad", [0.0, -0.0, math.inf, -math.inf, math.nan])
def test_without_a_usable_magnitude_the_scale_is_one(bad: float) -> None:
    x = torch.tensor([bad, 0.0])
    assert float(fpsim.power_of_two_scale(x, "e4m3fn")) == 1
    if not math.isfinite(bad):
        x = torch.tensor([1e-3, bad, 3.0])
        assert float(fpsim.power_of_two_scale(x, "e4m3fn")) == 1
        same(fpsim.round(x, "e5m2", scale="power_of_two"), fpsim.round(x, "e5m2"))


def test_the_scale_of_an_empty_tensor_is_one() -> None:
    for shape in ((0,), (3, 0), (0, 4)):
        assert float(fpsim.power_of_two_scale(torch.empty(shape), "e4m3fn")) == 1
        assert fpsim.round(torch.empty(shape), "e4m3fn", scale="power_of_two").shape == shape


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "to_odd"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e4m3fnuz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rounding_is_the_reference_on_scaled_numbers(dtype: torch.dtype, name: str, rounding: str) -> None:
    fmt = parse_format(name)
    for power in (-60, -9, 0, 40):
        x = (torch.randn(50, dtype=torch.float64).exp() * torch.randn(50) * 2.0**power).to(dtype)
        exact = [Fraction(float(value)) for value in x]
        k = exponent_of_scale(max(map(abs, exact)), fmt, LIMITS[dtype])
        want = [reference.round(value * Fraction(2) ** k, fmt, rounding) for value in exact]
        values = [0.0 if v is Special.NEGATIVE_ZERO else float(v) * 2.0**-k for v in want]
        got = fpsim.round(x, fmt, rounding=rounding, scale="power_of_two")
        assert got.tolist() == values


def test_scaled_rounding_equals_multiplying_rounding_and_dividing() -> None:
    x = torch.randn(1000) * 1e-5
    scale = fpsim.power_of_two_scale(x, "e4m3fn")
    same(fpsim.round(x, "e4m3fn", scale="power_of_two"), fpsim.round(x * scale, "e4m3fn") / scale)
    drawn = fpsim.round(x, "e4m3fn", rounding="stochastic", seed=3, salt=5, scale="power_of_two")
    same(drawn, fpsim.round(x * scale, "e4m3fn", rounding="stochastic", seed=3, salt=5) / scale)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_as_eager(dtype: torch.dtype, dynamic: bool) -> None:
    def scaled(x: Tensor) -> Tensor:
        return fpsim.round(x, "e4m3fn", scale="power_of_two")

    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, dynamic=dynamic)
    for shape in ((), (7,), (33, 65), (0, 5)):
        for power in (0, -130, 60):
            x = torch.randn(shape, dtype=torch.float64).mul(2.0**power).to(dtype)
            same(compiled(x), scaled(x))
    x = torch.randn(6, 8, 10, dtype=dtype)
    same(compiled(x.transpose(0, 2)[::2]), scaled(x.transpose(0, 2)[::2]))
    for special in (math.inf, math.nan, 0.0):
        x = torch.full((40,), special, dtype=dtype)
        x[3] = 0.0
        same(compiled(x), scaled(x))


def test_each_sample_of_vmap_has_its_scale() -> None:
    x = torch.randn(4, 30) * torch.tensor([1e-6, 1.0, 1e5, 0.0])[:, None]
    want = torch.stack([fpsim.round(row, "e4m3fn", scale="power_of_two") for row in x])
    same(torch.vmap(lambda row: fpsim.round(row, "e4m3fn", scale="power_of_two"))(x), want)
    scales = [fpsim.power_of_two_scale(row, "e4m3fn") for row in x]
    same(torch.vmap(lambda row: fpsim.power_of_two_scale(row, "e4m3fn"))(x), torch.stack(scales))
    by_column = torch.vmap(lambda row: fpsim.round(row, "e4m3fn", scale="power_of_two"), in_dims=1, out_dims=1)
    same(by_column(x.T), want.T)


@pytest.mark.parametrize("gradient", ["straight_through", "clipped"])
def test_the_scale_does_not_affect_the_derivative(gradient: str) -> None:
    def value(x: Tensor) -> Tensor:
        return (fpsim.round(x, "e4m3fn", scale="power_of_two", gradient=gradient) * weights).sum()

    weights, x = torch.randn(50), torch.randn(50) * 1e6
    assert torch.equal(torch.func.grad(value)(x), weights)
    assert torch.equal(torch.func.jvp(value, (x,), (torch.ones(50),))[1], weights.sum())
    leaf = x.clone().requires_grad_()
    value(leaf).backward()
    assert torch.equal(leaf.grad, weights)
    assert not fpsim.power_of_two_scale(leaf, "e4m3fn").requires_grad


def test_float16_is_refused_with_the_remedy() -> None:
    x = torch.ones(3, dtype=torch.float16)
    for call in (
        lambda: fpsim.power_of_two_scale(x, "e4m3fn"),
        lambda: fpsim.round(x, "e4m3fn", scale="power_of_two"),
    ):
        with pytest.raises(ValueError, match="float16 tensors would overflow: convert them to bfloat16 or float32"):
            call()


def test_the_error_for_an_unknown_scale_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown scale 'amax': use one of power_of_two, tensor"):
        fpsim.round(torch.ones(3), "e4m3fn", scale="amax")


def test_the_dtype_must_hold_the_format() -> None:
    with pytest.raises(ValueError, match=r"e5m10 has values that torch.bfloat16 lacks|fp16 has values"):
        fpsim.power_of_two_scale(torch.ones(3, dtype=torch.bfloat16), "e5m10")
    with pytest.raises(TypeError, match=r"cannot round a tensor of torch\.int64"):
        fpsim.power_of_two_scale(torch.ones(3, dtype=torch.int64), "e4m3fn")


def test_every_rule_has_an_operator_and_a_name() -> None:
    assert set(SCALE_OPERATORS) <= set(RULES)
    for rule in RULES:
        kind = "block:16" if rule in (*MX_RULES, *NV_RULES) else "group:16" if rule == "double" else "tensor"
        scale = Scale(rule, kind)
        assert parse_scale(str(scale)) == scale


@pytest.mark.parametrize("field", ["rule", "granularity", "timing"])
def test_a_scale_of_an_unknown_kind_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {field} 'amax' of a scale: use one of "):
        Scale(**{"rule": "power_of_two", field: "amax"})
