"""Operators over several processes: each rank multiplies with its own data, and the products are averaged.

Every rank runs the same algorithm on the same vectors, so only products are communicated. Every rank holds all
parameters. Sharded parameters (FSDP) are refused; the message says how to gather them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from fpsim.curvature.linear import Operator


def averaged(operator: Operator, *, weight: float = 1.0, group: dist.ProcessGroup | None = None) -> Operator:
    """The weighted mean over ranks of each rank's ``operator``: ``sum(w_r A_r) / sum(w_r)``.

    For a model under `DistributedDataParallel`, make the operator with the rank's own batches. Pass every algorithm a
    generator with the same seed on all ranks, or none, as the default seed is the same. All ranks must call the same
    algorithms in the same order, as with any collective.

    Args:
        operator: the operator of this rank's data; its size is the same on all ranks.
        weight: the weight of this rank, usually its number of tokens or samples. At weight 0 the rank computes no
            products.
        group: the process group; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the weight is negative, no rank has a weight above zero, or (at a product) the ranks' vectors
            differ.
    """
    if not dist.is_initialized():
        raise RuntimeError("averaged() needs a process group: call torch.distributed.init_process_group first")
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    total = torch.tensor([weight], dtype=torch.float64, device=operator.device)
    dist.all_reduce(total, group=group)
    if float(total) == 0:
        raise ValueError("no rank has a weight above zero")
    share = weight / float(total)

    def multiply(vector: Tensor) -> Tensor:
        _check_agreement(vector, group)
        result = operator.multiply(vector) * share if share else torch.zeros_like(vector)
        dist.all_reduce(result, group=group)
        return result

    def doubts() -> tuple[str, ...]:
        """Those of all ranks, so that all ranks come to the same verdict."""
        found: list[tuple[str, ...]] = [()] * dist.get_world_size(group)
        dist.all_gather_object(found, operator.doubts(), group=group)
        return tuple(dict.fromkeys(reason for reasons in found for reason in reasons))

    name = f"{operator.name} over {dist.get_world_size(group)} ranks"
    return replace(operator, multiply=multiply, name=name, doubts=doubts)


def _check_agreement(vector: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise a ValueError on all ranks if their vectors differ, judged by two weighted sums of each vector."""
    ramp = torch.linspace(0.5, 1.5, vector.numel(), dtype=vector.dtype, device=vector.device)
    sums = torch.stack([vector.sum(dtype=torch.float64), (vector * ramp).sum(dtype=torch.float64)])
    both = torch.cat([sums, -sums])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = both[:2], -both[2:]
    if bool((highest != lowest).any()):
        raise ValueError(
            "the ranks multiply different vectors: give all of them a generator with the same seed, or none "
            "(and the same parameters)"
        )
