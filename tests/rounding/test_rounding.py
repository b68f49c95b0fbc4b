"""The results of `fpsim.round`, bit for bit: judged by the exact reference, by ml_dtypes, torch and gfloat."""

import itertools
from random import Random

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fpsim
from fpsim import reference
from fpsim.casts import Cast
from fpsim.formats import NAMED_FORMATS, OVERFLOWS, ROUNDINGS, SPECIALS, FloatFormat, parse_format, resolve_overflow
from tests.shared.formats import overflows
from tests.shared.judge import (
    CARRIERS,
    TABLE_BITS,
    Inputs,
    assert_codes,
    assert_result,
    assert_rounds,
    assert_same_bits,
    by_definition,
    by_reference,
    by_table,
    canonical,
    codes_of,
    interesting,
    random_inputs,
    specials,
    suits,
)
from tests.shared.peers import GFLOAT_FORMATS, GFLOAT_MODES

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = tuple(CARRIERS)
NAMED = [(name, dtype) for name in NAMED_FORMATS for dtype in DTYPES if suits(parse_format(name), dtype)]
SWEEP = [FloatFormat(e, m) for e in range(2, 9) for m in range(24)]


def modes(fmt: FloatFormat) -> list[tuple[str, str]]:
    return list(itertools.product(ROUNDINGS, overflows(fmt)))


def every_kind_of_format() -> list[FloatFormat]:
    """Every convention and switch, with biases for a range that ends above, at and below the range of each carrier."""
    formats = []
    switches = itertools.product((True, False), (True, False), (True, False))
    for e, m, special, bias, (subnormals, signed, zero) in itertools.product(
        (1, 2, 4), (0, 1, 3), SPECIALS, (None, -5, 16, 17, 100, 126, 127, 128, 129, 130, 140, 900, 1022), switches
    ):
        if (special == "fnuz" and not signed) or (not zero and (subnormals or signed)):
            continue
        if special == "p3109" and e + m < 2:
            continue
        formats.append(FloatFormat(e, m, bias, special, subnormals, signed, zero))
    return [fmt for fmt in formats if fmt.max > 0]


# -- the judges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), NAMED, ids=str)
def test_the_judges_agree_with_the_reference(name, dtype):
    fmt = parse_format(name)
    sample = interesting(fmt, dtype).sample(50) | random_inputs(fmt, dtype, 50)
    judges = [by_definition, by_table] if fmt.exponent_bits + fmt.mantissa_bits <= TABLE_BITS else [by_definition]
    for rounding, overflow in modes(fmt):
        want = by_reference(sample, fmt, rounding, overflow)
        for judge in judges:
            what = (name, rounding, overflow, judge.__name__)
            assert_codes(judge(sample, fmt, rounding, overflow), want, sample.codes, what)


@pytest.mark.parametrize("name", [name for name in NAMED_FORMATS if parse_format(name).bits <= TABLE_BITS])
def test_the_judges_agree_with_each_other(name):
    fmt = parse_format(name)
    inputs = interesting(fmt, torch.float32) | random_inputs(fmt, torch.float32, 20_000)
    for rounding, overflow in modes(fmt):
        want = by_table(inputs, fmt, rounding, overflow)
        assert_codes(by_definition(inputs, fmt, rounding, overflow), want, inputs.codes, (rounding, overflow))


# -- bit for bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), NAMED, ids=str)
def test_named_formats_at_every_boundary(name, dtype):
    """All values, midpoints, their neighbours, specials and NaN payloads; for 16-bit dtypes all bit patterns."""
    fmt = parse_format(name)
    inputs = interesting(fmt, dtype)
    for rounding, overflow in modes(fmt):
        assert_rounds(inputs, fmt, rounding, overflow)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_named_formats_on_a_million_random_patterns(name, rounding):
    fmt = parse_format(name)
    dtype = torch.float32 if suits(fmt, torch.float32) else torch.float64
    inputs = random_inputs(fmt, dtype, 1 << 20, seed=ROUNDINGS.index(rounding))
    assert_rounds(inputs, fmt, rounding, None)


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_named_formats_in_float64_on_random_patterns(name):
    """Many of them lie between the numbers of float32, where double rounding would show."""
    fmt = parse_format(name)
    inputs = random_inputs(fmt, torch.float64, 1 << 17)
    for rounding, overflow in modes(fmt):
        assert_rounds(inputs, fmt, rounding, overflow)


