"""Each promise of fpsim names tests that exist, and `make quick` runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.promises import PROMISES


def test_every_test_that_a_promise_names_is_run_by_make_quick() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "promise and not exhaustive", "tests"]
    root = Path(__file__).parents[1]
    collected = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    run = {name for line in collected if "::" in line for name in (line, line.split("[")[0])}
    assert all(PROMISES.values())
    assert [test for tests in PROMISES.values() for test in tests if f"tests/{test}" not in run] == []
