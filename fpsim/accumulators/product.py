"""The product of two batches of matrices whose sums are those of an accumulator, on any device that has a kernel."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.cpu import accumulate_on_cpu
from fpsim.accumulators.specification import Specification, joins_scales, specification
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import round_op


def accumulate(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    first: FloatFormat,
    second: FloatFormat,
    key: Tensor | None,
    scales: tuple[Tensor, Tensor] | None = None,
    scale_block: int = 0,
    first_element: int = 0,
    counts: Tensor | None = None,
) -> Tensor:
    """The product of ``a`` (batches, M, K) and ``b`` (batches, K, N), with values of these formats, in their dtype.

    Args:
        key: of stochastic rounding.
        scales: of blocks, (batches, M, blocks) and (batches, blocks, N), float32. They multiply the elements on a
            machine whose sums take them in. On others they multiply the partial sums, which move to float32 after every
            block.
        scale_block: how many elements share a scale.
        first_element: the number of the first element of the result, on which its random numbers depend.
        counts: three int64 numbers, to which are added: the sums that stagnated, because a step left them as they were
            although its products do not add up to zero; such steps; and all steps whose products do not add up to zero.
    """
    factors = None if scales is None else (scales[0].contiguous(), scales[1].contiguous())
    spec = specification(accumulator, first, second, a.shape[2], scale_block if factors else 0, first_element)
    left, right = a, b
    if factors is not None and joins_scales(accumulator):
        left, right = (_times_scales(a, factors[0], scale_block, 2), _times_scales(b, factors[1], scale_block, 1))
    left, right = (x.to(torch.float32).contiguous() for x in (left, right))
    wide = a.dtype == torch.float64 or accumulator.integer_bits is not None
    if a.device.type == "cpu":
        out = accumulate_on_cpu(spec, left, right, factors, key, counts, wide)
    else:
        out = _on_gpu(spec, left, right, factors, key, accumulator).to(torch.float64 if wide else torch.float32)
    if accumulator.integer_bits is not None:
        return _integer_result(out, accumulator, a.dtype)
    return out.to(a.dtype)


def _on_gpu(
    spec: Specification,
    a: Tensor,
    b: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    key: Tensor | None,
    accumulator: Accumulator,
) -> Tensor:
    if a.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        raise NotImplementedError(
            f"accumulators are simulated on CPUs, and on GPUs with Triton, got a tensor on {a.device}: use a.cpu(), or "
            "pip install 'fpsim-torch[gpu]'"
        )
    from fpsim.accumulators.triton_kernel import accumulate_with_triton

    with torch.cuda.device_of(a):
        return accumulate_with_triton(spec, a, b, scales, key, str(accumulator))


def _times_scales(elements: Tensor, scales: Tensor, block: int, axis: int) -> Tensor:
    each = scales.double().repeat_interleave(block, axis).narrow(axis, 0, elements.shape[axis])
    return elements.double() * each


def _integer_result(sums: Tensor, accumulator: Accumulator, dtype: torch.dtype) -> Tensor:
    """Sums of integers in float64, wrapped around, in ``dtype``."""
    if not sums.isfinite().all():
        raise ValueError(f"an operand of accumulator {str(accumulator)!r} is infinite or NaN: integers are neither")
    if accumulator.overflow == "wrap":
        width = 2.0 ** (accumulator.integer_bits or 0)
        sums = sums - width * torch.floor(sums / width + 0.5)
    if dtype == torch.float64:
        return sums
    return round_op(sums, CARRIERS[dtype].name, "nearest_even", "ovf_inf").to(dtype)
