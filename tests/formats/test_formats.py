"""Properties and names of formats, judged by ml_dtypes, torch, the OCP tables and all decoded codes."""

import dataclasses
import itertools
import math

import ml_dtypes
import pytest
import torch
from gfloat import decode_float
from gfloat.formats import format_info_p3109
from gfloat.types import Domain, Signedness

from fpsim import reference
from fpsim.formats import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    SPECIALS,
    FloatFormat,
    check_rounding,
    parse_format,
    resolve_overflow,
)

ML_DTYPES = sorted(name for name in vars(ml_dtypes) if "float" in name)
TORCH = sorted(
    name for name, kind in vars(torch).items() if isinstance(kind, torch.dtype) and kind.is_floating_point
)  # among them float4_e2m1fn_x2, which torch.finfo does not know


def small_formats() -> list[FloatFormat]:
    """Formats with every value of every field, of the smallest and of usual widths, with two biases."""
    formats = []
    for e, m, specials, bias, subnormals, signed, zero in itertools.product(
        (1, 2, 4), (0, 1, 3), SPECIALS, (None, -5), (True, False), (True, False), (True, False)
    ):
        if (specials == "fnuz" and not signed) or (specials == "p3109" and e + m < 2):
            continue
        if not zero and (subnormals or signed):
            continue
        formats.append(FloatFormat(e, m, bias, specials, subnormals, signed, zero))  # type: ignore[arg-type]
    return formats


SMALL = small_formats()

# -- derived properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ML_DTYPES)
def test_properties_are_those_of_ml_dtypes(name):
    info, fmt = ml_dtypes.finfo(getattr(ml_dtypes, name)), parse_format(name)
    assert fmt.bits == info.bits
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.nexp, info.nmant)
    assert (fmt.max, fmt.emin, fmt.max_exponent) == (float(info.max), info.minexp, info.maxexp - 1)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert 2.0 ** (1 - fmt.precision) == float(info.eps)
    assert fmt.signed == (float(info.min) < 0)


@pytest.mark.parametrize("name", [name for name in TORCH if not name.endswith("_x2")])
def test_properties_are_those_of_torch(name):
    info, fmt = torch.finfo(getattr(torch, name)), parse_format(name)
    assert fmt.bits == info.bits
    assert fmt.max == info.max
    assert fmt.smallest_normal == info.smallest_normal
    # torch 2.13 has 0.125 there, though the numbers after 1 are 1.25 and 1.5, as ml_dtypes says too
    assert 2.0 ** (1 - fmt.precision) == (0.25 if name == "float8_e5m2fnuz" else info.eps)
    assert fmt.signed == (info.min < 0)


# OCP 8-bit Floating Point Specification 1.0 table 1 and OCP Microscaling Formats 1.0 tables 2 to 5 and section 5.4.
# name: bits, bias, largest, smallest normal, smallest subnormal, infinity, NaN
OCP = {
    "e5m2": (8, 15, 57344.0, 2.0**-14, 2.0**-16, True, True),
    "e4m3fn": (8, 7, 448.0, 2.0**-6, 2.0**-9, False, True),
    "e3m2fn": (6, 3, 28.0, 0.25, 0.0625, False, False),
    "e2m3fn": (6, 1, 7.5, 1.0, 0.125, False, False),
    "e2m1fn": (4, 1, 6.0, 1.0, 0.5, False, False),
    "e8m0fnu": (8, 127, 2.0**127, 2.0**-127, 2.0**-127, False, True),
}


@pytest.mark.parametrize("name", OCP)
def test_properties_are_those_of_the_ocp_tables(name):
    fmt = parse_format(name)
    assert OCP[name] == (
        fmt.bits, fmt.bias, fmt.max, fmt.smallest_normal, fmt.smallest_subnormal, fmt.has_infinity, fmt.has_nan
    )  # fmt: skip


# IEEE 754-2019 table 3.5: bits, precision, largest exponent, bias
IEEE = {"fp16": (16, 11, 15, 15), "fp32": (32, 24, 127, 127), "fp64": (64, 53, 1023, 1023)}


