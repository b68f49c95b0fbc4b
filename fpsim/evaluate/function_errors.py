"""The error of an elementwise function in units of the last place of a format: `accuracy`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import mpmath
import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from fpsim import reference
from fpsim.curvature.results import new_axes
from fpsim.evaluate.exact_functions import Exact, exact_function
from fpsim.evaluate.tables import Printed
from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.carriers import CARRIERS
from fpsim.showing import counted
from fpsim.tensor_functions import decode, encode
from fpsim.tensor_functions import round as round_to

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Decimal digits of exact values.
DIGITS = 60
#: The most digits that are tried where exact values with fewer digits cancel.
_MOST_DIGITS = 32 * DIGITS
#: The leading bits in which exact values with fewer and with more digits agree.
_AGREEMENT = 100
#: Of so many neighbours, one is compared with its value with more digits.
_STRIDE = 16
#: No format has numbers whose binary exponent has a greater magnitude: exact values beyond stand for each other.
_FAR = 2**15
#: Formats of up to this many bits are measured at every input.
EXHAUSTIVE_BITS = 16
#: The inputs on each side of a seam whose mean errors are compared.
_WINDOW = 32


@dataclass(frozen=True)
class Worst:
    """An input with a large error.

    Attributes:
        code: the input's code in the format, in hexadecimal.
        input: the input.
        result: the value of the function.
        exact: the exact value, with 20 digits.
        ulps: the error, in units of the last place of the exact value.
    """

    code: str
    input: float
    result: float
    exact: str
    ulps: float


@dataclass(frozen=True)
class Seam:
    """A place where the mean error jumps, as it does where an implementation changes from one formula to another.

    For results in the format, the error counts that differs from that of the correctly rounded result.

    Attributes:
        below, above: the inputs next to it.
        jump: the mean signed error of the inputs above minus that of the inputs below, in ulps.
    """

    below: float
    above: float
    jump: float


@dataclass(frozen=True, eq=False)
class Accuracy(Printed):
    """The result of `accuracy`. ``print(result)`` shows it.

    Attributes:
        function: its name.
        format: the format.
        low, high: the least and the greatest input.
        count: the number of inputs at which the function is defined.
        exhaustive: whether these are all inputs of the format in the range.
        maximum, median: of the errors in ulps, over these inputs.
        floor_maximum, floor_median: the same for the exact value rounded to nearest even: no result in the format is
            better.
        correct: the share of results that are the exact value rounded to nearest even.
        undefined: the number of inputs without an exact value (outside of the domain), which are left out.
        unexpected: the number of these at which the function gives a number that is not NaN.
        nonfinite: the number of inputs at which the function is infinite or NaN and the rounded exact value is not.
            Their errors are infinite.
        worst: the inputs with the largest errors, the largest first.
        seams: jumps of the mean error, from low to high inputs: at most the 20 clearest.
        inputs, errors: all inputs and their signed errors in ulps; float64, shape (count,).
    """

    function: str
    format: FloatFormat
    low: float
    high: float
    count: int
    exhaustive: bool
    maximum: float
    median: float
    floor_maximum: float
    floor_median: float
    correct: float
    undefined: int
    unexpected: int
    nonfinite: int
    worst: tuple[Worst, ...]
    seams: tuple[Seam, ...]
    inputs: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)

    def tables(self) -> list[Table]:
        """The errors, the worst inputs, and the seams if there are any."""
        which = "every input" if self.exhaustive else counted(self.count, "input")
        errors = Table(
            box=box.SIMPLE_HEAD,
            title=f"{self.function} in {self.format.name}: {which} from {self.low:g} to {self.high:g}",
            caption=f"errors in ulps; inputs outside of the domain: {self.undefined}, of these with a number: "
            f"{self.unexpected}; results that should be finite and are not: {self.nonfinite}",
        )
        for column in ("", "maximum", "median", "correctly rounded"):
            errors.add_column(column, justify="right")
        errors.add_row("function", f"{self.maximum:.4g}", f"{self.median:.4g}", f"{self.correct:.2%}")
        errors.add_row("rounded exact value", f"{self.floor_maximum:.4g}", f"{self.floor_median:.4g}", "100%")
        worst = Table(box=box.SIMPLE_HEAD, title="worst inputs", title_justify="left")
        for column in ("code", "input", "result", "exact", "ulps"):
            worst.add_column(column, justify="right")
        for each in self.worst:
            worst.add_row(each.code, f"{each.input:.9g}", f"{each.result:.9g}", each.exact, f"{each.ulps:.4g}")
        seams = Table(box=box.SIMPLE_HEAD, title="seams", title_justify="left")
        for column in ("below", "above", "jump in ulps"):
            seams.add_column(column, justify="right")
        for seam in self.seams:
            seams.add_row(f"{seam.below:.9g}", f"{seam.above:.9g}", f"{seam.jump:+.3g}")
        return [errors, worst, *([seams] if self.seams else [])]

    def plot(self, axes: Axes | None = None) -> Axes:
        """The signed errors over the inputs, with the floor and the seams as lines. It needs matplotlib."""
        axes = axes or new_axes()
        axes.plot(self.inputs, self.errors, ".", markersize=2)
        for level in (-self.floor_maximum, self.floor_maximum):
            axes.axhline(level, linewidth=0.8, color="grey")
        for seam in self.seams:
            axes.axvline((seam.below + seam.above) / 2, linewidth=0.8, color="red")
        axes.set(xlabel="input", ylabel="error in ulps", title=f"{self.function} in {self.format.name}")
        return axes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.tables()


def accuracy(
    function: Callable[[Tensor], Tensor],
    format: str | FloatFormat,
    *,
    low: float,
    high: float,
    exact: Exact | str | None = None,
    samples: int = 4096,
    worst: int = 5,
    seed: int = 0,
) -> Accuracy:
    """The error of an elementwise function, against exact values of 60 digits by mpmath.

    Formats of up to 16 bits are measured at every input in the range, others at ``samples`` random inputs, of which
    each binade has as many as any other, and at the powers of two and their neighbours.

    Args:
        function: from a tensor to a tensor of its shape: Python, compiled, or a kernel. It gets inputs of shape (n,) in
            the dtype of the format (float16, bfloat16, float32, float64), or in float32 for formats without a dtype.
        format: the format of the inputs, in whose units of the last place errors are told.
        low, high: the range of inputs, both included.
        exact: a function of an mpmath number, or the name of one of mpmath's functions or of
            `fpsim.evaluate.exact_functions.NAMED`; None: that of ``function``, if it is one of torch's functions.
            What raises a ValueError or an ArithmeticError, or gives NaN or a complex number, is outside of the domain.
            It is called with 60 digits, and also with 120 at every 16th input, where it gives no finite number but
            zero, and at the inputs with the largest errors. If 100 bits do not agree at one of these, it is called
            with 120 digits at every input, and with more where these do not agree.
        samples: the number of random inputs.
        worst: the number of inputs to list.
        seed: of the random inputs.

    Raises:
        ValueError: the range is empty or wholly outside of the domain, a number of inputs is negative, the exact
            function is unknown or does not settle with more digits, or the function fails or returns a tensor of
            another shape.
        TypeError: the function returns no tensor of real floating-point numbers, or the exact function fails on a
            number of mpmath, or returns a float, which has 16 digits, or no number.

    >>> accuracy(torch.exp, "e4m3fn", low=-2, high=2).count
    129
    """
    fmt = parse_format(format)
    true = exact_function(function, exact)
    if samples < 0 or worst < 0:
        raise ValueError(f"samples and worst must not be negative, got {samples} and {worst}")
    codes, exhaustive = _codes(fmt, low, high, samples, seed)
    dtype = next((dtype for dtype, own in CARRIERS.items() if own == fmt), torch.float32)
    if not fmt.is_subset_of(CARRIERS[dtype]):
        dtype = torch.float64
    x = decode(codes, fmt, dtype=dtype)
    try:
        y = function(x.clone())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{_name_of(function)} fails on a tensor of {counted(len(x), 'input')} of dtype {dtype}: it must take one "
            f"tensor and give one of its shape ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"the function must return a tensor of real floating-point numbers, got {got}")
    if y.shape != x.shape:
        raise ValueError(
            f"the function must be elementwise: it returns shape {tuple(y.shape)} for inputs of shape {tuple(x.shape)}"
        )
    results = y.detach().double().tolist()
    exacts = _ExactValues(true, x.double().tolist())

    def measure() -> dict[int, _Point]:
        rows = zip(codes.tolist(), exacts.points, results, exacts.values, strict=True)
        return {n: _measured(*row, fmt) for n, row in enumerate(rows) if row[-1] is not None}

    points = measure()
    largest = sorted(points, key=lambda n: -abs(points[n].error))[: max(worst, 1)]
    if not exacts.settle(largest):
        points = measure()
    measured = list(points.values())
    undefined = len(results) - len(points)
    unexpected = sum(not math.isnan(result) for n, result in enumerate(results) if n not in points)
    if not measured:
        raise ValueError(
            f"all inputs from {low:g} to {high:g} lie outside of the domain of the exact function: choose another range"
        )
    return _summary(function, fmt, low, high, exhaustive, measured, undefined, unexpected, worst)


def _codes(fmt: FloatFormat, low: float, high: float, samples: int, seed: int) -> tuple[Tensor, bool]:
    """The codes of the inputs, from low to high, and whether these are all."""
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"low and high must be finite, and low at most high, got {low} and {high}")
    first, last = (_index(end, fmt, mode) for end, mode in ((low, "up"), (high, "down")))
    if first > last:
        raise ValueError(f"{fmt.name} has no value from {low:g} to {high:g}")
    exhaustive = fmt.bits <= EXHAUSTIVE_BITS or last - first < samples
    if exhaustive:
        indices = torch.arange(first, last + 1)
    else:
        draw = random.Random(seed)  # torch draws no integers from a range of 64 bits
        drawn = torch.tensor([draw.randint(first, last) for _ in range(samples)], dtype=torch.int64)
        binade = 2**fmt.mantissa_bits
        starts = torch.arange(first // binade, last // binade + 2) * binade
        indices = torch.cat([drawn, *(starts + step for step in (-1, 0, 1)), torch.tensor([first, last])])
        indices = indices[(indices >= first) & (indices <= last)].unique()
    sign = (fmt.sign_code if fmt.bits < 64 else -(2**63)) if fmt.signed else 0  # 64-bit codes are two's complements
    return torch.where(indices < 0, -indices | sign, indices), exhaustive


def _index(end: float, fmt: FloatFormat, mode: str) -> int:
    """The code of ``end``, rounded to ``fmt``; minus that of its magnitude if it is negative."""
    value = round_to(torch.tensor(end, dtype=torch.float64), fmt, rounding=mode, overflow="sat_finite")
    code = int(encode(value.abs(), fmt))
    return -code if float(value) < 0 else code


class _ExactValues:
    """The exact values at some points: numbers of mpmath, or None outside of the domain.

    Terms that cancel lose digits, which values with more digits show. Neighbours lose about as many, so that a part of
    the points is enough to find out. Where terms leave zero or nothing, no digit is left: every such point is tried.

    Attributes:
        points: from the least to the greatest.
        values: one for each point.

    Raises:
        TypeError, ValueError: those of `accuracy`.
    """

    def __init__(self, true: Exact, points: Sequence[float]) -> None:
        self.true, self.points = true, points
        self.values = [_at(true, point, DIGITS) for point in points]
        self._settled: set[int] = set()
        self.settle([n for n, value in enumerate(self.values) if n % _STRIDE == 0 or not _is_plain(value)])

    def settle(self, numbers: Iterable[int]) -> bool:
        """Compare the values at these points with those of more digits; whether all were right.

        If one was not, the values at all points are settled.
        """
        right = True
        for number in numbers:
            if number not in self._settled:
                self._settled.add(number)
                before = self.values[number]
                self.values[number] = _settled(self.true, self.points[number], before)
                right = right and self.values[number] == before
        if not right:
            self.settle(range(len(self.points)))
        return right


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a finite number other than zero."""
    return value is not None and value != 0 and bool(mpmath.isfinite(value))


