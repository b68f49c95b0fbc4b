"""The cost of a training step with every operand of every product rounded, relative to plain Inductor and peers.

    python -m tests.benchmarks.training [--model llama|resnet] [--steps N] [--compiles N] [--format F] [--peers]
                                        [--only CASE ...] [--cpu-time]
    python -m tests.benchmarks.training --second [--model llama|resnet] [--compiles N] [--cpu-time]

One thread. Both sides of each ratio have the same attention, kept fused or opened. Step times are medians over
interleaved steps in one process. Peak memory is the largest sum of live allocations during one step, without parameters
and optimizer. Compile time is the time of the first step, Python and C++ compiler included, without torch's caches. It
is the median over fresh processes that have compiled something small before (by Inductor, so that plain cases run as
in a process without fpsim's backend).

``--second`` measures a second process instead: from its start until its first step is done, with the caches that a
first process has filled.

``--peers`` adds eager emulations. One is an autograd.Function of usual torch operations, patched into
`torch.nn.functional` as microxcaling does. Others are used if they are installed: unit_scaling's ``simulate_fp8``,
which rounds stochastically, torchao's emulated ``Float8Linear``, which scales by powers of two, and NVIDIA ModelOpt's
FP8, which rounds the forward operands of layers alone. These do not round the products inside attention, and only
ModelOpt rounds those of convolutions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

from fpsim.paper.compiled_loss import OpenAttention
from fpsim.paper.models import LanguageModel, ModelConfig, llama
from tests.benchmarks import timing
from tests.benchmarks.results import add_record_option, record

Compile = Callable[[nn.Module], Callable[..., Tensor]]
STOCHASTIC = {"policy": "fp8_hybrid", "rounding": "stochastic"}
SCALED = {"policy": "fp8_hybrid", "scale": "power_of_two"}


@dataclass(frozen=True)
class Workload:
    """A model whose forward gives the loss, and its inputs."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    has_attention: bool


def llama_workload() -> Workload:
    config = ModelConfig()
    tokens = torch.randint(0, config.vocabulary, (16, config.context + 1), generator=torch.Generator().manual_seed(0))
    return Workload(LanguageModel(llama(config, seed=0)), (tokens[:, :-1], tokens[:, 1:]), has_attention=True)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=out // channels, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.shortcut = nn.Conv2d(channels, out, 1, stride=out // channels) if out != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of residual blocks for images of 32 x 32, as in He et al. 2015, section 4.2, but wider."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [(width, width), (width, 2 * width), (2 * width, 4 * width)]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in widths))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3))), targets)


def resnet_workload() -> Workload:
    torch.manual_seed(0)
    return Workload(ResNet(), (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))), has_attention=False)


WORKLOADS = {"llama": llama_workload, "resnet": resnet_workload}


def with_fpsim(**options: Any) -> Compile:
    if options and "format" not in options:
        options = {"policy": "fp8_hybrid", **options}
    return lambda model: torch.compile(model, backend="fpsim", options=options, dynamic=False)


def plain(opened: bool) -> Compile:
    """Plain Inductor. Attention is opened inside the graph, so that the key of torch's compile cache covers it."""
    return lambda model: torch.compile(OpenAttention(model) if opened else model, dynamic=False)


def compiled_cases(workload: Workload, options: dict[str, Any]) -> dict[str, Compile]:
    cases: dict[str, Compile] = {}
    if workload.has_attention:
        cases["plain Inductor, attention fused"] = plain(opened=False)
        cases["fpsim, attention kept fused"] = with_fpsim(**options, attention="keep")
        if not options:
            cases["fpsim, mxfp8, attention kept fused"] = with_fpsim(policy="mxfp8", attention="keep")
            cases["fpsim, nvfp4, attention kept fused"] = with_fpsim(policy="nvfp4")
    blocks = {} if options else {"fpsim, everything in mxfp8": with_fpsim(policy="mxfp8")}
    return cases | {
        "plain Inductor, attention opened": plain(opened=workload.has_attention),
        "fpsim, everything rounded": with_fpsim(**options),
        "fpsim, everything rounded stochastically": with_fpsim(**options, **STOCHASTIC),
        "fpsim, everything scaled and rounded": with_fpsim(**options, **SCALED),
        **blocks,
    }


