"""Products of operands whose blocks have scales, on machines whose sums take the scales in."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.cpu import NV_BLOCK
from fpsim.accumulators.machines import Machine
from fpsim.accumulators.ops import accumulate_scaled_op
from fpsim.accumulators.shapes import matrices, result_shape
from fpsim.block_functions import encode_blocks
from fpsim.casts import Cast
from fpsim.formats import FloatFormat
from fpsim.rounding.ops import SOURCE
from fpsim.scaling.scale import MX_RULES, NV_RULES
from fpsim.tensor_functions import decode, straight_through

_E8M0_BIAS, _E8M0_NAN = 127, 255


def scaled_matmul(a: Tensor, b: Tensor, accumulator: Accumulator, first: Cast | None, second: Cast | None) -> Tensor:
    """``torch.matmul(a, b)`` of operands that the casts round to elements with scales.

    The scales of blocks join the sum. Those of whole tensors (NVFP4) multiply the result: one float32 product of both
    scales, and one float32 product with the sum. Transformer Engine's are inverted first, each in float32.

    Raises:
        ValueError: a cast is missing, or it is none of the machine.
    """
    machine = accumulator.machine
    assert machine is not None, "the accumulator is that of a machine with scales"
    formats, blocks = zip(*(_checked(cast, machine) for cast in (first, second)), strict=True)
    if blocks[0] != blocks[1]:
        raise ValueError(f"{machine.name} takes blocks of one size, got {blocks[0]} and {blocks[1]}")
    if a.dtype != b.dtype:
        raise TypeError(f"operands have one dtype, got {a.dtype} and {b.dtype}: convert one of them")
    accumulator.check_operands(*formats)
    shape = result_shape(a, b)
    if not (a.numel() and b.numel()):
        return a.new_zeros(shape)
    operands = [
        _scaled(x, cast, axis, blocks[0]) for x, cast, axis in ((a, first, -1), (b, second, -2 if b.dim() > 1 else 0))
    ]
    values, scales, factors = zip(*operands, strict=True)
    rest = blocks[0], str(accumulator), formats[0].name, formats[1].name, SOURCE
    product = accumulate_scaled_op(*matrices(*values), *matrices(*scales), *rest).reshape(shape)
    result = (product * (factors[0] * factors[1])).to(a.dtype)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        decoded = [straight_through(x, (v * f).to(x.dtype)) for x, v, f in zip((a, b), values, factors, strict=True)]
        return straight_through(torch.matmul(*decoded), result)
    return result


def _checked(cast: Cast | None, machine: Machine) -> tuple[FloatFormat, int]:
    """The element format and the block size of a cast.

    Raises:
        ValueError: the machine does not take it.
    """
    scale = None if cast is None else cast.scale
    size = scale.sizes[0] if scale is not None and scale.kind == "block" else 0
    is_known = scale is not None and (scale.rule in MX_RULES or (scale.rule in NV_RULES and machine.group > 1))
    is_power_of_16 = size == NV_BLOCK and scale is not None and scale.rule not in NV_RULES
    if cast is None or cast.grid is None or not is_known or size not in machine.blocks or is_power_of_16:
        usual = "nvfp4" if machine.group > 1 else "mxfp8"
        raise ValueError(
            f"{machine.name} multiplies elements with scales, got {'no format' if cast is None else str(cast)!r}: give "
            f"format={usual!r}, which rounds the operands, or name a machine without scales, such as 'blackwell'"
        )
    return cast.grid, size


def _scaled(x: Tensor, cast: Cast | None, axis: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The elements of ``x`` times the scales of blocks, the scales of blocks, and the factor of the tensor; float32."""
    assert cast is not None and cast.scale is not None and cast.grid is not None, "the cast was checked"
    codes, scales = encode_blocks(x, cast, axis, packed=False)
    factor = torch.ones(())
    if isinstance(scales, tuple):
        block_scales, of_tensor = decode(scales[0], "e4m3fn"), scales[1].float()
        factor = 1 / of_tensor if cast.scale.rule == "te" else of_tensor
    else:
        exponents = scales.double() - _E8M0_BIAS
        block_scales = torch.where(scales == _E8M0_NAN, torch.nan, torch.exp2(exponents))
    each = block_scales.double().repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    elements = decode(codes, cast.grid, torch.float32).double()
    return (elements * each).float(), block_scales.float(), factor
