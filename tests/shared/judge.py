"""The reference's results for millions of bit patterns at once, and assertions that compare tensors with them.

Narrow formats are judged by their whole table, as `fpsim.verify` expands it. Wide ones, whose tables would be too
long, are judged by the definition of rounding with numpy's ``floor``, exact in float64; ``test_rounding.py`` checks
that judge against `reference.round`, and against the tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.formats import FloatFormat, parse_format, resolve_overflow
from fpsim.verify.codes import codes_of, tensor_of
from fpsim.verify.judges import judge

CARRIERS = {
    torch.float64: parse_format("fp64"),
    torch.float32: parse_format("fp32"),
    torch.bfloat16: parse_format("bf16"),
    torch.float16: parse_format("fp16"),
}
UNSIGNED = {64: np.uint64, 32: np.uint32, 16: np.uint16}

#: Formats of at most so many exponent and mantissa bits are judged by their table.
TABLE_BITS = 8


def suits(fmt: FloatFormat, dtype: torch.dtype) -> bool:
    """Whether tensors of the dtype can carry the format."""
    return fmt.is_subset_of(CARRIERS[dtype])


# -- inputs --------------------------------------------------------------------------------------------------------


class Inputs:
    """Distinct bit patterns of a dtype in increasing order, and the tensor that holds them."""

    def __init__(self, codes: Iterable[int] | np.ndarray, dtype: torch.dtype) -> None:
        self.dtype = dtype
        codes = np.sort(np.asarray(codes, UNSIGNED[CARRIERS[dtype].bits]), axis=None)
        self.codes = codes[np.diff(codes, prepend=~codes[:1]) != 0]  # np.unique takes ten times as long

    def __len__(self) -> int:
        return len(self.codes)

    def __or__(self, other: Inputs) -> Inputs:
        return Inputs(np.concatenate([self.codes, other.codes]), self.dtype)

    @cached_property
    def tensor(self) -> Tensor:
        return tensor_of(self.codes, self.dtype)

    @cached_property
    def values(self) -> np.ndarray:
        """The numbers themselves, in float64."""
        return self.tensor.double().numpy()

    def sample(self, count: int, seed: int = 0) -> Inputs:
        """Some of them, at random."""
        return Inputs(np.random.default_rng(seed).choice(self.codes, min(count, len(self)), replace=False), self.dtype)


@cache
def every_code(dtype: torch.dtype) -> Inputs:
    """All bit patterns of a 16-bit dtype."""
    return Inputs(np.arange(1 << 16), dtype)


@cache
def specials(dtype: torch.dtype) -> Inputs:
    """Zeros, infinities, the extremes of the dtype, powers of two and their neighbours, and NaNs of many payloads."""
    carrier = CARRIERS[dtype]
    m, infinity, top = carrier.mantissa_bits, carrier.max_code + 1, carrier.sign_code - 1
    powers = [field << m for field in range(1, 1 << carrier.exponent_bits)] + [1 << k for k in range(m)]
    magnitudes = {0, 1, 2, 3, top} | {power + step for power in powers for step in (-2, -1, 0, 1, 2)}
    magnitudes |= {infinity + (1 << k) for k in range(m)}
    magnitudes |= set(np.random.default_rng(7).integers(infinity + 1, top, 100).tolist())
    return _with_both_signs(np.array([c for c in magnitudes if 0 <= c <= top], np.uint64), dtype)


@cache
def interesting(fmt: FloatFormat, dtype: torch.dtype) -> Inputs:
    """Every value of the format and every midpoint of two, some beyond the largest, each with its neighbours.

    For wide formats, only the values with extreme or middle mantissas. For 16-bit dtypes, all bit patterns. The
    `specials` are always among them.
    """
    if dtype.itemsize == 2:
        return every_code(dtype)
    count = 1 << fmt.mantissa_bits
    middle = count // 2
    chosen = {0, 1, 2, middle - 2, middle - 1, middle, middle + 1, count - 2, count - 1}
    narrow = fmt.exponent_bits + fmt.mantissa_bits <= TABLE_BITS
    mantissas = np.array(list(range(count)) if narrow else sorted(m for m in chosen if 0 <= m < count))
    halves = np.concatenate([mantissas, mantissas + 0.5]) / count
    fields = np.arange(-2, (1 << fmt.exponent_bits) + 3).reshape(-1, 1)  # some more at both ends
    with np.errstate(all="ignore"):
        normals = np.ldexp(1 + halves, np.clip(fields - fmt.bias, -2000, 2000)).ravel()
        subnormals = np.ldexp(np.append(halves, [0.25 / count, 0.75 / count]), fmt.emin)
        points = torch.from_numpy(np.concatenate([normals, subnormals]))
    codes = np.unique(codes_of(points.to(dtype))).astype(np.uint64)
    codes = np.unique(codes.reshape(-1, 1) + np.arange(5, dtype=np.uint64))
    codes = codes[codes >= 2] - np.uint64(2)
    return _with_both_signs(codes[codes < CARRIERS[dtype].sign_code], dtype) | specials(dtype)


def _with_both_signs(magnitudes: np.ndarray, dtype: torch.dtype) -> Inputs:
    return Inputs(np.concatenate([magnitudes, magnitudes | np.uint64(CARRIERS[dtype].sign_code)]), dtype)


def random_inputs(fmt: FloatFormat, dtype: torch.dtype, count: int, seed: int = 1) -> Inputs:
    """Random bit patterns: half are any of the dtype's, half have exponents in the format's range or close to it."""
    carrier, rng = CARRIERS[dtype], np.random.default_rng(seed)
    m = carrier.mantissa_bits
    anywhere = rng.integers(0, 1 << carrier.bits, count // 2, np.uint64)
    low = min(max(fmt.emin - fmt.mantissa_bits - 3 + carrier.bias, 0), 2 * carrier.bias)
    high = min(max(fmt.max_exponent + 3 + carrier.bias, low + 1), 2 * carrier.bias + 1)
    fields = rng.integers(low, high, count - count // 2, np.uint64, endpoint=True)
    signs = rng.integers(0, 2, fields.size, np.uint64) << np.uint64(carrier.bits - 1)
    near = signs | (fields << np.uint64(m)) | rng.integers(0, 1 << m, fields.size, np.uint64)
    return Inputs(np.concatenate([anywhere, near]), dtype)


# -- judges --------------------------------------------------------------------------------------------------------


def expected(inputs: Inputs, fmt: FloatFormat, rounding: str, overflow: str | None = None) -> np.ndarray:
    """The codes that the inputs must become; NaN stands as the carrier's `FloatFormat.nan_code`."""
    narrow = fmt.exponent_bits + fmt.mantissa_bits <= TABLE_BITS
    return (by_table if narrow else by_definition)(inputs, fmt, rounding, overflow)


