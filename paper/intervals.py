"""Shares, tests between conditions, and intervals, over many runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .verdicts import rules


@dataclass(frozen=True)
class Share:
    """A share of runs with its exact (Clopper and Pearson) interval."""

    count: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.count}/{self.total} [{self.low:.2f}, {self.high:.2f}]"


def share(flags: Sequence[bool], level: float | None = None) -> Share:
    """The share of true ``flags``, with an interval of the registered level, or another ``level``.

    >>> str(share([True] * 18 + [False] * 170))
    '18/188 [0.06, 0.15]'
    """
    count, total = sum(map(bool, flags)), len(flags)
    found = stats.binomtest(count, total).proportion_ci(level or rules().prediction["level"], method="exact")
    return Share(count, total, float(found.low), float(found.high))


@dataclass(frozen=True)
class Comparison:
    """Fisher's exact test between two conditions: one-sided (true more often in the first), two-sided, odds ratio."""

    first: Share
    second: Share
    p_greater: float
    p_two_sided: float
    odds_ratio: float


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare how often ``first`` and ``second`` are true by Fisher's exact test.

    >>> round(compare([True] * 18 + [False] * 170, [False] * 70).p_greater, 4)
    0.0027
    """
    table = [[sum(map(bool, flags)), len(flags) - sum(map(bool, flags))] for flags in (first, second)]
    greater = stats.fisher_exact(table, alternative="greater")
    both = stats.fisher_exact(table)
    return Comparison(share(first), share(second), float(greater[1]), float(both[1]), float(both[0]))


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, level: float, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``statistic``, a function of how many times each of ``count`` units was drawn."""
    generator = np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples))
    values = np.array([statistic(weights.astype(float)) for weights in drawn])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - level) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of Student's interval of the registered level; NaN where ``values`` are too few."""
    if not values:
        return math.nan, math.nan
    if len(values) == 1:
        return values[0], math.nan
    level = float(rules().prediction["level"])
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
