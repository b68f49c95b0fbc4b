"""``fpsim study`` does the same as the Python functions, and ends with one plain line after wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.paper.config import RunConfig, run_key, to_dict
from fpsim.paper.data import DataConfig
from fpsim.paper.models import ModelConfig
from fpsim.paper.storage import read_records
from fpsim.paper.sweeps import read_sweep
from fpsim.paper.training import run
from fpsim.paper.verdicts import preregistration

pytest.importorskip("pyarrow")

SCRIPT = """
import torch


def build(vocabulary):
    return torch.nn.Embedding(vocabulary, vocabulary)
"""


@pytest.fixture
def own(tmp_path, text) -> list[str]:
    """The options of a run that takes a moment: the user's own model and text, in this process."""
    (tmp_path / "own.py").write_text(SCRIPT)
    (tmp_path / "my.txt").write_bytes(text)
    model, data, out = f"{tmp_path}/own.py:build", f"{tmp_path}/my.txt", f"{tmp_path}/out"
    sizes = ["--context", "12", "--steps", "5", "--executor", "serial", "--interpret"]
    return ["--model", model, "--data", data, "--out", out, *sizes]


def study(*arguments: str):
    return CliRunner().invoke(app, ["study", *arguments])


def test_the_users_own_model_from_the_command_line(own, tmp_path):
    done = study("run", *own, "--formats", "fp32", "bf16", "--seeds", "2", "--learning-rates", "1e-3", "1e-2")
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "report.html") in done.output
    runs, facts = read_sweep(tmp_path / "out")
    found = {(run.condition, run.config.learning_rate, run.config.seed) for run in runs}
    assert found == {(name, rate, seed) for name in ("fp32", "bf16") for rate in (1e-3, 1e-2) for seed in (0, 1)}
    assert (tmp_path / "out" / "report.html").is_file()
    assert facts["title"].endswith("own.py:build on my.txt")


def test_options_may_be_repeated_too(own, tmp_path):
    done = study(
        "run", *own, "--formats", "fp32", "--seeds", "1", "--learning-rates", "1e-3", "--learning-rates", "1e-2"
    )
    assert done.exit_code == 0, done.output
    assert [run.config.learning_rate for run in read_sweep(tmp_path / "out")[0]] == [1e-3, 1e-2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--model", "tini"], "unknown model 'tini' (did you mean 'tiny'?)"),
        (["run", "--formats", "e4m3nf"], "e4m3nf"),
        (["run", "--data", "nothing.txt"], "no text at nothing.txt"),
        (["run", "--executor", "slurm"], "unknown executor 'slurm'"),
        (["experiment", "9"], "no experiment 9"),
        (["experiment", "1", "--size", "huge"], "unknown size 'huge': use one of quick, full, paper"),
        (["experiment", "1", "--conditions", "e8m7"], "no condition 'e8m7': there are 'e8m7 nearest'"),
        (["report", "nowhere"], "no sweep at nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(arguments, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = study(*arguments)
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_the_rules_are_printed_as_they_are_registered():
    assert study("rules").output == preregistration()


def test_experiments_are_listed():
    done = study("list")
    assert done.exit_code == 0
    for number in range(1, 9):
        assert f"│ {number} │" in done.output


def test_one_run_from_its_configuration(own, tmp_path):
    model = ModelConfig(family="script", script=own[1], context=12)
    config = RunConfig(model=model, data=DataConfig(own[3]), steps=4, backend="interpreted", validation_batches=1)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    done = study("train", str(tmp_path / "config.json"), str(tmp_path / "run.parquet"))
    assert done.exit_code == 0, done.output
    history, facts = read_records(tmp_path / "run.parquet")
    assert history == run(config)
    assert (facts["key"], facts["processes"]) == (run_key(config), 1)


def test_what_the_package_needs_is_installed_with_it():
    from importlib import resources

    files = resources.files("fpsim.paper")
    assert files.joinpath("preregistration.toml").is_file()
    assert files.joinpath("report.html.jinja").is_file()
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"fpsim.paper" = ["*.toml", "*.html.jinja"]' in project
