"""The list of silent failures is whole, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (HERE / "failures.md").read_text(), re.MULTILINE)


def test_every_row_is_there() -> None:
    assert [int(row) for row, _ in ROWS] == list(range(1, 37))


def test_every_test_that_is_named_exists() -> None:
    for row, text in ROWS:
        for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
            texts = [path.read_text() for path in (HERE / file, HERE.parent / "fpsim" / file) if path.exists()]
            assert any(f"\ndef {name}(" in text for text in texts), f"row {row}: {file}::{name}"
