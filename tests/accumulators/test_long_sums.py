"""The script that shows what long sums lose runs, and its errors grow with the number of tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "long_sums.py"


@pytest.mark.exhaustive
def test_the_script_trains_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("long_sums", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["--steps", "1", "--tokens", "1024", "--vocabulary", "32", "--backend", "fpsim_eager"]
    errors = script.main([*arguments, "--figure", str(tmp_path / "figure.png")])
    promoted, plain = errors["hopper_fp8, promoted every 128"], errors["hopper_fp8"]
    assert list(plain) == list(promoted) == [64, 256, 1024]
    assert plain[64] == promoted[64] and plain[1024] > 2 * promoted[1024] > 0
    assert (tmp_path / "figure.png").stat().st_size > 0 and capsys.readouterr().out.count("loss") == 3