@pytest.mark.parametrize("name", IEEE)
def test_properties_are_those_of_ieee_754(name):
    fmt = parse_format(name)
    assert IEEE[name] == (fmt.bits, fmt.precision, fmt.max_exponent, fmt.bias)
    assert fmt.emin == 1 - fmt.max_exponent


# max_code, infinity_code, nan_code, sign_code
CODES = {
    "fp16": (0x7BFF, 0x7C00, 0x7E00, 0x8000),
    "bf16": (0x7F7F, 0x7F80, 0x7FC0, 0x8000),
    "fp32": (0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000),
    "e5m2": (0x7B, 0x7C, 0x7E, 0x80),
    "e4m3": (0x77, 0x78, 0x7C, 0x80),
    "e3m4": (0x6F, 0x70, 0x78, 0x80),
    "e4m3fn": (0x7E, None, 0x7F, 0x80),
    "e4m3fnuz": (0x7F, None, 0x80, 0x80),
    "e2m1fn": (0x7, None, None, 0x8),
    "e8m0fnu": (0xFE, None, 0xFF, 0),
    "e1m0": (0, 1, None, 2),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_are_those_of_the_standards(name):
    fmt = parse_format(name)
    assert CODES[name] == (fmt.max_code, fmt.infinity_code, fmt.nan_code, fmt.sign_code)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_properties_agree_with_the_decoded_codes(fmt):
    values = [reference.decode(code, fmt) for code in range(1 << fmt.bits)]
    finite = {abs(v) if v == 0 else v for v in values if not isinstance(v, reference.Special)}
    finite |= {0} if reference.NEGATIVE_ZERO in values else set()
    positive = [v for v in finite if v > 0]
    assert fmt.num_values == len(finite)
    assert fmt.max == max(finite)
    assert fmt.has_infinity == (reference.INFINITY in values)
    assert fmt.has_nan == (reference.NAN in values)
    assert fmt.has_negative_zero == (reference.NEGATIVE_ZERO in values)
    assert fmt.signed == any(v < 0 for v in finite) or finite == {0}
    if positive:
        assert max(positive) < 2.0 ** (fmt.max_exponent + 1)
        if min(positive) < fmt.smallest_normal or fmt.max >= fmt.smallest_normal:
            assert fmt.smallest_subnormal == min(positive)
        if fmt.max >= fmt.smallest_normal:
            assert fmt.smallest_normal in positive
            assert max(positive) >= 2.0**fmt.max_exponent


def test_a_format_with_only_subnormals_has_the_smallest_normal_as_its_bound():
    fmt = FloatFormat(1, 2)  # IEEE with one exponent bit: field 0 is subnormal, field 1 infinity and NaN
    assert (fmt.max, fmt.smallest_subnormal, fmt.smallest_normal, fmt.num_values) == (1.5, 0.5, 2.0, 7)
    assert dataclasses.replace(fmt, subnormals=False).max == 0.0
    assert dataclasses.replace(fmt, subnormals=False).num_values == 1


def test_default_bias_follows_the_convention():
    assert [FloatFormat(4, 3, specials=s).bias for s in SPECIALS] == [7, 7, 8, 7, 8]
    assert [FloatFormat(1, 3, specials=s).bias for s in SPECIALS] == [0, 0, 1, 0, 1]


# -- subsets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_is_subset_of_means_that_every_value_fits(name, carrier):
    fmt, carrier = parse_format(name), parse_format(carrier)
    extremes = [0, 1 << fmt.mantissa_bits, fmt.max_code, fmt.max_code - 1, 1, (1 << fmt.mantissa_bits) - 1]
    extremes += [code for code in (fmt.infinity_code, fmt.nan_code) if code is not None]
    values = [reference.decode(code, fmt) for code in extremes]
    assert fmt.is_subset_of(carrier) == all(reference.round(v, carrier) == v for v in values)


def test_is_subset_of_compares_every_field():
    small, large = FloatFormat(3, 2), FloatFormat(5, 6)
    assert small.is_subset_of(large) and small.is_subset_of(small) and not large.is_subset_of(small)
    for change in ({"signed": False}, {"specials": "finite"}):
        assert not small.is_subset_of(dataclasses.replace(large, **change)), change
    assert small.is_subset_of(dataclasses.replace(large, subnormals=False))
    assert not large.is_subset_of(dataclasses.replace(large, subnormals=False))


# -- names -------------------------------------------------------------------------------------------------------


def test_a_name_denotes_its_format():
    wrong = [fmt for fmt in SMALL if not parse_format(fmt.name) == fmt == parse_format(str(fmt))]
    assert not wrong


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_named_formats_keep_their_short_names(name):
    fmt = parse_format(name)
    assert parse_format(fmt.name) == fmt
    assert fmt.name == name or name in ("fp64", "fp32", "tf32", "bf16", "fp16")


def test_every_exmy_is_a_format():
    for e, m in itertools.product(range(1, 9), range(24)):
        for suffix, specials in (("", "ieee"), ("fn", "fn"), ("fnuz", "fnuz"), ("finite", "finite")):
            fmt = parse_format(f"e{e}m{m}{suffix}")
            if (e, m, suffix) in ((2, 3, "fn"), (3, 2, "fn"), (2, 1, "fn")):
                specials = "finite"  # OCP's name for a format without NaN
            assert fmt == FloatFormat(e, m, specials=specials), (e, m, suffix)


P3109 = [
    (k, p, sign, domain) for k in range(3, 16) for p in range(1, k + 1) for sign in "su" for domain in "ef"
    if 1 <= k - p + (sign == "u") <= 11
]  # fmt: skip


@pytest.mark.parametrize(("k", "p", "sign", "domain"), P3109)
def test_p3109_formats_have_the_values_that_gfloat_gives_them(k, p, sign, domain):
    fmt = parse_format(f"binary{k}p{p}{sign}{domain}")
    assert parse_format(fmt.name) == fmt and (fmt.bits, fmt.precision, fmt.signed) == (k, p, sign == "s")
    signedness = Signedness.Signed if sign == "s" else Signedness.Unsigned
    info = format_info_p3109(k, p, signedness, Domain.Extended if domain == "e" else Domain.Finite)
    for code in range(1 << k) if k <= 8 else {*range(0, 1 << k, 97), (1 << k) - 2, (1 << k) - 1, 1 << (k - 1)}:
        want, got = decode_float(info, code).fval, reference.to_float(reference.decode(code, fmt))
        assert (math.isnan(want) and math.isnan(got)) or (want, math.copysign(1, want)) == (got, math.copysign(1, got))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("binary8p3se", "binary8p3se"),
        ("binary8p4ue", "binary8p4ue"),
        ("binary8p3sf", "e5m2fnuz"),
        ("binary8p4sf", "e4m3fnuz"),
        ("binary8p8uf", "e1m7fn:bias=1:unsigned"),
        ("e5m2:P3109:bias=3", "e5m2:p3109:bias=3"),
    ],
)
def test_names_of_p3109(name, canonical):
    assert parse_format(name).name == canonical


