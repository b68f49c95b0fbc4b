"""What each of two processes under one policy computes (see ``test_distributed.py``).

All numbers are small multiples of powers of two, so that no sum is rounded and the order of additions cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fpsim
from tests.shared.models import dyadic

#: Few enough bits that rounding matters everywhere.
OPTIONS = {"activation": "e4m1", "weight": "e4m2", "gradient": "e5m1/toward_zero"}
SAMPLES = 4


class ResidualBlock(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(dyadic(*p.shape, seed=10 * seed + i))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) / 16


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(1), ResidualBlock(2)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def batch() -> tuple[Tensor, Tensor]:
    """Inputs, and the weights of the outputs in the loss."""
    return dyadic(SAMPLES, 8, seed=3), dyadic(SAMPLES, 8, seed=4)


def train(model: nn.Module, forward: Callable[[Tensor], Tensor], part: slice, *, pieces: int = 1) -> dict[str, Any]:
    """One step on a part of the batch, in pieces whose gradients accumulate, with rounded optimizer state."""
    x, weights = (each[part] for each in batch())
    outputs = []
    for x_piece, piece in zip(x.chunk(pieces), weights.chunk(pieces), strict=True):
        y = forward(x_piece)
        (y * piece * SAMPLES / len(x)).sum().backward()  # the mean over ranks is then the sum over all samples
        outputs.append(y.detach())
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    fpsim.round_optimizer(optimizer, "e5m2", weights="e4m3fn", master="bf16")
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # whose master copies are sharded as the parameters are
    state = {name: whole(optimizer.state[p]["momentum_buffer"]) for name, p in model.named_parameters()}
    parameters = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return {"outputs": torch.cat(outputs), "gradients": gradients, "state": state, "parameters": parameters}


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def parallel(part: slice) -> dict[str, Any]:
    model = DistributedDataParallel(Model())
    compiled = torch.compile(model, backend="fpsim", options=OPTIONS)
    found = train(model, compiled, part)
    return {**found, "escaped": len(fpsim.audit(compiled, batch()[0][part]).escaped)}


def parallel_in_buckets(part: slice) -> dict[str, Any]:
    """Dynamo splits the graph where DDP's buckets end."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64
    model = DistributedDataParallel(Model(), bucket_cap_mb=1e-4)
    return train(model, torch.compile(model, backend="fpsim_eager", options=OPTIONS), part)


def parallel_checkpointed(part: slice) -> dict[str, Any]:
    """Activations are checkpointed, and the gradients of two pieces accumulate."""
    model = DistributedDataParallel(Model(checkpointed=True))
    return train(model, torch.compile(model, backend="fpsim_eager", options=OPTIONS), part, pieces=2)


def sharded(part: slice) -> dict[str, Any]:
    """FSDP2 with blocks that are compiled separately, as is usual."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    for block in model.blocks:
        block.compile(backend="fpsim", options=OPTIONS)
        fully_shard(block)
    return train(fully_shard(model), model, part)


def sharded_and_compiled_whole(part: slice) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return train(model, torch.compile(model, backend="fpsim_eager", options=OPTIONS), part)


def refusal_of_another_policy() -> str:
    """The error of compiling when rank 1 has other options; empty on the rank that compiled first."""
    options = {**OPTIONS, "gradient": ("e5m1", "e5m2")[dist.get_rank()]}
    try:
        torch.compile(Model(), backend="fpsim_eager", options=options)(batch()[0])
    except BackendCompilerFailed as error:
        return str(error.inner_exception)
    return ""


CASES = {
    f.__name__: f for f in (parallel, parallel_checkpointed, parallel_in_buckets, sharded, sharded_and_compiled_whole)
}


def work(rank: int) -> dict[str, Any]:
    """The results of this rank in each case."""
    each = SAMPLES // dist.get_world_size()
    part = slice(rank * each, (rank + 1) * each)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        torch._dynamo.reset()
        found[name] = case(part)
    torch._dynamo.reset()
    return {**found, "refusal": refusal_of_another_policy()}
