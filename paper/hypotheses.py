"""The claims that were registered before experiments 9 to 11: on learning-rate sensitivity, and on failing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figures import Judged
from .intervals import compare
from .sensitivity import Paired, Sensitivity, paired, sensitivities
from .verdicts import rules


@dataclass(frozen=True)
class Hypothesis:
    """A registered claim and its verdict.

    Attributes:
        text: the claim.
        numbers: the measured numbers, in words.
        verdict: supported, refuted, or undecided with the reason.
    """

    text: str
    numbers: str
    verdict: str


def judge_hypotheses(judged: Judged, number: int) -> list[Hypothesis]:
    """The claims of the experiment ``number``, judged on its registered seeds; empty if none was registered for it."""
    by = rules().experiments.get(str(number))
    if by is None:
        return []
    seeds = range(by["first_seed"], by["first_seed"] + by["seeds"])
    kept = [index for index, run in enumerate(judged.runs) if run.config.seed in seeds]
    own = Judged(
        [judged.runs[index] for index in kept],
        [judged.verdicts[index] for index in kept],
        [judged.trained[index] for index in kept],
        judged.reference,
    )
    found = {each.condition: each for each in sensitivities(own)}
    return [_judge(claim, own, found) for claim in by["claims"]]


def _judge(claim: Mapping[str, Any], judged: Judged, found: Mapping[str, Sensitivity]) -> Hypothesis:
    names = [name for side in (claim["first"], claim["second"]) for name in ([side] if isinstance(side, str) else side)]
    known = judged.conditions if claim["kind"] == "fails" else found
    if missing := [name for name in names if name not in known]:
        return Hypothesis(
            claim["text"], "-", f"not judged: {', '.join(missing)} has no complete run of a registered seed"
        )
    numbers, verdict = _fails(claim, judged) if claim["kind"] == "fails" else _differs(claim, [found[n] for n in names])
    return Hypothesis(claim["text"], numbers, verdict)


def _fails(claim: Mapping[str, Any], judged: Judged) -> tuple[str, str]:
    first, second = (
        [judged.verdicts[index].diverged or not judged.trained[index] for index in judged.of(claim[side])]
        for side in ("first", "second")
    )
    found = compare(first, second)
    numbers = f"{found.first} against {found.second}, p = {found.p_greater:.3g}"
    if found.p_greater < 1 - rules().prediction["level"]:
        return numbers, "supported"
    return numbers, "refuted" if found.first.high < claim["at_least"] else "undecided: too few runs to tell"


def _differs(claim: Mapping[str, Any], found: Sequence[Sensitivity]) -> tuple[str, str]:
    """The verdict on ``found``: two conditions, or the two pairs of a claim on growth."""
    seeds = sorted(set.intersection(*(set(each.seeds) for each in found)))
    if not seeds or any(not np.array_equal(each.rates, found[0].rates) for each in found):
        return "-", "not judged: the conditions share no registered seed at the same learning rates"
    by_seed = [each.by_seed[[each.seeds.index(seed) for seed in seeds]] for each in found]
    signs = (1, -1) if len(found) == 2 else (1, -1, -1, 1)
    test = paired(np.sum([sign * values for sign, values in zip(signs, by_seed, strict=True)], axis=0))
    numbers = f"{test.mean:+.3f} [{test.low:+.3f}, {test.high:+.3f}], {test.seeds} seeds"
    if any(each.is_lower_bound for each in found):
        numbers += ", over rates that do not reach instability in all"
    if claim["kind"] == "equal":
        within = claim["within"]
        is_supported, is_refuted = -within < test.low <= test.high < within, test.low > within or test.high < -within
        return (
            numbers,
            "supported" if is_supported else "refuted" if is_refuted else "undecided: the interval is too wide",
        )
    is_supported, is_refuted = test.low > 0, test.high < claim["at_least"]
    return numbers, "supported" if is_supported else "refuted" if is_refuted else f"undecided: {too_few_seeds(test)}"


def too_few_seeds(test: Paired) -> str:
    """How many seeds would show the difference that ``test`` does not show."""
    if test.seeds < 2:
        return "a single seed shows no difference: add seeds"
    wanted = "more than 10,000" if test.needed is None else str(test.needed)
    return (
        f"too few seeds to tell: {wanted} would show this difference with probability {rules().sensitivity['power']:g}"
    )
