"""The cost of sharpness: time and peak memory for logits of a large vocabulary, and the accuracy of each search.

    python -m tests.benchmarks.sharpness [--vocabulary N] [--tokens N] [--searched N]

One thread. Memory is the peak of resident pages minus the logits, in units of the logits' size; it needs Linux. We know
no library with any of these measures, so they are compared with the closed form written plainly in torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from fpsim.curvature import functional_loss
from fpsim.sharpness import adaptive, critical, gradient_norm, keskar, logit, logit_metrics, sam

Function = Callable[[Tensor, Tensor], Tensor]


def plain(z: Tensor, target: Tensor, epsilon: float = 5e-4) -> Tensor:
    """The closed form written plainly: float64, all tokens at once."""
    z = z.double()
    step = epsilon * (z.abs() + 1)
    step = step.scatter(-1, target.unsqueeze(-1), -step.gather(-1, target.unsqueeze(-1)))
    loss = functional.cross_entropy(z, target, reduction="none")
    return 100 * (functional.cross_entropy(z + step, target, reduction="none") - loss) / (1 + loss)


def cost(function: Function, z: Tensor, target: Tensor) -> tuple[float, float]:
    """Milliseconds per token, and the increase of peak memory, in units of the logits."""
    function(z[:2], target[:2])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    function(z, target)
    seconds = time.perf_counter() - start
    return 1e3 * seconds / len(z), (resident("VmHWM") - before) / z.nbytes


def resident(key: str) -> int:
    """Bytes of memory, from a field of /proc/self/status such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def logit_table(vocabulary: int, tokens: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    hidden = torch.randn(tokens, 64, generator=generator)
    head = nn.Linear(64, vocabulary).eval()

    def autograd(z: Tensor, target: Tensor) -> Tensor:
        loss = functional.cross_entropy(head(hidden[: len(z)]), target)
        return torch.stack([part.norm() for part in torch.autograd.grad(loss, list(head.parameters()))]).norm()

    functions: dict[str, Function] = {
        "logit, exact": logit,
        "logit_metrics, exact": logit_metrics,
        "closed form, plain torch float64": plain,
        "gradient_norm of a head of width 64": lambda z, t: torch.tensor(gradient_norm(head, [(hidden[: len(z)], t)])),
        "the same by torch's cross_entropy": autograd,
    }
    table = Table(title=f"{tokens} tokens, vocabulary {vocabulary}, float32, {z.nbytes / 2**20:.0f} MiB of logits")
    for column in ("measure", "ms per token", "(peak - logits) / logits"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, function in functions.items():
        milliseconds, memory = cost(function, z, target)
        table.add_row(name, f"{milliseconds:.3f}", f"{memory:.2f}")
    difference = ((plain(z[:64], target[:64]) - logit(z[:64], target[:64])) / logit(z[:64], target[:64])).abs().max()
    table.caption = f"largest relative difference between the two closed forms: {difference:.1e}"
    return table


def search_table(vocabulary: int, tokens: int) -> Table:
    """The part of the maximum that L-BFGS-B finds."""
    generator = torch.Generator().manual_seed(0)
    table = Table(title=f"L-BFGS-B, 10 iterations, over the closed form; {tokens} tokens, vocabulary {vocabulary}")
    for column in ("mean of z", "epsilon", "least", "mean", "largest", "ms per token"):
        table.add_column(column, justify="right")
    for mean in (0.0, -30.0):
        z = mean + 3 * torch.randn(tokens, vocabulary, generator=generator)
        target = torch.randint(0, vocabulary, (tokens,), generator=generator)
        for epsilon in (5e-4, 1e-3, 1e-2):
            start = time.perf_counter()
            found = logit(z, target, epsilon=epsilon, method="lbfgsb")
            milliseconds = 1e3 * (time.perf_counter() - start) / tokens
            share = found / logit(z, target, epsilon=epsilon)
            numbers = (share.min(), share.mean(), share.max())
            table.add_row(f"{mean:g}", f"{epsilon:g}", *[f"{x:.3f}" for x in numbers], f"{milliseconds:.1f}")
    return table


def parameter_table() -> Table:
    """Parameter-space measures of a trained two-layer network of 30,000 parameters."""
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    y = (x @ torch.randn(32, 10)).argmax(-1)
    model = nn.Sequential(nn.Linear(32, 160), nn.LayerNorm(160), nn.GELU(), nn.Linear(160, 160), nn.GELU())
    model.append(nn.Linear(160, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    params = dict(model.named_parameters())
    loss = functional_loss(model, functional.cross_entropy, batch=(x, y))
    table = Table(title=f"{sum(p.numel() for p in params.values())} parameters, loss {loss(params).item():.3f}")
    for column in ("measure", "sharpness", "evaluations", "ms", "converged"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    seeded = torch.Generator().manual_seed
    cases = {
        f"keskar, {method}, epsilon {epsilon:g}, {iterations} iterations": lambda m=method, e=epsilon, i=iterations: (
            keskar(loss, params, method=m, epsilon=e, iterations=i)
        )
        for epsilon in (5e-4, 5e-3)
        for method, iterations in (("lbfgsb", 10), ("lbfgsb", 30), ("pga", 10), ("pga", 30))
    }
    cases |= {
        f"keskar, {method}, epsilon 0.0005, 100 random directions": lambda m=method: keskar(
            loss, params, method=m, subspace=100, generator=seeded(0)
        )
        for method in ("lbfgsb", "pga")
    }
    cases |= {
        "sam, rho 0.05": lambda: sam(loss, params),
        "adaptive, rho 0.5": lambda: adaptive(loss, params),
        "critical, along the gradient": lambda: critical(loss, params),
    }
    for name, function in cases.items():
        start = time.perf_counter()
        result = function()
        milliseconds = 1e3 * (time.perf_counter() - start)
        cells = f"{result.sharpness:.5g}", str(result.evaluations), f"{milliseconds:.0f}", str(result.converged)
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--searched", type=int, default=4, help="tokens on which L-BFGS-B is run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(logit_table(options.vocabulary, options.tokens))
    console.print(search_table(options.vocabulary, options.searched))
    console.print(parameter_table())


if __name__ == "__main__":
    main()