@pytest.mark.parametrize("fmt", SWEEP, ids=str)
def test_swept_formats_at_every_boundary(fmt):
    """e2m0 to e8m23 in float32: every mode at boundaries and on random patterns; `reference.round` judges some."""
    inputs = interesting.__wrapped__(fmt, torch.float32).sample(12_000) | random_inputs(fmt, torch.float32, 3000)
    few = inputs.sample(8)
    for rounding, overflow in modes(fmt):
        assert_rounds(few, fmt, rounding, overflow, by_reference)
        assert_rounds(inputs, fmt, rounding, overflow)


@pytest.mark.parametrize("fmt", [f for f in SWEEP if f.mantissa_bits in (0, 1, 2, 7, 10, 22, 23)], ids=str)
def test_swept_formats_in_other_carriers(fmt):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        if suits(fmt, dtype):
            inputs = interesting.__wrapped__(fmt, dtype).sample(4000) | random_inputs(fmt, dtype, 1000)
            for rounding in ROUNDINGS:
                assert_rounds(inputs, fmt, rounding, None)


WIDE = ["e11m52", "e11m51", "e10m52", "e10m40", "e9m30", "e11m24", "e11m0", "e8m52", "e1m52", "e8m23:bias=128",
        "e11m52:nosubnormals", "e10m40fn", "e9m30fnuz", "e8m30finite", "e11m10:unsigned"]  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_formats_beyond_float32(name):
    fmt = parse_format(name)
    inputs = interesting(fmt, torch.float64).sample(30_000) | random_inputs(fmt, torch.float64, 10_000)
    few = inputs.sample(60)
    for rounding, overflow in modes(fmt):
        assert_rounds(few, fmt, rounding, overflow, by_reference)
        assert_rounds(inputs, fmt, rounding, overflow)


@pytest.mark.parametrize(
    "name",
    ["e7m23", "e7m23:nosubnormals", "e7m23:unsigned", "e8m23:nosubnormals", "e8m23:unsigned", "e8m23fn", "e10m52",
     "e10m52:nosubnormals", "e11m52:nosubnormals", "e11m52:unsigned", "e7m22:bias=128"],
)  # fmt: skip
def test_formats_with_all_mantissa_bits_of_the_carrier(name):
    """There one code of the carrier is a unit of the format: the ends of the range are one code wide."""
    fmt = parse_format(name)
    dtype = torch.float32 if suits(fmt, torch.float32) else torch.float64
    carrier = CARRIERS[dtype]
    centres = [reference.encode(value, carrier) for value in (fmt.smallest_subnormal, fmt.smallest_normal, fmt.max)]
    magnitudes = {code + step for code in (0, 1 << carrier.mantissa_bits, *centres) for step in range(-3, 4)}
    codes = [sign | code for code in magnitudes if 0 <= code < carrier.sign_code for sign in (0, carrier.sign_code)]
    for rounding, overflow in modes(fmt):
        assert_rounds(Inputs(codes, dtype), fmt, rounding, overflow, by_reference)


