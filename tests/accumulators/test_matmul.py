"""Products of narrow accumulators: the bits of the reference, in every order and rounding, and errors with remedies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fpsim
from fpsim import matmul
from fpsim.formats import parse_format
from fpsim.reference import Aligned, dot, round, sum, to_float
from fpsim.rounding.random_words import random_word
from tests.accumulators.numpy_model import UNITS
from tests.accumulators.test_reference import operands

#: A function from two lists of numbers, the format of their values and the index of an element of the result to a sum.
Judge = Callable[[list[float], list[float], str, int], Any]


def bits(x: Tensor) -> list[int]:
    """The bits of float32 numbers; all NaNs count as one."""
    x = x.to(torch.float32)
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(torch.int32).flatten().tolist()


def check(judge: Judge, fmt: str, shape: tuple[int, int, int], draw: int, **arguments: Any) -> None:
    """Compare `matmul` with ``judge`` on numbers of ``fmt``; ``shape`` is (M, K, N). Some products cancel."""
    m, k, n = shape
    a, b = operands(fmt, (m, k), draw), operands(fmt, (n, k), draw + 1).T
    half = k // 2
    a[: m // 2, half : 2 * half], b[half : 2 * half, : n // 2] = -a[: m // 2, :half], b[:half, : n // 2]
    got = matmul(*(torch.tensor(x, dtype=torch.float32) for x in (a, b)), format=fmt, **arguments)
    wanted = [
        to_float(round(judge(a[i].tolist(), b[:, j].tolist(), fmt, i * n + j), "fp32"))
        for i in range(m)
        for j in range(n)
    ]
    assert bits(got) == bits(torch.tensor(wanted)), (fmt, shape, arguments)


def with_order(accumulator: str, order: Any, *modes: str, **options: Any) -> Judge:
    return lambda x, y, fmt, i: dot(x, y, "fp32", *modes, accumulator=accumulator, order=order, operands=fmt, **options)


SHAPES = ((2, 0, 3), (2, 1, 2), (3, 7, 6), (2, 37, 2))
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", ["e4m3fn", "fp16", "bf16", "fp32"])
def test_every_order_has_the_bits_of_the_reference(fmt: str, rounding: str) -> None:
    """Exact in float64 or not, with infinities, NaN, both zeros, subnormal numbers and cancellation."""
    accumulators = {"e4m3fn": ("e8m13", "e5m4:nosubnormals"), "bf16": ("e8m13",)}.get(fmt, ("fp32", "fp16"))
    for accumulator in accumulators:
        for seed, shape in enumerate(SHAPES):
            text = f"{accumulator}/{rounding}"
            check(with_order(accumulator, "sequential", rounding), fmt, shape, seed, accumulator=text)
            check(with_order(accumulator, "pairwise", rounding), fmt, shape, seed, accumulator=text, order="pairwise")
            check(with_order(accumulator, ("chunked", 3), rounding), fmt, shape, seed, accumulator=text, chunk=3)
            check(with_order(accumulator, ("chunked", 32), rounding), fmt, shape, seed, accumulator=text, chunk=32)


def test_products_are_rounded_before_the_sum_if_asked() -> None:
    for fmt, accumulator in (("bf16", "bf16"), ("fp16", "fp16"), ("e5m2", "e6m3")):
        for rounding in ROUNDINGS:
            judge = with_order(accumulator, "sequential", rounding, product=accumulator)
            check(judge, fmt, (3, 9, 4), 5, accumulator=f"{accumulator}/{rounding}", order="multiply_add")


@pytest.mark.parametrize("overflow", ["ovf_inf", "sat_finite", "sat_propagate"])
def test_overflow_modes(overflow: str) -> None:
    for accumulator in ("e4m3fn", "e4m3", "e5m4"):
        for rounding in ROUNDINGS:
            modes = (rounding, overflow)
            text = f"{accumulator}/{rounding}/{overflow}"
            check(with_order(accumulator, "sequential", *modes), "e4m3fn", (3, 9, 4), 1, accumulator=text)
            check(with_order(accumulator, ("chunked", 4), *modes), "e4m3fn", (3, 9, 4), 2, accumulator=text, chunk=4)


@pytest.mark.parametrize(("machine", "fmt"), UNITS)
def test_machines_have_the_bits_of_the_reference(machine: str, fmt: str) -> None:
    unit = UNITS[machine, fmt]
    order = Aligned(unit.length, unit.bits, None if unit.late else unit.floor, unit.late, unit.lanes)
    rounding = "nearest_even" if unit.nearest else "toward_zero"
    judge = with_order(f"e8m{unit.precision - 1}", order, rounding)
    for seed, shape in enumerate([*SHAPES, (4, 2 * unit.length + 3, 17)]):
        check(judge, fmt, shape, seed, accumulator=machine)


def test_machines_that_accumulate_in_fp16() -> None:
    for machine, length, fraction_bits, floor in (
        ("volta", 4, 23, -19),
        ("ampere", 8, 24, -20),
        ("hopper", 16, 25, -21),
    ):
        judge = with_order("fp16", Aligned(length, fraction_bits, floor))
        check(judge, "fp16", (5, 37, 6), 3, accumulator=f"{machine}/fp16")


def test_an_aligned_order_of_ones_own() -> None:
    for accumulator, rounding in (("e5m6", "nearest_even"), ("fp16", "toward_zero"), ("e4m3fn", "down")):
        judge = with_order(accumulator, ("aligned", 5, 9), rounding)
        check(judge, "e4m3fn", (4, 23, 9), 7, accumulator=f"{accumulator}/{rounding}", order=("aligned", 5, 9))


def test_machines_that_add_pairs() -> None:
    """Each from the reference's own sums: the steps of the manuals, with subnormal operands and results as zeros."""
    exact = {"accumulator": "e8m23:nosubnormals"}

    def flushed(numbers: list[float], fmt: str) -> list[float]:
        least = parse_format(fmt).smallest_normal
        return [math.copysign(0.0, x) if abs(x) < least else x for x in numbers]

    def machine(length: int, part: Callable[[list[float], list[float]], Any], rounding: str = "nearest_even") -> Judge:
        def judge(x: list[float], y: list[float], fmt: str, i: int) -> Any:
            x, y = flushed(x, fmt), flushed(y, fmt)
            sums = [part(x[k : k + length], y[k : k + length]) for k in range(0, len(x), length)]
            return sum([0, *sums], "fp32", rounding, **exact)

        return judge

    product = "e8m23:nosubnormals"
    pairs = machine(2, lambda x, y: dot(x, y, "fp32", "to_odd", order="pairwise", product=product, **exact), "to_odd")
    fours = machine(4, lambda x, y: dot(x, y, "fp32", order="pairwise", product=product, **exact))
    lanes = machine(32, lambda x, y: dot(x, y, "fp32", order=("interleaved", 2), **exact))
    for seed, shape in enumerate(SHAPES):
        check(pairs, "bf16", shape, seed, accumulator="arm_bfdot")
        check(lanes, "bf16", shape, seed, accumulator="amx_bf16")
        for fmt, length in (("fp16", 4), ("bf16", 2)):
            check(fours, fmt, shape, seed, accumulator="mi250")
            check(with_order("fp32", ("chunked", length)), fmt, shape, seed, accumulator="mi100")


