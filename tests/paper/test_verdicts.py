"""The registered rules on curves whose answers are known, and the statistics against scipy and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from fpsim.paper.config import RunConfig
from fpsim.paper.intervals import bootstrap, compare, share
from fpsim.paper.prediction import auc, predict, roc, scored_steps, signal_values, warn
from fpsim.paper.record import Record
from fpsim.paper.storage import Run
from fpsim.paper.verdicts import divergence, judge, preregistration, rules, spikes, trained

STEPS = 600


def curve(loss: Sequence[float], *, condition: str = "a", rate: float = 0.01, warmup: int = 0, **signals) -> Run:
    """A run with this loss, of which nothing but ``signals`` was measured; smoothed as training smooths."""
    loss = np.asarray(loss, dtype=float)
    smoothed, before = [], math.nan
    for index, value in enumerate(loss.tolist()):
        before = value if index == 0 else before + max(2 / 11, 1 / (index + 1)) * (value - before)
        smoothed.append(before)
    columns = {entry.name: np.full(len(loss), math.nan) for entry in fields(Record)}
    columns |= {"step": np.arange(1, len(loss) + 1), "loss": loss, "smoothed_loss": np.array(smoothed)}
    columns |= {"gradient_norm": np.ones(len(loss))} | {name: np.asarray(value) for name, value in signals.items()}
    return Run("0", condition, RunConfig(steps=STEPS, warmup=warmup, learning_rate=rate), columns, {})


def falling(steps: int = STEPS) -> np.ndarray:
    return 5.0 * np.exp(-np.arange(steps) / 100) + 2.0


def test_a_falling_loss_has_no_outcome():
    verdict = judge(curve(falling()))
    assert (verdict.diverged_at, verdict.spikes) == (None, ())
    assert verdict.final_loss == pytest.approx(2.0, abs=0.05)
    assert math.isnan(verdict.final_validation_loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence_where_it_begins(bad):
    loss = falling()
    loss[300:] = bad
    assert judge(curve(loss)).diverged_at == 301


def test_a_gradient_that_is_not_finite_is_divergence_too():
    norms = np.ones(STEPS)
    norms[41] = math.inf
    assert judge(curve(falling(), gradient_norm=norms)).diverged_at == 42


def test_a_run_that_ended_early_without_a_finite_loss_has_diverged():
    assert judge(curve([*falling(100), math.nan, math.nan, math.nan])).diverged_at == 101


def test_a_rise_that_stays_is_divergence_from_its_first_step_on():
    smoothed = np.full(STEPS, 2.0)
    smoothed[400:] = 2.5  # exactly the registered rise
    found = divergence(smoothed, smoothed, np.ones(STEPS), steps=STEPS, by=rules())
    assert found == 401
    smoothed[400:] = 2.4999
    assert divergence(smoothed, smoothed, np.ones(STEPS), steps=STEPS, by=rules()) is None


@pytest.mark.parametrize(("length", "diverged"), [(19, False), (20, True)])
def test_a_rise_must_last(length, diverged):
    smoothed = np.full(STEPS, 2.0)
    smoothed[400 : 400 + length] = 3.0
    assert (divergence(smoothed, smoothed, np.ones(STEPS), steps=STEPS, by=rules()) == 401) is diverged


@pytest.mark.parametrize(("length", "diverged_at", "rising_since"), [(1, None, 600), (19, None, 582), (20, 581, None)])
def test_a_run_that_blows_up_in_its_last_steps_is_undecided(length, diverged_at, rising_since):
    """STEPS is 600, and a rise counts from 20 steps on."""
    run = curve(np.full(STEPS, 2.0))
    run["smoothed_loss"][STEPS - length :] = 4.0
    verdict = judge(run)
    assert (verdict.diverged_at, verdict.rising_since) == (diverged_at, rising_since)
    assert verdict.undecided == (rising_since is not None)
    assert trained([run], [verdict], "a") == [False]


def test_a_rise_that_is_over_before_the_end_is_decided():
    run = curve(np.full(STEPS, 2.0))
    run["smoothed_loss"][STEPS - 15 : STEPS - 1] = 4.0
    verdict = judge(run)
    assert (verdict.diverged_at, verdict.undecided) == (None, False)
    assert trained([run], [verdict], "a") == [True]


def test_the_last_steps_of_an_undecided_run_are_not_scored():
    """With a horizon of 60 steps, those before step 535 are: the loss rises from step 595 on."""
    steps = np.arange(1.0, STEPS + 1)
    run = curve(np.full(STEPS, 2.0), sharpness_5e4=steps)
    run["smoothed_loss"][594:] = 4.0
    scores, labels, _ = scored_steps([run], [judge(run)], "sharpness_5e4", score="value", horizon=0.1)
    assert scores.tolist() == list(range(1, 535))
    assert not labels.any()


def test_in_long_runs_it_must_last_longer():
    smoothed = np.full(30_000, 2.0)
    smoothed[400:900] = 3.0
    norms = np.ones(30_000)
    assert divergence(smoothed, smoothed, norms, steps=30_000, by=rules()) is None  # 500 of 501 steps
    smoothed[400:901] = 3.0
    assert divergence(smoothed, smoothed, norms, steps=30_000, by=rules()) == 401


def test_one_high_step_is_a_spike_and_no_divergence():
    loss = falling()
    loss[350] += 4.0
    verdict = judge(curve(loss))
    assert verdict.spikes == (351,)
    assert verdict.diverged_at is None


def test_neighbouring_spikes_are_one():
    loss = falling()
    loss[[350, 354, 371]] += 4.0
    assert judge(curve(loss)).spikes == (351, 372)


def test_noise_is_no_spike_and_neither_is_the_warmup():
    noise = np.random.default_rng(0).normal(0, 0.2, STEPS)
    assert judge(curve(2 + noise)).spikes == ()
    loss = falling()
    loss[20] += 9
    assert judge(curve(loss, warmup=30)).spikes == ()
    assert judge(curve(loss, warmup=20)).spikes == (21,)


def test_a_spike_needs_both_nats_and_deviations():
    by = rules()
    quiet = np.full(STEPS, 2.0) + np.tile([0.01, -0.01], STEPS // 2)
    loss = quiet.copy()
    loss[300] = 2.28
    assert spikes(loss, quiet, warmup=0, by=by) == ()  # fourteen deviations, 0.29 nat above 1.99
    loss[300] = 2.32
    assert spikes(loss, quiet, warmup=0, by=by) == (301,)
    noisy = np.full(STEPS, 2.0) + np.tile([0.2, -0.2], STEPS // 2)
    flat = np.full(STEPS, 2.0)
    noisy[300] = 2.9
    assert spikes(noisy, flat, warmup=0, by=by) == ()  # 0.9 nat, 4.5 deviations
    noisy[300] = 3.1
    assert spikes(noisy, flat, warmup=0, by=by) == (301,)


def test_training_is_judged_by_the_reference_at_the_same_learning_rate():
    runs = [
        curve(np.full(STEPS, 2.0), condition="reference", rate=0.1),
        curve(np.full(STEPS, 3.0), condition="reference", rate=1.0),
        curve(np.full(STEPS, 2.49), condition="low", rate=0.1),
        curve(np.full(STEPS, 2.51), condition="low", rate=0.1),
        curve(np.full(STEPS, 3.49), condition="low", rate=1.0),
        curve([*falling(300), *np.full(300, 9.0)], condition="low", rate=1.0),
    ]
    assert trained(runs, [judge(run) for run in runs], "reference") == [True, True, True, False, True, False]


def test_where_the_reference_diverges_its_best_learning_rate_judges():
    runs = [
        curve(np.full(STEPS, 2.0), condition="reference", rate=0.1),
        curve([*falling(300), *np.full(300, 9.0)], condition="reference", rate=1.0),
        curve(np.full(STEPS, 2.4), condition="low", rate=1.0),
        curve(np.full(STEPS, 2.6), condition="low", rate=1.0),
    ]
    assert trained(runs, [judge(run) for run in runs], "reference") == [True, False, True, False]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_the_papers_comparison_by_fishers_exact_test():
    found = compare([True] * 18 + [False] * 170, [False] * 70)
    table = [[18, 170], [0, 70]]
    assert found.p_greater == stats.fisher_exact(table, alternative="greater").pvalue == pytest.approx(0.0027, abs=5e-5)
    assert found.p_two_sided == stats.fisher_exact(table).pvalue
    by_hand = math.comb(188, 18) * math.comb(70, 0) / math.comb(258, 18)
    assert found.p_greater == pytest.approx(by_hand)
    assert found.odds_ratio == math.inf
    assert str(found.first) == "18/188 [0.06, 0.15]"


def test_the_interval_of_a_share_is_clopper_and_pearsons():
    found = share([True] * 3 + [False] * 7)
    assert found.low == pytest.approx(stats.beta.ppf(0.025, 3, 8))
    assert found.high == pytest.approx(stats.beta.ppf(0.975, 4, 7))
    assert (share([False] * 5).low, share([True] * 5).high) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_roc_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    labels = generator.random(200) < 0.3
    scores = np.round(generator.normal(labels * 0.7), 1)  # with ties
    weights = generator.integers(0, 4, 200).astype(float)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auc(scores, labels, weights) == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))
    false, true = roc(scores, labels)
    expected_false, expected_true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert false == pytest.approx(expected_false)
    assert true == pytest.approx(expected_true)


def test_auc_of_one_class_is_not_a_number():
    assert math.isnan(auc(np.arange(3.0), np.array([True] * 3)))


def test_the_bootstrap_of_a_mean_is_close_to_its_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda weights: float(weights @ values / weights.sum()), 400, 2000, 0.95)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.015)
    assert high == pytest.approx(values.mean() + error, abs=0.015)


@pytest.fixture
def diverging() -> list[Run]:
    """Two runs that diverge at steps 301 and 401, and two that do not; the signal rises 40 steps before."""
    runs = []
    for onset in (300, 400, None, None):
        loss, signal = falling(), np.full(STEPS, 1.0)
        if onset is not None:
            loss[onset:] = math.nan
            signal[onset - 40 : onset] = 5.0
        signal = np.where(np.arange(1, STEPS + 1) % 5 == 0, signal, math.nan)
        runs.append(curve(loss, warmup=50, sharpness_5e4=signal, max_abs_logit=np.full(STEPS, 3.0)))
    return runs


def test_steps_are_scored_after_the_warmup_where_measured_and_before_divergence(diverging):
    verdicts = [judge(run) for run in diverging]
    assert [verdict.diverged_at for verdict in verdicts] == [301, 401, None, None]
    scores, labels, groups = scored_steps(diverging, verdicts, "sharpness_5e4", score="value", horizon=0.05)
    assert np.bincount(groups).tolist() == [50, 70, 110, 110]  # 55 to 300, 55 to 400, 55 to 600, every fifth
    assert np.bincount(groups, weights=labels).tolist() == [
        6,
        6,
        0,
        0,
    ]  # 275 to 300: 301 is at most 30 away from 271 on
    assert labels[groups == 0].nonzero()[0].tolist() == [44, 45, 46, 47, 48, 49]
    assert len(scores[groups == 0]) == 50
    others = scored_steps(diverging, verdicts, "gradient_norm", score="value", horizon=0.05)
    assert np.array_equal(others[2], groups)  # every signal is judged on the same steps


def test_a_perfect_signal_a_useless_one_and_one_by_hand(diverging):
    verdicts = [judge(run) for run in diverging]
    found = predict(diverging, verdicts, "sharpness_5e4")
    # Of 328 calm steps, 4 have the high value (265, 270 and 365, 370): a tie with every positive.
    assert (found.positives, found.negatives, found.runs, found.horizon) == (12, 328, 2, 30)
    assert found.auc == pytest.approx(1 - 4 / 328 / 2)
    assert found.low <= found.auc <= found.high
    assert predict(diverging, verdicts, "max_abs_logit").auc == 0.5
    assert predict(diverging, verdicts, "sharpness_5e4", score="rise").auc == pytest.approx(1 - 4 / 328 / 2)


def test_without_divergence_there_is_nothing_to_predict(diverging):
    calm = diverging[2:]
    found = predict(calm, [judge(run) for run in calm], "sharpness_5e4")
    assert math.isnan(found.auc)
    assert found.positives == 0
    assert warn(calm, [judge(run) for run in calm], "sharpness_5e4") is None


def test_who_warns_first(diverging):
    found = warn(diverging, [judge(run) for run in diverging], "sharpness_5e4")
    assert found.threshold == 1.0
    assert str(found.warned).startswith("2/2")
    assert str(found.false_alarms).startswith("0/2")
    assert found.lead == 36  # first alarms at 265 and 365


def test_the_variance_of_the_loss_is_over_the_last_steps():
    run = curve(np.random.default_rng(0).normal(size=STEPS))
    values = signal_values(run, "loss_variance")
    assert np.isnan(values[:19]).all()
    assert values[99] == pytest.approx(run["loss"][80:100].var())


def test_the_registration_is_the_file_that_is_printed():
    assert "rise = 0.5" in preregistration()
    assert rules().diverged["rise"] == 0.5
    assert rules().prediction["main_horizon"] == 0.05


def test_a_step_that_a_scaled_loss_skips_is_no_divergence_and_its_loss_still_counts():
    norms = np.ones(STEPS)
    norms[41] = math.inf
    scales = np.full(STEPS, 2.0**15)
    assert judge(curve(falling(), gradient_norm=norms, loss_scale=scales)).diverged_at is None
    loss = falling()
    loss[300:] = math.nan
    assert judge(curve(loss, gradient_norm=norms, loss_scale=scales)).diverged_at == 301
    scales[41] = math.nan  # a step without a scaled loss
    assert judge(curve(falling(), gradient_norm=norms, loss_scale=scales)).diverged_at == 42
