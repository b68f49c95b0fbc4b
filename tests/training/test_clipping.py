"""Clipped updates, judged by StableAdamW written out in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fpsim
from fpsim.training.clipping import clip_updates

LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.95), 1e-8, 0.3


def gradients(step: int) -> list[np.ndarray]:
    """Of the first tensor in step 3 and later 100 times as large; the second one is steady, the third has none."""
    random = np.random.default_rng(step)
    return [random.standard_normal((3, 4)) * (100 if step >= 3 else 1), np.full(5, 0.25)]


def stable_adamw(params: list[np.ndarray], steps: int, threshold: float = 1.0) -> list[list[float]]:
    """The algorithm of the paper with debiased betas, in float64, which changes ``params``; RMS_t of each step."""
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
    seen = []
    for t in range(1, steps + 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        seen.append([])
        for i, (p, g) in enumerate(zip(params, gradients(t), strict=False)):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            rms = math.sqrt(np.mean(g * g / np.maximum(v[i], EPS**2)))
            rate = LR / max(1.0, rms / threshold)
            p -= rate * DECAY * p
            p -= rate * m[i] / (np.sqrt(v[i]) + EPS)
            seen[-1].append(rms)
    return seen


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, closure: bool = False) -> None:
    for t in steps:
        for p, g in zip(params, gradients(t), strict=False):
            p.grad = torch.tensor(g)
        optimizer.step(lambda: torch.tensor(1.0)) if closure else optimizer.step()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_clipped_adamw_is_stable_adamw(options: dict[str, bool], threshold: float) -> None:
    starts = [np.linspace(-1, 1, 12).reshape(3, 4), np.arange(5.0), np.ones(2)]
    params = [nn.Parameter(torch.tensor(x)) for x in starts]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **options)
    clipped = clip_updates(optimizer, threshold)
    for t in range(1, 6):
        run(optimizer, params, range(t, t + 1), closure=t == 2)
        expected = [x.copy() for x in starts]
        rms = stable_adamw(expected, t, threshold)[-1]
        for p, wanted in zip(params, expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12, atol=1e-14)
        assert [clipped.rms[p] for p in params[:2]] == pytest.approx(rms, rel=1e-12)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3] and optimizer.param_groups[0]["lr"] == LR
    assert params[2] not in clipped.rms


def test_a_scheduler_and_rounding_go_together_with_clipping_in_any_order() -> None:
    """The learning rate of the scheduler is divided by RMS_t, and v begins from its rounded value."""
    for rounds_first in (True, False):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = torch.optim.AdamW([p], lr=1.0, betas=(0.0, 0.5), eps=0.0, weight_decay=0.0)
        if rounds_first:
            fpsim.round_optimizer(optimizer, {"exp_avg_sq": "e4m0"})
        clipped = clip_updates(optimizer)
        if not rounds_first:
            fpsim.round_optimizer(optimizer, {"exp_avg_sq": "e4m0"})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        p.grad = torch.full((2,), 1.25, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        v = 0.78125  # 1.25^2 / 2, which e4m0 rounds to 1
        assert (p[0].item(), optimizer.state[p]["exp_avg_sq"][0].item(), clipped.rms[p]) == (-1.0, 1.0, 1.0)
        p.grad = torch.full((2,), 8.0, dtype=torch.float64)
        optimizer.step()
        v = (0.5 * 1 + 0.5 * 64) / 0.75
        rms = 8 / math.sqrt(v)
        assert clipped.rms[p] == pytest.approx(rms, rel=1e-15) and rms > 1.2
        assert p[0].item() == pytest.approx(-1.0 - 0.5 / rms * 8 / math.sqrt(v), rel=1e-15)
        clipped.remove()
        before = p[0].item()
        p.grad = torch.full((2,), 32.0, dtype=torch.float64)
        optimizer.step()
        v = (0.5 * 32 + 0.5 * 1024) / 0.875  # e4m0 has 32, a tie of 32.5
        assert p[0].item() == pytest.approx(before - 0.5 * 32 / math.sqrt(v), rel=1e-15)


def test_a_fused_step_with_a_loss_scaler_clips_by_the_gradients_before_scaling() -> None:
    params, plain = ([nn.Parameter(torch.zeros(3))] for _ in range(2))
    optimizers = [
        torch.optim.AdamW(p, lr=0.5, betas=(0.0, 0.5), eps=0.0, weight_decay=0.0, fused=True) for p in (params, plain)
    ]
    clipped = [clip_updates(o) for o in optimizers]
    for g in (1.0, 4.0):
        params[0].grad, plain[0].grad = torch.full((3,), 1024 * g), torch.full((3,), g)
        optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        for optimizer in optimizers:
            optimizer.step()
    assert clipped[0].rms[params[0]] == clipped[1].rms[plain[0]] > 1
    assert torch.equal(params[0], plain[0])


@pytest.mark.parametrize(
    ("optimizer", "options", "threshold", "message"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 1.0, "got SGD"),
        (torch.optim.AdamW, {"amsgrad": True}, 1.0, "amsgrad"),
        (torch.optim.Adam, {"weight_decay": 0.1}, 1.0, "use AdamW, or weight_decay=0"),
        (torch.optim.AdamW, {}, 0, "positive number, got 0"),
        (torch.optim.AdamW, {}, math.inf, "positive number, got inf"),
    ],
)
def test_what_cannot_be_clipped_is_an_error(
    optimizer: Any, options: dict[str, Any], threshold: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clip_updates(optimizer([nn.Parameter(torch.ones(1))], **options), threshold)


def test_updates_are_clipped_once() -> None:
    """A second wrapper would divide by the RMS again."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    first = clip_updates(optimizer)
    with pytest.raises(ValueError, match=r"clipped already: call remove\(\) of what clip_updates returned"):
        clip_updates(optimizer, 2.0)
    first.remove()
    assert clip_updates(optimizer, 2.0).threshold == 2.0


def test_a_failed_step_leaves_the_groups_as_they_were() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    groups = optimizer.param_groups
    clip_updates(optimizer)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    p.grad = torch.ones(2)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups is groups


def test_updates_are_clipped_before_a_shift_of_the_data_makes_the_loss_spike() -> None:
    """Regression whose inputs grow tenfold after 200 steps: AdamW's loss then peaks at twice that of StableAdamW."""
    peaks = []
    for clips in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.zeros(16, 1))
        optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
        clipped = clip_updates(optimizer) if clips else None
        truth, losses, rms = torch.ones(16, 1), [], []
        for step in range(230):
            x = torch.randn(64, 16, generator=generator) * (10 if step >= 200 else 1)
            noise = torch.randn(64, 1, generator=generator) * (10 if step >= 200 else 1)
            loss = (x @ w - x @ truth - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            rms.append(clipped.rms[w] if clipped else 0.0)
        peaks.append(max(losses[200:]) - losses[200])
    assert max(rms[200:208]) > 2
    assert peaks[0] >= 2 * peaks[1], peaks
