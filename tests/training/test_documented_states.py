"""The code in ``docs/training_state.md`` runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training_state.md"


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "torch.Size([2, 8])"
    plain, rooted = (line.split() for line in printed[1:3])
    assert int(plain[1]) > int(rooted[1]) and float(plain[2]) > 2 * float(rooted[2])
