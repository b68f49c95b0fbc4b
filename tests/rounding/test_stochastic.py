"""Stochastic rounding: results judged by the reference, random words judged by numpy and by statistics.

The reference rounds with a given random number. Random numbers of few bits are enumerated. Random numbers of many bits
are tried on either side of the threshold where the result changes.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fpsim
from fpsim import reference
from fpsim.formats import (
    STOCHASTIC_ROUNDINGS,
    FloatFormat,
    full_rounding,
    parse_format,
    resolve_overflow,
    split_rounding,
)
from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.definitions import random_words_at
from fpsim.rounding.ops import (
    SOURCE,
    draw_seed,
    random_key_op,
    random_words_op,
    round_op,
    round_stochastic_op,
    round_with_words_op,
)
from fpsim.rounding.tensors import round_with_torch_ops
from fpsim.verify.codes import codes_of, tensor_of
from tests.shared.formats import overflows
from tests.shared.judge import CARRIERS, suits

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = [
    "e4m3fn", "e5m2", "e2m1fn", "e3m2fn", "e8m3", "bf16", "fp16", "e4m3fnuz", "e8m0fnu", "e4m0", "e1m3",
    "e4m3:nosubnormals", "e5m2:bias=126", "e5m2:bias=140", "e4m3:unsigned", "e7m23", "e8m22", "e8m23", "e11m30",
]  # fmt: skip
MODES = [f"{name}:{bits}" for name in STOCHASTIC_ROUNDINGS for bits in (1, 3)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def values_of(fmt: FloatFormat) -> list[float]:
    """Inputs around and between the format's values: normals, subnormals, below the smallest, at and beyond the top."""
    small, big = fmt.smallest_subnormal, fmt.max
    unit = 2.0 ** (fmt.max_exponent - fmt.mantissa_bits)
    inputs = [0.0, small, fmt.smallest_normal, 1.0, big, math.inf]
    inputs += [small * f for f in (0.5, 0.75, 0.125, 0.1, 2**-9 * 1.1, 2.0**-24 * 1.5, 2.0**-33, 1.25, 1.5, 1.75, 2.3)]
    inputs += [fmt.smallest_normal * f for f in (0.97, 1 + 2.0**-23, 1.3)]
    inputs += [1.0 + k * 2.0 ** -(fmt.mantissa_bits + 3) for k in range(1, 8)]
    inputs += [big + unit * f for f in (0.125, 0.5, 0.875, 1.0, 3.0)] if big < 1e300 else []
    return inputs


def as_carried(values: list[float], dtype: torch.dtype) -> Tensor:
    x = torch.tensor([s * v for v in values for s in (1, -1)], dtype=torch.float64).to(dtype)
    return torch.cat([x[~x.isnan()], torch.tensor([math.nan], dtype=dtype)])


def expected(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, numbers: list[int]) -> np.ndarray:
    carrier = CARRIERS[x.dtype]
    values = [reference.decode(int(code), carrier) for code in codes_of(x)]
    results = [
        reference.encode(reference.round(value, fmt, rounding, overflow, random=number), carrier)
        for value, number in zip(values, numbers, strict=True)
    ]
    return np.array(results, codes_of(x).dtype)


def assert_rounds(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, numbers: list[int]) -> None:
    """The operator's arithmetic gives the reference's result for these random numbers, whatever bits follow them."""
    bits = split_rounding(rounding)[1]
    generator = np.random.default_rng(len(numbers))
    noise = generator.integers(0, 1 << (32 - bits), len(numbers), np.uint64)
    words = (np.array(numbers, np.uint64) << np.uint64(32 - bits) | noise).astype(np.uint32).view(np.int32)
    got = codes_of(round_with_torch_ops(x, fmt, rounding, overflow, torch.from_numpy(words)))
    want = expected(x, fmt, rounding, overflow, numbers)
    nan = CARRIERS[x.dtype].max_code + 1
    sign = CARRIERS[x.dtype].sign_code
    same = (got == want) | (((got & ~got.dtype.type(sign)) > nan) & ((want & ~want.dtype.type(sign)) > nan))
    assert same.all(), [
        (x[i].item(), numbers[i], tensor_of(got[i : i + 1], x.dtype).item(), tensor_of(want[i : i + 1], x.dtype).item())
        for i in np.flatnonzero(~same)[:5]
    ]


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in FORMATS for d in CARRIERS if suits(parse_format(n), d)], ids=str
)
def test_every_random_number_of_few_bits_gives_the_reference_result(name: str, dtype: torch.dtype) -> None:
    fmt = parse_format(name)
    x = as_carried(values_of(fmt), dtype)
    for rounding in MODES:
        bits = split_rounding(rounding)[1]
        for number in range(1 << bits):
            overflow = resolve_overflow(fmt, None)
            assert_rounds(x, fmt, rounding, overflow, [number] * len(x))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m3", "e2m1fn", "e5m2:bias=126", "e5m2:bias=140", "e11m30"])
