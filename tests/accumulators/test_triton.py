"""The Triton kernel compiles for GPUs, without a contraction; orders that it lacks are refused.

Its bits are compared in Triton's interpreter by `tests.compile_backend.test_triton`, and on a GPU by ``tests.gpu``.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install 'fpsim-torch[gpu]'", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fpsim.accumulators import triton_kernel
from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.accumulators.specification import ORDERS, ROUNDINGS, specification
from fpsim.formats import parse_format

USUAL = {
    "ORDER": 0, "LENGTH": 1, "GROUP": 1, "LANES": 1, "ROUNDING": 0, "MANTISSA_BITS": 13, "RANDOM_BITS": 0,
    "EXACT": False, "ROUND_PRODUCTS": False, "RESCALE": False, "BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "constants",
    [
        {"ROUNDING": ROUNDINGS["stochastic"], "RANDOM_BITS": 23, "ROUND_PRODUCTS": True, "RESCALE": True},
        {"ORDER": ORDERS["aligned"], "LENGTH": 64, "GROUP": 16, "ROUNDING": ROUNDINGS["toward_zero"]},
        {"ORDER": ORDERS["late"], "LENGTH": 16, "LANES": 2, "MANTISSA_BITS": 23},
    ],
)
def test_the_kernel_compiles_for_a_gpu_and_contracts_nothing(constants: dict[str, Any]) -> None:
    kernel = triton_kernel._accumulate
    values = {**USUAL, **constants}
    types = ["*fp64"] * 4 + ["*fp32"] * 2 + ["*fp64"] * 2 + ["i32"] * 4 + ["i64"] + ["i32"] * 3
    names = [name for name in kernel.arg_names if name not in values]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(values, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    text = str(compiled.asm["ptx"])
    assert re.search(r"mul\.(rn\.)?f64", text) and not re.search(r"fma\.\w+\.f64|\.ftz", text)


def test_sums_that_only_the_cpu_has_are_refused() -> None:
    for text, fmt in (
        ("mi250", "fp16"),
        ("amx_bf16", "bf16"),
        ("fp32 chunk=4", "bf16"),
        ("fp16 order=pairwise", "e4m3fn"),
    ):
        parsed = parse_format(fmt)
        spec = specification(parse_accumulator(text), parsed, parsed, 8)
        with pytest.raises(NotImplementedError, match=r"simulated on CPUs alone.*use a.cpu"):
            triton_kernel.accumulate_with_triton(spec, torch.ones(1, 2, 8), torch.ones(1, 8, 2), None, None, text)
