"""The forms of rounding with floating-point sums and products, on plain numbers, against the exact reference.

The executor computes in numpy's float32 and float64. It can also flush subnormal operands and results to zero, as a
processor does in that mode.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from fpsim import reference
from fpsim.formats import FloatFormat, parse_format, split_rounding
from fpsim.formats.modes import ROUNDINGS, full_rounding
from fpsim.rounding.float_forms import round_with_floats, scale_suits, suits
from fpsim.rounding.kernel import Grid
from tests.rounding.test_kernel import Word, WordOps, by_reference, ends
from tests.shared.formats import overflows
from tests.shared.judge import CARRIERS, Inputs, assert_codes, interesting, random_inputs


class FloatWordOps(WordOps):
    """The executor on `Word`, with the carrier's arithmetic."""

    def __init__(self, carrier: FloatFormat, flushing: bool) -> None:
        super().__init__(carrier)
        self.flushing = flushing
        self.floats = {32: np.float32, 64: np.float64}[carrier.bits]

    def _flushed(self, number: np.floating) -> np.floating:
        return number * 0 if self.flushing and abs(number) < np.finfo(self.floats).smallest_normal else number

    def _float(self, a: Word) -> np.floating:
        return self._flushed(np.array(a.value, f"i{a.bits // 8}").view(self.floats)[()])

    def _word(self, number: np.floating, bits: int) -> Word:
        return Word(int(np.array(self._flushed(number)).view(f"i{bits // 8}")), bits)

    def sum(self, a: Word, b: Word) -> Word:
        return self._word(self._float(a) + self._float(b), a.bits)

    def difference(self, a: Word, b: Word) -> Word:
        return self._word(self._float(a) - self._float(b), a.bits)

    def product(self, a: Word, b: Word) -> Word:
        return self._word(self._float(a) * self._float(b), a.bits)

    def truncated(self, a: Word) -> Word:
        return Word(int(self._float(a)), a.bits)


STOCHASTIC = ("stochastic", "stochastic:5", "stochastic_b:9")
MODES = (*ROUNDINGS, *STOCHASTIC)
FORMATS = [
    "e4m3fn", "e5m2", "e2m1fn", "fp16", "e4m3fnuz", "e4m3b11fnuz", "e3m2fn", "e2m3fn", "e4m3", "e1m3", "e2m1",
    "binary8p3se", "binary8p4se", "e6m9", "e5m2:bias=-5", "e5m2:bias=100", "e7m6", "e5m22", "e5m21", "bf16",
]  # fmt: skip
FLOAT64_FORMATS = ["e4m3fn", "fp16", "bf16", "fp32", "e9m30", "e8m50"]
CASES = [
    (name, dtype)
    for names, dtype in ((FORMATS, torch.float32), (FLOAT64_FORMATS, torch.float64))
    for name in names
    if parse_format(name).is_subset_of(CARRIERS[dtype])
]


def signed(code: int, carrier: FloatFormat) -> Word:
    return Word(code - 2 * carrier.sign_code if code >= carrier.sign_code else code, carrier.bits)


