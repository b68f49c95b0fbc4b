"""The figures of the report: functions from judged runs to matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from . import require
from .prediction import SIGNALS, Prediction, roc, scored_steps
from .storage import Run
from .verdicts import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, in an order that keeps neighbours apart for colour-blind readers.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31")
#: Columns of small multiples.
_ACROSS = 4


@dataclass(frozen=True)
class Judged:
    """A sweep's runs with their verdicts: the content of every figure and table.

    Attributes:
        runs, verdicts, trained: one per run, in the order of the plan.
        reference: the condition that others are compared with.
    """

    runs: Sequence[Run]
    verdicts: Sequence[Verdict]
    trained: Sequence[bool]
    reference: str

    @property
    def conditions(self) -> list[str]:
        """All conditions, in the order of the plan."""
        return list(dict.fromkeys(run.condition for run in self.runs))

    @property
    def rates(self) -> list[float]:
        """Learning rates, ascending."""
        return sorted({run.config.learning_rate for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        """All seeds, ascending."""
        return sorted({run.config.seed for run in self.runs})

    def of(self, condition: str, rate: float | None = None) -> list[int]:
        """The indices of the runs of ``condition``, at one learning rate or at all of them."""
        return [
            index
            for index, run in enumerate(self.runs)
            if run.condition == condition and rate in (None, run.config.learning_rate)
        ]


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour per name: from `COLOURS`, or shades of one scale where there are more names."""
    if len(names) <= len(COLOURS):
        return dict(zip(names, COLOURS, strict=False))
    scale = require("matplotlib").colormaps["turbo"]
    return {name: scale(0.05 + 0.9 * index / (len(names) - 1)) for index, name in enumerate(names)}


def loss_curves(judged: Judged) -> Figure:
    """Smoothed training loss over steps: mean over seeds, and the band from the lowest to the highest seed."""
    figure, panels = _panels(len(judged.rates), height=max(3.6, _legend_height(judged)), sharey=True)
    paint, styles = colours(judged.conditions), cycle(["-"] if len(judged.conditions) <= 8 else ["-", "--", ":"])
    style = {name: next(styles) for name in judged.conditions}
    for axes, rate in zip(panels, judged.rates, strict=True):
        for name in judged.conditions:
            rows = [judged.runs[index]["smoothed_loss"] for index in judged.of(name, rate)]
            _band(axes, rows, paint[name], style[name], name)
        axes.set_title(f"learning rate {rate:g}", fontsize=10)
        axes.set_xlabel("step")
    panels[0].set_ylabel("smoothed loss (nats)")
    return _finished(figure, panels)


def loss_differences(judged: Judged, pairs: Mapping[str, Sequence[tuple[int, int]]]) -> Figure:
    """Smoothed loss minus that of a paired run, over steps: mean over pairs, band from the lowest to the highest.

    Args:
        pairs: for each condition indices of its runs, with those of the runs to subtract.
    """
    figure, panels = _panels(len(judged.rates), height=max(3.6, _legend_height(judged)), sharey=True)
    paint = colours(judged.conditions)
    late = []
    for axes, rate in zip(panels, judged.rates, strict=True):
        for name, indices in pairs.items():
            runs = [(judged.runs[own], judged.runs[other]) for own, other in indices]
            rows = [
                _difference(own["smoothed_loss"], other["smoothed_loss"])
                for own, other in runs
                if own.config.learning_rate == rate
            ]
            _band(axes, rows, paint[name], "-", name)
            late += [row[runs[0][0].config.warmup :] for row in rows]
        axes.axhline(0, color=paint[judged.reference], linewidth=1.4, label=judged.reference)
        axes.set_title(f"learning rate {rate:g}", fontsize=10)
        axes.set_xlabel("step")
    values = np.concatenate([[0.0], *late])
    low, high = np.nanmin(values), np.nanmax(values)
    if high > low:
        panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels[0].set_ylabel(f"smoothed loss minus that of {judged.reference} (nats)")
    return _finished(figure, panels)


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    length = min(len(first), len(second))
    return np.asarray(first[:length] - second[:length])


