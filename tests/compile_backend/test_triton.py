"""Rounding in Triton, run in its interpreter and compiled to PTX; neither needs a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install 'fpsim-torch[gpu]'", allow_module_level=True)

import triton
import triton.language as tl
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from fpsim.rounding import triton_functions as triton_rounding
from fpsim.rounding.ops import SOURCE
from fpsim.rounding.triton_functions import FPSIM_SOURCE, device_function
from fpsim.triton import fpsim_round, fpsim_round_stochastic
from tests.compile_backend.inductor_triton import generate
from tests.shared.processes import in_a_new_process

PROGRAM = Path(__file__).parent / "interpreted_triton.py"
GPUS = (80, 90, 100)  #: compute capabilities: A100, H100, B200

#: Operations on floating-point numbers: whatever PTX has but moves and bit operations.
FLOATING = (
    r"(?:add|sub|mul|fma|mad|div|min|max|abs|neg|set|setp|selp|cvt|ex2|lg2|sqrt|rcp)\.(?:\w+\.)*(?:f16|bf16|f32|f64)"
)


# -- interpreted -------------------------------------------------------------------------------------------------------


DTYPES = ("float32", "bfloat16", "float64", "float16")
VALUES = [f"values torch.{dtype}" for dtype in DTYPES]
SCALED = [f"scaled torch.{dtype}" for dtype in DTYPES[:3]]
STOCHASTIC = [*(f"stochastic torch.{dtype}" for dtype in DTYPES), "layouts", "user kernels"]


@pytest.fixture(scope="module")
def interpreted() -> subprocess.CompletedProcess[str]:
    """All checks, run one after the other by one process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *VALUES, *SCALED, *STOCHASTIC, "accumulators"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("check", VALUES)
def test_interpreted_triton_rounds_as_the_reference_says(interpreted: Any, check: str) -> None:
    assert f"{check}: as it should be" in interpreted.stdout.splitlines(), interpreted.stderr[-3000:]


@pytest.mark.parametrize("check", SCALED)
def test_interpreted_scaled_rounding(interpreted: Any, check: str) -> None:
    assert f"{check}: as it should be" in interpreted.stdout.splitlines(), interpreted.stderr[-3000:]


@pytest.mark.parametrize("check", STOCHASTIC)
def test_interpreted_stochastic_rounding_any_layout_and_kernels_of_ones_own(interpreted: Any, check: str) -> None:
    assert f"{check}: as it should be" in interpreted.stdout.splitlines(), interpreted.stderr[-3000:]