def _settled(true: Exact, point: float, value: Any) -> Any:
    """``value``, that of ``DIGITS``, if one with more digits agrees, or else the first one with which the next agrees.

    Raises:
        TypeError, ValueError: those of `accuracy`.
    """
    digits = DIGITS
    while digits < _MOST_DIGITS:
        digits *= 2
        before, value = value, _at(true, point, digits)
        if _agree(before, value) and (value is None or value != 0 or digits == _MOST_DIGITS):
            return before
    raise ValueError(
        f"the exact function is {_written(before)} with {digits // 2} digits at {point!r}, and {_written(value)} with "
        f"{digits}: choose a form whose terms do not cancel"
    )


def _at(true: Exact, point: float, digits: int) -> Any:
    """The value of ``true`` with this number of digits."""
    with mpmath.workdps(digits):
        try:
            value = true(mpmath.mpf(point))
        except (ValueError, ArithmeticError, mpmath.libmp.NoConvergence):
            return None
        except (TypeError, AttributeError, RuntimeError) as error:
            raise TypeError(
                f"the exact function fails at {point!r}: it must take one number of mpmath and give one "
                f"({' '.join(str(error).split())})"
            ) from error
        if isinstance(value, Fraction):
            value = mpmath.mpf(value.numerator) / value.denominator
        elif (
            not isinstance(value, _NUMBERS)
            or isinstance(value, bool)
            or (isinstance(value, float) and math.isfinite(value) and value % 1)
        ):
            raise TypeError(
                f"the exact function must return a number of mpmath, an int or a Fraction, got {value!r}: Python's own "
                "floats have 16 digits, so that mpmath.exp(x) is exact and math.exp(x) is not"
            )
        value = +mpmath.mpmathify(value)  # which gives a constant the digits of here
        if isinstance(value, mpmath.mpc):
            if value.imag != 0:
                return None
            value = value.real
        return None if mpmath.isnan(value) else value


