"""Transforms of tensors, bit for bit those of the exact reference: sizes, signs, axes, strides and special values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.reference import Value
from fpsim.rounding.ops import SOURCE
from fpsim.transforms.names import parse_transform
from fpsim.transforms.ops import transform_operand_op, transform_parameters_op
from fpsim.transforms.power_map import power

WORKING = {torch.float32: "fp32", torch.bfloat16: "fp32", torch.float16: "fp32", torch.float64: "fp64"}
DTYPES = tuple(WORKING)


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of very different magnitudes, so that almost every addition rounds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 9, tuple(shape), generator=generator).double())).to(dtype)


def along(x: Tensor, axis: int, change: Callable[[list[float]], Sequence[Value]], dtype: torch.dtype) -> Tensor:
    """``change`` of every line of ``x`` along ``axis``."""
    moved = x.movedim(axis, -1)
    lines = [[reference.to_float(v) for v in change(line)] for line in moved.reshape(-1, x.shape[axis]).tolist()]
    return torch.tensor(lines, dtype=torch.float64).to(dtype).view(moved.shape).movedim(-1, axis)


def rotated(x: Tensor, axis: int, size: int | None, signs: str = "", back: bool = False) -> Tensor:
    working = WORKING[x.dtype]
    dtype = torch.float64 if working == "fp64" else torch.float32
    return along(x, axis, lambda line: reference.hadamard(line, size, signs, working=working, back=back), dtype)


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    integer = torch.int64 if got.dtype == torch.float64 else torch.int32
    got, wanted = (x.double() if x.dtype.itemsize == 2 else x for x in (got, wanted))
    integer = torch.int64 if got.dtype == torch.float64 else torch.int32
    differ = (got.contiguous().view(integer) != wanted.contiguous().view(integer)) & ~(got.isnan() & wanted.isnan())
    where = differ.nonzero()[:3].tolist()
    assert not where, [(at, got[tuple(at)].item().hex(), wanted[tuple(at)].item().hex()) for at in where]


# -- rotations ---------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 4, 8, 16, 32, 64, 12, 20, 24, 28, 36, 40, 56, None)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_has_the_bits_of_the_reference(size: int | None) -> None:
    length = 24 if size is None else 2 * size + 13  # 13 elements remain: blocks of 8, 4 and 1
    signs = "" if size is None else "seed=5"
    name = f"hadamard:{size or 'full'}" + (f":{signs}" if signs else "")
    for number, dtype in enumerate(DTYPES):
        x = numbers((3, length), dtype, number)
        assert_same_bits(transform_operand_op(x, name, 0, 1, SOURCE), rotated(x, 1, size, signs))


def test_axes_strides_and_empty_tensors_change_no_bit() -> None:
    x = numbers((3, 20, 5), torch.float32)
    wanted = rotated(x, 1, 16, "te")
    assert_same_bits(transform_operand_op(x, "hadamard:16:te", 1, -2, SOURCE), wanted)
    for order in itertools.permutations(range(3)):
        stored = x.permute(order).contiguous().permute([order.index(i) for i in range(3)])
        got = transform_operand_op(stored, "hadamard:16:te", 0, 1, SOURCE)
        assert_same_bits(got, wanted)
        assert got.stride() == stored.stride()
    expanded = x[:1].expand(4, 20, 5)
    assert_same_bits(transform_operand_op(expanded, "hadamard:16:te", 0, 1, SOURCE), wanted[:1].expand(4, 20, 5))
    assert transform_operand_op(x[:0], "hadamard:16:te", 0, 1, SOURCE).shape == (0, 20, 5)
    assert transform_operand_op(x[:, :0], "hadamard:full", 0, 1, SOURCE).shape == (3, 0, 5)


def test_zeros_infinities_and_nan_follow_ieee_754() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0], [-0.0] * 4, [1.0, math.inf, 2.0, 3.0], [1.0, math.nan, 2.0, 3.0]])
    y = transform_operand_op(x, "hadamard:4", 0, 1, SOURCE)
    assert_same_bits(y, rotated(x, 1, 4))
    assert y[2].isnan().tolist() == [False] * 4 and y[3].isnan().all()


def test_compiled_rotations_have_the_bits_of_eager_ones() -> None:

    def rotate(*xs: Tensor) -> list[Tensor]:
        cases = (("hadamard:16:te", 0), ("hadamard:8:seed=1:bf16", 0), ("hadamard:16:te", 1), ("hadamard:12", 0))
        return [transform_operand_op(2 * x, name, 0, axis, SOURCE) for x in xs for name, axis in cases]

    xs = [numbers((48, 48), dtype) for dtype in (torch.float32, torch.bfloat16)]
    for got, wanted in zip(torch.compile(rotate)(*xs), rotate(*xs), strict=True):
        assert_same_bits(got, wanted)


def test_rotations_are_orthogonal_and_undone_by_the_way_back() -> None:
    for size in (1, 2, 16, 12, 20, 28, 36, 44, 60, 76, 84, 108, 140, 148, 176):
        rotation = transform_operand_op(torch.eye(size, dtype=torch.float64), f"hadamard:{size}", 0, 1, SOURCE)
        assert (rotation @ rotation.t() - torch.eye(size)).abs().max() < 1e-14
        assert set((rotation * math.sqrt(size)).round().flatten().tolist()) <= {1.0, -1.0}
    x = torch.randint(-8, 9, (5, 32)).float()  # every sum is an integer below 2^24, and 1/4 is exact
    assert torch.equal(fpsim.round(x, "e8m23/hadamard:16:te"), x)


def test_seeded_signs_are_those_of_splitmix64() -> None:
    outputs = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    signs = [-1.0 if output >= 1 << 63 else 1.0 for output in outputs]  # seed 1234567, from the author's C program
    ones = transform_operand_op(torch.eye(8)[:5], "hadamard:8:seed=1234567", 0, 1, SOURCE)
    assert (ones[:, 0] * math.sqrt(8)).round().tolist() == signs


def test_results_in_bfloat16_are_rounded_once() -> None:
    for dtype in DTYPES:
        x = numbers((4, 32), dtype)
        exact = rotated(x, 1, 16, "te")
        got = transform_operand_op(x, "hadamard:16:te:bf16", 0, 1, SOURCE)
        wanted = [reference.to_float(reference.round(v, "bf16")) for v in exact.flatten().tolist()]
        assert_same_bits(got, torch.tensor(wanted, dtype=torch.float64).to(exact.dtype).view(4, 32))


@pytest.mark.parametrize("name", ["nvfp4", "e4m3fn/mx:8", "int8/row", "e2m1fn/block:4"])
def test_a_cast_rotates_rounds_and_rotates_back(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        working = WORKING[dtype]
        x = numbers((3, 21), dtype)
        there = rotated(x, 1, 8, "seed=3")
        values = reference.round_blocks(there.flatten().tolist(), name, (3, 21), 1, working=working)
        rounded = torch.tensor([reference.to_float(v) for v in values], dtype=torch.float64).to(there.dtype).view(3, 21)
        back = rotated(rounded, 1, 8, "seed=3", back=True)
        got = fpsim.round(x, f"{name}/hadamard:8:seed=3")
        assert_same_bits(got, back.to(dtype))
        turned = fpsim.round(x.t().contiguous(), f"{name}/hadamard:8:seed=3", axis=0)
        assert_same_bits(turned.t(), got)


def test_casts_with_transforms_have_straight_through_derivatives_and_work_under_vmap_and_compile() -> None:
    x = numbers((4, 16), torch.float32).requires_grad_()
    for name in (
        "nvfp4/hadamard:16:te",
        "e4m3fn/hadamard:4",
        "e4m3fn/power_of_two/hadamard:4",
        "e4m3fn/group:4/expand",
    ):
        y = fpsim.round(x, name)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))
        samples = torch.vmap(lambda row, name=name: fpsim.round(row, name))(x.detach())
        assert torch.equal(samples, torch.stack([fpsim.round(row, name) for row in x.detach()]))
        compiled = torch.compile(lambda x, name=name: fpsim.round(x, name), backend="aot_eager")
        assert torch.equal(compiled(x), y)
    drawn = [fpsim.round(x, "e2m1fn/stochastic:8/mx:16/hadamard:16", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# -- factors and orders of channels ------------------------------------------------------------------------------------


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = numbers((5, 12), dtype), numbers((12, 7), dtype, 1)
    a[:, 0], b[1], a[2, 2], b[3, 3] = 0.0, 0.0, math.nan, math.inf
    return a, b


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("suffix", ["", ":power_of_two"])
def test_factors_of_smoothing_are_those_of_the_reference(alpha: float, suffix: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = _operands(dtype)
        got = transform_parameters_op(a, b, f"smooth:alpha={alpha}{suffix}", [1, 0], SOURCE)
        largest = zip(a.abs().amax(0).tolist(), b.abs().amax(1).tolist(), strict=True)
        wanted = [reference.to_float(reference.smoothing_factor(x, y, alpha, bool(suffix))) for x, y in largest]
        assert got.dtype == torch.float32 and got.tolist() == wanted
        divided, multiplied = (
            transform_operand_op(x, f"smooth:alpha={alpha}{suffix}", i, 1 - i, SOURCE, got)
            for i, x in enumerate((a, b))
        )
        quotients = [
            [reference.to_float(reference.div(v, s, "fp32")) for v, s in zip(row, wanted, strict=True)]
            for row in a.tolist()
        ]
        products = [
            [reference.to_float(reference.mul(v, s, "fp32")) for v in row]
            for row, s in zip(b.tolist(), wanted, strict=True)
        ]
        assert_same_bits(divided, torch.tensor(quotients))
        assert_same_bits(multiplied, torch.tensor(products))


def test_factors_in_float64_are_within_four_ulp() -> None:
    a, b = _operands(torch.float64)
    got = transform_parameters_op(a, b, "smooth:alpha=0.3", [1, 0], SOURCE).tolist()
    for factor, x, y in zip(got, a.abs().amax(0).tolist(), b.abs().amax(1).tolist(), strict=True):
        exact = reference.to_float(reference.smoothing_factor(x, y, 0.3, working="fp64"))
        assert abs(factor - exact) <= 4 * math.ulp(exact)


def test_permutations_are_those_of_the_reference() -> None:
    a, b = _operands(torch.float32)
    a[0, 5], a[0, 6] = a[:, 7].abs().max(), a[:, 7].abs().max()  # ties
    measures = {
        "amax": a.abs().amax(0),
        "amax:second": b.abs().amax(1),
        "norm": a.double().square().sum(0),
        "norm:second": b.double().square().sum(1),
    }
    for name, measure in measures.items():
        order = transform_parameters_op(a, b, f"permute:{name}", [1, 0], SOURCE)
        assert tuple(order.tolist()) == reference.sorted_channels(measure.tolist())
        assert_same_bits(transform_operand_op(a, f"permute:{name}", 0, 1, SOURCE, order), a[:, order])
        assert_same_bits(transform_operand_op(b, f"permute:{name}", 1, 0, SOURCE, order), b[order])


# -- powers of groups --------------------------------------------------------------------------------------------------


def _groups() -> list[list[float]]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(128, generator=generator)
    states = [
        normal,  # a first moment
        (normal.square() * torch.randn(128, generator=generator).exp()),  # a second moment
        normal * 1e-20,
        torch.randn(128, generator=generator).mul(6).exp(),  # a range that must shrink
        1 + normal.abs() * 2**-20,  # a range that grows very much
        torch.where(normal > 0.5, 0.0, normal),
        torch.full((128,), -0.3),
        torch.zeros(128).copysign(normal),
        torch.tensor([3.0]),
        torch.tensor([2.0**-149, 1e-40, -1e-38, 2.0, 2.0**-126]),
        torch.tensor([448.0**2 / 2, 1.0, -7.0]),  # the power is exactly 1
    ]
    return [state.tolist() for state in states]


CASTS = ("e4m3fn", "e5m2", "e2m1fn", "int8", "e4m3fn/toward_zero", "e4m3fn/up")


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("options", ["", ":kernel", ":clamp", ":kernel:clamp"])
def test_a_power_map_rounds_as_the_reference_does(name: str, options: str) -> None:
    element, *mode = name.split("/")
    for group in _groups():
        x = torch.tensor(group)
        wanted = reference.round_power_map(
            x.tolist(),
            element,
            *mode,
            least="kernel" if "kernel" in options else "nonzero",
            expands_only="clamp" in options,
        )
        got = fpsim.round(x, f"{name}/group:128/expand{options}")
        exact = torch.tensor([reference.to_float(v) for v in wanted])
        # The steps are in float64: float32 results differ from exact ones by at most the last bit, and rarely do.
        assert torch.equal(got.signbit(), exact.signbit())
        assert ((got - exact).abs() <= exact.abs() * 2.0**-23).all(), (x, got, exact)
        assert (got == exact).double().mean() > 0.98


def test_a_power_map_keeps_zeros_signs_largest_elements_and_constant_groups() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for group in _groups():
            x = torch.tensor(group, dtype=torch.float64).to(dtype)
            y = fpsim.round(x, "e4m3fn/group:128/expand")
            assert torch.equal(y.signbit(), x.signbit()) and (y[x == 0] == 0).all()
            largest = x.abs() == x.abs().max()
            if x.abs().max() >= 2.0**-126:
                assert torch.equal(y[largest], x[largest])  # a constant group is exact
    constant = torch.logspace(-30, 30, 200).repeat_interleave(128)
    assert torch.equal(fpsim.round(constant, "e4m3fn/group:128/expand"), constant)


def test_a_group_with_a_nan_or_an_infinity_is_nan_and_no_other() -> None:
    x = torch.ones(3, 128)
    x[0, 5], x[2, 7] = math.nan, -math.inf
    y = fpsim.round(x, "e4m3fn/group:128/expand")
    assert y[0].isnan().all() and y[2].isnan().all() and torch.equal(y[1], x[1])


def test_the_powers_are_those_of_the_notes_on_coat() -> None:
    ratios = torch.tensor([10.0, 1e3, 2e5, 448.0**2 / 2], dtype=torch.float64)
    assert power(ratios, torch.ones(4, dtype=torch.float64), 448.0, False).tolist() == [5.0, 1.625, 0.9375 - 0.0, 1.0]
    assert power(ratios, torch.ones(4, dtype=torch.float64), 448.0, True).tolist() == [5.0, 1.625, 1.0, 1.0]


def test_zeros_in_the_kernel_of_coat_count_or_hide_magnitudes() -> None:
    """The least magnitude of 128 elements, followed by hand through the folds of fp8_adamw_expand_cuda_kernel.cu."""
    for zero_at, least in {0: 1e-30, 1: 2.0, 16: 2.0, 32: 2.0, 127: 2.0}.items():
        values = [float(i + 2) for i in range(128)]
        values[zero_at] = 0.0
        # A zero in lane 0 stays to the end. All others meet a number before them and are skipped.
        assert float(reference.transforms.extremes(values, "kernel")[1]) == pytest.approx(least)
    hidden = [5.0] * 128
    hidden[32], hidden[40] = 0.0, 1.0  # the zero hides the 1 of its warp
    assert float(reference.transforms.extremes(hidden, "kernel")[1]) == 5.0
    assert float(reference.transforms.extremes(hidden)[1]) == 1.0
    x = torch.tensor(hidden)
    kernel, plain = (fpsim.round(x, f"e4m3fn/group:128/expand{o}") for o in (":kernel", ""))
    # With k = 1 the number 1 becomes 448/5 = 89.6 and rounds to 88; with k = 7.125 it becomes 0.0047, and rounds to
    # 2 times 2^-9.
    assert kernel[40] == pytest.approx(88 / 448 * 5) and plain[40] == pytest.approx(5 * (2**-8 / 448) ** (1 / 7.125))


def test_expansion_lowers_the_error_of_states_as_coat_claims() -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(1 << 16, generator=generator)
    v = (0.35 * torch.randn(1 << 16, generator=generator)).exp()
    for state, ratio in ((m, 1.5), (v, 5.0)):
        errors = [(fpsim.round(state, f"e4m3fn/group:128{o}") - state).square().mean().sqrt() for o in ("", "/expand")]
        assert errors[0] / errors[1] > ratio


# -- names -------------------------------------------------------------------------------------------------------------

SAME = (
    "hadamard:16", "hadamard:full", "hadamard:full:seed=0", "hadamard:16:te", "hadamard:32:seed=7", "smooth:alpha=0.5",
    "smooth:alpha=0.25:power_of_two", "smooth:factors=1.0,0.5", "permute:amax", "permute:norm:second",
    "permute:order=1,0", "expand", "expand:kernel", "expand:kernel:clamp",
)  # fmt: skip
OTHERS = {
    "HADAMARD:2:+-:bf16": "hadamard:2:+-:bf16",
    "smooth": "smooth:alpha=0.5",
    "smooth:alpha=1:power_of_two": "smooth:alpha=1.0:power_of_two",
    "expand:clamp:kernel": "expand:kernel:clamp",
    "permute:amax:first": "permute:amax",
    "smooth/permute:norm/hadamard:2:+-": "smooth:alpha=0.5/permute:norm/hadamard:2:+-",
}


def test_names_are_parsed_once_and_printed_back() -> None:
    for name, printed in (OTHERS | {name: name for name in SAME}).items():
        transform = parse_transform(name)
        assert str(transform) == printed and parse_transform(printed) == transform and hash(transform)


WRONG = {
    "hadamard": r"unknown transform 'hadamard': use one of hadamard:16",
    "hadamard:0": "size of a Hadamard transform is 1 to 1048576, got 0",
    "hadamard:48:te": "'te' are for blocks of 16, and the size is 48",
    "hadamard:7": "no Hadamard matrix of 7 rows is built here: use hadamard:16, in blocks",
    "hadamard:688": "no Hadamard matrix of 688 rows is built here: use hadamard:16, whose blocks divide it",
    "hadamard:4:+-": "2 signs '[+]-' do not go with blocks of 4",
    "hadamard:full:te": "'te' are for blocks of 16, and the size is full",
    "hadamard:16:xy": "unknown signs 'xy': use te",
    "hadamard:16:seed=-1": "unknown signs 'seed=-1'",
    "smooth:alpha=2": "alpha of smoothing is a number from 0 to 1, got 2.0",
    "smooth:factors=1,0": "positive and finite, got 0.0",
    "smooth:factors=a": "unknown transform",
    "permute": "unknown transform 'permute'",
    "permute:order=0,2": "of 2 elements has each index from 0 to 1 once, and 1 is missing",
    "rotate:16": "unknown transform 'rotate:16'",
    "expand:coat": "unknown transform 'expand:coat'",
    "smooth/rotate": "unknown transform 'smooth/rotate'",
    "/smooth": "unknown transform '/smooth'",
    "smooth/hadamard:4:kept": "'hadamard:4:kept' has no place in 'smooth:alpha=0.5/hadamard:4:kept': transforms that",
    "sqrt/hadamard:4": "'sqrt' has no place in 'sqrt/hadamard:4'",
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_names_are_errors_with_the_value_and_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=WRONG[name]):
        parse_transform(name)


WRONG_CASTS = {
    "e4m3fn/expand": "has no groups with a ratio: write such as e4m3fn/group:128/expand",
    "e4m3fn/mx/expand": "has no groups with a ratio",
    "nf4/group:64/expand": "takes floating-point formats and symmetric integers",
    "e4m3fn/group:64/expand:kernel": "COAT's kernel has groups of 128",
    "e4m3fn/smooth": "changes both operands of a product, and a cast has one tensor: name it in a policy",
    "e4m3fn/permute:amax": "changes both operands of a product",
    "e4m3fn/hadamard:4/expand": "has two transforms",
    "e4m3fn/rotate": "unknown mode 'rotate'",
}


@pytest.mark.parametrize("name", WRONG_CASTS)
def test_casts_that_cannot_hold_a_transform_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=WRONG_CASTS[name]):
        fpsim.round(torch.ones(4), name)


def test_a_rotation_in_a_cast_needs_an_axis_and_codes_hold_none() -> None:
    with pytest.raises(ValueError, match="axis 3 does not exist"):
        fpsim.round(torch.ones(4), "e4m3fn/hadamard:4", axis=3)
    with pytest.raises(ValueError, match="no Hadamard matrix of 7 rows"):
        fpsim.round(torch.ones(7), "e4m3fn/hadamard:full")
    with pytest.raises(ValueError, match="transform 'hadamard:16' of 'nvfp4/hadamard:16' is not part of a block"):
        reference.round_blocks([1], "nvfp4/hadamard:16", (1,))
    with pytest.raises(ValueError, match="codes hold no transform"):
        fpsim.encode_blocks(torch.ones(16), "nvfp4/hadamard:16")
