"""What curvature costs, in gradients of the same loss, and how far off it is, beside its peers.

    python -m tests.benchmarks.curvature [--steps N] [--compile] [--vocabulary N]

A transformer of 875,264 parameters, trained first; one thread, float32, processor time. A gradient is one
`torch.autograd.grad`. The truth is Lanczos with a residual of 1e-5, and Hutch++ with 200 products. Peers that are not
installed (PyHessian, hessian-eigenthings, curvlinops) are left out. Peak memory is that of the process above its start.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import io
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from fpsim import curvature

VOCABULARY, LENGTH, BATCH, WIDTH, LAYERS, HEADS = 256, 128, 8, 128, 4, 4


class Block(nn.Module):
    """Attention written out, so that every peer can differentiate it twice, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """From tokens (batch, length) to logits (batch * length, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def chain(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens of a Markov chain, whose transitions are the same for every call."""
    odds = torch.softmax(4 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7)), -1)
    state = torch.randint(0, VOCABULARY, (batch,), generator=generator)
    states = [state]
    for _ in range(LENGTH):
        state = torch.multinomial(odds[state], 1, generator=generator).squeeze(1)
        states.append(state)
    tokens = torch.stack(states, dim=1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def trained(steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, generator = Transformer(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        tokens, targets = chain(BATCH, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), chain(BATCH, generator)


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds, peak MiB above the start, and the result."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already must not hide what is needed
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    seconds = time.process_time() - start
    return seconds, _memory("VmHWM") - before, result


def _memory(field: str) -> float:
    """MiB, from the kernel's account of this process; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def report(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


# -- one product ---------------------------------------------------------------------------------------------------


def compare_products(loss: Callable[..., Tensor], params: dict[str, Tensor], compile: bool, repeats: int) -> float:
    """Report one Hessian-vector product of each kind; returns the seconds of one gradient."""
    leaves = list(params.values())
    kinds: dict[str, dict[str, Any]] = {
        "reverse, kept": {},
        "reverse, rebuilt": {"keep": False},
        "double_backward, kept": {"mode": "double_backward"},
        "forward": {"mode": "forward"},
        "finite_difference": {"mode": "finite_difference"},
    }
    if compile:
        kinds["forward, compiled"] = {"mode": "forward", "compile": True}
    operators = {name: curvature.hessian(loss, params, **options) for name, options in kinds.items()}
    vector = torch.randn(sum(p.numel() for p in leaves), generator=torch.Generator().manual_seed(2))
    works: dict[str, Callable[[], Any]] = {"gradient": lambda: torch.autograd.grad(loss(params), leaves)}
    works |= {name: (lambda a=operator: a @ vector) for name, operator in operators.items()}
    first = {name: measure(work) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    exact = first["double_backward, kept"][2]
    rows = []
    for name, seconds in medians.items():
        error = "" if name == "gradient" else f"{float((first[name][2] - exact).norm() / exact.norm()):.1e}"
        ratio, start = seconds / medians["gradient"], first[name][0] / medians["gradient"]
        rows.append([name, f"{1e3 * seconds:.0f}", f"{ratio:.2f}", f"{start:.1f}", f"{first[name][1]:.0f}", error])
    report(
        "One Hessian-vector product", ["kind", "ms", "gradients", "the first", "peak MiB, first", "rel. error"], rows
    )
    return medians["gradient"]


# -- quantities ----------------------------------------------------------------------------------------------------

Case = Callable[[], tuple[float, int | None]]


def eigenvalue_cases(loss: Callable[..., Tensor], model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Case]:
    """Name -> (top eigenvalue, products); each with all that it takes, from the model on."""
    params = dict(model.named_parameters())

    def ours(**options: Any) -> Case:
        def work() -> tuple[float, int]:
            result = curvature.eigenpairs(curvature.hessian(loss, params), **options)
            return float(result.eigenvalues[0]), result.products

        return work

    seeds = {f"fpsim lanczos, seed {s}": ours(generator=torch.Generator().manual_seed(s)) for s in range(3)}
    cases: dict[str, Case] = {
        **seeds,
        "fpsim lanczos, tol 3e-3": ours(tol=3e-3),
        "fpsim lobpcg": ours(method="lobpcg"),
    }
    if importlib.util.find_spec("pyhessian"):
        from pyhessian import hessian as pyhessian

        def power(**options: Any) -> Case:
            def work() -> tuple[float, None]:
                torch.manual_seed(0)
                analysis = pyhessian(model, functional.cross_entropy, data=batch, cuda=False)
                values, _ = analysis.eigenvalues(**options)
                model.zero_grad(set_to_none=True)
                return float(values[-1]), None

            return work

        cases["PyHessian, defaults"] = power()
        cases["PyHessian, tol 1e-5"] = power(tol=1e-5, maxIter=1000)
    if importlib.util.find_spec("hessian_eigenthings"):
        import hessian_eigenthings as eigenthings

        def lanczos(**options: Any) -> Case:
            def work() -> tuple[float, int]:
                operator = eigenthings.HessianOperator(model, [batch], _cross_entropy)
                result = eigenthings.lanczos(operator, k=1, seed=0, **options)
                return float(result.eigenvalues[0]), int(result.iterations)

            return work

        cases["hessian-eigenthings lanczos, defaults"] = lanczos()
        cases["hessian-eigenthings lanczos, 20 steps"] = lanczos(max_iter=20)
    if importlib.util.find_spec("curvlinops"):
        from curvlinops import HessianLinearOperator
        from scipy.sparse.linalg import eigsh

        def arpack() -> tuple[float, None]:
            operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(params.values()), [batch])
            values = eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-3, return_eigenvectors=False)
            return float(values[0]), None

        cases["curvlinops, scipy eigsh, tol 1e-3"] = arpack
    return cases


def trace_cases(loss: Callable[..., Tensor], model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Case]:
    params = dict(model.named_parameters())

    def ours(**options: Any) -> Case:
        def work() -> tuple[float, int]:
            result = curvature.trace(curvature.hessian(loss, params), **options)
            return result.estimate, result.products

        return work

    def spectrum() -> tuple[float, int]:
        result = curvature.density(curvature.hessian(loss, params), steps=20, probes=4)
        return result.moment(1) * result.size, result.products

    cases: dict[str, Case] = {
        "fpsim hutch++, defaults": ours(),
        "fpsim hutch++, 60 products": ours(tol=0, max_products=60),
        "fpsim hutchinson, 60 products": ours(method="hutchinson", tol=0, max_products=60),
        "fpsim density, 4 x 20 steps": spectrum,
    }
    if importlib.util.find_spec("pyhessian"):
        from pyhessian import hessian as pyhessian

        def hutchinson() -> tuple[float, int]:
            torch.manual_seed(0)
            samples = pyhessian(model, functional.cross_entropy, data=batch, cuda=False).trace()
            model.zero_grad(set_to_none=True)
            return statistics.mean(float(s) for s in samples), len(samples)

        cases["PyHessian, defaults"] = hutchinson
    if importlib.util.find_spec("hessian_eigenthings"):
        import hessian_eigenthings as eigenthings

        def hutch() -> tuple[float, int]:
            operator = eigenthings.HessianOperator(model, [batch], _cross_entropy)
            return float(eigenthings.trace(operator, num_matvecs=60, seed=0).estimate), 60

        def density() -> tuple[float, int]:
            operator = eigenthings.HessianOperator(model, [batch], _cross_entropy)
            result = eigenthings.spectral_density(operator, num_runs=4, lanczos_steps=20, seed=0)
            mass = torch.trapezoid(result.grid * result.density, result.grid)
            return float(mass) * operator.size, 80

        cases["hessian-eigenthings hutch++, 60 products"] = hutch
        cases["hessian-eigenthings density, 4 x 20 steps"] = density
    if importlib.util.find_spec("curvlinops"):
        from curvlinops import HessianLinearOperator, hutchpp_trace

        def hutchpp() -> tuple[float, int]:
            torch.manual_seed(0)
            operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(params.values()), [batch])
            return float(hutchpp_trace(operator, num_matvecs=60)), 60

        cases["curvlinops hutch++, 60 products"] = hutchpp
    return cases


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def compare(title: str, cases: dict[str, Case], truth: float, gradient: float) -> None:
    rows = []
    for name, case in cases.items():
        try:
            seconds, memory, (value, count) = measure(case)
        except Exception as error:  # a peer's failure is a result, too
            rows.append([name, "", "", "", f"{type(error).__name__}: {error}"[:40], ""])
            continue
        products = "" if count is None else str(count)
        error = f"{value / truth - 1:+.1e}"
        rows.append([name, products, f"{seconds / gradient:.0f}", f"{value:.5g}", error, f"{memory:.0f}"])
    report(title, ["way", "products", "gradients", "value", "rel. error", "peak MiB"], rows)


# -- large vocabularies --------------------------------------------------------------------------------------------


def compare_heads(vocabulary: int, tokens: int = 256, width: int = 64) -> None:
    """Report the peak memory of one product with a language model's head, in sizes of its logits."""
    generator = torch.Generator().manual_seed(0)
    params = {"head": torch.randn(vocabulary, width, generator=generator) / width**0.5}
    hidden = torch.randn(tokens, width, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    vector = torch.randn(vocabulary * width, generator=generator)

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(hidden) @ p["head"].T

    operators = {
        "Hessian, torch's cross_entropy": lambda: curvature.hessian(
            lambda p: functional.cross_entropy(outputs(p), targets), params
        ),
        "Hessian, fpsim's cross_entropy": lambda: curvature.hessian(
            lambda p: curvature.cross_entropy(outputs(p), targets), params
        ),
        "Gauss-Newton, torch's cross_entropy": lambda: curvature.gauss_newton(
            outputs, lambda z: functional.cross_entropy(z, targets), params
        ),
        "Gauss-Newton, CrossEntropy": lambda: curvature.gauss_newton(outputs, curvature.CrossEntropy(targets), params),
    }
    size = tokens * vocabulary * 4 / 2**20
    rows = []
    for name, make in operators.items():
        _, memory, _ = measure(lambda make=make: make() @ vector)
        rows.append([name, f"{memory:.0f}", f"{memory / size:.1f}"])
    title = f"One product with a head of {vocabulary} words, {tokens} tokens: logits of {size:.0f} MiB"
    report(title, ["operator", "peak MiB", "logits"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also the compiled product (half a minute)")
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--only", choices=("products", "eigenvalue", "trace", "heads"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = {options.only} if options.only else {"products", "eigenvalue", "trace", "heads"}
    if chosen != {"heads"}:
        model, batch = trained(options.steps)
        params = dict(model.named_parameters())
        loss = curvature.functional_loss(model, functional.cross_entropy, batch=batch)
        count = sum(p.numel() for p in params.values())
        print(f"{count} parameters, loss {float(loss(params).detach()):.4f}, torch {torch.__version__}")
        gradient = compare_products(loss, params, options.compile and "products" in chosen, options.repeats)
    if "eigenvalue" in chosen:
        top = curvature.eigenpairs(curvature.hessian(loss, params), 2, tol=1e-5)
        first, second = top.eigenvalues.tolist()
        title = f"Top eigenvalue: {first:.6g}, the next {1 - second / first:.1%} below"
        compare(title, eigenvalue_cases(loss, model, batch), first, gradient)
    if "trace" in chosen:
        known = curvature.trace(
            curvature.hessian(loss, params), tol=0, max_products=200, generator=torch.Generator().manual_seed(99)
        )
        title = f"Trace: {known.estimate:.5g}, standard error {known.stderr / known.estimate:.1%}"
        compare(title, trace_cases(loss, model, batch), known.estimate, gradient)
    if "heads" in chosen:
        compare_heads(options.vocabulary)


if __name__ == "__main__":
    main()
