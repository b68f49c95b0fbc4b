"""Which width and format reaches a loss at the least cost, as in *Pareto-Optimal Quantized ResNet Is Mostly 4-bit*.

Abdolrashidi et al. (arXiv 2105.03536) train ResNets of several widths with weights and activations of several widths in
bits, and ask which of them is the cheapest at a given accuracy. Here the same question is put to a residual network on
synthetic images (`fpsim.paper.images`) and to a Llama on bytes of text. The operands of the forward products are
rounded; gradients pass straight through. Cost is the number of multiply-adds of one forward pass (per image or per
token) times the bits of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import require
from .choices import check_choice
from .compiled_loss import OpenAttention
from .config import RunConfig
from .figures import colours
from .images import CHANNELS, SIDE, Classifier, ImageTask, ResNet8
from .models import ModelConfig, build
from .storage import read_results, write_results
from .trainer import learning_rate
from .training import run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES = ("resnet", "llama")
#: The formats by label: the cast of both operands of forward products (None: float32), and the bits of an operand.
FORMATS: dict[str, tuple[str | None, int]] = {
    "bf16": ("bf16", 16),
    "int8": ("int8/tensor", 8),
    "e4m3fn": ("e4m3fn/tensor", 8),
    "int4": ("int4/tensor", 4),
    "e2m1fn": ("e2m1fn/tensor", 4),
    "int2": ("int2/tensor", 2),
}


@dataclass(frozen=True)
class Size:
    """The widths, seeds and steps of a study.

    Attributes:
        widths: of the residual network's first block, and of the Llama's residual stream.
        seeds: the number of seeds, from 0.
        steps: optimizer steps of each run.
    """

    widths: Mapping[str, tuple[int, ...]]
    seeds: int
    steps: int


#: The sizes: ``quick`` takes minutes on 2 cores, ``full`` hours.
SIZES = {
    "quick": Size({"resnet": (4, 8, 16), "llama": (16, 32, 64)}, seeds=2, steps=150),
    "full": Size({"resnet": (4, 6, 8, 12, 16, 24, 32), "llama": (16, 24, 32, 48, 64, 96, 128)}, seeds=5, steps=1000),
}


@dataclass(frozen=True)
class Point:
    """A run of the study.

    Attributes:
        family, width, format, seed, steps: what was trained.
        loss: on held-out data at the end, nats per image or token.
        multiply_adds: of one forward pass, per image or token.
        cost: multiply-adds times the bits of an operand.
    """

    family: str
    width: int
    format: str
    seed: int
    steps: int
    loss: float
    multiply_adds: float
    cost: float


def options(name: str) -> dict[str, Any] | None:
    """The policy of the format with this label: operands of forward products, straight-through gradients."""
    cast, _ = FORMATS[name]
    return None if cast is None else {"fprop": {"activation": cast, "weight": cast}, "products": "weights"}


def pareto(
    families: Iterable[str],
    formats: Iterable[str],
    size: Size,
    folder: Path,
    *,
    interpret: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> list[Point]:
    """Train every family, width, format and seed of the study that ``folder`` lacks.

    Args:
        tell: called with a line of text before and after each run.

    Returns:
        All points in ``folder`` with the steps and the seeds of ``size``.

    Raises:
        ValueError: an unknown family or format, or points of another version of fpsim in the folder.
    """
    families, formats = list(families), list(formats)
    for family in families:
        check_choice("family", family, FAMILIES)
    for name in formats:
        check_choice("format", name, FORMATS)
    path = folder / "points.json"
    points = {key: Point(**fields) for key, fields in read_results(path, "points").items()}
    runs = {
        f"{family}/{width}/{name}/{seed}/{size.steps}": (family, width, name, seed)
        for seed in range(size.seeds)
        for family in families
        for width in size.widths[family]
        for name in formats
    }
    for number, (key, (family, width, name, seed)) in enumerate(runs.items(), 1):
        if key not in points:
            tell(f"run {number} of {len(runs)}: {family} of width {width}, {name}, seed {seed}")
            points[key] = _point(family, width, name, seed, size.steps, interpret)
            write_results(path, "points", {key: asdict(each) for key, each in points.items()})
            tell(f"  loss {points[key].loss:.3f}")
    return [point for point in points.values() if point.steps == size.steps and point.seed < size.seeds]


def _point(family: str, width: int, name: str, seed: int, steps: int, interpret: bool) -> Point:
    train = _train_resnet if family == "resnet" else _train_llama
    loss, multiply_adds = train(width, options(name), seed, steps, "interpreted" if interpret else "compiled")
    return Point(family, width, name, seed, steps, loss, multiply_adds, multiply_adds * FORMATS[name][1])


def multiply_adds(network: torch.nn.Module, inputs: torch.Tensor) -> int:
    """The multiply-adds of the matrix products and convolutions in ``network(inputs)``.

    Attention is opened, since torch counts no products in its fused kernel on the CPU.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        OpenAttention(network)(inputs)
    return counter.get_total_flops() // 2


