"""``fpsim evaluate``, ``fpsim sensitivity`` and ``fpsim accuracy`` print what the library measures."""

from __future__ import annotations

import pytest
import torch

from fpsim.curvature import label_count
from fpsim.evaluate import accuracy, compare, sensitivity
from fpsim.evaluate.texts import task_of_script, token_loss
from tests.shared.command_line import run

SCRIPT = """
import mpmath
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, 8), nn.Linear(8, vocabulary)
    def forward(self, tokens):
        return self.head(torch.tanh(self.inner(self.words(tokens))))

def build(vocabulary, context=12):
    return Model(vocabulary)

def double(x):
    return x * 2.001

def exact_double(x):
    return 2 * x
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(SCRIPT)
    return f"{tmp_path / 'mine.py'}:build"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.")
    return path


def test_evaluate_compares_perplexities(script, text, tmp_path):
    pandas = pytest.importorskip("pandas")
    csv = tmp_path / "out.csv"
    policies = ("--policy", "e2m1fn", "--policy", "bf16")
    shown = run("evaluate", script, str(text), *policies, "--windows", "3", "--csv", str(csv))
    task = task_of_script(script, text, windows=3)
    assert task.windows == 3
    want = compare(task.network, task.batches(), ["e2m1fn", "bf16"], loss=token_loss, weight=label_count)
    frame = pandas.read_csv(csv)
    assert list(frame["mean"]) == pytest.approx([row.mean.value for row in want.rows], rel=1e-12)
    assert list(frame["perplexity"]) == pytest.approx([row.perplexity for row in want.rows], rel=1e-12)
    for row in want.rows:
        assert row.name in shown and f"{row.perplexity:.6g}" in shown
    with torch.no_grad():  # by hand: every byte of the first 36 but the first one is predicted once
        tokens = torch.tensor(list(text.read_bytes()))[:37]
        loss = torch.nn.functional.cross_entropy(task.network(tokens[None, :-1])[0], tokens[1:])
    assert want["unrounded"].mean.value == pytest.approx(float(loss), rel=1e-5)


def test_sensitivity_names_modules_and_sites(script, text):
    options = ("--policy", "e4m3fn", "--windows", "2", "--by", "site", "--no-gradients")
    shown = run("sensitivity", script, str(text), *options)
    task = task_of_script(script, text, windows=2)
    want = sensitivity(task.network, task.batches(), policy="e4m3fn", loss=token_loss, weight=label_count, by="site",
                       gradients=False)  # fmt: skip
    lines = [line for line in shown.splitlines() if " fprop " in line]
    assert len(lines) == 4
    for line, effect in zip(lines, want.forward, strict=True):
        assert str(effect.unit) in line and str(effect.alone) in line


def test_accuracy_of_functions_of_torch_and_of_a_script(script, tmp_path):
    shown = run("accuracy", "torch.special:i0e", "--format", "bf16", "--range", "-1", "1")
    want = accuracy(torch.special.i0e, "bf16", low=-1, high=1)
    assert want.worst[0].code in shown and f"{want.maximum:.4g}" in shown
    mine = script.replace("build", "double")
    plot = tmp_path / "plot.png"
    options = ("--format", "e5m2", "--range", "1", "8", "--exact", script.replace("build", "exact_double"))
    shown = run("accuracy", mine, *options, "--plot", str(plot), "--worst", "1")
    assert "double in e5m2" in shown and plot.stat().st_size > 1000


def test_wrong_input_is_one_line(script, text, tmp_path):
    for arguments, message in (
        (("evaluate", script, str(text), "--policy", "e9m99"), "cannot read the format 'e9m99'"),
        (("evaluate", script, str(text), "--policy", "bf16,mxfp8"), "'bf16,mxfp8' has a comma, which no policy has"),
        (("accuracy", "torch:add", "--format", "fp16", "--range", "0", "1", "--exact", "exp"), "add fails on a tensor"),
        (("evaluate", str(tmp_path), str(text), "--policy", "bf16"), "no Hugging Face checkpoint"),
        (("sensitivity", script, str(text), "--policy", "bf16", "--by", "layer"), "unknown by 'layer'"),
        (("accuracy", "torch.special", "--format", "fp16", "--range", "0", "1"), "names no function"),
        (("accuracy", "torch.special:i9", "--format", "fp16", "--range", "0", "1"), "has no function 'i9'"),
        (("accuracy", "nowhere_at_all:f", "--format", "fp16", "--range", "0", "1"), "there is no module"),
        (("accuracy", "torch:log", "--format", "fp16", "--range", "-2", "-1"), "outside of the domain"),
    ):
        assert message in run(*arguments, code=2)
