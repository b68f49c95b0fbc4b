"""How much the result of a run depends on its learning rate, and the largest rate at which a condition is stable.

The learning-rate sensitivity of Wortsman et al. (*Small-scale proxies for large-scale Transformer training
instabilities*, arXiv 2309.14322): the mean over learning rates, uniform in their logarithm, of the smaller of final
loss and loss at initialisation, minus the least of these losses. It shows in small models what makes large ones
diverge. Small is good. The seed is the unit: each seed has one sensitivity, and intervals and tests are over seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import stats

from fpsim.policy import Policy

from .config import RunConfig, to_dict
from .figures import Judged
from .intervals import bootstrap
from .models import ModelConfig
from .trainer import recipe_of
from .verdicts import rules


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The losses of a condition over its learning rates, and what follows from them.

    Attributes:
        condition: its name.
        precision: the part of its name that it shares with the conditions that differ from it in the model alone.
        model: the model.
        bits: of an operand of its forward products, without scales.
        rates: the learning rates, ascending; shape (rates,).
        seeds: the seeds that have a run at every rate.
        left_out: how many other seeds there are.
        losses: the smaller of final smoothed loss and loss at initialisation (that of the first batch before any
            update), which also stands for a final loss that is not finite; shape (seeds, rates), nats per token.
        low, high: bootstrap interval over seeds of `value`; NaN for a single seed.
    """

    condition: str
    precision: str
    model: ModelConfig
    bits: int
    rates: np.ndarray
    seeds: tuple[int, ...]
    left_out: int
    losses: np.ndarray
    low: float
    high: float

    @property
    def by_seed(self) -> np.ndarray:
        """The sensitivity of each seed, shape (seeds,), nats per token."""
        return seed_sensitivities(self.rates, self.losses)

    @property
    def value(self) -> float:
        """The mean sensitivity over seeds."""
        return float(self.by_seed.mean())

    @property
    def largest_stable(self) -> float | None:
        """`largest_stable_rate` of the mean losses; None where every larger rate of the sweep is stable."""
        return largest_stable_rate(self.rates, self.losses.mean(0))

    @property
    def is_lower_bound(self) -> bool:
        """Whether no rate is unstable. Larger rates would then raise the sensitivity."""
        return self.largest_stable is None


def sensitivities(judged: Judged) -> list[Sensitivity]:
    """The sensitivity of every condition with two learning rates or more and a seed that has a run at all of them."""
    names = _precisions({name: judged.runs[judged.of(name)[0]].config for name in judged.conditions})
    found = (_sensitivity(judged, name, names[name]) for name in judged.conditions)
    return [each for each in found if each is not None]


def _precisions(configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """For each condition the words, between commas, with which it and those of the same precision begin."""
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        same = replace(config, model=ModelConfig(), seed=0, learning_rate=0.0)
        groups.setdefault(json.dumps(to_dict(same), sort_keys=True), []).append(name)
    shared: dict[str, str] = {}
    for group in groups.values():
        words = list(zip(*(name.split(", ") for name in group), strict=False))
        first = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, words)]
        shared |= dict.fromkeys(group, ", ".join(first) or group[0])
    return shared


def _sensitivity(judged: Judged, condition: str, precision: str) -> Sensitivity | None:
    runs = {
        (judged.runs[index].config.seed, judged.runs[index].config.learning_rate): index
        for index in judged.of(condition)
    }
    rates = np.array(sorted({rate for _, rate in runs}))
    every = sorted({seed for seed, _ in runs})
    seeds = [seed for seed in every if all((seed, rate) in runs for rate in rates)]
    if len(rates) < 2 or not seeds or rates[0] <= 0:
        return None
    losses = np.array([[_capped(judged, runs[seed, rate]) for rate in rates] for seed in seeds])
    config = judged.runs[judged.of(condition)[0]].config
    by_seed = seed_sensitivities(rates, losses)
    low, high = _interval(by_seed)
    return Sensitivity(
        condition,
        precision,
        config.model,
        operand_bits(config),
        rates,
        tuple(seeds),
        len(every) - len(seeds),
        losses,
        low,
        high,
    )


def _capped(judged: Judged, index: int) -> float:
    """The smaller of final loss and loss at initialisation."""
    first, last = float(judged.runs[index]["loss"][0]), judged.verdicts[index].final_loss
    return min(first, last) if math.isfinite(last) else first


def _interval(by_seed: np.ndarray) -> tuple[float, float]:
    if len(by_seed) < 2:
        return math.nan, math.nan
    by = rules().prediction
    return bootstrap(
        lambda weights: float(weights @ by_seed / weights.sum()), len(by_seed), int(by["bootstrap"]), float(by["level"])
    )