def expected_of(x: Tensor, format: str, rounding: str = "nearest_even", overflow: str | None = None) -> np.ndarray:
    """`expected` for a tensor of any shape and strides: codes in its shape."""
    inputs = Inputs(codes_of(x), x.dtype)
    return expected(inputs, parse_format(format), rounding, overflow)[np.searchsorted(inputs.codes, codes_of(x))]


def by_table(inputs: Inputs, fmt: FloatFormat, rounding: str, overflow: str | None = None) -> np.ndarray:
    """The results by expansion of `reference.table`."""
    return judge(fmt, rounding, overflow, inputs.dtype).expected(inputs.codes)


def by_reference(inputs: Inputs, fmt: FloatFormat, rounding: str, overflow: str | None = None) -> np.ndarray:
    """The results one by one from `reference.round`."""
    values = [reference.round(x, fmt, rounding, overflow) for x in inputs.values.tolist()]
    return np.array([reference.encode(v, CARRIERS[inputs.dtype]) for v in values], inputs.codes.dtype)


def by_definition(inputs: Inputs, fmt: FloatFormat, rounding: str, overflow: str | None = None) -> np.ndarray:
    """The results by scaling the last place to 1, rounding to an integer, and scaling back: all exact in float64."""
    overflow = resolve_overflow(fmt, overflow)
    x = inputs.values
    negative, infinite = np.signbit(x), np.isinf(x)
    away = {"up": ~negative, "down": negative, "toward_zero": False, "to_odd": False}.get(rounding, True)
    with np.errstate(all="ignore"):
        fraction, exponent = np.frexp(np.abs(x))  # fraction in [0.5, 1)
        exponent -= 1
        last_place = (np.maximum(exponent, fmt.emin) if fmt.subnormals else exponent) - fmt.mantissa_bits
        # A number far below the last place matters only by not being zero.
        scaled = np.ldexp(fraction, np.maximum(exponent + 1 - last_place, -60))
        below = np.floor(scaled)
        rest = scaled - below
        code = below if fmt.mantissa_bits else below - 1 + last_place + fmt.bias  # or another of the same parity
        odd = code % 2 == 1
        inexact = rest > 0
        upwards = {
            "nearest_even": (rest > 0.5) | ((rest == 0.5) & odd),
            "nearest_away": rest >= 0.5,
            "to_odd": inexact & ~odd,
        }.get(rounding, inexact & away)
        rounded = np.ldexp(below + upwards, last_place)

    lowest = 0.0 if fmt.zero else fmt.smallest_normal
    if not fmt.subnormals:
        rounded[rounded < fmt.smallest_normal] = lowest
    nan = np.nan if fmt.has_nan else fmt.max
    infinity = np.inf if fmt.has_infinity else nan
    overflowing = (rounded > fmt.max) & ~infinite
    result = np.where(overflowing, np.where(away & (overflow == "ovf_inf"), infinity, fmt.max), rounded)
    result[infinite] = fmt.max if overflow == "sat_finite" else infinity
    if not fmt.signed:
        below_range = negative & (rounded > 0)
        below = nan if fmt.has_nan else lowest
        result[below_range] = below if overflow == "ovf_inf" else lowest
        result[negative & infinite] = lowest if overflow == "sat_finite" else below
        if not fmt.zero:
            result[x == 0] = below if overflow == "ovf_inf" else lowest
        negative[:] = False
    result = np.where(negative & ((result != 0) | fmt.has_negative_zero), -result, result)
    result[np.isnan(x)] = nan
    return canonical(codes_of(torch.from_numpy(result).to(inputs.dtype)), inputs.dtype)