def gaps(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Differences with their intervals, one row per name: a point and a line from low to high, around zero.

    Args:
        rows: name, difference, low and high; a difference that is NaN is left out.
    """
    shown = [row for row in rows if np.isfinite(row[1])]
    figure, (axes,) = _panels(1, width=5.5, height=0.8 + 0.26 * len(shown))
    places = np.arange(len(shown))[::-1]
    axes.axvline(0, color="#000000", linewidth=1)
    for place, (_, middle, low, high) in zip(places, shown, strict=True):
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=COLOURS[1], linewidth=2)
        axes.plot(middle, place, "o", color=COLOURS[1], markersize=5)
    axes.set_yticks(places, [name for name, *_ in shown], fontsize=8)
    axes.set_xlabel("gap (nats per token)")
    return figure


def loss_by_rate(rows: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> Figure:
    """Loss against learning rate: mean over seeds, and the band from the lowest to the highest seed.

    Args:
        rows: label, heading of the panel, learning rates of shape (rates,), losses of shape (seeds, rates).
    """
    headings = list(dict.fromkeys(heading for _, heading, *_ in rows))
    paint = colours(list(dict.fromkeys(label for label, *_ in rows)))
    figure, panels = _panels(len(headings), height=max(3.6, 0.3 + 0.18 * len(paint)), sharey=True)
    by_heading = dict(zip(headings, panels, strict=True))
    for label, heading, rates, losses in rows:
        axes, colour = by_heading[heading], paint[label]
        axes.plot(rates, losses.mean(0), "o-", color=colour, markersize=3, linewidth=1.3, label=label)
        axes.fill_between(rates, losses.min(0), losses.max(0), color=colour, alpha=0.12, linewidth=0)
    for heading, axes in by_heading.items():
        axes.set(xscale="log", xlabel="learning rate")
        _name_ticks(axes, {float(rate) for _, own, rates, _ in rows if own == heading for rate in rates})
        axes.set_title(heading, fontsize=10)
    panels[0].set_ylabel("final loss, at most that at initialisation (nats)")
    return _finished(figure, panels)


@dataclass(frozen=True)
class Line:
    """Points ``x``, ``y`` with intervals ``low`` to ``high``, which may be NaN; ``look`` is the format of `plot`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    look: str = "o-"


def sensitivity_lines(panels: Mapping[str, Sequence[Line]]) -> Figure:
    """Learning-rate sensitivity with its intervals, a panel for each label of the horizontal axis."""
    paint = colours(list(dict.fromkeys(line.label for lines in panels.values() for line in lines)))
    figure, drawn = _panels(len(panels), height=max(3.6, 0.3 + 0.18 * len(paint)), sharey=True)
    for axes, (label, lines) in zip(drawn, panels.items(), strict=True):
        for line in lines:
            bars = np.nan_to_num(np.abs(np.array([line.low, line.high]) - np.array(line.y)))
            look: dict[str, Any] = {"color": paint[line.label], "markersize": 3, "linewidth": 1.2, "capsize": 2}
            axes.errorbar(line.x, line.y, bars, fmt=line.look, label=line.label, **look)
        axes.set(xscale="log", xlabel=label)
        _name_ticks(axes, {x for line in lines for x in line.x})
    drawn[0].set_ylabel("learning-rate sensitivity (nats)")
    return _finished(figure, drawn)


def drift_lines(panels: Mapping[str, Sequence[Line]]) -> Figure:
    """The growth of every layer's weights with its interval over the steps, a panel for each condition."""
    paint = colours(list(dict.fromkeys(line.label for lines in panels.values() for line in lines)))
    figure, drawn = _panels(len(panels), height=max(3.6, 0.3 + 0.18 * len(paint)), sharey=True)
    for axes, (condition, lines) in zip(drawn, panels.items(), strict=True):
        for line in lines:
            axes.plot(line.x, line.y, line.look, color=paint[line.label], markersize=3, linewidth=1.2, label=line.label)
            axes.fill_between(line.x, line.low, line.high, color=paint[line.label], alpha=0.12, linewidth=0)
        axes.axhline(0, color="0.8", linewidth=0.8)
        axes.set(xlabel="step")
        axes.set_title(condition, fontsize=10)
    drawn[0].set_ylabel("growth of the norm (%)")
    return _finished(figure, drawn)


def _name_ticks(axes: Axes, values: set[float]) -> None:
    """Ticks of the horizontal axis at ``values`` alone, with their numbers."""
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)], fontsize=8)
    axes.minorticks_off()


