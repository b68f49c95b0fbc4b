"""`fpsim.encode` and `fpsim.decode`: codes of tensors, judged by the reference and by the bits of ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

import fpsim
from fpsim import reference
from fpsim.formats import NAMED_FORMATS, ROUNDINGS, FloatFormat, parse_format
from fpsim.tensor_functions import code_dtype
from tests.shared.formats import overflows
from tests.shared.judge import (
    CARRIERS,
    assert_codes,
    assert_same_bits,
    canonical,
    codes_of,
    interesting,
    random_inputs,
    specials,
    suits,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [
    *NAMED_FORMATS,
    "e1m2", "e2m0", "e3m0fn", "e4m0", "e4m3:nosubnormals", "e4m3:unsigned", "e3m2finite:unsigned", "e4m2fnuz",
    "e5m2:bias=126", "e5m2:bias=140", "e3m2:bias=-5", "e4m3fn:nosubnormals:unsigned",
    "e3m3finite:bias=127:nosubnormals", "e4m2:nosubnormals:unsigned:nozero",
    "e4m2:bias=127:nosubnormals:unsigned:nozero", "e5m10fn", "e6m9fnuz", "e8m6", "e8m22", "e11m51", "e10m21",
    "e11m19:unsigned", "e10m20", "e5m26:unsigned",
]  # fmt: skip
CASES = [(name, dtype) for name in NAMES for dtype in CARRIERS if suits(parse_format(name), dtype)]


def codes_in(fmt: FloatFormat) -> list[int]:
    """All codes of a narrow format; for a wide one, codes around its special ones, and random codes."""
    if fmt.bits <= 12:
        return list(range(1 << fmt.bits))
    special = [0, fmt.sign_code, fmt.max_code, fmt.nan_code or 0, 1 << fmt.mantissa_bits, 1 << fmt.bits]
    around = {code + step for code in special for step in (-2, -1, 0, 1, 2)}
    around |= {(1 << k) + step for k in range(fmt.bits) for step in (-1, 0, 1)}
    some = np.random.default_rng(3).integers(0, 1 << fmt.bits, 2000, np.uint64).tolist()
    return sorted({code for code in (*around, *some) if 0 <= code < 1 << fmt.bits})


def tensor_of_codes(codes: list[int], fmt: FloatFormat) -> torch.Tensor:
    """The codes as `encode` returns them: 64-bit codes in two's complement."""
    return torch.from_numpy(np.array(codes, np.uint64).view(np.int64)).to(code_dtype(fmt))


def listed(codes: torch.Tensor, fmt: FloatFormat) -> list[int]:
    return [code & ((1 << fmt.bits) - 1) for code in codes.tolist()]


# -- decode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_every_code_has_the_value_of_the_reference(name, dtype):
    fmt = parse_format(name)
    codes = codes_in(fmt)
    got = fpsim.decode(tensor_of_codes(codes, fmt), name, dtype)
    assert got.dtype == dtype
    values = [reference.decode(code, fmt) for code in codes]
    want = [reference.encode(value, CARRIERS[dtype]) for value in values]
    width = CARRIERS[dtype].bits // 8
    assert_codes(canonical(codes_of(got), dtype), np.array(want, f"u{width}"), np.array(codes, np.uint64), name)


@pytest.mark.parametrize("name", sorted(name for name in vars(ml_dtypes) if "float" in name))
def test_codes_are_the_bits_of_ml_dtypes(name):
    fmt, dtype = parse_format(name), getattr(ml_dtypes, name)
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    want = torch.from_numpy(codes.view(dtype).astype(np.float32))
    got = fpsim.decode(torch.from_numpy(codes.astype(np.int64)), name)
    assert_codes(*(canonical(codes_of(x), torch.float32) for x in (got, want)), codes, name)
    numbers = ~np.isnan(want.numpy())
    assert_codes(fpsim.encode(want, name).numpy().astype(codes.dtype)[numbers], codes[numbers], codes[numbers], name)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
