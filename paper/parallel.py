"""Training on several processes started by ``torchrun``: data-parallel (DDP) or with sharded state (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.training.wire import NarrowExchange

from .choices import check_choice
from .compiled_loss import Compile, Loss
from .config import RunConfig
from .trainer import Batch, Trainer, Update

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Parallel:
    """How processes share a run.

    Attributes:
        kind: ``ddp``: every process holds everything and the gradients are averaged. ``fsdp2``: parameters, gradients
            and optimizer state are sharded between steps; the model is one unit, gathered whole for its forward and
            backward pass, so that it is compiled as one graph and module globs mean the same as elsewhere.
        rank, world: of this process, and how many there are.

    Each process takes its share of every batch: ``RunConfig.batch`` is that of all together.

    Raises:
        ValueError: an unknown kind.
    """

    kind: str = "ddp"
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        check_choice("kind of parallel training", self.kind, KINDS)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This process's part of ``batch``, tensors of shape (batch, context).

        Raises:
            ValueError: the batch cannot be divided by the number of processes.
        """
        inputs, targets = batch
        if len(inputs) % self.world:
            raise ValueError(f"batch must be a multiple of the {self.world} processes, got {len(inputs)}")
        return inputs.chunk(self.world)[self.rank], targets.chunk(self.world)[self.rank]


class ParallelTrainer(Trainer):
    """A `Trainer` whose batches, gradients and measurements are shared by the processes of a group.

    Every process makes the same calls; all return the same numbers.

    Args:
        config, compile: as for `Trainer`.
        parallel: the group, of two processes or more.
    """

    def __init__(self, config: RunConfig, compile: Compile | None, parallel: Parallel) -> None:
        self._parallel = parallel
        self._unit: _Unit | None = None
        self._exchange: NarrowExchange | None = None
        super().__init__(config, compile)

    def install(self, compiled: Loss) -> None:
        """Train by ``compiled``; gradients are averaged over all processes after backward, as the recipe says.

        Raises:
            ValueError: the recipe has its own average of gradients, and it is not `DistributedDataParallel` that
                exchanges them, once in each step.
        """
        if self._unit is not None:
            self._unit.compiled = compiled
            return
        self._unit = _Unit(compiled)
        gradients = None if self.recipe is None else self.recipe.gradients
        if gradients is not None and (self._parallel.kind != "ddp" or self.config.accumulate > 1):
            raise ValueError(
                f"the recipe has {gradients}, once in each step: use --parallel ddp and accumulate=1, got "
                f"{self._parallel.kind} and accumulate={self.config.accumulate}"
            )
        if self._parallel.kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(self._unit)
            self._exchange = None if gradients is None else gradients.apply(wrapped, None)
            super().install(wrapped)
            return
        from torch.distributed.fsdp import fully_shard

        fully_shard(self._unit)
        super().install(self._unit)

    def update(self, micro_batches: Sequence[Batch], rate: float) -> Update:
        """`Trainer.update` on this process's part; the loss is the mean over all, the logits are its own."""
        own = super().update([self._parallel.share(batch) for batch in micro_batches], rate)
        return own._replace(loss=_mean(own.loss))

    def clip_gradients(self) -> Tensor:
        """`Trainer.clip_gradients`, also of gradients that are sharded."""
        norm: Any = super().clip_gradients()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def validation_loss(self, held_out: Sequence[Batch]) -> float:
        """`Trainer.validation_loss`: the mean over all processes."""
        return _mean(super().validation_loss([self._parallel.share(batch) for batch in held_out]))

    def hessian_eigenvalue(self, batch: Batch) -> float:
        """`Trainer.hessian_eigenvalue`, computed by every process from the whole ``batch``."""
        with self._whole_parameters():
            return super().hessian_eigenvalue(batch)

    def max_attention_logit(self, batch: Batch) -> float | None:
        """`Trainer.max_attention_logit`, computed by every process from the whole ``batch``."""
        with self._whole_parameters():
            return super().max_attention_logit(batch)

    def range_shares(self, batch: Batch) -> dict[str, float]:
        """`Trainer.range_shares`: the mean over all processes."""
        with self._whole_parameters():
            own = super().range_shares(self._parallel.share(batch))
        return _means(own)

    def logit_signals(self, last_tokens: Sequence[tuple[Tensor, Tensor]], *, lbfgsb: bool) -> dict[str, float]:
        """`Trainer.logit_signals`: the means over all processes, and the largest ``max_abs_logit``."""
        own = super().logit_signals(last_tokens, lbfgsb=lbfgsb)
        means = _means(own)
        largest = torch.tensor(own["max_abs_logit"], device=_device())
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return {**means, "max_abs_logit": float(largest)}

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """A context in which the parameters are whole on every process."""
        if self._parallel.kind != "fsdp2":
            yield
            return
        unit: Any = self._unit  # `fully_shard` adds the methods
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    def state_if(self, is_due: bool) -> dict[str, Any] | None:
        """`Trainer.state_if` where the first process finds it due: gathered there, and None on all others."""
        due = torch.tensor([int(is_due)], device=_device())
        torch.distributed.broadcast(due, src=0)
        if not due.item():
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": weights, "optimizer": moments} if self._parallel.is_first else None

    def precision_state(self) -> dict[str, Any]:
        """`Trainer.precision_state`, and the factor of a recipe's exchange of gradients."""
        exchange = {} if self._exchange is None else self._exchange.state_dict()
        return {**super().precision_state(), "exchange": exchange}

    def resume(self, index: int, state: Mapping[str, Any], precision: Mapping[str, Any]) -> None:
        """`Trainer.resume`, with the factor of a recipe's exchange of gradients."""
        super().resume(index, state, precision)
        if self._exchange is not None:
            self._exchange.load_state_dict(precision.get("exchange", {}))

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the weights and the optimizer of all processes to ``state``, which each of them has read whole."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )


def _mean(value: float) -> float:
    """The mean over all processes."""
    return _means({"value": value})["value"]


def _means(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over all processes; all have the same names."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(total)
    return dict(zip(names, (total / torch.distributed.get_world_size()).tolist(), strict=True))


def _device() -> torch.device:
    """The device of tensors that processes exchange."""
    on_gpu = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class _Unit(nn.Module):
    """The compiled model as the module that torch gathers, scatters or averages: around the graph, not inside.

    torch wraps parameters once, and a run may be compiled several times: ``compiled`` can be exchanged.
    """

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *batch: Tensor) -> Any:
        return self.compiled(*batch)


def from_environment(kind: str, device: str) -> Parallel | None:
    """Join the group that ``torchrun`` describes in the environment; None where there is a single process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return None
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    return Parallel(kind, torch.distributed.get_rank(), world)
