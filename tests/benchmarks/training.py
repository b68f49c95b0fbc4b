"""What rounding costs in a training step: the demo's Llama, every matrix operand rounded, beside plain Inductor.

    python -m tests.benchmarks.training [--steps N] [--format F]

One thread. The attention is the same on both sides of each ratio: kept fused in both, or opened in both. Step
times are medians over interleaved steps in one process; peak memory is the largest sum of live allocations
during one step, parameters and optimizer left out on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fpsim.paper.models import LanguageModel, ModelConfig, llama
from fpsim.paper.training import OpenAttention

BATCH = 16


def plain(model: nn.Module, opened: bool) -> Callable[..., Tensor]:
    """Plain Inductor; attention is opened inside the graph, where torch's compile cache sees it."""
    return torch.compile(OpenAttention(model) if opened else model, dynamic=False)


def peak_bytes(step: Callable[[], None]) -> int:
    """The largest sum of bytes allocated and not yet freed while ``step`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--format", help="of all operands; default: the FP8 hybrid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"format": arguments.format} if arguments.format else {}
    config = ModelConfig()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocabulary, (BATCH, config.context + 1), generator=generator)

    def case(compile: Callable[[nn.Module], Callable[..., Tensor]]) -> Callable[[], None]:
        model = LanguageModel(llama(config, seed=0))
        compiled = compile(model)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            compiled(tokens[:, :-1], tokens[:, 1:]).backward()

        step()
        step()
        return step

    cases = {
        "plain Inductor, attention fused": case(lambda m: plain(m, opened=False)),
        "fpsim, attention kept fused": case(
            lambda m: torch.compile(m, backend="fpsim", options={**options, "attention": "keep"})
        ),
        "plain Inductor, attention opened": case(lambda m: plain(m, opened=True)),
        "fpsim, everything rounded": case(lambda m: torch.compile(m, backend="fpsim", options=options)),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.steps):
        for name, step in cases.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: peak_bytes(step) for name, step in cases.items()}

    table = Table(title=f"forward and backward of the demo's Llama, batch {BATCH}, 1 thread, torch {torch.__version__}")
    for column in ("case", "ms per step", "time ratio", "peak MiB", "memory ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    baseline = ""
    for name in cases:
        baseline = name if name.startswith("plain") else baseline
        table.add_row(
            name,
            f"{seconds[name] * 1e3:.1f}",
            f"{seconds[name] / seconds[baseline]:.3f}",
            f"{peaks[name] / 2**20:.1f}",
            f"{peaks[name] / peaks[baseline]:.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