@pytest.mark.parametrize("rounding", [
    "stochastic:8", "stochastic:22", "stochastic", "stochastic:24", "stochastic:25", "stochastic:31", "stochastic:32",
    "stochastic_b:8", "stochastic_b:22", "stochastic_b", "stochastic_b:24", "stochastic_b:31",
    "stochastic_c:8", "stochastic_c:22", "stochastic_c", "stochastic_c:24", "stochastic_c:30",
])  # fmt: skip
def test_the_result_changes_at_the_right_random_number_of_many_bits(name: str, rounding: str) -> None:
    """The random numbers just below and at the threshold, and the extremes."""
    fmt, bits = parse_format(name), split_rounding(rounding)[1]
    dtype = torch.float32 if suits(fmt, torch.float32) else torch.float64
    narrow = as_carried(values_of(fmt), dtype)
    for x in (narrow, narrow.double()):
        magnitudes = [abs(Fraction(v)) if math.isfinite(v) else Fraction(0) for v in x.tolist()]
        quanta = [quantum(v, fmt) for v in magnitudes]
        thresholds = [(1 << bits) - int(v / q % 1 * (1 << bits)) for v, q in zip(magnitudes, quanta, strict=True)]
        for offset in (-2, -1, 0, 1):
            numbers = [min(max(t + offset, 0), (1 << bits) - 1) for t in thresholds]
            assert_rounds(x, fmt, full_rounding(rounding), resolve_overflow(fmt, None), numbers)
        for number in (0, (1 << bits) - 1):
            assert_rounds(x, fmt, full_rounding(rounding), resolve_overflow(fmt, None), [number] * len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e8m0", "e8m3", "e5m2:bias=126", "e5m2:bias=140"])
def test_stochastic_c_rounds_the_fraction_with_ties_to_even(name: str, dtype: torch.dtype) -> None:
    """Fractions d where d * 2**bits is k + 1/2, and their neighbours; below the smallest subnormal too."""
    fmt = parse_format(name)
    for bits in (1, 3, 8):
        ties = [Fraction(2 * k + 1, 2 ** (bits + 1)) for k in sorted({0, 1, 2**bits - 2, 2**bits - 1})]
        values = [0.0, fmt.smallest_subnormal, fmt.smallest_normal, 4 * fmt.smallest_normal]
        exact = [(v := Fraction(value)) + tie * quantum(v, fmt) for value in values for tie in ties]
        exact = [value for value in exact if value >= Fraction(2) ** (-130 if dtype == torch.float32 else -900)]
        centres = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype)
        assert [Fraction(value) for value in centres.tolist()] == exact
        codes = codes_of(centres)
        steps = np.array([-1, 0, 1], np.int64).astype(codes.dtype)
        x = tensor_of((codes[:, None] + steps).ravel(), dtype)
        for value in x.tolist():
            unit = quantum(Fraction(value), fmt)
            lower = Fraction(value) // unit * unit
            rounded = round((Fraction(value) - lower) / unit * 2**bits)  # of a Fraction: ties to even
            for number, want in ((2**bits - rounded - 1, lower), (2**bits - rounded, lower + unit)):
                if 0 <= number < 2**bits:
                    word = torch.tensor([number << (32 - bits)]).to(torch.int32)
                    one = torch.tensor([value], dtype=dtype)
                    got = round_with_torch_ops(one, fmt, f"stochastic_c:{bits}", "sat_finite", word)
                    assert Fraction(got.item()) == want, (value.hex(), bits, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["e4m3fn", "e8m0", "e7m23", "e5m2:bias=126", "e5m2:bias=140", "e4m3:nosubnormals"])