def test_partial_sums_move_to_float32() -> None:
    def promoted(length: int, part: Callable[..., Any]) -> Judge:
        def judge(x: list[float], y: list[float], fmt: str, i: int) -> Any:
            sums = [part(x[k : k + length], y[k : k + length], fmt, i) for k in range(0, len(x), length)]
            return sum(sums, "fp32", accumulator="fp32")

        return judge

    hopper = with_order("e8m13", Aligned(32, 13), "toward_zero")
    check(promoted(64, hopper), "e4m3fn", (4, 150, 17), 1, accumulator="hopper_fp8", promote=64)
    check(
        promoted(8, with_order("fp16", ("chunked", 4))), "fp16", (4, 30, 17), 2, accumulator="fp16", chunk=4, promote=8
    )
    check(
        promoted(5, with_order("bf16", "pairwise")),
        "bf16",
        (4, 30, 17),
        3,
        accumulator="bf16",
        order="pairwise",
        promote=5,
    )


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic:3", "stochastic_b:8", "stochastic_c:8"])
def test_stochastic_sums_draw_one_number_for_each_rounding(rounding: str) -> None:
    """The numbers are those of `random_word` at element * roundings + rounding, from the key of the seed."""
    key = torch.ops.fpsim.random_key(torch.tensor([11]), 3)
    count = int(rounding.partition(":")[2] or 23)
    m, k, n = 3, 9, 5

    def numbers(roundings: int, element: int) -> Callable[[int], int]:
        def number(step: int) -> int:
            index = torch.tensor(element * roundings + step)
            word = int(random_word(key[0] ^ index.to(torch.int32), key[1] ^ (index >> 32).to(torch.int32)))
            return (word & 0xFFFFFFFF) >> (32 - count) if step < roundings else 0

        return number

    for order, roundings in (("sequential", k), (("chunked", 4), 3), ("pairwise", k)):

        def judge(x: list[float], y: list[float], fmt: str, i: int, order: Any = order, r: int = roundings) -> Any:
            return dot(x, y, "fp32", rounding, accumulator="e5m6", order=order, random=numbers(r, i))

        check(judge, "e4m3fn", (m, k, n), 8, accumulator=f"e5m6/{rounding}", order=order, seed=11, salt=3)