def test_codes_of_any_integer_dtype_decode(dtype):
    codes = torch.tensor([0, 0x38, 0x7E, 0x7F]).to(dtype)
    assert fpsim.decode(codes, "e4m3fn")[:3].tolist() == [0, 1, 448]


# -- encode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_encode_undoes_decode(name, dtype):
    """Other NaNs, and zeros with mantissa bits in a format without subnormals, become the canonical ones."""
    fmt = parse_format(name)
    codes = codes_in(fmt)
    back = listed(fpsim.encode(fpsim.decode(tensor_of_codes(codes, fmt), name, dtype), name), fmt)
    want = [reference.encode(reference.decode(code, fmt), fmt) for code in codes]
    assert_codes(*(np.array(c, np.uint64) for c in (back, want, codes)), name)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_encode_rounds_first(name, dtype):
    fmt = parse_format(name)
    x = (interesting.__wrapped__(fmt, dtype).sample(300) | random_inputs(fmt, dtype, 100)).tensor
    for rounding in ROUNDINGS:
        for overflow in overflows(fmt):
            rounded = fpsim.round(x, name, rounding=rounding, overflow=overflow)
            codes = fpsim.encode(x, name, rounding=rounding, overflow=overflow)
            assert codes.dtype == code_dtype(fmt)
            back = fpsim.decode(codes, name, dtype)
            assert_codes(*(canonical(codes_of(y), dtype) for y in (back, rounded)), codes_of(x), (rounding, overflow))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_reference(name):
    fmt = parse_format(name)
    dtype = torch.float32 if suits(fmt, torch.float32) else torch.float64
    inputs = interesting(fmt, dtype).sample(60) | specials(dtype).sample(20) | random_inputs(fmt, dtype, 40)
    for rounding in ROUNDINGS:
        for overflow in overflows(fmt):
            got = listed(fpsim.encode(inputs.tensor, name, rounding=rounding, overflow=overflow), fmt)
            want = [reference.encode(x, fmt, rounding, overflow) for x in inputs.values.tolist()]
            assert_codes(np.array(got, np.uint64), np.array(want, np.uint64), inputs.codes, (rounding, overflow))


@pytest.mark.parametrize("dtype", CARRIERS, ids=str)
def test_all_nans_have_the_same_code(dtype):
    nans = specials(dtype).tensor
    nans = nans[nans.isnan()]
    assert len(nans) > 100 or dtype.itemsize == 2
    for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e4m3", "e3m4", "e2m1:fn"):
        assert set(fpsim.encode(nans, name).tolist()) == {parse_format(name).nan_code}
    assert set(fpsim.encode(nans, "e2m1fn").tolist()) == {7}, "the largest finite value where there is no NaN"


def test_signed_zeros_have_their_codes():
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert fpsim.encode(zeros, "e4m3fn").tolist() == [0, 0x80, 0, 0x80]
    assert fpsim.encode(zeros, "e2m1fn").tolist() == [0, 8, 0, 8]
    assert fpsim.encode(zeros, "e4m3fnuz").tolist() == [0, 0, 0, 0]
    assert torch.signbit(fpsim.decode(torch.tensor([0, 0x80]), "e4m3fn")).tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e2m1fn", torch.uint8), ("e4m3fn", torch.uint8), ("e8m0fnu", torch.uint8), ("e4m4", torch.int32),
     ("bf16", torch.int32), ("e8m22", torch.int32), ("fp32", torch.int64), ("e9m22", torch.int64),
     ("fp64", torch.int64)],
)  # fmt: skip
def test_the_dtype_of_codes(name, dtype):
    assert code_dtype(name) == fpsim.encode(torch.ones(2, dtype=torch.float64), name).dtype == dtype


