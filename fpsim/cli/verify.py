"""``fpsim verify``: the proof that rounding is right, in exhaustive or sampled comparisons with the reference."""

from __future__ import annotations

import itertools
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import ROUNDINGS_HELP, OverflowOption, complete_format
from fpsim.cli.output import check_writable, familiar_name, progress_bar
from fpsim.formats import NAMED_FORMATS, ROUNDINGS, full_rounding, parse_format
from fpsim.processors import usable_cores

if TYPE_CHECKING:
    from fpsim.verify import Group, Mode, Verdict


class VerifyCommand(TyperCommand):
    """The option ``--json`` may stand without a value: the value is then ``-``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # vendored class
        completed: list[str] = []
        for argument, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
            completed += [argument, "-"] if argument == "--json" and following.startswith("--") else [argument]
        return super().parse_args(ctx, completed)


@plain_errors
def verify(
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Format to round to, such as e4m3fn; may be given several times.",
            show_default="all named formats with --all",
            autocompletion=complete_format,
        ),
    ] = None,
    rounding: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{ROUNDINGS_HELP}, or all (all but the stochastic ones); may be given several times.",
            show_default="nearest_even; all with --all",
        ),
    ] = None,
    overflow: OverflowOption = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="Verify the scales of blocks instead, for float32 magnitudes: mx:32:rceil, or all for every rule. "
            "Without --format, those of all formats that take them.",
            show_default="none",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Verify samples of all named formats, roundings, overflow modes and carriers. Other options restrict "
            "them.",
        ),
    ] = False,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Check every bit pattern of the carrier.")] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Random inputs of a sample.",
            show_default="4194304; 65536 for wide formats; 32768 with --all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs and of stochastic rounding.")] = 0,
    path: Annotated[str, typer.Option(help="Code to check: eager, compiled, or both.")] = "both",
    carrier: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the inputs: float64, float32, bfloat16 or float16.",
            show_default="float32; all with --all",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device that rounds, such as cpu or cuda.")] = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes, with --all.", show_default="one per core, at most 4"),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the results to this file too, as a table.", show_default="none")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            help="Write the results to this file too, as one JSON object per line. Without FILE, write them to "
            "standard output, and everything else to standard error.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Compare the rounding of tensors with the exact reference, bit for bit. Exit code 1 means a mismatch."""
    from fpsim.rounding.carriers import CARRIERS
    from fpsim.verify import PATHS, CompilationError, mode_of, plan

    known = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
    if carrier is not None and carrier not in known:
        raise ValueError(f"unknown carrier {carrier!r}: use one of {', '.join(known)}")
    if not format and not everything and scale is None:
        raise ValueError("nothing to verify: give --format, such as --format e4m3fn, or --all")
    if exhaustive and everything:
        raise ValueError(
            "--all takes samples: leave out --exhaustive, or name the formats by --format instead of --all"
        )
    if jobs is not None and not everything:
        raise ValueError("--jobs is for --all: without it, torch's threads work side by side")
    for file in (markdown, None if json_file in (None, "-") else Path(json_file or "")):
        if file is not None:
            check_writable(file)
    paths = list(PATHS) if path == "both" else [path]
    expanded = [each for name in rounding or () for each in (ROUNDINGS if name == "all" else (full_rounding(name),))]
    roundings = list(dict.fromkeys(expanded))
    options = {"seed": seed, "device": device} | ({} if samples is None else {"samples": samples})
    if scale is not None:
        _refuse_beside_scale(rounding=rounding, overflow=overflow, everything=everything, carrier=carrier, jobs=jobs)
        options.pop("device")
        runs = _verify_scales(format or (), scale, paths, exhaustive=exhaustive, **options)
    elif everything:
        groups = plan(
            format or NAMED_FORMATS,
            roundings=roundings or None,
            overflows=None if overflow is None else [overflow],
            dtypes=None if carrier is None else [known[carrier]],
            paths=paths,
        )
        runs = _verify_groups(groups, jobs=jobs or min(4, usable_cores()), **options)
    else:
        modes = [mode_of(name, each, overflow) for name in format or () for each in roundings or ["nearest_even"]]
        dtype = known[carrier or "float32"]
        runs = _verify_modes(modes, exhaustive=exhaustive, paths=paths, dtype=dtype, **options)
    start = time.perf_counter()
    try:
        verdicts = _show(runs, markdown, json_file)
    except CompilationError as error:
        raise ValueError(error) from error
    if everything:
        typer.echo(_total(verdicts, time.perf_counter() - start), err=json_file == "-")
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


