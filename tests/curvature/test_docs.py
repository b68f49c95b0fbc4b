"""The examples of ``docs/curvature.md`` run, and print what their comments show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parents[2] / "docs" / "curvature.md").read_text()


def test_the_examples_print_what_the_page_shows(capsys):
    known: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 7
    for example in examples:
        exec(example, known)
        shown = [line.removeprefix("# ") for line in example.splitlines() if line.startswith("# ")]
        assert capsys.readouterr().out.splitlines() == shown