def test_codes_of_32_bits_are_not_negative_and_of_64_bits_are_twos_complement():
    assert fpsim.encode(torch.tensor([-1.0]), "fp32").tolist() == [0xBF800000]
    assert fpsim.encode(torch.tensor([-2.0], dtype=torch.float64), "fp64").tolist() == [0xC000000000000000 - (1 << 64)]
    assert fpsim.decode(torch.tensor([0xBF800000]), "fp32").tolist() == [-1.0]
    assert fpsim.decode(torch.tensor([0xC000000000000000 - (1 << 64)]), "fp64", torch.float64).tolist() == [-2.0]


# -- shapes, derivative, compiled ----------------------------------------------------------------------------------


SHAPES = {
    "zero-dimensional": torch.tensor(1.5),
    "empty": torch.zeros(0),
    "empty with sizes": torch.zeros(2, 0),
    "transposed": torch.randn(5, 4).T,
    "every second": torch.randn(9)[::2],
    "expanded": torch.randn(3, 1).expand(3, 4),
}


@pytest.mark.parametrize("x", SHAPES.values(), ids=SHAPES.keys())
def test_any_shape(x):
    codes = fpsim.encode(x, "e4m3fn")
    assert codes.shape == x.shape
    assert_same_bits(fpsim.decode(codes, "e4m3fn"), fpsim.round(x, "e4m3fn"), x)


def test_codes_have_no_derivative():
    x = torch.ones(3, requires_grad=True)
    assert not fpsim.encode(x, "e4m3fn").requires_grad


@pytest.mark.parametrize("name", ["e4m3fn", "fp32", "e8m0fnu"])
def test_compiled_codes_are_those_of_eager(name):
    x = specials(torch.float32).tensor

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = fpsim.encode(x, name)
        return codes, fpsim.decode(codes, name)

    torch.compiler.reset()
    codes, values = torch.compile(both, fullgraph=True)(x)
    assert torch.equal(codes, fpsim.encode(x, name))
    assert_same_bits(values, fpsim.decode(codes, name), x)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "name", "wrong"),
    [([0, 256], "e4m3fn", 256), ([-1], "e4m3fn", -1), ([16], "e2m1fn", 16), ([1 << 32], "fp32", 1 << 32),
     ([-1], "fp32", -1), ([1 << 16], "bf16", 1 << 16)],
)  # fmt: skip
def test_a_code_out_of_range(codes, name, wrong):
    fmt = parse_format(name)
    with pytest.raises(
        ValueError, match=f"code {wrong} is not one of {fmt.name}: codes are 0 to {(1 << fmt.bits) - 1}"
    ):
        fpsim.decode(torch.tensor(codes), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_codes_must_be_integers(dtype):
    with pytest.raises(TypeError, match=f"codes must be an integer tensor, got {dtype}: did you mean fpsim.encode"):
        fpsim.decode(torch.zeros(2, dtype=dtype), "e4m3fn")


def test_decode_needs_a_carrier_with_all_values_of_the_format():
    codes = torch.tensor([1])
    with pytest.raises(ValueError, match=r"has values that torch\.float16 lacks.*convert it to torch\.float32"):
        fpsim.decode(codes, "bf16", torch.float16)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        fpsim.decode(codes, "bf16", torch.int32)
    with pytest.raises(ValueError, match="unknown format 'e4m3nf'"):
        fpsim.decode(codes, "e4m3nf")


def test_decode_of_an_argument_that_is_not_a_tensor():
    with pytest.raises(TypeError, match=r"codes must be an integer tensor, got list: use torch\.tensor"):
        fpsim.decode([1, 2], "e4m3fn")  # type: ignore[arg-type]


@pytest.mark.parametrize(("argument", "value"), [("rounding", "nearest"), ("overflow", "saturate")])
def test_unknown_modes(argument, value):
    with pytest.raises(ValueError, match=f"unknown .*{value!r}: use one of"):
        fpsim.encode(torch.ones(2), "e4m3fn", **{argument: value})


def test_encoding_a_list_is_the_error_of_rounding_one() -> None:
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list: use torch\.tensor\(x\)"):
        fpsim.encode([1.0], "e4m3fn")
