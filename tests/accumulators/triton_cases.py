"""Products with accumulators in Triton, on a GPU or in Triton's interpreter: the bits of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fpsim
from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.accumulators.ops import accumulate_scaled_op
from fpsim.accumulators.product import accumulate
from fpsim.accumulators.specification import joins_scales, specification
from fpsim.accumulators.triton_kernel import accumulate_with_triton
from fpsim.formats import parse_format
from fpsim.reference import Aligned, dot, to_float
from fpsim.rounding.ops import SOURCE
from tests.accumulators.numpy_model import UNITS
from tests.accumulators.test_reference import operands

ROUNDINGS = ("nearest_away", "toward_zero", "up", "down", "to_odd")


def modes_of(machine: str, fmt: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The rounding, and the arguments of `fpsim.reference.dot`, of a machine."""
    unit = UNITS[machine, fmt]
    order = Aligned(unit.length, unit.bits, None if unit.late else unit.floor, unit.late, unit.lanes)
    modes = ("nearest_even" if unit.nearest else "toward_zero",)
    return modes, {"accumulator": f"e8m{unit.precision - 1}", "order": order, "operands": fmt}


#: The accumulator, the format of the operands, and the rounding and other arguments of the reference.
CASES: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("e8m13", "e4m3fn", (), {"accumulator": "e8m13"}),
    ("fp16", "fp16", (), {"accumulator": "fp16"}),
    *[(f"e5m4/{rounding}", "bf16", (rounding,), {"accumulator": "e5m4"}) for rounding in ROUNDINGS],
    ("e5m4:nosubnormals/up/sat_finite", "e5m2", ("up", "sat_finite"), {"accumulator": "e5m4:nosubnormals"}),
    ("bf16 order=multiply_add", "bf16", (), {"accumulator": "bf16", "product": "bf16"}),
    ("e5m4/down chunk=5 promote=10", "e4m3fn", ("down",),
     {"accumulator": "e5m4", "order": ("chunked", 5), "promote": 10}),
    ("e8m10 order=aligned:4:12", "fp16", (), {"accumulator": "e8m10", "order": ("aligned", 4, 12), "operands": "fp16"}),
    *[(machine, fmt, *modes_of(machine, fmt)) for machine, fmt in
      (("hopper_fp8", "e5m2"), ("volta", "fp16"), ("blackwell", "e2m1fn"), ("mi300", "bf16"),
       ("mi300_fp8", "e4m3fnuz"))],
    ("hopper/fp16", "fp16", (), {"accumulator": "fp16", "order": Aligned(16, 25, -21), "operands": "fp16"}),
]  # fmt: skip


def bits(x: Tensor) -> list[int]:
    """The bits of float32 numbers; all NaNs count as one."""
    x = x.cpu().to(torch.float32)
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(torch.int32).flatten().tolist()


def check_triton(device: torch.device, tile: tuple[int, int] = (4, 8)) -> int:
    """Compare the kernel on ``device`` with the reference, and where that is too slow with the CPU's kernel.

    Returns:
        The number of sums.

    Raises:
        AssertionError: a bit differs.
    """
    compared = 0
    for number, (text, fmt, modes, arguments) in enumerate(CASES):
        shape = (3, 21, 5) if number % 2 else (5, 13, 3)
        compared += _compare(device, tile, text, fmt, shape, modes, arguments, number)
    return compared + _against_the_cpu(device, tile)


