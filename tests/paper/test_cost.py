"""The cost of an experiment is that of its measured steps, times the tokens of its runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fpsim.cli.study import app
from fpsim.paper import cost
from fpsim.paper.config import RunConfig
from fpsim.paper.models import MODELS
from fpsim.paper.record import Record
from fpsim.paper.sweeps import Planned


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that are run: each step takes 2 s for each window, and the first one 5 s more."""
    configs: list[RunConfig] = []

    def run(config: RunConfig, data: object) -> list[Record]:
        configs.append(config)
        seconds = [2.0 * config.batch] * config.steps
        seconds[0] += 5
        return [Record(i + 1, 1.0, 1.0, 1e-3, None, each, 1.0) for i, each in enumerate(seconds)]

    monkeypatch.setattr(cost, "run", run)
    return configs


def test_costs_are_measured_once_for_each_condition_and_multiplied_by_all_runs(measured: list[RunConfig]) -> None:
    base = RunConfig(MODELS["toy"], steps=100, batch=4, accumulate=3, measure_every=5, hessian_every=10)
    plan = [Planned(name, replace(base, seed=seed)) for seed in range(2) for name in ("a", "b")]
    first, second = cost.costs(plan, windows=2, steps=3)
    assert [(config.batch, config.accumulate, config.steps) for config in measured] == [(2, 1, 4)] * 2
    assert all(config.measure_every == config.hessian_every == 0 for config in measured)
    assert (first.condition, second.condition) == ("a", "b")
    assert first.runs == 2
    assert first.tokens == 100 * 4 * 3 * 32
    assert first.seconds_per_token == 4 / (2 * 32)  # 2 windows of 32 tokens in 4 s
    assert first.seconds_to_compile == 5
    assert first.hours == (2 * 38400 * 0.0625 + 5) / 3600
    next(cost.costs(plan))
    assert measured[-1].batch == 4


def test_bad_numbers_and_missing_gpus_are_refused(measured: list[RunConfig]) -> None:
    plan = [Planned("a", RunConfig(MODELS["toy"], device="cuda"))]
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        next(cost.costs(plan, steps=0))
    with pytest.raises(ValueError, match="at least 1, got 3 and 0"):
        next(cost.costs(plan, windows=0))
    if not cost.torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has none: add --device cpu"):
            next(cost.costs(plan))


def test_the_command_shows_each_condition_and_the_sum(measured: list[RunConfig]) -> None:
    command = ["cost", "1", "--device", "cpu", "--windows", "1", "--conditions", "e8m7 nearest", "e8m3 truncated"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert len(measured) == 2
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    # 10,000 steps of 8 windows, 64 times, of 2048 tokens; 3 runs; 2 s for 2048 tokens
    assert rows == [
        ["e8m7 nearest", "3", "1.05e+10", "976.6", "5", "8.53e+03"],
        ["e8m3 truncated", "3", "1.05e+10", "976.6", "5", "8.53e+03"],
        ["all", "6", "", "", "", "1.71e+04"],
    ]


def test_an_unknown_size_is_refused() -> None:
    done = CliRunner().invoke(app, ["cost", "1", "--size", "huge"])
    assert "unknown size 'huge': use one of quick, full, paper" in done.output
