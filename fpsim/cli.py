"""The command line: what formats are, what rounding does to a number, the proof that it is right, and the demo.

Numbers are read and printed exactly, through fractions; the work is done by `fpsim.reference`, `fpsim.verify` and
`fpsim.paper.demo`. Output goes to standard output, progress bars and errors to standard error.
"""

from __future__ import annotations

import functools
import itertools
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fpsim.formats import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    FloatFormat,
    check_rounding,
    parse_format,
    resolve_overflow,
)

if TYPE_CHECKING:
    from fpsim.reference import Value
    from fpsim.verify import Verdict

app = typer.Typer(
    help="Simulate any reduced-precision floating-point format in any PyTorch model, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Command = TypeVar("_Command", bound=Callable[..., None])

RoundingOption = Annotated[str, typer.Option(help=f"Rounding direction: {', '.join(ROUNDINGS)}.")]
OverflowOption = Annotated[
    str | None, typer.Option(help=f"Overflow mode: {', '.join(OVERFLOWS)}. [default: the format's usual one]")
]


def _plain_errors(command: _Command) -> _Command:
    """Let the errors that wrong input causes end the program with one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        from fpsim.verify import CompilationError

        try:
            command(*args, **kwargs)
        except (ValueError, FileNotFoundError, IsADirectoryError, ModuleNotFoundError, CompilationError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


# -- fpsim formats ---------------------------------------------------------------------------------------------


@app.command()
@_plain_errors
def formats(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False)] = None,
) -> None:
    """Show formats: all named ones, or the given ones (such as e5m10, e3m4fn, e4m3:bias=9)."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("format", overflow="fold")
    for heading in ("bits", "exp.", "man.", "bias", "max", "min normal", "min subnormal"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("inf", "NaN"):
        table.add_column(heading)
    table.add_column("values", justify="right", overflow="fold")
    for fmt in [parse_format(name) for name in names or NAMED_FORMATS]:
        table.add_row(*_format_row(fmt))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _format_row(fmt: FloatFormat) -> list[str]:
    has_subnormals = fmt.subnormals and fmt.mantissa_bits > 0
    return [
        familiar_name(fmt),
        *map(str, (fmt.bits, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)),
        f"{fmt.max:.6g}",
        f"2^{fmt.emin}",
        f"2^{fmt.emin - fmt.mantissa_bits}" if has_subnormals else "-",
        "yes" if fmt.has_infinity else "-",
        "yes" if fmt.has_nan else "-",
        f"{fmt.num_values:,}" if fmt.num_values < 10**12 else f"~{fmt.num_values:.3g}",
    ]


def familiar_name(fmt: FloatFormat) -> str:
    """The format's name, after the one by which it is known if that differs: ``bf16 = e8m7``."""
    name = next((name for name in NAMED_FORMATS if parse_format(name) == fmt), fmt.name)
    return name if name == fmt.name else f"{name} = {fmt.name}"


# -- fpsim round -----------------------------------------------------------------------------------------------


@app.command(context_settings={"ignore_unknown_options": True})  # or -1 would be one
@_plain_errors
def round(
    values: Annotated[list[str], typer.Argument(metavar="VALUE...", help="0.1, -2.5e-3, 1/3, 0x1.8p3, inf or nan.")],
    format: Annotated[str, typer.Option(help="What to round to, such as e4m3fn.")],
    rounding: RoundingOption = "nearest_even",
    overflow: OverflowOption = None,
) -> None:
    """Round numbers exactly, and show the result, its code and bit fields, its error and its neighbours."""
    fmt, direction = parse_format(format), check_rounding(rounding)
    mode = resolve_overflow(fmt, overflow)
    for text in values:
        if text.startswith("--"):
            raise ValueError(f"no such option: {text}")
    numbers = [parse_number(text) for text in values]
    typer.echo(f"{familiar_name(fmt)}, {direction}, {mode}")
    for text, number in zip(values, numbers, strict=True):
        typer.echo()
        for heading, content in _explain_rounding(text, number, fmt, direction, mode):
            typer.echo(f"{heading:<11} {content}")


def _explain_rounding(
    text: str, number: Value, fmt: FloatFormat, rounding: str, overflow: str
) -> Iterable[tuple[str, str]]:
    from fpsim import reference

    result = reference.round(number, fmt, rounding, overflow)
    code = reference.encode(number, fmt, rounding, overflow)
    exact = show_number(number)
    yield "input", text if text == exact else f"{text} = {exact}"
    yield "result", " = ".join(dict.fromkeys([show_number(result), show_hex(result)]))
    yield "code", f"{_show_code(code, fmt)} = {show_fields(code, fmt)}"
    yield "error", _show_error(number, result, fmt)
    yield "neighbours", _show_neighbours(result, fmt)


# Magnitudes, in lower case.
_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(e(?P<exponent>[+-]?\d+))?", re.ASCII)
_FRACTION = re.compile(r"\d+/\d+", re.ASCII)
_HEXADECIMAL = re.compile(
    r"0x(?=\.?[0-9a-f])(?P<whole>[0-9a-f]*)\.?(?P<part>[0-9a-f]*)(p(?P<exponent>[+-]?\d+))?", re.ASCII
)
#: The largest exponent that `parse_number` takes, lest a number fill the memory.
MAX_EXPONENT = 4000


def parse_number(text: str) -> Value:
    """The exact value of a decimal (``-2.5e-3``), fraction (``1/3``), hexadecimal number (``0x1.8p3``), inf or nan.

    Raises:
        ValueError: ``text`` is none of these, or its exponent is beyond `MAX_EXPONENT`.

    >>> parse_number("0.1"), parse_number("-0x.8p-1"), parse_number("-0")
    (Fraction(1, 10), Fraction(-1, 4), NEGATIVE_ZERO)
    """
    from fpsim.reference.values import INFINITY, NAN, negate

    plain = text.strip().lower()
    negative, magnitude = plain.startswith("-"), plain.lstrip("+-")
    if plain[1:] != magnitude and plain != magnitude:
        raise _not_a_number(text)
    if magnitude in ("inf", "infinity", "nan"):
        value: Value = NAN if magnitude == "nan" else INFINITY
    else:
        value = _parse_magnitude(magnitude, text)
    return negate(value) if negative else value


def _parse_magnitude(magnitude: str, text: str) -> Fraction:
    match = _DECIMAL.fullmatch(magnitude) or _HEXADECIMAL.fullmatch(magnitude)
    if match is not None and abs(int(match["exponent"] or 0)) > MAX_EXPONENT:
        raise ValueError(
            f"the exponent of {text!r} is beyond {MAX_EXPONENT}, far outside of every format: use inf or 0"
        )
    if match is not None and match.re is _DECIMAL:
        return Fraction(magnitude)
    if match is not None:
        digits = int(match["whole"] + match["part"], 16)
        return digits * Fraction(2) ** (int(match["exponent"] or 0) - 4 * len(match["part"]))
    if _FRACTION.fullmatch(magnitude):
        numerator, denominator = map(int, magnitude.split("/"))
        if denominator:
            return Fraction(numerator, denominator)
    raise _not_a_number(text)


def _not_a_number(text: str) -> ValueError:
    return ValueError(
        f"cannot read {text!r} as a number: use a decimal (0.1, -2.5e-3), a fraction (1/3), a hexadecimal number "
        "(0x1.8p3), inf or nan"
    )


def show_number(value: Value) -> str:
    """``value`` in short, exactly if 20 digits suffice: a decimal, else a fraction, else with ``~`` before it.

    >>> show_number(Fraction(13, 128)), show_number(Fraction(-1, 3)), show_number(Fraction(1, 3**50))
    ('0.1015625', '-1/3', '~1.39296e-24')
    """
    if not isinstance(value, Fraction):
        return str(value)
    if value.denominator == 1 and abs(value.numerator) < 10**20:
        return str(value.numerator)
    context = Context(prec=20)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    if not context.flags[Inexact]:
        return _without_plus(quotient)
    if value.numerator.bit_length() + value.denominator.bit_length() < 64:
        return str(value)
    return f"~{show_approximately(value)}"


def show_approximately(value: Fraction) -> str:
    """``value`` as a decimal of 6 digits.

    >>> show_approximately(Fraction(2, 3))
    '0.666667'
    """
    return _without_plus(Context(prec=6).divide(Decimal(value.numerator), Decimal(value.denominator)))


def _without_plus(number: Decimal) -> str:
    return f"{number.normalize():g}".replace("e+", "e")


def show_hex(value: Value) -> str:
    """A value of a format as a hexadecimal float, always exact.

    >>> show_hex(Fraction(13, 128))
    '0x1.ap-4'
    """
    from fpsim.reference import to_float

    if not isinstance(value, Fraction):
        return str(value)
    return re.sub(r"\.?0+p", "p", to_float(value).hex()).replace("p+", "p") if value else "0"


def _show_code(code: int, fmt: FloatFormat) -> str:
    return f"{code:#0{-(-fmt.bits // 4) + 2}x}"


def show_fields(code: int, fmt: FloatFormat) -> str:
    """The bits of ``code``, a blank between sign, exponent and mantissa fields.

    >>> show_fields(0x1D, parse_format("e4m3fn"))
    '0 0011 101'
    """
    digits = iter(f"{code:0{fmt.bits}b}")
    widths = (int(fmt.signed), fmt.exponent_bits, fmt.mantissa_bits)
    return " ".join("".join(itertools.islice(digits, width)) for width in widths if width)


def _show_error(number: Value, result: Value, fmt: FloatFormat) -> str:
    from fpsim.reference.values import NEGATIVE_ZERO

    number, result = (Fraction(0) if value is NEGATIVE_ZERO else value for value in (number, result))
    if number == result:
        return "0 (exact)"
    if not isinstance(number, Fraction) or not isinstance(result, Fraction):
        return "not finite"
    error = result - number
    return f"{show_number(error)} = {show_approximately(error / ulp(number, fmt))} ulp"


def ulp(number: Fraction, fmt: FloatFormat) -> Fraction:
    """The distance between values of ``fmt`` in the binade of ``number``, the nearest binade that ``fmt`` has.

    >>> ulp(Fraction(1), parse_format("e4m3fn")), ulp(Fraction(1000), parse_format("e4m3fn"))
    (Fraction(1, 8), Fraction(32, 1))
    """
    from fpsim.reference.values import floor_log2

    exponent = min(max(floor_log2(abs(number)), fmt.emin), fmt.max_exponent) if number else fmt.emin
    return Fraction(2) ** (exponent - fmt.mantissa_bits)


def _show_neighbours(result: Value, fmt: FloatFormat) -> str:
    shown = []
    for step, side in ((-1, "below"), (1, "above")):
        code = neighbour(result, fmt, step)
        shown.append(f"none {side}" if code is None else f"{_show_value_of(code, fmt)} {side}")
    return ", ".join(shown)


def _show_value_of(code: int, fmt: FloatFormat) -> str:
    from fpsim import reference

    return f"{show_number(reference.decode(code, fmt))} ({_show_code(code, fmt)})"


def neighbour(value: Value, fmt: FloatFormat, step: int) -> int | None:
    """The code of the next value of ``fmt`` after ``value``, upwards (``step`` 1) or downwards (-1).

    Infinities count; the two zeros are one. None: there is no such value, or ``value`` is NaN.

    >>> neighbour(Fraction(448), parse_format("e4m3fn"), -1)
    125
    """
    from fpsim import reference

    if value is reference.NAN:
        return None
    code = reference.encode(value, fmt, overflow="sat_propagate" if fmt.has_infinity else "sat_finite")
    magnitude = code & ~fmt.sign_code
    position = (-magnitude if code & fmt.sign_code else magnitude) + step
    smallest = 1 << fmt.mantissa_bits  # the code of the smallest normal number
    if fmt.zero and not fmt.subnormals and 0 < abs(position) < smallest:
        position = smallest * step if position * step > 0 and not magnitude else 0
    if abs(position) > fmt.max_code + fmt.has_infinity or (position < 0 and not fmt.signed):
        return None
    return abs(position) | (fmt.sign_code if position < 0 else 0)


# -- fpsim verify ----------------------------------------------------------------------------------------------


@app.command()
@_plain_errors
def verify(
    format: Annotated[list[str], typer.Option(help="What to round to, such as e4m3fn; may be given several times.")],
    rounding: Annotated[
        list[str], typer.Option(help=f"{', '.join(ROUNDINGS)}, or all; may be given several times.")
    ] = ["nearest_even"],  # noqa: B006  # typer copies it
    overflow: OverflowOption = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Check every bit pattern of the carrier.")] = False,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Random inputs of a sample. [default: 4194304; 65536 for wide formats]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    path: Annotated[str, typer.Option(help="Which code to check: eager, compiled, or both.")] = "both",
    carrier: Annotated[str, typer.Option(help="Inputs: float64, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to round, such as cpu or cuda.")] = "cpu",
    markdown: Annotated[Path | None, typer.Option(help="Write the results to this file too, as a table.")] = None,
) -> None:
    """Compare the rounding of tensors with the exact reference, bit for bit. Exit code 1: it was wrong."""
    from fpsim.rounding_op import CARRIERS
    from fpsim.verify import PATHS
    from fpsim.verify import verify as check

    roundings = ROUNDINGS if "all" in rounding else tuple(dict.fromkeys(check_rounding(r) for r in rounding))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
    if carrier not in known:
        raise ValueError(f"unknown carrier {carrier!r}: use one of {', '.join(known)}")
    wanted = list(itertools.product([parse_format(name) for name in format], roundings))
    for fmt, _ in wanted:
        resolve_overflow(fmt, overflow)
    verdicts: list[Verdict] = []
    for fmt, direction in wanted:
        with _progress_bar(f"{fmt.name} {direction}") as progress:
            verdict = check(
                fmt,
                rounding=direction,
                overflow=overflow,
                exhaustive=exhaustive,
                samples=samples,
                seed=seed,
                paths=PATHS if path == "both" else [path],
                dtype=known[carrier],
                device=device,
                progress=progress,
            )
        verdicts.append(verdict)
        typer.echo(str(verdict))
        for example in verdict.examples:
            typer.echo(f"  {example}")
        if markdown is not None:
            markdown.write_text(_markdown(verdicts, shlex.join(["fpsim", *sys.argv[1:]])))
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


class _progress_bar:
    """A context in which ``progress(done, total)`` draws a bar on standard error, if that is a terminal."""

    def __init__(self, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _markdown(verdicts: list[Verdict], command: str) -> str:
    """The verdicts as a table, after a line on how they were obtained."""
    import torch

    from fpsim.rounding_op import KERNEL

    paths = " and ".join(verdicts[0].paths)
    lines = [
        f"`{command}` (torch {torch.__version__}, {_cpu_name()}, {torch.get_num_threads()} threads)",
        "",
        f"Outputs of `fpsim.round` ({paths}, {verdicts[0].device}, source {KERNEL}) against the exact reference, bit",
        "for bit. Seconds include compilation and the making of the reference's table; processor seconds are those of",
        "all threads together.",
        "",
        "| format | rounding | overflow | inputs | mismatches | seconds | processor seconds |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for v in verdicts:
        inputs = f"{'all' if v.exhaustive else 'sampled'} {v.carrier}: {v.inputs:,}"
        name = familiar_name(parse_format(v.format))
        cells = [name, v.rounding, v.overflow, inputs, f"{v.mismatches:,}", f"{v.seconds:.1f}", f"{v.cpu_seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match is not None:
            return match[1]
    return platform.processor() or platform.machine()


# -- fpsim demo ------------------------------------------------------------------------------------------------


@app.command()
@_plain_errors
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = 150,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="A run beside fp32: one format for all operands (bf16, e8m3/toward_zero), or forward+gradient "
            "(e4m3fn+e5m2); may be given several times. [default: a choice]"
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="File to train on. [default: Shakespeare]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for curves and records.")] = Path("runs/demo"),
    loss_scale: Annotated[
        float, typer.Option(help="Factor on the loss in the backward pass; with 1, gradients in e5m2 underflow.")
    ] = 4096.0,
) -> None:
    """Train a small Llama in several formats side by side, and show what they cost. Needs fpsim\\[paper]."""
    from fpsim.paper.demo import demo as run

    run(steps=steps, formats=format or None, text=text, out=out, loss_scale=loss_scale)
