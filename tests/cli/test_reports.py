"""``fpsim explain``, ``fpsim profile`` and ``fpsim audit`` print what the functions of these names return."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fpsim
from fpsim.evaluate.calls import model_call
from fpsim.evaluate.texts import task_of_script, token_loss
from tests.shared.command_line import run

LANGUAGE = """
from torch import nn

class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.words, self.head = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)
    def forward(self, tokens):
        return self.head(self.words(tokens))

def build(vocabulary, context=12):
    return Model(vocabulary)
"""
VISION = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))

def inputs():
    return torch.randn(2, 3, 4, 4)

def loss(outputs):
    return (outputs**2).sum() * 2.0**-20

@torch._dynamo.disable
def product(a, b):
    return a @ b

class Escapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return product(self.linear(x[:, 0]).flatten(0, 1), torch.eye(4))

def build_escapes():
    return Escapes()

class Cdist(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return torch.cdist(self.linear(x[:, 0]).flatten(0, 1), torch.eye(4)[:3])

def build_cdist():
    return Cdist()

def build_broken():
    return nn.Linear(7, 7)
"""


@pytest.fixture
def language(tmp_path) -> str:
    (tmp_path / "language.py").write_text(LANGUAGE)
    return f"{tmp_path / 'language.py'}:build"


@pytest.fixture
def vision(tmp_path) -> str:
    (tmp_path / "vision.py").write_text(VISION)
    return f"{tmp_path / 'vision.py'}:build"


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.")
    return str(path)


def test_the_call_of_a_language_model_has_all_windows_in_one_batch(language, text):
    call = model_call(language, Path(text), windows=2)
    task = task_of_script(language, Path(text), windows=2)
    (first, targets), (second, others) = task.batches()
    assert torch.equal(call.args[0], torch.cat([first, second]))
    outputs = call.network(*call.args)
    both = (token_loss(outputs[:1], targets) + token_loss(outputs[1:], others)) / 2
    torch.testing.assert_close(call.loss(outputs), both)


def test_explain_lists_every_value_of_a_script_with_inputs(vision):
    call = model_call(vision, None)
    plan = fpsim.explain(call.network, *call.args, policy="mxfp8")
    shown = run("explain", vision, "--policy", "mxfp8")
    assert len([line for line in shown.splitlines() if "mxfp8/" in line]) == len(plan.sites) == 10
    forward = run("explain", vision, "--policy", "mxfp8", "--no-gradients")
    assert "4 of 4 values rounded" in forward and "dgrad" not in forward


def test_profile_takes_the_loss_of_the_script_and_writes_files(vision, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    options = ("--policy", "e4m3fn+e5m2", "--html", str(page), "--json", str(numbers), "--limit", "3")
    shown = run("profile", vision, *options)
    call = model_call(vision, None)
    want = fpsim.profile(call.network, *call.args, policy=fpsim.Policy(
        activation="e4m3fn", weight="e4m3fn", gradient="e5m2"), loss=call.loss)  # fmt: skip
    assert fpsim.compile_backend.Profile.from_json(numbers.read_text()) == want
    assert any(site.statistics.underflows for site in want.sites if site.role == "gradient")  # the loss is scaled down
    assert f"{len(want.sites) - 3} more sites" in shown
    assert "<html" in page.read_text()


def test_profile_of_a_language_model_differentiates_its_cross_entropy(language, text):
    shown = run("profile", language, text, "--policy", "bf16", "--windows", "2")
    assert "wgrad" in shown and "dgrad" in shown and "8 sites, 3 matrix products" not in shown
    assert "wgrad" not in run("profile", language, text, "--policy", "bf16", "--no-gradients")


def test_audit_ends_with_code_1_if_a_product_escapes(vision, tmp_path):
    assert "no matrix product escaped" in run("audit", vision, "--policy", "e4m3fn", "--no-gradients")
    policy = tmp_path / "policy.json"
    policy.write_text(fpsim.Policy(format="e4m3fn").to_json())
    shown = run("audit", f"{vision}_escapes", "--policy", str(policy), "--no-gradients", code=1)
    assert "1 matrix products escaped" in shown and "8x4, 4x4" in shown


def test_wrong_input_is_one_line(language, vision, text, tmp_path):
    (tmp_path / "raises.py").write_text("def build(): pass\ndef inputs(): raise KeyError('x')\n")
    for arguments, message in (
        (("explain", language), "needs inputs: name a text file behind it, or give the script a function inputs"),
        (("explain", vision, text), "has a function inputs of its own: leave out"),
        (("explain", vision, "--policy", "e9m99"), "cannot read the format 'e9m99'"),
        (("profile", f"{vision}_cdist", "--policy", "e4m3fn"), "the model cannot be rounded to e4m3fn: aten._cdist"),
        (("profile", vision, "--sort", "sqrn"), "cannot sort by 'sqrn' (did you mean 'sqnr'?)"),
        (("audit", f"{vision}_broken"), "fails when its model runs on its inputs: RuntimeError: "),
        (("audit", f"{tmp_path / 'raises.py'}:build"), "must return a torch.nn.Module, got NoneType"),
        (("explain", str(tmp_path), text), "no Hugging Face checkpoint at"),
        (("explain", str(tmp_path), text, "--weights", text), "weights are for a script"),
    ):
        error = run(*arguments, code=2)
        assert message in error and len(error.splitlines()) == 1, error
