"""The examples of ``docs/evaluate.md`` run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

TEXT = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()


def test_the_examples_run(capsys):
    torch.manual_seed(0)
    known = {
        "torch": torch,
        "model": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(),
        "batches": [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(2)],
        "loss": nn.functional.cross_entropy,
    }
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        exec(example, known)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("nvfp4", "2 fprop weight", "tolerance 0.02", "special_i0e in e8m23"))
