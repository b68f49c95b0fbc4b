"""Training in several processes: gradients rounded before they are exchanged, and one policy for all.

Rounding happens on each rank, in the tensors that are then exchanged; the sum is that of the exchange itself, in the
gradients' own dtype. The hooks are those that torch offers: `DistributedDataParallel.register_comm_hook`, and
`set_custom_reduce_scatter` of what `fully_shard` returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fpsim.formats import FloatFormat, split_rounding
from fpsim.policy.policy import Cast, Policy, parse_unscaled
from fpsim.rounding.ops import check_carrier
from fpsim.training.optimizers import Job, check_seed, draw_of_step, round_in_place

# -- gradients ---------------------------------------------------------------------------------------------------------


def round_gradients_hook(
    format: str | FloatFormat,
    *,
    result: str | FloatFormat | None = None,
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
    format: str | FloatFormat, *, rounding: str = "nearest_even", overflow: str | None = None, seed: int | None = None
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
        check_carrier(tensor.dtype, cast.format)
        stochastic = split_rounding(cast.rounding)[1] > 0
        round_in_place([Job(tensor, cast, number)], draw if stochastic else None, compiled=None)


# -- one policy for all ------------------------------------------------------------------------------------------------


def check_same_policy(
    policy: Policy | Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> Policy:
    """Make sure that every rank has the policy of rank 0. All ranks must call it, as any collective.

    Args:
        policy: a `Policy`, or the ``options`` of `torch.compile`.
        group: the ranks; None means all.

    Returns:
        The policy.

    Raises:
        ValueError: on every rank, if they differ: which ranks differ from rank 0, and in what. Or ``policy`` is none.
        RuntimeError: `torch.distributed` is not initialised.

    >>> check_same_policy({"format": "e4m3fn"})  # doctest: +SKIP
    """
    own = policy if isinstance(policy, Policy) else Policy.from_options(policy)
    if not dist.is_initialized():
        raise RuntimeError("there are no other ranks: call torch.distributed.init_process_group first")
    texts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, own.to_json(), group=group)
    first, *others = map(Policy.from_json, texts)
    differing = {rank: differences(first, other) for rank, other in enumerate(others, 1) if other != first}
    if differing:
        lines = "; ".join(f"rank {rank}: {what}" for rank, what in differing.items())
        raise ValueError(f"the policies of these ranks are not that of rank 0: {lines}. Give all the same options")
    return own


def refuse_other_policy(policy: Policy, what: str) -> None:
    """Refuse a policy that is not the one with which another rank has compiled the same thing.

    Not a collective: it waits for nobody. The first rank to come leaves its policy in the store through which the ranks
    found each other, and the others compare theirs with it, the ``n``-th time they compile the same thing with what was
    left the ``n``-th time. Without other ranks nothing happens.

    Args:
        policy: of what is being compiled.
        what: names what is being compiled, on every rank in the same way.

    Raises:
        ValueError: another rank has another policy.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    own = json.dumps({"rank": dist.get_rank(), "policy": policy.to_json()})
    times = store.add(f"fpsim/compiled/{what}/{dist.get_rank()}", 1)
    first = json.loads(store.compare_set(f"fpsim/policy/{what}/{times}", "", own))
    firsts = Policy.from_json(first["policy"])
    if firsts != policy:
        raise ValueError(
            f"this is rank {dist.get_rank()}, whose policy is not that of rank {first['rank']}: "
            f"{differences(firsts, policy)}. Give all ranks the same options"
        )


def differences(first: Policy, other: Policy) -> str:
    """Where two policies differ: ``field is this, not that`` for each field, ``that`` being the first's."""
    pairs = {each.name: (getattr(first, each.name), getattr(other, each.name)) for each in fields(Policy)}
    return ", ".join(f"{name} is {this!r}, not {that!r}" for name, (that, this) in pairs.items() if this != that)
