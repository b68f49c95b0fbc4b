"""A sweep's folder outlives killed processes, full disks, broken files and other sweeps."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fpsim.paper import checkpoint as checkpoint_module
from fpsim.paper import sweeps
from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.config import RunConfig, run_key
from fpsim.paper.data import DataConfig
from fpsim.paper.models import ModelConfig
from fpsim.paper.record import Record
from fpsim.paper.report import report
from fpsim.paper.storage import locked, read_records, replace_file
from fpsim.paper.sweeps import Outcome, Planned, grid, read_sweep, sweep
from fpsim.paper.training import run

pytest.importorskip("pyarrow")

SCRIPT = """
import torch


def build(vocabulary):
    return torch.nn.Sequential(torch.nn.Embedding(vocabulary, 4), torch.nn.Linear(4, vocabulary))
"""


@pytest.fixture
def own(config, text, tmp_path) -> RunConfig:
    """A run of the user's own model that takes a moment."""
    (tmp_path / "own.py").write_text(SCRIPT)
    (tmp_path / "times.txt").write_bytes(text)
    model = ModelConfig(family="script", script=f"{tmp_path}/own.py:build", context=12)
    return replace(config, model=model, data=DataConfig(f"{tmp_path}/times.txt"), backend="interpreted")


@pytest.fixture
def plan(own) -> list[Planned]:
    return grid(own, formats=["fp32"], seeds=[0])


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "sweep"


def compute(plan: list[Planned], folder: Path) -> Outcome:
    return sweep(plan, folder, executor="serial", console=Console(quiet=True))


def records_of(plan: list[Planned], folder: Path) -> list[Record]:
    return read_records(folder / "runs" / f"{run_key(plan[0].config)}.parquet")[0]


def unfinished(config: RunConfig, path: Path) -> None:
    """Write the checkpoint of ``config`` after three of its steps, as a sweep does."""
    from fpsim.paper.training import records

    stream = records(config, checkpoint=Checkpoint(path, seconds=0, is_own=True))
    for _ in range(4):
        next(stream)
    stream.close()


# -- broken files ------------------------------------------------------------------------------------------------------

BROKEN = {"empty": b"", "cut off": b"PK\x03\x04" + b"\0" * 4000, "text": b"no checkpoint", "pickle": b"\x80\x02}q\x00."}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.filterwarnings("always::UserWarning")
def test_a_broken_checkpoint_is_put_aside_and_its_run_starts_anew(plan, folder, content):
    path = folder / "checkpoints" / f"{run_key(plan[0].config)}.pt"
    replace_file(path, content)
    with pytest.warns(UserWarning, match=rf"{path.name} is broken .* now {path.name}.broken, and its run starts anew"):
        outcome = compute(plan, folder)
    assert (outcome.computed, outcome.failures, outcome.retries) == (1, (), 0)
    assert records_of(plan, folder) == run(plan[0].config)
    assert path.with_name(f"{path.name}.broken").read_bytes() == content
    assert compute(plan, folder).reused == 1


def test_a_checkpoint_that_is_cut_off_at_any_place_is_put_aside(plan, folder):
    path = folder / "checkpoints" / f"{run_key(plan[0].config)}.pt"
    unfinished(plan[0].config, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 7):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="is broken"):
            assert Checkpoint(path, is_own=True).read(run_key(plan[0].config)) is None
    path.write_bytes(whole)
    history, _ = Checkpoint(path, is_own=True).read(run_key(plan[0].config))
    assert history == run(plan[0].config)[:3]


def test_the_checkpoint_of_another_run_under_the_name_of_this_one_is_put_aside(own, plan, folder):
    path = folder / "checkpoints" / f"{run_key(plan[0].config)}.pt"
    unfinished(replace(own, seed=7), path)
    with pytest.warns(UserWarning, match="is the checkpoint of run"):
        assert compute(plan, folder).computed == 1
    assert records_of(plan, folder) == run(plan[0].config)


def test_a_checkpoint_of_another_version_is_put_aside(plan, folder, monkeypatch):
    """Else the run would have the bits of neither version."""
    path = folder / "checkpoints" / f"{run_key(plan[0].config)}.pt"
    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint_module, "_code", lambda: {"fpsim": "0" * 16, "torch": "2.11.0"})
        unfinished(plan[0].config, path)
    now = rf"fpsim [0-9a-f]{{16}}, torch {torch.__version__.replace('+', '.')}"
    with pytest.warns(UserWarning, match=rf"was written by fpsim 0{{16}}, torch 2.11.0, and this is {now}"):
        assert compute(plan, folder).computed == 1
    assert records_of(plan, folder) == run(plan[0].config)
    assert path.with_name(f"{path.name}.broken").exists()


def test_a_folder_in_place_of_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(IsADirectoryError):
        Checkpoint(tmp_path).read("key")


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1], ids=["empty", "start", "half", "without end"])
def test_a_broken_result_is_put_aside_and_computed_again(plan, folder, keep):
    compute(plan, folder)
    path = folder / "runs" / f"{run_key(plan[0].config)}.parquet"
    whole, expected = path.read_bytes(), records_of(plan, folder)
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        read_sweep(folder)
    outcome = compute(plan, folder)
    assert (outcome.computed, outcome.reused) == (1, 0)
    assert records_of(plan, folder) == expected
    assert path.with_name(f"{path.name}.broken").exists()