# -- comparing -----------------------------------------------------------------------------------------------------


def canonical(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The codes, with every NaN replaced by the dtype's `FloatFormat.nan_code`."""
    carrier = CARRIERS[dtype]
    is_nan = (codes & codes.dtype.type(carrier.sign_code - 1)) > carrier.max_code + 1
    return np.where(is_nan, codes.dtype.type(carrier.nan_code), codes)


def hexadecimal(codes: np.ndarray) -> list[str]:
    """Codes as hexadecimal text of their full width."""
    return [f"{code:#0{2 + 2 * codes.dtype.itemsize}x}" for code in codes.tolist()]


def assert_codes(got: np.ndarray, want: np.ndarray, inputs: np.ndarray, what: object = "") -> None:
    """Fails unless the codes are the same; the message shows some inputs, their results and the right ones."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    wrong = np.flatnonzero(got != want)
    if wrong.size:
        shown = wrong[:: max(1, wrong.size // 8)][:8]
        rows = zip(*(hexadecimal(codes.ravel()[shown]) for codes in (inputs, got, want)), strict=True)
        lines = [f"  {x} -> {g}, expected {w}" for x, g, w in rows]
        raise AssertionError("\n".join([f"{what}: {wrong.size} of {got.size} differ", *lines]))


def assert_rounds(inputs: Inputs, fmt: FloatFormat, rounding: str, overflow: str | None, judge=expected) -> None:
    """Fails unless `fpsim.round` gives the judge's results, bit for bit; all NaNs count as equal."""
    result = fpsim.round(inputs.tensor, fmt, rounding=rounding, overflow=overflow)
    got, want = canonical(codes_of(result), inputs.dtype), judge(inputs, fmt, rounding, overflow)
    assert_codes(got, want, inputs.codes, f"{fmt} {rounding} {overflow} on {inputs.dtype}")


def assert_result(got: Tensor, x: Tensor, format: str, rounding: str = "nearest_even", overflow=None) -> None:
    """Fails unless ``got`` is ``x`` rounded."""
    assert (got.shape, got.dtype, got.device) == (x.shape, x.dtype, x.device)
    want = expected_of(x, format, rounding, overflow)
    assert_codes(canonical(codes_of(got), x.dtype), want, codes_of(x), f"{format} {rounding} {overflow} {x.dtype}")


def assert_same_bits(got: Tensor, want: Tensor, inputs: Tensor | None = None, what: object = "") -> None:
    """Fails unless two tensors have the same dtype, shape and bits, those of NaNs included."""
    assert got.dtype == want.dtype
    assert_codes(codes_of(got), codes_of(want), codes_of(want if inputs is None else inputs), what)
