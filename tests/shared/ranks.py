"""Two processes with a process group, for tests of computations over ranks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def results_of_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """``work(rank)`` of ranks 0 and 1, each in a fresh process with one thread, joined by gloo.

    Args:
        work: a function at the top level of a module, so that it can be pickled.
        folder: an empty folder for the results, which `torch.save` must be able to store.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    multiprocessing.spawn(_run, args=(work, address, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, work: Callable[[int], Any], address: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def error_of(work: Callable[[], Any]) -> str:
    """Type and message of the ValueError or RuntimeError that ``work`` raises, or the repr of its result."""
    try:
        return repr(work())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