def assert_kind(fmt: FloatFormat, count: int, few: int) -> None:
    for dtype in DTYPES:
        if suits(fmt, dtype):
            inputs = interesting.__wrapped__(fmt, dtype).sample(count) | random_inputs(fmt, dtype, count // 4)
            asked = inputs.sample(few)
            for rounding, overflow in modes(fmt):
                assert_rounds(asked, fmt, rounding, overflow, by_reference)
                assert_rounds(inputs, fmt, rounding, overflow, by_definition)


@pytest.mark.parametrize("fmt", Random(0).sample(every_kind_of_format(), 80), ids=str)
def test_every_kind_of_format(fmt):
    assert_kind(fmt, count=1500, few=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("fmt", every_kind_of_format(), ids=str)
def test_every_kind_of_format_exhaustively(fmt):
    assert_kind(fmt, count=20_000, few=20)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["fp16", "bf16", "tf32"])
def test_wide_formats_by_their_whole_table(name, rounding):
    fmt = parse_format(name)
    inputs = interesting(fmt, torch.float32) | random_inputs(fmt, torch.float32, 1 << 22)
    for overflow in overflows(fmt):
        assert_rounds(inputs, fmt, rounding, overflow, by_table)


FORMATS_WITHOUT_A_NUMBER_BUT_ZERO = [
    FloatFormat(1, m, bias, special, m == 0, signed)
    for m, special in ((0, "ieee"), (0, "fn"), (2, "ieee"))
    for bias in (None, -5, 126, 127, 129)
    for signed in (True, False)
] + [FloatFormat(1, 0, 3, "fn", False, True), FloatFormat(1, 0, 3, "ieee", False, False)]


@pytest.mark.parametrize("fmt", FORMATS_WITHOUT_A_NUMBER_BUT_ZERO, ids=str)
def test_formats_without_a_number_but_zero_are_refused(fmt):
    assert fmt.max == 0
    with pytest.raises(ValueError, match="no finite value but zero"):
        fpsim.round(torch.ones(3, dtype=torch.float64), fmt)


@st.composite
def formats(draw) -> FloatFormat:
    e = draw(st.integers(1, 11))
    m = draw(st.integers(0, 52))
    special = draw(st.sampled_from(SPECIALS))
    assume(special != "p3109" or e + m > 1)
    signed = special == "fnuz" or draw(st.booleans())
    zero = signed or draw(st.booleans())
    subnormals = zero and draw(st.booleans())
    half = 1 << (e - 1)
    lowest = (1 << e) - 1 - 1023 if e < 11 else half - 1
    bias = draw(st.integers(lowest, max(lowest, 1074 - m)) | st.sampled_from([half - 1, half]))
    try:
        return FloatFormat(e, m, bias, special, subnormals, signed, zero)
    except ValueError:  # values that float64 lacks
        return FloatFormat(min(e, 8), min(m, 23), None, special, subnormals, signed, zero)


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_arbitrary_formats(data):
    fmt = data.draw(formats())
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if suits(fmt, dtype)] or [torch.float64]))
    assume(suits(fmt, dtype) and fmt.max > 0)
    rounding, overflow = data.draw(st.sampled_from(modes(fmt)))
    seed = data.draw(st.integers(0, 1 << 30))
    inputs = interesting.__wrapped__(fmt, dtype).sample(15, seed) | random_inputs(fmt, dtype, 15, seed)
    assert_rounds(inputs, fmt, rounding, overflow, by_reference)


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m0fnu", "e2m1fn", "e4m3fnuz", "bf16", "fp16", "tf32", "fp32"])
def test_rounding_again_changes_nothing(name, rounding):
    once = fpsim.round(interesting(parse_format(name), torch.float32).tensor, name, rounding=rounding)
    for again in ROUNDINGS:
        assert_same_bits(fpsim.round(once, name, rounding=again), once, what=again)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "fp16", "bf16", "tf32"])
def test_up_and_down_mirror_each_other_and_enclose(name):
    x = random_inputs(parse_format(name), torch.float32, 1 << 16).tensor
    x = x[~x.isnan()]
    up, down = (fpsim.round(x, name, rounding=rounding) for rounding in ("up", "down"))
    assert_same_bits(down, -fpsim.round(-x, name, rounding="up"), x)
    saturates = resolve_overflow(parse_format(name), None) == "sat_finite"
    assert bool(((down <= x) & (x <= up))[(x.abs() <= parse_format(name).max) | (not saturates)].all())
    for rounding in ROUNDINGS:
        between = fpsim.round(x, name, rounding=rounding)
        assert bool(((between == up) | (between == down)).all()), rounding


