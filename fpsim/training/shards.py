"""The shards of `DTensor` on this rank."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank, sharing its memory: the shard of a `DTensor`, else the whole tensor."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    """``local`` as the shard of a `DTensor` laid out like ``parameter``; unchanged if ``parameter`` is no `DTensor`."""
    sharded = _as_dtensor(parameter)
    if sharded is None:
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = sharded.device_mesh, sharded.placements
    return DTensor.from_local(local, mesh, placements, shape=sharded.shape, stride=sharded.stride())


def shard_number(parameter: Tensor) -> int:
    """The number of the shard of a `DTensor` on this rank; 0 for a tensor that is not sharded."""
    number, sharded = 0, _as_dtensor(parameter)
    if sharded is not None:
        mesh = sharded.device_mesh
        for dimension, placement in enumerate(sharded.placements):
            if placement.is_shard():
                number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a `DTensor`, else None. (`isinstance` would import its module, which takes long.)"""
    return typing.cast("DTensor", tensor) if hasattr(tensor, "to_local") else None
