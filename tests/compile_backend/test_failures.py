"""The list of silent failures is whole: every row names a guard and tests that exist, and a result."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES = re.findall(r"^\| (\d+ \| .*) \|$", (HERE / "failures.md").read_text(), re.MULTILINE)
ROWS = [tuple(cell.strip() for cell in line.split(" | ")) for line in LINES]
#: When a test failed without the guard, or why nobody could look.
RESULT = re.compile(r"\d{4}-\d\d-\d\d: fails|not yet: \w+")


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(test_\w+\.py)::(test_\w+)", text)


def test_every_row_is_there() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 70))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_a_guard_and_tests_that_exist(row: tuple[str, ...]) -> None:
    _, _, guard, places, tests, taken_out = row
    assert guard.startswith("none: ") or (places and named_tests(tests) and RESULT.match(taken_out))
    for place in re.findall(r"`([^`]+)`", places):
        module, _, attributes = place.partition(":")
        reduce(getattr, filter(None, attributes.split(".")), importlib.import_module(module))
    for file, name in named_tests(tests):
        texts = [path.read_text() for path in HERE.parent.rglob(file)]
        assert any(f"\ndef {name}(" in text for text in texts), f"{file}::{name}"
