"""Inputs where an error of rounding is likely, for formats that have no table, and random inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fpsim.formats import FloatFormat
from fpsim.verify.codes import Codes, unsigned_of


def special_codes(carrier: FloatFormat) -> Codes:
    """Zeros, infinities, NaNs, the extremes of the carrier's finite numbers, and their neighbours."""
    normal, infinity = 1 << carrier.mantissa_bits, carrier.max_code + 1
    magnitudes = [0, 1, 2, normal - 1, normal, normal + 1]
    magnitudes += [infinity - 2, infinity - 1, infinity, infinity + 1, carrier.sign_code - 1]
    codes = [sign | magnitude for sign in (0, carrier.sign_code) for magnitude in magnitudes]
    return np.array(codes, unsigned_of(carrier))


def significand_grid(fmt: FloatFormat, carrier: FloatFormat) -> Codes:
    """Codes of ``carrier`` in every binade, both signs, of few significands: ties of ``fmt`` and neighbours among them.

    As in Berkeley TestFloat, both the bits that ``fmt`` keeps and those that it drops take a few patterns: near zero,
    near one half, near one.
    """
    dropped = carrier.mantissa_bits - fmt.mantissa_bits
    kept = {code & ((1 << fmt.mantissa_bits) - 1) for code in (0, 1, 2, 1 << fmt.mantissa_bits >> 1, -2, -1)}
    half = 1 << dropped >> 1
    rest = {code & ((1 << dropped) - 1) for code in (0, 1, half - 1, half, half + 1, -1)}
    significands = [(k << dropped) | r for k in sorted(kept) for r in sorted(rest)]
    fields = range(1 << (1 + carrier.exponent_bits))  # with the sign
    codes = [(field << carrier.mantissa_bits) | significand for field in fields for significand in significands]
    return np.array(codes, unsigned_of(carrier))


def random_codes(formats: Sequence[FloatFormat], carrier: FloatFormat, count: int, rng: np.random.Generator) -> Codes:
    """Random codes of ``carrier``: half are any bit pattern, half have a magnitude in the range of ``formats``.

    The range reaches 8 times beyond the smallest and the largest magnitude of the formats.
    """
    unsigned = unsigned_of(carrier)
    codes = rng.integers(0, 1 << carrier.bits, count, dtype=unsigned, endpoint=False)
    near = codes[::2]  # a view
    low = max(min(fmt.emin - fmt.mantissa_bits for fmt in formats) - 3 + carrier.bias, 0)
    high = min(max(fmt.max_exponent for fmt in formats) + 3 + carrier.bias, (1 << carrier.exponent_bits) - 1)
    fields = rng.integers(low, high, len(near), dtype=unsigned, endpoint=True) << unsigned(carrier.mantissa_bits)
    near &= unsigned(carrier.sign_code | ((1 << carrier.mantissa_bits) - 1))
    near |= fields
    return codes