def inputs_of(fmt: FloatFormat, carrier: FloatFormat, dtype: torch.dtype, count: int) -> Inputs:
    """Zero, subnormals, NaNs, infinity, the format's smallest and largest values, and numbers beside boundaries."""
    quantum = 1 << carrier.mantissa_bits
    extremes = [0, 1, 2, quantum - 1, quantum, carrier.max_code, carrier.max_code + 1, carrier.max_code + 2]
    extremes += [carrier.nan_code, carrier.nan_code + 5, carrier.sign_code - 1, *ends(fmt, carrier)]
    inputs = Inputs([*extremes, *(code | carrier.sign_code for code in extremes)], dtype)
    return inputs | interesting.__wrapped__(fmt, dtype).sample(count) | random_inputs(fmt, dtype, count // 2)


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_deterministic_rounding(name: str, dtype: torch.dtype, flushing: bool) -> None:
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    grid, ops = Grid(fmt, carrier), FloatWordOps(carrier, flushing)
    inputs = inputs_of(fmt, carrier, dtype, 32)
    for rounding in filter(lambda rounding: suits(grid, rounding), ROUNDINGS):
        for overflow in overflows(fmt):
            with np.errstate(all="ignore"):
                got = [
                    round_with_floats(signed(code, carrier), grid, rounding, overflow, ops).value
                    for code in inputs.codes.tolist()
                ]
            codes = np.array(got, f"i{carrier.bits // 8}").view(inputs.codes.dtype)
            assert_codes(codes, by_reference(inputs, fmt, rounding, overflow), inputs.codes, (name, rounding, overflow))


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding(name: str, flushing: bool) -> None:
    fmt, carrier = parse_format(name), CARRIERS[torch.float32]
    grid, ops = Grid(fmt, carrier), FloatWordOps(carrier, flushing)
    codes = inputs_of(fmt, carrier, torch.float32, 16).codes.tolist()
    words = np.random.default_rng(1).integers(-(2**31), 2**31, len(codes)).tolist()
    words[:4] = [0, -1, -(1 << 31), (1 << 31) - 1]
    for rounding in filter(lambda rounding: suits(grid, rounding), STOCHASTIC):
        bits = split_rounding(rounding)[1]
        for overflow, (code, word) in itertools.product(overflows(fmt), zip(codes, words, strict=True)):
            drawn = (word % (1 << 32)) >> (32 - bits)
            with np.errstate(all="ignore"):
                got = round_with_floats(signed(code, carrier), grid, rounding, overflow, ops, Word(word, 32)).value
            value = reference.decode(code, carrier)
            want = reference.encode(
                reference.round(value, fmt, full_rounding(rounding), overflow, random=drawn), carrier
            )
            assert got % (1 << 32) == want, (rounding, overflow, hex(code), hex(drawn))


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_scaled_rounding(name: str, dtype: torch.dtype, flushing: bool) -> None:
    """The reference rounds the exact product. Its quotient with the scale is a number of the carrier, or infinity."""
    fmt, carrier = parse_format(name), CARRIERS[dtype]
    grid, ops = Grid(fmt, carrier, scaled=True), FloatWordOps(carrier, flushing)
    rng = np.random.default_rng(3)
    limit = carrier.bias - 1
    for rounding in filter(lambda rounding: suits(grid, rounding), MODES):
        powers = [-limit, -limit + 1, -20, -1, 0, 1, 20, *range(limit - 60, limit + 1)]
        scales = {power: Word((carrier.bias + power) << carrier.mantissa_bits, carrier.bits) for power in powers}
        allowed = [power for power, scale in scales.items() if scale_suits(scale, grid, rounding, ops).value]
        assert allowed == powers[: len(allowed)], "all powers up to the largest"
        for power in (allowed[0], 0, allowed[-1], int(rng.choice(allowed))):
            near = [fmt.emin - fmt.mantissa_bits - power + step for step in (-2, -1, 0, 1, fmt.mantissa_bits + 2)]
            numbers = [Fraction(2) ** n * Fraction(int(k), 64) for n in near for k in rng.integers(64, 128, 2)]
            codes = [reference.encode(x, carrier) for x in numbers]
            codes += [0, 1, (1 << carrier.mantissa_bits) - 1]
            codes += [carrier.max_code + 1, carrier.nan_code + 3] if power == 0 else []  # other scales are for numbers
            for code, sign in itertools.product(codes, (0, carrier.sign_code)):
                value = reference.decode(code | sign, carrier)
                product = value * Fraction(2) ** power if isinstance(value, Fraction) else value
                if isinstance(product, Fraction) and abs(product) > Fraction(fmt.max_units, 1 << 1074):
                    continue  # no rule gives such a scale
                overflow = overflows(fmt)[rng.integers(len(overflows(fmt)))]
                bits = split_rounding(rounding)[1]
                word = int(rng.integers(-(2**31), 2**31))
                drawn = {"random": (word % (1 << 32)) >> (32 - bits)} if bits else {}
                rounded = reference.round(product, fmt, full_rounding(rounding), overflow, **drawn)
                quotient = rounded / Fraction(2) ** power if isinstance(rounded, Fraction) else rounded
                with np.errstate(all="ignore"):
                    number, random = signed(code | sign, carrier), Word(word, 32)
                    got = round_with_floats(number, grid, rounding, overflow, ops, random, scales[power]).value
                want = reference.encode(quotient, carrier)
                assert got % (1 << carrier.bits) == want, (rounding, overflow, hex(code | sign), power, drawn)


def test_which_modes_have_such_a_form() -> None:
    for name in ("e4m3fn", "e5m2", "e2m1fn", "e4m3fnuz"):
        grid = Grid(parse_format(name), CARRIERS[torch.float32])
        assert all(suits(grid, rounding) for rounding in MODES), name
    for name in (
        "bf16",
        "e8m3",
        "tf32",
        "e8m0fnu",
        "e5m2:bias=130",
        "e4m3:nosubnormals",
        "e4m3:unsigned",
        "e4m0",
        "fp32",
    ):
        grid = Grid(parse_format(name), CARRIERS[torch.float32])
        assert not any(suits(grid, rounding) for rounding in MODES), name
