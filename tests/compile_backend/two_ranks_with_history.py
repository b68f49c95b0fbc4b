"""What each of two processes computes with delayed scales (see ``test_timed_scales.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

#: The largest magnitudes of the tensors of each rank, by step.
SHARES = ((1.0, 2.0, 64.0, 1.0, 1.0), (2.0, 1.0, 1.0, 8.0, 1.0))
OPTIONS = {"activation": "e4m3fn/tensor/history:2", "gradient": "e4m3fn/tensor/history:2"}


class Unit(nn.Module):
    """Multiplies by the unit matrix, which is a parameter."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.layer.weight.data = torch.eye(8)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(lambda x: self.layer(torch.relu(x) - torch.relu(-x)), x, use_reentrant=False)
        return self.layer(x)


def numbers(amax: float, seed: int, rows: int = 4) -> Tensor:
    """Random numbers with this largest magnitude."""
    x = torch.rand(rows, 8, generator=torch.Generator().manual_seed(seed)) - 0.5
    x = x * (amax / x.abs().max())
    return torch.where(x.abs() == x.abs().max(), x.sign() * amax, x)


def train(model: Any, rank: int) -> dict[str, list[Tensor]]:
    outputs, gradients = [], []
    for i, amax in enumerate(SHARES[rank]):
        x = numbers(amax, i)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(x)
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    return {"outputs": outputs, "gradients": gradients}


def work(rank: int) -> dict[str, Any]:
    parallel = torch.compile(DistributedDataParallel(Unit()), backend="fpsim", options=OPTIONS)
    sharded = Unit()
    fully_shard(sharded)
    return {
        "ddp": train(parallel, rank),
        "fsdp": train(torch.compile(sharded, backend="fpsim", options=OPTIONS), rank),
    }
