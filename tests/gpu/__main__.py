"""The whole proof on a GPU, and the cost of rounding there.

    python -m tests.gpu [--exhaustive] [--only checks|benchmarks] [--markdown tests/gpu/results.md]
    TRITON_INTERPRET=1 python -m tests.gpu --rehearse

Every check and benchmark is a row of the results, even if it fails; the exit status is 1 if any of them fails. A
rehearsal runs the same code on the CPU with interpreted Triton, few numbers and small models. It shows that this
program works, proves nothing about GPUs, and writes no results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

NO_GPU = """\
There is no CUDA device here: torch.cuda.is_available() is False.
Run it on a machine with an NVIDIA GPU, a build of torch for CUDA and Triton (pip install 'fpsim-torch[gpu]').
The proofs that need no GPU are part of `make test` (tests/compile_backend/test_triton.py);
TRITON_INTERPRET=1 python -m tests.gpu --rehearse runs this program on the CPU, without results."""


GOALS = (
    "Goals: rounding at 85 % of a copy's bandwidth or more, a training step in 1.10 times plain Inductor's or less.\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exhaustive", action="store_true", help="all 2^32 float32 numbers instead of every 4099th")
    parser.add_argument("--only", choices=("checks", "benchmarks"))
    parser.add_argument("--markdown", type=Path, default=Path(__file__).parent / "results.md")
    parser.add_argument("--rehearse", action="store_true", help="run a small version on the CPU, without results")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: pip install 'fpsim-torch[gpu]'", file=sys.stderr)
        return 2
    if arguments.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        print("a rehearsal needs Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2

    from tests.gpu import benchmarks, checks

    rehearse = arguments.rehearse
    device = torch.device("cpu" if rehearse else "cuda")
    setting = checks.Setting(device, 1 << 22, arguments.exhaustive)
    if rehearse:
        setting = checks.Setting(device, 1 << 12, False, compiled=("e5m2",))
    size = benchmarks.REHEARSAL if rehearse else benchmarks.Size()
    report = Report(Console(width=120), rehearse)
    if arguments.only != "benchmarks":
        for name, check in checks.CHECKS.items():
            if not (rehearse and check is checks.check_every_float32):  # 2^20 numbers in Triton's interpreter
                report.check(name, lambda check=check: check(setting))
    if arguments.only != "checks":
        for benchmark in benchmarks.BENCHMARKS:
            report.benchmark(benchmark.__name__, lambda benchmark=benchmark: benchmark(device, size))
    if not rehearse:
        arguments.markdown.write_text(report.markdown())
        print(f"wrote {arguments.markdown}")
    return int(report.failed)


class Report:
    """Collects the rows, prints each when it is known, and makes the file of results."""

    def __init__(self, console: Console, rehearse: bool) -> None:
        self.console, self.rehearse, self.failed = console, rehearse, False
        self.checks: list[tuple[str, str, str]] = []
        self.tables: list[str] = []

    def check(self, name: str, run: Callable[[], str]) -> None:
        start = time.perf_counter()
        try:
            verdict, found = "holds", run()
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            lines = f"{type(error).__name__}: {error}".splitlines()
            verdict, found = "**FAILS**", lines[0].replace("|", "/")
        self.checks.append((name, verdict, found))
        self.console.print(f"{name}: {verdict}, {found} ({time.perf_counter() - start:.0f} s)", markup=False)

    def benchmark(self, name: str, run: Callable[[], tuple[str, tuple[str, ...], list[tuple[str, ...]]]]) -> None:
        try:
            title, columns, rows = run()
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            title, columns, rows = name, ("error",), [(str(error).splitlines()[0].replace("|", "/"),)]
        self.tables.append(markdown_table(title, columns, rows))
        self.console.print(self.tables[-1], markup=False)

    def markdown(self) -> str:
        parts = [f"# On a GPU\n\n`python -m tests.gpu {' '.join(sys.argv[1:])}`, {facts()}.\n"]
        if self.checks:
            parts.append(markdown_table("The proof", ("check", "", "compared"), self.checks))
        if self.tables:
            parts += [GOALS, *self.tables]
        return "\n".join(parts)


def markdown_table(title: str, columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def facts() -> str:
    """Date, device and versions."""
    import triton

    from fpsim.source import source_hash

    properties = torch.cuda.get_device_properties(0)
    device = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor})"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
    source = f"Python {platform.python_version()}, fpsim source {source_hash()}"
    return f"{datetime.date.today()}, {device}, {versions}, {source}"


if __name__ == "__main__":
    sys.exit(main())
