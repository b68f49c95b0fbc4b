"""The cost of curvature, in gradients of the same loss, and its errors, compared with other libraries.

    python -m tests.benchmarks.curvature [--small] [--only PART ...] [--compile] [--seeds N]

One thread, float32, processor time. A gradient is one `torch.autograd.grad`, timed again next to each measurement.
Libraries that are not installed (``pip install pyhessian hessian-eigenthings curvlinops-for-pytorch``) are left out.
Peak memory is the increase over the start of the measurement. Every part prints each row when it is measured.

The model is a GPT of 875,264 parameters after 300 steps on a Markov chain, like that of earlier measurements. Their
chain, initialisation and optimiser are not recorded; here they are chosen so that the loss and the ends of the spectrum
are close to the earlier ones (loss 1.18, earlier 1.17; largest eigenvalues 9.92 and 9.33, earlier 11.37 and 10.91). Its
exact spectrum is too expensive, so the references are longer runs: Lanczos with a residual of 1e-5, Hutch++ with 300
products, 8 probes of 60 steps. The model of ``--small`` has 4,944 parameters; all eigenvalues of its Hessian are
computed in float64, so its errors are exact.

Measured on 22 November 2026 on 2 shared cores of an AMD EPYC, torch 2.13.0; PyHessian 0.1, hessian-eigenthings 1.0.0a5,
curvlinops 3.0.1. Errors are relative root mean squares over seeds.

``--only products --compile --repeats 21``: gradients per product, as median and quartiles of the ratio to the gradient
of the same round: reverse, kept 2.15 (2.14 to 2.17); double_backward, kept 2.14; reverse, rebuilt 3.22; forward 3.99;
finite_difference 2.13; forward, compiled 2.50 (2.45 to 2.57), the first one 139. Matrix products
take 72 % of the compiled product (by torch's profiler), and there are 8 of them for 3 in a gradient. Only a graph that
keeps the values that do not depend on the vector saves some of them, as the kept graphs do.

``--only eigenvalue`` (3 seeds), ``--only trace`` and ``--only density`` (1 seed); in brackets ``--small`` (10 seeds):

    top eigenvalue                            gradients    error                peak MiB
    fpsim lanczos                             31 (25)      1.7e-4 (2.2e-5)      301
    fpsim lanczos, tol 3e-3                   36 (27)      1.8e-6 (6.9e-6)      292
    fpsim lobpcg                              31 (27)      1.8e-4 (5.4e-5)      266
    PyHessian, defaults                       52 (46)      6.0e-3 (2.5e-2)      281
    PyHessian, tol 1e-5                       112 (105)    7.9e-5 (6.2e-5)      280
    hessian-eigenthings lanczos, defaults     7 (7)        6.8e-1 (3.0e-1)      277
    hessian-eigenthings lanczos, 20 steps     67 (59)      5.9e-5 (1.0e-7)      315
    curvlinops, scipy eigsh, tol 1e-3         98 (256)     3.8e-7 (3.2e-6)      444

    trace
    fpsim hutch++, 60 products                144 (120)    4.2e-2 (1.2e-2)      359
    fpsim hutchinson, 60 products             148 (124)    4.2e-2 (3.2e-2)      267
    fpsim hutch++, defaults (5 %)             119 (102)    1.4e-2 (1.3e-2)      376
    PyHessian, defaults: 9 (21) products      23 (45)      6.2e-2 (4.4e-2)      269
    hessian-eigenthings hutch++, 60 products  209 (171)    4.2e-2 (1.2e-2)      357
    curvlinops hutch++, 60 products           223 (108)    5.2e-2 (1.2e-2)      2974

    spectral density: area between distribution functions over the spectrum's width
    fpsim, 4 x 20 steps                       189 (163)    1.4e-3 (1.3e-3)      388
    fpsim, 4 x 20 steps, no basis kept        184 (160)    1.4e-3 (1.3e-3)      277
    PyHessian                                 torch.eig, which it calls, is gone
    hessian-eigenthings, 4 x 20 steps         253 (226)    1.4e-3 (1.4e-3)      400
    curvlinops, 4 x 20 steps, bounds known    316 (878)    1.3e-3 (1.2e-3)      294
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim import curvature


@dataclass(frozen=True)
class Size:
    """The sizes of the transformer and its data; a head has width 32 in `LARGE` and 6 in `SMALL`."""

    vocabulary: int = 256
    length: int = 128
    batch: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4


#: The temperature of the chain's probabilities; it determines the loss after training.
TEMPERATURE = 1.5

LARGE, SMALL = Size(), Size(vocabulary=32, length=32, width=12, layers=2, heads=2)


class Block(nn.Module):
    """Explicit attention, which every library can differentiate twice, and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A function from tokens (batch, length) to logits (batch * length, vocabulary); initialised as GPT-2."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*[Block(size.width, size.heads) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def transitions(words: int) -> Tensor:
    """The transition matrix of a Markov chain, shape (words, words): each word has four successors of unequal
    probability."""
    generator = torch.Generator().manual_seed(7)
    odds = torch.zeros(words, words)
    for row in odds:
        successors = torch.randperm(words, generator=generator)[:4]
        row[successors] = torch.softmax(TEMPERATURE * torch.randn(4, generator=generator), -1)
    return odds


