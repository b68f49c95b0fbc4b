"""The cost of a profiled training step, relative to the steps that it replaces.

    python -m tests.benchmarks.profiling [--width N] [--layers N] [--batch N] [--steps N] [--threads N]

A GPT-2 with 128 tokens per sequence, forward and backward under the OCP FP8 hybrid. Times are medians over interleaved
steps in one process. The goal is 3 times the interpreted step, which a profiled step replaces. The second table
compares one call of `fpsim.profile`, with tracing, with the first steps of the backends (without torch's caches).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from transformers import GPT2Config, GPT2LMHeadModel

import fpsim
from tests.benchmarks.timing import interleaved_medians, seconds

LENGTH, VOCABULARY = 128, 1024
INTERPRETED = "fpsim_eager, interpreted"

Step = Callable[..., Any]


def gpt2(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": max(width // 64, 1), "n_positions": LENGTH}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, **no_dropout, use_cache=False))  # type: ignore[arg-type]
    model.loss_type = "ForCausalLM"  # unset, transformers logs a warning in forward, which breaks the graph
    return model


def train(step: Step, model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    step(x, labels=x).loss.backward()


def steps_table(model: nn.Module, x: Tensor, steps: int, console: Console) -> Table:
    """Steps after the first."""
    cases: dict[str, Step] = {
        "plain eager": model,
        "fpsim, compiled": torch.compile(model, backend="fpsim", dynamic=False),
        INTERPRETED: torch.compile(model, backend="fpsim_eager", dynamic=False),
        "profiled": fpsim.Profiler(model),
        "profiled, exact products": fpsim.Profiler(model, exact_products=True),
    }
    for step in cases.values():
        train(step, model, x)
    calls = {name: partial(train, step, model, x) for name, step in cases.items()}
    return ratios("a step", interleaved_medians(calls, steps, console=console))


def first_table(model: nn.Module, x: Tensor) -> Table:
    """The first step of each, with tracing and compiling."""
    with fresh_cache():
        cases = {
            "fpsim, compiled": lambda: train(torch.compile(deepcopy(model), backend="fpsim", dynamic=False), model, x),
            INTERPRETED: lambda: train(torch.compile(deepcopy(model), backend="fpsim_eager", dynamic=False), model, x),
            "fpsim.profile": lambda: fpsim.profile(deepcopy(model), x, labels=x),
        }
        times = {}
        for name, case in cases.items():
            torch._dynamo.reset()
            times[name] = seconds(case)
    return ratios("the first step", times)


def ratios(title: str, times: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "ms", "of interpreted", "of compiled"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in times.items():
        of = [value / times[other] for other in (INTERPRETED, "fpsim, compiled")]
        table.add_row(name, f"{1e3 * value:.0f}", *(f"{ratio:.2f}" for ratio in of))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    model = gpt2(options.width, options.layers)
    x = torch.randint(VOCABULARY, (options.batch, LENGTH), generator=torch.Generator().manual_seed(0))
    console.print(steps_table(model, x, options.steps, console))
    console.print(first_table(model, x))


if __name__ == "__main__":
    main()
