"""Two processes that share a run compute what one does, data-parallel and sharded, and resume with the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.config import RunConfig
from fpsim.paper.data import DataConfig, batches, load
from fpsim.paper.models import LanguageModel, build
from fpsim.paper.parallel import Parallel, from_environment
from fpsim.paper.record import Record
from fpsim.paper.training import records, run
from fpsim.recipes import Recipe
from fpsim.recipes.fp8_lm import NarrowGradients
from tests.shared.ranks import error_of, results_of_two_ranks

FACTS = ["loss", "gradient_norm", "validation_loss", "sharpness_5e4", "max_abs_logit", "hessian_eigenvalue"]
FACTS += ["saturated_activation", "underflowed_gradient"]


def facts(history: list[Record]) -> list[list[float | None]]:
    return [[getattr(record, name) for name in FACTS] for record in history]


#: No rounding from the third step on, and another format from the fourth.
STAGES: tuple = ((2, None), (3, {"format": "e8m1"}))


def measured(config: RunConfig, source: Path, stages: tuple) -> RunConfig:
    """A configuration that measures everything."""
    return replace(
        config,
        data=DataConfig(str(source)),
        options={"format": "e8m3", "modules": {"*lm_head": "bf16"}},
        backend="interpreted",
        measure_every=2,
        hessian_every=3,
        ranges_every=2,
        accumulate=2,
        stages=stages,
    )


def work(config: RunConfig, folder: Path, rank: int) -> dict[str, list[list[float | None]]]:
    """The facts in each kind of parallel training; a run that is resumed repeats them."""
    found = {}
    for kind in ("ddp", "fsdp2"):
        group = from_environment(kind, "cpu")
        assert group == Parallel(kind, rank, 2)
        whole = list(records(config, parallel=group))
        found[kind] = facts(whole)
        state = Checkpoint(folder / f"{kind}.pt", seconds=0)
        stream = records(config, parallel=group, checkpoint=state)
        part = list(islice(stream, 4))
        stream.close()
        resumed = list(records(config, parallel=group, checkpoint=state))
        if group.is_first:
            assert part == whole[:4] and resumed == whole, (part, whole, resumed)
    return found


@pytest.mark.timeout(1800)  # six runs in two processes
@pytest.mark.parametrize("stages", [STAGES, pytest.param((), marks=pytest.mark.exhaustive)], ids=["stages", "one"])
def test_two_processes_compute_what_one_does(config, text, tmp_path, stages):
    source = tmp_path / "times.txt"
    source.write_bytes(text)
    config = measured(config, source, stages)
    first, _ = results_of_two_ranks(partial(work, config, tmp_path), tmp_path, join=False)
    expected = facts(run(config))
    for kind in ("ddp", "fsdp2"):
        for row, wanted in zip(first[kind], expected, strict=True):
            assert [value is None for value in row] == [value is None for value in wanted]
            numbers = [(a, b) for a, b in zip(row, wanted, strict=True) if b is not None]
            # Rounding moves with the last bits of the sums, so the two part slowly.
            assert [a for a, _ in numbers] == pytest.approx([b for _, b in numbers], rel=5e-3), kind
        assert first[kind][0][:2] == pytest.approx(expected[0][:2], rel=1e-4)


def work_narrow(config: RunConfig, rank: int) -> dict[str, Any]:
    """The first step under the recipe's own average of gradients, and the errors of what cannot average so."""
    refused = [("fsdp2", config), ("ddp", replace(config, accumulate=2))]
    return {
        "facts": facts(list(records(config, parallel=from_environment("ddp", "cpu")))),
        "errors": [error_of(partial(_first, each, kind)) for kind, each in refused],
    }


def _first(config: RunConfig, kind: str) -> Record:
    return next(records(config, parallel=from_environment(kind, "cpu")))


@pytest.mark.timeout(600)
def test_gradients_are_averaged_as_the_recipe_says(config, text, tmp_path):
    source = tmp_path / "times.txt"
    source.write_bytes(text)
    recipe = Recipe("narrow sums", "", None, gradients=NarrowGradients())
    config = replace(config, data=DataConfig(str(source)), recipe=recipe, backend="interpreted", steps=1)
    first, second = results_of_two_ranks(partial(work_narrow, config), tmp_path, join=False)
    assert first == second
    model = LanguageModel(build(config.model, seed=config.seed))
    inputs, targets = next(batches(load(config.data, context=12).train, batch=4, context=12, seed=config.seed))
    halves = [
        torch.autograd.grad(model(*half), list(model.parameters()))
        for half in zip(inputs.chunk(2), targets.chunk(2), strict=True)
    ]
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    squares = {True: 0.0, False: 0.0}
    for (name, _), one, two in zip(model.named_parameters(), *halves, strict=True):
        squares[False] += float(((one + two) / 2).double().square().sum())
        mean = (one + two) / 2
        if name in linear:  # MS-AMP: the largest power of two that fits the largest value, over the root of two ranks
            s = 2.0 ** math.floor(math.log2(448 / float(torch.maximum(one.abs(), two.abs()).max()))) / math.sqrt(2)
            mean = q(q(one * s) + q(two * s)) / s / 2
        squares[True] += float(mean.double().square().sum())
    norm = first["facts"][0][FACTS.index("gradient_norm")]
    assert norm == pytest.approx(math.sqrt(squares[True]), rel=1e-5)
    assert abs(math.sqrt(squares[False] / squares[True]) - 1) > 1e-4  # so plain sums would be seen
    for found, got in zip(first["errors"], ["fsdp2 and accumulate=1", "ddp and accumulate=2"], strict=True):
        assert found.startswith("ValueError: the recipe has gradients of linear weights added in e4m3fn"), found
        assert found.endswith(f"use --parallel ddp and accumulate=1, got {got}"), found


def q(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def test_each_process_takes_its_part_of_a_batch():
    inputs, targets = torch.arange(12).view(4, 3), torch.arange(12, 24).view(4, 3)
    parts = [Parallel("ddp", rank, 2).share((inputs, targets)) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_what_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
        Parallel("ddp", 0, 3).share((torch.zeros(4, 2), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="unknown kind of parallel training 'pipeline': use one of ddp, fsdp2"):
        Parallel("pipeline")
