"""The drift of weights between two runs is that of weights trained apart, by numpy's singular values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from fpsim.cli.study import app
from fpsim.paper.data import DataConfig
from fpsim.paper.drift import Difference, differences, figure, markdown, summary
from fpsim.paper.models import build
from fpsim.paper.sweeps import Planned, sweep
from fpsim.paper.training import records


def weights_after(config, data, compile, step):
    """The weights of the run after ``step`` updates; its rates are constant, so that a shorter run has them too."""
    found = {}

    def keep(trainer, _):
        found.update({name: p.detach().double().numpy() for name, p in trainer.model.network.named_parameters()})

    list(records(replace(config, steps=step), data, compile=compile, at_end=keep))
    return found


def test_differences_are_those_of_runs_trained_apart(config, data, eager):
    reference = replace(config, steps=5, schedule="constant", warmup=0)
    own = replace(reference, learning_rate=2 * config.learning_rate)
    found = list(differences(own, reference, every=3, data=data, compile=eager))
    assert [each.step for each in found] == sorted([3, 5] * (len(found) // 2))
    for step in (3, 5):
        ours, theirs = (weights_after(each, data, eager, step) for each in (own, reference))
        at_step = {each.layer: each for each in found if each.step == step}
        assert at_step.keys() == ours.keys()
        for name, each in at_step.items():
            growth = np.linalg.norm(ours[name], 2) / np.linalg.norm(theirs[name], 2) - 1
            distance = np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])
            assert (each.growth, each.distance) == pytest.approx((growth, distance), rel=1e-9, abs=1e-12)
            assert each.distance > 0
    assert not any(each.growth or each.distance for each in differences(own, own, every=5, data=data, compile=eager))


def test_a_run_that_is_lost_ends_the_comparison(config, data, eager):
    lost = replace(config, learning_rate=1e38, warmup=0, stop_nonfinite=2)
    assert not list(differences(lost, config, every=1, data=data, compile=eager))


def test_other_networks_are_refused(config, data, eager):
    deeper = replace(config, model=replace(config.model, layers=config.model.layers + 1))
    with pytest.raises(ValueError, match=r"the networks have other layers \(.*layers\.\d"):
        list(differences(config, deeper, every=1, data=data, compile=eager))


def test_means_have_students_intervals_and_the_layer_that_grows_most_comes_first():
    values = {"a": [0.01, 0.03, 0.02], "b": [0.5, 0.4, 0.9]}
    found = [
        Difference(step, layer, growth * step, 2 * growth)
        for growths in zip(*values.values(), strict=True)
        for step in (1, 2)
        for layer, growth in zip(values, growths, strict=True)
    ]
    means = summary("bf16", found)
    assert [(each.step, each.layer, each.pairs) for each in means] == [
        (1, "a", 3),
        (1, "b", 3),
        (2, "a", 3),
        (2, "b", 3),
    ]
    mean, interval = np.mean(values["b"]), stats.t.interval(0.95, 2, scale=stats.sem(values["b"]))
    assert (means[3].growth, means[3].growth_half) == pytest.approx((2 * mean, 2 * interval[1]))
    assert (means[1].distance, means[1].distance_half) == pytest.approx((2 * mean, 2 * interval[1]))
    first, second = markdown(means, "fp32").splitlines()[-2:]
    assert first == f"| bf16 | 2 | `b` | 3 | 120 ± {200 * interval[1]:.2g} | 120 ± {200 * interval[1]:.2g} |"
    assert second.startswith("| bf16 | 2 | `a` | 3 | 4 ± ")
    assert len(figure(means).axes) == 1


def test_the_command_trains_the_runs_of_a_sweep_again(config, text, tmp_path):
    """The reference against itself under another name has not drifted; a rounded condition has."""
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    base = replace(config, data=DataConfig(str(path)), steps=2, warmup=0, backend="interpreted")
    changes = {"fp32": {}, "again": {"validation_batches": 1}, "e2m1fn": {"options": {"format": "e2m1fn"}}}
    plan = [Planned(name, replace(base, **each, seed=seed)) for name, each in changes.items() for seed in (3, 4, 5)]
    sweep(plan, tmp_path / "sweep", executor="serial")
    said = CliRunner().invoke(app, ["drift", str(tmp_path / "sweep"), "--seeds", "2", "--every", "1"])
    assert said.exit_code == 0, said.output
    rows = [line.split(" | ") for line in (tmp_path / "sweep/drift.md").read_text().splitlines()[4:]]
    assert {tuple(row[4:]) for row in rows if row[0] == "| again"} == {("0 ± 0", "0 ± 0 |")}
    assert {row[3] for row in rows} == {"2"}
    layers = len(list(build(base.model, seed=0).named_parameters()))
    assert [row[0] for row in rows] == ["| again"] * layers + ["| e2m1fn"] * layers
    assert all(row[5] != "0 ± 0 |" for row in rows if row[0] == "| e2m1fn" and "norm" not in row[2])
    assert "other losses" not in said.stderr
    path.write_bytes(text.replace(b"best", b"rest"))
    said = CliRunner().invoke(app, ["drift", str(tmp_path / "sweep"), "--conditions", "again", "--every", "3"])
    assert "3 of 3 pairs have other losses than in the sweep" in said.stderr
    said = CliRunner().invoke(app, ["drift", str(tmp_path / "sweep"), "--conditions", "bf16"])
    assert "unknown condition 'bf16'" in said.output
