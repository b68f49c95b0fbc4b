"""Runs fpsim's Triton code in Triton's interpreter, on the CPU, and prints results that differ from those expected.

    TRITON_INTERPRET=1 python tests/compile_backend/interpreted_triton.py NAME_OF_A_CHECK

It is a separate program, because Triton decides at import, for the whole process, whether it interprets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))  # it is run as a program
import fpsim
from fpsim.formats import full_rounding, parse_format, resolve_overflow
from fpsim.rounding.definitions import random_words_at
from fpsim.rounding.ops import random_key_op
from fpsim.rounding.tensors import round_with_torch_ops
from fpsim.rounding.triton_functions import round_dense, round_stochastic_dense
from fpsim.triton import fpsim_round, fpsim_round_stochastic
from tests.accumulators.triton_cases import check_triton
from tests.shared.formats import overflows
from tests.shared.judge import (
    CARRIERS,
    Inputs,
    assert_codes,
    canonical,
    codes_of,
    expected,
    interesting,
    random_inputs,
    suits,
)

#: Each has something of its own in the algorithm: specials, subnormals, ties, signs, reach into tiny numbers.
FORMATS = (
    "e4m3fn",
    "e5m2",
    "e4m3fnuz",
    "e2m1fn",
    "e8m0fnu",
    "e8m3",
    "e5m2:nosubnormals",
    "bf16",
    "binary8p1ue",
    "e5m0:unsigned",
    "e11m5",
)
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd")
STOCHASTIC = ("stochastic", "stochastic:1", "stochastic:32", "stochastic_b:8", "stochastic_c:30")
BLOCK = 1 << 13


def check_values(dtype: torch.dtype) -> None:
    """Every format in every mode, against tables and definitions that share no code with fpsim's kernel."""
    for fmt in map(parse_format, FORMATS):
        if not suits(fmt, dtype):
            continue
        inputs = interesting(fmt, dtype).sample(6_000) | random_inputs(fmt, dtype, 2_000)
        for rounding in ROUNDINGS:
            for overflow in overflows(fmt):
                got = round_dense(inputs.tensor, fmt.name, rounding, overflow, block=BLOCK)
                want = expected(inputs, fmt, rounding, overflow)
                assert_codes(canonical(codes_of(got), dtype), want, inputs.codes, f"{fmt} {rounding} {overflow}")
                eager = fpsim.round(inputs.tensor, fmt, rounding=rounding, overflow=overflow)
                assert_codes(codes_of(got), codes_of(eager), inputs.codes, f"{fmt} {rounding} {overflow}, with NaNs")


def check_scaled(dtype: torch.dtype) -> None:
    """Scaled rounding, against eager rounding on the CPU: huge and tiny numbers, and scales at their limits."""
    for fmt in map(parse_format, ("e4m3fn", "e2m1fn", "e8m0fnu", "e5m2:nosubnormals")):
        x = random_inputs(fmt, dtype, 1_000).tensor
        for magnitude in (x, x[x.abs() < 1e-30], x[x.abs() < torch.finfo(dtype).tiny]):
            for rounding in ("nearest_even", "up"):
                arguments = fmt.name, rounding, resolve_overflow(fmt, None)
                scale = fpsim.power_of_two_scale(magnitude, fmt)
                got = round_dense(magnitude, *arguments, scale, block=BLOCK)
                want = torch.ops.fpsim.round(magnitude, *arguments, "", scale)
                assert_codes(codes_of(got), codes_of(want), codes_of(magnitude), arguments)
            key, arguments = random_key_op(torch.tensor(1), 0), (fmt.name, "stochastic:23", resolve_overflow(fmt, None))
            got = round_stochastic_dense(magnitude, key, *arguments, scale, block=BLOCK)
            want = torch.ops.fpsim.round_stochastic(magnitude, key, *arguments, "", scale)
            assert_codes(codes_of(got), codes_of(want), codes_of(magnitude), arguments)


