"""Two processes with a process group, for tests of computations over ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing import start_processes

from .processes import CONTEXT


def results_of_two_ranks(work: Callable[[int], Any], folder: Path, *, join: bool = True) -> list[Any]:
    """``work(rank)`` of ranks 0 and 1, each in a process of its own with one thread and the environment of `torchrun`.

    Args:
        work: a function at the top level of a module, or a `functools.partial` of one, so that it can be pickled.
        folder: an empty folder for the results, which `torch.save` must be able to store.
        join: whether to join the ranks by gloo before ``work``, or to leave that to it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_run, args=(work, port, folder, join), nprocs=2, start_method=CONTEXT.get_start_method())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, work: Callable[[int], Any], port: int, folder: Path, join: bool) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    if join:
        dist.init_process_group("gloo")
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()  # rank 0 holds the store, which the other may still need
    dist.destroy_process_group()


def error_of(work: Callable[[], Any]) -> str:
    """Type and message of the ValueError or RuntimeError that ``work`` raises, or the repr of its result."""
    try:
        return repr(work())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
