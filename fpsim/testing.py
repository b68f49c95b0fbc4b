"""For tests of your own kernels: compare tensors bit for bit, compare a function with the reference, draw inputs.

`assert_bitwise_equal` says not only that two tensors differ but how: a sign of zero, a flushed subnormal, one unit in
the last place. `assert_rounds` runs a function on the inputs where an error is likeliest and compares it with
`fpsim.reference`, as `fpsim.verify` does with `fpsim.round`. `formats`, `values_near_boundaries` and `tensors` are
strategies of hypothesis, which they import when called (it comes with ``pip install 'fpsim[dev]'``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim.formats import FloatFormat, check_rounding, parse_format
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.verify.run import Codes, Mode, code_of, codes_of, judge, mode_of, significand_grid, tensor_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from fpsim.reference import Value

__all__ = [
    "DIFFERENCES",
    "Difference",
    "assert_bitwise_equal",
    "assert_rounds",
    "classify_differences",
    "formats",
    "tensors",
    "values_near_boundaries",
]

#: The classes of difference between two data; each pair is of the first that fits.
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
#: The dtype of the codes of each carrier, and what else may be compared.
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
# Inputs that `fpsim.reference.round` judges one by one, for formats too wide for a quick table.
_MOST_JUDGED_SLOWLY = 1 << 14
_TABLE_BITS = 10


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
        got, want: bit patterns of ``dtype``, unsigned, of the same length (`fpsim.verify.codes_of` gives them).
        dtype: a carrier.
        format: ``want`` are values of this format: also tells results that are beyond it, or one unit of it off, and
            subnormals are those of the format.

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
    # Their distance in the order of values, where both zeros have one place; unsigned numbers must not wrap around.
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
    """Where both are finite numbers of one sign, and the distance is the format's unit at one of them."""
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
        inputs: what they were computed from, of the same shape and any of these dtypes: shown with each example.
        nan_payloads: whether the bits of NaNs count too.
        signed_zeros: whether the sign of a zero counts.
        format: what is due are values of this format: the report also tells results that are beyond its largest value
            or one unit off, and subnormals are those of the format.
        examples: how many elements of each class the report shows.
        message: begins the report.

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
    name = str(got.dtype).removeprefix("torch.")
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
    """A tensor or an array as a CPU tensor of a carrier's dtype."""
    if isinstance(x, np.ndarray) and str(x.dtype) in _DTYPES:
        dtype = _DTYPES[str(x.dtype)]
        if dtype == torch.bfloat16:  # of ml_dtypes, which torch does not take
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
    ``dtype``, each with its two neighbours on either side, and random bit patterns, half of them of the format's
    magnitude. For formats of more than 10 exponent and mantissa bits they are 16384 at most, on a grid of significands
    in every binade.

    Args:
        function: takes a tensor of one dimension, and returns one (or an array) of the same shape and dtype.
        format: a name (`fpsim.parse_format`) or a `FloatFormat`.
        rounding: one of `fpsim.formats.ROUNDINGS` (a stochastic one has no single right result).
        overflow: as in `fpsim.round`.
        dtype: of the tensor: float64, float32, bfloat16 or float16.
        device: where the tensor is.
        samples: how many random inputs there are.
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
        message=f"{mode} on {str(dtype).removeprefix('torch.')}",
    )


