"""Recipes beside each other: the gap of each to the reference over paired runs, its cost, and its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .figures import Judged
from .footprint import Footprint, footprint
from .intervals import Share, mean_and_half, share
from .trainer import recipe_of


@dataclass(frozen=True)
class Gap:
    """The mean of the final loss minus that of the reference, with Student's interval of the registered level.

    Attributes:
        mean, low, high: nats per token; NaN without pairs, and an interval of NaN with a single one.
        pairs: the number of pairs: runs of the same seed, learning rate and data, neither of which diverged.
    """

    mean: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Compared:
    """A condition of a sweep against the reference.

    Attributes:
        condition: its name.
        gap: its distance from the reference.
        diverged: the share of its runs that diverged.
        sharpness: the median of the last measured sharpness; NaN where none was measured.
        cost: seconds of a step over those of the reference, the median over pairs.
        memory: the memory that the recipe would need; None for a condition without a recipe.
    """

    condition: str
    gap: Gap
    diverged: Share
    sharpness: float
    cost: float
    memory: Footprint | None


def compare_recipes(judged: Judged) -> list[Compared]:
    """Every condition of the sweep against its reference, in the order of the plan."""
    return [_compared(judged, name) for name in judged.conditions]


def pairs(judged: Judged, name: str) -> list[tuple[int, int]]:
    """The index of each run of ``name`` with that of the reference's run of the same seed, learning rate and data."""
    reference = {_pair_key(judged, index): index for index in judged.of(judged.reference)}
    keys = ((index, _pair_key(judged, index)) for index in judged.of(name))
    return [(index, reference[key]) for index, key in keys if key in reference]


def gap(judged: Judged, name: str) -> Gap:
    """How far the final loss of the condition ``name`` is above that of the reference."""
    found = [[judged.verdicts[index] for index in pair] for pair in pairs(judged, name)]
    gaps = [own.final_loss - other.final_loss for own, other in found if not own.diverged and not other.diverged]
    mean, half = mean_and_half(gaps)
    return Gap(mean, mean - half, mean + half, len(gaps))


def _compared(judged: Judged, name: str) -> Compared:
    costs = [_seconds(judged, index) / _seconds(judged, other) for index, other in pairs(judged, name)]
    last = [values[-1] for index in judged.of(name) if len(values := _measured(judged, index))]
    recipe = recipe_of(judged.runs[judged.of(name)[0]].config)
    return Compared(
        name,
        gap(judged, name),
        share([judged.verdicts[index].diverged for index in judged.of(name)]),
        float(np.median(last)) if last else math.nan,
        float(np.median(costs)) if costs else math.nan,
        None if recipe is None else footprint(recipe),
    )


def _pair_key(judged: Judged, index: int) -> tuple[int, float, str]:
    config = judged.runs[index].config
    return config.seed, config.learning_rate, config.data.label


def _seconds(judged: Judged, index: int) -> float:
    return float(np.median(judged.runs[index]["seconds"][1:]))


def _measured(judged: Judged, index: int) -> np.ndarray:
    values = judged.runs[index]["sharpness_5e4"]
    return np.asarray(values[np.isfinite(values)])
