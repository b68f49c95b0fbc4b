"""Tensors that are sharded over ranks (`DTensor`): the numbers that this rank holds."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that are here, sharing its memory: of a `DTensor` its shard."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    """``local`` as a `DTensor` laid out as ``parameter``; itself where that is none."""
    sharded = _as_dtensor(parameter)
    if sharded is None:
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = sharded.device_mesh, sharded.placements
    return DTensor.from_local(local, mesh, placements, shape=sharded.shape, stride=sharded.stride())


def shard_number(parameter: Tensor) -> int:
    """Which shard of a `DTensor` is here; 0 for what is not sharded."""
    number, sharded = 0, _as_dtensor(parameter)
    if sharded is not None:
        mesh = sharded.device_mesh
        for dimension, placement in enumerate(sharded.placements):
            if placement.is_shard():
                number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return number


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a `DTensor`, whose module takes long to import where it is not used."""
    return typing.cast("DTensor", tensor) if hasattr(tensor, "to_local") else None
