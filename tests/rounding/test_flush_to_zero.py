"""Flushing subnormals to zero changes no bit, whether the flag is set while code is compiled, while it runs, or both.

With the flag, floating-point operations read and write zeros in place of subnormals, in torch and in Python itself. The
expected results are computed without it, from the reference. Bits are compared as integers, which the flag leaves
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.formats import ROUNDINGS, parse_format
from fpsim.formats.names import _parse
from fpsim.rounding.carriers import grid_of
from fpsim.verify.codes import codes_of
from tests.shared.judge import CARRIERS, Inputs, assert_codes, canonical, expected, interesting, random_inputs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor does not flush subnormals"),
]

#: Formats whose constants, inputs or results are subnormal in the carrier.
CASES = [
    ("e4m3:bias=1030", torch.float64), ("e11m52:nosubnormals", torch.float64), ("e11m3:nosubnormals", torch.float64),
    ("e2m1:bias=1060", torch.float64), ("e2m1:bias=1060:unsigned", torch.float64), ("fp64", torch.float64),
    ("bf16", torch.float32), ("e8m22", torch.float32), ("e8m0fnu", torch.float32), ("e5m2:bias=140", torch.float32),
    ("e4m3fn", torch.float32), ("e8m3:nosubnormals", torch.bfloat16), ("bf16", torch.bfloat16),
    ("e8m0fnu", torch.bfloat16), ("e4m3fn", torch.bfloat16), ("fp16", torch.float16), ("e4m3fn", torch.float16),
]  # fmt: skip


@contextmanager
def flushing(on: bool = True) -> Iterator[None]:
    for cache in (grid_of, _parse):
        cache.cache_clear()  # constants are computed anew
    torch.set_flush_denormal(on)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        for cache in (grid_of, _parse):
            cache.cache_clear()


def inputs_of(name: str, dtype: torch.dtype) -> Inputs:
    """Subnormal numbers of the carrier, and numbers beside the format's and halfway between them."""
    quantum = 1 << CARRIERS[dtype].mantissa_bits
    sign = CARRIERS[dtype].sign_code
    tiny = [0, 1, 2, 3, quantum // 2 - 1, quantum // 2, quantum // 2 + 1, quantum - 1, quantum, quantum + 1]
    fmt = parse_format(name)
    few = interesting(fmt, dtype).sample(200) | random_inputs(fmt, dtype, 200)
    return Inputs([*tiny, *(code | sign for code in tiny)], dtype) | few


def test_the_flag_flushes_here() -> None:
    smallest = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    with flushing():
        assert (smallest * 1).view(torch.int32).item() == 0
    assert (smallest * 1).view(torch.int32).item() == 1


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_eager_results_with_and_without_a_derivative(name: str, dtype: torch.dtype) -> None:
    inputs, fmt = inputs_of(name, dtype), parse_format(name)
    wanted = {rounding: expected(inputs, fmt, rounding) for rounding in ROUNDINGS}
    numbers = inputs.tensor[inputs.tensor.isfinite() & ~((inputs.tensor == 0) & inputs.tensor.signbit())]
    codes = [reference.encode(number, fmt) for number in numbers.tolist()]
    got = {}
    with flushing():
        for rounding in ROUNDINGS:
            leaf = inputs.tensor.clone().requires_grad_()
            got[rounding] = (
                fpsim.round(inputs.tensor, name, rounding=rounding),
                fpsim.round(leaf, name, rounding=rounding).detach(),
                torch.func.vjp(lambda x, r=rounding: fpsim.round(x, name, rounding=r), inputs.tensor)[0],
            )
        encoded = fpsim.encode(numbers, name).tolist()
        decoded = fpsim.decode(torch.tensor(encoded), name, dtype)
    for rounding, results in got.items():
        for result in results:
            assert_codes(canonical(codes_of(result), dtype), wanted[rounding], inputs.codes, (name, rounding))
    assert [code % (1 << fmt.bits) for code in encoded] == codes
    values = [reference.encode(reference.decode(code, fmt), CARRIERS[dtype]) for code in codes]
    assert codes_of(decoded).tolist() == values


@pytest.mark.parametrize("name", ["e2m1:bias=1060", "e2m1:bias=1060:unsigned", "e4m3fn:unsigned"])
def test_the_derivative_is_clipped_at_the_same_numbers(name: str) -> None:
    inputs = inputs_of(name, torch.float64)
    fmt, x = parse_format(name), inputs.tensor.nan_to_num(nan=1e300)
    lowest = Fraction(-fmt.max if fmt.signed else 0)
    want = [1.0 if abs(v) != float("inf") and lowest <= Fraction(v) <= Fraction(fmt.max) else 0.0 for v in x.tolist()]
    with flushing():
        leaf = x.clone().requires_grad_()
        fpsim.round(leaf, name, gradient="clipped").backward(torch.ones_like(leaf))
    assert leaf.grad.tolist() == want


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_b:9", "stochastic_c:5"])
@pytest.mark.parametrize(("name", "dtype"), CASES[:11], ids=str)
def test_stochastic_rounding(name: str, dtype: torch.dtype, rounding: str) -> None:
    x = inputs_of(name, dtype).tensor
    want = codes_of(fpsim.round(x, name, rounding=rounding, seed=5))
    with flushing():
        got = codes_of(fpsim.round(x, name, rounding=rounding, seed=5))
        again = codes_of(fpsim.round(x.clone().requires_grad_(), name, rounding=rounding, seed=5).detach())
    assert_codes(got, want, codes_of(x))
    assert_codes(again, want, codes_of(x))


def scaled(values: list[float], name: str, rounding: str, dtype: torch.dtype) -> tuple[int, list[int]]:
    """The exponent of the scale, and the carrier's codes of the scaled and rounded numbers, in exact fractions."""
    fmt, exact = parse_format(name), [Fraction(value) for value in values]
    largest, limit = max(map(abs, exact)), 1022 if dtype == torch.float64 else 126
    power = max(-limit, min(limit, next(k for k in range(2200, -2200, -1) if largest * Fraction(2) ** k <= fmt.max)))
    rounded = [reference.round(value * Fraction(2) ** power, fmt, rounding) for value in exact]
    quotients = [v / Fraction(2) ** power if isinstance(v, Fraction) else v for v in rounded]
    return power, [reference.encode(q, CARRIERS[dtype]) for q in quotients]


@pytest.mark.parametrize("rounding", ["nearest_even", "up", "to_odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scales_and_scaled_rounding_of_subnormal_tensors(dtype: torch.dtype, rounding: str) -> None:
    """Also of numbers so far apart that the product of the smaller one with the scale is no number of the carrier."""
    info = torch.finfo(dtype)
    quantum = info.smallest_normal * info.eps
    for numbers in (
        [3 * quantum, -quantum, 2 * quantum],
        [info.smallest_normal, quantum, -info.smallest_normal * 0.75],
        [info.max / 2, quantum, -info.smallest_normal, 1.5],
        [1e10, quantum, -quantum],
    ):
        x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
        power, want = scaled(x.tolist(), "e4m3fn", rounding, dtype)
        for on in (False, True):
            with flushing(on):
                scale = fpsim.power_of_two_scale(x, "e4m3fn")
                got = fpsim.round(x, "e4m3fn", rounding=rounding, scale="power_of_two")
                leaf = fpsim.round(x.clone().requires_grad_(), "e4m3fn", rounding=rounding, scale="power_of_two")
            assert float(scale) == 2.0**power
            assert codes_of(got).tolist() == codes_of(leaf.detach()).tolist() == want, (numbers, on)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "int8/row", "nf4"])
def test_codes_and_scales_of_subnormal_blocks(name: str) -> None:
    x = torch.randint(-(1 << 23), 1 << 23, (4, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = (x.abs() | (x & -(1 << 31))).view(torch.float32)
    want = codes_of(fpsim.round(x, name))
    for on in (False, True):
        with flushing(on):
            got = fpsim.decode_blocks(*fpsim.encode_blocks(x, name), name)
        assert_codes(codes_of(got), want, codes_of(x))


def test_arithmetic_before_rounding() -> None:
    """That of transforms, and that of attention in tiles: with one key the result is its value."""
    subnormal = torch.tensor([[3, -5, 1, 7], [2, 0, -1, 4]], dtype=torch.int32).float() * 2.0**-133
    larger, one = subnormal * 2.0**6, torch.ones(1, 1, 1, 4)
    calls = [
        lambda: fpsim.round(subnormal, "e8m22/hadamard:4"),
        lambda: fpsim.round(larger, "e4m3fn/group:4/expand"),
        lambda: fpsim.flash_attention(one, one, subnormal[:1, None, None], steps="all_bf16"),
    ]
    want = [codes_of(call()).tolist() for call in calls]
    assert want[0] == codes_of(subnormal).tolist()  # the rotation by 1/2 and back is exact
    assert want[2] == [[[codes_of(subnormal[0]).tolist()]]]
    for on in (False, True):
        with flushing(on):
            got = [codes_of(call()).tolist() for call in calls]
            still = subnormal[0, :1] * 1
        assert got == want
        assert (still.view(torch.int32).item() == 0) == on  # the flag is as it was


# -- compiled ------------------------------------------------------------------------------------------------------


COMPILED = [CASES[i] for i in (0, 1, 4, 6, 8, 11)]
TINY = COMPILED.index(("bf16", torch.float32))


def rounded(xs: list[Tensor]) -> list[Tensor]:
    results = [
        fpsim.round(x, name, rounding=rounding)
        for x, (name, _) in zip(xs, COMPILED, strict=True)
        for rounding in ("nearest_even", "up")
    ]
    return [*results, fpsim.round(xs[TINY], "e4m3fn", scale="power_of_two")]


@pytest.mark.parametrize(
    ("unsafe", "compiling", "running"),
    [(False, True, (False, True)), (False, False, (True,)), (True, False, (False, True))],
)
def test_compiled_code(unsafe: bool, compiling: bool, running: tuple[bool, ...]) -> None:
    """``unsafe`` is Inductor's flag for unsafe math, whose libraries flush subnormals once they are loaded.

    Each case has sizes of its own, or torch's caches would return the code of another one.
    """
    size = 100 + 2 * unsafe + compiling
    inputs = [inputs_of(name, dtype).sample(size) for name, dtype in COMPILED]
    tiny = inputs[TINY] = Inputs(range(0, 9973 * size, 9973), torch.float32)
    wanted = [
        expected(given, parse_format(name), rounding)
        for given, (name, _) in zip(inputs, COMPILED, strict=True)
        for rounding in ("nearest_even", "up")
    ]
    _, want = scaled(tiny.tensor.tolist(), "e4m3fn", "nearest_even", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rounded, fullgraph=True, options={"cpp.enable_unsafe_math_opt_flag": unsafe})
    leaves = [given.tensor.clone().requires_grad_() for given in inputs]
    with flushing(compiling):
        compiled(leaves)
    for on in running:
        with flushing(on):
            results = [result.detach() for result in compiled(leaves)]
        for i, (got, right) in enumerate(zip(results, wanted, strict=False)):
            given = inputs[i // 2]
            assert_codes(canonical(codes_of(got), given.dtype), right, given.codes, (COMPILED[i // 2], on))
        assert codes_of(results[-1]).tolist() == want


def test_the_backend_rounds_results_as_without_the_flag() -> None:
    inputs = inputs_of("bf16", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(torch.neg, backend="fpsim_eager", options={"elementwise": "bf16"})
    negated = Inputs(inputs.codes ^ inputs.codes.dtype.type(1 << 31), torch.float32)
    want = expected(negated, parse_format("bf16"), "nearest_even")
    for x in (negated.tensor.neg(), negated.tensor.neg().requires_grad_()):
        with flushing():
            got = compiled(x).detach()
        assert_codes(canonical(codes_of(got), torch.float32), want, negated.codes)
