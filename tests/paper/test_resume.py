"""A run that is interrupted at any step and resumed has the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest

from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.config import RunConfig, run_key, to_dict
from fpsim.paper.data import DataConfig
from fpsim.paper.training import records, run
from fpsim.policy import Policy
from fpsim.recipes import Recipe, RoundedState
from fpsim.training.schedules import Piecewise


@pytest.fixture(scope="module")
def measured(config) -> RunConfig:
    """Stochastic rounding, a change of format, and everything measured: all that could remember anything."""
    return replace(
        config,
        options={"format": "e8m3/stochastic"},
        stages=((4, {"format": "bf16"}),),
        backend="interpreted",
        measure_every=2,
        lbfgsb_every=4,
        hessian_every=4,
        ranges_every=3,
    )


@pytest.fixture(scope="module")
def uninterrupted(measured, data):
    return run(measured, data)


@pytest.mark.parametrize("steps_before", [1, 3, 4, 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(measured, data, uninterrupted, tmp_path, steps_before):
    checkpoint = Checkpoint(tmp_path / "state.pt", seconds=0)
    stream = records(measured, data, checkpoint=checkpoint)
    assert list(islice(stream, steps_before + 1)) == uninterrupted[: steps_before + 1]
    stream.close()  # the last of these steps was not written
    assert run(measured, data, checkpoint=checkpoint) == uninterrupted


@pytest.mark.parametrize("steps_before", [1, 4])
def test_a_resumed_run_has_its_delayed_scales_and_its_rounded_moments(config, data, tmp_path, steps_before):
    recipe = Recipe(
        "delayed",
        "",
        Policy(format="e4m3fn/tensor/history:3", products="weights"),
        optimizer=RoundedState({"exp_avg": "e4m3fn/stochastic", "exp_avg_sq": "bf16"}, seed=7),
        # The policy with a history comes back after one without, and finds the state that it left.
        schedule=Piecewise(((0, {}), (2, "bf16"), (3, {}))),
    )
    config = replace(config, recipe=recipe, backend="interpreted")
    checkpoint = Checkpoint(tmp_path / "state.pt", seconds=0)
    stream = records(config, data, checkpoint=checkpoint)
    expected = run(config, data)
    assert list(islice(stream, steps_before + 1)) == expected[: steps_before + 1]
    stream.close()
    assert run(config, data, checkpoint=checkpoint) == expected


def test_a_finished_run_is_not_run_again(config, data, eager, tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.pt", seconds=0)
    history = run(config, data, compile=eager, checkpoint=checkpoint)

    def forbidden(module, options):
        def fail(*batch):
            raise AssertionError("nothing is left to do")

        return fail

    assert run(config, data, compile=forbidden, checkpoint=checkpoint) == history


def test_the_checkpoint_of_another_run_is_refused(config, data, eager, tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.pt", seconds=0)
    run(config, data, compile=eager, checkpoint=checkpoint)
    other = replace(config, learning_rate=1.0)
    with pytest.raises(ValueError, match=rf"checkpoint of run {run_key(config)}, not of {run_key(other)}"):
        run(other, data, compile=eager, checkpoint=checkpoint)


_CHILD = """
import sys
from pathlib import Path
from fpsim.paper.config import from_dict
from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.training import records
import json

config = from_dict(json.loads(sys.argv[1]))
for record in records(config, checkpoint=Checkpoint(Path(sys.argv[2]), seconds=0)):
    print(record.step, flush=True)
"""


def test_a_run_killed_at_a_random_step_goes_on_in_another_process(config, text, tmp_path):
    source = tmp_path / "times.txt"
    source.write_bytes(text)
    config = replace(config, steps=40, data=DataConfig(str(source)), backend="interpreted", options=None)
    state = tmp_path / "state.pt"
    arguments = [sys.executable, "-c", _CHILD, json.dumps(to_dict(config)), str(state)]
    victim = random.Random(os.getpid()).randint(2, 30)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) >= victim:
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    assert state.exists()
    history = run(config, checkpoint=Checkpoint(state, seconds=1e9))
    assert history == run(config), f"killed at step {victim}"
