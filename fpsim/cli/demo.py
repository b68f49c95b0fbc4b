"""``fpsim demo``: a small training run in several formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.output import check_writable, load_torch


@plain_errors
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = 150,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Format of a run beside fp32: one for all operands (bf16, e8m3/toward_zero), or forward+gradient "
            "(e4m3fn+e5m2); may be given several times.",
            show_default="a choice",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="File to train on.", show_default="Shakespeare")] = None,
    out: Annotated[Path, typer.Option(help="Folder for curves and records.")] = Path("runs/demo"),
    loss_scale: Annotated[
        float, typer.Option(help="Factor on the loss in the backward pass; with 1, gradients in e5m2 underflow.")
    ] = 4096.0,
) -> None:
    """Train a small Llama in several formats side by side, and show their cost. Needs fpsim-torch\\[paper]."""
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "summary.json")
    load_torch("fpsim.paper.demo")
    from fpsim.paper.demo import demo as run

    run(steps=steps, formats=format or None, text=text, out=out, loss_scale=loss_scale)
