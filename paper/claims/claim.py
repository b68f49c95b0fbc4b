"""A published claim as a test whose pass mark is fixed before it is run.

A claim is measured on several seeds. Each seed gives a few numbers, its quantities. The pass marks stand in
``preregistration.toml``, under ``[claims.NAME]``. A mark bounds the mean of a quantity over the seeds. It is met where
the whole interval of the mean lies within the bound, and missed where none of it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..verdicts import rules

#: The words for a verdict.
REPRODUCED, NOT_REPRODUCED, OPEN, NO_POWER = "reproduced", "not reproduced", "undecided", "not testable at this scale"


@dataclass(frozen=True)
class Claim:
    """A claim of a publication, and the test bed that stands for it on a small machine.

    Attributes:
        name: its name, which is also that of its table in ``preregistration.toml``.
        recipe: the name of the recipe (`fpsim.recipes`) of which it is a claim.
        statement: the claim.
        source: paper or code that makes it.
        bed: how it is tested here.
        measure: from a seed to the quantities, numbers by name. It is a pure function.
    """

    name: str
    recipe: str
    statement: str
    source: str
    bed: str
    measure: Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Mark:
    """A registered bound on the mean of one quantity over the seeds.

    Attributes:
        quantity: its name.
        at_most, at_least: the bound; exactly one of them is given.
        noise_of: a quantity whose standard deviation over the seeds multiplies the bound, or None.
    """

    quantity: str
    at_most: float | None = None
    at_least: float | None = None
    noise_of: str | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"mark {self.quantity!r}: give one of at_most and at_least")

    def __str__(self) -> str:
        sign, bound = ("<=", self.at_most) if self.at_most is not None else (">=", self.at_least)
        return f"{self.quantity} {sign} {bound:g}" + (f" sd({self.noise_of})" if self.noise_of else "")


@dataclass(frozen=True)
class Registered:
    """The registered table of one claim.

    Attributes:
        seeds: the seeds of the test, in order.
        holds: what must hold for the claim.
        control: what must hold for the test to have power: a variant that the source says fails must fail.
    """

    seeds: tuple[int, ...]
    holds: tuple[Mark, ...]
    control: tuple[Mark, ...]


@dataclass(frozen=True)
class Judged:
    """The outcome of one mark.

    Attributes:
        mark: the mark.
        mean, low, high: the mean of its quantity over the seeds, with the interval of the registered level.
        bound: the bound, in the units of the quantity.
        met: True, False, or None where the interval contains the bound.
    """

    mark: Mark
    mean: float
    low: float
    high: float
    bound: float
    met: bool | None

    @property
    def numbers(self) -> str:
        """The mean with its interval."""
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def word(self) -> str:
        """``met``, ``missed`` or ``undecided``."""
        return {True: "met", False: "missed", None: "undecided"}[self.met]

    def __str__(self) -> str:
        return f"{self.mark}: {self.numbers}, {self.word}"


@dataclass(frozen=True)
class Outcome:
    """The verdict on a claim, with the marks on which it rests."""

    verdict: str
    holds: tuple[Judged, ...]
    control: tuple[Judged, ...]


def registered(name: str) -> Registered:
    """The registered table of the claim ``name``.

    Raises:
        KeyError: no such table.
    """
    table = rules().claims[name]
    first, count = table["first_seed"], table["seeds"]
    return Registered(tuple(range(first, first + count)), _marks(table["holds"]), _marks(table["control"]))


def _marks(table: Mapping[str, Mapping[str, Any]]) -> tuple[Mark, ...]:
    return tuple(Mark(quantity, **bound) for quantity, bound in table.items())


def judge(measured: Sequence[Mapping[str, float]], by: Registered) -> Outcome:
    """The verdict on the quantities that the seeds gave.

    A claim is reproduced if every mark under ``holds`` is met, and not reproduced if one is missed. It is not testable
    where a control mark is not met, since the test would then not notice a failure.

    Args:
        measured: the quantities of each seed, at least two.

    Raises:
        ValueError: fewer than two seeds, for which there is no interval.
    """
    if len(measured) < 2:
        raise ValueError(f"a verdict needs at least 2 seeds, got {len(measured)}")
    holds = tuple(judge_mark(mark, measured) for mark in by.holds)
    control = tuple(judge_mark(mark, measured) for mark in by.control)
    if not all(judged.met for judged in control):
        return Outcome(NO_POWER, holds, control)
    if any(judged.met is False for judged in holds):
        return Outcome(NOT_REPRODUCED, holds, control)
    return Outcome(REPRODUCED if all(judged.met for judged in holds) else OPEN, holds, control)


def judge_mark(mark: Mark, measured: Sequence[Mapping[str, float]]) -> Judged:
    """The outcome of one mark: Student's interval of the mean, of the registered level.

    A quantity that is infinite on a seed, such as the loss of a run that diverged, has an infinite mean and an interval
    of that point. A quantity that is NaN meets no mark.

    >>> judge_mark(Mark("error", at_most=2.0), [{"error": 1.0}, {"error": 1.5}, {"error": 1.25}]).met
    True
    """
    values = np.array([row[mark.quantity] for row in measured], dtype=np.float64)
    unit = 1.0
    if mark.noise_of is not None:
        unit = float(np.std([row[mark.noise_of] for row in measured], ddof=1))
    sign = 1.0 if mark.at_most is not None else -1.0
    bound = float((mark.at_most if mark.at_most is not None else mark.at_least) or 0.0) * unit
    with np.errstate(invalid="ignore"):
        mean = float(values.mean())
        spread = float(values.std(ddof=1)) if np.isfinite(values).all() else 0.0
    level = float(rules().prediction["level"])
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    low, high = mean - half, mean + half
    met = None
    if math.isnan(mean):
        met = False
    elif sign * (high if sign > 0 else low) <= sign * bound:
        met = True
    elif sign * (low if sign > 0 else high) > sign * bound:
        met = False
    return Judged(mark, mean, low, high, bound, met)
