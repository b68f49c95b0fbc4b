"""Gradients that are rounded before processes exchange them.

Rounding happens on each rank, in the tensors that are then exchanged; the sum is that of the exchange itself, in the
gradients' own dtype. The hooks are those that torch offers: `DistributedDataParallel.register_comm_hook`, and
`set_custom_reduce_scatter` of what `fully_shard` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fpsim.casts import Cast, CastLike, check_cast, parse_unscaled
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

    On ``n`` ranks every gradient becomes ``(q(g_1) + ... + q(g_n)) / n``, sum and quotient in the gradients' dtype.

    Args:
        format: of the gradients that a rank sends: a format or a cast, ``format/rounding/overflow``.
        result: of the averages, which every rank rounds for itself; None leaves them as they are.
        rounding, overflow: where a cast names none.
        seed: for stochastic rounding, and only for it. Ranks, buckets and backward passes have draws of their own; the
            averages, rounded stochastically, the same on all ranks.

    Returns:
        What `register_comm_hook` takes as ``hook``; its ``state`` is the process group, or None for that of all ranks.
        It counts the backward passes, which number the draws: make one for each model.

    Raises:
        ValueError: an unknown format or mode, a scale, stochastic rounding without a seed or the reverse; in backward,
            a format with values that the gradients' dtype lacks.
    """
    sent = parse_unscaled(format, rounding, overflow, "a bucket of gradients")
    received = None if result is None else parse_unscaled(result, rounding, overflow, "a bucket of gradients")
    check_seed(seed, [cast for cast in (sent, received) if cast])
    passes = 0

    def round_gradients(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal passes
        group = group if group is not None else dist.group.WORLD
        ranks, rank, gradients = dist.get_world_size(group), dist.get_rank(group), bucket.buffer()
        draw = None if seed is None else draw_of_step(seed, passes)
        passes += bucket.is_last()
        first = bucket.index() * (ranks + 1)
        _round(gradients, sent, draw, first + rank)

        def average(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = done.value()[0].div_(ranks)
            _round(total, received, draw, first + ranks)
            return total

        return dist.all_reduce(gradients, group=group, async_op=True).get_future().then(average)

    round_gradients.__annotations__ = {}  # register_comm_hook compares them with types, and here they are strings
    return round_gradients


def rounded_reduce_scatter(
    format: CastLike, *, rounding: str = "nearest_even", overflow: str | None = None, seed: int | None = None
) -> Any:
    """The same for FSDP2: gradients are rounded on each rank before `fully_shard` sums and scatters them.

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(fpsim.training.gradients.rounded_reduce_scatter("e5m2"))

    Args and errors are those of `round_gradients_hook`. Each module takes one of its own, with a seed of its own
    if rounding is stochastic. Where FSDP divides gradients before the sum (as for float16), the quotients are rounded.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    cast = parse_unscaled(format, rounding, overflow, "a bucket of gradients")
    check_seed(seed, [cast] if cast else [])
    calls = 0

    class RoundedReduceScatter(DefaultReduceScatter):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
        ) -> Any:
            nonlocal calls
            draw = None if seed is None else draw_of_step(seed, calls)
            calls += 1
            _round(input_tensor, cast, draw, dist.get_rank(group))
            return super().__call__(output_tensor, input_tensor, group, op, async_op)

    return RoundedReduceScatter()


@torch.no_grad()
def _round(tensor: Tensor, cast: Cast | None, draw: int | None, number: int) -> None:
    if cast is not None:
        check_cast(tensor.dtype, cast)
        round_in_place([Job(tensor, cast, number)], draw if cast.is_stochastic else None, compiled=None)
