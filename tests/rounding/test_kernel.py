"""The rounding algorithm, run on plain integers that refuse operations with undefined behaviour in C++.

`fpsim.rounding.kernel` is one source for torch, Inductor and ints. Here the ints have a width. They raise an error
for a shift by less than 0 or by at least the width, and for a sum out of range. This matters: g++ 12 once turned NaN
into the smallest number of e5m0, because a sum whose result is not used overflowed for NaN alone.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from fpsim import reference
from fpsim.formats import NAMED_FORMATS, ROUNDINGS, FloatFormat, full_rounding, parse_format, split_rounding
from fpsim.reference.values import floor_log2
from fpsim.rounding.kernel import Grid, decode_code, encode_code, round_code
from fpsim.verify.codes import code_of
from tests.shared.formats import overflows
from tests.shared.judge import (
    CARRIERS,
    Inputs,
    assert_codes,
    by_reference,
    interesting,
    random_inputs,
    suits,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Word:
    """A signed integer of a fixed width, as `fpsim.rounding.kernel` uses it."""

    def __init__(self, value: int, bits: int) -> None:
        assert -1 << (bits - 1) <= value < 1 << (bits - 1), f"{value} overflows {bits} bits"
        self.value, self.bits = value, bits

    def _with(self, value: int) -> Word:
        return Word(value, self.bits)

    def __add__(self, other: Word | int) -> Word:
        return self._with(self.value + number(other))

    __radd__ = __add__

    def __sub__(self, other: Word | int) -> Word:
        return self._with(self.value - number(other))

    def __rsub__(self, other: int) -> Word:
        return self._with(other - self.value)

    def __neg__(self) -> Word:
        return self._with(-self.value)

    def __and__(self, other: Word | int) -> Word:
        return self._with(self.value & number(other))

    def __or__(self, other: Word | int) -> Word:
        return self._with(self.value | number(other))

    def __xor__(self, other: Word | int) -> Word:
        return self._with(self.value ^ number(other))

    def __invert__(self) -> Word:
        return self._with(~self.value)

    def __lshift__(self, other: Word | int) -> Word:
        assert 0 <= number(other) < self.bits, f"shift by {number(other)}"
        half = 1 << (self.bits - 1)
        return self._with(((self.value << number(other)) + half) % (2 * half) - half)  # bits may fall off at the top

    def __rlshift__(self, other: int) -> Word:
        return self._with(other) << self

    def __rshift__(self, other: Word | int) -> Word:
        assert 0 <= number(other) < self.bits, f"shift by {number(other)}"
        return self._with(self.value >> number(other))


def number(word: Word | int) -> int:
    if isinstance(word, Word):
        return word.value
    assert type(word) is int
    return word


class Truth:
    """A mask. It has only the operators that masks have."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __and__(self, other: Truth) -> Truth:
        return Truth(self.value and other.value)

    def __or__(self, other: Truth) -> Truth:
        return Truth(self.value or other.value)

    def __invert__(self) -> Truth:
        return Truth(not self.value)


class WordOps:
    """The kernel's executor on `Word` (`fpsim.rounding.kernel.Ops`)."""

    def __init__(self, carrier: FloatFormat) -> None:
        self.carrier = carrier

    def clamp(self, a: Word, low: int | None, high: int | None) -> Word:
        assert low is None or high is None or low <= high
        value = a.value if low is None else max(a.value, low)
        return a._with(value if high is None else min(value, high))

    def less(self, a: Word, bound: Word | int) -> Truth:
        if isinstance(bound, int):
            a._with(bound - 1), a._with(bound)  # TorchOps computes with both
        return Truth(a.value < number(bound))

    def larger(self, a: Word, b: Word) -> Word:
        return a._with(max(a.value, b.value))

    def choose(self, mask: Truth, a: Word | int, b: Word | int) -> Word:
        return Word(number(a if mask.value else b), self.carrier.bits)

    def code_of_integer(self, a: Word) -> Word:
        floats, integers = {32: (np.float32, np.int32), 64: (np.float64, np.int64)}[a.bits]
        return a._with(int(np.array(a.value).astype(floats).view(integers)))


