"""Progress is told within two seconds where no terminal shows bars, and not at all for short work."""

from __future__ import annotations

import importlib
import io
import sys
import time

import pytest
from rich.console import Console
from rich.progress import TextColumn

from fpsim.cli.output import load_torch
from fpsim.progress import ProgressBars


def bars(file: io.StringIO, **console: object) -> ProgressBars:
    return ProgressBars(TextColumn("{task.description}"), console=Console(file=file, width=80, **console))


def test_lines_come_within_two_seconds_and_tell_every_task() -> None:
    file = io.StringIO()
    with bars(file) as progress:
        runs = progress.add_task("runs", total=8)
        progress.add_task("worker 0", total=300, completed=12, state="loss 2.31")
        progress.add_task("load", total=None)
        progress.advance(runs)
        time.sleep(1.5)
    assert file.getvalue() == "runs 1/8, worker 0 12/300 loss 2.31, load (0:00:01)\n"


def test_short_work_is_silent() -> None:
    file = io.StringIO()
    with bars(file) as progress:
        progress.add_task("runs", total=8)
    assert file.getvalue() == ""


def test_hours_and_minutes() -> None:
    progress = bars(io.StringIO())
    progress.add_task("runs", total=8, completed=3)
    assert progress.line(3 * 3600 + 2 * 60 + 1.9) == "runs 3/8 (3:02:01)"


def test_a_terminal_has_bars() -> None:
    file = io.StringIO()
    with bars(file, force_terminal=True) as progress:
        progress.add_task("runs", total=8)
    assert "runs" in file.getvalue() and "\x1b" in file.getvalue() and "(0:00" not in file.getvalue()


def test_commands_say_that_pytorch_loads_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported: list[str] = []

    def slowly(name: str) -> None:
        time.sleep(0.75)
        imported.append(name)

    monkeypatch.setattr(importlib, "import_module", slowly)
    load_torch()
    assert imported == [] and capsys.readouterr().err == ""  # it is loaded already
    monkeypatch.delitem(sys.modules, "torch")
    load_torch("fpsim", "fpsim.nothing")
    assert imported == ["torch", "fpsim.nothing"] and capsys.readouterr().err == "loading PyTorch (0:00:01)\n"
