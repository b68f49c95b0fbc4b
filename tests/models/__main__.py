"""A table of how fpsim rounds real architectures, one row each.

    python -m tests.models [NAME...] [--markdown FILE]

Each model is built tiny from its configuration and a fixed seed. It is explained, compiled, audited and trained for
three steps. One step is compared with the interpreted one, bit for bit, with deterministic algorithms and one thread,
and the interpreted one with an emulation that shares no code with fpsim. If a model fails, its row says so, and the
first line of the error follows the table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fpsim.source import source_hash

from .architectures import ARCHITECTURES
from .measure import Row, measure

COLUMNS = (
    "model", "parameters", "operands rounded", "counted by hand", "gaps", "graph breaks", "losses of 3 steps",
    "escaped", "bits, emulation", "bits, aten's kernels", "bits, Inductor's kernels",
)  # fmt: skip

#: The largest difference from the emulation that another order of summation explains.
LARGEST_DIFFERENCE = 1e-6

LEGEND = """\
*Operands rounded*: sites of `fpsim.explain`. *Counted by hand*: their number according to the architecture, forward and
backward. *Gaps*: operators that multiply matrices and would not be rounded. *Escaped*: products that ran unrounded in
one real step of the compiled model (`fpsim.audit`). *Bits*: a comparison of the loss and all gradients of one step with
`backend="fpsim_eager"`. In the first column, plain eager PyTorch rounds the operands in a `TorchDispatchMode` that
shares no code with fpsim ([emulation.py](emulation.py)). In the second column, Inductor compiles the step and calls
aten's kernels (`fallback_by_default`, no `layout_optimization`): the graphs are the same, partitioned and recomputed,
and so is the order of summation. In the third column, it calls its own kernels. An entry is "equal", or the largest
difference: of the loss, or of an element of a gradient relative to the largest element of all gradients. The emulation
sums in another order where eager PyTorch does: in the scan of Mamba and in a bias of DETR. Inductor's kernels sum in
another order, use another layout for convolutions, and approximate `exp` and similar functions differently, which gives
differences of about 1e-7. If such a difference moved an operand across the boundary between two FP8 values, its row
would show a far larger difference."""


def main() -> None:
    arguments = parse()
    names = arguments.names or list(ARCHITECTURES)
    rows = []
    with progress() as bar, quiet():
        task = bar.add_task("", total=len(names), stage="")
        for name in names:
            bar.update(task, description=name)
            rows.append(measure(ARCHITECTURES[name], lambda stage: bar.update(task, stage=stage)))
            if arguments.markdown:  # after each row, so that an interrupted run leaves its rows
                arguments.markdown.write_text(markdown(rows))
            bar.advance(task)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(terminal_table(rows))
    for remark in remarks(rows):
        console.print(Text(f"- {remark}"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}; default: all")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ARCHITECTURES.keys():
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(ARCHITECTURES)}")
    return arguments


def progress() -> Progress:
    bar = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*bar, TextColumn("{task.description}: {task.fields[stage]}"), console=Console(stderr=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers and of Dynamo; the table shows the relevant ones."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of `COLUMNS`."""
    unknown = "error" if row.errors else "-"
    return (
        row.architecture.name,
        f"{row.parameters:,}",
        str(row.rounded) if row.plan else unknown,
        str(row.architecture.operands),
        str(sum(row.gaps.values())) if row.plan else unknown,
        str(len(row.breaks)) if row.plan else unknown,
        " ".join(f"{loss:.3f}" for loss in row.losses) or unknown,
        str(row.escaped) if row.audit else unknown,
        _bits(row.emulated, unknown),
        unknown if row.aten_equal is None else "equal" if row.aten_equal else "differ",
        _bits(row.difference, unknown),
    )


def _bits(difference: float | None, unknown: str) -> str:
    return unknown if difference is None else f"{difference:.0e}" if difference else "equal"


def is_clean(row: Row) -> bool:
    """Whether all operands are rounded, the model trains, and its bits are the interpreter's."""
    whole = row.rounded == row.architecture.operands and not row.gaps and not row.breaks and not row.escaped
    bits = bool(row.aten_equal) and row.emulated is not None and row.emulated < LARGEST_DIFFERENCE
    return whole and row.trains and bits and not row.errors


def remarks(rows: list[Row]) -> Iterator[str]:
    """A line for each row that is not clean, with the known causes."""
    for row in rows:
        if not is_clean(row):
            said = list(_facts(row))
            yield f"{row.architecture.name}: " + "; ".join(said + [row.architecture.note] * bool(row.architecture.note))


def _facts(row: Row) -> Iterator[str]:
    for error in dict.fromkeys(row.errors.values()):
        yield f"{' and '.join(name for name in row.errors if row.errors[name] == error)}: {error}"
    for (operator, reason), count in row.gaps.items():
        yield f"{count} x {operator}: {reason}"
    for reason in row.breaks:
        yield f"graph break: {reason}"
    for escape in row.audit.escaped if row.audit else ():
        shapes = ", ".join("x".join(map(str, shape)) for shape in escape.shapes)
        yield f"escaped: {escape.count} x {escape.operator} of {shapes}"
    if row.losses and not row.trains:
        yield "the loss does not fall"
    if row.emulated is not None and row.emulated >= LARGEST_DIFFERENCE:
        yield "the emulation rounds something else"
    if row.aten_equal is False:
        yield "the bits differ although the order of summation is the same"


def terminal_table(rows: list[Row]) -> Table:
    table = Table(title=f"{len(rows)} architectures, torch {torch.__version__}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*cells(row), style="" if is_clean(row) else "yellow")
    return table


def markdown(rows: list[Row]) -> str:
    """The table with its legend and remarks, and all information to make it again."""
    command = shlex.join(["python", "-m", "tests.models", *sys.argv[1:]])
    libraries = (name for name in ("torch", "transformers", "diffusers") if find_spec(name))
    versions = ", ".join([*(f"{name} {version(name)}" for name in libraries), f"fpsim source {source_hash()[:12]}"])
    date = datetime.datetime.now(datetime.UTC).date()
    alignment = ["---"] + ["---:"] * (len(COLUMNS) - 1)
    lines = [
        "# Real models",
        "",
        f"`{command}`, {date}, {versions}.",
        f"CPU ({os.uname().machine}), one thread, float32; policy: the default, the FP8 hybrid.",
        "",
        *("| " + " | ".join(words) + " |" for words in (COLUMNS, alignment, *map(cells, rows))),
        "",
        LEGEND,
        "",
        *(f"- {remark}" for remark in remarks(rows)),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