def seed_sensitivities(rates: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The sensitivity of each seed.

    A rate counts by the width of its cell on the axis of logarithms, which is the same for all where rates are evenly
    spaced there.

    Args:
        rates: ascending and positive, shape (rates,), at least two.
        losses: shape (seeds, rates).

    >>> seed_sensitivities(np.array([1.0, 10.0, 100.0]), np.array([[4.0, 1.0, 4.0]]))
    array([2.])
    """
    logs = np.log(rates)
    ends = np.concatenate([[2 * logs[0] - logs[1]], logs, [2 * logs[-1] - logs[-2]]])
    widths = (ends[2:] - ends[:-2]) / 2
    return np.asarray(losses @ (widths / widths.sum()) - losses.min(1))


def largest_stable_rate(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The learning rate above the best one at which the loss first exceeds the least loss by the registered margin.

    Between two rates of the sweep the loss is taken as linear in the logarithm of the rate.

    Args:
        rates: ascending and positive, shape (rates,).
        losses: shape (rates,).

    Returns:
        The rate; None where no larger rate of the sweep exceeds the margin.
    """
    best = int(losses.argmin())
    limit = losses[best] + float(rules().sensitivity["margin"])
    for index in range(best + 1, len(rates)):
        if losses[index] > limit:
            below, above = losses[index - 1], losses[index]
            share = (limit - below) / (above - below)
            return float(rates[index - 1] * (rates[index] / rates[index - 1]) ** share)
    return None


def operand_bits(config: RunConfig) -> int:
    """The bits of an activation in the forward products of a run, without its scale: 32 where nothing rounds it."""
    recipe = recipe_of(config)
    policy = None if recipe is None else recipe.policy
    if config.options is not None:
        policy = Policy.from_options(config.options)
    cast = policy.cast("fprop", "activation") if policy is not None else None
    if cast is not None:
        return int(cast.format.bits)
    return 16 if config.autocast else 32


# -- differences between conditions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Student's test on differences that are paired by seed.

    Attributes:
        mean, low, high: the mean difference with its interval of the registered level; NaN for a single seed.
        p: two-sided; NaN for a single seed.
        seeds: the number of seeds.
        detectable: the least true difference that so many seeds show with the registered power, for the spread seen
            here; NaN for a single seed.
        needed: the seeds that would show the mean difference with this power, for this spread; None beyond 10,000, and
            for a single seed.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    detectable: float
    needed: int | None


def paired(gaps: np.ndarray) -> Paired:
    """The test on ``gaps``, one per seed."""
    count, mean = len(gaps), float(gaps.mean())
    if count < 2:
        return Paired(mean, math.nan, math.nan, math.nan, count, math.nan, None)
    spread, level = float(gaps.std(ddof=1)), float(rules().prediction["level"])
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * spread / math.sqrt(count)
    ratio = math.sqrt(count) * abs(mean) / spread if spread else math.inf if mean else 0.0
    p = float(2 * stats.t.sf(ratio, count - 1))
    return Paired(mean, mean - half, mean + half, p, count, detectable(spread, count), seeds_needed(mean, spread))


@dataclass(frozen=True)
class Difference:
    """The sensitivity of one condition minus that of another, over their common seeds.

    Attributes:
        first, second: the conditions.
        test: on the differences.
        is_bound: whether no rate is unstable in one of the two, so that the difference is that of the swept rates only.
    """

    first: str
    second: str
    test: Paired
    is_bound: bool


def differences(found: Sequence[Sensitivity], reference: str) -> list[Difference]:
    """Every condition against the one of the same model whose precision is that of the condition ``reference``.

    Conditions with other rates than those of their reference, or without a common seed, are left out.
    """
    precision = next((each.precision for each in found if each.condition == reference), reference)
    references = {each.model: each for each in found if each.precision == precision}
    pairs = [(each, references[each.model]) for each in found if each.model in references]
    return [
        difference(first, second)
        for first, second in pairs
        if first is not second and np.array_equal(first.rates, second.rates) and set(first.seeds) & set(second.seeds)
    ]


def difference(first: Sensitivity, second: Sensitivity) -> Difference:
    """The difference between two conditions with the same learning rates and at least one common seed."""
    one, two = (dict(zip(each.seeds, each.by_seed.tolist(), strict=True)) for each in (first, second))
    gaps = np.array([one[seed] - two[seed] for seed in one if seed in two])
    is_bound = first.is_lower_bound or second.is_lower_bound
    return Difference(first.condition, second.condition, paired(gaps), is_bound)


def power(effect: float, spread: float, seeds: int) -> float:
    """The probability that Student's paired test, two-sided at the registered level, shows a true ``effect``.

    Args:
        effect: the mean of the differences.
        spread: their standard deviation, above 0.
        seeds: the number of pairs, at least 2.

    >>> round(power(0.5, 1.0, 34), 3)
    0.808
    """
    limit = stats.t.ppf((1 + float(rules().prediction["level"])) / 2, seeds - 1)
    shift = abs(effect) / spread * math.sqrt(seeds)
    return float(stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift))


