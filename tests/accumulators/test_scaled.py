"""Machines whose sums take in the scales of blocks: the reference against numpy, and products against the reference."""

from __future__ import annotations

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
        values = [torch.tensor(x * s, dtype=torch.float32) for x, s in zip((a, b), scales, strict=True)]
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
