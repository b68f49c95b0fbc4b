"""What a run of the study costs beside the same run in plain Inductor, and what measuring sharpness adds to a step.

    python -m tests.benchmarks.study [--model tiny|toy] [--steps N] [--format F]

One thread, one process, runs interleaved step by step; medians over steps, the first left out. Overhead: the whole
step (forward, backward, update) of a simulated run over that of plain Inductor with the same attention, measuring
nothing in either. Sharpness: seconds spent on measuring the logits at every tenth step, over the seconds of ten steps
of the same run. Measuring costs no forward pass: the logits are an output of the graph that trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fpsim.paper.config import RunConfig
from fpsim.paper.data import load
from fpsim.paper.models import MODELS
from fpsim.paper.sweeps import condition_options
from fpsim.paper.training import Record, records, step_seconds

_EVERY = 10


def cases(base: RunConfig, name: str) -> dict[str, RunConfig]:
    """The runs that are compared, plain Inductor of each attention before what is simulated with it."""
    options = dict(condition_options(name) or {})
    fused = {**options, "attention": "keep"}
    return {
        "plain Inductor, attention opened": base,
        f"{name}, attention opened": replace(base, options=options),
        "plain Inductor, attention fused": replace(base, attention="fused"),
        f"{name}, attention fused": replace(base, options=fused),
        f"{name}, attention fused, measured": replace(base, options=fused, measure_every=_EVERY),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "toy"], default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--format", default="e8m3/toward_zero")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = arguments.steps
    base = RunConfig(model=MODELS[arguments.model], batch=arguments.batch, steps=steps, validate_every=steps)
    base = replace(base, validation_batches=1)
    data = load(base.data, context=base.model.context)
    configs = cases(base, arguments.format)
    streams: dict[str, Iterator[Record]] = {name: records(config, data) for name, config in configs.items()}
    histories: dict[str, list[Record]] = {name: [] for name in streams}
    for _ in track(range(steps), "steps", transient=True):
        for name, stream in streams.items():
            histories[name].append(next(stream))

    table = Table(title=f"one step, {arguments.model}, batch {arguments.batch}, 1 thread, torch {torch.__version__}")
    for column in ("run", "ms per step", "over plain Inductor", "sharpness, ms", "share of ten steps"):
        table.add_column(column, justify="left" if column == "run" else "right")
    baseline = 0.0
    for name, history in histories.items():
        seconds = step_seconds(history)
        baseline = seconds if name.startswith("plain") else baseline
        measured = [record.sharpness_seconds for record in history[_EVERY:] if record.sharpness_seconds is not None]
        cells = (
            [f"{1e3 * median(measured):.2f}", f"{median(measured) / (_EVERY * seconds):.2%}"] if measured else ["", ""]
        )
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / baseline:.3f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
