"""Assertions for tests of rounding: compare tensors bit for bit, and a function with the reference.

The public names of this file are handed on by `fpsim.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim.formats import FloatFormat, check_rounding, parse_format
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.verify.codes import Codes, codes_of, name_of, tensor_of
from fpsim.verify.inputs import random_codes, significand_grid, special_codes
from fpsim.verify.judges import has_table, judge, results_one_by_one
from fpsim.verify.modes import Mode, mode_of

#: The classes of difference between two floats. A pair belongs to the first class that fits.
DIFFERENCES: dict[str, str] = {
    "NaN instead of a number": "got NaN where a number or an infinity is due",
    "number instead of NaN": "got a number or an infinity where NaN is due",
    "NaN payload": "two NaNs of different bits",
    "sign of zero": "two zeros of different signs",
    "sign": "the same magnitude with the other sign",
    "infinity instead of finite": "got an infinity where a finite number is due",
    "finite instead of infinity": "got a finite number where an infinity is due",
    "subnormal flushed to zero": "got a zero where a subnormal is due (of the format, if one is given)",
    "zero instead of a number": "got a zero where another number is due, and no subnormal",
    "number instead of zero": "got a number where a zero is due",
    "beyond the format": "got a finite number larger than the largest of the format",
    "one ulp off": "got a neighbour of what is due, among the numbers of the dtype",
    "one unit of the format off": "got a neighbour of what is due, among the values of the format",
    "value": "any other number",
}
_DTYPES = {name_of(dtype): dtype for dtype in CARRIERS}  # that may be compared, by their names
# Formats of at most so many exponent and mantissa bits have a quick table.
_TABLE_BITS = 10
# The most grid inputs plus random inputs where `fpsim.reference.round` judges each one: for wider formats.
_MOST_ONE_BY_ONE = 1 << 14


class Difference(NamedTuple):
    """The elements that differ in one way.

    Attributes:
        kind: one of `DIFFERENCES`.
        positions: flat indices of the elements, in order.
    """

    kind: str
    positions: NDArray[np.intp]


def classify_differences(
    got: Codes, want: Codes, dtype: torch.dtype, format: str | FloatFormat | None = None
) -> tuple[Difference, ...]:
    """How two flat arrays of codes differ, in the order of `DIFFERENCES`; without the classes that do not occur.

    Args:
        got, want: bit patterns of ``dtype``, unsigned, of the same length (from `fpsim.verify.codes_of`).
        dtype: a carrier.
        format: the format of which ``want`` holds values. If given, results beyond its largest value and results one
            unit off are classes of their own, and subnormals are those of the format.

    Raises:
        ValueError: an unknown format, or one that ``dtype`` cannot carry.

    >>> codes = codes_of(torch.tensor([-0.0, 1.0])), codes_of(torch.tensor([0.0, 1.0]))
    >>> classify_differences(*codes, torch.float32)
    (Difference(kind='sign of zero', positions=array([0])),)
    """
    carrier = CARRIERS[dtype]
    positions = np.flatnonzero(got != want)
    got, want = got[positions], want[positions]
    mask, infinity = got.dtype.type(carrier.sign_code - 1), carrier.max_code + 1
    a, b = (codes & mask for codes in (got, want))
    same_sign = ((got ^ want) & ~mask) == 0
    # The distance in the order of values, where both zeros have the same place. Unsigned numbers must not wrap around.
    apart = np.where(same_sign, np.maximum(a, b) - np.minimum(a, b), np.minimum(a, infinity) + np.minimum(b, infinity))
    fits = {
        "NaN instead of a number": (a > infinity) & (b <= infinity),
        "number instead of NaN": (a <= infinity) & (b > infinity),
        "NaN payload": (a > infinity) & (b > infinity),
        "sign of zero": (a == 0) & (b == 0),
        "sign": a == b,
        "infinity instead of finite": (a == infinity) & (b < infinity),
        "finite instead of infinity": (a < infinity) & (b == infinity),
        "subnormal flushed to zero": (a == 0) & (b < _smallest_normal_code(dtype, format)),
        "zero instead of a number": a == 0,
        "number instead of zero": b == 0,
        "one ulp off": apart == 1,
        "beyond the format": np.zeros(len(a), bool),
        "one unit of the format off": np.zeros(len(a), bool),
        "value": np.ones(len(a), bool),
    }
    if format is not None:
        fits["beyond the format"] = np.abs(_numbers(got, dtype)) > parse_format(format).max
        fits["one unit of the format off"] = _one_unit_off(got, want, dtype, parse_format(format))
    left, found = np.ones(len(a), bool), []
    for kind in DIFFERENCES:
        here = left & fits[kind]
        left &= ~here
        if here.any():
            found.append(Difference(kind, positions[here]))
    return tuple(found)


def _smallest_normal_code(dtype: torch.dtype, format: str | FloatFormat | None) -> int:
    of_dtype = 1 << CARRIERS[dtype].mantissa_bits
    if format is None:
        return of_dtype
    smallest = torch.tensor([parse_format(format).smallest_normal], dtype=torch.float64).to(dtype)
    return max(of_dtype, int(codes_of(smallest)[0]))


def _numbers(codes: Codes, dtype: torch.dtype) -> NDArray[np.float64]:
    return tensor_of(codes, dtype).double().numpy()


def _one_unit_off(got: Codes, want: Codes, dtype: torch.dtype, fmt: FloatFormat) -> NDArray[np.bool_]:
    """Where both are finite numbers of one sign, and their distance is the format's unit at one of them."""
    check_carrier(dtype, fmt)
    a, b = (np.abs(_numbers(codes, dtype)) for codes in (got, want))
    signs = (got ^ want) >> got.dtype.type(CARRIERS[dtype].bits - 1)
    with np.errstate(all="ignore"):
        exponents = (np.frexp(x)[1] - 1 for x in (a, b))
        units = [np.ldexp(1.0, np.maximum(e, fmt.emin) - fmt.mantissa_bits) for e in exponents]
        distance = np.abs(a - b)
    return (signs == 0) & np.isfinite(distance) & ((distance == units[0]) | (distance == units[1]))


