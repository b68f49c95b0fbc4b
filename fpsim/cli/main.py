"""The command line: what formats are, what rounding does to a number, the proof that it is right, and the demo.

Numbers are read and printed exactly, through fractions; the work is done by `fpsim.reference`, `fpsim.verify` and
`fpsim.paper.demo`. Output goes to standard output, progress bars and errors to standard error.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from fpsim.cli.exact_numbers import (
    field_names,
    parse_number,
    show_bits,
    show_code,
    show_fields,
    show_number,
    show_power,
)
from fpsim.cli.explain_number import explain_number, explain_rounding, table_of_roundings
from fpsim.cli.study import app as study
from fpsim.formats import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_ROUNDINGS,
    FloatFormat,
    full_rounding,
    parse_format,
    resolve_overflow,
)

if TYPE_CHECKING:
    import torch

    from fpsim.evaluate.logit_sharpness import Report
    from fpsim.verify import Mode, Verdict

app = typer.Typer(
    help="Simulate any reduced-precision floating-point format in any PyTorch model, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(study, name="study")

_Command = TypeVar("_Command", bound=Callable[..., None])

_EVERY_ROUNDING = ", ".join([*ROUNDINGS, *(f"{name}[:BITS]" for name in STOCHASTIC_ROUNDINGS)])
RoundingOption = Annotated[
    str | None, typer.Option(help=f"{_EVERY_ROUNDING}. [default: a table of them all]", show_default=False)
]
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
    """Show formats: all named ones, or the given ones (such as e5m10, e3m4fn, e4m3:bias=9).

    Of a single one it shows every fact, and if it has 8 bits or fewer, every value.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("format", overflow="fold")
    for heading in ("bits", "exp.", "man.", "bias", "max", "min normal", "min subnormal"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("inf", "NaN"):
        table.add_column(heading)
    table.add_column("values", justify="right", overflow="fold")
    chosen = [parse_format(name) for name in names or NAMED_FORMATS]
    for fmt in chosen:
        table.add_row(*_format_row(fmt))
    _print(table)
    if names and len(chosen) == 1:
        [fmt] = chosen
        for heading, content in _facts(fmt):
            typer.echo(f"{heading:<19} {content}")
        if fmt.bits <= 8:
            _print(_table_of_values(fmt))


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _facts(fmt: FloatFormat) -> Iterable[tuple[str, str]]:
    from fpsim import reference
    from fpsim.reference.values import scale_b
    from fpsim.rounding.carriers import CARRIERS

    def coded(code: int) -> str:
        value = reference.decode(code, fmt)
        return f"{' = '.join(dict.fromkeys([show_number(value), show_power(value)]))} ({show_bits(code, fmt)})"

    widths = [(fmt.signed, "sign"), (fmt.exponent_bits, "exponent"), (fmt.mantissa_bits, "mantissa")]
    yield "bits", f"{fmt.bits} = {' + '.join(f'{width:d} {name}' for width, name in widths if width)}"
    yield "precision", f"{fmt.precision} significant bits"
    yield "exponents", f"{fmt.emin} to {fmt.max_exponent}, bias {fmt.bias}"
    yield "largest", coded(fmt.max_code)
    smallest = reference.encode(scale_b(1, fmt.emin), fmt)
    if reference.decode(smallest, fmt) == scale_b(1, fmt.emin):  # else all finite values are subnormal
        yield "smallest normal", coded(smallest)
    if fmt.subnormals and fmt.mantissa_bits:
        yield "smallest subnormal", coded(1)
    else:
        yield "subnormals", "none: results below the smallest normal become zero" if fmt.zero else "none"
    yield "zeros", "0 and -0" if fmt.has_negative_zero else "0" if fmt.zero else "none"
    infinity = "none" if fmt.infinity_code is None else show_bits(fmt.infinity_code, fmt)
    yield "infinity", infinity + (" and its negative" if fmt.has_infinity and fmt.signed else "")
    yield "NaN", _show_nans(fmt)
    yield "finite values", f"{fmt.num_values:,}"
    yield "usual overflow mode", resolve_overflow(fmt, None)
    carriers = [str(dtype).removeprefix("torch.") for dtype, carrier in CARRIERS.items() if fmt.is_subset_of(carrier)]
    yield "carriers", ", ".join(carriers) or "none"


def _show_nans(fmt: FloatFormat) -> str:
    if fmt.nan_code is None:
        return "none: NaN becomes the largest finite value"
    if fmt.bits > 16:
        return f"{show_bits(fmt.nan_code, fmt)} and others" if fmt.specials == "ieee" else show_bits(fmt.nan_code, fmt)
    count = sum(map(fmt.is_nan_code, range(1 << fmt.bits)))
    return show_bits(fmt.nan_code, fmt) + ("" if count == 1 else f", the usual one of {count:,} codes")


def _table_of_values(fmt: FloatFormat) -> Table:
    from fpsim import reference

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("code")
    table.add_column(field_names(fmt))
    table.add_column("exact value", justify="right")
    table.add_column("decimal", justify="right")
    for code in range(1 << fmt.bits):
        value = reference.decode(code, fmt)
        fields = show_fields(code, fmt, " | ")
        table.add_row(show_code(code, fmt), fields, show_power(value), show_number(value))
    return table


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
    rounding: RoundingOption = None,
    overflow: OverflowOption = None,
) -> None:
    """Round numbers exactly, and show result, code, bit fields, error and neighbours, for one rounding or for all.

    Stochastic rounding has two candidates, each with its probability.
    """
    fmt = parse_format(format)
    mode = resolve_overflow(fmt, overflow)
    roundings = [*ROUNDINGS, "stochastic"] if rounding is None else [rounding]
    roundings = [full_rounding(each) for each in roundings]
    for text in values:
        if text.startswith("--"):
            raise ValueError(f"no such option: {text}")
    numbers = [parse_number(text) for text in values]
    plain = rounding is not None and rounding in ROUNDINGS
    typer.echo(", ".join([familiar_name(fmt), *(roundings if rounding is not None else []), mode]))
    for text, number in zip(values, numbers, strict=True):
        typer.echo()
        explained = (
            explain_rounding(text, number, fmt, roundings[0], mode) if plain else explain_number(text, number, fmt)
        )
        for heading, content in explained:
            typer.echo(f"{heading:<11} {content}")
        if not plain:
            _print(table_of_roundings(number, fmt, roundings, mode))


