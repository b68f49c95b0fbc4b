"""Federated learning in FP8, judged by the paper's formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpsim import reference
from fpsim.training.federated import average, round_to_grid, send, server_step


def grid_by_hand(x: float, alpha: float, m: int = 3, e: int = 4) -> tuple[float, float]:
    """The rounded number and its step, by the formulas."""
    b = 2**e - math.log2(alpha) + math.log2(2 - 2.0**-m) - 1
    clipped = max(-alpha, min(alpha, x))
    p = max(math.floor(math.log2(abs(clipped)) + b) if clipped else 1, 1)
    step = 2.0 ** (p - m - b)
    return step * round(clipped / step), step  # Python rounds ties to even


@pytest.mark.parametrize("alpha", [1.0, 0.37, 6.0])
def test_the_grid_is_that_of_the_formulas(alpha: float) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * alpha
    x = torch.cat([x, x * 2.0**-12, torch.tensor([0.0, alpha, -alpha, 100.0], dtype=torch.float64)])
    wanted = torch.tensor([grid_by_hand(v, alpha)[0] for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(round_to_grid(x, alpha), wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(round_to_grid(x.float(), alpha), wanted.float(), rtol=3e-7, atol=0)
    assert round_to_grid(torch.tensor([math.nan]), alpha).isnan().all()


def test_with_a_power_of_two_the_grid_is_a_format_without_infinity_and_nan() -> None:
    """alpha = 480 is the largest value of E4M3 with all codes, whose bias is 7: 2^4 + log2(1.875) - log2(480) - 1."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    wanted = [float(reference.round(v, "e4m3fn")) for v in x.clamp(-447, 447).tolist()]
    assert round_to_grid(x.clamp(-447, 447), 480.0).tolist() == wanted
    codes = {abs(v) for v in round_to_grid(torch.linspace(-500, 500, 200001, dtype=torch.float64), 480.0).tolist()}
    normal = {m * 2.0 ** (p - 3) for p in range(-3, 9) for m in range(8, 16)}  # 480 is 15 times 2^5
    assert {v for v in codes if v >= 0.125} == normal


def test_derivatives_are_those_of_the_formulas() -> None:
    """Against differences in alpha of the formula with its codes (rounded ratio and exponent) held."""
    x = torch.tensor([0.3, -0.71, 0.02, 5.0, -4.0], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    (round_to_grid(x, alpha) * weights).sum().backward()
    assert x.grad is not None and alpha.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]
    inside = [(grid_by_hand(v, 1.3)[0] - v) / 1.3 for v in (0.3, -0.71, 0.02)]
    wanted = inside[0] + 2 * inside[1] + 3 * inside[2] + 4 - 5
    assert alpha.grad.item() == pytest.approx(wanted, rel=1e-12)


def test_a_learned_clipping_value_finds_a_better_grid() -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([alpha], lr=0.5)
    first = float((round_to_grid(x, 0.5) - x).square().mean())
    for _ in range(200):
        optimizer.zero_grad()
        loss = (round_to_grid(x, alpha) - x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 50 and 1.5 < alpha.item() < 4


def test_messages_are_unbiased_and_on_the_grid() -> None:
    """The mean of 10,000 draws is within 4.5 standard errors, and each draw is one of two neighbours."""
    x = torch.tensor([0.3, -0.71, 0.02, 1e-4, 0.0, 1.3, 7.0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([send(x, 1.3, generator) for _ in range(10_000)]).double()
    for i, v in enumerate(x.double().clamp(-1.3, 1.3).tolist()):
        _, step = grid_by_hand(v, 1.3)
        low = step * math.floor(v / step + 1e-9)
        share = v / step - math.floor(v / step + 1e-9)
        seen = draws[:, i].unique().tolist()
        assert all(any(math.isclose(s, y, rel_tol=1e-6, abs_tol=1e-12) for y in (low, low + step)) for s in seen)
        error = step * math.sqrt(max(share * (1 - share), 0.0) / 10_000)
        assert abs(float(draws[:, i].mean()) - v) <= 4.5 * error + 1e-7


def test_the_server_averages_by_counts() -> None:
    messages = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    assert average(messages, [1, 3]).tolist() == [2.5, -1.0]
    with pytest.raises(ValueError, match="each message has a positive count"):
        average(messages, [1])


def test_the_server_step_is_descent_on_weights_and_a_search_of_the_clipping_value() -> None:
    random = np.random.default_rng(0)
    messages = [torch.tensor(random.standard_normal(50)) for _ in range(3)]
    alphas, counts = [0.8, 1.6, 2.4], [1.0, 2.0, 1.0]
    got, alpha = server_step(messages, alphas, counts, steps=3, lr=0.25, grid=9)
    w = target = (messages[0] + 2 * messages[1] + messages[2]).numpy() / 4
    start = (0.8 + 3.2 + 2.4) / 4
    for _ in range(3):
        rounded = np.array([grid_by_hand(v, start)[0] for v in w.tolist()])
        w = w - 0.25 * (np.abs(w) <= start) * (rounded - target)
    np.testing.assert_allclose(got.numpy(), w, rtol=1e-12)

    def error(a: float) -> float:
        rounded = np.array([grid_by_hand(v, a)[0] for v in w.tolist()])
        return sum(n * np.mean((rounded - m.numpy()) ** 2) for n, m in zip(counts, messages, strict=True)) / 4

    tried = np.linspace(0.8, 2.4, 9)
    assert alpha == pytest.approx(tried[np.argmin([error(a) for a in tried])])


def accuracy_error(stochastic: bool) -> float:
    """The distance to the mean of clients' targets after 60 rounds with updates below half a unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    targets = [torch.linspace(0.5, 0.9, 20) + 0.02 * k for k in range(-4, 5)]
    w = torch.full((20,), 0.4)

    def wire(x: Tensor) -> Tensor:
        return send(x, 1.0, generator) if stochastic else round_to_grid(x, 1.0)

    for _ in range(60):
        received = wire(w)
        w = average([wire(received - 0.05 * (received - target)) for target in targets], [1] * 9)
    return float((w - targets[4]).abs().mean())


def test_stochastic_links_converge_where_nearest_ones_stall() -> None:
    assert accuracy_error(stochastic=False) >= 1.5 * accuracy_error(stochastic=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 0.0}, "clipping value of a grid"), ({"alpha": 1.0, "mantissa_bits": -1}, "at least 0 mantissa")],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_to_grid(torch.ones(2), **options)