def test_just_the_p3109_formats_with_more_exponent_bits_than_float64_are_refused_for_want_of_a_carrier():
    for k, sign, domain in itertools.product(range(3, 16), "su", "ef"):
        for p in range(1, k + (sign == "u")):
            name, exponent_bits = f"binary{k}p{p}{sign}{domain}", k - p + (sign == "u")
            if exponent_bits <= 11:
                assert parse_format(name).is_subset_of(FloatFormat(11, 52)) and parse_format(name).max > 0
            else:
                with pytest.raises(
                    ValueError, match=f"no carrier has its values: it has {exponent_bits} exponent bits"
                ):
                    parse_format(name)


@pytest.mark.parametrize("name", ["binary8p8se", "binary2p1se", "binary16p8se", "binary8p0ue", "binary15p2se"])
def test_p3109_names_outside_the_supported_range_are_errors(name):
    with pytest.raises(ValueError, match=f"no such format '{name}'"):
        parse_format(name)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("e2m1fn", FloatFormat(2, 1, specials="finite")),
        ("e2m1finite", FloatFormat(2, 1, specials="finite")),
        ("e2m1:fn", FloatFormat(2, 1, specials="fn")),
        ("e4m3b11fnuz", FloatFormat(4, 3, bias=11, specials="fnuz")),
        ("e8m0fnu", FloatFormat(8, 0, 127, "fn", subnormals=False, signed=False, zero=False)),
        ("e5m2:bias=-3:nosubnormals:unsigned", FloatFormat(5, 2, -3, subnormals=False, signed=False)),
        ("e3m2finite:unsigned", FloatFormat(3, 2, specials="finite", signed=False)),
        ("bf16:nosubnormals", FloatFormat(8, 7, subnormals=False)),
        (" E4M3FN ", FloatFormat(4, 3, specials="fn")),
    ],
)
def test_options_set_the_fields_of_a_format(name, fmt):
    assert parse_format(name) == fmt


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_name_of_ml_dtypes_is_known(name):
    short = name.removeprefix(name.split("_")[0] + "_") if "_" in name else name
    for alias in (name, f"ml_dtypes.{name}", f"jnp.{name}", short):
        assert parse_format(alias) == parse_format(name), alias
    assert parse_format(name).bits == ml_dtypes.finfo(getattr(ml_dtypes, name)).bits


