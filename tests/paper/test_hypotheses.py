"""Verdicts on registered claims, from sensitivities and counts whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fpsim.paper import hypotheses
from fpsim.paper.figures import Judged
from fpsim.paper.hypotheses import judge_hypotheses, too_few_seeds
from fpsim.paper.sensitivity import paired
from fpsim.paper.verdicts import Rules, judge, rules
from tests.paper.test_sensitivity import a_condition

SEEDS = (50, 51, 52, 53)


@pytest.fixture
def registered(monkeypatch):
    """Register these claims for experiment 99, on seeds 50 to 53."""

    def register(*claims: dict) -> None:
        own = {"99": {"first_seed": 50, "seeds": 4, "claims": [{"text": "t", **claim} for claim in claims]}}
        known = rules()
        fields = {**vars(known), "experiments": own}
        monkeypatch.setattr(hypotheses, "rules", lambda: Rules(**fields))

    return register


def with_sensitivities(**values: tuple[float, ...]) -> Judged:
    """Conditions whose seeds have these sensitivities: losses of 2 but for the last rate, four times as far above."""
    runs = []
    for name, by_seed in values.items():
        losses = {
            seed: (2.0, 2.0, 2.0, 2.0 + 4 * value) for seed, value in zip((*SEEDS, 9), (*by_seed, 7.0), strict=True)
        }
        runs += a_condition(name, losses, first=100.0)
    return Judged(runs, [judge(run) for run in runs], [True] * len(runs), "a")


def verdict(found) -> str:
    return found.verdict.split(":")[0]


def test_claims_on_differences(registered):
    """Seed 9 is not registered, and its sensitivity of 7 counts nowhere."""
    judged = with_sensitivities(
        a=(1.0, 1.1, 0.9, 1.0), b=(1.5, 1.61, 1.4, 1.5), c=(1.01, 1.1, 0.9, 1.0), d=(0.5, 2.5, 1.0, 1.2)
    )
    pairs = [("b", "a"), ("c", "a"), ("d", "a")]
    registered(
        *({"kind": "more", "first": one, "second": two, "at_least": 0.1} for one, two in pairs),
        *({"kind": "equal", "first": one, "second": two, "within": 0.1} for one, two in pairs),
        {"kind": "grows", "first": ["b", "a"], "second": ["c", "a"], "at_least": 0.1},
        {"kind": "more", "first": "x", "second": "a", "at_least": 0.1},
    )
    found = judge_hypotheses(judged, 99)
    assert [verdict(each) for each in found] == [
        *("supported", "refuted", "undecided"),
        *("refuted", "supported", "undecided"),
        "supported",
        "not judged",
    ]
    expected = stats.ttest_1samp(np.array([0.5, 0.51, 0.5, 0.5]), 0.0).confidence_interval(0.95)
    assert found[0].numbers == f"+0.502 [{expected.low:+.3f}, {expected.high:+.3f}], 4 seeds"
    growth = stats.ttest_1samp(np.array([0.49, 0.51, 0.5, 0.5]), 0.0).confidence_interval(0.95)
    assert found[6].numbers == f"+0.500 [{growth.low:+.3f}, {growth.high:+.3f}], 4 seeds"
    assert found[2].verdict == f"undecided: {too_few_seeds(paired(np.array([-0.5, 1.4, 0.1, 0.2])))}"
    assert found[7].verdict == "not judged: x has no complete run of a registered seed"
    assert judge_hypotheses(judged, 1) == []


def test_claims_on_failing_runs(registered):
    """Four seeds at four rates: 16 runs in each condition."""
    runs = []
    for name in ("all", "none", "two"):
        runs += a_condition(name, {seed: (2.0, 2.0, 2.0, 2.0) for seed in SEEDS})
    trained = [
        not (run.condition == "all" or (run.condition == "two" and index % 16 < 2)) for index, run in enumerate(runs)
    ]
    judged = Judged(runs, [judge(run) for run in runs], trained, "none")
    kinds = [("all", 0.05), ("none", 0.05), ("none", 0.3), ("two", 0.05)]
    registered(*({"kind": "fails", "first": name, "second": "none", "at_least": least} for name, least in kinds))
    found = judge_hypotheses(judged, 99)
    assert [verdict(each) for each in found] == ["supported", "undecided", "refuted", "undecided"]
    assert found[3].numbers == "2/16 [0.02, 0.38] against 0/16 [0.00, 0.21], p = 0.242"  # (16 choose 2) / (32 choose 2)


def test_a_difference_that_is_not_shown_names_the_seeds_that_would_show_it():
    gaps = np.array([0.5, 1.5, -0.5, 0.5])  # mean 0.5, standard deviation 0.816: d = 0.612
    assert too_few_seeds(paired(gaps)) == "too few seeds to tell: 23 would show this difference with probability 0.8"
    assert too_few_seeds(paired(gaps[:1])) == "a single seed shows no difference: add seeds"
    assert too_few_seeds(paired(np.array([1.0, -1.0]))).startswith("too few seeds to tell: more than 10,000 would")