def assert_bitwise_equal(
    got: Any,
    want: Any,
    *,
    inputs: Any = None,
    nan_payloads: bool = False,
    signed_zeros: bool = True,
    format: str | FloatFormat | None = None,
    examples: int = 3,
    message: str = "",
) -> None:
    """Fails unless two tensors or arrays have the same dtype, shape and bits.

    Args:
        got, want: tensors (any device, strides, with or without gradient) or numpy arrays of float64, float32,
            bfloat16 or float16, in any pairing.
        inputs: the inputs of the computation, of the same shape and any of these dtypes. The report shows them with
            each example.
        nan_payloads: whether the bits of NaNs count too.
        signed_zeros: whether the sign of a zero counts.
        format: the format of which ``want`` holds values. If given, the report tells results beyond its largest value
            and results one unit off apart from others, and subnormals are those of the format.
        examples: the number of elements of each class that the report shows.
        message: the beginning of the report.

    Raises:
        AssertionError: they differ. The report counts every class of difference (`DIFFERENCES`), and shows the first
            elements of each: index, bits, hexadecimal code and value.
        TypeError: not tensors or arrays of these dtypes.

    >>> assert_bitwise_equal(torch.tensor([1.0, -0.0]), np.array([1.0, 0.0], np.float32))
    Traceback (most recent call last):
    AssertionError: 1 of 2 elements differ (float32): 1 sign of zero
      sign of zero: two zeros of different signs
        [1] got 1|00000000|00000000000000000000000 = 0x80000000 = -0.0
           want 0|00000000|00000000000000000000000 = 0x00000000 = 0.0
    """
    opening = f"{message}: " if message else ""
    got, want = _tensor(got, "got"), _tensor(want, "want")
    if got.dtype != want.dtype:
        raise AssertionError(f"{opening}got {got.dtype}, want {want.dtype}")
    if got.shape != want.shape:
        raise AssertionError(f"{opening}got shape {tuple(got.shape)}, want {tuple(want.shape)}")
    source = None if inputs is None else _tensor(inputs, "inputs")
    if source is not None and source.shape != got.shape:
        raise AssertionError(f"{opening}inputs have shape {tuple(source.shape)}, got and want {tuple(got.shape)}")
    ignored = {"NaN payload"} - ({"NaN payload"} if nan_payloads else set())
    ignored |= set() if signed_zeros else {"sign of zero"}
    left, right = (codes_of(each).ravel() for each in (got, want))
    differences = [each for each in classify_differences(left, right, got.dtype, format) if each.kind not in ignored]
    if differences:
        lines = _report(differences, got, want, source, examples)
        raise AssertionError(opening + "\n".join(lines))


def _report(
    differences: Sequence[Difference],
    got: torch.Tensor,
    want: torch.Tensor,
    source: torch.Tensor | None,
    examples: int,
) -> list[str]:
    counts = ", ".join(f"{len(each.positions):,} {each.kind}" for each in differences)
    total = sum(len(each.positions) for each in differences)
    name = name_of(got.dtype)
    lines = [f"{total:,} of {got.numel():,} elements differ ({name}): {counts}"]
    for kind, positions in differences:
        lines.append(f"  {kind}: {DIFFERENCES[kind]}")
        for position in positions[:examples].tolist():
            index = "[" + ", ".join(str(i) for i in np.unravel_index(position, tuple(got.shape))) + "]"
            lines.append(f"    {index} got {_show_datum(got, position)}")
            lines.append(f"{'want':>{4 + len(index) + 4}} {_show_datum(want, position)}")
            if source is not None:
                lines.append(f"{'from':>{4 + len(index) + 4}} {_show_datum(source, position)}")
        if len(positions) > examples:
            lines.append(f"    and {len(positions) - examples:,} more")
    return lines