@pytest.mark.parametrize("name", TORCH)
def test_every_name_of_torch_is_known(name):
    assert parse_format(str(getattr(torch, name))) == parse_format(f"torch.{name}") == parse_format(name)


def test_torch_packed_fp4_is_the_format_of_its_elements():
    assert parse_format("torch.float4_e2m1fn_x2") == parse_format("e2m1fn")


def test_parse_format_returns_a_format_unchanged():
    fmt = FloatFormat(3, 1)
    assert parse_format(fmt) is fmt


# -- a frozen value ----------------------------------------------------------------------------------------------


def test_a_format_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_format("bf16").bias = 3  # type: ignore[misc]


def test_equal_formats_have_equal_hashes_and_the_sweep_has_no_duplicates():
    assert len({hash(FloatFormat(4, 3)), hash(parse_format("e4m3")), hash(FloatFormat(4, 3, bias=7))}) == 1
    assert len(set(SMALL)) == len({fmt.name for fmt in SMALL}) == len(SMALL)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent_bits": 0}, "exponent_bits must be 1 to 11, got 0"),
        ({"exponent_bits": 12}, "exponent_bits must be 1 to 11, got 12"),
        ({"mantissa_bits": -1}, "mantissa_bits must be 0 to 52, got -1"),
        ({"mantissa_bits": 53}, "mantissa_bits must be 0 to 52, got 53"),
        ({"specials": "ocp"}, "specials must be one of ieee, fn, fnuz, finite, p3109, got 'ocp'"),
        ({"specials": "fnuz", "signed": False}, "an unsigned format cannot be 'fnuz'.* use 'fn'"),
        ({"specials": ["fn"]}, "specials must be one of ieee, fn, fnuz, finite, p3109"),
        ({"zero": False}, "a format without zero must be unsigned and without subnormals"),
        ({"zero": False, "signed": False}, "a format without zero must be unsigned and without subnormals"),
        ({"bias": 2000}, r"bias 2000 gives values from 2\*\*-2002 .* float64"),
        ({"bias": -2000}, r"bias -2000 .* to 2\*\*20\d\d, which float64 .* cannot hold"),
    ],
)
def test_arguments_that_describe_no_format_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        FloatFormat(**{"exponent_bits": 4, "mantissa_bits": 3, **arguments})


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("e4m3nf", ["unknown format 'e4m3nf'", "did you mean", "e4m3fn"]),
        ("bfloat15", ["unknown format 'bfloat15'", "did you mean bfloat16"]),
        ("fp8", ["unknown format 'fp8'", "did you mean", "eXmY"]),
        ("", ["unknown format ''", "A format is one of"]),
        ("int8", ["unknown format 'int8'", "e4m3fn"]),
        ("e4m3fn:biass=3", ["unknown option 'biass=3' in format 'e4m3fn:biass=3'", "bias=N"]),
        ("e4m3:bias=x", ["unknown option 'bias=x'"]),
        ("e0m3", ["no such format 'e0m3'", "exponent_bits must be 1 to 11, got 0"]),
        ("e5m53", ["no such format 'e5m53'", "mantissa_bits must be 0 to 52, got 53"]),
        ("e4m3fnuz:unsigned", ["no such format 'e4m3fnuz:unsigned'", "use 'fn'"]),
        ("e4m3fn:bias=1:bias=2", ["'e4m3fn:bias=1:bias=2' has two options for its bias", "leave out 'bias=2'"]),
        ("e4m3fn:bias=1:bias=1", ["two options for its bias"]),
        ("e4m3:fn:ieee", ["two options for its specials", "leave out 'ieee'"]),
        ("e4m3:unsigned:unsigned", ["two options for its signed"]),
        ("e4m3fn:ieee", ["e4m3fn has a meaning that 'ieee' repeats or contradicts"]),
        ("e4m3fn:fn", ["e4m3fn has a meaning that 'fn' repeats or contradicts"]),
        ("e2m1fn:fn", ["e2m1fn has a meaning"]),
        ("bf16:finite", ["bf16 has a meaning that 'finite'"]),
        ("e8m0fnu:unsigned", ["e8m0fnu has a meaning that 'unsigned'"]),
        ("e8m0fnu:nozero", ["'nozero'"]),
        ("e4m3b11fnuz:bias=8", ["e4m3b11fnuz has a meaning that 'bias=8'"]),
        ("binary8p3se:unsigned", ["binary8p3se has a meaning that 'unsigned'"]),
        ("binary8p3uf:bias=3", ["binary8p3uf has a meaning that 'bias=3'"]),
        ("binary8p3se:p3109", ["binary8p3se has a meaning that 'p3109'"]),
        ("float8_e5m10", ["e5m10 has 16 bits, and not the 8 of 'float8_'"]),
        ("float4_e4m3fn", ["e4m3fn has 8 bits, and not the 4 of 'float4_'"]),
        ("e4m3fn_x2", ["unknown format 'e4m3fn_x2'"]),
        ("binary15p2se", ["no carrier has its values: it has 13 exponent bits, and float64 has 11"]),
        ("binary12p1ue", ["no carrier has its values: it has 12 exponent bits"]),
        ("binary16p8se", ["3 to 15 bits"]),
    ],
)
def test_errors_for_unknown_names_list_the_valid_ones(name, messages):
    with pytest.raises(ValueError) as error:
        parse_format(name)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("thing", [8, None, b"fp16"])
