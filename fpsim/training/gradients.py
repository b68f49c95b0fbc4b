"""Gradients that are rounded before processes exchange them.

Each rank rounds the tensors that it then sends. The exchange itself computes the sum, in the gradients' dtype. The
functions use hooks of torch: `DistributedDataParallel.register_comm_hook` and `FSDPModule.set_custom_reduce_scatter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fpsim.casts import Cast, CastLike, check_cast, parse_cast, refuse_timed
from fpsim.rounding.carriers import check_tensor
from fpsim.training.in_place import Job, check_seed, draw_of_step, round_in_place


def round_gradients_hook(
    format: CastLike,
    *,
    result: CastLike | None = None,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    seed: int | None = None,
) -> Callable[[dist.ProcessGroup | None, dist.GradBucket], torch.futures.Future[Tensor]]:
    """A communication hook that rounds each rank's gradients before they are averaged.

        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, fpsim.round_gradients_hook("e5m2"))

    On ``n`` ranks every gradient becomes ``(q(g_1) + ... + q(g_n)) / n``, where ``q`` rounds to the format. The sum and
    the quotient are computed in the gradients' dtype. A sparse gradient is coalesced first, and its values are rounded.

    Args:
        format: the format of the gradients that a rank sends. It may be a cast, ``format/rounding/overflow/scale``.
            Every gradient of every rank has its own scales; rows and blocks lie along its last axis.
        result: the format of the averages, which every rank rounds itself. None leaves them unrounded.
        rounding, overflow: the modes of a cast that names none.
        seed: for stochastic rounding, and only for it. Every rank, bucket and backward pass has its own draw. The draw
            for the averages is the same on all ranks.

    Returns:
        The ``hook`` argument of `register_comm_hook`; the ``state`` argument is the process group, or None for the
        default group. The hook counts the backward passes, and their number selects the draw: create one hook for each
        model.

    Raises:
        ValueError: the format or a mode is unknown, or a seed is missing or has no stochastic rounding to seed. In
            backward: the format has values that the gradients' dtype lacks.
    """
    sent = parse_cast(format, rounding, overflow)
    received = None if result is None else parse_cast(result, rounding, overflow)
    for cast in (sent, received):
        refuse_timed(cast, "round_gradients_hook")
    check_seed(seed, [cast for cast in (sent, received) if cast])
    passes = 0

    def round_gradients(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal passes
        group = group if group is not None else dist.group.WORLD
        ranks, rank, gradients = dist.get_world_size(group), dist.get_rank(group), _whole(bucket.buffer())
        draw = None if seed is None else draw_of_step(seed, passes)
        passes += bucket.is_last()
        first = bucket.index() * (ranks + 1)
        parts = None if gradients.is_sparse else bucket.gradients()
        _round(gradients, sent, draw, first + rank, parts)

        def average(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = _whole(done.value()[0].div_(ranks))
            _round(total, received, draw, first + ranks, None if parts is None else _like(parts, total))
            return total

        return dist.all_reduce(gradients, group=group, async_op=True).get_future().then(average)

    round_gradients.__annotations__ = {}  # register_comm_hook expects types, and in this file annotations are strings
    return round_gradients


def rounded_reduce_scatter(
    format: CastLike,
    *,
    module: nn.Module | None = None,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    seed: int | None = None,
) -> Any:
    """A reduce-scatter for FSDP2 that rounds each rank's gradients before they are summed and scattered.

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(
                    fpsim.training.gradients.rounded_reduce_scatter("mxfp8", module=module)
                )

    The other arguments and the errors are those of `round_gradients_hook`. Create one for each module, with different
    seeds if rounding is stochastic. If FSDP divides the gradients before the sum, as it does for float16, the quotients
    are rounded.

    Args:
        module: the module that gets the reduce-scatter. A cast with a scale or a transform needs it. A rank sends the
            parts of all gradients of a module in one vector. The parts of a gradient are put together again, so that it
            has the scales of the whole tensor, as under `round_gradients_hook`. An unscaled cast needs no module.

    Raises:
        ValueError: as `round_gradients_hook`, or the cast needs a ``module`` that is none of FSDP2's.
        RuntimeError: in backward, a cast with a scale, and a parameter of ``module`` without a gradient.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    cast = parse_cast(format, rounding, overflow)
    refuse_timed(cast, "rounded_reduce_scatter")
    check_seed(seed, [cast] if cast else [])
    has_parts = cast is not None and _has_parts(cast)
    if has_parts and not isinstance(module, FSDPModule):
        raise ValueError(
            f"{str(cast)!r} rounds every gradient on its own, and module is {type(module).__name__}: name the module "
            "that gets the reduce-scatter, after fully_shard"
        )
    calls = 0

    class RoundedReduceScatter(DefaultReduceScatter):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
        ) -> Any:
            nonlocal calls
            draw = None if seed is None else draw_of_step(seed, calls)
            calls += 1
            own = _sent_by_fsdp(module, input_tensor, dist.get_world_size(group)) if has_parts else []
            whole = [each.gathered() for each in own]
            _round(input_tensor, cast, draw, dist.get_rank(group), whole if has_parts else None)
            for each, gradient in zip(own, whole, strict=True):
                each.scatter(gradient)
            return super().__call__(output_tensor, input_tensor, group, op, async_op)

    return RoundedReduceScatter()


