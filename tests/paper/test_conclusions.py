"""The verdicts in words, on tables made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fpsim.paper.conclusions import Conclusion, conclude
from fpsim.paper.config import RunConfig
from fpsim.paper.figures import Judged
from fpsim.paper.ranges import Examination, Misfit, Tried
from fpsim.paper.storage import Run
from fpsim.paper.verdicts import Verdict

COLUMNS = [f"{what}_{role}" for what in ("saturated", "underflowed") for role in ("activation", "weight", "gradient")]
HEAD, BODY = Misfit("head", "gradient", "underflows", 0.3824), Misfit("body", "weight", "underflows", 0.2)
#: A remedy that does not help, and one that does.
SCALE = Examination((HEAD,), (Tried("loss scale times 2^8", (HEAD,), 256.0), Tried("...", (), 4096.0)))


def run(
    condition: str, seed: int, examination: Examination | None = None, loss_scale: float = 1.0, **shares: list[float]
) -> Run:
    """A run of three steps whose shares of underflow and saturation are ``shares``, and else were not counted."""
    columns = {name: np.array(shares.get(name, [np.nan] * 3)) for name in COLUMNS}
    facts = {} if examination is None else {"ranges": examination.to_dict()}
    return Run(condition + str(seed), condition, RunConfig(seed=seed, loss_scale=loss_scale), columns, facts)


def conclusions(entries: list[tuple[Run, Verdict, bool]]) -> list[Conclusion]:
    runs, verdicts, trained = zip(*entries, strict=True)
    return conclude(Judged(runs, verdicts, trained, "fp32"))


def ended(loss: float, diverged_at: int | None = None, rising_since: int | None = None) -> Verdict:
    return Verdict(diverged_at, (), loss, loss, rising_since)


REFERENCE = [(run("fp32", seed, None), ended(2.0), True) for seed in range(2)]


def second(entries: list[tuple[Run, Verdict, bool]]) -> tuple[str, str]:
    """The state and the sentence of the condition beside the reference."""
    reference, found = conclusions(REFERENCE + entries)
    assert reference == Conclusion("fp32", "trained", "fp32 trained in 2 of 2, the reference.")
    assert found.condition == entries[0][0].condition
    return found.state, found.text


def test_runs_that_diverged_are_told_with_the_largest_shares_and_the_remedy_that_was_confirmed() -> None:
    shares = {"underflowed_gradient": [0.1, 0.38, np.nan], "saturated_weight": [0.0, 0.002, np.nan]}
    entries = [
        (run("e4m3fn", 0, SCALE, **shares), ended(9.0, diverged_at=231), False),
        (run("e4m3fn", 1, Examination((BODY,), (Tried("other", ()),))), ended(np.nan, diverged_at=77), False),
    ]
    assert second(entries) == (
        "failed",
        "e4m3fn did not train in 2 of 2 (2 diverged, the first at step 77): up to 38 % of gradients underflow, 0.2 % "
        "of weights saturate; a loss scale of 4096 would likely mend it.",
    )


def test_runs_that_did_not_train_alone_are_evidence() -> None:
    entries = [
        (run("e2m1", 0, SCALE, underflowed_weight=[0.9] * 3), ended(2.1), True),
        (run("e2m1", 1, underflowed_weight=[0.1] * 3, saturated_weight=[0.001] * 3), ended(2.51), False),
    ]
    assert second(entries) == (
        "partly",
        "e2m1 did not train in 1 of 2 (1 ended more than 0.5 nat above fp32): no role underflows beyond 10 % or "
        "saturates beyond 0.1 %.",
    )


def test_all_ways_not_to_train_and_no_count() -> None:
    verdicts = [ended(9.0, diverged_at=5), ended(3.0, rising_since=9), ended(8.0), ended(8.0)]
    entries = [(run("e3m0", seed), verdict, False) for seed, verdict in enumerate(verdicts)]
    assert second(entries) == (
        "failed",
        "e3m0 did not train in 4 of 4 (1 diverged, at step 5; 1 ended while the loss rose; 2 ended more than 0.5 nat "
        "above fp32): underflow and saturation were not counted.",
    )


@pytest.mark.parametrize(
    ("tried", "words"),
    [
        ((Tried("power-of-two scales", (HEAD,)), Tried("head unrounded", ())), "head unrounded would likely mend it"),
        ((Tried("x", None), Tried("y", (HEAD,))), "no remedy that was tried leaves all layers within the limits"),
        ((Tried("x", (), 16.0),), "a loss scale of 2048 would likely mend it"),  # 16 times that of the run
    ],
)
def test_remedies_by_name(tried: tuple[Tried, ...], words: str) -> None:
    made = run("e4m3fn", 0, Examination((HEAD,), tried), loss_scale=128.0, underflowed_gradient=[0.5] * 3)
    _, text = second([(made, ended(9.0, diverged_at=2), False)])
    start = "e4m3fn did not train in 1 of 1 (1 diverged, at step 2): up to 50 % of gradients underflow; "
    assert text == f"{start}{words}."


def test_runs_that_trained_are_told_with_their_distance_over_pairs() -> None:
    entries = [(run("bf16", seed), ended(loss), True) for seed, loss in enumerate((2.1, 2.3))]
    half = 12.7062047 * 0.1  # Student, one degree of freedom; the differences are 0.1 and 0.3
    interval = f"95 % interval {0.2 - half:+.3f} to {0.2 + half:+.3f}"
    assert second(entries) == ("trained", f"bf16 trained in 2 of 2, 0.200 nats above fp32 (2 pairs; {interval}).")
    assert second(entries[:1])[1] == "bf16 trained in 1 of 1, 0.100 nats above fp32 (1 pair)."
    assert second([(run("bf16", 7), ended(2.1), True)])[1] == (
        "bf16 trained in 1 of 1, without a run of fp32 to compare with."
    )


def test_runs_that_trained_although_layers_misfit() -> None:
    made = run("e5m2", 1, SCALE, underflowed_gradient=[0.2, 0.3, 0.25])
    assert second([(made, ended(1.9), True)])[1] == (
        "e5m2 trained in 1 of 1, 0.100 nats below fp32 (1 pair), although up to 30 % of gradients underflow; with a "
        "loss scale of 4096 no layer is beyond the limits."
    )