def _show_datum(x: torch.Tensor, position: int) -> str:
    """An element as sign, exponent and mantissa fields, as a hexadecimal code, and as a number."""
    element = x.reshape(-1)[position : position + 1]
    carrier, code = CARRIERS[x.dtype], int(codes_of(element)[0])
    digits = f"{code:0{carrier.bits}b}"
    fields = f"{digits[0]}|{digits[1 : 1 + carrier.exponent_bits]}|{digits[1 + carrier.exponent_bits :]}"
    return f"{fields} = {code:#0{carrier.bits // 4 + 2}x} = {element.item()!r}"


def _tensor(x: Any, name: str) -> torch.Tensor:
    """A tensor or an array as a contiguous CPU tensor of a carrier's dtype."""
    if isinstance(x, np.ndarray) and str(x.dtype) in _DTYPES:
        dtype = _DTYPES[str(x.dtype)]
        if dtype == torch.bfloat16:  # from ml_dtypes, which torch does not take
            return tensor_of(np.ascontiguousarray(x).view(np.uint16), dtype).reshape(x.shape)
        x = torch.from_numpy(np.ascontiguousarray(x)).reshape(x.shape)
    if not isinstance(x, torch.Tensor) or x.dtype not in CARRIERS:
        kind = f"{type(x).__name__} of {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"{name} must be a tensor or an array of {', '.join(_DTYPES)}, got {kind}: convert it first")
    return x.detach().cpu().contiguous()


# -- functions -------------------------------------------------------------------------------------------------


def assert_rounds(
    function: Callable[[torch.Tensor], Any],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    samples: int = 1 << 16,
    seed: int = 0,
    nan_payloads: bool = False,
    signed_zeros: bool = True,
    examples: int = 3,
) -> None:
    """Fails unless ``function`` rounds every element of a tensor to ``format`` as the reference does.

    Inputs are every boundary between two results, every result, zeros, infinities, NaNs and the extremes of
    ``dtype``, each with its two neighbours on either side. There are also random bit patterns, half of them with
    magnitudes in the format's range. For formats of more than 10 exponent and mantissa bits, inputs are zeros,
    infinities, NaNs and extremes, at most 8192 numbers on a grid of significands in every binade, and at most 8192
    random ones.

    Args:
        function: takes a tensor of one dimension, and returns one (or an array) of the same shape and dtype.
        format: a name (`fpsim.parse_format`) or a `FloatFormat`.
        rounding: one of `fpsim.formats.ROUNDINGS` (a stochastic one has no single right result).
        overflow: as in `fpsim.round`.
        dtype: of the tensor: float64, float32, bfloat16 or float16.
        device: of the tensor.
        samples: the number of random inputs.
        seed: of the random inputs.
        nan_payloads, signed_zeros, examples: as in `assert_bitwise_equal`.

    Raises:
        AssertionError: a result is wrong; the report is that of `assert_bitwise_equal`, with the inputs.
        ValueError: an unknown format or mode, or a format that ``dtype`` cannot carry.
        TypeError: ``dtype`` is not a carrier, or ``function`` returns something else.

    >>> assert_rounds(lambda x: x.to(torch.bfloat16).float(), "bf16", samples=1000)
    >>> assert_rounds(lambda x: x.to(torch.bfloat16).float(), "bf16", "toward_zero", samples=1000)
    Traceback (most recent call last):
    AssertionError: ...
    """
    mode = mode_of(format, check_rounding(rounding), overflow)
    check_carrier(dtype, mode.format)
    rng = np.random.default_rng(seed)
    codes = _inputs(mode, dtype, samples, rng)
    want = tensor_of(_expected(mode, codes, dtype), dtype)
    x = tensor_of(codes.copy(), dtype).to(device)  # a function may work in place
    assert_bitwise_equal(
        function(x),
        want,
        inputs=tensor_of(codes, dtype),
        nan_payloads=nan_payloads,
        signed_zeros=signed_zeros,
        format=mode.format,
        examples=examples,
        message=f"{mode} on {name_of(dtype)}",
    )


def _inputs(mode: Mode, dtype: torch.dtype, samples: int, rng: np.random.Generator) -> Codes:
    carrier = CARRIERS[dtype]
    random = random_codes([mode.format], carrier, samples, rng)
    if has_table(mode.format, mode.rounding, _TABLE_BITS):
        return np.concatenate([judge(*mode, dtype).probes(), random])
    grid = significand_grid(mode.format, carrier)
    kept = rng.choice(grid, min(len(grid), _MOST_ONE_BY_ONE // 2), replace=False)
    return np.concatenate([special_codes(carrier), kept, random[: _MOST_ONE_BY_ONE // 2]])


def _expected(mode: Mode, codes: Codes, dtype: torch.dtype) -> Codes:
    if has_table(mode.format, mode.rounding, _TABLE_BITS):
        return judge(*mode, dtype).expected(codes)
    return results_one_by_one(*mode, codes, dtype)