def test_interpreted_products_with_accumulators_have_the_bits_of_the_reference(interpreted: Any) -> None:
    assert "accumulators: as it should be" in interpreted.stdout.splitlines(), interpreted.stderr[-3000:]


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="pretends that there is a GPU by torch's internals"
)
def test_inductors_code_for_gpus_rounds_as_eager_calls_do_and_contracts_nothing(tmp_path: Path) -> None:
    """The code is generated for a pretended H100, compiled to PTX and read, then run in Triton's interpreter."""
    in_a_new_process(generate, tmp_path)
    assert len(list(tmp_path.glob("case_*.txt"))) == 14 and len(list(tmp_path.glob("template_*.txt"))) == 2
    done = subprocess.run(
        [sys.executable, str(PROGRAM.parent / "inductor_triton.py"), "interpret", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 kernels and 2 templates as they should be" in done.stdout


def launches_and_bytes() -> tuple[list[list[int]], list[int]]:
    """In forward and backward the kernels, and in both the bytes that they move, in each case of `steps`."""
    from tests.gpu.benchmarks import Size
    from tests.gpu.traffic import steps

    codes = steps(Size(layers=1), torch.bfloat16).values()
    return [[code.launches for code in passes] for passes in codes], [sum(c.bytes for c in passes) for passes in codes]


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="pretends that there is a GPU by torch's internals"
)
def test_a_training_step_on_a_gpu_launches_a_kernel_more_for_each_weight_only() -> None:
    """Fused attention adds a kernel for its result; in backward the norms add one for the gradients of biases."""
    launched, moved = in_a_new_process(launches_and_bytes)
    weights = 5  # the embedding is one, as the head
    for fused, plain, rounded in ((1, *launched[:2]), (0, *launched[2:])):
        assert rounded[0] == plain[0] + weights + fused
        assert rounded[1] <= plain[1] + weights + 2 + fused
    for plain, rounded in (moved[:2], moved[2:]):
        assert plain < rounded < 1.12 * plain


# -- compiled, and read ------------------------------------------------------------------------------------------------


@triton.jit
def products_rounded_and_added(a, b, c, out, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    product = fpsim_round(tl.load(a + index) * tl.load(b + index), FORMAT, "toward_zero")
    tl.store(out + index, product + tl.load(c + index))


@triton.jit
def products_added(a, b, c, out, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(a + index) * tl.load(b + index) + tl.load(c + index))


@triton.jit
def rounded_at_random(x, out, seed, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, fpsim_round_stochastic(tl.load(x + index), seed, index, FORMAT))


@triton.jit
def rounded_as_usual(x, out, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, fpsim_round(tl.load(x + index), FORMAT))


@functools.cache
def ptx(kernel: Any, gpu: int, types: tuple[str, ...], **constants: Any) -> str:
    """The PTX that Triton compiles; ``types``: of the arguments that are no constants. Pointers are aligned."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(
        kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=constants, attrs=aligned
    )
    return str(triton.compile(source, target=GPUTarget("cuda", gpu, 32)).asm["ptx"])


def eager_kernel(gpu: int, dtype: str, format: str, rounding: str, overflow: str) -> str:
    return ptx(
        triton_rounding._round_kernel,
        gpu,
        (f"*{dtype}", f"*{dtype}", "i32"),
        scale=None,
        FORMAT=format,
        ROUNDING=rounding,
        OVERFLOW=overflow,
        BLOCK=1024,
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize(("format", "overflow"), [("e4m3fn", "sat_finite"), ("e5m2", "ovf_inf"), ("e8m3", "ovf_inf")])
def test_no_floating_point_operation_takes_part(gpu: int, dtype: str, format: str, overflow: str) -> None:
    code = eager_kernel(gpu, dtype, format, "nearest_even", overflow)
    assert re.findall(FLOATING, code) == [] and ".ftz" not in code


def test_but_one_exact_conversion_for_formats_that_reach_into_the_carriers_subnormals() -> None:
    """It converts integers below 2^23, none of which is near a subnormal. float16 needs its two casts as well."""
    assert set(re.findall(FLOATING, eager_kernel(90, "fp32", "e8m0fnu", "nearest_even", "ovf_inf"))) <= {"cvt.rn.f32"}
    assert set(re.findall(FLOATING, eager_kernel(90, "fp16", "e4m3fn", "up", "sat_finite"))) <= {
        "cvt.f32.f16",
        "cvt.rn.f16.f32",  # by Triton's version one at a time or two
        "cvt.rn.f16x2.f32",
    }


def test_eager_kernels_move_16_bytes_at_a_time() -> None:
    code = eager_kernel(90, "fp32", "e4m3fn", "nearest_even", "sat_finite")
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


@pytest.mark.parametrize("gpu", GPUS)
def test_no_fma_reaches_across_a_rounding(gpu: int) -> None:
    pointers = ("*fp32",) * 4
    assert "fma.rn.f32" in ptx(products_added, gpu, pointers, BLOCK=256)  # as Triton does by default
    code = ptx(products_rounded_and_added, gpu, pointers, FORMAT="e5m2", BLOCK=256)
    assert "fma" not in code and "mul.f32" in code and "add.f32" in code


def test_stochastic_rounding_is_integer_arithmetic_too() -> None:
    code = ptx(rounded_at_random, 90, ("*fp32", "*fp32", "i64"), FORMAT="e4m3fn", BLOCK=256)
    assert re.findall(FLOATING, code) == [] and "mul.lo.s32" in code


def test_the_rounding_mode_may_be_left_out() -> None:
    code = ptx(rounded_as_usual, 90, ("*fp32", "*fp32"), FORMAT="e4m3fn", BLOCK=256)
    assert re.findall(FLOATING, code) == [] and "shr" in code


def test_torch_compile_finds_all_that_a_users_kernel_needs() -> None:
    """The source that Inductor copies into its code for a user's kernel is complete, and compiles to the same PTX."""
    source = user_defined_triton_kernel_transitive_closure_source_code(products_rounded_and_added)
    for name in ("fpsim_round", "fpsim_device_function", "FPSIM_SOURCE"):
        assert re.search(rf"^(?:def )?{name}\b", source, re.MULTILINE), name


def test_what_is_kept_compiled_is_known_by_fpsims_source() -> None:
    """Triton's cache key holds only the source of a function, in which a constant stands for the algorithm.

    The key of a kernel contains those of the functions that it calls.
    """
    for function in (fpsim_round, fpsim_round_stochastic, triton_rounding._round_kernel):
        assert function.cache_key
        assert "FPSIM_SOURCE" in {name for name, _ in function.used_global_vals}
    assert FPSIM_SOURCE.value in SOURCE


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e4m3nf", "nearest_even", None, "fp32"), "did you mean e4m3fn"),
        (("e4m3fn", "nearest", None, "fp32"), "nearest_even"),
        (("fp32", "nearest_even", None, "bf16"), "torch.float32"),
        (("e4m3fn", "nearest_even", None, "int32"), "convert it to one of fp64, fp32, fp16, bf16"),
        (("e4m3fn", "stochastic", None, "fp32"), "fpsim_round_stochastic"),
        (("e4m3fn", "up", None, "fp32", "int32"), "is for fpsim_round"),
        (("e4m3fn", "stochastic", None, "fp32", "int16"), "int32 or int64"),
    ],
)
def test_a_clear_error_for(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        device_function(*arguments)


def test_the_error_comes_out_of_a_kernel() -> None:
    with pytest.raises(CompilationError) as caught:
        ptx(products_rounded_and_added, 90, ("*fp32",) * 4, FORMAT="e4m3nf", BLOCK=256)
    assert "did you mean e4m3fn" in "".join(traceback.format_exception(caught.value))


def test_without_a_gpu_the_proof_on_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run python -m tests.gpu")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=PROGRAM.parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "There is no CUDA device here" in done.stderr


def test_the_kernels_for_cuda_are_registered_and_triton_is_not_imported_for_them() -> None:
    for name in ("fpsim::round", "fpsim::round_stochastic"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    program = "import sys; sys.modules['triton'] = None; import fpsim, torch; print(fpsim.round(torch.ones(1), 'e5m2'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "tensor([1.])\n", done.stderr[-2000:]