def test_the_neighbours_of_values_round_either_way(name: str, dtype: torch.dtype) -> None:
    """The numbers just before and after a value of the format, with the extreme random numbers."""
    fmt = parse_format(name)
    values = [fmt.smallest_subnormal, 2 * fmt.smallest_subnormal, fmt.smallest_normal, 4 * fmt.smallest_normal, fmt.max]
    codes = codes_of(torch.tensor(values, dtype=torch.float64).to(dtype))
    steps = np.array([-2, -1, 1, 2], np.int64).astype(codes.dtype)
    x = tensor_of((codes[:, None] + steps).ravel(), dtype)
    for rounding in (*MODES, "stochastic:24", "stochastic:32", "stochastic_b:24", "stochastic_b:31", "stochastic_c:30"):
        top = (1 << split_rounding(rounding)[1]) - 1
        for number in {0, 1, top - 1, top}:
            assert_rounds(x, fmt, rounding, resolve_overflow(fmt, None), [number] * len(x))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e5m2:bias=120", torch.float32), ("e5m2:bias=94", torch.float32), ("e5m2:bias=1014", torch.float64)],
    ids=str,
)
def test_subnormals_of_the_carrier_below_the_smallest_value(name: str, dtype: torch.dtype) -> None:
    """The extreme random numbers and those at the threshold. With bias 94 only one of 2**32 rounds up."""
    fmt, m = parse_format(name), CARRIERS[dtype].mantissa_bits
    normal = 1 << m
    codes = [*(1 << k for k in range(m)), 3 << (m - 2), 5 << (m - 3), normal - 2, normal - 1, normal, normal + 1]
    x = tensor_of(np.array(codes, f"u{dtype.itemsize}"), dtype)
    fractions = [Fraction(value) / Fraction(fmt.smallest_subnormal) for value in x.tolist()]
    for rounding in ("stochastic:8", "stochastic:22", "stochastic:32", "stochastic_b:31", "stochastic_c:8",
                     "stochastic_c:30"):  # fmt: skip
        count = 1 << split_rounding(rounding)[1]
        for offset in (-1, 0, 1):
            numbers = [min(max(count - int(fraction * count) + offset, 0), count - 1) for fraction in fractions]
            assert_rounds(x, fmt, rounding, resolve_overflow(fmt, None), numbers)
        for number in (0, count - 1):
            assert_rounds(x, fmt, rounding, resolve_overflow(fmt, None), [number] * len(x))


def quantum(value: Fraction, fmt: FloatFormat) -> Fraction:
    exponent = fmt.emin
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - fmt.mantissa_bits)


@pytest.mark.parametrize("overflow", ["ovf_inf", "sat_finite", "sat_propagate"])
@pytest.mark.parametrize("name", ["e5m2", "e4m3fn"])
def test_overflow_modes(name: str, overflow: str) -> None:
    fmt = parse_format(name)
    x = as_carried(values_of(fmt), torch.float32)
    for number in range(4):
        assert_rounds(x, fmt, "stochastic:2", overflow, [number] * len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["stochastic:8", "stochastic_b:8", "stochastic_c:8"])
@pytest.mark.parametrize("name", ["e5m2", "e4m3fn", "e4m3fnuz", "e2m1fn", "binary8p3se", "e5m2:unsigned", "e5m0"])
def test_beyond_the_largest_value_the_probabilities_are_exact(name: str, rounding: str, dtype: torch.dtype) -> None:
    """Numbers from the largest value to beyond the one that would follow it: all 2**8 random numbers are tried.

    The probability of overflow is the fraction of the way to the next value, as far as 8 bits tell. So rounding is
    unbiased there too, if an overflow counts as the value that it stands for.
    """
    fmt = parse_format(name)
    field, mantissa = divmod(fmt.max_code + 1, 1 << fmt.mantissa_bits)
    above = ((1 << fmt.mantissa_bits) + mantissa) * Fraction(2) ** (field - fmt.bias - fmt.mantissa_bits)
    largest, unit = Fraction(fmt.max), above - Fraction(fmt.max)
    steps = [Fraction(k, 16 if dtype == torch.bfloat16 else 512) for k in range(24)]
    x = torch.tensor([float(largest + step * unit) for step in (*steps, 1, Fraction(5, 4), 2)], dtype=dtype)
    numbers = [Fraction(value) for value in x.tolist()]
    words = (torch.arange(256) << 24).to(torch.int32)
    probability = {
        "stochastic:8": lambda d: math.floor(d * 256),
        "stochastic_b:8": lambda d: math.floor(d * 256 + Fraction(1, 2)),
        "stochastic_c:8": lambda d: round(d * 256),  # of a Fraction: ties to even
    }[rounding]
    ups = [min(probability((number - largest) / unit), 256) for number in numbers]
    for overflow, sign in itertools.product(overflows(fmt), (1, -1) if fmt.signed else (1,)):
        beyond = fmt.max if overflow != "ovf_inf" else math.inf if fmt.has_infinity else math.nan
        results = torch.stack(
            [round_with_torch_ops(sign * x, fmt, rounding, overflow, w.expand(x.shape)) for w in words]
        )
        for count, column in zip(ups, results.double().T, strict=True):
            want = [sign * fmt.max] * (256 - count) + [sign * beyond] * count
            np.testing.assert_array_equal(np.sort(column.numpy()), np.sort(want), overflow)


