"""What an accumulator lost, of a matrix product or of another sum: the error of sums, and the sums that stagnated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

from fpsim.accumulators.accumulator import Accumulator, parse_accumulator
from fpsim.accumulators.ops import Group, groups_of
from fpsim.accumulators.product import accumulate
from fpsim.accumulators.sums import product_with_ones
from fpsim.compile_backend.observe.rounding_statistics import norm, relative_error
from fpsim.formats import parse_format

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "observe_sum(Tensor sum, Tensor a, Tensor b, Tensor? ends, Tensor? key, Tensor? scales_a, Tensor? scales_b, "
    "int block, str accumulator, str first, str second, int number) -> Tensor"
)
_library.impl("observe_sum", lambda sum_, *_: sum_.clone(), "CompositeExplicitAutograd")
_library._register_fake("observe_sum", lambda sum_, *_: torch.empty_like(sum_))

#: The identity of the result of an accumulator, with the arguments of its operator, and the number of an observation.
observe_sum: OpOverload = torch.ops.fpsim.observe_sum.default

_library.define(
    "observe_reduction(Tensor sum, Tensor x, int[] axes, Tensor? key, str accumulator, int number) -> Tensor"
)
_library.impl("observe_reduction", lambda sum_, *_: sum_.clone(), "CompositeExplicitAutograd")
_library._register_fake("observe_reduction", lambda sum_, *_: torch.empty_like(sum_))

#: The same for a sum that is no product: ``x`` is added along ``axes``.
observe_reduction: OpOverload = torch.ops.fpsim.observe_reduction.default


@dataclass(frozen=True)
class SumStatistics:
    """The sums of a matrix product, or other sums, with an accumulator, over all runs.

    A step is what one rounding adds: a product, a chunk, or the products that a machine adds at once. Steps whose
    products add up to zero do not count, nor do additions of partial sums in float32. A sum that is infinite or NaN is
    left out from then on.

    Attributes:
        accumulator: the accumulator as text.
        error: the Frobenius norm of the sums minus the exact sums of the same rounded operands, or numbers.
        reference: the Frobenius norm of the exact sums (in float64).
        sums: how many there were.
        stagnated: how many of them had a step that changed nothing; None for ``pairwise``, which has no steps, and for
            integers that wrap around.
        steps: how many steps there were.
        idle_steps: how many of them changed nothing.
    """

    accumulator: str
    error: float
    reference: float
    sums: int
    stagnated: int | None
    steps: int
    idle_steps: int

    @property
    def relative_error(self) -> float:
        """``error / reference``; 0 if there is no error at all."""
        return relative_error(self.error, self.reference)

    @property
    def stagnated_share(self) -> float | None:
        """The share of the sums that had a step which changed nothing; None where steps are not counted."""
        return None if self.stagnated is None else self.stagnated / max(self.sums, 1)

    @property
    def idle_share(self) -> float | None:
        """The share of the steps that changed nothing; None where steps are not counted."""
        return None if self.stagnated is None else self.idle_steps / max(self.steps, 1)


def merge_sums(parts: Iterable[SumStatistics | None]) -> SumStatistics | None:
    """The statistics of all runs together; None if there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    stagnated = [part.stagnated for part in known if part.stagnated is not None]
    return SumStatistics(
        known[0].accumulator,
        math.hypot(*(part.error for part in known)),
        math.hypot(*(part.reference for part in known)),
        sum(part.sums for part in known),
        sum(stagnated) if stagnated else None,
        sum(part.steps for part in known),
        sum(part.idle_steps for part in known),
    )


def measure_sums(
    a: Tensor,
    b: Tensor,
    ends: Tensor | None,
    key: Tensor | None,
    scales_a: Tensor | None,
    scales_b: Tensor | None,
    block: int,
    accumulator: str,
    first: str,
    second: str,
) -> SumStatistics:
    """The statistics of the sums that the operators of `fpsim.accumulators.ops` compute from these arguments."""
    parsed, formats = parse_accumulator(accumulator), (parse_format(first), parse_format(second))
    if ends is None:
        scales = None if scales_a is None or scales_b is None else _batches(scales_a, scales_b)
        groups = [Group(*_batches(a, b), scales, 0, ...)]
    else:
        groups = list(groups_of(a, b, ends, scales_a, scales_b, block))
    counts = torch.zeros(3, dtype=torch.int64)
    errors, references, sums = [], [], 0
    for group in groups:
        left, right = (x if x.dtype == torch.float64 else x.float() for x in (group.a, group.b))
        value = accumulate(left, right, parsed, *formats, key, group.scales, block, group.element, counts)
        exact = torch.bmm(*_decoded(group, block))
        errors.append(norm(value.double() - exact))
        references.append(norm(exact))
        sums += value.numel()
    stagnated, idle, steps = counts.tolist()
    known = _counts_steps(parsed)
    error, reference = math.hypot(*errors), math.hypot(*references)
    return SumStatistics(
        accumulator, error, reference, sums, stagnated if known else None, *((steps, idle) if known else (0, 0))
    )


def measure_reduction(x: Tensor, axes: Sequence[int], key: Tensor | None, accumulator: str) -> SumStatistics:
    """The statistics of the sums that `fpsim.accumulators.sums.accumulate_sum_op` computes from these arguments."""
    ones, columns, formats = product_with_ones(x, axes)
    return measure_sums(ones, columns, None, key, None, None, 0, accumulator, *formats)


def _batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a, b) if a.dim() == 3 else (a.unsqueeze(0), b.unsqueeze(0))


def _decoded(group: Group, block: int) -> Sequence[Tensor]:
    """The operands in float64, times the scales of their blocks."""
    operands = [group.a.double(), group.b.double()]
    if group.scales is not None:
        for i, axis in enumerate((2, 1)):
            each = group.scales[i].double().repeat_interleave(block, axis).narrow(axis, 0, operands[i].shape[axis])
            operands[i] = operands[i] * each
    return operands


def _counts_steps(accumulator: Accumulator) -> bool:
    is_exact = accumulator.integer_bits is not None and accumulator.overflow == "wrap"
    return not is_exact and (accumulator.machine is not None or accumulator.order != "pairwise")
