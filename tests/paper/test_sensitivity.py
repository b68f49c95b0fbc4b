"""Learning-rate sensitivity by hand, its tests by tables of power, and its place in the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pytest
from scipy import stats

from fpsim.paper.config import RunConfig, run_key, to_dict
from fpsim.paper.figures import Judged
from fpsim.paper.models import ModelConfig
from fpsim.paper.record import Record
from fpsim.paper.report import report, sensitivity_pictures
from fpsim.paper.sensitivity import (
    detectable,
    differences,
    largest_stable_rate,
    next_sizes,
    operand_bits,
    power,
    seed_sensitivities,
    seeds_needed,
    sensitivities,
)
from fpsim.paper.storage import Run, to_parquet
from fpsim.paper.verdicts import judge
from fpsim.recipes import RECIPES

RATES = (1e-3, 1e-2, 1e-1, 1.0)


def a_run(condition: str, rate: float, seed: int, first: float, last: float, **changes) -> Run:
    columns = {entry.name: np.full(2, math.nan) for entry in fields(Record)}
    columns |= {"step": np.arange(1, 3), "loss": np.array([first, last]), "gradient_norm": np.ones(2)}
    columns |= {"smoothed_loss": np.array([first, last])}
    config = RunConfig(learning_rate=rate, seed=seed, steps=2, warmup=0, **changes)
    return Run(run_key(config), condition, config, columns, {})


def judged(runs: list[Run], reference: str = "a") -> Judged:
    return Judged(runs, [judge(run) for run in runs], [True] * len(runs), reference)


def a_condition(name: str, by_seed: Mapping[int, tuple[float, ...]], *, first: float = 5.0, **changes) -> list[Run]:
    """Runs at `RATES` with these final losses."""
    return [
        a_run(name, rate, seed, first, last, **changes)
        for seed, losses in by_seed.items()
        for rate, last in zip(RATES, losses, strict=True)
    ]


def test_a_seed_s_sensitivity_is_its_mean_capped_loss_above_its_best():
    runs = a_condition("a", {0: (3.0, 2.0, 9.0, math.nan), 1: (4.0, 2.0, 3.0, math.inf)})
    (found,) = sensitivities(judged(runs))
    assert found.losses.tolist() == [[3.0, 2.0, 5.0, 5.0], [4.0, 2.0, 3.0, 5.0]]
    assert found.by_seed == pytest.approx([15 / 4 - 2, 14 / 4 - 2])
    assert found.value == pytest.approx(1.625)
    assert (found.low, found.high) == pytest.approx((1.5, 1.75))  # two seeds: all resamples lie between them
    # 2.5 lies between 2.0 at 0.01 and the mean 4.0 at 0.1, a quarter of the way in logarithms
    assert found.largest_stable == pytest.approx(10 ** (-2 + 0.25))
    assert not found.is_lower_bound and found.left_out == 0


def test_rates_that_are_not_evenly_spaced_count_by_their_cells():
    rates, losses = np.array([1.0, 10.0, 1000.0]), np.array([[1.0, 2.0, 4.0]])
    # logarithms 0, 1, 3: cells from -0.5 to 0.5, to 2, and to 4
    assert seed_sensitivities(rates, losses)[0] == pytest.approx((1 * 1.0 + 1.5 * 2.0 + 2 * 4.0) / 4.5 - 1.0)


def test_rates_without_instability_give_a_lower_bound():
    (found,) = sensitivities(judged(a_condition("a", {0: (3.0, 2.0, 2.4, 2.5)})))
    assert found.is_lower_bound and found.largest_stable is None
    assert math.isnan(found.low)  # a single seed
    # a loss that is high below the best rate is no instability, and the first rate above the margin counts
    assert largest_stable_rate(np.array(RATES), np.array([4.0, 2.0, 2.1, 2.4])) is None
    assert largest_stable_rate(np.array(RATES), np.array([2.0, 3.0, 2.0, 2.0])) == pytest.approx(10**-2.5)


def test_conditions_need_two_rates_and_a_seed_at_all_of_them():
    whole = a_condition("a", {0: (3.0, 2.0, 3.0, 4.0), 1: (3.0, 2.0, 3.0, 4.0)})
    lonely = [a_run("b", 0.1, 0, 5.0, 2.0)]
    (found,) = sensitivities(judged(whole[:-1] + lonely))
    assert (found.seeds, found.left_out) == ((0,), 1)


def test_power_is_that_of_tables_of_the_paired_t_test():
    for effect, seeds in ((0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)):  # Cohen's d at level 0.05 and power 0.8
        assert seeds_needed(effect, 1.0) == seeds
        assert power(effect, 1.0, seeds) >= 0.8 > power(effect, 1.0, seeds - 1)
        assert detectable(1.0, seeds) == pytest.approx(effect, rel=0.03)
    assert detectable(3.0, 10) == pytest.approx(3 * detectable(1.0, 10))
    assert (seeds_needed(0.0, 1.0), seeds_needed(1e-6, 1.0), seeds_needed(1.0, 0.0)) == (None, None, 2)


def test_differences_are_paired_by_seed_and_by_model():
    generator = np.random.default_rng(1)
    small, large = ModelConfig(layers=1, hidden=16, heads=2), ModelConfig(layers=1, hidden=32, heads=2)
    runs = []
    for name in ("a", "b"):
        for model in (small, large):
            losses = {seed: tuple(generator.uniform(2, 5, 4)) for seed in range(4)}
            runs += a_condition(f"{name}, {model.size}", losses, model=model, options={"a": None, "b": {}}[name])
    found = sensitivities(judged(runs))
    assert [each.precision for each in found] == ["a", "a", "b", "b"]
    pairs = differences(found, "a, 1 x 16")
    assert [(each.first, each.second) for each in pairs] == [("b, 1 x 16", "a, 1 x 16"), ("b, 1 x 32", "a, 1 x 32")]
    expected = stats.ttest_rel(found[3].by_seed, found[1].by_seed)
    assert (pairs[1].test.p, pairs[1].test.mean) == pytest.approx(
        (expected.pvalue, np.mean(found[3].by_seed - found[1].by_seed))
    )
    interval = expected.confidence_interval(0.95)
    assert (pairs[1].test.low, pairs[1].test.high) == pytest.approx((interval.low, interval.high))


def test_the_next_size_is_foretold_from_the_smaller_ones():
    """The largest stable rate is 0.1 at width 16 and halves with each doubling: 0.0125 at 128."""
    runs = []
    for width, stable in ((16, 0.1), (32, 0.05), (64, 0.025), (128, 0.02)):
        model = ModelConfig(layers=1, hidden=width, heads=2)
        for rate in (stable / 10, stable / 2, 2 * stable):  # the mean of the last two, in logarithms, is the margin
            last = 2.0 + (rate > stable)
            runs += [a_run(f"a, {model.size}", rate, seed, 5.0, last, model=model) for seed in range(3)]
    (found,) = next_sizes(sensitivities(judged(runs)))
    assert (found.axis, [model.hidden for model in found.smaller], found.model.hidden) == ("width", [16, 32, 64], 128)
    assert found.predicted == pytest.approx(0.0125)
    assert (found.low, found.high) == pytest.approx((0.0125, 0.0125))
    assert found.measured == pytest.approx(0.02)
    (found,) = next_sizes(sensitivities(judged([run for run in runs if run.config.learning_rate != 0.2])))
    assert math.isnan(found.predicted) and found.why_not == "a smaller model is stable at every rate: add larger rates"


def test_bits_are_those_of_an_operand():
    assert operand_bits(RunConfig()) == 32
    assert operand_bits(RunConfig(autocast="bfloat16")) == 16
    assert operand_bits(RunConfig(options={"format": "e8m3"})) == 12
    assert operand_bits(RunConfig(recipe=RECIPES["coat"]())) == 8
    assert operand_bits(RunConfig(recipe=RECIPES["nvfp4"]())) == 4


def test_the_report_says_what_is_a_bound_and_what_takes_more_seeds(tmp_path):
    losses = {
        "a": {seed: (3.0, 2.0 + 0.01 * seed, 3.0, 4.0) for seed in range(3)},
        "b": {seed: (3.4, 2.0 + 0.01 * seed, 3.4 + 0.01 * seed, 4.4) for seed in range(3)},
        "c": {seed: (3.0, 2.0 + 0.5 * seed, 3.0, 4.0) for seed in range(3)},
        "d": {seed: (2.1, 2.0, 2.0, 2.2) for seed in range(3)},
    }
    plan = []
    for name, by_seed in losses.items():
        options = None if name == "a" else {"format": {"b": "e8m2", "c": "e8m5", "d": "e8m6"}[name]}
        for run in a_condition(name, by_seed, options=options):
            history = [
                Record(i + 1, loss, 1.0, 0.1, None, 0.1, smoothed_loss=loss) for i, loss in enumerate(run["loss"])
            ]
            facts = {"key": run.key, "config": to_dict(run.config)}
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs" / f"{run.key}.parquet").write_bytes(to_parquet(history, facts))
            plan.append({"key": run.key, "condition": name, "config": facts["config"]})
    (tmp_path / "sweep.json").write_text(json.dumps({"title": "t", "plan": plan, "starts": []}))
    report(tmp_path)
    numbers = json.loads((tmp_path / "outcomes.json").read_text())
    rows = {row["condition"]: row for row in numbers["Learning-rate sensitivity"]}
    assert rows["a"]["sensitivity"].startswith("0.993 [")  # (3 + 2.01 + 3 + 4) / 4 - 2.01
    assert rows["d"]["sensitivity"].startswith("at least 0.075 [")
    assert rows["d"]["largest stable rate"] == "all up to 1"
    verdicts = {row["sensitivity of"][0]: row["verdict"] for row in numbers["Differences of sensitivity"]}
    assert verdicts["b"] == "higher"
    assert verdicts["c"].startswith("too few seeds to tell: ") and verdicts["c"].endswith("with probability 0.8")
    assert verdicts["d"] == "lower over the rates of the sweep, which do not reach instability in both"
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"loss_by_rate", "sensitivity"}


def test_figures_are_drawn_per_size():
    runs = []
    for bits, options in ((32, None), (12, {"format": "e8m3"})):
        for layers, hidden in ((1, 16), (1, 32), (2, 16)):
            model = ModelConfig(layers=layers, hidden=hidden, heads=2)
            losses = {seed: (3.0, 2.0, 3.0, 4.0) for seed in range(2)}
            runs += a_condition(f"{bits}, {model.size}", losses, options=options, model=model)
    curves, lines = (picture.draw() for picture in sensitivity_pictures(sensitivities(judged(runs))))
    assert [axes.get_title() for axes in curves.axes] == ["1 x 16", "1 x 32", "2 x 16"]
    assert all(sorted(line.get_label() for line in axes.lines) == ["12", "32"] for axes in curves.axes)
    assert [axes.get_xlabel() for axes in lines.axes] == ["bits of an operand", "width", "depth"]
