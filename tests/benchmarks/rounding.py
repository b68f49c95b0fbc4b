"""The speed of rounding, relative to a memory copy and to other libraries, and whether these agree with fpsim.

    python -m tests.benchmarks.rounding            the promised ratios, at both vector widths
    python -m tests.benchmarks.rounding --blocks   those of formats with scales, for square matrices
    python -m tests.benchmarks.rounding --peers    eager calls and other libraries

One thread, float32. The cases take turns in one process. The ratios are those of the shortest times, because other
work on the machine only adds time; the comparison with other libraries takes medians. Rounding into given memory costs
what it adds to a copy: the memory of a result that is allocated costs more. Libraries that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fpsim
from fpsim.formats import ROUNDINGS
from tests.benchmarks import timing
from tests.benchmarks.results import add_record_option, record

Function = Callable[[Tensor], Tensor]


def compiled(format: str, rounding: str) -> Function:
    seed = torch.tensor(0) if rounding == "stochastic" else None
    function = torch.compile(
        lambda x, seed: fpsim.round(x, format, rounding=rounding, seed=seed), fullgraph=True, dynamic=False
    )
    return lambda x: function(x, seed)


def ours() -> dict[str, tuple[str, Function]]:
    """Name -> (format and rounding, function)."""
    cases: dict[str, tuple[str, Function]] = {}
    for format, rounding in (
        ("e4m3fn", "nearest_even"),
        ("e4m3fn", "toward_zero"),
        ("e5m2", "nearest_even"),
        ("e8m3", "nearest_even"),
        ("bf16", "nearest_even"),
        ("fp16", "nearest_even"),
        ("e4m3fn", "stochastic"),
        ("e8m3", "stochastic"),
    ):
        cases[f"fpsim compiled, {format} {rounding}"] = (format, compiled(format, rounding))
    for format in ("e4m3fn", "e5m2", "e8m3"):
        for rounding in ROUNDINGS:
            cases[f"fpsim eager, {format} {rounding}"] = (
                format,
                lambda x, f=format, r=rounding: fpsim.round(x, f, rounding=r),
            )
    return cases


def peers() -> dict[str, tuple[str, Function]]:
    """The installed other libraries, rounding to nearest-even by their own rules."""
    cases: dict[str, tuple[str, Function]] = {
        "torch cast and back, e4m3fn": ("e4m3fn", lambda x: x.to(torch.float8_e4m3fn).float()),
        "torch cast and back, e5m2": ("e5m2", lambda x: x.to(torch.float8_e5m2).float()),
        "torch cast and back, bf16": ("bf16", lambda x: x.bfloat16().float()),
    }
    if importlib.util.find_spec("ml_dtypes"):
        import ml_dtypes

        cases["ml_dtypes, e4m3fn"] = (
            "e4m3fn",
            lambda x: torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype("float32")),
        )
    if importlib.util.find_spec("gfloat"):
        import gfloat
        from gfloat.formats import format_info_ocp_e4m3

        cases["gfloat numpy, e4m3fn"] = (
            "e4m3fn",
            lambda x: torch.from_numpy(gfloat.round_ndarray(format_info_ocp_e4m3, x.numpy(), sat=True)).float(),
        )
    if importlib.util.find_spec("pychop"):
        import pychop

        pychop.backend("torch")
        cases["pychop, e5m2"] = ("e5m2", pychop.Chop(exp_bits=5, sig_bits=2, rmode=1))
    if importlib.util.find_spec("torchao"):
        from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

        cases["torchao floatx, e3m2fn"] = (
            "e3m2fn",
            lambda x: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, 3, 2), 3, 2),
        )
    return cases


#: The modes whose speed is promised: format, rounding, scale.
PROMISED = (
    ("e4m3fn", "nearest_even", None),
    ("e8m3", "nearest_even", None),
    ("bf16", "nearest_even", None),
    ("e5m2", "nearest_even", None),
    ("fp16", "nearest_even", None),
    ("e4m3fn", "stochastic", None),
    ("e8m3", "stochastic", None),
    ("e4m3fn", "nearest_even", "power_of_two"),
)

#: The formats with scales whose speed is promised: format, rounding, axis.
BLOCKS = (
    ("mxfp8", "nearest_even", -1),
    ("mxfp8", "nearest_even", 0),
    ("mxfp4", "nearest_even", -1),
    ("nvfp4", "nearest_even", -1),
    ("nvfp4", "nearest_even", 0),
    ("nvfp4", "stochastic:8", 0),
    ("e2m1fn/nv:16x16", "nearest_even", -1),
    ("e4m3fn/row", "nearest_even", -1),
    ("e4m3fn/mx:32x32", "nearest_even", -1),
    ("e4m3fn/block:128x128:fp32", "nearest_even", -1),
)


def into(target: Tensor, format: str, rounding: str, scale: str | None = None, axis: int | None = None) -> Function:
    """Compiled rounding whose results are written to ``target``."""
    seed = torch.tensor(0) if rounding.startswith("stochastic") else None

    def function(x: Tensor, target: Tensor, seed: Tensor | None) -> Tensor:
        return target.copy_(fpsim.round(x, format, rounding=rounding, scale=scale, seed=seed, axis=axis))

    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda x: compiled(x, target, seed)


def minima(calls: dict[str, Callable[[], object]], repeats: int, clock: timing.Clock) -> dict[str, float]:
    """The least seconds of each call, over rounds in which the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            times[name].append(timing.seconds(call, clock))
    return {name: min(values) for name, values in times.items()}


