"""Two processes, each with half of the data: the averaged operator is that of all data; sharded modules are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fpsim.curvature import averaged, eigenpairs, functional_loss, functional_outputs, hessian, label_count, trace
from fpsim.sharpness import sam
from tests.curvature.small_models import case, dense_hessian, relative, token_loss
from tests.shared.ranks import error_of, results_of_two_ranks


def sharded(part: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """The messages that refuse a module under FSDP2, and eigenvalues found in the way that they recommend."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    inside, whole = case("layer norm").model, case("layer norm").model
    fully_shard(inside.head)
    fully_shard(whole.head)
    fully_shard(whole)
    attempts: dict[str, Callable[[], Any]] = {
        "whole": lambda: functional_loss(whole, token_loss, batch=part),
        "inside": lambda: functional_outputs(inside, batch=part),
        "hessian": lambda: hessian(lambda p: p["head.weight"].sum(), dict(whole.named_parameters())),
        "sam": lambda: sam(lambda p: p["head.weight"].sum(), dict(inside.named_parameters())),
    }
    state = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True))
    plain = case("layer norm").model
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()  # so that the values come from the shards
    plain.load_state_dict(state)
    local = hessian(functional_loss(plain, token_loss, batch=part), dict(plain.named_parameters()))
    found = eigenpairs(averaged(local, weight=label_count(part)), 2, tol=1e-10)
    return {"refused": {name: error_of(attempt) for name, attempt in attempts.items()}, "values": found.eigenvalues}


def work(rank: int) -> dict[str, Any]:
    """Eigenpairs and trace of the averaged operator, and an error that both ranks must see."""
    small = case("layer norm")
    wrapped = torch.nn.parallel.DistributedDataParallel(small.model)
    tokens, targets = small.batch
    part = (tokens[:1], targets[:1]) if rank == 0 else (tokens[1:], targets[1:])
    local = hessian(functional_loss(wrapped, token_loss, batch=part), dict(wrapped.named_parameters()))
    whole = averaged(local, weight=label_count(part))
    found = eigenpairs(whole, 2, tol=1e-10)
    nothing = tokens[1:], torch.full_like(targets[1:], -100)  # whose loss is NaN
    alone = hessian(functional_loss(wrapped, token_loss, batch=(part, nothing)[rank]), dict(wrapped.named_parameters()))
    weighted = averaged(alone, weight=label_count((part, nothing)[rank]))
    differing = torch.full((local.size,), float(rank))
    return {
        "values": found.eigenvalues,
        "trace": trace(whole, tol=0, max_products=30).estimate,
        "error": error_of(lambda: whole.matvec(differing)),
        "alone": weighted.matvec(torch.ones(local.size)),
        "sharded": sharded(part),
    }


def test_two_ranks_average_their_products(tmp_path):
    first, second = results_of_two_ranks(work, tmp_path)
    assert torch.equal(first["values"], second["values"]) and first["trace"] == second["trace"]
    small = case("layer norm")
    whole = hessian(small.loss, small.params)
    assert relative(first["values"], eigenpairs(whole, 2, tol=1e-10).eigenvalues) <= 1e-10
    assert abs(first["trace"] - trace(whole, tol=0, max_products=30).estimate) <= 1e-10
    tokens, targets = small.batch
    alone = functional_loss(small.model, token_loss, batch=(tokens[:1], targets[:1]))
    product = dense_hessian(alone, small.params) @ torch.ones(whole.size, dtype=torch.float64)
    for result in (first, second):
        assert relative(result["alone"], product) <= 1e-12
        assert "same seed" in result["error"]
        assert relative(result["sharded"]["values"], first["values"]) <= 1e-12
        refused = result["sharded"]["refused"]
        assert refused["whole"].startswith(
            "ValueError: the parameters of the module are sharded over processes (FSDP): load them"
        )
        assert refused["inside"].startswith("ValueError: the parameters of the module head are sharded")
        assert "is sharded over processes (a DTensor): load them" in refused["hessian"]
        assert refused["sam"].startswith("ValueError: head.weight is sharded")
        assert all("get_model_state_dict" in message for message in refused.values())


def test_without_processes_it_is_an_error():
    with pytest.raises(RuntimeError, match="init_process_group"):
        averaged(hessian(lambda p: p["x"].sum(), {"x": torch.ones(2)}))