#: What an exact function may return, beside fractions.
_NUMBERS = (int, float, mpmath.mpf, mpmath.mpc, type(mpmath.pi))


def _agree(a: Any, b: Any) -> bool:
    if a is None or b is None or mpmath.isinf(a) or mpmath.isinf(b):
        return bool(a == b) if a is not None and b is not None else a is b
    difference = a - b
    return not difference or (b != 0 and _magnitude(difference) < _magnitude(b) - _AGREEMENT)


def _magnitude(value: Any) -> int:
    """The binary exponent of a number of mpmath that is neither zero nor infinite."""
    _, _, exponent, bits = value._mpf_
    return int(exponent + bits)


def _fraction(value: Any) -> Fraction:
    """A finite number of mpmath, exactly; beyond all formats another number beyond them."""
    sign, man, exponent, _ = value._mpf_
    if man and abs(_magnitude(value)) > _FAR:
        man, exponent = 1, _FAR if exponent > 0 else -_FAR
    return (-1) ** sign * Fraction(int(man)) * Fraction(2) ** int(exponent)


@dataclass(frozen=True)
class _Point:
    code: int
    input: float
    result: float
    exact: Any  # a number of mpmath
    error: float
    floor: float | None  # signed
    is_correct: bool
    is_nonfinite: bool


