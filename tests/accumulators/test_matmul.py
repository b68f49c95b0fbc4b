"""Products of narrow accumulators: the bits of the reference, in every order and rounding, and errors with remedies."""

from __future__ import annotations

import math
import warnings
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
from tests.accumulators import judges
from tests.accumulators.numpy_model import UNITS
from tests.accumulators.test_reference import operands

#: A function from two lists of numbers, the format of their values and the index of an element of the result to a sum.
Judge = Callable[[list[float], list[float], str, int], Any]


def bits(x: Tensor) -> list[int]:
    """The bits of float32 numbers; all NaNs count as one."""
    x = x.to(torch.float32)
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(torch.int32).flatten().tolist()


def normal_operands(fmt: str, shape: tuple[int, int], draw: int, spread: int) -> np.ndarray:
    """Numbers of ``fmt`` with exponents from -spread to spread and some zeros; in the first row, mantissas near 2."""
    generator = np.random.default_rng(draw)
    x = generator.standard_normal(shape) * 2.0 ** generator.integers(-spread, spread + 1, shape)
    x *= generator.random(shape) < 0.8
    x[:1] = 1.9999
    return fpsim.round(torch.tensor(x, dtype=torch.float32), f"{fmt}/toward_zero").double().numpy()


def check(
    judge: Judge, fmt: str, shape: tuple[int, int, int], draw: int, spread: int | None = None, **arguments: Any
) -> None:
    """Compare `matmul` with ``judge`` on numbers of ``fmt``; ``shape`` is (M, K, N). Some products cancel.

    The numbers are any of the format, or have exponents from -spread to spread.
    """
    m, k, n = shape
    take = operands if spread is None else lambda *given: normal_operands(*given, spread)
    a, b = take(fmt, (m, k), draw), take(fmt, (n, k), draw + 1).T
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


def test_small_terms_raise_a_sum_that_is_rounded_up_beyond_all_exact_sums() -> None:
    """Every step rounds up by a unit, which grows with the sum: 36 + 599 quarters become 2**80."""
    steps = torch.full((1, 600), 0.5)
    steps[0, 0], terms = 6, [36.0] + [0.25] * 599
    for order in ("sequential", ("chunked", 2)):
        wanted = to_float(sum(terms, "fp32", "up", accumulator="e8m3", order=order))
        assert wanted > 2.0**40
        assert matmul(steps, steps.T, accumulator="e8m3/up", format="e2m1fn", order=order).item() == wanted


def test_exact_sums_keep_the_smallest_products_beside_the_largest() -> None:
    """The exact sum is 2**-298, the product of the smallest numbers: only a rounding up or to odd shows it."""
    a, b = torch.tensor([2.0**127, 2.0**-149, -(2.0**127)]), torch.tensor([2.0**127, 2.0**-149, 2.0**127])
    for rounding, wanted in (("up", 2.0**-149), ("to_odd", 2.0**-149), ("nearest_even", 0.0), ("down", 0.0)):
        assert matmul(a, b, accumulator=f"fp32/{rounding}", chunk=3).item() == wanted


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
    for spread in (0, 20, 60) if fmt in ("bf16", "tf32") else (0, 3, 6):
        check(judge, fmt, (3, 2 * unit.length + 3, 17), 40 + spread, spread, accumulator=machine)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "to_odd"])
