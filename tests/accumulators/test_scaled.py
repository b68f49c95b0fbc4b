"""Machines whose sums take in the scales of blocks: the reference against numpy, and products against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fpsim
from fpsim import matmul
from fpsim.accumulators.ops import accumulate_scaled_op
from fpsim.reference import Aligned, decode, dot, to_float
from fpsim.rounding.ops import SOURCE
from tests.accumulators.numpy_model import Unit
from tests.accumulators.test_reference import operands, same

#: The machine, the format of elements, that of scales with its least exponent, the block, and the unit.
CASES = [
    ("blackwell_mxfp8", "e4m3fn", "e8m0fnu", -127, 32, Unit(32, 25), 1),
    ("blackwell_mxfp8", "e5m2", "e8m0fnu", -127, 32, Unit(32, 25), 1),
    ("blackwell_mxfp8", "e2m1fn", "e8m0fnu", -127, 32, Unit(32, 25), 1),
    ("blackwell_nvfp4", "e2m1fn", "e4m3fn", -6, 16, Unit(64, 35, floor=-139), 16),
    ("blackwell_nvfp4", "e2m1fn", "e8m0fnu", -127, 32, Unit(64, 35, floor=-139), 16),
]


def reference(unit: Unit, fmt: str, scale_format: str, group: int, a: Any, b: Any, scales: Any) -> float:
    order = Aligned(unit.length, unit.bits, unit.floor, group=group)
    modes: dict[str, Any] = {"accumulator": "fp32", "order": order, "operands": fmt}
    return to_float(dot(a, b, "fp32", "toward_zero", **modes, scales=scales, scale_format=scale_format))


@pytest.mark.parametrize(("machine", "fmt", "scale_format", "least_scale", "block", "unit", "group"), CASES)
def test_scales_join_the_sum(
    machine: str, fmt: str, scale_format: str, least_scale: int, block: int, unit: Unit, group: int
) -> None:
    """Elements of all codes, near 1, subnormal and zero; scales of all codes near 1, subnormal ones, and NaN."""
    name, rows = fpsim.parse_format(fmt).name, 4
    for length in (1, 16, 70, 130):
        blocks = -(-length // block)
        draw = np.random.default_rng(length)
        a, b = (operands(fmt, (rows, length), length + seed) for seed in (0, 1))
        a[-1, : length // 2] = np.where(np.isfinite(a[-1, : length // 2]), 1, 1)
        low, high = (119, 136) if scale_format == "e8m0fnu" else (0, 127)
        codes = draw.integers(low, high, (2, rows, blocks))
        codes[0, 1, 0] = 255 if scale_format == "e8m0fnu" else 127  # NaN
        by_block = np.array([[[to_float(decode(int(c), scale_format)) for c in row] for row in side] for side in codes])
        scales = np.repeat(by_block, block, axis=2)[:, :, :length]
        wanted = [
            reference(
                unit,
                fmt,
                scale_format,
                group,
                a[i].tolist(),
                b[i].tolist(),
                (scales[0, i].tolist(), scales[1, i].tolist()),
            )
            for i in range(rows)
        ]
        least = fpsim.parse_format(fmt).emin
        with np.errstate(all="ignore"):
            model = unit.scaled_dot(a, b, (scales[0], scales[1]), least, least_scale, group)
        assert same(wanted, model), (machine, length)
        values = [torch.tensor(x, dtype=torch.float32) for x in (a, b)]
        factors = [torch.tensor(s, dtype=torch.float32) for s in by_block]
        rest = (block, machine, name, name, SOURCE)
        got = accumulate_scaled_op(values[0], values[1].T, factors[0], factors[1].T, *rest).diagonal()
        assert same(got.double().tolist(), model), (machine, length)


def test_matmul_encodes_the_operands_and_scales_the_result() -> None:
    """NVFP4's scales of tensors multiply the result, in float32; Transformer Engine's are inverted first."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 40, generator=draw), torch.randn(40, 4, generator=draw)
    for fmt, machine in (
        ("mxfp8", "blackwell_mxfp8"),
        ("nvfp4", "blackwell_nvfp4"),
        ("e2m1fn/nv:torchao", "blackwell_nvfp4"),
    ):
        got = matmul(a, b, accumulator=machine, format=fmt)
        element, unit, group, block = (
            ("e4m3fn", Unit(32, 25), 1, 32) if fmt == "mxfp8" else ("e2m1fn", Unit(64, 35, floor=-139), 16, 16)
        )
        sides, factor = [], torch.ones(())
        for x in (a, b.T.contiguous()):
            codes, scales = fpsim.encode_blocks(x, fmt, packed=False)
            if isinstance(scales, tuple):
                factor = factor * (scales[1] if "torchao" in fmt else 1 / scales[1])
                scales = scales[0]
            scale_format = "e8m0fnu" if fmt == "mxfp8" else "e4m3fn"
            factors = fpsim.decode(scales, scale_format).repeat_interleave(block, 1)[:, :40]
            sides.append((fpsim.decode(codes, element).tolist(), factors.tolist()))
        (rows, row_scales), (columns, column_scales) = sides
        for i in range(3):
            for j in range(4):
                scales = (row_scales[i], column_scales[j])
                wanted = reference(unit, element, scale_format, group, rows[i], columns[j], scales)
                assert got[i, j] == torch.tensor(wanted) * factor, (fmt, i, j)


