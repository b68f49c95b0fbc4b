"""Loss scaling, step by step against `torch.amp.GradScaler`, and against sequences written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim.training.loss_scaling import DynamicScale, LossScaling, ScaleState, StaticScale, scale_loss


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def gradients(module: nn.Module, factor: float, step: int, overflow: bool) -> None:
    """Give the parameters the gradients of a loss times ``factor``."""
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.dtype)
        if overflow:
            p.grad.view(-1)[0] = [torch.inf, -torch.inf, torch.nan][step % 3]


def bits(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize(
    "rule",
    [
        DynamicScale(initial=1000.0, interval=3),
        DynamicScale(initial=3.0, growth=1.7, backoff=0.3, interval=1),
        DynamicScale(initial=2.0**126, interval=2),  # infinity is not taken
    ],
)
def test_every_step_is_that_of_torch(rule: DynamicScale) -> None:
    ours, theirs = model(), model()
    optimizer, other = optimizer_of(ours), optimizer_of(theirs)
    scaling = scale_loss(optimizer, rule)
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=rule.initial,
        growth_factor=rule.growth,
        backoff_factor=rule.backoff,
        growth_interval=rule.interval,
    )
    overflows = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.2
    for step in range(40):
        assert scaling.scale(torch.ones(())) == scaler.scale(torch.ones(()))
        small = min(scaling.factor, 1e30)
        gradients(ours, small, step, bool(overflows[step]))
        gradients(theirs, small, step, bool(overflows[step]))
        if step % 2:
            scaling.unscale()
            scaler.unscale_(other)
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad) or a.grad.isnan().any()
        optimizer.step()
        scaler.step(other)
        scaler.update()
        state = scaler.state_dict()
        assert (scaling.factor, scaling.state.good_steps) == (state["scale"], state["_growth_tracker"])
        assert all(map(torch.equal, bits(ours), bits(theirs)))
    assert overflows.any()


def test_factors_written_by_hand() -> None:
    """Megatron-LM's rule: the second overflow shrinks the factor, and so do all later ones, until it has grown."""
    rule = DynamicScale(initial=16.0, interval=3, least=2.0, hysteresis=2)
    overflows = [1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1]
    factors = [16, 8, 4, 4, 2, 2, 2, 2, 4, 4, 4, 2]
    state, got = rule.start(), []
    for overflow in overflows:
        state = rule.after(state, bool(overflow))
        got.append(state.factor)
    assert got == factors
    assert StaticScale(8.0).after(StaticScale(8.0).start(), True) == ScaleState(8.0)


def test_a_static_factor_skips_the_steps_that_overflow() -> None:
    module = model(torch.float16)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scaling = scale_loss(optimizer, StaticScale(512.0))
    before = bits(module)
    scaling.scale(module(torch.full((1, 3), 200.0).half()).sum() * 8).backward()  # 200 * 8 * 512 > 65504
    optimizer.step()
    assert all(map(torch.equal, bits(module), before))
    optimizer.zero_grad()
    scaling.scale(module(torch.full((1, 3), 2.0**-20).half()).sum()).backward()  # 2**-20 * 512 / 512
    optimizer.step()
    assert torch.equal(module.weight.grad, torch.full((2, 3), 2.0**-20).half())
    assert scaling.state == ScaleState(512.0)


def test_a_run_that_resumes_is_the_run_without_interruption() -> None:
    rule = DynamicScale(initial=64.0, interval=2, hysteresis=2)

    def run(module: nn.Module, scaling: LossScaling, steps: range) -> None:
        for step in steps:
            gradients(module, scaling.factor, step, step in (2, 3))
            scaling.optimizer.step()

    whole = model()
    scaling = scale_loss(optimizer_of(whole), rule)
    run(whole, scaling, range(3))
    kept = copy.deepcopy((whole.state_dict(), scaling.optimizer.state_dict()))
    run(whole, scaling, range(3, 8))

    resumed = model()
    second = scale_loss(optimizer_of(resumed), rule)
    resumed.load_state_dict(kept[0])
    second.optimizer.load_state_dict(kept[1])
    run(resumed, second, range(3, 8))
    assert second.state == scaling.state == ScaleState(256.0, 0, 2)
    assert all(map(torch.equal, bits(resumed), bits(whole)))


def test_a_skipped_step_rounds_nothing_and_sparse_gradients_are_unscaled() -> None:
    module = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    rounded = fpsim.round_optimizer(optimizer, weights="bf16")
    scaling = scale_loss(optimizer, DynamicScale(initial=4.0))
    before = bits(module)
    scaling.scale(module(torch.tensor([1, 1])).sum() * torch.inf).backward()
    optimizer.step()
    assert (rounded.steps, scaling.factor) == (0, 2.0)
    assert torch.equal(module.weight, before[0])
    optimizer.zero_grad()
    scaling.scale(module(torch.tensor([1, 1])).sum()).backward()
    optimizer.step()
    want = before[0].clone()
    want[1] -= 2
    assert torch.equal(module.weight, want.bfloat16().float())
    assert rounded.steps == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 0.0}, "initial of a loss scale is a positive number, got 0.0"),
        ({"growth": 1.0}, "growth is above 1"),
        ({"backoff": 1.0}, "backoff is between 0 and 1"),
        ({"interval": 0}, "counts from 1 on, got interval=0"),
        ({"least": -1.0}, "least is between 0 and initial=65536.0, got -1.0"),
    ],
)
def test_bad_numbers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicScale(**fields)


def test_wrong_use_is_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    scaling = scale_loss(optimizer)
    with pytest.raises(ValueError, match="the loss of this Adam is scaled already"):
        scale_loss(optimizer)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: None)
    gradients(module, 1.0, 0, False)
    assert scaling.unscale()
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaling.unscale()