def chain(size: Size, odds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of tokens and next tokens."""
    states = [torch.randint(0, size.vocabulary, (size.batch,), generator=generator)]
    for _ in range(size.length):
        states.append(torch.multinomial(odds[states[-1]], 1, generator=generator).squeeze(1))
    tokens = torch.stack(states, dim=1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def trained(size: Size, steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, odds, generator = Transformer(size), transitions(size.vocabulary), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        tokens, targets = chain(size, odds, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), chain(size, odds, generator)


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds, peak MiB above the start, and the result."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is already free must not hide what the work needs
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


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


class Printed:
    """A table that prints each row when it is measured."""

    def __init__(self, title: str, *columns: str) -> None:
        print(f"\n{title}", flush=True)
        self.row(*columns)

    def row(self, first: str, *others: str) -> None:
        print(f"{first:<42}" + "".join(f"{cell:>13}" for cell in others), flush=True)


# -- one product ---------------------------------------------------------------------------------------------------


def compare_products(loss: Callable[..., Tensor], params: dict[str, Tensor], compile: bool, repeats: int) -> None:
    """Report one Hessian-vector product of each kind, all kinds in turn, ``repeats`` times."""
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
            times[name].append(median_seconds(work, 1))
    exact = first["double_backward, kept"][2]
    title = f"One Hessian-vector product; medians of {repeats}; quartiles of the ratio to the round's gradient"
    table = Printed(title, "kind", "ms", "gradients", "quartiles", "the first", "peak MiB", "rel. error")
    for name, values in times.items():
        ratios = [value / gradient for value, gradient in zip(values, times["gradient"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        error = "" if name == "gradient" else f"{float((first[name][2] - exact).norm() / exact.norm()):.1e}"
        start = first[name][0] / statistics.median(times["gradient"])
        cells = f"{1e3 * statistics.median(values):.0f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{start:.1f}"
        table.row(name, *cells, f"{first[name][1]:.0f}", error)


# -- quantities ----------------------------------------------------------------------------------------------------

#: From a seed to a result (a number, or nodes and weights of a density) and its number of products, None if unknown.
Case = Callable[[int], tuple[Any, int | None]]
Batch = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def has(peer: str) -> bool:
    return importlib.util.find_spec(peer) is not None


def with_pyhessian(model: nn.Module, batch: Batch, work: Callable[[Any], tuple[Any, int | None]]) -> Case:
    from pyhessian import hessian

    def case(seed: int) -> tuple[Any, int | None]:
        torch.manual_seed(seed)
        try:
            return work(hessian(model, functional.cross_entropy, data=batch, cuda=False))
        finally:
            model.zero_grad(set_to_none=True)  # otherwise gradients add up, and the next Hessian is twice as large

    return case


def eigenthings_operator(model: nn.Module, batch: Batch) -> Any:
    from hessian_eigenthings import HessianOperator

    return HessianOperator(model, [batch], lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]))


def curvlinops_operator(model: nn.Module, batch: Batch, seed: int) -> Any:
    from curvlinops import HessianLinearOperator

    torch.manual_seed(seed)
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [batch])


def eigenvalue_cases(loss: Loss, model: nn.Module, batch: Batch) -> dict[str, Case]:
    """Name -> a computation of the top eigenvalue, which starts from the model."""
    params = dict(model.named_parameters())

    def ours(**options: Any) -> Case:
        def work(seed: int) -> tuple[float, int]:
            result = curvature.eigenpairs(curvature.hessian(loss, params), generator=seeded(seed), **options)
            return float(result.eigenvalues[0]), result.products

        return work

    cases: dict[str, Case] = {
        "fpsim lanczos": ours(),
        "fpsim lanczos, tol 3e-3": ours(tol=3e-3),
        "fpsim lobpcg": ours(method="lobpcg"),
    }
    if has("pyhessian"):

        def power(**options: Any) -> Case:
            return with_pyhessian(model, batch, lambda found: (found.eigenvalues(**options)[0][-1], None))

        cases["PyHessian, defaults"] = power()
        cases["PyHessian, tol 1e-5"] = power(tol=1e-5, maxIter=1000)
    if has("hessian_eigenthings"):
        import hessian_eigenthings as eigenthings

        def lanczos(**options: Any) -> Case:
            def work(seed: int) -> tuple[float, int]:
                result = eigenthings.lanczos(eigenthings_operator(model, batch), k=1, seed=seed, **options)
                return float(result.eigenvalues[0]), int(result.iterations)

            return work

        cases["hessian-eigenthings lanczos, defaults"] = lanczos()
        cases["hessian-eigenthings lanczos, 20 steps"] = lanczos(max_iter=20)
    if has("curvlinops"):
        from scipy.sparse.linalg import eigsh

        def arpack(seed: int) -> tuple[float, None]:
            operator = curvlinops_operator(model, batch, seed).to_scipy()
            start = torch.randn(operator.shape[0], generator=seeded(seed)).numpy()
            return float(eigsh(operator, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)[0]), None

        cases["curvlinops, scipy eigsh, tol 1e-3"] = arpack
    return cases


def trace_cases(loss: Loss, model: nn.Module, batch: Batch) -> dict[str, Case]:
    """Name -> a computation of the trace."""
    params = dict(model.named_parameters())

    def ours(**options: Any) -> Case:
        def work(seed: int) -> tuple[float, int]:
            result = curvature.trace(curvature.hessian(loss, params), generator=seeded(seed), **options)
            return result.estimate, result.products

        return work

    cases: dict[str, Case] = {
        "fpsim hutch++, 60 products": ours(tol=0, max_products=60),
        "fpsim hutchinson, 60 products": ours(method="hutchinson", tol=0, max_products=60),
        "fpsim hutch++, defaults (5 %)": ours(),
    }
    if has("pyhessian"):

        def hutchinson(analysis: Any) -> tuple[float, int]:
            samples = analysis.trace()
            return statistics.mean(float(s) for s in samples), len(samples)

        cases["PyHessian, defaults"] = with_pyhessian(model, batch, hutchinson)
    if has("hessian_eigenthings"):
        import hessian_eigenthings as eigenthings

        def hutch(seed: int) -> tuple[float, int]:
            operator = eigenthings_operator(model, batch)
            return float(eigenthings.trace(operator, num_matvecs=60, seed=seed).estimate), 60

        cases["hessian-eigenthings hutch++, 60 products"] = hutch
    if has("curvlinops"):
        from curvlinops import hutchpp_trace

        def hutchpp(seed: int) -> tuple[float, int]:
            return float(hutchpp_trace(curvlinops_operator(model, batch, seed), num_matvecs=60)), 60

        cases["curvlinops hutch++, 60 products"] = hutchpp
    return cases


def density_cases(loss: Loss, model: nn.Module, batch: Batch) -> dict[str, Case]:
    """Name -> a computation of nodes and weights of the density, without smoothing."""
    params = dict(model.named_parameters())

    def ours(**options: Any) -> Case:
        def work(seed: int) -> tuple[tuple[Tensor, Tensor], int]:
            result = curvature.density(curvature.hessian(loss, params), generator=seeded(seed), **options)
            return (result.nodes, result.weights), result.products

        return work

    cases: dict[str, Case] = {
        "fpsim, 4 x 20 steps": ours(steps=20, probes=4),
        "fpsim, 4 x 20 steps, no basis kept": ours(steps=20, probes=4, reorthogonalise=False),
    }
    if has("pyhessian"):

        def quadrature(analysis: Any) -> tuple[tuple[Tensor, Tensor], int]:
            nodes, weights = analysis.density(iter=20, n_v=4)
            return (torch.tensor(nodes), torch.tensor(weights)), 80

        cases["PyHessian, 4 x 20 steps"] = with_pyhessian(model, batch, quadrature)
    if has("hessian_eigenthings"):
        import hessian_eigenthings as eigenthings

        def density(seed: int) -> tuple[tuple[Tensor, Tensor], int]:
            operator = eigenthings_operator(model, batch)
            result = eigenthings.spectral_density(operator, num_runs=4, lanczos_steps=20, seed=4 * seed)
            return (result.raw_eigenvalues, result.raw_weights), 80

        cases["hessian-eigenthings, 4 x 20 steps"] = density
    if has("curvlinops"):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        def repeated(seed: int) -> tuple[tuple[Tensor, Tensor], int]:
            operator = curvlinops_operator(model, batch, seed)
            rows = [fast_lanczos(operator, 20) for _ in range(4)]
            return (torch.cat([row[0] for row in rows]), torch.cat([row[1][0] ** 2 for row in rows])), 80

        cases["curvlinops, 4 x 20 steps, bounds known"] = repeated
    return cases


def distance(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Between two distributions of eigenvalues (nodes and weights): the area between their distribution functions
    (Wasserstein-1), relative to the width of the second one's support."""
    (a, p), (b, q) = ((x.flatten().double(), w.flatten().double() / w.double().sum()) for x, w in (got, want))
    points = torch.cat([a, b]).sort().values

    def below(nodes: Tensor, weights: Tensor) -> Tensor:
        order = nodes.argsort()
        sums = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
        return sums[torch.searchsorted(nodes[order], points[:-1], right=True)]

    area = ((below(a, p) - below(b, q)).abs() * points.diff()).sum()
    return float(area / (b.max() - b.min()))


def compare(
    title: str,
    cases: dict[str, Case],
    error_of: Callable[[Any], float],
    gradient: Callable[[], Any],
    seeds: int,
) -> None:
    """Report each case over ``seeds`` seeds; the gradient is timed again before and after each run."""
    table = Printed(title, "case", "products", "gradients", "error, rms", "largest", "peak MiB")
    for name, case in cases.items():
        found, costs = [], []
        try:
            for seed in range(seeds):
                before = median_seconds(gradient)
                found.append(measure(lambda case=case, seed=seed: case(seed)))
                costs.append(2 * found[-1][0] / (before + median_seconds(gradient)))
        except Exception as error:  # a failure of another library is a result
            table.row(name, f"  {type(error).__name__}: {' '.join(str(error).split())}"[:60])
            continue
        errors = [error_of(answer) for _, _, (answer, _) in found]
        known = [count for _, _, (_, count) in found if count is not None]
        products = f"{statistics.mean(known):.0f}" if known else ""
        rms = math.sqrt(statistics.mean(error**2 for error in errors))
        largest = max(errors, key=abs)
        memory = max(peak for _, peak, _ in found)
        table.row(name, products, f"{statistics.mean(costs):.0f}", f"{rms:.1e}", f"{largest:+.1e}", f"{memory:.0f}")


@dataclass(frozen=True)
class Truth:
    """The references of errors: all eigenvalues of the small model, long runs for the large one."""

    loss: Loss
    params: dict[str, Tensor]
    eigenvalues: Tensor | None

    @classmethod
    def of(cls, loss: Loss, params: dict[str, Tensor], exact: bool) -> Truth:
        if not exact:
            return cls(loss, params, None)
        wide = {name: value.detach().double() for name, value in params.items()}
        return cls(loss, params, torch.linalg.eigvalsh(curvature.hessian(loss, wide).to_dense()))

    def top(self) -> tuple[float, float]:
        if self.eigenvalues is not None:
            return float(self.eigenvalues[-1]), float(self.eigenvalues[-2])
        first, second = curvature.eigenpairs(curvature.hessian(self.loss, self.params), 2, tol=1e-5).eigenvalues
        return float(first), float(second)

    def trace(self) -> tuple[float, float]:
        """The trace and its standard error."""
        if self.eigenvalues is not None:
            return float(self.eigenvalues.sum()), 0.0
        operator = curvature.hessian(self.loss, self.params)
        known = curvature.trace(operator, tol=0, max_products=300, generator=seeded(99))
        return known.estimate, known.stderr

    def density(self) -> tuple[Tensor, Tensor]:
        if self.eigenvalues is not None:
            return self.eigenvalues, torch.ones_like(self.eigenvalues)
        operator = curvature.hessian(self.loss, self.params)
        known = curvature.density(operator, steps=60, probes=8, generator=seeded(99))
        return known.nodes, known.weights


# -- large vocabularies --------------------------------------------------------------------------------------------


def compare_heads(vocabulary: int, tokens: int = 256, width: int = 64) -> None:
    """Report the peak memory of one product with a language model's head, in units of its logits."""
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
    title = f"One product with a head of {vocabulary} words, {tokens} tokens: logits of {size:.0f} MiB"
    table = Printed(title, "operator", "peak MiB", "logits")
    for name, make in operators.items():
        _, memory, _ = measure(lambda make=make: make() @ vector)
        table.row(name, f"{memory:.0f}", f"{memory / size:.1f}")


PARTS = ("products", "eigenvalue", "trace", "density", "heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--small", action="store_true", help="a model of 4,944 parameters with exact references")
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each kind of product")
    parser.add_argument("--seeds", type=int, help="seeds of each case; default 10 if small, 3 for eigenvalues, else 1")
    parser.add_argument("--compile", action="store_true", help="also the compiled product (half a minute)")
    parser.add_argument("--vocabulary", type=int, default=50_000, help="vocabulary of the heads")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if set(options.only) != {"heads"}:
        model, batch = trained(SMALL if options.small else LARGE, options.steps)
        params = dict(model.named_parameters())
        loss = curvature.functional_loss(model, functional.cross_entropy, batch=batch)
        count = sum(p.numel() for p in params.values())
        print(f"{count} parameters, loss {float(loss(params).detach()):.4f}, torch {torch.__version__}", flush=True)
        truth = Truth.of(loss, params, options.small and set(options.only) != {"products"})
        quantities = loss, model, batch

        def gradient() -> Any:
            return torch.autograd.grad(loss(params), list(params.values()))

        def shown(title: str, cases: dict[str, Case], error_of: Callable[[Any], float], seeds: int) -> None:
            compare(title, cases, error_of, gradient, options.seeds or (10 if options.small else seeds))

    if "products" in options.only:
        compare_products(loss, params, options.compile, options.repeats)
    if "eigenvalue" in options.only:
        first, second = truth.top()
        title = f"Top eigenvalue: {first:.6g}, the next {1 - second / first:.1%} below; relative errors"
        shown(title, eigenvalue_cases(*quantities), lambda value: value / first - 1, 3)
    if "trace" in options.only:
        known, stderr = truth.trace()
        title = f"Trace: {known:.5g}, known to {stderr / known:.1%}; relative errors"
        shown(title, trace_cases(*quantities), lambda value: value / known - 1, 1)
    if "density" in options.only:
        spectrum = truth.density()
        known_by = "all eigenvalues" if options.small else "8 probes of 60 steps"
        title = f"Spectral density: distance from that of {known_by}, relative to the spectrum's width"
        shown(title, density_cases(*quantities), lambda found: distance(found, spectrum), 1)
    if "heads" in options.only:
        compare_heads(options.vocabulary)


if __name__ == "__main__":
    main()