def test_long_chunks_have_the_bits_of_the_reference(rounding: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that torch adds, or the kernel: a sample, sums of products that are -0; batches, and many columns."""
    monkeypatch.setattr("fpsim.accumulators.cpu._has_wide_vectors", lambda: wide)
    for shape, accumulator in (((66, 130, 64), "e8m13"), ((3, 65, 2000), "bf16"), ((2, 64, 70000), "e5m4")):
        m, k, n = shape
        a, b = normal_operands("e4m3fn", (m, k), 1, 3), normal_operands("e4m3fn", (n, k), 2, 3).T.copy()
        a[1], b[:, 5] = -0.0, 1.0
        product = matmul(
            *(torch.tensor(x, dtype=torch.float32).expand(2, *x.shape) for x in (a, b)),
            accumulator=f"{accumulator}/{rounding}", chunk=64, format="e4m3fn",
        )  # fmt: skip
        judge = with_order(accumulator, ("chunked", 64), rounding)
        places = [(1, 5), *((int(i), int(j)) for i, j in np.random.default_rng(3).integers((m, n), size=(40, 2)))]
        wanted = [to_float(round(judge(a[i].tolist(), b[:, j].tolist(), "e4m3fn", 0), "fp32")) for i, j in places]
        for batch in range(2):
            assert bits(torch.stack([product[batch, i, j] for i, j in places])) == bits(torch.tensor(wanted))
    assert math.copysign(1.0, product[1, 1, 5].item()) == -1.0


def test_machines_that_accumulate_in_fp16() -> None:
    for machine, length, fraction_bits, floor in (
        ("volta", 4, 23, -19),
        ("ampere", 8, 24, -20),
        ("hopper", 16, 25, -21),
    ):
        judge = with_order("fp16", Aligned(length, fraction_bits, floor))
        for spread in (None, 0, 6):
            check(judge, "fp16", (5, 37, 6), 3, spread, accumulator=f"{machine}/fp16")


def test_an_aligned_order_of_ones_own() -> None:
    for accumulator, rounding in (("e5m6", "nearest_even"), ("fp16", "toward_zero"), ("e4m3fn", "down")):
        judge = with_order(accumulator, ("aligned", 5, 9), rounding)
        check(judge, "e4m3fn", (4, 23, 9), 7, accumulator=f"{accumulator}/{rounding}", order=("aligned", 5, 9))


#: Results of the AMX unit of an Intel Xeon (TDPBF16PS twice, from zero): the bits of a and b in bfloat16, and of
#: a . b in float32.
AMX: list[tuple[str, str, str]] = [
        (
            "40ec 4005 be5b c05a 4081 be0a bc86 c138 3dc8 be1b c12d be3b 3ffd bd57 be16 bf48 "
            "4032 3f9c be2c bef7 be05 be9a 3c94 bf99 be60 3f47 bbef c082 40be 3efd 3e7f 4160 "
            "be86 bebb 4159 bfb7 3ff6 3d13 4070 c19a bf97 3f66 3f8c c052 c0e8 bf54 be07 bfd9 "
            "3ed1 3fd2 3d5d 410b 3f31 3fab c012 c0d2 c0e5 40e1 410b bfbe 3ffe 3fbe 4023 4029",
            "3f5e bf0e 3f11 3d70 bfa1 3f2d 3fa8 3f8f bf65 3eaf 3f54 bf0a be5b be94 3f8d 400f "
            "bead bc6b bf78 3fbb 3ed1 bfbc bf46 c007 bf99 4000 bcc5 b982 be41 bf84 bf86 bbf5 "
            "bfce bbdf 3fb3 bf67 3d2c 3ff5 be94 bfdf bf84 3f9a bf81 3f59 3e8d bed8 3f25 3f81 "
            "bf8a bf9a 400a bfde bfb6 3e9f bf38 be95 3ede 3e53 bebd be9b 3f13 bea0 bf7a bee8",
            "405046e0",
        ),
        (
            "be05 3fc8 3e9e 3ec0 4072 3f9b c061 c03e 3d91 bfc0 c01e be1b be7c bd8c 3f6f 3c9a "
            "c0d1 bd45 3e4e beb8 bc15 bf8c 3f7a c0a7 bf3a 3e06 40ff 40ed 4076 bcc2 3d85 3da7 "
            "bdd5 bebe 409e c038 bde4 bf05 beee 4064 3d83 4086 3edb c09a be3b 3c87 4001 bce4 "
            "bde5 bcd7 40ee c040 3db5 4000 be40 be29 bea0 4092 be2a 3e68 3f3a be1a c0d3 3deb",
            "3fa9 3f9c bf1a 3f10 3e6b bf75 be58 3ee3 bf4e bf17 3f0e 3e71 c006 bf2d bed8 3f4d "
            "bfa6 bd5d 3e2a bf4d 3ff2 c01e 3f9e 3fcb bef2 3ef1 be05 be6f 3f03 3db5 be6d 3f54 "
            "3f04 3fbc 3e07 3efb bf27 bf70 bf4c 3f33 bfcd 3f72 beaf c000 3f1b bf3c 3f9f bf9a "
            "3fa0 3f80 bfb4 3c29 bf22 3fb6 bf88 3f87 3eae 3e90 bf8e 3f76 bf7b bcb1 3ea7 3e1d",
            "41544f58",
        ),
        (
            "1d9a 9d88 1ed8 1f59 9fda 1ed4 9fab 1f8b 9fdb 9dcf 1fa6 9dd4 9f49 9f49 9e61 9f0a "
            "9f27 1f0d 201d 1e28 1ead 9e7f a001 1d74 1e38 1f5c 1f8c 9ecf 1f6b 9f40 9f6f 9f73 "
            "9fef 9f69 9f03 1ecb 9de3 1ca0 9f1e 1f13 9f7f 9fba 9ee2 1f80 1f21 1f81 1f5d 9f31 "
            "1fdb 9ec2 1f24 9ede 1e85 9f73 9e51 9f9f 9dba 1f1e 1f0a 9f40 9dc2 9f8b 1f6b 9d74",
            "a03e a076 9fa4 1ff2 2093 9f56 a04e 1f01 1f92 1f97 a024 1fb5 1f22 a098 9e8e 205b "
            "9dde 2011 9f79 9f19 9faa 1f02 a045 1ffc a02f 2014 1fcb 9f8e 1e73 a05d 9f09 a070 "
            "9f6e 1fc2 1eb8 2001 9ed8 9e07 1f2d 201c 200f 1dce 9f15 9f97 1f6f 1da1 1f94 a018 "
            "9f1f 1f8e 1fd6 a027 9eaf 9d57 9dc1 9f37 a060 1fec 1ff1 9f2c 1fff 1dea 9e81 a042",
            "0102a434",
        ),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "result"), AMX)
def test_amx_has_the_results_of_the_processor(a: str, b: str, result: str) -> None:
    """In the last one, products below 2**-126 count although a result below would be zero."""
    x, y = (torch.tensor([int(word, 16) << 16 for word in words.split()]) for words in (a, b))
    x, y = (torch.where(z >= 2**31, z - 2**32, z).to(torch.int32).view(torch.float32) for z in (x, y))
    assert matmul(x, y, accumulator="amx_bf16").view(torch.int32).item() == int(result, 16)


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
    for spread in (0, 3, 40):  # float32 itself adds products that are far from the ends of its range
        for length in (1, 2, 3, 67):
            check(lanes, "bf16", (3, length, 17), length, spread, accumulator="amx_bf16")
            check(fours, "bf16", (3, length, 17), length, spread, accumulator="mi250")


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


def test_derivatives_in_forward_mode_are_those_of_torch() -> None:
    """Directional derivatives, Jacobians and Hessians; of elements with scales of blocks too. All numbers are exact."""
    draw = torch.Generator().manual_seed(1)
    a, b, direction = (torch.randint(-4, 5, shape, generator=draw).float() for shape in ((3, 4), (4, 2), (3, 4)))
    for arguments in ({"accumulator": "e8m13"}, {"accumulator": "blackwell_mxfp8", "format": "mxfp8"}):

        def product(x: Tensor, arguments: Any = arguments) -> Tensor:
            return matmul(x, b, **arguments)

        value, tangent = torch.func.jvp(product, (a,), (direction,))
        assert torch.equal(value, a @ b) and torch.equal(tangent, direction @ b)
        with torch.autograd.forward_ad.dual_level():
            dual = product(torch.autograd.forward_ad.make_dual(a, direction))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, direction @ b)
        assert torch.equal(torch.func.jacfwd(product)(a), torch.func.jacrev(lambda x: x @ b)(a))
        hessians = [torch.func.hessian(lambda x, f=f: f(x).square().sum())(a) for f in (product, lambda x: x @ b)]
        assert torch.equal(*hessians)
    empty = matmul(a[:, :0].requires_grad_(), b[:0], accumulator="blackwell_mxfp8", format="mxfp8")
    assert empty.requires_grad and torch.equal(empty, torch.zeros(3, 2))


def test_samples_of_vmap_have_sums_of_their_own() -> None:
    """Without a warning that torch runs them one by one."""
    a, b = torch.randn(3, 2, 40), torch.randn(40, 3, 5)
    for arguments in (
        {"accumulator": "e5m4", "format": "e4m3fn"}, {"accumulator": "blackwell_nvfp4", "format": "nvfp4"},
        {"accumulator": "hopper_fp8", "format": "e4m3fn/block:32", "promote": 32},
    ):  # fmt: skip
        wanted = torch.stack([matmul(a[i], b[:, i], **arguments) for i in range(3)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = torch.vmap(lambda x, y, arguments=arguments: matmul(x, y, **arguments), (0, 1))(a, b)
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"only format tells what it holds: give format='e4m3fn'"):
        torch.vmap(lambda x: matmul(x, x, accumulator="hopper_fp8"))(torch.ones(2, 3, 3))


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
    ({"accumulator": "hopper_fp8", "format": "e4m3fn/row"}, "multiplies elements.*use an unscaled format"),
    ({"accumulator": "blackwell_nvfp4"}, "multiplies elements with scales, got 'no format': give format='nvfp4'"),
    ({"accumulator": "blackwell_mxfp8", "format": "nvfp4"}, "multiplies elements with scales, got 'e2m1fn.*'mxfp8'"),
    ({"accumulator": "blackwell_nvfp4", "format": "mxfp8"}, "blackwell_nvfp4 multiplies e2m1fn, and not e4m3fn"),
    ({"accumulator": "blackwell_nvfp4", "format": ("nvfp4", "mxfp4")}, "takes blocks of one size, got 16 and 32"),
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
    ({"accumulator": "e8m13/hadamard:16"}, "an accumulator has no transform: leave 'hadamard:16' out"),
    ({"accumulator": "hopper_fp8", "format": "e4m3fn/hadamard:2"}, "multiplies elements.* that its transform changes"),
    ({"accumulator": "int32", "format": "int8/power_of_two/hadamard:2"}, "multiplies elements.* that its transform"),
    ({"accumulator": "fp16 chunk=4 chunk=8"}, "names chunk more than once"),
    ({"accumulator": "fp32/stochastic:30"}, "takes up to 26 random bits, got 'fp32/stochastic:30': use ':26'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_arguments_name_the_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(X, X, **arguments)


def test_operands_have_the_transforms_of_their_casts() -> None:
    """The sums and differences of pairs, rounded, and their sums and differences: a rotation there and back."""
    a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0], [0.3125]])
    half = torch.tensor(0.5).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[0] + x[1], x[0] - x[1]]) * half

    u, v = (rotated(rotated(x.flatten()).to(torch.float8_e5m2).float()) for x in (a, b))
    want = (u.double() * v.double()).sum().float()
    assert matmul(a, b, accumulator="fp32", chunk=2, format="e5m2/hadamard:2").item() == want.item()
    assert want.item() != (a @ b).item()


def test_bad_operands_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"values that none of e4m3fn, e5m2 has.*give format='e4m3fn', which rounds"):
        matmul(X / 3, X, accumulator="hopper_fp8")
    with pytest.raises(ValueError, match=r"none of e8m23 has, or.*give format='e8m23'"):
        matmul(X.double() / 3, X.double(), accumulator="fp32")
    with pytest.raises(TypeError, match=r"operands have one dtype, got torch.float32 and torch.float16"):
        matmul(X, X.half(), accumulator="fp32")
    with pytest.raises(ValueError, match="cannot be multiplied: they sum over other lengths"):
        matmul(X, torch.ones(3, 2), accumulator="fp32")
    with pytest.raises(ValueError, match=r"shapes \(2, 1, 2\) and \(3, 2, 2\).*their batches are not broadcast to one"):
        matmul(torch.ones(2, 1, 2), torch.ones(3, 2, 2), accumulator="fp32")
    with pytest.raises(ValueError, match=r"on one device, got cpu and meta: use b.to\(a.device\)"):
        matmul(X, X.to("meta"), accumulator="fp32")
    with pytest.raises(TypeError, match=r"cannot matmul a tensor of torch.int32: convert it to float64.*x.float\(\)"):
        matmul(X.int(), X.int(), accumulator="int32")
    for order in (4, {"aligned": 4}, ("aligned", 4.0, 9), ("aligned", True, 9), ("aligned", [4], 9)):
        with pytest.raises(TypeError, match="order is a name, or a name with numbers such as"):
            matmul(X, X, accumulator="fp16", order=order)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"salt must be an int, got 0\.5"):
        matmul(X, X, accumulator="fp16/stochastic", seed=1, salt=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an accumulator is a name such as"):
        matmul(X, X, accumulator=16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chunk is a number of products from 1, got 2"):
        matmul(X, X, accumulator="fp16", chunk=2.0)  # type: ignore[arg-type]


#: From mmaemu 0.1.0 (`tests.accumulators.judges`), which replays recorded calls of `torch._scaled_mm` on an H100 PCIe
#: and an RTX 4060: by GPU and fast accumulation, elements of the diagonal, and the sum of the bits of all results.
MMAEMU: dict[tuple[str, bool], tuple[list[float], int]] = {
    ("hopper", True): ([-17388.0, 82056.0, 33992.0, 162160.0, 35536.0, -36808.0], 70716919808),
    ("hopper", False): ([-17354.875, 82045.25, 33969.0, 162230.09375, 35532.87109375, -36803.0], 70716640581),
    ("ada", True): ([-17390.0, 82056.0, 33984.0, 162160.0, 35528.0, -36812.0], 70717110272),
    ("ada", False): ([-17352.625, 82044.375, 33970.75, 162230.15625, 35532.83984375, -36804.5], 70716643445),
}


def test_fp8_machines_agree_with_mmaemu() -> None:
    a, b = judges.operands("e4m3fn", "e5m2", (16, 1000, 24))
    for (profile, fast), (diagonal, total) in MMAEMU.items():
        got = judges.ours(profile, a, b, fast)
        assert got.diagonal()[:6].tolist() == diagonal
        assert int(got.view(torch.int32).to(torch.int64).sum()) == total


@pytest.mark.parametrize("machine", ["mi300", "ampere", "hopper"])
def test_the_smallest_products_that_float32_takes_are_exact(machine: str) -> None:
    """The product is above 2**-100, and the product of the powers of its factors is below."""
    a, b = torch.tensor([[1.5 * 2.0**-50]]), torch.tensor([[1.5 * 2.0**-51]])
    assert matmul(a, b, accumulator=machine, format="bf16").item() == 2.25 * 2.0**-101