def check_stochastic(dtype: torch.dtype) -> None:
    """Stochastic rounding, against eager rounding on the CPU."""
    for fmt in map(parse_format, ("e4m3fn", "e2m1fn", "e8m0fnu", "e8m3", "e11m5")):
        if not suits(fmt, dtype):
            continue
        inputs = random_inputs(fmt, dtype, 2_000)
        for rounding in STOCHASTIC:
            key = random_key_op(torch.tensor(-7), 3)
            overflow = resolve_overflow(fmt, None)
            got = round_stochastic_dense(inputs.tensor, key, fmt.name, full_rounding(rounding), overflow, block=BLOCK)
            same(got, fpsim.round(inputs.tensor, fmt, rounding=rounding, seed=-7, salt=3), inputs, f"{fmt} {rounding}")


def same(got: Tensor, want: Tensor, inputs: Inputs, what: str) -> None:
    assert_codes(codes_of(got), codes_of(want), inputs.codes, what)


def layouts() -> Iterator[Tensor]:
    x = torch.randn(6, 10, 7, generator=torch.Generator().manual_seed(0))
    yield from (x, x.mT, x[:, ::2], x.permute(2, 0, 1), x[:0], x[0, 0, 0], x.expand(2, 6, 10, 7)[1, :, 3])
    yield torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


def check_layouts() -> None:
    """Any strides and any number of elements: none, one, and more than whole blocks."""
    for x in layouts():
        got = round_dense(x, "e4m3fn", "nearest_even", "sat_finite", block=64)
        want = fpsim.round(x, "e4m3fn")
        assert got.stride() == want.stride() and torch.equal(got, want), (x.shape, x.stride())
        got = round_stochastic_dense(
            x, random_key_op(torch.tensor(1), 0), "e4m3fn", "stochastic:23", "sat_finite", block=64
        )
        assert torch.equal(got, fpsim.round(x, "e4m3fn", rounding="stochastic", seed=1)), (x.shape, x.stride())


@triton.jit
def scaled_and_rounded(x, out, rows, columns: tl.constexpr, scale, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, columns)[None, :]
    index = row * columns + column
    product = tl.load(x + index, mask=row < rows, other=0.0) * scale
    tl.store(out + index, fpsim_round(product, FORMAT, "toward_zero", "ovf_inf"), mask=row < rows)


@triton.jit
def rounded_from(x, out, seed, first, FORMAT: tl.constexpr, ROUNDING: tl.constexpr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    rounded = fpsim_round_stochastic(tl.load(x + index), seed, first + index, FORMAT, ROUNDING, salt=5)
    tl.store(out + index, rounded)


def check_user_kernels() -> None:
    """`fpsim_round` and `fpsim_round_stochastic` inside a user's kernels."""
    x = torch.randn(37, 16, generator=torch.Generator().manual_seed(0)) * 100
    for dtype in (torch.float32, torch.float64):
        out = torch.empty_like(x, dtype=dtype)
        scaled_and_rounded[(5,)](x.to(dtype), out, 37, 16, 3.0, "e5m2", 8)
        assert torch.equal(out, fpsim.round(x.to(dtype) * 3.0, "e5m2", rounding="toward_zero")), dtype
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, -(2**63), 2**40 + 3):
        out = torch.empty_like(x)
        rounded_from[(1,)](x, out, seed, 0, "e2m1fn", "stochastic:5", 64)
        want = fpsim.round(x, "e2m1fn", rounding="stochastic:5", seed=seed, salt=5)
        assert torch.equal(out, want), seed
    first = 2**33  # indices of more than 32 bits
    rounded_from[(1,)](x, out, 3, first, "e2m1fn", "stochastic", 64)
    words = random_words_at(random_key_op(torch.tensor(3), 5), first, 64)
    assert torch.equal(out, round_with_torch_ops(x, parse_format("e2m1fn"), "stochastic:23", "sat_finite", words))


CHECKS: dict[str, Callable[[], object]] = {
    **{f"values {dtype}": (lambda dtype=dtype: check_values(dtype)) for dtype in CARRIERS},
    **{f"scaled {dtype}": (lambda dtype=dtype: check_scaled(dtype)) for dtype in CARRIERS if dtype != torch.float16},
    **{f"stochastic {dtype}": (lambda dtype=dtype: check_stochastic(dtype)) for dtype in CARRIERS},
    "layouts": check_layouts,
    "user kernels": check_user_kernels,
    "accumulators": lambda: check_triton(torch.device("cpu")),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        CHECKS[name]()
        print(f"{name}: as it should be")