def test_the_result_of_another_run_is_put_aside(own, plan, folder):
    others = grid(own, formats=["fp32"], seeds=[5])
    compute([*plan, *others], folder)
    mine, other = (folder / "runs" / f"{run_key(each[0].config)}.parquet" for each in (plan, others))
    mine.write_bytes(other.read_bytes())
    assert compute(plan, folder).computed == 1
    assert [found.config.seed for found in read_sweep(folder)[0]] == [0, 5]


def test_a_report_names_a_broken_result_and_shows_the_others(own, folder):
    plan = grid(own, formats=["fp32"], seeds=[0, 1])
    compute(plan, folder)
    path = folder / "runs" / f"{run_key(plan[1].config)}.parquet"
    path.write_bytes(b"PAR1")
    runs, facts = read_sweep(folder)
    assert [found.config.seed for found in runs] == [0]
    [failure] = facts["failures"]
    assert failure["key"] == path.stem
    assert failure["text"].startswith(f"{path} is broken: ")
    assert f"{path} is broken" in report(folder).read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": 3}', '{"plan": [{}]}'])
def test_the_plan_of_a_broken_description_is_that_of_the_finished_runs(own, plan, folder, content):
    others = grid(own, formats=["bf16"], seeds=[0, 1])
    compute(others, folder)
    (folder / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep.json is broken: "):
        read_sweep(folder)
    compute(plan, folder)
    runs, facts = read_sweep(folder)
    assert sorted((found.condition, found.config.seed) for found in runs) == [("bf16", 0), ("bf16", 1), ("fp32", 0)]
    assert len(facts["plan"]) == 3
    assert (folder / "sweep.json.broken").read_text() == content


def test_a_broken_note_on_a_failure_does_not_stop_the_report(plan, folder):
    compute(plan, folder)
    replace_file(folder / "failures" / "0123456789abcdef.json", b"{")
    [failure] = read_sweep(folder)[1]["failures"]
    assert (failure["key"], failure["condition"]) == ("0123456789abcdef", "unknown")
    assert "0123456789abcdef.json is broken" in report(folder).read_text()


# -- files that are being written --------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "sweep.json"
    replace_file(path, b"old")

    def full(partial: Path, content: bytes) -> None:
        with partial.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        replace_file(path, b"new")
    assert caught.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]
    assert path.read_text() == "old"


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_files_of_killed_processes_are_removed_and_those_of_others_stay(plan, folder):
    here, key, dead, lives = socket.gethostname(), run_key(plan[0].config), ended_process(), os.getppid()
    runs, checkpoints = folder / "runs", folder / "checkpoints"
    killed = [
        runs / f"{key}.parquet.{dead}@{here}.partial",
        checkpoints / f"{key}.pt.{dead}@{here}.partial",
        folder / f"sweep.json.{dead}@{here}.partial",
        checkpoints / f"{key}.pt.{dead}",  # of an older version
        runs / f"{key}.parquet.{dead}@elsewhere.org.partial",
    ]
    others = [
        runs / f"{key}.parquet.{lives}@{here}.partial",
        runs / f"{key}.parquet.{dead}@elsewhere.partial",
        folder / "notes.2026",
        folder / f"table.json.{dead}",
    ]
    for path in killed + others:
        replace_file(path, b"half")
    os.utime(killed[-1], times=(time.time() - 90_000,) * 2)
    compute(plan, folder)
    assert [path.name for path in killed if path.exists()] == []
    assert all(path.read_bytes() == b"half" for path in others)


# -- several sweeps on one folder --------------------------------------------------------------------------------------


def add_plan(folder: Path, config: RunConfig, numbers: range) -> None:
    for number in numbers:
        keyed = {f"{number:016x}": Planned(f"condition {number}", config)}
        sweeps._describe(folder, keyed, "title", {f"fact {number}": number}, Console(quiet=True))


def test_sweeps_that_start_at_the_same_time_keep_all_plans(own, folder):
    """Four processes add 20 plans each, one after the other as fast as they can."""
    context = multiprocessing.get_context("fork")
    parts = [range(20 * i, 20 * i + 20) for i in range(4)]
    processes = [context.Process(target=add_plan, args=(folder, own, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    content = json.loads((folder / "sweep.json").read_text())
    assert sorted(entry["condition"] for entry in content["plan"]) == sorted(f"condition {n}" for n in range(80))
    assert len(content["starts"]) == 80
    assert {f"fact {number}" for number in range(80)} <= set(content)


def test_the_lock_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ArithmeticError), locked(tmp_path / "sweep.json"):
            raise ArithmeticError


def test_scripts_of_the_same_name_are_all_kept(own, plan, folder, tmp_path):
    other = tmp_path / "other" / "own.py"
    other.parent.mkdir()
    other.write_text(SCRIPT.replace("4", "6"))
    model = replace(own.model, script=f"{other}:build")
    for _ in range(2):
        compute([*plan, *grid(replace(own, model=model), formats=["bf16"], seeds=[0])], folder)
    kept = sorted(path.read_text() for path in (folder / "scripts").iterdir())
    assert kept == sorted([SCRIPT, other.read_text()])