def ratios(elements: int, repeats: int, clock: timing.Clock) -> list[tuple[str, float]]:
    """The promised ratios at this process's vector width, in one thread: what is compared, and the ratio."""
    torch.set_num_threads(1)
    x = normal(elements)
    target = torch.empty_like(x)
    functions: dict[str, Function] = {"copy": target.copy_}
    for format, rounding, scale in PROMISED:
        work = f"{format} {rounding} {scale or ''}".strip()
        functions[f"{work} / copy"] = into(target, format, rounding, scale)
    seconds = minima({name: partial(function, x) for name, function in functions.items()}, repeats, clock)
    rows = [(work, value / seconds["copy"]) for work, value in seconds.items() if work != "copy"]

    small = x[: 1 << 16].clone()
    product = torch.compile(lambda x: x * 1.5, dynamic=False)
    rounded = compiled("e4m3fn", "nearest_even")
    calls = {"rounded": partial(repeatedly, rounded, small), "product": partial(repeatedly, product, small)}
    seconds = minima(calls, 2 * repeats, clock)
    return [*rows, ("e4m3fn nearest_even in cache (2^16 elements) / x * 1.5", seconds["rounded"] / seconds["product"])]


def ratios_of_blocks(elements: int, repeats: int, clock: timing.Clock) -> list[tuple[str, float]]:
    """The promised ratios of formats with scales, for a square matrix, and for a small one to rounding without scales.

    Each small matrix is rounded into given memory too.
    """
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 4 * len(BLOCKS)
    rows = []
    for side, unit in ((math.isqrt(elements), "copy"), (512, "e4m3fn in cache")):
        x = normal(side * side).view(side, side)
        target = torch.empty_like(x)
        functions: dict[str, Function] = {
            "copy": target.copy_,
            "e4m3fn in cache": into(target, "e4m3fn", "nearest_even"),
        }
        for format, rounding, axis in BLOCKS:
            place = {-1: "last axis", 0: "first axis"}[axis]
            functions[f"{format} {rounding} {place} / {unit}"] = into(target, format, rounding, axis=axis)
        calls = {name: partial(repeatedly, function, x) for name, function in functions.items()}
        if unit == "copy":
            calls = {name: partial(function, x) for name, function in functions.items()}
        seconds = minima(calls, repeats, clock)
        rows += [(work, value / seconds[unit]) for work, value in seconds.items() if " / " in work]
    return rows


def repeatedly(function: Function, x: Tensor) -> None:
    """Sixteen calls, which take long enough to be timed."""
    for _ in range(16):
        function(x)


def normal(elements: int) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 8


def ratios_at_both_widths() -> dict[str, list[tuple[str, float]]]:
    """The ratios in a process for AVX2 and in one for the machine's own width, by the name of the width."""
    results: dict[str, list[tuple[str, float]]] = {}
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--json"]
    for capability in ("avx2", None):
        environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
        if capability is not None:
            environment["ATEN_CPU_CAPABILITY"] = capability
        with tempfile.TemporaryDirectory() as folder:  # torch's caches do not tell widths apart
            environment["TORCHINDUCTOR_CACHE_DIR"] = folder
            width, rows = json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])
        results[width] = [(work, ratio) for work, ratio in rows]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--peers", action="store_true", help="compare eager calls and other libraries instead")
    parser.add_argument("--blocks", action="store_true", help="formats with scales")
    timing.add_clock_option(parser)
    parser.add_argument("--json", action="store_true", help="print the ratios of this process's width alone")
    add_record_option(parser)
    options = parser.parse_args()
    if options.peers:
        compare_with_peers(options.elements, options.repeats)
    elif options.json:
        measure = ratios_of_blocks if options.blocks else ratios
        rows = measure(options.elements, options.repeats, options.clock)
        print(json.dumps([torch.backends.cpu.get_cpu_capability(), rows]))
    else:
        table = Table(title=f"{options.elements} float32 elements, 1 thread, torch {torch.__version__}")
        results = ratios_at_both_widths()
        for column in ("work", *results):
            table.add_column(column, justify="left" if column == "work" else "right")
        for rows in zip(*results.values(), strict=True):
            table.add_row(rows[0][0], *(f"{ratio:.2f}" for _, ratio in rows))
        Console(width=110).print(table)
        for width, rows in results.items():
            record(options.record, dict(rows), vectors=width)


def compare_with_peers(elements: int, repeats: int) -> None:
    torch.set_num_threads(1)
    x = normal(elements)
    target = torch.empty_like(x)
    cases = {**ours(), **peers()}
    copy = "torch.add(x, 0, out=)"
    functions: dict[str, Function] = {
        copy: lambda x: torch.add(x, 0, out=target),
        "x * 1.5, compiled": torch.compile(lambda x: x * 1.5, dynamic=False),
        **{name: function for name, (_, function) in cases.items()},
    }
    calls = {name: partial(function, x) for name, function in functions.items()}
    seconds = timing.interleaved_medians(calls, repeats, warm_up=True)
    nanoseconds = {name: 1e9 * value / x.numel() for name, value in seconds.items()}
    table = Table(title=f"{elements} float32 elements, 1 thread, torch {torch.__version__}")
    for column in ("case", "ns per element", "ratio to copy", "differs from fpsim"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, value in nanoseconds.items():
        differs = ""
        if name in cases:
            format, function = cases[name]
            if name.endswith("nearest_even") or not name.startswith("fpsim"):
                differs = str(int((function(x) != fpsim.round(x, format)).sum()))
        table.add_row(name, f"{value:.3f}", f"{value / nanoseconds[copy]:.2f}", differs)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
