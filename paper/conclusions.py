"""What a sweep says of each condition, in words: every number is one of its runs', every remedy one that was tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fpsim.compile_backend.observe.rounding_statistics import LIMITS, severity

from .comparison import gap
from .figures import Judged
from .ranges import Examination, Tried
from .storage import Run
from .verdicts import rules

#: For each role and outcome the column of `fpsim.paper.record.Record`, the name of its limits, and words.
_SHARES = [
    (f"{column}_{role}", count, f"{role}s {verb}")
    for column, count, verb in (("underflowed", "underflows", "underflow"), ("saturated", "saturations", "saturate"))
    for role in ("activation", "weight", "gradient")
]
#: The severity that counts as bad.
_BAD = 2


@dataclass(frozen=True)
class Conclusion:
    """The verdict on one condition.

    Attributes:
        condition: its name.
        state: ``trained`` in all runs, ``partly`` in some of them, or ``failed`` in all.
        text: one sentence, which begins with the name.
    """

    condition: str
    state: str
    text: str


def conclude(judged: Judged) -> list[Conclusion]:
    """The verdict on each condition, in the order of the plan.

    The sentence says how many runs did not train and how they ended, or how far the loss is from that of the reference
    (`fpsim.paper.comparison.gap`); the largest share of each role that underflows or saturates beyond the limit, over
    the steps of the runs in question; and the cheapest remedy that left no layer beyond the limits, in the run with
    the worst layer. The runs in question are those that did not train, or else all.
    """
    return [_conclude(judged, name) for name in judged.conditions]


def _conclude(judged: Judged, name: str) -> Conclusion:
    chosen = judged.of(name)
    failed = [index for index in chosen if not judged.trained[index]]
    runs = [judged.runs[index] for index in failed or chosen]
    beyond = _beyond(runs)
    remedy = _remedy(runs, has_failed=bool(failed))
    if failed:
        count = f"{name} did not train in {len(failed)} of {len(chosen)} ({_ends(judged, failed)})"
        text = "; ".join(filter(None, (f"{count}: {beyond or _within(runs)}", remedy)))
    else:
        count = ", ".join(filter(None, (f"{name} trained in {len(chosen)} of {len(chosen)}", _distance(judged, name))))
        text = "; ".join(filter(None, (f"{count}, although {beyond}" if beyond else count, remedy)))
    state = "trained" if not failed else "failed" if len(failed) == len(chosen) else "partly"
    return Conclusion(name, state, text + ".")


def _ends(judged: Judged, failed: Sequence[int]) -> str:
    """How the runs ended that did not train."""
    verdicts = [judged.verdicts[index] for index in failed]
    onsets = [verdict.diverged_at for verdict in verdicts if verdict.diverged_at is not None]
    undecided = sum(verdict.undecided for verdict in verdicts)
    above = len(failed) - len(onsets) - undecided
    parts = []
    if onsets:
        parts.append(f"{len(onsets)} diverged, {'' if len(onsets) == 1 else 'the first '}at step {min(onsets)}")
    if undecided:
        parts.append(f"{undecided} ended while the loss rose")
    if above:
        parts.append(f"{above} ended more than {rules().trained['margin']:g} nat above {judged.reference}")
    return "; ".join(parts)


def _distance(judged: Judged, name: str) -> str:
    """How far the final loss is from that of the reference; empty for the reference itself."""
    if name == judged.reference:
        return "the reference"
    found = gap(judged, name)
    if not found.pairs:
        return f"without a run of {judged.reference} to compare with"
    level = 100 * float(rules().prediction["level"])
    interval = "" if math.isnan(found.low) else f"; {level:g} % interval {found.low:+.3f} to {found.high:+.3f}"
    side = "above" if found.mean > 0 else "below"
    pairs = f"{found.pairs} pair{'' if found.pairs == 1 else 's'}"
    return f"{abs(found.mean):.3f} nats {side} {judged.reference} ({pairs}{interval})"


def _largest(runs: Sequence[Run], column: str) -> float:
    """The largest share over the steps of all runs; NaN if none was counted."""
    values = np.concatenate([run[column] for run in runs])
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan


def _beyond(runs: Sequence[Run]) -> str:
    """The shares beyond their limit, the largest first; empty if there are none."""
    shares = [(_largest(runs, column), count, words) for column, count, words in _SHARES]
    bad = sorted((e for e in shares if not math.isnan(e[0]) and severity(e[1], e[0]) == _BAD), key=lambda e: -e[0])
    return ", ".join(f"{'' if place else 'up to '}{_percent(s)} of {words}" for place, (s, _, words) in enumerate(bad))


def _within(runs: Sequence[Run]) -> str:
    """What to say where no share is beyond its limit."""
    if all(math.isnan(_largest(runs, column)) for column, *_ in _SHARES):
        return "underflow and saturation were not counted"
    underflow, saturation = (_percent(LIMITS[count][1]) for count in ("underflows", "saturations"))
    return f"no role underflows beyond {underflow} or saturates beyond {saturation}"


def _remedy(runs: Sequence[Run], *, has_failed: bool) -> str:
    """The cheapest remedy that was confirmed in the run with the worst layer; empty if no layer misfits."""
    examined = [(run, Examination.from_dict(run.facts["ranges"])) for run in runs if "ranges" in run.facts]
    misfitting = [(run, found) for run, found in examined if found.misfits]
    if not misfitting:
        return ""
    run, worst = max(misfitting, key=lambda pair: pair[1].misfits[0].share)
    if worst.fix is None:
        return "no remedy that was tried leaves all layers within the limits" if worst.tried else ""
    told = _named(run, worst.fix)
    return f"{told} would likely mend it" if has_failed else f"with {told} no layer is beyond the limits"


def _named(run: Run, fix: Tried) -> str:
    if fix.loss_scale == 1:
        return fix.name
    if run.config.recipe is not None:  # which may scale the loss too
        return f"a loss scale {fix.loss_scale:g} times as large"
    return f"a loss scale of {run.config.loss_scale * fix.loss_scale:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
