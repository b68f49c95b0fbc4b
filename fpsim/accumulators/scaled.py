"""Products of operands whose blocks have scales.

The scales join the sums of machines that take them (`blackwell_mxfp8`, `blackwell_nvfp4`). On other machines they
multiply the partial sum of every block, as in DeepSeek-V3: with the partial sum p of a block and the scales a and b of
both operands, ``total = fma(p, a * b, total)`` in float32, where ``a * b`` is rounded to float32 too, and the total is
+0 at first. `fpsim.reference.dot` has these as ``scales``, and as ``promote`` with ``part_scales``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.machines import Machine
from fpsim.accumulators.ops import accumulate_scaled_op
from fpsim.accumulators.parts import RULES, parts_of
from fpsim.accumulators.shapes import matrices, result_shape
from fpsim.accumulators.specification import NV_BLOCK
from fpsim.casts import Cast, outer_scale
from fpsim.formats import FloatFormat
from fpsim.rounding.ops import SOURCE
from fpsim.scaling.scale import MX_RULES, NV_RULES
from fpsim.tensor_functions import asks_derivative, straight_through


def takes_scales(casts: Sequence[Cast | None], accumulator: Accumulator) -> bool:
    """Whether the sums of ``accumulator``, or their partial sums, are multiplied by the scales of blocks."""
    if accumulator.machine is None:
        return False
    return bool(accumulator.machine.blocks) or any(_size(cast) for cast in casts)


def block_of(casts: Sequence[Cast | None], accumulator: Accumulator) -> tuple[tuple[FloatFormat, FloatFormat], int]:
    """The formats of the elements of both operands, and how many elements along the summed axis share a scale.

    Raises:
        ValueError: a cast has no scale of blocks that the machine takes, the operands have blocks of different sizes,
            or partial sums do not move to float32 after every block.
    """
    machine = accumulator.machine
    assert machine is not None, "the accumulator is that of a machine"
    check = _check_joined if machine.blocks else _check_multiplied
    first, second = (check(cast, machine) for cast in casts)
    sizes = [_size(cast) for cast in casts]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{machine.name} takes blocks of one size, got {sizes[0]} and {sizes[1]}")
    if not machine.blocks and accumulator.promote != sizes[0]:
        raise ValueError(
            f"the scales of blocks multiply partial sums of {machine.name} in float32, got blocks of {sizes[0]} and "
            f"{'no promotion' if accumulator.promote is None else f'promote={accumulator.promote}'}: use "
            f"promote={sizes[0]}"
        )
    accumulator.check_operands(first, second)
    return (first, second), sizes[0]


def scaled_matmul(a: Tensor, b: Tensor, accumulator: Accumulator, casts: Sequence[Cast | None]) -> Tensor:
    """``torch.matmul(a, b)`` of operands that the casts round to elements with scales of blocks.

    The scales of whole tensors (NVFP4) multiply the result: one float32 product of both scales, and one float32 product
    with the sum. Transformer Engine's are inverted first, each in float32.

    Raises:
        ValueError: in the cases of `block_of`.
        TypeError: the operands have different dtypes.
    """
    formats, block = block_of(casts, accumulator)
    if a.dtype != b.dtype:
        raise TypeError(f"operands have one dtype, got {a.dtype} and {b.dtype}: convert one of them")
    shape = result_shape(a, b)
    if not (a.numel() and b.numel()):
        return torch.matmul(a, b)
    factor = torch.ones(())
    operands, decoded = [], []
    for x, cast, axis in zip((a, b), casts, (-1, -2 if b.dim() > 1 else 0), strict=True):
        assert cast is not None and cast.scale is not None, "the cast was checked"
        elements, scales = parts_of(x.detach(), cast, axis)
        own = torch.ones(())
        if cast.scale.rule in NV_RULES:
            own = outer_scale(x.detach(), cast, axes=(axis % x.dim(),)).float()
        factor = factor * own
        operands.append((elements, scales))
        decoded.append((elements * scales * own).to(x.dtype))
    left, right = matrices(operands[0][0], operands[1][0])
    scales_left, scales_right = matrices(operands[0][1], operands[1][1])
    by_block = scales_left[..., ::block], scales_right[..., ::block, :]
    names = str(accumulator), formats[0].name, formats[1].name
    product = accumulate_scaled_op(left, right, *by_block, block, *names, SOURCE).reshape(shape)
    result = (product * factor).to(a.dtype)
    if asks_derivative(a, b):
        rounded = [straight_through(x, value) for x, value in zip((a, b), decoded, strict=True)]
        return straight_through(torch.matmul(*rounded), result)
    return result


def _size(cast: Cast | None) -> int:
    """How many elements along the summed axis share a scale; 0 if the scale is none of blocks or tiles."""
    scale = None if cast is None else cast.scale
    return scale.sizes[-1] if scale is not None and scale.kind in ("block", "tile") else 0


def _check_joined(cast: Cast | None, machine: Machine) -> FloatFormat:
    """The element format of ``cast`` for a machine whose sums take scales in.

    Raises:
        ValueError: the machine does not take it.
    """
    scale, size = None if cast is None else cast.scale, _size(cast)
    is_known = scale is not None and (scale.rule in MX_RULES or (scale.rule in NV_RULES and machine.group > 1))
    is_power_of_16 = size == NV_BLOCK and scale is not None and scale.rule not in NV_RULES
    if cast is None or cast.grid is None or not is_known or size not in machine.blocks or is_power_of_16:
        usual = "nvfp4" if machine.group > 1 else "mxfp8"
        raise ValueError(
            f"{machine.name} multiplies elements with scales, got {'no format' if cast is None else str(cast)!r}: give "
            f"format={usual!r}, which rounds the operands, or name a machine without scales, such as 'blackwell'"
        )
    return _without_transform(cast, machine)


def _check_multiplied(cast: Cast | None, machine: Machine) -> FloatFormat:
    """The element format of ``cast`` for a machine whose partial sums are multiplied by scales.

    Raises:
        ValueError: the scale is none of blocks, or none of `RULES`, or NVFP4's.
    """
    scale = None if cast is None else cast.scale
    if cast is None or scale is None or not _size(cast) or scale.rule not in RULES or scale.rule in NV_RULES:
        raise ValueError(
            f"{machine.name} multiplies its partial sums by the scales of the blocks of both operands, got "
            f"{'no format' if cast is None else str(cast)!r} for one: use 'e4m3fn/block:128' or 'e4m3fn/block:128x128'"
        )
    return _without_transform(cast, machine)


def _without_transform(cast: Cast, machine: Machine) -> FloatFormat:
    if cast.transform is not None:
        raise ValueError(f"{machine.name} multiplies elements: leave the transform out of {str(cast)!r}")
    assert cast.grid is not None, "a codebook is none of the machine's formats"
    return cast.grid
