"""A sweep computes each run once, with the same bits on any executor, and loses nothing when workers die."""

from __future__ import annotations

import json
import multiprocessing
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fpsim.paper import sweeps, workers
from fpsim.paper.config import RunConfig, compile_key, from_dict, run_key, to_dict
from fpsim.paper.data import DataConfig
from fpsim.paper.models import ModelConfig
from fpsim.paper.record import Record
from fpsim.paper.storage import read_records, read_run, to_parquet
from fpsim.paper.sweeps import Planned, grid, read_sweep, sweep
from fpsim.paper.training import run
from fpsim.paper.workers import Job
from fpsim.policy import Policy
from fpsim.policy.shorthand import parse_shorthand
from fpsim.processors import usable_cores

pytest.importorskip("pyarrow")

#: The user's own model: it kills its process in a chosen call of forward, once, and raises in training if told so.
SCRIPT = """
    import os, pathlib, signal
    import torch

    FOLDER = pathlib.Path(__file__).parent


    class Small(torch.nn.Module):
        def __init__(self, vocabulary):
            super().__init__()
            self.embed = torch.nn.Embedding(vocabulary, 8)
            self.head = torch.nn.Linear(8, vocabulary)
            self.calls = 0

        def forward(self, tokens):
            self.calls += 1
            fatal = FOLDER / f"kill_at_{self.calls}"
            if fatal.exists():
                fatal.unlink()
                (FOLDER / "killed").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            if (FOLDER / "raise").exists() and self.training_has_begun():
                raise ArithmeticError("this model never works")
            return self.head(self.embed(tokens))

        def training_has_begun(self):
            return torch.is_grad_enabled()


    def build(vocabulary, context):
        assert context == 12
        return Small(vocabulary)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "own" / "model.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.fixture
def base(config, text, tmp_path) -> RunConfig:
    source = tmp_path / "times.txt"
    source.write_bytes(text)
    return replace(config, data=DataConfig(str(source)), backend="interpreted", measure_every=2)


@pytest.fixture
def own(base, script) -> RunConfig:
    """A run of the user's own model, unrounded: nothing is compiled, so that forward is called in every step."""
    model = ModelConfig(family="script", script=f"{script}:build", context=12)
    return replace(base, model=model, validate_every=6)


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def histories(folder: Path) -> dict[str, list[Record]]:
    return {path.stem: read_records(path)[0] for path in sorted((folder / "runs").glob("*.parquet"))}


#: A model of few kernels: the compiler is slow.
FEW_KERNELS = """
    from torch import nn

    def build(vocabulary, context):
        return nn.Sequential(nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary))
"""


def test_recipes_and_formats_stand_beside_each_other_in_a_grid():
    plan = grid(RunConfig(), formats=["fp32"], recipes=["bf16", "te_current"], seeds=[5])
    assert [planned.condition for planned in plan] == ["fp32", "bf16", "te_current"]
    assert [planned.config.options for planned in plan] == [None, {"format": "bf16"}, None]
    assert plan[2].config.recipe["policy"]["gradient"].startswith("e5m2/")
    with pytest.raises(ValueError, match="did you mean 'te_current'"):
        grid(RunConfig(), recipes=["te_curent"], seeds=[0])
    models = [ModelConfig(layers=layers, hidden=16, heads=2) for layers in (1, 2)]
    plan = grid(RunConfig(), formats=["fp32", "bf16"], seeds=[5], models=models)
    assert [each.condition for each in plan] == ["fp32, 1 x 16", "fp32, 2 x 16", "bf16, 1 x 16", "bf16, 2 x 16"]
    assert [each.config.model for each in plan] == 2 * models
    with pytest.raises(ValueError, match="needs formats or recipes"):
        grid(RunConfig(), seeds=[0])


@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
def test_another_process_computes_the_same_bits(base, tmp_path, quiet, backend):
    if backend == "compiled":
        script = tmp_path / "few_kernels.py"
        script.write_text(textwrap.dedent(FEW_KERNELS))
        base = replace(base, model=ModelConfig(family="script", script=f"{script}:build", context=12))
    plan = grid(replace(base, backend=backend), formats=["e8m3/stochastic"], seeds=[0, 1])
    expected = {run_key(planned.config): run(planned.config) for planned in plan}
    outcome = sweep(plan, tmp_path / "sweep", executor="process", workers=1, console=quiet)
    assert (outcome.computed, outcome.reused, outcome.failures, outcome.retries) == (2, 0, (), 0)
    assert histories(tmp_path / "sweep") == expected