def _train_llama(width: int, policy: dict[str, Any] | None, seed: int, steps: int, backend: str) -> tuple[float, float]:
    model = ModelConfig(layers=2, hidden=width, heads=2, mlp=8 * width // 3, context=64)
    config = RunConfig(
        model=model, options=policy, steps=steps, batch=8, learning_rate=5e-3, seed=seed, warmup=steps // 10
    )
    config = replace(config, attention="fused", validate_every=steps, backend=backend)
    loss = run(config)[-1].validation_loss
    tokens = torch.zeros(1, model.context, dtype=torch.long)
    return math.nan if loss is None else loss, multiply_adds(build(model, seed=0), tokens) / model.context


def _train_resnet(
    width: int, policy: dict[str, Any] | None, seed: int, steps: int, backend: str
) -> tuple[float, float]:
    """SGD with momentum 0.9 on batches of 64, cosine decay of the rate from 0.05, weight decay 5e-4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(ResNet8(width))
    how: dict[str, Any] = {"backend": "fpsim" if backend == "compiled" else "fpsim_eager", "options": policy}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **(how if policy is not None else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    task, generator = ImageTask(), torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=0.05, warmup=0, steps=steps, floor=0.0)
        optimizer.zero_grad()
        loss, _ = compiled(*task.batch(64, generator))
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = torch.Generator().manual_seed(2**31)  # the same images for all runs
    with torch.no_grad():
        losses = [float(compiled(*task.batch(250, held_out))[0]) for _ in range(4)]
    return math.fsum(losses) / len(losses), multiply_adds(model.network, torch.zeros(1, CHANNELS, SIDE, SIDE))


# -- the frontier ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The seeds of one family, width and format together: the mean loss with its standard error, and the cost."""

    family: str
    width: int
    format: str
    loss: float
    error: float
    cost: float


def means(points: Sequence[Point]) -> list[Mean]:
    """The means over seeds, in the order of the points."""
    groups: dict[tuple[str, int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.family, point.width, point.format), []).append(point)
    found = []
    for (family, width, name), group in groups.items():
        losses = np.array([point.loss for point in group])
        error = float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else math.nan
        found.append(Mean(family, width, name, float(losses.mean()), error, group[0].cost))
    return found


def frontier(found: Sequence[Mean]) -> list[Mean]:
    """The means that no other one dominates: none has at most their cost and a lower loss. By rising cost.

    Args:
        found: means of one family.
    """
    kept: list[Mean] = []
    for mean in sorted(found, key=lambda each: (each.cost, each.loss)):
        if math.isfinite(mean.loss) and (not kept or mean.loss < kept[-1].loss):
            kept.append(mean)
    return kept


def markdown(found: Sequence[Mean]) -> str:
    """All means, with standard errors over seeds, as a table in Markdown; those on the frontier are marked."""
    rows = ["| model | width | format | bits x multiply-adds | loss | frontier |", "|---|---|---|---|---|---|"]
    for family in dict.fromkeys(mean.family for mean in found):
        own = [mean for mean in found if mean.family == family]
        best = frontier(own)
        for mean in sorted(own, key=lambda each: each.cost):
            loss = f"{mean.loss:.3f}" + (f" ± {mean.error:.3f}" if math.isfinite(mean.error) else "")
            cells = (family, str(mean.width), mean.format, f"{mean.cost:.3g}", loss, "yes" if mean in best else "")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def figure(found: Sequence[Mean]) -> Figure:
    """Loss against cost, a panel per family, a line per format over widths, and the frontier."""
    families = list(dict.fromkeys(mean.family for mean in found))
    drawn = require("matplotlib.figure").Figure(figsize=(5 * len(families), 3.8), dpi=110, layout="constrained")
    panels = drawn.subplots(1, len(families), squeeze=False)
    paint = colours(list(dict.fromkeys(mean.format for mean in found)))
    for axes, family in zip(panels[0], families, strict=True):
        own = [mean for mean in found if mean.family == family]
        for name in dict.fromkeys(mean.format for mean in own):
            line = sorted((mean for mean in own if mean.format == name), key=lambda each: each.cost)
            costs, losses, errors = ([getattr(mean, field) for mean in line] for field in ("cost", "loss", "error"))
            axes.errorbar(costs, losses, errors, marker="o", markersize=3, color=paint[name], label=name)
        best = frontier(own)
        axes.plot(
            [mean.cost for mean in best], [mean.loss for mean in best], "k--", linewidth=1, label="frontier", zorder=5
        )
        axes.set(xscale="log", title=family, xlabel="bits x multiply-adds", ylabel="held-out loss (nats)")
    panels[0][-1].legend(fontsize=8)
    return drawn