# -- the implementations of others ---------------------------------------------------------------------------------

ML_DTYPES = sorted(name for name in vars(ml_dtypes) if "float" in name)
MILLION = np.random.default_rng(11).integers(0, 1 << 32, 1 << 20, np.uint32)


def million(name: str) -> Inputs:
    """A million random float32 patterns, a quarter million in the format's range, the boundaries and specials."""
    fmt = parse_format(name)
    inputs = Inputs(MILLION, torch.float32) | random_inputs(fmt, torch.float32, 1 << 18)
    return inputs | interesting(fmt, torch.float32)


def ml_dtypes_cast(x: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        result = x.numpy().astype(getattr(ml_dtypes, name)).astype(np.float32)
    return canonical(codes_of(torch.from_numpy(result)), torch.float32)


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if name != "float8_e8m0fnu"])
def test_nearest_even_is_that_of_ml_dtypes(name):
    fmt, inputs = parse_format(name), million(name)
    overflow = "ovf_inf" if fmt.has_nan else "sat_finite"
    got = canonical(codes_of(fpsim.round(inputs.tensor, fmt, overflow=overflow)), torch.float32)
    want = ml_dtypes_cast(inputs.tensor, name)
    numbers = ~inputs.tensor.isnan().numpy() | fmt.has_nan  # ml_dtypes turns NaN into -0 or +0 if the format has no NaN
    assert_codes(got[numbers], want[numbers], inputs.codes[numbers], name)


def test_nearest_away_to_e8m0fnu_is_that_of_ml_dtypes():
    """ml_dtypes rounds ties up, and float32 subnormals above 2**-127 wrongly: 1.2 * 2**-127 becomes 2**-126."""
    inputs = million("float8_e8m0fnu")
    got = codes_of(fpsim.round(inputs.tensor, "e8m0fnu", rounding="nearest_away", overflow="ovf_inf"))
    want = ml_dtypes_cast(inputs.tensor, "float8_e8m0fnu")
    wrong_there = (inputs.tensor > 2.0**-127) & (inputs.tensor < 1.5 * 2.0**-127)
    right = ~wrong_there.numpy()
    assert_codes(canonical(got, torch.float32)[right], want[right], inputs.codes[right])
    x = torch.tensor([1.2 * 2.0**-127])
    assert (
        ml_dtypes_cast(x, "float8_e8m0fnu").view(np.float32) == 2.0**-126
    )  # when ml_dtypes is right, drop the exception
    assert fpsim.round(x, "e8m0fnu") == 2.0**-127


@pytest.mark.parametrize(
    ("name", "overflow"),
    [
        ("bfloat16", "ovf_inf"),
        ("float16", "ovf_inf"),
        ("float8_e5m2", "ovf_inf"),
        ("float8_e4m3fn", None),
        ("float8_e4m3fnuz", "ovf_inf"),
        ("float8_e5m2fnuz", "ovf_inf"),
    ],
)
def test_nearest_even_is_that_of_torch(name, overflow):
    """torch 2.13 saturates casts to e4m3fn, also for infinities; its casts to the fnuz formats overflow to NaN."""
    if name == "float8_e4m3fn" and not torch.tensor(1e9).to(torch.float8_e4m3fn).float().isfinite():
        overflow = "ovf_inf"  # as torch did until 2.11
    inputs = million(name)
    got = canonical(codes_of(fpsim.round(inputs.tensor, name, overflow=overflow)), torch.float32)
    want = canonical(codes_of(inputs.tensor.to(getattr(torch, name)).to(torch.float32)), torch.float32)
    assert_codes(got, want, inputs.codes, name)


def test_no_cast_of_torch_to_8_bits_takes_part():
    """Versions of torch differ in overflow and in the signs of zeros and NaNs."""
    x = torch.randn(100)

    def dtypes_read(function) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            function()
        return {dtype for event in profiler.events() for dtype in event.input_dtypes}

    assert dtypes_read(lambda: x.to(torch.float8_e5m2).float()) >= {"float", "c10::Float8_e5m2"}
    for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"):
        dtypes = dtypes_read(lambda: fpsim.round(x, name))  # noqa: B023
        assert "float" in dtypes and not any("Float8" in dtype for dtype in dtypes), name