# -- peers -------------------------------------------------------------------------------------------------------------


def by_usual_operations(x: Tensor, exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """Nearest rounding in the usual way of emulations, with floating-point logarithms."""
    emin = 2 - 2 ** (exponent_bits - 1)
    exponent = torch.floor(torch.log2(x.abs())).clamp_min(emin)
    unit = torch.exp2(exponent - mantissa_bits)
    return (torch.round(x / unit) * unit).clamp(-largest, largest)


class Emulated(torch.autograd.Function):
    """Rounds an operand to e4m3 in forward; or, for a result, its gradient to e5m2 in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_result: bool) -> Tensor:
        ctx.is_result = is_result
        return x.clone() if is_result else by_usual_operations(x, 4, 3, 448.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (by_usual_operations(gradient, 5, 2, 57344.0) if ctx.is_result else gradient), None


class _Patched:
    """A function of torch that rounds its first two arguments and the gradient of its result."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, a: Tensor, b: Tensor, *rest: Any, **named: Any) -> Tensor:
        return Emulated.apply(self.function(Emulated.apply(a, False), Emulated.apply(b, False), *rest, **named), True)


def patched(model: nn.Module) -> Callable[..., Tensor]:
    """``model`` run eagerly with linear layers, convolutions and matrix products patched."""

    def run(*inputs: Tensor) -> Tensor:
        places = [(F, "linear"), (F, "conv2d"), (torch, "matmul")]
        originals = [getattr(owner, name) for owner, name in places]
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, _Patched(original))
        try:
            return OpenAttention(model)(*inputs)
        finally:
            for (owner, name), original in zip(places, originals, strict=True):
                setattr(owner, name, original)

    return run


def by_unit_scaling(model: nn.Module) -> Callable[..., Tensor]:
    from unit_scaling.transforms import simulate_fp8

    return simulate_fp8(model)


def by_torchao(model: nn.Module) -> Callable[..., Tensor]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig(emulate=True, round_scales_to_power_of_2=True))


def by_modelopt(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(*inputs))


def peer_cases(workload: Workload) -> dict[str, Compile]:
    """Eager emulations; a sentence tells which are left out because they are not installed."""
    cases: dict[str, Compile] = {
        "eager, unrounded": lambda model: OpenAttention(model),
        "eager, patched autograd.Function": patched,
    }
    others: dict[str, tuple[str, Compile]] = {
        "unit_scaling": ("unit_scaling simulate_fp8", by_unit_scaling),
        "torchao": ("torchao Float8Linear, emulated", by_torchao),
        "modelopt": ("ModelOpt FP8, forward alone", lambda model: by_modelopt(model, workload.inputs)),
    }
    for module, (name, compile) in others.items():
        if importlib.util.find_spec(module):
            cases[name] = compile
        else:
            print(f"{name} is left out: {module} is not installed")
    return cases


# -- measuring ---------------------------------------------------------------------------------------------------------


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


def stepper(workload: Workload, compile: Compile) -> Callable[[], None]:
    """One step of forward and backward; the first compiles."""
    model = deepcopy(workload.model)
    compiled = compile(model)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(*workload.inputs).backward()

    return step


def seconds_of_first_step(workload: Workload, compile: Compile, clock: timing.Clock) -> float:
    """Seconds of a step that compiles, after something small was compiled."""
    with fresh_cache():
        torch.compile(nn.Linear(8, 8))(torch.randn(8, 8)).sum().backward()
    step = stepper(workload, compile)
    with fresh_cache():
        return timing.seconds(step, clock)


