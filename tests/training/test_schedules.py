"""Schedules: the policy of every step, the trigger of PFQ against a replay, and models that run under them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim.compile_backend import backend as backends
from fpsim.policy import Policy
from fpsim.training.schedules import Cyclic, Linear, Piecewise, Progressive, Scheduled, ScheduleState


def test_a_piecewise_schedule_changes_at_its_steps() -> None:
    base = Policy(activation="e4m3fn", weight="e4m3fn", skip="head")
    schedule = Piecewise(((0, {"weight": "e5m2"}), (3, "bf16"), (5, {"fprop": {"activation": "e3m4"}, "skip": []})))
    got = [schedule.policy(ScheduleState(step), base) for step in range(7)]
    first = Policy(activation="e4m3fn", weight="e5m2", skip="head")
    last = Policy(activation="e4m3fn", weight="e4m3fn", fprop={"activation": "e3m4"})
    assert got == [first] * 3 + [Policy(format="bf16")] * 2 + [last] * 2
    presets = Piecewise(((0, {"policy": "nvfp4"}), (1, "paper:e8m3"), (2, {})))
    assert [presets.policy(ScheduleState(step), base) for step in range(3)] == [
        Policy.preset("nvfp4"),
        Policy.preset("paper:e8m3"),
        base,
    ]


def test_widths_are_those_of_the_formulas() -> None:
    linear = Linear({"format": "int{bits}/row"}, low=8, high=3, steps=10)
    assert [linear.bits(step) for step in range(12)] == [
        8,
        8,
        7,
        6,
        6,
        6,
        5,
        4,
        4,
        4,
        3,
        3,
    ]  # ties to even: 7.5, 6.5 ...
    assert linear.policy(ScheduleState(2)) == Policy(format="int7/row")
    cyclic = Cyclic({"activation": "int{bits}/row"}, low=3, high=8, steps=5)
    by_hand = [3 + 2.5 * (1 - math.cos(math.pi * k / 5)) for k in range(5)]
    assert [round(width, 2) for width in by_hand] == [3.0, 3.48, 4.73, 6.27, 7.52]
    assert [cyclic.bits(step) for step in range(12)] == [3, 3, 5, 6, 8] * 2 + [3, 3]


def replay(losses: list[float], interval: int, threshold: float, decay: float) -> list[int]:
    """The switches of the FracTrain code, by its own structure: a list of 5 losses and of 4 differences."""
    kept: list[float] = []
    switches, scale_sum, scale = 0, 0.0, 1.0
    stages = []
    for number in range(1, len(losses) + 1):
        stages.append(switches)
        if number % interval:
            continue
        epoch, mean = number // interval, sum(losses[number - interval : number]) / interval
        if epoch <= 10:
            scale_sum += mean
            scale = scale_sum / epoch
        if switches == 3:
            continue
        if len(kept) == 5:
            kept.pop(0)
        kept.append(mean)
        if len(kept) == 5 and max(abs(kept[i] - kept[4]) / scale for i in range(4)) <= threshold:
            switches += 1
            if switches <= 2:
                threshold *= decay
            kept = []
    return stages


@pytest.mark.parametrize(("threshold", "decay"), [(0.15, 0.4), (0.05, 0.3), (1.0, 0.9)])
def test_the_trigger_is_that_of_fractrain(threshold: float, decay: float) -> None:
    stages = ("e2m1fn", "e2m2", "e4m3fn", "bf16")
    schedule = Progressive(stages, threshold, decay, interval=4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(600, generator=generator).double()
    losses = [3 * math.exp(-step / 60) + 0.4 + 0.05 * float(noise[step]) for step in range(600)]
    state, got = schedule.start(), []
    for loss in losses:
        got.append(state.stage)
        state = schedule.after(ScheduleState(**json.loads(json.dumps(dataclasses.asdict(state)))), loss)
    assert got == replay(losses, 4, threshold, decay)
    assert got[-1] == 3
    assert schedule.policy(state) == Policy(format="bf16")


def test_a_switch_written_by_hand() -> None:
    """Means 10, 4, 4, 4, 4, 4 with a scale of 10, 7, 6, 5.5, 5.2, 5: the sixth interval is the first of 5 alike."""
    schedule = Progressive(("e2m1fn", "e4m3fn"), threshold=0.01, interval=2)
    state, stages = schedule.start(), []
    for loss in (9.0, 11.0, 5.0, 3.0, 4.0, 4.0, 3.0, 5.0, 4.0, 4.0, 4.0, 4.0, 1.0):
        state = schedule.after(state, loss)
        stages.append(state.stage)
    assert stages == [0] * 11 + [1, 1]
    assert state == ScheduleState(13, 1, 1.0, (), (10.0, 4.0, 4.0, 4.0, 4.0, 4.0))
    assert schedule.after(schedule.start(), math.nan).stage == 0


# -- models ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def batch(step: int) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, steps: range, step_of_model: Any = None) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(batch(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step_of_model is not None:
            step_of_model(loss)
    return losses


def test_every_step_has_the_bits_of_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step under a schedule is the step of a model compiled with that policy. Each policy is compiled once."""
    compiled = []
    original = backends.compile_with_rounding
    monkeypatch.setattr(
        backends,
        "compile_with_rounding",
        lambda gm, ex, policy, **k: compiled.append(policy) or original(gm, ex, policy, **k),
    )
    schedule = Cyclic({"activation": "int{bits}/row", "weight": "int{bits}/row"}, low=2, high=4, steps=4)
    net = Net()
    scheduled = schedule.apply(net, Policy(gradient="e5m2"), "fpsim_eager")
    other = Net()
    for step in range(10):
        policy = Policy(
            gradient="e5m2", activation=f"int{(2, 2, 3, 4)[step % 4]}/row", weight=f"int{(2, 2, 3, 4)[step % 4]}/row"
        )
        assert scheduled.policy == policy
        single = torch.compile(other, backend="fpsim_eager", options={"policy": policy})
        assert train(scheduled, range(step, step + 1), scheduled.step) == train(single, range(step, step + 1))
        assert all(map(torch.equal, net.parameters(), other.parameters()))
    ours = compiled[: len(compiled)]
    assert len(set(ours)) == 3
    before = len(compiled)
    train(scheduled, range(10, 20), scheduled.step)
    assert len(compiled) == before, "no policy is compiled again"