def _compare(
    device: torch.device,
    tile: tuple[int, int],
    text: str,
    fmt: str,
    shape: tuple[int, int, int],
    modes: tuple[str, ...],
    arguments: dict[str, Any],
    draw: int,
) -> int:
    m, k, n = shape
    a, b = operands(fmt, (m, k), draw), operands(fmt, (n, k), draw + 1).T
    a[0, : k // 2], b[: k // 2, 0] = -a[0, k // 2 : 2 * (k // 2)], b[k // 2 : 2 * (k // 2), 0]  # products cancel
    left, right = (torch.tensor(x, dtype=torch.float32, device=device).unsqueeze(0).contiguous() for x in (a, b))
    accumulator, parsed = parse_accumulator(text), parse_format(fmt)
    spec = specification(accumulator, parsed, parsed, k)
    got = accumulate_with_triton(spec, left, right, None, None, text, tile)
    wanted = [
        to_float(dot(a[i].tolist(), b[:, j].tolist(), "fp32", *modes, **arguments)) for i in range(m) for j in range(n)
    ]
    assert bits(got) == bits(torch.tensor(wanted)), (text, fmt)
    return m * n


def _against_the_cpu(device: torch.device, tile: tuple[int, int]) -> int:
    """Random steps, batches, integers, and scales of blocks."""
    draw, compared = torch.Generator().manual_seed(1), 0
    a, b = torch.randn(2, 3, 20, generator=draw), torch.randn(2, 20, 5, generator=draw)
    key = torch.ops.fpsim.random_key(torch.tensor(-(2**40) - 3), 7)
    for text, fmt in (
        ("e5m4/stochastic", "e4m3fn"),
        ("e5m4/stochastic_b:8", "e4m3fn"),
        ("e5m4/stochastic_c:30", "e4m3fn"),
        ("int8/sat_finite", "int4/unscaled"),
        ("int8/wrap", "int4/unscaled"),
    ):
        left, right = fpsim.round(a, fmt), fpsim.round(b, fmt)
        grid = parse_format("e1m2finite:bias=1" if fmt.startswith("int") else fmt)
        accumulator = parse_accumulator(text)
        own = key if accumulator.is_stochastic else None
        wanted = accumulate(left, right, accumulator, grid, grid, own)
        spec = specification(accumulator, grid, grid, 20)
        got = accumulate_with_triton(spec, left.to(device), right.to(device), None, own, text, tile)
        if text == "int8/wrap":
            got = (got + 128) % 256 - 128
        assert bits(got) == bits(wanted), text
        compared += wanted.numel()
    for text, block, fmt, rule in (
        ("hopper_fp8 promote=32", 32, "e4m3fn", "floats"),
        ("blackwell_mxfp8", 32, "e4m3fn", "powers"),
        ("blackwell_nvfp4", 16, "e2m1fn", "e4m3fn"),
    ):
        accumulator, parsed = parse_accumulator(text), parse_format(fmt)
        a, b = (fpsim.round(torch.randn(*shape, generator=draw), fmt) for shape in ((2, 3, 40), (2, 40, 5)))
        scales = [
            torch.rand(*shape, generator=draw) + 0.5 for shape in ((2, 3, -(-40 // block)), (2, -(-40 // block), 5))
        ]
        if rule == "powers":
            scales = [torch.exp2((8 * scale).round()) for scale in scales]
        elif rule != "floats":
            scales = [fpsim.round(scale, rule) for scale in scales]
        wanted = accumulate_scaled_op(a, b, *scales, block, text, fmt, fmt, SOURCE)
        if joins_scales(accumulator):
            each = [
                s.repeat_interleave(block, axis).narrow(axis, 0, 40) for s, axis in zip(scales, (2, 1), strict=True)
            ]
            a, b = a * each[0], b * each[1]
        spec = specification(accumulator, parsed, parsed, 40, block)
        pair = (scales[0].to(device), scales[1].to(device))
        got = accumulate_with_triton(spec, a.to(device), b.to(device), pair, None, text, tile)
        assert bits(got) == bits(wanted), text
        compared += wanted.numel()
    return compared


#: Whole calls on a device: the arguments of `fpsim.matmul`.
CALLS: list[dict[str, Any]] = [
    {"accumulator": "hopper_fp8", "promote": 128, "format": "e4m3fn"},
    {"accumulator": "hopper_fp8", "promote": 128, "format": "e4m3fn/block:128"},
    {"accumulator": "blackwell_nvfp4", "format": "nvfp4"},
    {"accumulator": "e5m4/stochastic", "format": "e4m3fn", "seed": 3},
    {"accumulator": "fp16", "chunk": 32, "format": "e2m1fn"},
    {"accumulator": "mi300", "format": "bf16"},
]


def check_calls(device: torch.device, same: Callable[[Tensor, Tensor], None]) -> int:
    """`fpsim.matmul` on ``device`` against the CPU."""
    draw, compared = torch.Generator().manual_seed(1), 0
    a, b = torch.randn(100, 700, generator=draw), torch.randn(700, 130, generator=draw)
    for arguments in CALLS:
        wanted = fpsim.matmul(a, b, **arguments)
        same(fpsim.matmul(a.to(device), b.to(device), **arguments), wanted)
        compared += wanted.numel()
    return compared
