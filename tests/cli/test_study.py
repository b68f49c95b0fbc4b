"""``fpsim study`` does the same as the Python functions, and ends with one plain line after wrong input."""

from __future__ import annotations

import json
import re
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
        (["experiment", "12"], "no experiment 12"),
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


#: The user's own scripts, and what is wrong with them.
WRONG_SCRIPTS = {
    "def build(:\n": "own.py fails when it is executed, line 1: SyntaxError: invalid syntax",
    "import os\nimport nothing_like_this\n": "line 2: ModuleNotFoundError: No module named 'nothing_like_this'",
    "raise RuntimeError('at\\nimport')\n": "own.py fails when it is executed, line 1: RuntimeError: at import",
    "import sys\nsys.exit(3)\n": "line 2: SystemExit: 3",
    "def bulid(): pass\n": "own.py has no function 'build' (did you mean 'bulid'?)",
    "def build(vocabulary):\n    return {}['a']\n": "fails when it builds its module, line 2: KeyError: 'a'",
    "def build(): return 3\n": "own.py:build must return a torch.nn.Module, got int",
    SCRIPT.replace(
        "vocabulary, vocabulary)", "vocabulary, 9)"
    ): "to logits of shape (8, 12, 256): it returns shape (8, 12, 9)",
    SCRIPT.replace("(vocabulary, ", "(50, "): "fails on tokens of shape (8, 12) below 256: IndexError: index out of",
    """
import torch

class Wrong(torch.nn.Module):
    def forward(self, tokens):
        return tokens @ tokens

def build(): return Wrong()
""": "fails on tokens of shape (8, 12) below 256, line 6: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    """
import torch

class Wrong(torch.nn.Module):
    def forward(self, tokens): return {}

def build(): return Wrong()
""": "must return logits, or an object with .logits: it returns dict",
}


@pytest.mark.parametrize("script", WRONG_SCRIPTS, ids=range(len(WRONG_SCRIPTS)))
def test_a_wrong_script_is_found_before_the_first_run_in_one_line(own, tmp_path, script):
    (tmp_path / "own.py").write_text(script)
    done = study("run", *own, "--formats", "fp32")
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert WRONG_SCRIPTS[script] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpus", "1"], "--cpus and --gpus are for the workers of Ray: add --executor ray"),
        (["--address", "auto"], "the address auto is that of a Ray cluster, and the executor is serial"),
        (["--device", "gpu"], "unknown device 'gpu': use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "CUDA devices here: use device='cpu'"),
        (["--device", "meta"], "device 'meta' holds no values"),
        (["--vocabulary", "50"], "the data has a token 119 and the model 50 words"),
        (["--context", "1000"], "the text is too short"),
        (["--learning-rates", "nan"], "learning_rate must be 0 or above and finite, got nan"),
        (["--loss-scale", "inf"], "loss_scale must be above 0 and finite, got inf"),
        (["--out", "/proc/none"], "/proc/none: No such file or directory"),
        (["--out", "{tmp}/my.txt"], "my.txt/scripts: Not a directory"),
        (["--data", "{tmp}/binary.txt"], "binary.txt is not UTF-8: byte 0xff at offset 0"),
        (["--data", "{tmp}/empty"], "no text in the folder"),
        (["--model", "{tmp}/own.py"], "own.py' names no function: write path/to/script.py:function"),
        (["--model", "{tmp}/none.py:build"], "no script at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_found_before_the_first_run_in_one_line(own, tmp_path, options, complaint):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 400)
    (tmp_path / "empty").mkdir()
    done = study("run", *own, "--formats", "fp32", *(option.format(tmp=tmp_path) for option in options))
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "config.json is broken: JSONDecodeError"),
        ("[1]", "config.json is broken: it holds no JSON object but list"),
        ('{"steps": "many"}', "steps of RunConfig is a value of type int, got 'many'"),
        ('{"clip": "no"}', "clip of RunConfig is a value of type int or float or NoneType, got 'no'"),
        ('{"model": 3}', "model of RunConfig is a value of type dict, got 3"),
        ('{"model": {"layers": 1.5}}', "layers of ModelConfig is a value of type int, got 1.5"),
        ('{"device": "cuda:99"}', "CUDA devices here"),
        (None, "config.json: No such file or directory"),
    ],
)
def test_a_wrong_configuration_of_a_run_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    done = study("train", str(path), str(tmp_path / "out.parquet"))
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert complaint in line


def test_the_reason_of_a_failed_run_is_its_last_line(own, tmp_path):
    """An operator that cannot be rounded: torch.compile's own last line says something else."""
    (tmp_path / "own.py").write_text(
        """
import torch

class Hidden(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens):
        y = self.embed(tokens)
        return y + torch.linalg.inv(torch.eye(3) + y[0, :3, :3]).sum()

def build(vocabulary): return Hidden(vocabulary)
"""
    )
    done = study("run", *own, "--formats", "bf16", "--seeds", "1", "--retries", "0")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"bf16, run [0-9a-f]{16}, 1 tries: UnroundedError: aten\.linalg_inv_ex", last)


def test_ctrl_c_ends_quietly_and_says_how_to_go_on(own, tmp_path, monkeypatch):
    from fpsim.paper import workers

    computed = workers.execute

    def interrupted(job, worker):
        for message in computed(job, worker):
            if message.kind == "progress":
                raise KeyboardInterrupt
            yield message

    monkeypatch.setattr(workers, "execute", interrupted)
    done = study("run", *own, "--formats", "fp32", "--seeds", "1")
    assert done.exit_code == 130
    assert "Traceback" not in done.output
    out = tmp_path / "out"
    assert done.stderr.splitlines()[-1] == (
        f"interrupted: {out} keeps finished runs and the state of others; the same command goes on from there"
    )
    monkeypatch.undo()
    assert study("run", *own, "--formats", "fp32", "--seeds", "1").exit_code == 0


@pytest.mark.parametrize(("address", "executor"), [(None, "process"), ("10.0.0.1:6379", "ray")])
def test_ray_is_the_default_executor_of_a_cluster_alone(own, tmp_path, monkeypatch, address, executor):
    from fpsim.paper import sweeps

    class Chosen(Exception):
        pass

    def choose(name, *_):
        raise Chosen(name)

    monkeypatch.setattr(sweeps, "_pool", choose)
    own = own[: own.index("--executor")]
    done = study("run", *own, "--formats", "fp32", "--seeds", "1", *(["--address", address] if address else []))
    assert isinstance(done.exception, Chosen)
    assert str(done.exception) == executor


def test_the_rules_are_printed_as_they_are_registered():
    assert study("rules").output == preregistration()


def test_experiments_are_listed():
    done = study("list")
    assert done.exit_code == 0
    for number in range(1, 12):
        assert f"│ {number:2} │" in done.output or f"│ {number:<2} │" in done.output


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
