"""Two processes, each with half of the data: the averaged operator is that of all data."""

from __future__ import annotations

import socket

import pytest
import torch
from small_models import case, relative, token_loss
from torch import distributed as dist
from torch import multiprocessing

from fpsim.curvature import averaged, eigenpairs, functional_loss, hessian, label_count, trace


def work(rank: int, address: str, folder: str) -> None:
    """One rank's part: eigenpairs and trace of the averaged operator, and an error that both ranks must see."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    small = case("layer norm")
    wrapped = torch.nn.parallel.DistributedDataParallel(small.model)
    tokens, targets = small.batch
    part = (tokens[:1], targets[:1]) if rank == 0 else (tokens[1:], targets[1:])
    local = hessian(functional_loss(wrapped, token_loss, batch=part), dict(wrapped.named_parameters()))
    whole = averaged(local, weight=label_count(part))
    found = eigenpairs(whole, 2, tol=1e-10)
    differing = torch.full((local.size,), float(rank))
    try:
        whole.matvec(differing)
        message = "none"
    except ValueError as error:
        message = str(error)
    result = {"values": found.eigenvalues, "trace": trace(whole, tol=0, max_products=30).estimate, "error": message}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_average_their_products(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    multiprocessing.spawn(work, args=(address, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["values"], second["values"]) and first["trace"] == second["trace"]
    small = case("layer norm")
    whole = hessian(small.loss, small.params)
    assert relative(first["values"], eigenpairs(whole, 2, tol=1e-10).eigenvalues) <= 1e-10
    assert abs(first["trace"] - trace(whole, tol=0, max_products=30).estimate) <= 1e-10
    for result in (first, second):
        assert "same seed" in result["error"]


def test_without_processes_it_is_an_error():
    with pytest.raises(RuntimeError, match="init_process_group"):
        averaged(hessian(lambda p: p["x"].sum(), {"x": torch.ones(2)}))