# -- fpsim verify ----------------------------------------------------------------------------------------------


class _OptionalFile(TyperCommand):
    """A command whose option ``--json`` may go without its value, which is then ``-``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # vendored class
        completed: list[str] = []
        for argument, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
            completed += [argument, "-"] if argument == "--json" and following.startswith("--") else [argument]
        return super().parse_args(ctx, completed)


@app.command(cls=_OptionalFile)
@_plain_errors
def verify(
    format: Annotated[
        list[str] | None, typer.Option(help="What to round to, such as e4m3fn; may be given several times.")
    ] = None,
    rounding: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_EVERY_ROUNDING}, or all (all but the stochastic ones); may be given several times. "
            "[default: nearest_even]",
            show_default=False,
        ),
    ] = None,
    overflow: OverflowOption = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Verify samples of all named formats, roundings, overflow modes and carriers, or of those that "
            "other options leave.",
        ),
    ] = False,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Check every bit pattern of the carrier.")] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0, help="Random inputs of a sample. [default: 4194304; 65536 for wide formats; 32768 with --all]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs, and of stochastic rounding.")] = 0,
    path: Annotated[str, typer.Option(help="Which code to check: eager, compiled, or both.")] = "both",
    carrier: Annotated[
        str | None,
        typer.Option(help="Inputs: float64, float32, bfloat16 or float16. [default: float32]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to round, such as cpu or cuda.")] = "cpu",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side, with --all. [default: one per core, at most 4]")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the results to this file too, as a table.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            help="Write the results to this file too, as one JSON object per line; without FILE, to standard output, "
            "and everything else to standard error.",
        ),
    ] = None,
) -> None:
    """Compare the rounding of tensors with the exact reference, bit for bit. Exit code 1: it was wrong."""
    from fpsim.rounding.carriers import CARRIERS
    from fpsim.verify import PATHS, mode_of

    known = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
    if carrier is not None and carrier not in known:
        raise ValueError(f"unknown carrier {carrier!r}: use one of {', '.join(known)}")
    if not format and not everything:
        raise ValueError("nothing to verify: give --format, such as --format e4m3fn, or --all")
    if exhaustive and everything:
        raise ValueError("--all takes samples: leave out --exhaustive, or name what it is for by --format")
    if jobs is not None and not everything:
        raise ValueError("--jobs is for --all: without it, torch's threads work side by side")
    paths = list(PATHS) if path == "both" else [path]
    expanded = [each for name in rounding or () for each in (ROUNDINGS if name == "all" else (full_rounding(name),))]
    roundings = list(dict.fromkeys(expanded))
    if everything:
        dtypes = None if carrier is None else [known[carrier]]
        runs = _verify_all(format, roundings, overflow, dtypes, samples, seed, paths, device, jobs)
    else:
        modes = [mode_of(name, each, overflow) for name in format or () for each in roundings or ["nearest_even"]]
        dtype = known[carrier or "float32"]
        runs = _verify_each(modes, exhaustive, samples, seed, paths, dtype, device)
    verdicts: list[Verdict] = []
    records: list[str] = []
    to_output, start = json_file == "-", time.perf_counter()
    for summary, several in runs:
        verdicts += several
        for line in [summary, *(str(v) for v in several if not v.ok and str(v) != summary)]:
            typer.echo(line, err=to_output)
        for verdict in several:
            for example in verdict.examples:
                typer.echo(f"  {verdict.describe(example)}", err=to_output)
            records.append(json.dumps(verdict.record()))
            if to_output:
                typer.echo(records[-1])
        if markdown is not None:
            markdown.write_text(_markdown(verdicts, shlex.join(["fpsim", *sys.argv[1:]])))
        if json_file is not None and not to_output:
            Path(json_file).write_text("".join(f"{record}\n" for record in records))
    if everything:
        typer.echo(_total(verdicts, time.perf_counter() - start), err=to_output)
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


def _verify_each(
    modes: Sequence[Mode],
    exhaustive: bool,
    samples: int | None,
    seed: int,
    paths: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> Iterable[tuple[str, Sequence[Verdict]]]:
    """One mode after the other, each with a bar of its own: a summary in one line, and the verdict."""
    from fpsim.verify import verify as check

    for mode in modes:
        with _progress_bar(f"{mode.format.name} {mode.rounding}") as progress:
            verdict = check(
                mode.format,
                rounding=mode.rounding,
                overflow=mode.overflow,
                exhaustive=exhaustive,
                samples=samples,
                seed=seed,
                paths=paths,
                dtype=dtype,
                device=device,
                progress=progress,
            )
        yield str(verdict), [verdict]


def _verify_all(
    names: Sequence[str] | None,
    roundings: Sequence[str],
    overflow: str | None,
    dtypes: Sequence[torch.dtype] | None,
    samples: int | None,
    seed: int,
    paths: Sequence[str],
    device: str,
    jobs: int | None,
) -> Iterable[tuple[str, Sequence[Verdict]]]:
    """What `fpsim.verify.plan` says: of each group a summary in one line, and the verdicts."""
    from fpsim.verify import plan, verify_groups

    overflows = None if overflow is None else [overflow]
    groups = plan(names or NAMED_FORMATS, roundings=roundings or None, overflows=overflows, dtypes=dtypes, paths=paths)
    workers = jobs or min(4, _cores())
    chosen = {} if samples is None else {"samples": samples}
    with _progress_bar("all") as progress:
        progress(0, len(groups))
        results = verify_groups(groups, jobs=workers, seed=seed, device=device, **chosen)
        for done, (group, verdicts) in enumerate(zip(groups, results, strict=True), start=1):
            progress(done, len(groups))
            yield (
                f"{group}, {' and '.join(group.paths)}: {_total(verdicts, sum(v.seconds for v in verdicts))}",
                verdicts,
            )


def _total(verdicts: Sequence[Verdict], seconds: float) -> str:
    mismatches, inputs = (sum(getattr(v, name) for v in verdicts) for name in ("mismatches", "inputs"))
    outcome = f"{mismatches:,} MISMATCHES" if mismatches else "no mismatch"
    modes = f"{len(verdicts):,} mode{'s' if len(verdicts) > 1 else ''}"
    return f"{modes}, {outcome} in {inputs:,} inputs, {seconds:.1f} s"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

    from fpsim.source import proven_hash

    paths = " and ".join(verdicts[0].paths)
    lines = [
        f"`{command}` (torch {torch.__version__}, {_cpu_name()}, {torch.get_num_threads()} threads)",
        "",
        f"Outputs of `fpsim.round` ({paths}, {verdicts[0].device}, source {proven_hash()}) against the exact",
        "reference, bit for bit. Seconds include compilation and the making of the reference's table; processor",
        "seconds are those of all threads together.",
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


# -- fpsim sharpness -------------------------------------------------------------------------------------------


@app.command()
@_plain_errors
def sharpness(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_OR_SCRIPT",
            help="Folder of a Hugging Face causal model, or path/to/script.py:function that builds a module.",
        ),
    ],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="UTF-8 file to predict.")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict of the script's module. [default: as it is built]")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help="Measure also with all operands rounded to it (e4m3fn, e8m3/toward_zero); several times."),
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(help="Half-width of the box, several times. [default: 0.0005 and 0.001]")
    ] = None,
    method: Annotated[str, typer.Option(help="exact, or lbfgsb as the paper has it (slow).")] = "exact",
    windows: Annotated[int, typer.Option(min=1, help="Stretches of the text, at most.")] = 16,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in each. [default: the model's own]")] = None,
    gradients: Annotated[bool, typer.Option(help="Measure the norm of the gradient, too.")] = True,
) -> None:
    """Measure the logit sharpness of a language model on a text, unrounded and under formats.

    A checkpoint is read with its tokenizer, and needs fpsim\\[paper]. A script's function returns a module from tokens
    to logits and may take vocabulary and context; its tokens are bytes, unless the script has a function tokenize.
    """
    from fpsim.evaluate.load import is_script
    from fpsim.evaluate.logit_sharpness import EPSILONS

    measure: Callable[..., Report]
    if is_script(str(model)):
        from fpsim.evaluate.logit_sharpness import measure_script

        measure = functools.partial(measure_script, str(model), weights=weights)
    elif weights is not None:
        raise ValueError(f"weights are for a script, and {model} holds its own: leave --weights out")
    else:
        from fpsim.evaluate.logit_sharpness import measure_checkpoint

        measure = functools.partial(measure_checkpoint, model)
    with _progress_bar("windows") as progress:
        report = measure(
            text,
            formats=format or (),
            epsilons=epsilon or EPSILONS,
            method=method,
            windows=windows,
            context=context,
            gradients=gradients,
            progress=progress,
        )
    _print(report.table())
