"""The script that shows what long sums lose runs, and its errors grow with the number of tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "long_sums.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("long_sums", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_the_script_trains_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["--steps", "1", "--seeds", "2", "--tokens", "1024", "--vocabulary", "32", "--backend", "fpsim_eager"]
    errors = script().main([*arguments, "--figure", str(tmp_path / "figure.png")])
    promoted, plain = errors["hopper_fp8, promoted every 128"], errors["hopper_fp8"]
    assert list(plain) == list(promoted) == [64, 256, 1024]
    assert plain[64] == promoted[64] and plain[1024] > 2 * promoted[1024] > 0
    assert (tmp_path / "figure.png").stat().st_size > 0 and capsys.readouterr().out.count(" loss ") == 2 * (3 + 2)


def test_the_interval_over_seeds_is_students() -> None:
    """Differences of 1, 2 and 3: the mean is 2, the standard error 1 / sqrt(3), and t is 4.3027 for 2 degrees."""
    mean, half = script().difference(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert mean == 2 and half == pytest.approx(4.30265273 / 3**0.5)
    mean, half = script().difference(torch.tensor([2.0]), torch.tensor([1.5]))
    assert mean == 0.5 and half.isnan()