def test_torch_casts_magnitudes_to_e8m0_with_ties_up():
    """torch drops the sign, zero becomes 2**-127, and subnormals above 2**-127 become 2**-126, as in ml_dtypes."""
    inputs = million("float8_e8m0fnu")
    got = codes_of(fpsim.round(inputs.tensor.abs(), "e8m0fnu", rounding="nearest_away", overflow="ovf_inf"))
    want = codes_of(inputs.tensor.to(torch.float8_e8m0fnu).to(torch.float32))
    magnitudes = inputs.tensor.abs()
    right = ~((magnitudes > 2.0**-127) & (magnitudes < 1.5 * 2.0**-127) | (magnitudes == 0)).numpy()
    assert_codes(*(canonical(codes, torch.float32)[right] for codes in (got, want)), inputs.codes[right])


def test_nearest_even_of_float64_is_that_of_numpy():
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        fmt = parse_format(name)
        inputs = interesting(fmt, torch.float64) | random_inputs(fmt, torch.float64, 1 << 18)
        with np.errstate(all="ignore"):
            want = torch.from_numpy(inputs.values.astype(dtype).astype(np.float64))
        got = fpsim.round(inputs.tensor, name)
        assert_codes(*(canonical(codes_of(y), torch.float64) for y in (got, want)), inputs.codes, name)


GFLOAT = ("e5m2", "e4m3fn", "e3m2fn", "e2m3fn", "e2m1fn", "fp16", "bf16")


@pytest.mark.parametrize("rounding", GFLOAT_MODES)
@pytest.mark.parametrize("name", GFLOAT)
def test_all_roundings_are_those_of_gfloat(name, rounding):
    """Inputs are finite numbers that do not overflow: for the others, gfloat's rules differ between formats."""
    inputs = interesting(parse_format(name), torch.float32) | random_inputs(parse_format(name), torch.float32, 50_000)
    finite = inputs.tensor.abs() <= parse_format(name).max
    inputs = Inputs(inputs.codes[finite.numpy()], torch.float32)
    want = gfloat.round_ndarray(GFLOAT_FORMATS[name], inputs.values, GFLOAT_MODES[rounding], sat=True)
    got = fpsim.round(inputs.tensor, name, rounding=rounding)
    assert_codes(codes_of(got.double()), codes_of(torch.from_numpy(want)), inputs.codes, name)


# -- shapes and strides --------------------------------------------------------------------------------------------

ROUNDED = [("e4m3fn", "nearest_even"), ("e5m2", "up"), ("e8m0fnu", "to_odd"), ("bf16", "toward_zero")]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * 30


LAYOUTS = {
    "zero-dimensional": numbers(1)[0],
    "empty": numbers(0),
    "empty with sizes": numbers(3, 0, 5),
    "one": numbers(1, 1, 1),
    "every second": numbers(37)[::2],
    "a column": numbers(7, 5)[:, 3],
    "transposed": numbers(7, 5).T,
    "permuted": numbers(2, 3, 4, 5).permute(3, 0, 2, 1),
    "channels last": numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels last, a slice": numbers(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)[:, 1:4],
    "expanded": numbers(5, 1).expand(5, 7),
    "expanded scalar": numbers(1)[0].expand(4, 3),
    "overlapping": numbers(20).as_strided((5, 4), (2, 1)),
    "with an offset": numbers(50)[7:40],
    "with holes": numbers(64).as_strided((3, 4), (17, 3)),
    "a diagonal": numbers(9, 9).diagonal(),
    "five dimensions": numbers(2, 1, 3, 1, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype):
    like = LAYOUTS[layout]
    whole = like.new_empty(0).set_(like.untyped_storage()).to(dtype)
    x = whole.as_strided(like.shape, like.stride(), like.storage_offset())
    before = whole.clone()
    for name, rounding in ROUNDED:
        if suits(parse_format(name), dtype):
            got = fpsim.round(x, name, rounding=rounding)
            assert_result(got, x, name, rounding)
            assert got.stride() == torch.empty_like(x).stride()
    assert_same_bits(whole, before, what="the input's own memory")


@pytest.mark.parametrize("size", [*range(1, 35), 63, 64, 65, 127, 1000, 65535, 65536, 65537, 131072, 131073, 262147])
def test_any_size(size):
    """Sizes that are not multiples of a vector register or of a chunk of the CPU kernel."""
    x = numbers(size)
    for name, rounding in ROUNDED[:2]:
        assert_result(fpsim.round(x, name, rounding=rounding), x, name, rounding)


def test_the_number_of_threads_does_not_matter():
    x, threads = numbers(300_001), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_result(fpsim.round(x, "e4m3fn"), x, "e4m3fn")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["fp32", "e4m3fn"])
