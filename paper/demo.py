"""The demo: one small Llama trained under several formats side by side, with a table and a plot of the results.

All runs start from the same weights and see the same batches. They take one step each in turn, so that a disturbance of
the machine slows all of them and the ratios of their speeds stay right.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fpsim.policy.shorthand import UNSIMULATED, parse_shorthand

from . import require
from .compile_ahead import compile_ahead
from .compiled_loss import Compile
from .config import RunConfig
from .data import Data, read_text, split, tokenize
from .figures import COLOURS
from .progress import progress_bars
from .record import Record, step_seconds
from .storage import plain_number
from .training import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The run without simulation: plain Inductor, with attention opened as in the simulated runs.
BASELINE = UNSIMULATED
#: Runs of the demo beside the baseline, as `fpsim.policy.shorthand.parse_shorthand` reads them.
DEFAULT_FORMATS = ("bf16", "e4m3fn+e5m2", "e8m3", "e8m3/toward_zero")


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        name: as `fpsim.policy.shorthand.parse_shorthand` reads it.
        config: its configuration.
        records: one per step.
    """

    name: str
    config: RunConfig
    records: list[Record] = field(repr=False)

    @property
    def validation_losses(self) -> list[float]:
        """Validation losses in order of steps, nats per token."""
        return [record.validation_loss for record in self.records if record.validation_loss is not None]

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step, nats per token."""
        return self.validation_losses[-1]

    @property
    def best_loss(self) -> float:
        """Smallest finite validation loss, nats per token; NaN if there is none."""
        return min(filter(math.isfinite, self.validation_losses), default=math.nan)

    @property
    def steps_per_second(self) -> float:
        """From the median step, the first left out; NaN for a single step."""
        return 1 / step_seconds(self.records)

    def overhead(self, baseline: Result) -> float:
        """The ratio of the median step time to that of ``baseline``."""
        return step_seconds(self.records) / step_seconds(baseline.records)


def demo(
    *,
    steps: int = 150,
    formats: Sequence[str] | None = None,
    text: Path | None = None,
    out: Path = Path("runs/demo"),
    loss_scale: float = 4096.0,
    console: Console | None = None,
    config: RunConfig | None = None,
    compile: Compile | None = None,
) -> list[Result]:
    """Train the baseline and one run per format, print a table, and write the measurements to the folder ``out``.

    Files: ``loss.png`` (loss curves), ``records.csv`` (one line per run and step), ``summary.json`` (the table, the
    configuration, versions, and the text's name and size).

    Args:
        steps: optimizer steps per run.
        formats: runs beside the baseline ``fp32``, as `parse_shorthand` reads them; None or empty means
            `DEFAULT_FORMATS`.
        text: file to train on; None means all plays of Shakespeare (`fpsim.paper.data.shakespeare`).
        loss_scale: `RunConfig.loss_scale` of all runs. The default keeps gradients of e5m2 above underflow, as training
            in FP8 does; 1 shows what happens without. It leaves the bits of bf16, e8m3 and fp32 runs as they are.
        console: the console for all output; None prints progress bars on standard error, the rest on standard output.
        config: sizes and recipe; the demo itself sets ``options``, ``steps``, ``warmup``, ``validate_every`` and
            ``loss_scale``.
        compile: passed to `fpsim.paper.training.records`.

    Returns:
        The runs in the order of the table, the baseline first.

    Raises:
        ValueError: a name that `parse_shorthand` cannot read, a text that is too short, ``steps`` or ``loss_scale``
            not positive.
        FileNotFoundError, IsADirectoryError: ``text`` is not a file.
        ModuleNotFoundError: the optional extra ``paper`` is not installed.
    """
    start = time.perf_counter()
    require("matplotlib")  # fail before the training, not after
    console, bars = console or Console(), console or Console(stderr=True)
    shared = replace(
        config or RunConfig(), steps=steps, warmup=steps // 10, validate_every=max(1, steps // 8), loss_scale=loss_scale
    )
    names = dict.fromkeys([BASELINE, *(formats or DEFAULT_FORMATS)])
    configs = {name: replace(shared, options=parse_shorthand(name)) for name in names}
    content = read_text(text)
    data = split(tokenize(content), context=shared.model.context)
    source = "all plays of Shakespeare" if text is None else text.name
    out.mkdir(parents=True, exist_ok=True)
    console.print(_heading(shared, f"{source} ({len(content):,} bytes)"))
    results = _train(configs, data, bars, compile)
    console.print(table(results))
    plot(results, out / "loss.png", title=f"Llama on {source}")
    _write_csv(results, out / "records.csv")
    _write_summary(results, out / "summary.json", source, len(content))
    console.print(f"{time.perf_counter() - start:.0f} s in all; curves in {out / 'loss.png'}, records in {out}")
    return results


def table(results: Sequence[Result]) -> Table:
    """The runs as a rich table; the first is the baseline that the others are compared with."""
    baseline = results[0]
    columns = Table(
        title="Validation loss in nats per byte",
        caption=f"{BASELINE} is plain Inductor with attention opened, as the simulated runs have it.\n"
        "Overhead: median step time over that of fp32, compilation left out.",
    )
    columns.add_column("format", no_wrap=True)
    for heading in ("final", "best", "vs fp32", "steps/s", "overhead"):
        columns.add_column(heading, justify="right")
    for result in results:
        columns.add_row(
            result.name,
            f"{result.final_loss:.3f}",
            f"{result.best_loss:.3f}",
            "" if result is baseline else f"{result.final_loss - baseline.final_loss:+.3f}",
            f"{result.steps_per_second:.1f}",
            f"{result.overhead(baseline):.2f}x",
        )
    return columns


def plot(results: Sequence[Result], path: Path, *, title: str) -> None:
    """Draw the loss curves of ``results`` (the first is the baseline) to the PNG file ``path``, 1500 x 1050 pixels.

    The upper panel has the training loss of every step (faint), the smoothed one (line) and the validation losses
    (dots); the lower panel has the last two minus those of the baseline. All runs see the same batches, so that small
    gaps show.
    """
    figure = require("matplotlib.figure").Figure(figsize=(10, 7), dpi=150, layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, result in enumerate(results):
        _draw(losses, gaps, result, results[0], COLOURS[index % len(COLOURS)])
    losses.set_title(title, loc="left")
    losses.set_title("lines: training, smoothed; dots: validation", loc="right", fontsize=9, color="0.4")
    losses.set_ylabel("loss (nats per byte)")
    gaps.set_ylabel(f"loss minus {results[0].name}")
    gaps.set_xlabel("step")
    for axes in (losses, gaps):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside right upper", frameon=False, title="format")
    figure.savefig(path)


def _heading(config: RunConfig, source: str) -> str:
    model = config.model
    return (
        f"Llama with {model.layers} layers of width {model.hidden} on {source}: {config.steps} steps of "
        f"{config.batch} x {model.context} tokens, loss scale {config.loss_scale:g}, {torch.get_num_threads()} threads"
    )


def _train(configs: Mapping[str, RunConfig], data: Data, console: Console, compile: Compile | None) -> list[Result]:
    """All runs in lockstep, with one progress bar each."""
    histories: dict[str, list[Record]] = {name: [] for name in configs}
    progress = progress_bars(console)
    # The last two of five: the other process starts later, and what it compiles must still be loaded here.
    elsewhere = list(configs)[math.ceil(len(configs) * 0.6) :] if compile is None else []
    with progress, compile_ahead({name: configs[name] for name in elsewhere}) as ahead:
        tasks = {
            name: progress.add_task(name, total=run.steps, state="waiting", start=False)
            for name, run in configs.items()
        }
        streams = {name: records(run, data, compile=compile) for name, run in configs.items()}
        for step in range(configs[BASELINE].steps):
            for name, stream in streams.items():
                if step == 0:
                    progress.start_task(tasks[name])
                    progress.update(tasks[name], state="compiling")
                    ahead.wait(name)
                record = next(stream)
                histories[name].append(record)
                progress.update(tasks[name], advance=1, state=f"loss {record.loss:.3f}")
    return [Result(name, configs[name], history) for name, history in histories.items()]


def _draw(losses: Axes, gaps: Axes, result: Result, baseline: Result, colour: str) -> None:
    steps = [record.step for record in result.records]
    validated = [record.step for record in result.records if record.validation_loss is not None]
    raw = [record.loss for record in result.records]
    smooth = _smooth(raw)
    style: dict[str, Any] = {"color": colour, "linewidth": 2 if result is baseline else 1.5}
    dots: dict[str, Any] = {"color": colour, "linestyle": "none", "marker": "o", "markersize": 4}
    losses.plot(steps, raw, color=colour, linewidth=0.6, alpha=0.2)
    losses.plot(steps, smooth, label=result.name, **style)
    losses.plot(validated, result.validation_losses, **dots)
    gaps.plot(steps, smooth - _smooth([record.loss for record in baseline.records]), **style)
    validation_gaps = [a - b for a, b in zip(result.validation_losses, baseline.validation_losses, strict=True)]
    gaps.plot(validated, validation_gaps, **dots)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Gaussian average with a standard deviation of a fiftieth of the run, renormalised at the ends, without lag."""
    width = max(1.0, len(values) / 50)
    reach = min(math.ceil(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    totals, weights = (np.convolve(row, kernel)[reach : reach + len(values)] for row in (values, np.ones(len(values))))
    return totals / weights


def _write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *(entry.name for entry in fields(Record))])
        writer.writeheader()
        writer.writerows({"run": result.name, **asdict(record)} for result in results for record in result.records)


def _write_summary(results: Sequence[Result], path: Path, source: str, size: int) -> None:
    baseline = results[0]
    rows = [
        {
            "name": result.name,
            "options": result.config.options,
            "final_validation_loss": plain_number(result.final_loss),
            "best_validation_loss": plain_number(result.best_loss),
            "final_minus_baseline": plain_number(result.final_loss - baseline.final_loss),
            "diverged": not all(math.isfinite(record.loss) for record in result.records),
            "steps_per_second": plain_number(result.steps_per_second),
            "overhead": plain_number(result.overhead(baseline)),
        }
        for result in results
    ]
    summary = {
        "text": {"name": source, "bytes": size},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": {key: value for key, value in asdict(baseline.config).items() if key != "options"},
        "runs": rows,
    }
    path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
