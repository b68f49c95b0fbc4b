"""DDP and FSDP2 under a policy, in two processes: together they compute what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.compile_backend.two_ranks import CASES, OPTIONS, SAMPLES, Model, train, work
from tests.shared.ranks import results_of_two_ranks


def alone(options: dict[str, str] | None) -> dict[str, Any]:
    """The results of one process on all samples."""
    torch._dynamo.reset()
    model = Model()
    forward = torch.compile(model, backend="fpsim_eager", options=options) if options else model
    return train(model, forward, slice(0, SAMPLES))


def names_without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    """They agree in outputs, gradients and the parameters after a rounded optimizer step.

    If the ranks have different policies, the later one is refused.
    """
    ranks, want, unrounded = results_of_two_ranks(work, tmp_path), alone(OPTIONS), alone(None)
    assert not torch.equal(want["outputs"], unrounded["outputs"])
    assert not torch.equal(want["gradients"]["blocks.0.up.weight"], unrounded["gradients"]["blocks.0.up.weight"])
    for case in CASES:
        found = [rank[case] for rank in ranks]
        assert torch.equal(torch.cat([each["outputs"] for each in found]), want["outputs"]), case
        for what in ("gradients", "state", "parameters"):
            for each in found:
                got = names_without_prefix(each[what])
                assert got.keys() == want[what].keys()
                for name, tensor in got.items():
                    assert torch.equal(tensor, want[what][name]), (case, what, name)
    assert [rank["parallel"]["escaped"] for rank in ranks] == [0, 0]
    (message,) = filter(None, (rank["refusal"] for rank in ranks))  # the first to compile knows of no other
    assert "gradient is" in message and "whose policy is not that of rank" in message