def test_the_result_is_new_memory(name):
    """This holds even where rounding is the identity."""
    x = torch.tensor([1.0, 2.0])
    y = fpsim.round(x, name)
    y.add_(1)
    assert x.tolist() == [1.0, 2.0] and y.tolist() == [2.0, 3.0]


def test_a_tensor_with_a_pending_negation():
    """The imaginary part of a conjugate is a view that negates when it is read."""
    x = torch.imag(torch.complex(numbers(40), numbers(40)).conj())
    assert x.is_neg()
    assert_result(fpsim.round(x, "e5m2", rounding="up"), x.resolve_neg(), "e5m2", "up")


def test_parameters_inference_mode_and_autocast():
    x = numbers(33)
    assert_result(fpsim.round(torch.nn.Parameter(x), "e4m3fn"), x, "e4m3fn")
    with torch.inference_mode():
        assert_result(fpsim.round(x.clone(), "e4m3fn"), x, "e4m3fn")
    with torch.autocast("cpu", torch.bfloat16):
        assert_result(fpsim.round(x, "e4m3fn"), x, "e4m3fn")


def test_a_meta_tensor_has_the_shape_of_the_result():
    y = fpsim.round(torch.empty(3, 4, dtype=torch.bfloat16, device="meta"), "e4m3fn")
    assert (y.shape, y.dtype, y.device.type) == ((3, 4), torch.bfloat16, "meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_names_of_a_format_give_the_same_result(dtype):
    x = specials(dtype).tensor
    for names in (
        ["e4m3fn", "float8_e4m3fn", "torch.float8_e4m3fn", FloatFormat(4, 3, specials="fn")],
        ["e2m1fn", "e2m1finite"],
    ):
        for name in names[1:]:
            assert_same_bits(fpsim.round(x, name), fpsim.round(x, names[0]), what=name)


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_the_usual_overflow_mode_is_that_of_the_format(name):
    fmt = parse_format(name)
    x = specials(torch.float64).tensor
    usual = fpsim.round(x, name)
    assert_same_bits(usual, fpsim.round(x, name, overflow=resolve_overflow(fmt, None)))
    assert_same_bits(usual, fpsim.round(x, name, overflow=None))


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name", "enough"),
    [
        (torch.bfloat16, "fp16", "torch.float32"),
        (torch.bfloat16, "tf32", "torch.float32"),
        (torch.bfloat16, "e5m8", "torch.float32"),
        (torch.float16, "bf16", "torch.float32"),
        (torch.float16, "e8m0fnu", "torch.float32"),
        (torch.float16, "e5m2:bias=9", "torch.float32"),
        (torch.float16, "e5m10finite", "torch.float32"),
        (torch.float32, "fp64", "torch.float64"),
        (torch.float32, "e8m24", "torch.float64"),
        (torch.float32, "e9m3", "torch.float64"),
        (torch.float32, "e8m23:bias=128", "torch.float64"),
        (torch.bfloat16, "fp64", "torch.float64"),
    ],
)
def test_a_format_that_is_no_subset_of_the_carrier(dtype, name, enough):
    fmt = parse_format(name)
    message = f"{fmt.name} has values that {dtype} lacks.*convert it to {enough}$"
    for call in (fpsim.round, fpsim.encode):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(3, dtype=dtype), name)
    fpsim.round(torch.ones(3, dtype=dtype).to(getattr(torch, enough.removeprefix("torch."))), name)  # the remedy works


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_a_dtype_that_is_not_a_carrier_is_an_error(dtype):
    for call in (fpsim.round, fpsim.encode):
        with pytest.raises(TypeError, match=rf"cannot round a tensor of {dtype}: .*float64, float32.*x\.float\(\)"):
            call(torch.zeros(3, dtype=dtype), "e4m3fn")