def _measured(code: int, point: float, result: float, exact: Any, fmt: FloatFormat) -> _Point:
    """One input with its error, and the error of the rounded exact value; None where that overflows."""
    if mpmath.isinf(exact):
        right = result == exact
        return _Point(code, point, result, exact, 0.0 if right else math.inf, None, right, False)
    value = _fraction(exact)
    rounded = reference.to_float(reference.round(value, fmt))
    unit = reference.ulp(value, fmt)
    overflows = abs(value) > fmt.max
    floor = None if overflows else _ratio(Fraction(rounded) - value, unit)
    if not math.isfinite(result):
        same = result == _infinity(value) or (math.isnan(result) and math.isnan(rounded))
        right = overflows and same
        error = 0.0 if right else math.inf
        return _Point(code, point, result, exact, error, floor, right, not right and math.isfinite(rounded))
    right = result == rounded
    error = 0.0 if overflows and right else _ratio(Fraction(result) - value, unit)
    return _Point(code, point, result, exact, error, floor, right, False)


def _ratio(error: Fraction, unit: Fraction) -> float:
    """The error in ulps; infinite where float64 has no such number."""
    try:
        return float(error / unit)
    except OverflowError:
        return _infinity(error)


def _infinity(value: Fraction) -> float:
    """The infinity with the sign of ``value``."""
    return math.inf if value > 0 else -math.inf


