"""The cost of rounding an optimizer's state, relative to the plain step of AdamW as a loop, foreach and fused (CPU).

    python -m tests.benchmarks.optimizer [--steps N] [--layers N] [--threads N] [--only NAME] [--eager] [--cpu-time]

The parameters are those of GPT-2's layers at half its width. Times are medians over interleaved steps in one process.
The table compares the ratio of the rounded to the plain step with a lower bound of such a ratio: the plain step and one
copy of the state. ``--eager`` also measures rounding that is not compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import AdamW, Optimizer

import fpsim
from tests.benchmarks.results import add_record_option, record
from tests.benchmarks.timing import add_clock_option, interleaved_medians

WIDTH = 384
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "torch's default, a loop over tensors": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "state e4m3fn": {"state": "e4m3fn"},
    "state bf16": {"state": "bf16"},
    "state e4m3fn, stochastic": {"state": "e4m3fn/stochastic", "seed": 0},
    "state and weights bf16": {"state": "bf16", "weights": "bf16"},
    "state bf16, weights e4m3fn, master bf16": {"state": "bf16", "weights": "e4m3fn", "master": "bf16"},
    "weights bf16, Kahan": {"weights": "bf16", "kahan": True},
}


def parameters(layers: int) -> list[nn.Parameter]:
    """Weights, biases and norms of transformer layers, with gradients."""
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    vectors = [(3 * WIDTH,), (WIDTH,), (4 * WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,)]
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in (*shapes, *vectors)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def optimizer(layers: int, implementation: dict[str, Any], rounding: dict[str, Any] | None) -> Optimizer:
    made = AdamW(parameters(layers), **implementation)
    if rounding is not None:
        fpsim.round_optimizer(made, **rounding)
    for _ in range(2):  # creates the state, and compiles
        made.step()
    return made


def copier(layers: int) -> Callable[[], None]:
    state = [torch.randn_like(p) for p in parameters(layers) for _ in range(2)]
    other = [tensor.clone() for tensor in state]
    return lambda: torch._foreach_copy_(other, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="also measure rounding that is not compiled")
    parser.add_argument("--only", choices=ROUNDINGS, nargs="+", default=list(ROUNDINGS), help="these roundings alone")
    add_clock_option(parser)
    add_record_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count = sum(p.numel() for p in parameters(arguments.layers))

    steps: dict[tuple[str, str], Callable[[], Any]] = {("", "copying the state"): copier(arguments.layers)}
    ways = [("", None)] if not arguments.eager else [("", None), (", eager", False)]
    for name, implementation in track(IMPLEMENTATIONS.items(), "compiling", transient=True):
        steps[name, "plain"] = optimizer(arguments.layers, implementation, None).step
        for rounding in arguments.only:
            options = ROUNDINGS[rounding]
            for suffix, compiled in ways:
                made = optimizer(arguments.layers, implementation, {**options, "compiled": compiled})
                steps[name, rounding + suffix] = made.step

    seconds = interleaved_medians(steps, arguments.steps, clock=arguments.clock)

    title = f"AdamW, {count / 1e6:.1f} M parameters, {arguments.threads} thread(s), torch {torch.__version__}"
    table = Table(title=title)
    for column in ("step", "rounded", "ns per parameter", "ratio to the plain step"):
        table.add_column(column, justify="left" if column in ("step", "rounded") else "right")
    copied = seconds["", "copying the state"]
    for (name, rounding), each in seconds.items():
        if name:
            plain = seconds[name, "plain"]
            table.add_row(name, rounding, f"{each / count * 1e9:.2f}", f"{each / plain:.2f}")
            if rounding == "plain":
                table.add_row(name, "its state copied once", f"{copied / count * 1e9:.2f}", f"{1 + copied / plain:.2f}")
    Console(width=120).print(table)
    ratios = {
        f"{name}, {rounding}": each / seconds[name, "plain"] for (name, rounding), each in seconds.items() if name
    }
    record(arguments.record, {name: ratio for name, ratio in ratios.items() if not name.endswith(", plain")})


if __name__ == "__main__":
    main()
