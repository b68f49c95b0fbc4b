"""The demo trains the runs that were asked for, and its table, plot and files agree with their records."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fpsim.paper.demo import DEFAULT_FORMATS, Result, _smooth, demo
from fpsim.paper.record import Record
from fpsim.paper.training import run
from fpsim.policy import Policy
from fpsim.policy.shorthand import parse_shorthand


@pytest.mark.parametrize("name", DEFAULT_FORMATS)
def test_the_default_runs_are_policies(name):
    Policy(**parse_shorthand(name))


@pytest.fixture
def small_demo(config, text, tmp_path, eager):
    """The demo on a small text and network, uncompiled; returns its results, its output and its folder."""
    path = tmp_path / "times.txt"
    path.write_bytes(text)

    def start(**arguments):
        console = Console(file=io.StringIO(), width=100)
        arguments = {"steps": 4, "text": path, "config": config, "compile": eager, "console": console} | arguments
        return demo(out=tmp_path / "out", **arguments), console.file.getvalue(), tmp_path / "out"

    return start


def test_four_steps_end_with_a_table(small_demo):
    results, output, _ = small_demo()
    assert [result.name for result in results] == ["fp32", "bf16", "e4m3fn+e5m2", "e8m3", "e8m3/toward_zero"]
    assert "times.txt" in output
    for result in results:
        row = next(line for line in output.splitlines() if line.startswith("│") and f" {result.name} " in line)
        assert f"{result.final_loss:.3f}" in row
        assert f"{result.best_loss:.3f}" in row
        assert f"{result.overhead(results[0]):.2f}x" in row
        assert f"{result.steps_per_second:.1f}" in row


def test_the_picture_has_its_size_and_is_not_blank(small_demo):
    image = pytest.importorskip("matplotlib.image")
    _, _, out = small_demo()
    pixels = image.imread(out / "loss.png")
    assert pixels.shape == (1050, 1500, 4)
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_the_records_are_those_of_the_runs(small_demo):
    results, _, out = small_demo()
    with (out / "records.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], int(row["step"])) for row in rows] == [(r.name, s) for r in results for s in (1, 2, 3, 4)]
    for row, record in zip(rows, (record for result in results for record in result.records), strict=True):
        assert float(row["loss"]) == record.loss
        assert float(row["seconds"]) == record.seconds
        assert row["validation_loss"] == ("" if record.validation_loss is None else str(record.validation_loss))


def test_the_summary_holds_the_table(small_demo, text):
    results, _, out = small_demo(loss_scale=8.0)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["text"] == {"name": "times.txt", "bytes": len(text)}
    assert summary["config"]["steps"] == 4
    assert summary["config"]["loss_scale"] == 8.0
    assert [row["name"] for row in summary["runs"]] == [result.name for result in results]
    assert summary["runs"][0]["options"] is None
    assert summary["runs"][4]["options"] == {"format": "e8m3/toward_zero"}
    assert summary["runs"][3]["final_validation_loss"] == results[3].final_loss
    assert not any(row["diverged"] for row in summary["runs"])


def test_the_users_formats_replace_the_default_ones_after_the_baseline(small_demo):
    results, _, _ = small_demo(formats=["e5m2", "fp32", "e5m2", "e3m4"])
    assert [result.name for result in results] == ["fp32", "e5m2", "e3m4"]


def test_runs_in_lockstep_are_the_runs_alone(small_demo, data, eager):
    results, _, _ = small_demo(formats=["bf16"])
    for result in results:
        assert result.records == run(result.config, data, compile=eager)


def test_each_run_is_compiled_with_its_options(small_demo):
    seen = []

    def spy(module, options):
        seen.append(options)
        return module

    small_demo(compile=spy, formats=["bf16", "e4m3fn+e5m2"])
    assert seen == [None, {"format": "bf16"}, {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2"}]


def test_one_step_has_no_speed_and_is_no_error(small_demo):
    results, _, out = small_demo(steps=1)
    assert all(math.isnan(result.steps_per_second) for result in results)
    assert json.loads((out / "summary.json").read_text())["runs"][0]["overhead"] is None


def test_a_diverged_run_is_drawn_and_summed_up(small_demo):
    def diverge(module, options):
        return module if options is None else lambda *batch: module(*batch) * float("nan")

    results, output, out = small_demo(compile=diverge, formats=["bf16"])
    assert math.isnan(results[1].final_loss)
    assert math.isnan(results[1].best_loss)
    assert "nan" in output
    row = json.loads((out / "summary.json").read_text())["runs"][1]
    assert row["diverged"]
    assert row["final_validation_loss"] is None
    assert (out / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"formats": ["e9z9"]}, "cannot read the format 'e9z9'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"loss_scale": 0.0}, "loss_scale must be above 0"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(small_demo, arguments, complaint):
    def refuse(module, options):
        raise AssertionError("compiled")

    with pytest.raises(ValueError, match=complaint):
        small_demo(compile=refuse, **arguments)


def test_a_short_text_is_found_before_anything_is_compiled(small_demo, tmp_path):
    (tmp_path / "short").write_bytes(b"to be")
    with pytest.raises(ValueError, match="too short"):
        small_demo(text=tmp_path / "short")


def _result(seconds: list[float], validation: list[float | None], config) -> Result:
    history = [Record(i, 1.0, 1.0, 1.0, v, s) for i, (s, v) in enumerate(zip(seconds, validation, strict=True))]
    return Result("some", replace(config, steps=len(seconds)), history)


def test_what_a_result_says(config):
    baseline = _result([9.0, 1.0, 1.0, 2.0], [None, 3.0, None, 2.5], config)
    result = _result([20.0, 1.5, 1.5, 9.0], [None, 2.0, math.inf, 2.25], config)
    assert (result.final_loss, result.best_loss) == (2.25, 2.0)
    assert result.steps_per_second == pytest.approx(1 / 1.5)
    assert result.overhead(baseline) == 1.5


def test_smoothing_keeps_constants_and_does_not_lag():
    assert _smooth([2.0] * 7).tolist() == pytest.approx([2.0] * 7)
    assert _smooth([5.0]).tolist() == [5.0]
    line = _smooth([float(step) for step in range(400)])
    assert line[100:300] == pytest.approx(np.arange(100, 300), abs=1e-9)