def test_shapes_and_derivatives_of_scaled_products() -> None:
    a, b = torch.randn(2, 3, 40, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    result = matmul(a, b, accumulator="blackwell_mxfp8", format="mxfp8")
    result.sum().backward()
    torch.testing.assert_close(a.grad, fpsim.round(b.detach(), "mxfp8", axis=0).sum(1).expand(2, 3, 40))
    flat = matmul(a[0], b, accumulator="blackwell_mxfp8", format="mxfp8")
    assert result.shape == (2, 3, 5) and torch.equal(result[0], flat)
    assert torch.equal(matmul(a[0, 0], b[:, 0], accumulator="blackwell_mxfp8", format="mxfp8"), flat[0, 0])
    assert matmul(a[:0], b, accumulator="blackwell_nvfp4", format="nvfp4").shape == (0, 3, 5)


def test_bad_scales_of_the_reference_name_the_length() -> None:
    with pytest.raises(ValueError, match="scales are two vectors of 2 numbers, got"):
        dot([1, 1], [1, 1], "fp32", scales=([1], [1, 1]))
    with pytest.raises(ValueError, match="a step of 32 products has no groups of 5"):
        Aligned(32, 25, group=5)


def deepseek(a: Any, b: Any, scales: Any, machine: dict[str, Any], block: int) -> float:
    modes = {**machine, "promote": block, "part_scales": scales}
    return to_float(dot(a, b, "fp32", "toward_zero", **modes))


def test_scales_of_blocks_multiply_partial_sums() -> None:
    """As in DeepSeek-V3: float32 scales of 128 elements, or of tiles of 128 by 128, and any power of two."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 300, generator=draw) * 30, torch.randn(300, 18, generator=draw)
    a[:, :128] *= 1e-3
    a[2, 150], b[5, 3], a[3, :128] = math.nan, math.inf, 0
    hopper = {"accumulator": "e8m13", "order": Aligned(32, 13)}
    full = {"accumulator": "fp32", "order": Aligned(16, 25, -133)}
    for name, machine, block, formats in (
        ("hopper_fp8", hopper, 128, ("e4m3fn/block:128", "e4m3fn/block:128x128")),
        ("hopper_fp8", hopper, 64, ("e4m3fn/block:64", "e5m2/block:64")),
        ("hopper_fp8", hopper, 128, ("e4m3fn/block:128:power_of_two", "e4m3fn/block:32x128:bf16")),
        ("hopper", full, 128, ("fp16/mx:128", "fp16/mx:128")),
    ):
        got = matmul(a, b, accumulator=name, promote=block, format=formats)
        sides = []
        for x, fmt, other in (
            (a, formats[0], 1),
            (b.T.contiguous(), formats[1], formats[1].partition(":")[2].split("x")[0]),
        ):
            tile = int(other) if "x" in fmt.partition("block:")[2] else 1
            codes, scales = fpsim.encode_blocks(x, fmt, packed=False)
            element = fpsim.parse_format(fmt.partition("/")[0])
            factors = fpsim.decode(scales, "e8m0fnu") if scales.dtype == torch.uint8 else scales
            sides.append((fpsim.decode(codes, element), factors.repeat_interleave(tile, 0)[: len(x)]))
        machine = {**machine, "operands": tuple(f.partition("/")[0] for f in formats)}
        wanted = [
            deepseek(x.tolist(), y.tolist(), (s.tolist(), t.tolist()), machine, block)
            for x, s in zip(*sides[0], strict=True) for y, t in zip(*sides[1], strict=True)
        ]  # fmt: skip
        assert same(wanted, got.flatten().double().tolist()), (name, formats)


def test_partial_sums_with_scales_have_shapes_derivatives_and_errors() -> None:
    a, b = torch.randn(2, 3, 200, requires_grad=True), torch.randn(200, 5, requires_grad=True)
    options: dict[str, Any] = {"accumulator": "hopper_fp8", "promote": 128, "format": "e4m3fn/block:128"}
    result = matmul(a, b, **options)
    result.sum().backward()
    torch.testing.assert_close(a.grad, fpsim.round(b.detach(), "e4m3fn/block:128", axis=0).sum(1).expand(2, 3, 200))
    assert torch.equal(result[0], matmul(a[0], b, **options)) and torch.equal(
        result[0, 0], matmul(a[0, 0], b, **options)
    )
    for changed, message in (
        ({"promote": None}, "got blocks of 128 and no promotion: use promote=128"),
        ({"promote": 64}, "got blocks of 128 and promote=64: use promote=128"),
        ({"format": ("e4m3fn/block:128", "e4m3fn")}, "of the blocks of both operands, got 'e4m3fn/.*' for one"),
        ({"format": ("e4m3fn/block:128", "e4m3fn/block:64")}, "takes blocks of one size, got 128 and 64"),
        ({"format": "fp16/mx:128"}, "hopper_fp8 multiplies e4m3fn and e5m2, and not e5m10"),
        ({"format": "e4m3fn/row"}, "scales that are none of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul(a, b, **{**options, **changed})