def _summary(
    function: Callable[..., Any],
    fmt: FloatFormat,
    low: float,
    high: float,
    exhaustive: bool,
    points: Sequence[_Point],
    undefined: int,
    unexpected: int,
    worst: int,
) -> Accuracy:
    inputs = torch.tensor([point.input for point in points], dtype=torch.float64)
    errors = torch.tensor([point.error for point in points], dtype=torch.float64)
    floors = torch.tensor([point.floor or 0.0 for point in points], dtype=torch.float64)
    results = torch.tensor([point.result for point in points], dtype=torch.float64)
    is_in_format = bool(torch.equal(round_to(results, fmt).nan_to_num(), results.nan_to_num()))
    digits = -(-fmt.bits // 4)
    return Accuracy(
        function=_name_of(function),
        format=fmt,
        low=low,
        high=high,
        count=len(points),
        exhaustive=exhaustive,
        maximum=float(errors.abs().max()),
        median=_median(errors.abs()),
        floor_maximum=float(floors.abs().max()),
        floor_median=_median(floors.abs()),
        correct=sum(point.is_correct for point in points) / len(points),
        undefined=undefined,
        unexpected=unexpected,
        nonfinite=sum(point.is_nonfinite for point in points),
        worst=tuple(
            Worst(f"0x{p.code % 2**fmt.bits:0{digits}x}", p.input, p.result, _written(p.exact), abs(p.error))
            for p in sorted(points, key=lambda p: -abs(p.error))[:worst]
        ),
        seams=_seams(inputs, errors - floors if is_in_format else errors),
        inputs=inputs,
        errors=errors,
    )


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _median(values: Tensor) -> float:
    """The median, the mean of the two middle values; torch's own is the lower one."""
    ordered = values.sort().values
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _written(value: Any) -> str:
    if value is None:
        return "undefined"
    return str(float(value)) if mpmath.isinf(value) else str(mpmath.nstr(value, 20))


def _seams(inputs: Tensor, errors: Tensor) -> tuple[Seam, ...]:
    """Where the mean errors of the `_WINDOW` inputs on either side differ by six standard errors, and by 0.1 ulp."""
    count = len(errors)
    if count < 2 * _WINDOW:
        return ()
    bounded = errors.clamp(-1e6, 1e6)
    windows = bounded.unfold(0, _WINDOW, 1)
    means, spreads = windows.mean(1), windows.var(1)
    jumps = means[_WINDOW:] - means[:-_WINDOW]
    scale = ((spreads[_WINDOW:] + spreads[:-_WINDOW]) / _WINDOW).sqrt()
    scores = torch.where(jumps.abs() > 0.1, jumps.abs() / scale.clamp(min=1e-3), 0.0)
    found: list[Seam] = []
    while float(scores.max()) > 6 and len(found) < 20:
        place = int(scores.argmax())
        above = place + _WINDOW
        found.append(Seam(float(inputs[above - 1]), float(inputs[above]), float(jumps[place])))
        scores[max(0, place - _WINDOW) : place + _WINDOW + 1] = 0
    return tuple(sorted(found, key=lambda seam: seam.below))