def heat_maps(judged: Judged) -> Figure:
    """Final smoothed loss over seed and learning rate, one map per condition; a cross where the run diverged."""
    width = max(2.6, 0.5 * len(judged.rates) + 0.6)
    figure, panels = _panels(len(judged.conditions), width=width, height=1.1 + 0.32 * max(3, len(judged.seeds)))
    grids = {name: _grid(judged, name) for name in judged.conditions}
    values = np.concatenate([losses[np.isfinite(losses)] for losses, _ in grids.values()] or [np.zeros(1)])
    low, high = (values.min(), values.max()) if len(values) else (0, 1)
    image = None
    for axes, (name, (losses, diverged)) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(losses, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
        axes.plot(*np.nonzero(diverged)[::-1], "x", color="#D55E00", markersize=6, markeredgewidth=2, label="diverged")
        for (row, column), loss in np.ndenumerate(np.where(diverged, np.nan, losses)):
            if np.isfinite(loss):
                ink = "white" if loss > (low + high) / 2 else "black"  # the map darkens upwards
                axes.text(column, row, f"{loss:.2f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(judged.rates)), [f"{rate:g}" for rate in judged.rates], fontsize=7)
        axes.set_yticks(range(len(judged.seeds)), [str(seed) for seed in judged.seeds], fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.grid(False)
        axes.set_xlabel("learning rate", fontsize=8)
    panels[0].set_ylabel("seed")
    if any(diverged.any() for _, diverged in grids.values()):
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", frameon=False, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=list(panels)).set_label("final loss (nats)", fontsize=8)
    return figure


def _grid(judged: Judged, condition: str) -> tuple[np.ndarray, np.ndarray]:
    losses = np.full((len(judged.seeds), len(judged.rates)), np.nan)
    diverged = np.zeros(losses.shape, dtype=bool)
    for index in judged.of(condition):
        config = judged.runs[index].config
        place = judged.seeds.index(config.seed), judged.rates.index(config.learning_rate)
        losses[place] = judged.verdicts[index].final_loss
        diverged[place] = judged.verdicts[index].diverged
    return losses, diverged


def sharpness_and_loss(judged: Judged) -> Figure:
    """Logit sharpness (above) and loss (below) over steps, a column per learning rate; a line where a run diverged."""
    rates = judged.rates
    size = (3.6 * len(rates) + 2.4, max(6.4, _legend_height(judged)))
    figure = require("matplotlib.figure").Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(2, len(rates), sharex="col", sharey="row", squeeze=False)
    paint = colours(judged.conditions)
    for column, rate in enumerate(rates):
        for name in judged.conditions:
            chosen = judged.of(name, rate)
            for index in chosen:
                run, verdict = judged.runs[index], judged.verdicts[index]
                measured = ~np.isnan(run["sharpness_5e4"])
                label = name if index == chosen[0] else None
                look: dict[str, Any] = {"color": paint[name], "linewidth": 0.9, "alpha": 0.75}
                panels[0, column].plot(run["step"][measured], run["sharpness_5e4"][measured], **look)
                panels[1, column].plot(run["step"], run["smoothed_loss"], label=label, **look)
                if verdict.diverged_at is not None:
                    for axes in panels[:, column]:
                        axes.axvline(verdict.diverged_at, color=paint[name], linewidth=0.6, linestyle=":")
        panels[0, column].set_title(f"learning rate {rate:g}", fontsize=10)
        panels[0, column].set_yscale("log")
        panels[1, column].set_xlabel("step")
    panels[0, 0].set_ylabel("logit sharpness (%), ε = 5e-4")
    panels[1, 0].set_ylabel("smoothed loss (nats)")
    return _finished(figure, list(panels.flat), legend_of=list(panels[1]))


def roc_curves(judged: Judged, predictions: Sequence[Prediction], horizon: float) -> Figure:
    """ROC curves of every signal for divergence within ``horizon`` (a share of the run), by value and by rise."""
    figure, panels = _panels(2, height=4.2, width=4.6)
    paint = colours(list(SIGNALS))
    for axes, score in zip(panels, ("value", "rise"), strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for found in predictions:
            if found.score == score and np.isfinite(found.auc):
                scores, labels, _ = scored_steps(
                    judged.runs, judged.verdicts, found.signal, score=score, horizon=horizon
                )
                axes.plot(*roc(scores, labels), color=paint[found.signal], label=SIGNALS[found.signal], linewidth=1.3)
        axes.set_title(f"by {score}", fontsize=10)
        axes.set_xlabel("share of calm steps above the threshold")
    panels[0].set_ylabel("share of steps before divergence above it")
    return _finished(figure, panels)


def _legend_height(judged: Judged) -> float:
    """Inches that a legend with all conditions takes."""
    return 0.3 + 0.18 * len(judged.conditions)


def _panels(count: int, *, width: float = 3.4, height: float = 3.6, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels in rows, and the panels."""
    across = min(count, _ACROSS)
    down = -(-count // across)
    size = (width * across + (2.6 if height > 2 else 1.0), height * down)
    figure = require("matplotlib.figure").Figure(figsize=size, dpi=110, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    for unused in panels[count:]:
        unused.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.25)
    return figure, panels[:count]


def _band(axes: Axes, curves: Sequence[np.ndarray], colour: Any, style: str, label: str) -> None:
    if not curves:
        return
    length = max(map(len, curves))
    rows = np.full((len(curves), length), np.nan)
    for row, values in zip(rows, curves, strict=True):
        row[: len(values)] = np.where(np.isfinite(values), values, np.nan)
    known = ~np.isnan(rows).all(axis=0)
    steps = np.arange(1, length + 1)[known]
    axes.plot(steps, np.nanmean(rows[:, known], axis=0), style, color=colour, linewidth=1.4, label=label)
    axes.fill_between(
        steps,
        np.nanmin(rows[:, known], axis=0),
        np.nanmax(rows[:, known], axis=0),
        color=colour,
        alpha=0.12,
        linewidth=0,
    )


def _finished(figure: Figure, panels: Sequence[Axes], legend_of: Sequence[Axes] | None = None) -> Figure:
    found: dict[str, Any] = {}
    for axes in legend_of or panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    if found:
        figure.legend(list(found.values()), list(found), loc="outside right upper", frameon=False, fontsize=8)
    return figure
