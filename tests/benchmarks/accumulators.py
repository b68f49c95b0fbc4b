"""The cost of simulated accumulators, and their effect on the training of a tiny Llama.

    python -m tests.benchmarks.accumulators [--size M K N] [--threads N] [--record FILE]
    python -m tests.benchmarks.accumulators --train [--steps N]

The first command prints the ratio of each product to ``torch.mm`` in float32: the least of twelve processor times, on
which other load has little influence. The second trains the same model with the sums of Hopper's FP8 tensor cores,
without and with promotion to float32, and with the sums of torch, and prints the mean loss of the last 50 steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fpsim
from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.accumulators.ops import accumulate_op
from fpsim.rounding.ops import SOURCE
from tests.benchmarks.results import add_record_option, record

#: The format of the operands, and the accumulator.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("e4m3fn", {"accumulator": "e8m13", "chunk": 32}),
    ("e4m3fn", {"accumulator": "e8m13", "chunk": 128}),
    ("bf16", {"accumulator": "fp32", "chunk": 32}),
    ("e4m3fn", {"accumulator": "hopper_fp8"}),
    ("bf16", {"accumulator": "hopper"}),
    ("fp16", {"accumulator": "ampere"}),
    ("fp16", {"accumulator": "volta"}),
    ("bf16", {"accumulator": "mi300"}),
    ("bf16", {"accumulator": "amx_bf16"}),
    ("fp16", {"accumulator": "mi250"}),
    ("e4m3fn", {"accumulator": "e8m13"}),
    ("e4m3fn", {"accumulator": "fp16"}),
    ("fp16", {"accumulator": "fp16"}),
    ("e4m3fn", {"accumulator": "e5m10/stochastic"}),
]


def least_time(call: Callable[[], Any], repeats: int) -> float:
    """The least processor time of the calling thread in seconds, after one call that is not timed."""
    call()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def ratios(m: int, k: int, n: int) -> dict[str, float]:
    """The ratio of each case to `torch.mm` of operands of shape (m, k) and (k, n)."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=draw), torch.randn(k, n, generator=draw)
    base = least_time(lambda: torch.mm(a, b), 30)
    found = {}
    for fmt, arguments in CASES:
        x, y = fpsim.round(a, fmt), fpsim.round(b, fmt)
        text, name = str(parse_accumulator(**arguments)), fpsim.parse_format(fmt).name
        key = torch.zeros(2, dtype=torch.int32)
        product = lambda x=x, y=y, text=text, name=name, key=key: accumulate_op(x, y, key, text, name, name, SOURCE)  # noqa: E731
        found[f"{fmt} {text}"] = least_time(product, 12) / base
    return found


def train(steps: int, **policy: Any) -> float:
    """The mean loss of the last 50 steps of a tiny Llama on random walks, in FP8 with power-of-two scales."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes))
    options = {"policy": "fp8_hybrid", "scale": "power_of_two", **policy}
    compiled = torch.compile(model, backend="fpsim", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        walk = torch.randint(-3, 4, (8, 64), generator=draw).cumsum(1) % 128
        loss = compiled(input_ids=walk, labels=walk).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(256, 512, 256), metavar=("M", "K", "N"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    add_record_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.train:
        for name, policy in {
            "torch's sums": {},
            "hopper_fp8, promoted every 128": {"accumulator": "hopper_fp8", "promote": 128},
            "hopper_fp8": {"accumulator": "hopper_fp8"},
        }.items():
            start = time.perf_counter()
            loss = train(arguments.steps, **policy)
            print(f"{name:32} loss {loss:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
        return
    found = ratios(*arguments.size)
    table = Table("operands and accumulator", "ratio to torch.mm")
    for name, ratio in found.items():
        table.add_row(name, f"{ratio:.1f}")
    Console().print(table)
    record(arguments.record, found)


if __name__ == "__main__":
    main()