def test_integers_wrap_around_or_saturate() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.integers(-127, 128, (5, 70)), draw.integers(-127, 128, (70, 19))
    a[0], b[:, 0] = 127, 127
    left, right = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    exact = a @ b
    assert matmul(left, right, accumulator="int32").tolist() == exact.tolist()
    wrapped = ((exact + 2**15) % 2**16 - 2**15).tolist()
    assert matmul(left, right, accumulator="int16/wrap", format="int8/unscaled").tolist() == wrapped
    saturated = np.zeros_like(exact)
    for k in range(70):
        saturated = np.clip(saturated + np.outer(a[:, k], b[k]), -(2**15), 2**15 - 1)
    assert matmul(left, right, accumulator="int16/sat_finite").tolist() == saturated.tolist()


def test_vectors_that_tell_machines_apart() -> None:
    """On real units: 448 + 2**-6, and 131,072 products of 2**-10, which Hopper adds up to 16 without promotion."""
    a, b = torch.tensor([[448.0, 1.0]]), torch.tensor([[1.0], [2.0**-6]])
    assert matmul(a, b, accumulator="hopper_fp8").item() == 448
    assert matmul(a, b, accumulator="blackwell").item() == 448.015625
    x = torch.full((131072,), 2.0**-5)
    assert matmul(x, x, accumulator="hopper_fp8").item() == 16
    assert matmul(x, x, accumulator="hopper_fp8", promote=128).item() == 128
    assert matmul(x, x, accumulator="e8m13/toward_zero", chunk=32).item() == 128