def _inputs(mode: Mode, dtype: torch.dtype, samples: int, rng: np.random.Generator) -> Codes:
    from fpsim.verify.run import _random_codes

    random = _random_codes([mode.format], dtype, samples, rng)
    if _has_quick_table(mode.format):
        return np.concatenate([judge(*mode, dtype).probes(), random])
    grid = significand_grid(mode.format, CARRIERS[dtype])
    kept = rng.choice(grid, min(len(grid), _MOST_JUDGED_SLOWLY // 2), replace=False)
    return np.concatenate([_specials(dtype), kept, random[: _MOST_JUDGED_SLOWLY // 2]])


def _specials(dtype: torch.dtype) -> Codes:
    """Zeros, infinities, NaNs, the extremes of the dtype, and their neighbours."""
    carrier = CARRIERS[dtype]
    infinity = carrier.max_code + 1
    magnitudes = [
        0,
        1,
        2,
        (1 << carrier.mantissa_bits) - 1,
        1 << carrier.mantissa_bits,
        (1 << carrier.mantissa_bits) + 1,
    ]
    magnitudes += [infinity - 2, infinity - 1, infinity, infinity + 1, carrier.sign_code - 1]
    codes = [sign | magnitude for sign in (0, carrier.sign_code) for magnitude in magnitudes]
    return np.array(codes, f"uint{carrier.bits}")


def _expected(mode: Mode, codes: Codes, dtype: torch.dtype) -> Codes:
    from fpsim import reference

    if _has_quick_table(mode.format):
        return judge(*mode, dtype).expected(codes)
    values = (reference.round(number, *mode) for number in tensor_of(codes, dtype).double().tolist())
    return np.array([code_of(value, CARRIERS[dtype])[0] for value in values], codes.dtype)


def _has_quick_table(fmt: FloatFormat) -> bool:
    return fmt.exponent_bits + fmt.mantissa_bits <= _TABLE_BITS


# -- strategies ------------------------------------------------------------------------------------------------


def formats(
    *, max_bits: int = 16, dtype: torch.dtype = torch.float32, named: bool = True
) -> SearchStrategy[FloatFormat]:
    """A strategy of hypothesis: formats that ``dtype`` can carry, with every convention of special values.

    Args:
        max_bits: the widest code.
        dtype: a carrier of them all.
        named: whether those of `fpsim.formats.NAMED_FORMATS` come often; they are drawn half of the time.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: no format is so narrow.
        TypeError: ``dtype`` is not a carrier.
    """
    st = _strategies()
    if max_bits < 3:
        raise ValueError(f"max_bits={max_bits}: the narrowest formats drawn have 3 bits, use 3 or more")
    if dtype not in CARRIERS:
        raise TypeError(f"{dtype} is not a carrier: use one of {', '.join(_DTYPES)}")
    from fpsim.formats import NAMED_FORMATS, SPECIALS

    def acceptable(fmt: FloatFormat | None) -> bool:
        return fmt is not None and fmt.bits <= max_bits and fmt.max > 0 and fmt.is_subset_of(CARRIERS[dtype])

    def build(e: int, m: int, specials: str, shift: int, subnormals: bool, signed: bool) -> FloatFormat | None:
        try:
            usual = FloatFormat(e, m, specials=specials, subnormals=subnormals, signed=signed)  # type: ignore[arg-type]
            return _with_bias(usual, usual.bias + shift) if shift else usual
        except ValueError:  # no such format: an unsigned fnuz, or values that float64 lacks
            return None

    drawn = st.builds(
        build,
        st.integers(1, min(max_bits - 1, CARRIERS[dtype].exponent_bits)),
        st.integers(0, min(max_bits - 2, CARRIERS[dtype].mantissa_bits)),
        st.sampled_from(SPECIALS),
        st.just(0) | st.integers(-4, 4),
        st.booleans(),
        st.booleans(),
    ).filter(acceptable)
    known = [fmt for fmt in map(parse_format, NAMED_FORMATS) if acceptable(fmt)]
    return st.one_of(st.sampled_from(known), drawn) if named and known else drawn


def _with_bias(fmt: FloatFormat, bias: int) -> FloatFormat:
    from dataclasses import replace

    return replace(fmt, bias=bias)


def values_near_boundaries(
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    radius: int = 2,
    allow_nan: bool = True,
    allow_infinity: bool = True,
) -> SearchStrategy[float]:
    """A strategy of hypothesis: Python floats of ``dtype`` at most ``radius`` codes from where results change.

    That is, from a boundary between two results, from a result itself, or from zero, infinity, NaN or an extreme of
    ``dtype``: `fpsim.verify.Judge.probes`. It shrinks toward the positive numbers nearest to zero.

    Args:
        format: a name or a `FloatFormat`, of at most 18 exponent and mantissa bits.
        rounding: one of `fpsim.formats.ROUNDINGS`.
        overflow: as in `fpsim.round`.
        dtype: float64, float32, bfloat16 or float16.
        radius: how far around.
        allow_nan, allow_infinity: whether these are drawn.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: an unknown format or mode, a format too wide for a table, or one that ``dtype`` cannot carry.
        TypeError: ``dtype`` is not a carrier.
    """
    st = _strategies()
    if radius < 0:
        raise ValueError(f"radius={radius}: use 0 or more")
    numbers = tensor_of(judge(format, rounding, overflow, dtype).probes(radius), dtype).double().numpy()
    if not allow_nan:
        numbers = numbers[~np.isnan(numbers)]
    if not allow_infinity:
        numbers = numbers[~np.isinf(numbers)]
    return st.integers(0, len(numbers) - 1).map(lambda i: float(numbers[i]))


def tensors(
    format: str | FloatFormat | torch.dtype = torch.float32,
    shapes: Any = None,
    *,
    dtype: torch.dtype | None = None,
    allow_nan: bool = True,
    allow_infinity: bool = True,
) -> SearchStrategy[torch.Tensor]:
    """A strategy of hypothesis: contiguous CPU tensors of arbitrary bit patterns.

    Args:
        format: a format, whose values alone are drawn, or a dtype, for all of its bit patterns.
        shapes: a shape (a tuple of ints), a strategy of shapes, or None for shapes of up to 3 dimensions of 0 to 5.
        dtype: of the tensor, if ``format`` is a format; None means float32, or float64 where that cannot carry it.
        allow_nan, allow_infinity: whether these are drawn.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: an unknown format, or one that ``dtype`` cannot carry.
        TypeError: a dtype that is not a carrier, or two.
    """
    st = _strategies()
    if isinstance(format, torch.dtype):
        if dtype is not None and dtype != format:
            raise TypeError(f"two dtypes, {format} and {dtype}: give one of them")
        if format not in CARRIERS:
            raise TypeError(f"{format} is not a carrier: use one of {', '.join(_DTYPES)}")
        fmt, dtype = CARRIERS[format], format
    else:
        fmt = parse_format(format)
        if dtype is None:
            dtype = torch.float32 if fmt.is_subset_of(CARRIERS[torch.float32]) else torch.float64
        check_carrier(dtype, fmt)
    carrier = CARRIERS[dtype]
    chosen: SearchStrategy[Any] = st.lists(st.integers(0, 5), max_size=3).map(tuple) if shapes is None else shapes
    if isinstance(chosen, Sequence):
        chosen = st.just(tuple(chosen))

    def code(number: int) -> int | None:
        return number if fmt == carrier else _carrier_code(number, fmt, carrier)

    def wanted(number: int | None) -> bool:
        if number is None:
            return False
        size = number & (carrier.sign_code - 1)
        return (allow_nan or size <= carrier.max_code + 1) and (allow_infinity or size != carrier.max_code + 1)

    if fmt.bits <= 8:  # few enough to list: nothing has to be drawn again
        elements = st.sampled_from([each for each in map(code, range(1 << fmt.bits)) if wanted(each)])
    else:
        elements = st.integers(0, (1 << fmt.bits) - 1).map(code).filter(wanted)

    def fill(shape: tuple[int, ...]) -> SearchStrategy[torch.Tensor]:
        size = int(np.prod(shape, dtype=np.int64))
        listed = st.lists(elements, min_size=size, max_size=size)
        return listed.map(lambda codes: tensor_of(np.array(codes, f"uint{carrier.bits}"), dtype).reshape(shape))

    return chosen.flatmap(fill)


def _carrier_code(number: int, fmt: FloatFormat, carrier: FloatFormat) -> int | None:
    from fpsim import reference

    value: Value = reference.decode(number, fmt)
    return code_of(value, carrier)[0]


def _strategies() -> Any:
    try:
        return importlib.import_module("hypothesis.strategies")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "hypothesis is not installed; the strategies of fpsim.testing need it: pip install hypothesis, "
            "or pip install 'fpsim[dev]'"
        ) from error
