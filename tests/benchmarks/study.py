"""The cost of a run of the study relative to the same run in plain Inductor, and the cost of measuring sharpness.

    python -m tests.benchmarks.study [--model tiny|toy] [--steps N] [--format F]
    python -m tests.benchmarks.study --sweep 100 [--executor process|ray] [--steps N]

One thread and one process; the runs take turns step by step, and times are medians over all steps but the first.
Overhead is the time of a whole step (forward, backward, update) of a simulated run, over that of plain Inductor with
the same attention; neither measures anything. Sharpness is the time to measure the logits at every tenth step, over the
time of ten steps of the same run. It takes no further forward pass: the logits are an output of the training graph.

``--sweep`` runs the toy model that many times in four formats, and samples the workers from /proc twice per second
(Linux). Workers are busy while they compute, or wait for a core that another process has; the table shows the share of
the time between their start and their end. Memory is resident memory in each quarter of the sweep, for the worker whose
memory grows most.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fpsim.paper.config import RunConfig
from fpsim.paper.data import load
from fpsim.paper.models import MODELS
from fpsim.paper.record import Record, step_seconds
from fpsim.paper.sweeps import grid, sweep
from fpsim.paper.training import records
from fpsim.policy.shorthand import parse_shorthand

_EVERY = 10


def cases(base: RunConfig, name: str) -> dict[str, RunConfig]:
    """The runs to compare; for each attention, plain Inductor precedes the simulated runs."""
    options = dict(parse_shorthand(name) or {})
    fused = {**options, "attention": "keep"}
    return {
        "plain Inductor, attention opened": base,
        f"{name}, attention opened": replace(base, options=options),
        "plain Inductor, attention fused": replace(base, attention="fused"),
        f"{name}, attention fused": replace(base, options=fused),
        f"{name}, attention fused, measured": replace(base, options=fused, measure_every=_EVERY),
    }


@dataclass(frozen=True)
class Sample:
    """One observation of a process.

    Attributes:
        time: seconds since the sweep began.
        computed: seconds of processor time of all its threads.
        busy: seconds in which its first thread computed or waited for a core.
        resident: resident MiB.
    """

    time: float
    computed: float
    busy: float
    resident: float


class Watch(threading.Thread):
    """Samples, by process, of this process and of its descendants that are workers of a sweep."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: dict[int, list[Sample]] = {}
        self._start, self._done = time.monotonic(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.5):
            for process in (os.getpid(), *_workers(os.getpid())):
                try:
                    self.samples.setdefault(process, []).append(self._look(process))
                except OSError:  # it has ended
                    continue

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _look(self, process: int) -> Sample:
        threads = [task.read_text().split() for task in Path(f"/proc/{process}/task").glob("*/schedstat")]
        first = Path(f"/proc/{process}/schedstat").read_text().split()
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        computed, busy = sum(int(thread[0]) for thread in threads) / 1e9, (int(first[0]) + int(first[1])) / 1e9
        return Sample(time.monotonic() - self._start, computed, busy, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def _workers(root: int) -> list[int]:
    """Descendants of ``root`` that compute runs: spawned by multiprocessing, or actors of Ray."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, level = [], {root}
    while level:
        level = {process for process, parent in parents.items() if parent in level}
        found += level
    return [process for process in found if _is_worker(process)]


def _is_worker(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"spawn_main" in command or command.startswith(b"ray::_Actor")


def measure_sweep(count: int, executor: str, steps: int) -> None:
    formats = ["fp32", "bf16", "e8m3/toward_zero", "e4m3fn+e5m2"]
    base = RunConfig(model=MODELS["toy"], steps=steps, validate_every=steps, validation_batches=1, measure_every=10)
    plan = grid(base, formats=formats, seeds=range(-(-count // len(formats))))[:count]
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory() as folder:
        outcome = sweep(plan, Path(folder), executor=executor, console=Console(stderr=True))
        watch.stop()
    driver = watch.samples.pop(os.getpid())
    workers = [samples for samples in watch.samples.values() if len(samples) > 4]  # forks for compilers end sooner
    begin, end = min(samples[0].time for samples in workers), max(samples[-1].time for samples in workers)
    whole = (end - begin) * len(workers)
    computed = sum(samples[-1].computed - samples[0].computed for samples in workers)
    busy = sum(samples[-1].busy - samples[0].busy for samples in workers)

    table = Table(title=f"{count} runs of {steps} steps, executor {executor}, {len(workers)} workers")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    rows = {
        "runs computed, given up": f"{outcome.computed}, {len(outcome.failures)}",
        "seconds in total, per run": f"{outcome.seconds:.0f}, {outcome.seconds / count:.2f}",
        "workers computed": f"{computed / whole:.0%}",
        "workers were busy": f"{busy / whole:.0%}",
        "driver computed": f"{driver[-1].computed / (end - begin):.1%} of a core",
        "worker, MiB by quarter": _line(max(map(_quarters, workers), key=lambda quarters: quarters[3] / quarters[1])),
        "driver, MiB by quarter": _line(_quarters(driver)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=120).print(table)


def _quarters(samples: Sequence[Sample]) -> list[float]:
    """Mean resident MiB in each quarter of ``samples``; the first one holds the start of the process."""
    bounds = [len(samples) * quarter // 4 for quarter in range(5)]
    return [mean(each.resident for each in samples[a:b]) for a, b in pairwise(bounds)]


def _line(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.0f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "toy"], default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--format", default="e8m3/toward_zero")
    parser.add_argument("--sweep", type=int, help="how many runs; measure a sweep instead")
    parser.add_argument("--executor", choices=["process", "ray"], default="process")
    arguments = parser.parse_args()
    if arguments.sweep:
        measure_sweep(arguments.sweep, arguments.executor, arguments.steps)
        return
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
