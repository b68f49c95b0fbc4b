"""Training on several processes started by ``torchrun``: data-parallel (DDP) or with sharded state (FSDP2).

A run on one process goes through the same calls, which then do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Parallel:
    """How processes share a run.

    Attributes:
        kind: ``ddp``: every process holds everything and the gradients are averaged. ``fsdp2``: parameters, gradients
            and optimizer state are sharded between steps; the model is one unit, gathered whole for its forward and
            backward pass, so that it is compiled as one graph and module globs mean the same as elsewhere.
        rank, world: of this process, and how many there are.

    Each process takes its share of every batch: ``batch`` is that of all together.
    """

    kind: str = "ddp"
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of parallel training {self.kind!r}: use one of {', '.join(KINDS)}")

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This process's part of ``batch``, tensors of shape (batch, context)."""
        inputs, targets = batch
        if len(inputs) % self.world:
            raise ValueError(f"batch must be a multiple of the {self.world} processes, got {len(inputs)}")
        return inputs.chunk(self.world)[self.rank], targets.chunk(self.world)[self.rank]

    def wrap(self, loss_of: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_of``, a compiled module, with gradients averaged over all processes after backward."""
        if self.world == 1:
            return loss_of
        unit = _Unit(loss_of)
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(unit)
        from torch.distributed.fsdp import fully_shard

        fully_shard(unit)
        return unit

    def exchange(self, wrapped: Any, loss_of: Callable[..., Any]) -> Callable[..., Any]:
        """``wrapped``, as `wrap` returned it, with ``loss_of`` in it: the same parameters, compiled in another way."""
        if self.world == 1:
            return loss_of
        unit = wrapped.module if self.kind == "ddp" else wrapped
        unit.compiled = loss_of
        return wrapped

    @contextmanager
    def whole_parameters(self, wrapped: Any) -> Iterator[None]:
        """Within it the parameters of ``wrapped``, as `wrap` returned it, are whole on every process."""
        sharded = self.world > 1 and self.kind == "fsdp2"
        if sharded:
            wrapped.unshard()
        try:
            yield
        finally:
            if sharded:
                wrapped.reshard()

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        return self._reduced([value])[0]

    def agreed(self, wish: bool) -> bool:
        """What the first process wishes, so that all do the same."""
        if self.world == 1:
            return wish
        answer = torch.tensor([int(wish)], device=self._device)
        torch.distributed.broadcast(answer, src=0)
        return bool(answer.item())

    def reduce_signals(self, signals: dict[str, float]) -> dict[str, float]:
        """Means over all processes; of ``max_abs_logit`` the largest."""
        if self.world == 1:
            return signals
        names = sorted(signals)
        reduced = dict(zip(names, self._reduced([signals[name] for name in names]), strict=True))
        if "max_abs_logit" not in signals:
            return reduced
        largest = torch.tensor(signals["max_abs_logit"], device=self._device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return {**reduced, "max_abs_logit": float(largest)}

    def _reduced(self, values: list[float]) -> list[float]:
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return (total / self.world).tolist()

    @property
    def _device(self) -> torch.device:
        on_gpu = torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @staticmethod
    def whole(value: Tensor) -> float:
        """A norm, also one that is spread over processes."""
        return float(value.full_tensor() if hasattr(value, "full_tensor") else value)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The weights and the optimizer's state, gathered on the first process; called by all."""
        if self.world == 1:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": moments}

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take up what `state` gathered."""
        if self.world == 1:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )


class _Unit(nn.Module):
    """The compiled model as the one thing that is gathered, scattered or averaged: around the graph, not inside.

    torch wraps parameters once, and a run may be compiled several times: what is compiled can be exchanged.
    """

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *batch: Tensor) -> Any:
        return self.compiled(*batch)


def from_environment(kind: str, device: str) -> Parallel | None:
    """The group that ``torchrun`` describes in the environment, joined; None where there is just one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return None
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    return Parallel(kind, torch.distributed.get_rank(), world)