def test_a_folder_says_what_it_holds(own, tmp_path, quiet):
    plan = grid(own, formats=["fp32"], seeds=[3], learning_rates=[1e-3, 1e-2])
    sweep(plan, tmp_path / "sweep", executor="serial", title="A title", facts={"number": 7}, console=quiet)
    runs, facts = read_sweep(tmp_path / "sweep")
    assert [(run.condition, run.config) for run in runs] == [("fp32", planned.config) for planned in plan]
    assert (facts["title"], facts["number"], facts["failures"]) == ("A title", 7, [])
    assert {"packages", "source", "git", "machine", "command", "time"} <= set(facts["starts"][0])
    assert runs[0].facts["packages"]["torch"] == facts["starts"][0]["packages"]["torch"]
    assert runs[0]["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert runs[0]["sharpness_5e4"][1] > 0
    assert (tmp_path / "sweep" / "scripts" / "model.py").read_text() == textwrap.dedent(SCRIPT)
    assert not list((tmp_path / "sweep").rglob("*.pt"))


def test_more_seeds_reuse_what_is_there(own, tmp_path, quiet):
    folder = tmp_path / "sweep"
    sweep(grid(own, formats=["fp32"], seeds=[0, 1]), folder, executor="serial", console=quiet)
    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    outcome = sweep(grid(own, formats=["fp32"], seeds=[0, 1, 2]), folder, executor="serial", console=quiet)
    assert (outcome.computed, outcome.reused) == (1, 2)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    runs, facts = read_sweep(folder)
    assert [run.config.seed for run in runs] == [0, 1, 2]
    assert len(facts["starts"]) == 2


def test_a_killed_worker_loses_nothing(own, script, tmp_path, quiet):
    plan = grid(own, formats=["fp32"], seeds=[0, 1, 2])
    expected = {run_key(planned.config): run(planned.config) for planned in plan}
    (script.parent / "kill_at_4").touch()
    folder = tmp_path / "sweep"
    outcome = sweep(plan, folder, executor="process", workers=2, checkpoint_seconds=0, console=quiet)
    assert (outcome.computed, outcome.failures, outcome.retries) == (3, (), 1)
    assert int((script.parent / "killed").read_text()) != os.getpid()
    assert histories(folder) == expected


def test_a_killed_ray_worker_loses_nothing(own, script, tmp_path, quiet):
    pytest.importorskip("ray")
    plan = grid(own, formats=["fp32"], seeds=[0, 1, 2])
    expected = {run_key(planned.config): run(planned.config) for planned in plan}
    (script.parent / "kill_at_4").touch()
    folder = tmp_path / "sweep"
    outcome = sweep(plan, folder, executor="ray", workers=2, checkpoint_seconds=0, console=quiet)
    assert (outcome.computed, outcome.failures, outcome.retries) == (3, (), 1)
    assert (script.parent / "killed").exists()
    assert histories(folder) == expected


def test_a_run_that_always_fails_is_tried_again_and_reported(own, script, tmp_path, quiet):
    plan = grid(own, formats=["fp32"], seeds=[0])
    (script.parent / "raise").touch()
    folder = tmp_path / "sweep"
    outcome = sweep(plan, folder, executor="serial", retries=1, console=quiet)
    assert (outcome.computed, outcome.retries) == (0, 1)
    [failure] = outcome.failures
    assert (failure.key, failure.condition, failure.tries) == (run_key(plan[0].config), "fp32", 2)
    assert failure.text.strip().endswith("ArithmeticError: this model never works")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        read_sweep(folder)
    (script.parent / "raise").unlink()
    assert sweep(plan, folder, executor="serial", console=quiet).computed == 1
    assert read_sweep(folder)[1]["failures"] == []


def test_an_interrupted_sweep_goes_on_from_the_checkpoint(own, script, tmp_path, quiet):
    plan = grid(own, formats=["fp32"], seeds=[0])
    expected = run(plan[0].config)
    folder = tmp_path / "sweep"
    (script.parent / "kill_at_4").touch()
    outcome = sweep(plan, folder, executor="process", retries=0, checkpoint_seconds=0, console=quiet)
    [failure] = outcome.failures
    assert "signal 9" in failure.text
    assert [record["step"] for record in torch.load(folder / "checkpoints" / f"{failure.key}.pt")["records"]] == [
        1,
        2,
        3,
    ]
    (script.parent / "kill_at_7").touch()  # three more steps and two batches of validation do not get there
    assert sweep(plan, folder, executor="serial", console=quiet).computed == 1
    assert histories(folder)[failure.key] == expected
    assert (script.parent / "kill_at_7").exists()


def test_a_plan_must_make_sense(own, tmp_path):
    with pytest.raises(ValueError, match="plan is empty"):
        sweep([], tmp_path)
    with pytest.raises(ValueError, match=r"unknown executor 'slurm'.*ray, process, serial"):
        sweep([Planned("a", own)], tmp_path, executor="slurm")
    with pytest.raises(ValueError, match="'a' and 'b' are the same configuration"):
        sweep([Planned("a", own), Planned("b", own)], tmp_path, executor="serial")
    with pytest.raises(FileNotFoundError, match="no sweep at"):
        read_sweep(tmp_path / "nothing")


def test_each_worker_has_its_own_gpu(base, monkeypatch):
    """By torch's current device, which cuda without a number means."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    job = Job("key", to_dict(replace(base, device="cuda")), {}, None, 0.0, 1)
    assert sweeps._pool("process", [job] * 5, None, None, {}).workers == 2
    assert sweeps._pool("process", [job] * 5, 4, None, {}).workers == 4
    on_cpu = replace(job, config=to_dict(base))
    assert sweeps._pool("process", [on_cpu] * 99, None, None, {}).workers == usable_cores()

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(workers, "execute", lambda job, worker: iter([]))
    for worker in range(3):
        for each in (job, on_cpu, replace(job, config=to_dict(replace(base, device="cuda:1")))):
            here, there = multiprocessing.Pipe()
            here.send(each)
            here.close()
            workers._serve(there, worker)
    assert chosen == [0, 1, 0]


def test_conditions_are_presets_casts_or_two_casts():
    assert parse_shorthand("fp32") is None
    assert parse_shorthand("bf16") == {"format": "bf16"}
    assert parse_shorthand("paper:e8m3") == Policy.preset("paper:e8m3").to_dict()
    assert parse_shorthand("e4m3fn+e5m2")["gradient"] == "e5m2"
    with pytest.raises(ValueError, match="e4m3nf"):
        parse_shorthand("e4m3nf")


def test_records_survive_parquet_bit_by_bit():
    values = [0.1, float("inf"), -0.0, 5e-324]
    history = [Record(step, value, 1 / 3, 1e-3, None, 0.5, smoothed_loss=value) for step, value in enumerate(values)]
    found, facts = read_records(to_parquet(history, {"condition": "a", "list": [1, None]}))
    assert [[str(v) for v in vars(record).values()] for record in found] == [
        [str(v) for v in vars(record).values()] for record in history
    ]
    assert facts == {"condition": "a", "list": [1, None]}


def test_missing_measurements_are_not_numbers_in_columns(tmp_path, base):
    history = [Record(1, 2.0, 1.0, 1e-3, None, 0.5), Record(2, 3.0, 1.0, 1e-3, 4.0, 0.5)]
    path = tmp_path / "run.parquet"
    path.write_bytes(to_parquet(history, {"key": "k", "config": to_dict(base)}))
    found = read_run(path, "a")
    assert found["loss"].tolist() == [2.0, 3.0]
    assert str(found["validation_loss"].tolist()) == "[nan, 4.0]"
    assert found.config == base


def test_other_parquet_files_are_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no run of fpsim's study"):
        read_records(tmp_path / "other.parquet")


# -- configurations ----------------------------------------------------------------------------------------------------


def test_a_configuration_survives_json(base):
    config = replace(
        base,
        options={"format": "e8m3/toward_zero", "modules": {"*lm_head": "bf16"}},
        stages=((2, None), (3, {"format": "bf16"})),
        clip=None,
    )
    plain = json.loads(json.dumps(to_dict(config), allow_nan=False))
    assert to_dict(from_dict(plain)) == to_dict(config)
    assert run_key(from_dict(plain)) == run_key(config)
    assert from_dict({}) == RunConfig()


def test_the_key_of_a_run_is_that_of_what_decides_it(base, tmp_path):
    assert run_key(base) == run_key(replace(base, options=None))
    same = [{"policy": "paper:e8m3"}, dict(Policy.preset("paper:e8m3").to_dict())]
    assert len({run_key(replace(base, options=options)) for options in same}) == 1
    others = [
        base,
        replace(base, seed=1),
        replace(base, options={}),
        replace(base, stages=((2, {}),)),
        replace(base, data=replace(base.data, quality="noisy", level=0.5)),
        replace(base, model=replace(base.model, layers=2)),
    ]
    assert len({run_key(config) for config in others}) == len(others)
    before = run_key(base)
    Path(base.data.path).write_bytes(b"another text " * 100)
    assert run_key(base) != before


def test_runs_share_code_whatever_their_seed_rate_and_text(base):
    same = [base, replace(base, seed=1, learning_rate=1.0, steps=9, data=DataConfig())]
    assert len({compile_key(config) for config in same}) == 1
    others = [base, replace(base, options={}), replace(base, batch=8), replace(base, measure_every=0)]
    assert len({compile_key(config) for config in others}) == 4


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"attention": "flash"}, "unknown attention 'flash'.*opened, fused"),
        ({"backend": "compile"}, "did you mean 'compiled'"),
        ({"lbfgsb_every": 3}, "multiple of measure_every"),
        ({"stages": ((9, None),)}, "between 0 and steps=6"),
        ({"clip": 0.0}, "clip must be above 0, or None"),
    ],
)
def test_impossible_configurations_are_refused_with_the_remedy(config, wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(config, **wrong)


def test_unknown_fields_are_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"unknown field 'learning_rat' of RunConfig .did you mean 'learning_rate'"):
        from_dict({"learning_rat": 1.0})
    with pytest.raises(ValueError, match=r"unknown field 'layer' of ModelConfig .did you mean 'layers'"):
        from_dict({"model": {"layer": 1}})