def test_the_fraction_of_random_numbers_that_round_up_is_the_probability() -> None:
    """The definition, by counting all 2**8 numbers: floor(d * 2**8) / 2**8."""
    fmt = parse_format("e4m3fn")
    x = torch.linspace(1, 1.125, 1001)[1:-1]
    words = (torch.arange(256) << 24).to(torch.int32)
    ups = sum((round_with_torch_ops(x, fmt, "stochastic:8", "sat_finite", w.expand(x.shape)) > x).int() for w in words)
    assert ups.tolist() == [int((Fraction(v) - 1) * 8 * 256) for v in x.tolist()]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m3", "e4m3fnuz", "e2m1fn"])
def test_values_of_the_format_never_change(name: str) -> None:
    fmt = parse_format(name)
    values = fpsim.decode(torch.arange(1 << fmt.bits), fmt)
    for rounding in ("stochastic", "stochastic:1", "stochastic:32", "stochastic_b", "stochastic_c:2"):
        for seed in range(20):
            got = fpsim.round(values, fmt, rounding=rounding, seed=seed)
            assert torch.equal(got.nan_to_num(12345.0), values.nan_to_num(12345.0)), rounding


@pytest.mark.parametrize(
    ("name", "value", "up", "probability"),
    [
        ("e4m3fn", 1.0375, 1.125, 0.3),
        ("e5m2", 2.0**-16 * 0.3, 2.0**-16, 0.3),  # below the smallest subnormal
        ("e5m2", 2.0**-16 * 2.7, 2.0**-16 * 3, 0.7),  # a subnormal
        ("e5m2", 57344.0 + 8192 * 0.3, math.inf, 0.3),  # beyond the largest
        ("e8m3", -1.0375, -1.125, 0.3),
    ],
)
def test_chi_square_of_2_to_the_20_draws(name: str, value: float, up: float, probability: float) -> None:
    count = 1 << 20
    x = torch.full((count,), value)
    for seed in (0, 1, -5):
        got = fpsim.round(x, name, rounding="stochastic", seed=seed)
        ups = int((got == up).sum())
        chi_square = (ups - count * probability) ** 2 / (count * probability * (1 - probability))
        assert chi_square < 15.1, (ups / count, chi_square)  # p = 1e-4
        assert len(got.unique()) == 2


# -- the words ---------------------------------------------------------------------------------------------------------


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def words_by_hand(seed: int, salt: int, index: np.ndarray) -> np.ndarray:
    """The definition, in unsigned arithmetic of numpy."""
    golden = 0x9E3779B97F4A7C15
    key = mix64(mix64(seed % 2**64 ^ golden) ^ (salt * golden % 2**64))
    low, high = (index & 0xFFFFFFFF).astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    x = (low ^ np.uint32(key % 2**32)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> np.uint32(15))) ^ np.uint32(key >> 32) ^ high
    x = x * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> np.uint32(14))) * np.uint32(0x31848BAB)
    return x ^ (x >> np.uint32(17))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
@pytest.mark.parametrize("salt", [0, 1, 7, 2**40, -3])
def test_words_are_the_documented_hash(seed: int, salt: int) -> None:
    for first in (0, 2**31 - 5, 2**32 - 5, 2**40 + 3):
        got = random_words_at(random_key_op(torch.tensor(seed), salt), first, 1000).numpy().view(np.uint32)
        assert (got == words_by_hand(seed, salt, np.arange(first, first + 1000, dtype=np.uint64))).all()


