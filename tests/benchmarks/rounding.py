"""The speed of rounding, relative to a memory copy and to other libraries, and whether these agree with fpsim.

    python -m tests.benchmarks.rounding [--elements N] [--repeats N]

One thread, float32, medians of interleaved runs in one process. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fpsim
from fpsim.formats import ROUNDINGS
from tests.benchmarks.timing import interleaved_medians

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(options.elements, generator=torch.Generator().manual_seed(0)) * 8
    target = torch.empty_like(x)
    cases = {**ours(), **peers()}
    copy = "torch.add(x, 0, out=)"
    functions: dict[str, Function] = {
        copy: lambda x: torch.add(x, 0, out=target),
        "x * 1.5, compiled": torch.compile(lambda x: x * 1.5, dynamic=False),
        **{name: function for name, (_, function) in cases.items()},
    }
    calls = {name: partial(function, x) for name, function in functions.items()}
    seconds = interleaved_medians(calls, options.repeats, warm_up=True)
    nanoseconds = {name: 1e9 * value / x.numel() for name, value in seconds.items()}
    table = Table(title=f"{options.elements} float32 elements, 1 thread, torch {torch.__version__}")
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