@dataclass(frozen=True)
class _Sent:
    """A gradient in the vector that FSDP2 sends: one part for each rank, along the axis over which it is sharded.

    Attributes:
        parts: a view of the vector. Its first axis has an element for each rank, and the others are those of a part.
            The last parts may be filled up with zeros.
        axis: the axis of the gradient that is divided.
        length: its length.
    """

    parts: Tensor
    axis: int
    length: int

    def gathered(self) -> Tensor:
        """A copy of the gradient."""
        joined = self.parts.movedim(0, self.axis).flatten(self.axis, self.axis + 1)
        return joined.narrow(self.axis, 0, self.length).clone(memory_format=torch.contiguous_format)

    def scatter(self, gradient: Tensor) -> None:
        """Write ``gradient`` into the vector."""
        joined = self.parts.movedim(0, self.axis)
        filled = gradient.new_zeros(joined.flatten(self.axis, self.axis + 1).shape)
        filled.narrow(self.axis, 0, self.length).copy_(gradient)
        joined.copy_(filled.view(joined.shape))


def _sent_by_fsdp(module: Any, vector: Tensor, ranks: int) -> list[_Sent]:
    """The gradients of ``module`` in ``vector``, which holds the parts of all of them for one rank after the other."""
    rows, start, sent = vector.view(ranks, -1), 0, []
    for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
        if not parameter.sharded_param.requires_grad:
            continue
        shape, axis = list(parameter._orig_size), parameter.fsdp_placement.dim
        length = shape[axis]
        shape[axis] = -(-length // ranks)
        size = math.prod(shape)
        sent.append((start, size, shape, axis, length))
        start += size
    if start != rows.shape[1]:
        raise RuntimeError(
            f"the gradients of {type(module).__name__} have {start * ranks} numbers, and FSDP sends {vector.numel()}: "
            "where a parameter has no gradient, nobody knows which numbers are those of the others. Use it in the "
            "loss, set its requires_grad to False, or take a format without a scale"
        )
    return [_Sent(rows[:, at : at + size].unflatten(1, shape), axis, length) for at, size, shape, axis, length in sent]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.coalesce() if tensor.is_sparse else tensor


def _like(parts: Sequence[Tensor], total: Tensor) -> list[Tensor]:
    """The parts of ``total`` that lie as ``parts`` do in the bucket, a vector, which begins with the first of them."""
    first = min(part.storage_offset() for part in parts)
    offset = total.storage_offset() - first
    return [total.as_strided(part.shape, part.stride(), part.storage_offset() + offset) for part in parts]


def _has_parts(cast: Cast) -> bool:
    """Whether every gradient is rounded on its own: it has scales of its own, or is transformed."""
    return cast.scale is not None or cast.transform is not None


@torch.no_grad()
def _round(
    tensor: Tensor, cast: Cast | None, draw: int | None, number: int, parts: Sequence[Tensor] | None = None
) -> None:
    """Round ``tensor`` in place.

    Args:
        number: the number of the draw.
        parts: the parts of the tensor that have scales of their own; None stands for the tensor itself.
    """
    if cast is None:
        return
    values = tensor.values() if tensor.is_sparse else tensor
    check_cast(check_tensor(values), cast)
    own = [values] if parts is None or not _has_parts(cast) else parts
    jobs = [Job(part, cast, number + (i << 32)) for i, part in enumerate(own)]
    round_in_place(jobs, draw if cast.is_stochastic else None, compiled=None)