COUNT = 1 << 18


def uniforms(seed: int, salt: int = 0) -> np.ndarray:
    return words_by_hand(seed, salt, np.arange(COUNT, dtype=np.uint64)) / 2.0**32 - 0.5


def test_bits_of_the_words_are_balanced() -> None:
    """Every bit is set in half of the words, and every pair of bits agrees in half of them: within 5 sigma."""
    words = np.concatenate([words_by_hand(seed, 3, np.arange(COUNT, dtype=np.uint64)) for seed in range(4)])
    signs = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1) * 2.0 - 1
    assert abs(signs.mean(0)).max() * math.sqrt(len(words)) < 5
    correlation = signs.T @ signs / len(words) - np.eye(32)
    assert abs(correlation).max() * math.sqrt(len(words)) < 5


def test_words_are_uncorrelated_across_index_seed_and_salt() -> None:
    scores = []
    for seed in range(10):
        u = uniforms(seed)
        for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 1000, 1024, 65536):
            scores.append(12 * (u[lag:] * u[:-lag]).mean() * math.sqrt(COUNT - lag))
        for other in (
            uniforms(seed + 1),
            uniforms(seed + 2**32),
            uniforms(-seed - 1),
            uniforms(seed, 1),
            uniforms(seed, 2),
        ):
            for lag in (0, 1, 2):
                scores.append(12 * (u[lag:] * other[: COUNT - lag]).mean() * math.sqrt(COUNT - lag))
    assert abs(np.array(scores)).max() < 4.5
    assert 0.85 < np.std(scores) < 1.15


def test_neighbouring_words_are_independent() -> None:
    """Chi-square of the top 6 bits of pairs of words, at several distances."""
    scores = []
    for seed in range(10):
        top = (words_by_hand(seed, 0, np.arange(COUNT, dtype=np.uint64)) >> np.uint32(26)).astype(np.int64)
        for lag in (1, 2, 4, 64, 1024):
            counts = np.bincount(top[lag:] * 64 + top[:-lag], minlength=4096)
            mean = (COUNT - lag) / 4096
            scores.append((((counts - mean) ** 2 / mean).sum() - 4095) / math.sqrt(2 * 4095))
    assert abs(np.array(scores)).max() < 4.5 and abs(np.mean(scores)) < 0.6