def test_a_run_that_resumes_is_the_run_without_interruption() -> None:
    schedule = Progressive(("int2/row", "int4/row", "bf16"), threshold=0.2, interval=2, keep=3)
    whole = schedule.apply(Net(), None, "fpsim_eager")
    train(whole, range(9), whole.step)
    kept = copy.deepcopy((whole.state_dict(), dataclasses.asdict(whole.state)))
    losses = train(whole, range(9, 30), whole.step)
    assert whole.state.stage == 2

    resumed = schedule.apply(Net(), None, "fpsim_eager")
    resumed.load_state_dict(kept[0])
    resumed.state = ScheduleState(**kept[1])
    assert train(resumed, range(9, 30), resumed.step) == losses
    assert resumed.state == whole.state


def test_a_scheduled_model_is_its_model_in_all_else() -> None:
    net = Net()
    net.config = {"layers": 2}
    scheduled = Piecewise(((0, "bf16"), (1, "fp16"))).apply(net, backend="fpsim_eager")
    assert isinstance(scheduled, Scheduled)
    assert set(scheduled.parameters()) == set(net.parameters())
    assert (scheduled.config, scheduled.first) == (net.config, net.first)
    scheduled.eval()
    assert not net.training
    assert fpsim.scale_state(scheduled.compiled) is not None
    scheduled.step()
    assert scheduled.policy == Policy(format="fp16")
    with pytest.raises(AttributeError, match="nothing"):
        scheduled.nothing()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Piecewise(((1, "bf16"),)), r"stages begin at step 0 and at rising steps, got \[1\]"),
        (lambda: Piecewise(((0, "bf16"), (0, "fp16"))), r"got \[0, 0\]"),
        (lambda: Piecewise(((0, "e99m1"),)), "e99m1"),
        (lambda: Piecewise(((0, {"wieght": "bf16"}),)), "unknown option 'wieght'"),
        (lambda: Linear({"format": "int4"}, 2, 4, 10), "no field depends on the step"),
        (lambda: Linear({"format": "int{bits}"}, 0, 4, 10), "counts from 1 on, got low=0"),
        (lambda: Cyclic({"format": "int{bits}"}, 2, 99, 10), "2 to 16 bits, got 99"),
        (lambda: Progressive(()), "one stage or more"),
        (lambda: Progressive(("bf16",), threshold=0.0), "positive, got 0.0"),
        (lambda: Progressive(("bf16",)).after(ScheduleState()), r"follows the loss: call step\(loss\)"),
    ],
)
def test_bad_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
