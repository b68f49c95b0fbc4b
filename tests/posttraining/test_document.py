"""The code of ``docs/posttraining.md`` runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_examples_run_one_after_the_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "posttraining.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/posttraining.md", "exec"), names)
    assert names["compiled"](**names["batches"][0]).logits.isfinite().all()