def detectable(spread: float, seeds: int) -> float:
    """The least effect whose `power` is the registered one."""
    wanted = float(rules().sensitivity["power"])
    low, high = 0.0, 1.0
    while spread and power(high * spread, spread, seeds) < wanted:
        low, high = high, 2 * high
    for _ in range(40 if spread else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle * spread, spread, seeds) < wanted else (low, middle)
    return high * spread


def seeds_needed(effect: float, spread: float, most: int = 10_000) -> int | None:
    """The least number of seeds at which the `power` to show ``effect`` is the registered one; None beyond ``most``."""
    wanted = float(rules().sensitivity["power"])
    if not spread:
        return 2 if effect else None
    if not effect or power(effect, spread, most) < wanted:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(effect, spread, middle) < wanted else (low, middle)
    return high


# -- larger models -----------------------------------------------------------------------------------------------------

#: The two ways in which models grow, by the field of their configuration.
AXES = {"width": "hidden", "depth": "layers"}


def series(found: Sequence[Sensitivity], axis: str) -> list[list[Sensitivity]]:
    """Conditions that differ in the width, or in the depth, of their models alone: ascending, two or more.

    Args:
        axis: ``width`` or ``depth``.
    """
    (other,) = (field for name, field in AXES.items() if name != axis)
    groups: dict[tuple[Any, ...], dict[int, Sensitivity]] = {}
    for each in found:
        group = each.precision, each.model.family, getattr(each.model, other)
        groups.setdefault(group, {})[getattr(each.model, AXES[axis])] = each
    return [[group[size] for size in sorted(group)] for group in groups.values() if len(group) > 1]


@dataclass(frozen=True)
class NextSize:
    """The largest stable rate of the largest model of a series, foretold from the smaller ones.

    Attributes:
        precision: the name of the conditions without sizes.
        axis: ``width`` or ``depth``.
        smaller: the smaller models, ascending.
        model: the largest model.
        predicted, low, high: the rate, with its bootstrap interval over seeds; NaN where it cannot be foretold.
        measured: its own largest stable rate; None where none of its rates is unstable.
        why_not: why there is no prediction; empty where there is one.
    """

    precision: str
    axis: str
    smaller: tuple[ModelConfig, ...]
    model: ModelConfig
    predicted: float
    low: float
    high: float
    measured: float | None
    why_not: str


def next_sizes(found: Sequence[Sensitivity]) -> list[NextSize]:
    """A prediction for every `series` of three models or more.

    The logarithm of the largest stable rate is taken as linear in that of the width, or of the depth: least squares
    over all models but the largest.
    """
    return [_next_size(group, axis) for axis in AXES for group in series(found, axis) if len(group) > 2]


def _next_size(group: Sequence[Sensitivity], axis: str) -> NextSize:
    *smaller, largest = group
    sizes = np.log([getattr(each.model, AXES[axis]) for each in group])
    seeds = sorted(set.intersection(*(set(each.seeds) for each in smaller)))
    losses = [each.losses[[each.seeds.index(seed) for seed in seeds]] for each in smaller]

    def foretell(weights: np.ndarray) -> float:
        means = (weights @ own / weights.sum() for own in losses)
        rates = [largest_stable_rate(each.rates, mean) for each, mean in zip(smaller, means, strict=True)]
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates):
            return math.nan
        return math.exp(np.polyval(np.polyfit(sizes[:-1], np.log(known), 1), sizes[-1]))

    predicted = low = high = math.nan
    why_not = ""
    if not seeds:
        why_not = "the smaller models have no common seed"
    elif math.isnan(predicted := foretell(np.ones(len(seeds)))):
        why_not = "a smaller model is stable at every rate: add larger rates"
    elif len(seeds) > 1:
        by = rules().prediction
        low, high = bootstrap(foretell, len(seeds), int(by["bootstrap"]), float(by["level"]))
    models = tuple(each.model for each in smaller)
    return NextSize(
        largest.precision, axis, models, largest.model, predicted, low, high, largest.largest_stable, why_not
    )
