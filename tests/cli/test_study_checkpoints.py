"""``fpsim study sensitivity`` and ``search`` measure the weights of a run's checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fpsim.evaluate import sensitivity
from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.checkpointed import checkpointed
from fpsim.paper.config import run_key
from fpsim.paper.data import DataConfig
from fpsim.paper.training import records
from fpsim.policy import Policy
from tests.shared.command_line import run
from tests.shared.small_run import config, eager, text  # noqa: F401

pytest.importorskip("transformers")


@pytest.fixture
def state(config, text, eager, tmp_path):  # noqa: F811
    """The checkpoint of a whole run, and its last validation loss."""
    (tmp_path / "times.txt").write_bytes(text)
    own = replace(config, data=DataConfig(str(tmp_path / "times.txt")), options={"format": "e4m3fn"}, measure_every=2)
    path = tmp_path / "state.pt"
    *_, last = records(own, compile=eager, checkpoint=Checkpoint(path, seconds=1e9))
    return path, last.validation_loss, own


def test_a_checkpoint_has_the_weights_the_batches_and_the_policy_of_the_last_step(state):
    path, validation_loss, own = state
    found = checkpointed(path, batches=own.validation_batches)
    assert run_key(found.config) == run_key(own)
    assert found.step == own.steps and found.policy == Policy(format="e4m3fn")
    with torch.no_grad():
        losses = [float(found.model(*batch)) for batch in found.batches]
    assert sum(losses) / len(losses) == pytest.approx(validation_loss, rel=1e-6)


def test_sensitivity_and_search_measure_a_checkpoint(state, tmp_path):
    path, _, _ = state
    shown = run("study", "sensitivity", str(path), "--no-gradients", "--no-estimates", "--batches", "1")
    found = checkpointed(path, batches=1)
    want = sensitivity(found.model, found.batches, policy="e4m3fn", gradients=False, estimates=False)
    assert "step 6" in shown
    for effect in want.forward:
        assert any(str(effect.unit) in line and str(effect.alone) in line for line in shown.splitlines())
    best = tmp_path / "best.json"
    options = ("--format", "e4m3fn", "--format", "e2m1fn", "--tolerance", "1e9", "--batches", "1", "--trials", "1")
    shown = run("study", "search", str(path), *options, "--out", str(best))
    assert "tolerance 1e+09 met" in shown
    policy = Policy.from_json(best.read_text())
    for path, module in found.model.named_modules():
        if isinstance(module, torch.nn.Linear):  # the cheapest format; attention costs no bits
            assert policy.at(path) == Policy(format="e2m1fn")


def test_wrong_input_is_one_line(state, tmp_path):
    path, _, _ = state
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:100])
    for arguments, message in (
        (("sensitivity", str(tmp_path / "nothing.pt")), "no checkpoint at"),
        (("sensitivity", str(tmp_path / "broken.pt")), "is no checkpoint with the configuration of a run"),
        (("sensitivity", str(tmp_path / "text.pt")), "(torch did not write it, or it holds more than tensors, numbers"),
        (("search", str(path), "--format", "bf16", "--format", "bf16", "--tolerance", "1"), "'bf16' is given twice"),
        (("search", str(path), "--format", "bf16", "--format", "e4m3fn"), "give either tolerance"),
        (("search", str(path), "--format", "bf16", "--tolerance", "1"), "at least two formats"),
    ):
        assert message in run("study", *arguments, code=2)