@pytest.mark.parametrize("thing", [1.5, [1.0, 2.0], np.ones(3), None], ids=repr)
def test_an_argument_that_is_not_a_tensor(thing):
    with pytest.raises(TypeError, match=rf"x must be a torch\.Tensor, got {type(thing).__name__}: use torch\.tensor"):
        fpsim.round(thing, "e4m3fn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "e4m3nf"}, "unknown format 'e4m3nf': did you mean .*e4m3fn"),
        ({"format": "FP8"}, r"unknown format 'FP8': did you mean e4m3fn or e5m2\? Formats with scales are"),
        ({"format": "float4"}, r"unknown format 'float4': did you mean e2m1fn, mxfp4 or nvfp4\? Formats with scales"),
        ({"rounding": "nearest"}, "unknown rounding 'nearest': use one of nearest_even, nearest_away"),
        ({"overflow": "saturate"}, "unknown overflow mode 'saturate': use one of ovf_inf, sat_finite"),
        ({"gradient": "ste"}, "unknown gradient 'ste': use one of straight_through, clipped, zero"),
        ({"format": "e2m1fn", "overflow": "ovf_inf"}, "e2m1fn has neither: use overflow='sat_finite'"),
    ],
)
def test_unknown_names_and_modes(arguments, message):
    with pytest.raises(ValueError, match=message):
        fpsim.round(torch.ones(3), **{"format": "e4m3fn", **arguments})


def test_the_operators_check_their_arguments_too():
    """Other passes may put the operators into graphs, so they must refuse unknown names themselves."""
    ops = torch.ops.fpsim
    for arguments, message in [
        (("e4m3nf", "nearest_even", "sat_finite"), "unknown format"),
        (("e4m3fn", "nearest", "sat_finite"), "unknown rounding"),
        (("e4m3fn", "nearest_even", "saturate"), "unknown overflow"),
        (("e2m1fn", "nearest_even", "ovf_inf"), "use overflow='sat_finite'"),
        (("fp64", "nearest_even", "ovf_inf"), "convert it to torch.float64"),
        (("e4m3nf", "stochastic:8", "sat_finite"), "unknown format"),
        (("e4m3fn", "stochastics", "sat_finite"), "unknown rounding"),
        (("e4m3fn", "stochastic:8", "saturate"), "unknown overflow"),
        (("e2m1fn", "stochastic:8", "sat_propagate"), "use overflow='sat_finite'"),
        (("fp64", "stochastic:8", "ovf_inf"), "convert it to torch.float64"),
    ]:
        for device in ("cpu", "meta"):
            x, words = torch.ones(3, device=device), torch.zeros(3, dtype=torch.int32, device=device)
            calls = [(ops.round, x)]
            if arguments[1].startswith("stochastic"):
                calls = [(ops.round_stochastic, x, words[:2]), (ops.round_with_words, x, words)]
            for operator, *tensors in calls:
                source = () if operator is ops.round else ("",)
                with pytest.raises(ValueError, match=message):
                    operator(*tensors, *arguments, *source)
    sparse, key = torch.ones(3).to_sparse(), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"cannot round a tensor of layout torch\.sparse_coo"):
        ops.round(sparse, "e4m3fn", "up", "sat_finite")
    with pytest.raises(TypeError, match=r"cannot round a tensor of layout torch\.sparse_coo"):
        ops.round_stochastic(sparse, key, "e4m3fn", "stochastic:8", "sat_finite", "")
    with pytest.raises(ValueError, match="rounding 'up' is not stochastic: use fpsim::round"):
        ops.round_stochastic(torch.ones(3), torch.zeros(2, dtype=torch.int32), "e4m3fn", "up", "sat_finite", "")


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_results_in_a_finite_format_are_finite(overflow):
    x = specials(torch.float32).tensor
    for name in ("e2m1fn", "e3m2fn", "e2m3fn", "e4m3finite"):
        if overflow == "sat_finite":
            assert bool(fpsim.round(x, name, overflow=overflow).isfinite().all())
            assert (
                fpsim.round(torch.tensor([float("nan"), -float("nan")]), name).tolist() == [parse_format(name).max] * 2
            )
        else:
            with pytest.raises(ValueError, match="use overflow='sat_finite'"):
                fpsim.round(x, name, overflow=overflow)