def test_shapes_dtypes_and_layouts_are_those_of_matmul() -> None:
    """Sums of small integers are exact, so that torch's own product is the judge."""
    draw = torch.Generator().manual_seed(1)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=draw).float()

    shapes = [((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (5, 3, 4)),
              ((2, 1, 2, 3), (5, 3, 4)), ((3,), (5, 3, 4)), ((5, 2, 3), (3,)), ((0, 3), (3, 2)),
              ((2, 0), (0, 2))]  # fmt: skip
    for left, right in shapes:
        a, b = integers(*left), integers(*right)
        assert torch.equal(matmul(a, b, accumulator="fp32"), a @ b), (left, right)
    a, b = integers(33, 40), integers(20, 40)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        got = matmul(a.to(dtype), b.to(dtype).T, accumulator="fp32", chunk=8)
        assert got.dtype == (dtype if dtype.itemsize > 1 else torch.float32)
        assert torch.equal(got.double(), (a @ b.T).to(got.dtype).double())
    assert torch.equal(matmul(a[::2, 1::3], b.T[1::3, ::2], accumulator="fp32"), a[::2, 1::3] @ b.T[1::3, ::2])


def test_the_number_of_threads_and_flushing_of_subnormals_change_no_bit() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(64, 64, generator=draw) * 2.0**-70 for _ in range(2))
    wanted = [bits(matmul(a, b, accumulator="fp32", chunk=n)) for n in (1, 7)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        got = [matmul(a, b, accumulator="fp32", chunk=n).view(torch.int32) for n in (1, 7)]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert [x.flatten().tolist() for x in got] == wanted


def test_nvidia_delivers_its_own_nan() -> None:
    x = torch.tensor([[math.nan]])
    assert matmul(x, x, accumulator="hopper_fp8").view(torch.int32).item() == 0x7FFFFFFF
    assert matmul(x, x, accumulator="fp32").view(torch.int32).item() == 0x7FC00000


def test_the_derivative_is_that_of_the_product_of_rounded_operands() -> None:
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    matmul(a, b.T, accumulator="e8m13", format="e4m3fn").square().sum().backward()
    value = matmul(a, b.T, accumulator="e8m13", format="e4m3fn").detach()
    with torch.no_grad():
        left, right = fpsim.round(a, "e4m3fn"), fpsim.round(b, "e4m3fn")
    torch.testing.assert_close(a.grad, 2 * value @ right)
    torch.testing.assert_close(b.grad, (2 * value).T @ left)


X = torch.ones(2, 2)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"accumulator": "hoper_fp8"}, r"unknown accumulator 'hoper_fp8' .did you mean 'hopper_fp8'.*Machines are volta"),
    ({"accumulator": "e9z"}, "unknown format 'e9z'.*Machines are volta, ampere"),
    ({"accumulator": "fp16", "chunk": 0}, "chunk is a number of products from 1, got 0"),
    ({"accumulator": "fp16", "order": ("chunked", 0)}, r"unknown order \('chunked', 0\): use sequential"),
    ({"accumulator": "fp16", "chunk": 4, "order": "pairwise"}, "chunk=4 is an order of its own: leave out"),
    ({"accumulator": "hopper_fp8", "chunk": 4}, "hopper_fp8 has its own order: leave out chunk=4"),
    ({"accumulator": "hopper_fp8", "promote": 48}, "promote=48 is no multiple of the 32 products.*use 128"),
    ({"accumulator": "e8m13", "chunk": 32, "promote": 48}, "promote=48 is no multiple of the 32 products"),
    ({"accumulator": "hopper_fp8/fp16"}, "hopper_fp8 accumulates in fp32 only, got 'fp16'"),
    ({"accumulator": "hopper_fp8", "format": "bf16"}, "hopper_fp8 multiplies e4m3fn and e5m2, and not e8m7: "
     "accumulator='ampere' multiplies these"),
    ({"accumulator": "hopper", "format": ("fp16", "bf16")}, "hopper multiplies fp16, or bf16, or tf32, and not"),
    ({"accumulator": "hopper_fp8", "format": "mxfp8"}, "multiplies elements.*use an unscaled format such as 'e4m3fn'"),
    ({"accumulator": "blackwell_nvfp4"}, "'blackwell_nvfp4' is not simulated: the scales of blocks join its sums"),
    ({"accumulator": "e5m10/stochastic"}, "needs a seed"),
    ({"accumulator": "fp16", "seed": 1}, "a seed has no meaning with accumulator='e5m10/nearest_even/ovf_inf'"),
    ({"accumulator": "e2m3", "format": "fp16"}, "fewer than the operands in e5m10 .11.: it would round"),
    ({"accumulator": "int8", "format": "int8/unscaled"}, "narrower than a single product.*reaches 16129: use 'int32'"),
    ({"accumulator": "int32", "format": "fp16"}, "adds products of integers, got e5m10"),
    ({"accumulator": "int32", "chunk": 4}, "the sums of 'int32' are exact: leave out chunk"),
    ({"accumulator": "int40"}, "an integer accumulator has 2 to 32 bits"),
    ({"accumulator": "int16/wrapp"}, "unknown mode 'wrapp' of an integer accumulator: use wrap or sat_finite"),
    ({"accumulator": "fp64"}, "an accumulator fits into float32, got e11m52: use 'fp32'"),
    ({"accumulator": "e8m0fnu"}, "an accumulator has a sign, -0, NaN and mantissa bits, and e8m0fnu lacks"),
    ({"accumulator": "mxfp8"}, "an accumulator has no scale"),
    ({"accumulator": "fp32/stochastic:30"}, "takes up to 26 random bits, got 'fp32/stochastic:30': use ':26'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_arguments_name_the_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(X, X, **arguments)


def test_bad_operands_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="values that none of e4m3fn, e5m2 has: give format='e4m3fn', which rounds it"):
        matmul(X / 3, X, accumulator="hopper_fp8")
    with pytest.raises(ValueError, match="none of fp32 has: give format='fp32'"):
        matmul(X.double() / 3, X.double(), accumulator="fp32")
    with pytest.raises(TypeError, match=r"operands have one dtype, got torch.float32 and torch.float16"):
        matmul(X, X.half(), accumulator="fp32")
    with pytest.raises(ValueError, match="cannot be multiplied: they sum over other lengths"):
        matmul(X, torch.ones(3, 2), accumulator="fp32")
    with pytest.raises(TypeError, match="an accumulator is a name such as"):
        matmul(X, X, accumulator=16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chunk is a number of products from 1, got 2"):
        matmul(X, X, accumulator="fp16", chunk=2.0)  # type: ignore[arg-type]