def _verify_modes(modes: Sequence[Mode], **options: Any) -> Iterable[tuple[str, Sequence[Verdict]]]:
    """Verify one mode after the other, each under a progress bar: a summary in one line, and the verdict."""
    from fpsim.verify import verify as verify_mode

    for mode in modes:
        with progress_bar(f"{mode.format.name} {mode.rounding}") as progress:
            verdict = verify_mode(
                mode.format, rounding=mode.rounding, overflow=mode.overflow, progress=progress, **options
            )
        yield str(verdict), [verdict]


def _refuse_beside_scale(**options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        name = "all" if given[0] == "everything" else given[0]
        raise ValueError(f"--scale is about scales of float32 magnitudes: leave out --{name}")


def _verify_scales(
    formats: Sequence[str], scale: str, paths: Sequence[str], **options: Any
) -> Iterable[tuple[str, Sequence[Verdict]]]:
    """Verify the scales of each format under a progress bar: a summary in one line, and the verdict."""
    from fpsim.verify import verify_scales

    with progress_bar(scale) as progress:
        for verdict in verify_scales(formats, scale, paths, progress=progress, **options):
            yield str(verdict), [verdict]


def _verify_groups(groups: Sequence[Group], **options: Any) -> Iterable[tuple[str, Sequence[Verdict]]]:
    """Verify the groups under one progress bar: for each a summary in one line, and the verdicts."""
    from fpsim.verify import verify_groups

    with progress_bar("all") as progress:
        progress(0, len(groups))
        results = verify_groups(groups, **options)
        for done, (group, verdicts) in enumerate(zip(groups, results, strict=True), start=1):
            progress(done, len(groups))
            total = _total(verdicts, sum(verdict.seconds for verdict in verdicts))
            yield f"{group}, {' and '.join(group.paths)}: {total}", verdicts


def _show(runs: Iterable[tuple[str, Sequence[Verdict]]], markdown: Path | None, json_file: str | None) -> list[Verdict]:
    """Print the summaries, the wrong verdicts and their examples, and write the files anew after each run."""
    verdicts: list[Verdict] = []
    records: list[str] = []
    to_output = json_file == "-"
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
    return verdicts


def _total(verdicts: Sequence[Verdict], seconds: float) -> str:
    mismatches, inputs = (sum(getattr(v, name) for v in verdicts) for name in ("mismatches", "inputs"))
    outcome = f"{mismatches:,} MISMATCHES" if mismatches else "no mismatch"
    modes = f"{len(verdicts):,} mode{'s' if len(verdicts) > 1 else ''}"
    return f"{modes}, {outcome} in {inputs:,} inputs, {seconds:.1f} s"


def _markdown(verdicts: list[Verdict], command: str) -> str:
    """The verdicts as a table, after a line with the command, the version of torch and the processor."""
    import torch

    from fpsim.source import proven_hash

    paths = " and ".join(verdicts[0].paths)
    if verdicts[0].overflow == "scale":
        return _markdown_of_scales(verdicts, command)
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


def _markdown_of_scales(verdicts: list[Verdict], command: str) -> str:
    """The verdicts on scales as a table."""
    import torch

    from fpsim.source import SCALES_PROVEN, proven_hash

    lines = [
        f"`{command}` (torch {torch.__version__}, {_cpu_name()}, {torch.get_num_threads()} threads)",
        "",
        f"The codes of scales (source {proven_hash(SCALES_PROVEN)}) against those of the exact reference, for float32",
        "magnitudes. Seconds include compilation.",
        "",
        "| format | scale | path | magnitudes | mismatches | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for v in verdicts:
        inputs = f"{'all' if v.exhaustive else 'sampled'}: {v.inputs:,}"
        cells = [v.format, v.rounding, *v.paths, inputs, f"{v.mismatches:,}", f"{v.seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match is not None:
            return match[1]
    return platform.processor() or platform.machine()
