"""The cost of rounding on a GPU: relative to a copy, in a training step, in an optimizer's step, and to eager peers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.fx_passes import fuse_attention

import fpsim
from fpsim.paper.compiled_loss import OpenAttention
from tests.benchmarks.timing import interleaved_medians
from tests.benchmarks.training import peer_cases

Row = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """The sizes of the benchmarks; the defaults are for results, `REHEARSAL` is for a rehearsal.

    Attributes:
        elements: the number of elements to round.
        layers, width, heads, context, vocabulary, batch: the sizes of the transformer; the defaults are GPT-2 124M's.
        repeats: how often each case is measured; results are medians.
    """

    elements: int = 1 << 28
    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50257
    batch: int = 8
    repeats: int = 20


REHEARSAL = Size(1 << 16, layers=1, width=32, heads=2, context=16, vocabulary=64, batch=2, repeats=2)


def seconds(functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds over interleaved calls, each until the device has finished."""

    def finished(function: Callable[[], Any]) -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = {name: partial(finished, function) for name, function in functions.items()}
    for call in calls.values():
        call()
        call()
    return interleaved_medians(calls, repeats)


# -- rounding against a copy -------------------------------------------------------------------------------------------


def rounding(device: torch.device, size: Size) -> tuple[str, Row, list[Row]]:
    """The bandwidth of rounding; the goal is at least 85 % of the bandwidth of a copy."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size.elements, device=device, dtype=dtype)
        out = torch.empty_like(x)
        functions: dict[str, Callable[[], Any]] = {"a copy": lambda x=x, out=out: out.copy_(x)}
        seed = torch.zeros((), dtype=torch.int64, device=device)
        for name, options in (
            ("e4m3fn", {}),
            ("e5m2", {"rounding": "toward_zero"}),
            ("e4m3fn", {"rounding": "stochastic", "seed": seed}),
        ):

            def rounded(x: Tensor, name: str = name, options: dict[str, Any] = options) -> Tensor:
                return fpsim.round(x, name, **options, gradient="zero")

            label = f"{name} {options.get('rounding', 'nearest_even')}"
            compiled = torch.compile(rounded, dynamic=False)
            functions[f"{label}, eager"] = lambda x=x, rounded=rounded: rounded(x)
            functions[f"{label}, compiled"] = lambda x=x, compiled=compiled: compiled(x)
        measured = seconds(functions, device, size.repeats)
        moved = 2 * x.numel() * x.element_size()
        for label, each in measured.items():
            bandwidth, share = moved / each / 1e9, measured["a copy"] / each
            rows.append((str(dtype).removeprefix("torch."), label, f"{bandwidth:.0f}", f"{share:.0%}"))
    return f"Rounding {size.elements:,} numbers", ("dtype", "rounded", "GB/s", "of the copy's bandwidth"), rows


# -- a training step ---------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT2(nn.Module):
    """A model of GPT-2's shape (Radford et al. 2019) with tied embeddings, which returns the mean cross-entropy."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.layers = nn.ModuleList([Layer(size.width, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else None

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy((self.norm(x) @ self.tokens.weight.T).flatten(0, 1).float(), targets.flatten())


def training(device: torch.device, size: Size) -> tuple[str, Row, list[Row]]:
    """The time of a training step; the goal is at most 1.10 times plain Inductor with the same attention."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_training, device, size).result()


def _training(device: torch.device, size: Size) -> tuple[str, Row, list[Row]]:
    """`training`, in a process that has compiled nothing: only there can Inductor be kept from fusing attention."""
    fuse_attention._sfdp_init = lambda *_, **__: None
    torch.manual_seed(0)
    tokens = torch.randint(0, size.vocabulary, (2, size.batch, size.context), device=device)
    fused, opened = "plain Inductor, attention fused", "plain Inductor, attention opened"
    cases: dict[str, tuple[str, Callable[[nn.Module], Callable[..., Tensor]]]] = {
        fused: (fused, lambda model: torch.compile(model, dynamic=False)),
        "fpsim, attention kept fused": (fused, with_fpsim(attention="keep")),
        opened: (opened, lambda model: torch.compile(OpenAttention(model), dynamic=False)),
        "fpsim, everything rounded": (opened, with_fpsim()),
        "fpsim, everything rounded stochastically": (opened, with_fpsim(rounding="stochastic")),
        **{name: (opened, compile) for name, compile in peer_cases().items()},
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = GPT2(size).to(device, dtype)
        steps = {name: step_of(deepcopy(model), compile, tokens) for name, (_, compile) in cases.items()}
        measured = seconds(steps, device, size.repeats)
        peaks = {name: peak(step, device) for name, step in steps.items()}
        for name, (base, _) in cases.items():
            ratios = (f"{measured[name] / measured[base]:.3f}", f"{peaks[name] / max(peaks[base], 1):.2f}")
            rows.append((str(dtype).removeprefix("torch."), name, f"{measured[name] * 1e3:.1f}", *ratios))
        del steps, model
    title = (
        f"A training step of GPT-2's shape, {size.layers} layers of {size.width}, {size.batch} x {size.context} tokens"
    )
    return title, ("dtype", "forward and backward", "ms", "ratio of time", "ratio of peak memory"), rows


def with_fpsim(**options: Any) -> Callable[[nn.Module], Callable[..., Tensor]]:
    if options:
        options = {"policy": "fp8_hybrid", **options}
    return lambda model: torch.compile(model, backend="fpsim", options=options or None, dynamic=False)


def step_of(
    model: nn.Module, compile: Callable[[nn.Module], Callable[..., Tensor]], tokens: Tensor
) -> Callable[[], None]:
    forward = compile(model)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward(tokens[0], tokens[1]).backward()

    return step


def peak(step: Callable[[], None], device: torch.device) -> int:
    """The peak of allocated bytes during a step, minus the bytes that were allocated before."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# -- an optimizer's step -----------------------------------------------------------------------------------------------


def optimizer(device: torch.device, size: Size) -> tuple[str, Row, list[Row]]:
    """The time of a step of AdamW; the goal on the CPU is at most 1.3 times the plain step."""
    rows = []
    for implementation in ({"foreach": True}, {"fused": True}):
        steps: dict[str, Callable[[], Any]] = {}
        for name, options in {
            "plain": None,
            "state e4m3fn": {"state": "e4m3fn"},
            "state bf16": {"state": "bf16"},
            "state e4m3fn, stochastic": {"state": "e4m3fn/stochastic", "seed": 0},
            "state bf16, weights e4m3fn, master bf16": {"state": "bf16", "weights": "e4m3fn", "master": "bf16"},
        }.items():
            model = GPT2(size).to(device)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            made = torch.optim.AdamW(model.parameters(), **implementation)
            if options:
                fpsim.round_optimizer(made, **options)
            steps[name] = made.step
        measured = seconds(steps, device, size.repeats)
        rows += [
            (next(iter(implementation)), name, f"{each * 1e3:.2f}", f"{each / measured['plain']:.2f}")
            for name, each in measured.items()
        ]
    return "A step of AdamW on its parameters", ("AdamW", "rounded", "ms", "ratio"), rows


BENCHMARKS: list[Callable[[torch.device, Size], tuple[str, Row, list[Row]]]] = [rounding, training, optimizer]