def run(codes: np.ndarray, fmt: FloatFormat, carrier: FloatFormat, rounding: str, overflow: str) -> np.ndarray:
    grid, ops = Grid(fmt, carrier), WordOps(carrier)
    words = [Word(code, carrier.bits) for code in codes.view(f"i{carrier.bits // 8}").tolist()]
    results = [round_code(word, grid, rounding, overflow, ops).value for word in words]
    return np.array(results, f"i{carrier.bits // 8}").view(codes.dtype)


FORMATS = [
    *NAMED_FORMATS,
    "e2m0", "e3m0fn", "e4m0", "e8m0", "e8m22", "e8m1", "e1m3", "e11m0", "e10m40fn", "e4m3:unsigned",
    "e4m0finite:unsigned", "binary8p3se", "binary8p4ue", "binary5p1se", "binary4p3se",
    "e5m2:bias=126", "e5m2:bias=127", "e5m2:bias=140", "e3m2:bias=-5", "e8m2:nosubnormals", "e4m3:nosubnormals",
    "e4m3:bias=127:nosubnormals", "e4m3:bias=129:nosubnormals", "e5m2:bias=145:nosubnormals:unsigned",
    "e5m0:unsigned", "e3m0:nosubnormals:unsigned:nozero",
    "e4m3fn:nosubnormals:unsigned:nozero", "e7m23", "e7m23:nosubnormals", "e8m23:unsigned", "e10m52",
]  # fmt: skip
CASES = [
    (name, dtype) for name in FORMATS for dtype in CARRIERS if dtype.itemsize > 2 and suits(parse_format(name), dtype)
]