def test_a_flipped_bit_of_the_index_flips_every_bit_of_the_word_half_the_time() -> None:
    index = np.arange(COUNT, dtype=np.uint64)
    for seed in range(2):
        words = words_by_hand(seed, 0, index)
        for bit in range(18):
            flips = words ^ words_by_hand(seed, 0, index ^ np.uint64(1 << bit))
            share = ((flips[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
            assert abs(share - 0.5).max() < 0.006  # 6 sigma


def test_different_seeds_and_salts_give_different_words() -> None:
    index = np.arange(64, dtype=np.uint64)
    draws = {words_by_hand(seed, salt, index).tobytes() for seed in range(-20, 20) for salt in range(-20, 20)}
    assert len(draws) == 1600


# -- the operator ------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, name: str, rounding: str, seed: int, salt: int) -> Tensor:
    """`fpsim.round`, element by element in row-major order, from words made in numpy."""
    fmt = parse_format(name)
    words = words_by_hand(seed, salt, np.arange(x.numel(), dtype=np.uint64)).view(np.int32).reshape(x.shape)
    overflow = resolve_overflow(fmt, None)
    return round_with_torch_ops(x, fmt, full_rounding(rounding), overflow, torch.from_numpy(words))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp()).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [*((dtype, False) for dtype in CARRIERS), (torch.float32, True)], ids=str
)
def test_eager_and_compiled_give_the_bits_of_the_definition(dtype: torch.dtype, dynamic: bool) -> None:
    x, seed = numbers(37, 29, dtype=dtype), torch.tensor(99)
    names = [name for name in ("e4m3fn", "bf16", "e4m3:nosubnormals") if suits(parse_format(name), dtype)]
    roundings = ["stochastic", "stochastic:5", "stochastic:32", "stochastic_b:7", "stochastic_c:6"]
    sites = [(name, rounding, salt) for salt, rounding in enumerate(roundings) for name in names]

    def function(x: Tensor, seed: Tensor) -> list[Tensor]:
        return [fpsim.round(x, name, rounding=rounding, seed=seed, salt=salt) for name, rounding, salt in sites]

    want = [by_hand(x, name, rounding, 99, salt) for name, rounding, salt in sites]
    for way in (function, torch.compile(function, fullgraph=True, dynamic=dynamic)):
        for got, right in zip(way(x, seed), want, strict=True):
            assert torch.equal(codes(got), codes(right))


def codes(x: Tensor) -> Tensor:
    return torch.from_numpy(codes_of(x).astype(np.int64))


LAYOUTS = {
    "scalar": lambda: numbers(),
    "empty": lambda: numbers(0, 3),
    "one": lambda: numbers(1),
    "odd": lambda: numbers(1037),
    "transposed": lambda: numbers(17, 31).T,
    "strided": lambda: numbers(40, 40)[::3, 1::2],
    "expanded": lambda: numbers(1, 13).expand(7, 13),
    "channels last": lambda: numbers(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "rows of vectors": lambda: numbers(6, 5, 48),
    "columns of vectors": lambda: numbers(48, 64).T,
    "channels of vectors": lambda: numbers(2, 32, 16, 16).to(memory_format=torch.channels_last),
    "of several chunks": lambda: numbers(3, 100_001),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_index_is_that_of_the_element_whatever_the_layout(layout: str) -> None:
    x, seed = LAYOUTS[layout](), torch.tensor(4)
    want = by_hand(x.contiguous(), "e4m3fn", "stochastic", 4, 2)

    def function(x: Tensor, seed: Tensor) -> Tensor:
        return fpsim.round(x, "e4m3fn", rounding="stochastic", seed=seed, salt=2)

    for got in (function(x, seed), torch.compile(function, fullgraph=True)(x, seed)):
        assert got.shape == x.shape and torch.equal(codes(got.contiguous()), codes(want))


def test_threads_do_not_matter() -> None:
    x = numbers(500_003)
    one = fpsim.round(x, "e5m2", rounding="stochastic", seed=1)
    compiled = torch.compile(lambda x: fpsim.round(x, "e5m2", rounding="stochastic", seed=1))
    torch.set_num_threads(2)
    try:
        assert torch.equal(fpsim.round(x, "e5m2", rounding="stochastic", seed=1), one)
        assert torch.equal(compiled(x), one)
    finally:
        torch.set_num_threads(1)


def test_the_code_of_a_compiled_function_calls_nothing() -> None:
    compiled = torch.compile(lambda x, seed: fpsim.round(x, "e4m3fn", rounding="stochastic", seed=seed), fullgraph=True)
    _, (code,) = run_and_get_code(compiled, numbers(64), torch.tensor(1))
    assert "torch.ops.fpsim" not in code and "cpp_fused" in code


def test_a_new_seed_in_a_tensor_does_not_compile_again() -> None:
    compiled = torch.compile(lambda x, seed: fpsim.round(x, "e2m1fn", rounding="stochastic", seed=seed), fullgraph=True)
    x = numbers(64)
    compiled(x, torch.tensor(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            assert torch.equal(compiled(x, torch.tensor(seed)), by_hand(x, "e2m1fn", "stochastic", seed, 0))


def test_two_call_sites_do_not_share_a_draw() -> None:
    """A compiler merges two equal calls. Different salts keep them apart, even in one graph."""
    x = numbers(4096)

    def function(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(fpsim.round(x, "e4m3fn", rounding="stochastic", seed=seed, salt=salt) for salt in (1, 2))  # type: ignore[return-value]

    a, b = torch.compile(function, fullgraph=True)(x, torch.tensor(0))
    assert torch.equal(a, by_hand(x, "e4m3fn", "stochastic", 0, 1))
    assert torch.equal(b, by_hand(x, "e4m3fn", "stochastic", 0, 2))
    assert not torch.equal(a, b)


def test_encode_and_round_use_the_same_draw() -> None:
    x = numbers(1000)
    draw = {"rounding": "stochastic", "random_bits": 6, "seed": 3, "salt": 8}
    assert torch.equal(fpsim.encode(x, "e4m3fn", **draw), fpsim.encode(fpsim.round(x, "e4m3fn", **draw), "e4m3fn"))


def test_random_bits_may_be_an_argument_or_part_of_the_rounding() -> None:
    x = numbers(1000)
    by_name = fpsim.round(x, "e4m3fn", rounding="stochastic:6", seed=3)
    assert torch.equal(fpsim.round(x, "e4m3fn", rounding="stochastic", random_bits=6, seed=3), by_name)
    assert torch.equal(
        fpsim.round(x, "e4m3fn", rounding="stochastic", seed=3), by_hand(x, "e4m3fn", "stochastic:23", 3, 0)
    )


def test_the_derivative_is_straight_through() -> None:
    x, seed = numbers(32).requires_grad_(), torch.tensor(7)

    def function(x: Tensor) -> Tensor:
        return (fpsim.round(x, "e4m3fn", rounding="stochastic", seed=seed) * torch.arange(32)).sum()

    for gradient in (torch.func.grad(function), torch.compile(torch.func.grad(function), fullgraph=True)):
        assert torch.equal(gradient(x.detach()), torch.arange(32.0))
    function(x).backward()
    assert torch.equal(x.grad, torch.arange(32.0))


def test_vmap_draws_for_every_element_of_the_batch_or_for_every_seed() -> None:
    x = numbers(5, 16)
    one_seed = torch.vmap(lambda row: fpsim.round(row, "e2m1fn", rounding="stochastic", seed=3))(x)
    assert torch.equal(one_seed, by_hand(x, "e2m1fn", "stochastic", 3, 0))
    columns = torch.vmap(lambda c: fpsim.round(c, "e2m1fn", rounding="stochastic", seed=3), in_dims=1, out_dims=1)(x)
    assert torch.equal(columns, by_hand(x.T.contiguous(), "e2m1fn", "stochastic", 3, 0).T)
    seeds = torch.arange(5)
    many = torch.vmap(lambda row, seed: fpsim.round(row, "e2m1fn", rounding="stochastic", seed=seed))(x, seeds)
    assert torch.equal(many, torch.stack([by_hand(x[i], "e2m1fn", "stochastic", i, 0) for i in range(5)]))
    same = torch.vmap(lambda s: fpsim.round(x[0], "e2m1fn", rounding="stochastic", seed=s))(seeds)
    assert torch.equal(same, torch.stack([by_hand(x[0], "e2m1fn", "stochastic", i, 0) for i in range(5)]))


@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1)], ids=str)
def test_vmap_of_the_operators_gives_every_sample_its_scale_and_its_key(shape: tuple[int, ...]) -> None:
    """The batch lies along any dimension of any argument; one key draws for all elements of the batch in order."""
    samples = [numbers(4, 5) * 2.0**i for i in range(3)]
    scales = [torch.full(shape, 2.0**-i) for i in range(3)]
    scales[1] = scales[1] * 2.0 ** torch.arange(scales[1].numel()).view(shape)
    keys = [random_key_op(torch.tensor([i]), 7) for i in range(3)]
    modes = ("e4m3fn", "stochastic:8", "sat_finite", SOURCE)
    for dims in itertools.product((0, 1, None), (0, None)):
        at_x, at_scale = dims[0], dims[1]
        x, xs = (samples[0], [samples[0]] * 3) if at_x is None else (torch.stack(samples, at_x), samples)
        scale, each = (scales[1], [scales[1]] * 3) if at_scale is None else (torch.stack(scales, at_scale), scales)
        if dims != (None, None):
            got = torch.vmap(lambda a, s: round_op(a, "e4m3fn", "up", "sat_finite", SOURCE, s), dims)(x, scale)
            want = [round_op(a, "e4m3fn", "up", "sat_finite", SOURCE, s) for a, s in zip(xs, each, strict=True)]
            assert torch.equal(got, torch.stack(want)), dims
            one_key = torch.vmap(lambda a, s: round_stochastic_op(a, keys[0], *modes, s), dims)(x, scale)
            whole = torch.stack([s.expand(4, 5) for s in each])
            assert torch.equal(one_key, round_stochastic_op(torch.stack(xs), keys[0], *modes, whole)), dims
        for at_key in (0, 1):
            together = torch.stack(keys, at_key)
            got = torch.vmap(lambda a, k, s: round_stochastic_op(a, k, *modes, s), (at_x, at_key, at_scale))
            want = [round_stochastic_op(*sample, *modes, s) for *sample, s in zip(xs, keys, each, strict=True)]
            assert torch.equal(got(x, together, scale), torch.stack(want)), (dims, at_key)


def test_two_elements_may_have_two_scales() -> None:
    """Their products 4 and -0.5 are values of the format: nothing is random."""
    x, scale = torch.tensor([16.0, -0.03125]), torch.tensor([0.25, 16.0])
    assert torch.equal(round_op(x, "e2m1fn", "nearest_even", "sat_finite", SOURCE, scale), x)
    key = random_key_op(torch.tensor([1]), 1)
    assert torch.equal(round_stochastic_op(x, key, "e2m1fn", "stochastic:8", "sat_finite", SOURCE, scale), x)


def test_keys_and_words_without_data_have_the_dtype_of_those_with_data() -> None:
    seed, x = torch.tensor([3]), torch.ones(4, 5)
    key = random_key_op(seed, 7)
    for operator, arguments in (
        (random_key_op, (seed, 7)), (random_words_op, (x, key)), (round_with_words_op, (x, random_words_op(x, key))),
        (round_stochastic_op, (x, key)),
    ):  # fmt: skip
        rest = ("e4m3fn", "stochastic:8", "sat_finite", SOURCE) if operator.__name__.startswith("round") else ()
        want = operator(*arguments, *rest)
        got = operator(*(each.to("meta") if isinstance(each, Tensor) else each for each in arguments), *rest)
        assert (got.dtype, got.shape, got.device.type) == (want.dtype, want.shape, "meta")


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    torch.manual_seed(0)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    assert first.shape == (1,) and first.dtype == torch.int64 and first != second
    torch.manual_seed(0)
    assert torch.equal(draw_seed(torch.device("cpu")), first)


def test_working_carriers_of_half_precision_round_once() -> None:
    """A bfloat16 is rounded in float32; the conversions there and back must be exact."""
    x = numbers(1000, dtype=torch.bfloat16)
    got = fpsim.round(x, "e4m3fn", rounding="stochastic", seed=5)
    assert working_dtype(x.dtype) == torch.float32
    assert torch.equal(got.float(), fpsim.round(x.float(), "e4m3fn", rounding="stochastic", seed=5))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "stochastic"}, ValueError, "needs a seed"),
        ({"seed": 1}, ValueError, "a seed has no meaning with rounding='nearest_even'"),
        ({"random_bits": 4}, ValueError, "random_bits=4 has no meaning"),
        ({"rounding": "stochastic", "seed": 1.0}, TypeError, "1.0"),
        ({"rounding": "stochastic", "seed": True}, TypeError, "True"),
        ({"rounding": "stochastic", "seed": "1"}, TypeError, "'1'"),
        ({"rounding": "stochastic", "seed": 2**63}, ValueError, "no 64-bit integer"),
        ({"rounding": "stochastic", "seed": torch.tensor([1, 2])}, TypeError, r"shape \(2,\)"),
        ({"rounding": "stochastic", "seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "int32"),
        ({"rounding": "stochastic", "seed": 1, "random_bits": 0}, ValueError, "1 to 32, got '0'"),
        ({"rounding": "stochastic", "seed": 1, "random_bits": 33}, ValueError, "1 to 32, got '33'"),
        ({"rounding": "stochastic_b", "seed": 1, "random_bits": 32}, ValueError, "1 to 31"),
        ({"rounding": "stochastic_c", "seed": 1, "random_bits": 31}, ValueError, "1 to 30"),
        ({"rounding": "stochastic", "seed": 1, "random_bits": 4.0}, TypeError, "4.0"),
        ({"rounding": "stochastic:x", "seed": 1}, ValueError, "got 'x'"),
        ({"rounding": "stochastic:", "seed": 1}, ValueError, "got ''"),
        ({"rounding": "random", "seed": 1}, ValueError, "unknown rounding 'random'.*stochastic_c"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_names_it(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fpsim.round(torch.ones(3), "e4m3fn", **options)


def test_the_reference_needs_its_random_number() -> None:
    for number in (None, -1, 4):
        with pytest.raises(ValueError, match="needs a random number from 0 to 3"):
            reference.round(1.1, "e4m3fn", "stochastic:2", random=number)
    with pytest.raises(ValueError, match="random=1 has no meaning"):
        reference.round(1.1, "e4m3fn", random=1)


def test_a_seed_without_stochastic_rounding_is_the_same_error_while_compiling() -> None:
    compiled = torch.compile(lambda x, seed: fpsim.round(x, "e4m3fn", seed=seed), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a seed has no meaning with rounding='nearest_even'"):
        compiled(torch.ones(3), torch.tensor(1))