def in_a_fresh_process(case: str) -> float:
    """`seconds_of_first_step` of a case, by this program in a new process with the same arguments."""
    command = [sys.executable, "-m", "tests.benchmarks.training", *sys.argv[1:], "--first-step", case]
    environment = {**os.environ, **environment_of(sys.argv)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(run.stdout.split()[-1])


def environment_of(arguments: Sequence[str]) -> dict[str, str]:
    """One thread that compiles, if the processor's time counts: that of other processes that still run does not."""
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if "--cpu-time" in arguments else {}


def seconds_of_second_process(case: str, clock: timing.Clock) -> float:
    """Seconds of a process from its start until its first step is done, after another has filled torch's caches."""
    command = [sys.executable, "-m", "tests.benchmarks.training", *sys.argv[1:], "--only-step", case]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **environment_of(sys.argv), "TORCHINDUCTOR_CACHE_DIR": folder}

        def run() -> None:
            subprocess.run(command, check=True, capture_output=True, env=environment)

        run()
        return timing.seconds(run, clock)


def measure_second_processes(names: Sequence[str], repeats: int, clock: timing.Clock) -> dict[str, float]:
    """Print the median seconds of the second process of each case; the result holds the ratios to plain Inductor."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in track([name for _ in range(repeats) for name in names], "second processes", transient=True):
        times[name].append(seconds_of_second_process(name, clock))
    table, ratios, baseline = Table(title="second process, until the first step is done"), {}, 0.0
    for column in ("case", "seconds", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, values in times.items():
        seconds = statistics.median(values)
        baseline = seconds if name.startswith("plain") else baseline
        ratios[name] = seconds / baseline
        table.add_row(name, f"{seconds:.2f}", f"{ratios[name]:.3f}")
    Console(width=120).print(table)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="llama")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--compiles", type=int, default=1, help="number of fresh processes that compile each case")
    parser.add_argument("--first-step", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--only-step", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--second", action="store_true", help="measure a second process instead")
    parser.add_argument("--format", help="the format of all operands; default: the FP8 hybrid")
    parser.add_argument("--peers", action="store_true", help="also measure eager emulations")
    parser.add_argument("--only", metavar="CASE", nargs="+", help="these cases alone; each plain one precedes its own")
    timing.add_clock_option(parser)
    add_record_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = WORKLOADS[arguments.model]()
    compiles = compiled_cases(workload, {"format": arguments.format} if arguments.format else {})
    if arguments.peers:
        compiles |= peer_cases(workload)
    if arguments.only:
        compiles = {name: compile for name, compile in compiles.items() if name in arguments.only}
    if arguments.first_step:
        print(seconds_of_first_step(workload, compiles[arguments.first_step], arguments.clock))
        return
    if arguments.only_step:
        stepper(workload, compiles[arguments.only_step])()
        return
    if arguments.second:
        ratios = measure_second_processes(list(compiles), arguments.compiles, arguments.clock)
        record(arguments.record, {name: ratio for name, ratio in ratios.items() if not name.startswith("plain")})
        return

    steps = {}
    for name, compile in track(compiles.items(), "compiling", transient=True):
        steps[name] = stepper(workload, compile)
        for _ in range(2):
            steps[name]()
    rounds = [name for _ in range(arguments.compiles) for name in compiles]
    compiling: dict[str, list[float]] = {name: [] for name in compiles}
    for name in track(rounds, "compiling in fresh processes", transient=True):
        compiling[name].append(in_a_fresh_process(name))
    first = {name: statistics.median(values) for name, values in compiling.items()}
    seconds = timing.interleaved_medians(steps, arguments.steps, clock=arguments.clock)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}

    table = Table(title=f"forward and backward, {arguments.model}, 1 thread, torch {torch.__version__}")
    for column in ("case", "ms per step", "ratio", "peak MiB", "ratio", "first step s", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    baseline, ratios = "", {}
    for name in steps:
        baseline = name if name.startswith("plain") else baseline
        measured = [(seconds, 1e3), (peaks, 2**-20), (first, 1)]
        cells = [
            text
            for values, scale in measured
            for text in (f"{values[name] * scale:.1f}", f"{values[name] / values[baseline]:.3f}")
        ]
        table.add_row(name, *cells)
        if name != baseline:
            ratios[name] = seconds[name] / seconds[baseline]
            ratios[f"{name}, first step"] = first[name] / first[baseline]
    Console(width=120).print(table)
    record(arguments.record, ratios)


if __name__ == "__main__":
    main()