@pytest.mark.parametrize("rounding", [*ROUNDINGS, "stochastic"])
@pytest.mark.parametrize("overflow", ["ovf_inf", "sat_finite", "sat_propagate"])
def test_below_zero_an_unsigned_format_without_nan_has_its_smallest_value(rounding, overflow):
    """Never the largest: it has an infinity, and so takes all overflow modes, but it has no NaN."""
    x = torch.tensor([-1.0, -1e30, -float("inf"), -0.0, 1e30])
    modes = {"rounding": rounding, "overflow": overflow, "seed": 0 if rounding == "stochastic" else None}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = fpsim.round(x.to(dtype), "e5m0:unsigned", **modes)
        assert got[:4].tolist() == [0, 0, 0, 0] and not got[:4].signbit().any() and got[4] >= 2**15
        lowest = fpsim.round(x.to(dtype), "e3m0:nosubnormals:unsigned:nozero", **modes)
        assert lowest[:4].tolist() == [2**-3] * 4


def test_the_number_of_random_bits_is_given_once():
    x = torch.ones(2)
    for call in (fpsim.round, fpsim.encode):
        for bits in (4, 8):
            with pytest.raises(ValueError, match=f"'stochastic:8' has its own number .* random_bits={bits}"):
                call(x, "e4m3fn", rounding="stochastic:8", random_bits=bits, seed=1)


@pytest.mark.parametrize(
    ("salt", "error", "message"),
    [
        (2**64, ValueError, "salt 18446744073709551616 is no 64-bit integer"),
        (2**63, ValueError, "is no 64-bit integer"),
        (-(2**63) - 1, ValueError, "is no 64-bit integer"),
        ("a", TypeError, "salt must be an int, got 'a' of type str"),
        (1.0, TypeError, "salt must be an int, got 1.0 of type float"),
        (True, TypeError, "salt must be an int, got True of type bool"),
        (None, TypeError, "salt must be an int, got None of type NoneType"),
    ],
)
def test_a_salt_is_an_int_of_64_bits(salt, error, message):
    for mode in ({"rounding": "stochastic", "seed": 1}, {}):
        with pytest.raises(error, match=message):
            fpsim.round(torch.ones(2), "e4m3fn", salt=salt, **mode)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rounding": "sideways"}, ValueError, "unknown rounding 'sideways'"),
        ({"rounding": "up:3"}, ValueError, "unknown rounding 'up:3'"),
        ({"overflow": None}, TypeError, "a cast has an overflow mode"),
        ({"overflow": "wrap"}, ValueError, "unknown overflow mode 'wrap'"),
        ({"scale": "power_of_two"}, TypeError, "a cast has an overflow mode, and a Scale or None"),
        ({"format": "bf16"}, TypeError, "the format of a cast is a FloatFormat"),
    ],
)
def test_a_cast_checks_its_fields(arguments, error, message):
    with pytest.raises(error, match=message):
        Cast(**{"format": parse_format("bf16"), "rounding": "up", "overflow": "ovf_inf", **arguments})
    assert Cast(parse_format("bf16"), "stochastic", "ovf_inf").rounding == "stochastic:23"
