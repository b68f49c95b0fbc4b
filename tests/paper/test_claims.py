"""Claims: their verdicts on hand-computed numbers, and the test beds without training against published numbers."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.paper.claims import CLAIMS
from fpsim.paper.claims import run as runs
from fpsim.paper.claims.arithmetic import normal_float, rotated_outlier, signal_to_noise
from fpsim.paper.claims.claim import Claim, Mark, Registered, judge, judge_mark, registered
from fpsim.paper.verdicts import rules

# Student's 97.5 % quantiles for two and for nine degrees of freedom, from a printed table.
T_OF_THREE, T_OF_TEN = 4.302653, 2.262157

ERRORS = [{"error": 1.0, "control": 9.0}, {"error": 2.0, "control": 8.0}, {"error": 3.0, "control": 10.0}]


def test_the_interval_of_a_mark_is_that_of_students_t() -> None:
    judged = judge_mark(Mark("error", at_most=2.0), ERRORS)
    half = T_OF_THREE * 1.0 / math.sqrt(3)
    assert (judged.mean, judged.met) == (2.0, None)
    assert (judged.low, judged.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


@pytest.mark.parametrize(
    ("mark", "met"),
    [
        (Mark("error", at_most=4.5), True),
        (Mark("error", at_most=4.4), None),
        (Mark("error", at_most=-0.5), False),
        (Mark("error", at_least=-0.5), True),
        (Mark("error", at_least=4.5), False),
        (Mark("control", at_most=4.0, noise_of="error"), False),  # the bound is 4 x 1
        (Mark("control", at_least=4.0, noise_of="error"), True),
    ],
)
def test_a_mark_is_met_where_the_whole_interval_is(mark: Mark, met: bool | None) -> None:
    assert judge_mark(mark, ERRORS).met is met


@pytest.mark.parametrize(
    ("values", "at_most", "at_least"), [((math.inf, 1.0), False, True), ((math.nan, 1.0), False, False)]
)
def test_a_diverged_run_meets_only_a_mark_from_below(
    values: tuple[float, float], at_most: bool, at_least: bool
) -> None:
    rows = [{"loss": value} for value in values]
    assert judge_mark(Mark("loss", at_most=5.0), rows).met is at_most
    assert judge_mark(Mark("loss", at_least=5.0), rows).met is at_least


@pytest.mark.parametrize(
    ("holds", "control", "verdict"),
    [
        (4.5, 4.0, "reproduced"),
        (4.4, 4.0, "undecided"),
        (-0.5, 4.0, "not reproduced"),
        (4.5, 20.0, "not testable at this scale"),
        (-0.5, 9.0, "not testable at this scale"),  # the control's interval contains 9
    ],
)
def test_the_verdict_needs_every_mark_and_a_control_that_fails(holds: float, control: float, verdict: str) -> None:
    by = Registered((0, 1, 2), (Mark("error", at_most=holds),), (Mark("control", at_least=control),))
    assert judge(ERRORS, by).verdict == verdict


def test_a_mark_bounds_one_side_and_a_verdict_needs_two_seeds() -> None:
    with pytest.raises(ValueError, match="give one of at_most and at_least"):
        Mark("error")
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        judge(ERRORS[:1], Registered((0,), (), ()))


def test_every_claim_is_registered_with_a_mark_and_a_control() -> None:
    assert set(rules().claims) == set(CLAIMS)
    for name in CLAIMS:
        by = registered(name)
        assert len(by.seeds) >= 3 and by.holds and by.control, name


def test_test_beds_give_the_numbers_of_the_sources() -> None:
    assert signal_to_noise(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert signal_to_noise(torch.ones(2), torch.ones(2)) == math.inf
    # Gaussian weights in groups of 64: NF4 20.7 dB, bitsandbytes' FP4 18.2 dB, computed in numpy apart from fpsim.
    assert normal_float(3)["gain_over_fp4"] == pytest.approx(20.7 - 18.2, abs=0.15)
    # One channel of 512 times 50: INT8 16.0 to 39.9 dB by a rotation, E4M3 32.1 to 31.6.
    measured = rotated_outlier(3)
    assert measured["int8_gain"] == pytest.approx(39.9 - 16.0, abs=2.0)
    assert measured["fp8_gain"] == pytest.approx(31.6 - 32.1, abs=0.6)


def test_seeds_are_measured_once_and_kept(tmp_path, monkeypatch) -> None:
    calls: list[int] = []

    def measured(seed: int) -> dict[str, float]:
        calls.append(seed)
        return {"gain_over_fp4": 2.0 + seed / 1e6, "gain_over_int4_uniform": -2.0}

    claim = Claim("normal_float", "nf4", "", "", "", measured)
    assert runs.measure(claim, tmp_path)[1] == 10
    path = tmp_path / "normal_float.json"
    kept = json.loads(path.read_text())
    del kept["seeds"]["1004"]
    path.write_text(json.dumps(kept))
    outcome, computed = runs.measure(claim, tmp_path)
    assert (outcome.verdict, computed, calls) == ("reproduced", 1, [*range(1000, 1010), 1004])
    path.write_text(json.dumps({**kept, "source": "another"}))
    assert runs.measure(claim, tmp_path)[1] == 10


def test_the_command_tests_the_claims_of_a_recipe(tmp_path) -> None:
    run = CliRunner().invoke(app, ["study", "claims", "nf4", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    table = (tmp_path / "claims.md").read_text()
    assert "| `nf4` |" in table and "| **reproduced** | [normal_float](#normal_float) |" in table
    assert "`halo`" not in table
    seeds = json.loads((tmp_path / "normal_float.json").read_text())["seeds"].values()
    gains = [seed["gain_over_fp4"] for seed in seeds]
    mean, half = statistics.mean(gains), T_OF_TEN * statistics.stdev(gains) / math.sqrt(10)
    assert f"| `gain_over_fp4 >= 1` | {mean:.4g} [{mean - half:.4g}, {mean + half:.4g}] | met |" in table
    assert "| control: `gain_over_int4_uniform <= 0` | -" in table
    run = CliRunner().invoke(app, ["study", "claims", "nf5", "--out", str(tmp_path)])
    assert run.exit_code == 2 and "did you mean 'nf4'" in run.output