def test_a_format_that_is_not_a_name_is_a_type_error(thing):
    with pytest.raises(TypeError, match="a format is a name such as 'e4m3fn' or a FloatFormat"):
        parse_format(thing)


# -- rounding and overflow modes ---------------------------------------------------------------------------------


def test_check_rounding_accepts_the_deterministic_roundings_only():
    assert [check_rounding(rounding) for rounding in ROUNDINGS] == list(ROUNDINGS)
    with pytest.raises(ValueError, match="unknown rounding 'nearest': use one of nearest_even, nearest_away"):
        check_rounding("nearest")


@pytest.mark.parametrize(
    ("name", "usual"),
    [("fp16", "ovf_inf"), ("e5m2", "ovf_inf"), ("e4m3fn", "sat_finite"), ("e4m3fnuz", "sat_finite"),
     ("e2m1fn", "sat_finite"), ("e8m0fnu", "sat_finite"), ("e1m0", "ovf_inf")],
)  # fmt: skip
def test_the_usual_overflow_mode(name, usual):
    assert resolve_overflow(parse_format(name), None) == usual


@pytest.mark.parametrize("name", ["e2m1fn", "e3m2fn", "e2m3fn", "e4m3finite", "e3m0finite:unsigned"])
def test_an_overflow_mode_may_need_an_infinity_or_a_nan(name):
    fmt = parse_format(name)
    assert resolve_overflow(fmt, "sat_finite") == "sat_finite"
    for mode in ("ovf_inf", "sat_propagate"):
        with pytest.raises(ValueError, match=f"{mode}' needs an infinity or a NaN .* use overflow='sat_finite'"):
            resolve_overflow(fmt, mode)


@pytest.mark.parametrize("name", ["fp16", "e4m3fn", "e4m3fnuz", "e8m0fnu", "e1m0"])
def test_formats_with_infinity_or_nan_accept_every_overflow_mode(name):
    assert [resolve_overflow(parse_format(name), mode) for mode in OVERFLOWS] == list(OVERFLOWS)
    with pytest.raises(ValueError, match="unknown overflow mode 'saturate': use one of ovf_inf, sat_finite"):
        resolve_overflow(parse_format(name), "saturate")
