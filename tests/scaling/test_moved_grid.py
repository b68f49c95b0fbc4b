"""Rounding in blocks by moving the grid, on plain numbers, against the exact reference."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from fpsim import reference
from fpsim.formats import IntegerFormat, parse_format
from fpsim.rounding.kernel import Grid
from fpsim.scaling.moved_grid import round_on_moved_grid, suits, unsuitable
from fpsim.scaling.rules import nan_mark_code
from tests.rounding.test_float_forms import FloatWordOps, signed
from tests.rounding.test_kernel import Word
from tests.shared.judge import CARRIERS

CARRIER = CARRIERS[torch.float32]
#: The formats of the elements of OCP MX, and the powers of two with which the form is right. The last format is that of
#: MXINT8, which has no negative zero. From the lowest power on, the largest sum is finite. Up to the highest one, a
#: subnormal of float32 becomes zero.
FORMATS = {
    "e4m3fn": (-99, 116), "e5m2": (-91, 109), "e3m2fn": (-102, 121), "e2m3fn": (-105, 122), "e2m1fn": (-103, 124),
    "e1m6fnuz": (-110, 119),
}  # fmt: skip


def multiplier(power: int) -> Word:
    return Word((CARRIER.bias + power) << CARRIER.mantissa_bits, 32)


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("rule", ["rceil", "floor"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_the_rounded_product_divided_by_the_multiplier(name: str, rule: str, flushing: bool) -> None:
    fmt = parse_format(name)
    grid, ops, rng = Grid(fmt, CARRIER, scaled=True), FloatWordOps(CARRIER, flushing), np.random.default_rng(5)
    assert suits(grid, "nearest_even", "sat_finite", rule)
    largest, unit = Fraction(fmt.max_units, 1 << 1074), Fraction(2) ** (fmt.emin - fmt.mantissa_bits)
    lowest, highest = FORMATS[name]
    for power in (lowest, lowest + 1, -1, 0, 7, highest - 1, highest):
        factor = Fraction(2) ** power
        halves = [unit * Fraction(n, 2) for n in (1, 2, 3, 4, 7, 9)]
        anywhere = [Fraction(2) ** int(e) * Fraction(int(n), 64) for e, n in rng.integers((-12, 64), (9, 128), (12, 2))]
        codes = [0, 1, (1 << CARRIER.mantissa_bits) - 1]
        codes += [reference.encode(x / factor, CARRIER) + step for x in (*halves, largest) for step in (-1, 0, 1)]
        codes += [reference.encode(min(x, largest) / factor, CARRIER) for x in anywhere]
        codes += [reference.encode(largest * 2 / factor, CARRIER)] if power > lowest else []
        for code, sign in itertools.product(codes, (0, CARRIER.sign_code)):
            value = reference.decode(code | sign, CARRIER)
            product = value * factor if isinstance(value, Fraction) else value  # -0 has no fraction
            if rule == "rceil" and isinstance(product, Fraction) and abs(product) > largest:
                continue  # the rule gives a larger scale
            assert unsuitable(Word(code, 32), multiplier(power), grid).value == 0
            got = round_on_moved_grid(signed(code | sign, CARRIER), multiplier(power), grid, rule, ops).value
            rounded = reference.round(product, fmt, "nearest_even", "sat_finite")
            want = reference.encode(rounded / factor if isinstance(rounded, Fraction) else rounded, CARRIER)
            assert got % (1 << 32) == want, (hex(code | sign), power)


@pytest.mark.parametrize("name", FORMATS)
def test_other_multipliers_are_unsuitable_but_for_zero(name: str) -> None:
    fmt = parse_format(name)
    grid, (lowest, highest) = Grid(fmt, CARRIER, scaled=True), FORMATS[name]
    ops = FloatWordOps(CARRIER, flushing=False)
    for magnitude in (0, 1, CARRIER.max_code, CARRIER.max_code + 1, CARRIER.nan_code):
        too_low = [Word(nan_mark_code(grid), 32), Word(0, 32), *map(multiplier, range(-126, lowest))]
        assert all(unsuitable(Word(magnitude, 32), each, grid).value for each in too_low)
        too_high = [unsuitable(Word(magnitude, 32), multiplier(power), grid).value for power in range(highest + 1, 128)]
        assert all(bool(value) == (magnitude > 0) for value in too_high)
    for power, code in itertools.product(range(highest + 1, 128), (0, CARRIER.sign_code)):
        got = round_on_moved_grid(signed(code, CARRIER), multiplier(power), grid, "rceil", ops).value
        assert got % (1 << 32) == (code if fmt.has_negative_zero else 0)


def test_which_casts_have_the_form() -> None:
    e4m3fn, int8 = (Grid(parse_format(name), CARRIER, scaled=True) for name in ("e4m3fn", "e1m6fnuz"))
    assert IntegerFormat(8, unit_exponent=-6).grid() == int8.fmt
    assert suits(e4m3fn, "nearest_even", "ovf_inf", "rceil") and suits(int8, "nearest_even", "sat_finite", "rceil")
    assert not suits(e4m3fn, "nearest_even", "ovf_inf", "floor"), "a number may exceed the grid"
    assert not suits(e4m3fn, "toward_zero", "sat_finite", "rceil")
    wide = Grid(parse_format("e4m3fn"), CARRIERS[torch.float64], scaled=True)
    assert not suits(wide, "nearest_even", "sat_finite", "rceil"), "the largest scale is too small for float64"