def ends(fmt: FloatFormat, carrier: FloatFormat) -> list[int]:
    """The carrier's codes at and beside half of the smallest value, the smallest value and the largest one."""
    smallest = Fraction(fmt.smallest_subnormal)
    codes = [code_of(value, carrier)[0] for value in (smallest / 2, smallest, Fraction(fmt.max))]
    return [code + step for code in codes for step in (-1, 0, 1) if code + step >= 0]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rounding_on_plain_integers_without_overflow(name, dtype):
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    extremes = [0, 1, carrier.max_code, carrier.max_code + 1, carrier.max_code + 2, carrier.sign_code - 1]
    extremes += ends(fmt, carrier)
    inputs = Inputs([*extremes, *(code | carrier.sign_code for code in extremes)], dtype)
    inputs |= interesting.__wrapped__(fmt, dtype).sample(40) | random_inputs(fmt, dtype, 20)
    for rounding in ROUNDINGS:
        for overflow in overflows(fmt):
            got = run(inputs.codes, fmt, carrier, rounding, overflow)
            want = by_reference(inputs, fmt, rounding, overflow)
            assert_codes(got, want, inputs.codes, (name, rounding, overflow))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_stochastic_rounding_on_plain_integers_without_overflow(name, dtype):
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    grid, ops = Grid(fmt, carrier), WordOps(carrier)
    extremes = [0, 1, carrier.max_code, carrier.max_code + 1, carrier.sign_code]
    inputs = Inputs(extremes, dtype) | interesting.__wrapped__(fmt, dtype).sample(20) | random_inputs(fmt, dtype, 10)
    generator = np.random.default_rng(1)
    for rounding in (
        "stochastic",
        "stochastic:5",
        "stochastic:24",
        "stochastic:32",
        "stochastic_b:9",
        "stochastic_c:9",
    ):
        bits = split_rounding(rounding)[1]
        for overflow in overflows(fmt):
            words = generator.integers(-(2**31), 2**31, len(inputs)) << (carrier.bits - 32)
            words[:4] = [0, -1, -(1 << (carrier.bits - 1)), (1 << (carrier.bits - 1)) - 1]
            for code, word in zip(inputs.codes.tolist(), words.tolist(), strict=True):
                signed = code - 2 * carrier.sign_code if code >= carrier.sign_code else code
                drawn = (word % (1 << carrier.bits)) >> (carrier.bits - bits)
                bit_word, bit_code = Word(word, carrier.bits), Word(signed, carrier.bits)
                got = round_code(bit_code, grid, rounding, overflow, ops, bit_word).value % (1 << carrier.bits)
                value = reference.decode(code, carrier)
                result = reference.round(value, fmt, full_rounding(rounding), overflow, random=drawn)
                assert got == reference.encode(result, carrier), (name, rounding, overflow, hex(code), hex(drawn))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_scaled_rounding_on_plain_integers_without_overflow(name, dtype):
    """The product with the scale is exact, and the quotient is the carrier's number nearest to the exact one."""
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    grid, ops = Grid(fmt, carrier, scaled=True), WordOps(carrier)
    extremes = [0, 1, 2, 3, 1 << (carrier.mantissa_bits - 1), (1 << carrier.mantissa_bits) - 1, carrier.max_code]
    magnitudes = [*extremes, *ends(fmt, carrier), *interesting.__wrapped__(fmt, dtype).sample(16).codes.tolist()]
    limit = carrier.bias - 1
    lowest = max(-limit, fmt.max_exponent - carrier.max_exponent - 1)
    rng = np.random.default_rng(7)
    for code in {code % carrier.sign_code for code in magnitudes}:
        x = reference.decode(code, carrier)
        exponent = floor_log2(x) if isinstance(x, Fraction) and x else 0
        highest = min(limit, carrier.max_exponent - exponent) if isinstance(x, Fraction) else 0
        near = [fmt.emin - fmt.mantissa_bits - exponent + step for step in (-1, 0, 1, fmt.mantissa_bits)]
        powers = [lowest, -1, 0, highest, *near] if isinstance(x, Fraction) else [0]
        for power in {min(max(p, lowest), highest) for p in powers}:
            for sign, rounding in itertools.product((0, carrier.sign_code), (*ROUNDINGS, "stochastic:7")):
                overflow = overflows(fmt)[rng.integers(len(overflows(fmt)))]
                word = int(rng.integers(-(2**31), 2**31)) << (carrier.bits - 32)
                drawn = {"random": (word >> (carrier.bits - 7)) % 128} if ":" in rounding else {}
                value = reference.decode(code | sign, carrier)
                product = value * Fraction(2) ** power if isinstance(value, Fraction) else value
                rounded = reference.round(product, fmt, rounding, overflow, **drawn)
                quotient = rounded / Fraction(2) ** power if isinstance(rounded, Fraction) else rounded
                want = reference.encode(quotient, carrier)
                if want == 0 and quotient != 0 and sign and fmt.has_negative_zero:
                    want = carrier.sign_code
                if want == carrier.sign_code and not fmt.has_negative_zero:
                    want = 0
                scale = Word((carrier.bias + power) << carrier.mantissa_bits, carrier.bits)
                signed = Word(code - carrier.sign_code if sign else code, carrier.bits)
                random = Word(word, carrier.bits) if drawn else 0
                got = round_code(signed, grid, rounding, overflow, ops, random, scale).value % (1 << carrier.bits)
                assert got == want, (name, rounding, overflow, hex(code | sign), power, drawn, rounded)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_encoding_and_decoding_on_plain_integers_without_overflow(name, dtype):
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    grid, ops = Grid(fmt, carrier), WordOps(carrier)
    special = {0, 1, fmt.sign_code, fmt.max_code, (fmt.max_code + 1) % (1 << fmt.bits), (1 << fmt.bits) - 1}
    codes = {*special, *np.random.default_rng(5).integers(0, 1 << fmt.bits, 60, np.uint64).tolist()}
    for code in codes:
        signed = code - (1 << fmt.bits) if fmt.bits == carrier.bits and code >> (fmt.bits - 1) else code
        value = decode_code(Word(signed, carrier.bits), grid, ops).value
        want = reference.encode(reference.decode(code, fmt), carrier)
        assert value % (1 << carrier.bits) == want, hex(code)
        back = encode_code(Word(value, carrier.bits), grid, ops).value % (1 << carrier.bits)
        assert back % (1 << fmt.bits) == reference.encode(reference.decode(code, fmt), fmt), hex(code)


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_constants_of_a_grid_are_the_carriers_codes(name):
    fmt = parse_format(name)
    for carrier in [c for c in CARRIERS.values() if c.bits > 16 and fmt.is_subset_of(c)]:
        grid = Grid(fmt, carrier)
        for value in (fmt.max, fmt.smallest_normal, fmt.smallest_subnormal, 0.0):
            units = int(Fraction(value) * 2**1074)
            assert grid.plain_code_of(units) == reference.encode(value, carrier)
            if not grid.extended:
                assert grid.code_of(units) == reference.encode(value, carrier)
