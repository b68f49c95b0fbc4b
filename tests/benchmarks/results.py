"""Results by machine: the rows that benchmarks add to ``docs/speed.md``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch


def add_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a row with the ratios to this file")


def processor() -> str:
    """The name of the processor; that of its kind where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    name = names.get("model name", platform.processor() or platform.machine())
    model = [f"{key} {names[key]}" for key in ("cpu family", "model") if key in names]
    return f"{name} ({', '.join(model)})" if model else name


def record(path: Path | None, ratios: Mapping[str, float], vectors: str | None = None) -> None:
    """Add a row to the table at the end of ``path``: date, processor, vectors, torch, command, and ratios.

    ``vectors`` names the vectors of the process that measured; None stands for those of this process.
    """
    if path is None:
        return
    module = Path(sys.argv[0]).stem
    options = [word for word in sys.argv[1:] if word not in ("--record", str(path))]
    command = " ".join(["python", "-m", f"tests.benchmarks.{module}", *options])
    if "ATEN_CPU_CAPABILITY" in os.environ:
        command = f"ATEN_CPU_CAPABILITY={os.environ['ATEN_CPU_CAPABILITY']} {command}"
    cells = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        processor(),
        vectors or torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        f"`{command}`",
        "; ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
    ]
    with path.open("a") as file:
        file.write("| " + " | ".join(cells) + " |\n")
