"""hAdam, compensated sums, compound loss scaling and stable log-probabilities, judged by NumPy in two precisions."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fpsim.training.compensation import kahan_add, soft_update
from fpsim.training.compound_scaling import CompoundScaling, scale_compound
from fpsim.training.hypot_adam import HypotAdam
from fpsim.training.log_probability import (
    bounded_deviation,
    normal_log_probability,
    squashed_normal_log_probability,
    tanh_log_derivative,
)

F = np.float32


def half(x: Any) -> np.ndarray:
    """Numbers rounded to float16, as float32."""
    with np.errstate(over="ignore"):
        return np.float32(np.float16(np.float32(x)))


def gradients(step: int, scale: float = 1.0) -> np.ndarray:
    return half(np.random.default_rng(step).standard_normal(9) * np.logspace(-6, 1, 9) * scale)


def hypot_adam_in_half(p: np.ndarray, steps: int, *, kahan: bool, lr: float = 0.01, eps: float = 1e-4) -> np.ndarray:
    """The code of low-precision-rl with every result in float16; a sum with a coefficient is one result."""
    b1, b2 = 0.9, 0.99
    m, w, c, p = np.zeros(9, F), np.zeros(9, F), np.zeros(9, F), half(p)
    for t in range(1, steps + 1):
        g = gradients(t)
        m = half(half(F(b1) * m) + F(1 - b1) * g)
        new, old = half(F(1 - b1) * np.abs(g)), half(F(math.sqrt(b2)) * w)
        big, small = np.maximum(new, old), np.minimum(new, old)
        ratio = half(small / half(big + F(eps)))
        w = half(big * half(np.sqrt(half(1 + half(ratio * ratio)))))
        denominator = half(half(w / F(math.sqrt(1 - b2**t))) + F(eps))
        rate = F(lr * (1 - b1) / (math.sqrt(1 - b2) * (1 - b1**t)))
        if kahan:
            u = half(half(-rate * m) / denominator)
            y = half(u - c)
            new_p = half(p + y)
            c, p = half(half(new_p - p) - y), new_p
        else:
            p = half(p - rate * (m / denominator))
    return p


@pytest.mark.parametrize("kahan", [False, True])
def test_each_result_of_hypot_adam_is_a_float16(kahan: bool) -> None:
    """Float16 parameters, and float32 parameters with the arithmetic of float16, have the bits of NumPy."""
    start = half(np.linspace(-2, 2, 9))
    results = []
    for dtype, arithmetic in ((torch.float16, None), (torch.float32, "fp16")):
        p = nn.Parameter(torch.tensor(start, dtype=dtype))
        optimizer = HypotAdam([p], lr=0.01, betas=(0.9, 0.99), kahan=kahan, arithmetic=arithmetic)
        for t in range(1, 7):
            p.grad = torch.tensor(gradients(t), dtype=dtype)
            optimizer.step()
        assert {state.dtype for name, state in optimizer.state[p].items() if name != "step"} == {dtype}
        results.append(p.detach().float().numpy())
    np.testing.assert_array_equal(results[0], hypot_adam_in_half(start, 6, kahan=kahan))
    np.testing.assert_array_equal(results[0], results[1])


def test_hypot_adam_is_adam_in_float64() -> None:
    """Without eps; and w is (1 - beta1) / sqrt(1 - beta2) times the root of Adam's second moment."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64)) for _ in range(2))
    ours = HypotAdam([p], lr=0.01, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    adam = torch.optim.Adam([q], lr=0.01, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    for t in range(1, 8):
        p.grad, q.grad = (torch.tensor(gradients(t)).double() for _ in range(2))
        ours.step()
        adam.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=1e-15)
    w = 0.1 / math.sqrt(0.01) * adam.state[q]["exp_avg_sq"].sqrt()
    torch.testing.assert_close(ours.state[p]["hypot"], w, rtol=1e-13, atol=0)


def test_adam_in_float16_fails_where_hypot_adam_does_not() -> None:
    """Gradients of 1e-6: their square is 0 in float16, and so is an eps of 1e-8."""
    p, q = (nn.Parameter(torch.ones(4, dtype=torch.float16)) for _ in range(2))
    naive = torch.optim.Adam([p], lr=1e-3, eps=1e-8, foreach=False)
    ours = HypotAdam([q], lr=1e-3, betas=(0.9, 0.999), eps=1e-4)
    scaling = scale_compound(ours)
    for _ in range(20):
        p.grad = torch.full((4,), 1e-6, dtype=torch.float16)
        q.grad = scaling.scale(torch.full((4,), 1e-6, dtype=torch.float16))
        naive.step()
        ours.step()
    assert not p.isfinite().all()
    torch.testing.assert_close(q.detach().float(), torch.full((4,), 1 - 20 * 1e-3), rtol=1e-2, atol=0)


# -- compensation ------------------------------------------------------------------------------------------------------


def test_a_compensated_target_follows_where_a_float16_target_stalls() -> None:
    """The naive target stops where an update is half a unit in the last place."""
    theta = torch.tensor([1.0, -0.3, 0.05], dtype=torch.float16)
    start = torch.tensor([0.9, -0.2, 0.04], dtype=torch.float16)
    tau, naive, exact = 0.005, start.clone(), start.double()
    scaled, lost, target = start * 1e4, torch.zeros(3, dtype=torch.float16), start
    reference = [half(start.float().numpy() * F(1e4)), np.zeros(3, F)]
    for _ in range(2000):
        naive = (tau * theta + (1 - tau) * naive).half()
        exact = exact + tau * (theta.double() - exact)
        target, scaled, lost = soft_update(scaled, lost, theta, tau=tau)
        t, c = reference
        u = half(F(tau) * half(half(F(1e4) * theta.float().numpy()) - t))
        y = half(u - c)
        new = half(t + y)
        reference = [new, half(half(new - t) - y)]
    np.testing.assert_array_equal(scaled.float().numpy(), reference[0])
    np.testing.assert_array_equal(target.float().numpy(), half(reference[0] / F(1e4)))
    error, stalled = (float((x.double() - theta.double()).abs().max()) for x in (target, naive))
    assert error <= 2 * float((exact - theta.double()).abs().max()) + 2.0**-11
    assert stalled > 10 * error


def test_kahan_sums_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    t, c = np.ones(5, F), np.zeros(5, F)
    total, lost = torch.ones(5), torch.zeros(5)
    for _ in range(50):
        u = half(random.standard_normal(5) * 1e-3)
        y = half(u - c)
        new = half(t + y)
        c, t = half(half(new - t) - y), new
        total, lost = kahan_add(total, lost, torch.tensor(u), "fp16")
    np.testing.assert_array_equal(total.numpy(), t)
    np.testing.assert_array_equal(lost.numpy(), c)


# -- compound scaling --------------------------------------------------------------------------------------------------


def scaled_optimizer(**options: Any) -> tuple[nn.Parameter, HypotAdam, CompoundScaling]:
    p = nn.Parameter(torch.ones(2))
    optimizer = HypotAdam([p], lr=0.0, betas=(0.9, 0.999), eps=1e-4, arithmetic="fp16")
    return p, optimizer, scale_compound(optimizer, **options)


def test_an_overflow_halves_scale_states_and_eps_and_skips_the_step() -> None:
    p, optimizer, scaling = scaled_optimizer(scale=1024.0)
    p.grad = torch.full((2,), 512.0)
    optimizer.step()
    state = optimizer.state[p]
    m, w = half(F(0.1) * F(512)), half(F(0.1) * F(512))
    assert (state["exp_avg"][0].item(), state["hypot"][0].item(), scaling.good_steps) == (m, w, 1)
    limit = 65520 / (1.1 * 0.9 / math.sqrt(0.999))  # float16 overflows at 65520, so gradients at 66147 do
    for gradient, fits in ((limit * 0.999, True), (limit * 1.001, False)):
        before = state["step"]
        p.grad = torch.full((2,), gradient)
        m, w = state["exp_avg"].clone(), state["hypot"].clone()
        optimizer.step()
        assert (state["step"] == before + 1) is fits
    assert torch.equal(state["exp_avg"], m / 2) and torch.equal(state["hypot"], w / 2)
    assert (scaling.factor, scaling.good_steps, optimizer.param_groups[0]["eps"]) == (512.0, 0, 5e-5)
    for _ in range(12):
        optimizer.step()
    assert optimizer.param_groups[0]["eps"] == 1e-7 and scaling.factor == 512.0 / 2**12


def test_the_scale_doubles_after_good_steps_unless_a_state_overflows() -> None:
    p, optimizer, scaling = scaled_optimizer(scale=8.0, growth_interval=3)
    for step in range(8):
        p.grad = torch.full((2,), 4.0)
        optimizer.step()
        assert scaling.factor == (8.0 if step < 3 else 16.0 if step < 7 else 32.0)
    eps = optimizer.param_groups[0]["eps"]
    assert eps == 4e-4
    optimizer.state[p]["hypot"].fill_(30000.0)  # times 2.2 overflows
    for _ in range(4):
        optimizer.step()
    assert (scaling.factor, scaling.good_steps, optimizer.param_groups[0]["eps"]) == (32.0, 0, eps)


def test_a_second_moment_follows_the_square_of_the_scale() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], betas=(0.5, 0.5))
    scaling = scale_compound(optimizer, scale=4.0)
    p.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    p.grad = torch.full((1,), math.inf, dtype=torch.float64)
    optimizer.step()
    assert [optimizer.state[p][name].item() for name in ("exp_avg", "exp_avg_sq")] == [0.25, 0.125]
    assert scaling.factor == 2.0


def test_a_resumed_run_has_the_scale_and_the_bits_of_one_that_was_not_interrupted() -> None:
    def start() -> tuple[nn.Parameter, HypotAdam, CompoundScaling]:
        p = nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = HypotAdam([p], lr=0.01, betas=(0.9, 0.99), kahan=True, arithmetic="fp16")
        return p, optimizer, scale_compound(optimizer, scale=64.0, growth_interval=2)

    def run(p: nn.Parameter, optimizer: HypotAdam, scaling: CompoundScaling, steps: range) -> None:
        for t in steps:
            p.grad = torch.tensor(gradients(t, 1e6 if t == 3 else 1.0)) * scaling.factor
            optimizer.step()

    p, optimizer, scaling = start()
    run(p, optimizer, scaling, range(1, 5))
    saved = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    run(p, optimizer, scaling, range(5, 9))
    q, other, resumed = start()
    with torch.no_grad():
        q.copy_(saved[1])
    other.load_state_dict(saved[0])
    run(q, other, resumed, range(5, 9))
    assert torch.equal(p, q) and (scaling.factor, scaling.good_steps) == (resumed.factor, resumed.good_steps)
    assert saved[0]["param_groups"][0]["loss_scale"] == 32.0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (torch.optim.SGD, {}, "knows HypotAdam, Adam and AdamW, got SGD"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), {}, "amsgrad"),
        (HypotAdam, {"scale": 0.0}, "scale of compound scaling is a positive number, got 0.0"),
        (HypotAdam, {"growth_interval": 0}, "growth_interval"),
    ],
)
def test_what_compound_scaling_does_not_know_is_an_error(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_compound(make([nn.Parameter(torch.ones(1))]), **options)


def test_a_loss_is_scaled_once_and_without_closures() -> None:
    p, optimizer, _ = scaled_optimizer()
    with pytest.raises(ValueError, match="scaled already"):
        scale_compound(optimizer)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: p.sum())


def test_options_of_hypot_adam_out_of_range_are_errors() -> None:
    p = [nn.Parameter(torch.ones(1))]
    for options, message in (
        ({"eps": -1.0}, "eps of HypotAdam"),
        ({"betas": (0.9, 1.0)}, "betas of HypotAdam"),
        ({"arithmetic": "fp16/stochastic"}, "use a deterministic rounding"),
    ):
        with pytest.raises(ValueError, match=message):
            HypotAdam(p, **options)  # type: ignore[arg-type]


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_torch_distributions_in_float64() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    mean, deviation = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, deviation)
    torch.testing.assert_close(normal_log_probability(x, mean, deviation), normal.log_prob(x), rtol=1e-13, atol=1e-13)
    exact = torch.log1p(-(torch.tanh(x) ** 2))
    torch.testing.assert_close(tanh_log_derivative(x, 20.0), exact, rtol=1e-9, atol=1e-12)
    squashed = squashed_normal_log_probability(x, mean, deviation, 20.0)
    torch.testing.assert_close(squashed, normal.log_prob(x) - exact, rtol=1e-9, atol=1e-12)


def test_float16_does_not_overflow_or_underflow() -> None:
    """Above the threshold softplus is its argument, so exp(10) is the largest exponential; sigma is not squared."""
    x = torch.tensor([-12.0, -6.0, 0.0, 6.0], dtype=torch.float16)
    exact = 2 * (math.log(2) - x.double() - torch.log1p(torch.exp(-2 * x.double())))
    torch.testing.assert_close(tanh_log_derivative(x).double(), exact, rtol=2e-3, atol=2e-3)
    assert math.exp(10.0) < 65504 < math.exp(12.0)  # at x = -6 an exponential of 12 would overflow
    sigma = bounded_deviation(torch.tensor(-20.0, dtype=torch.float16))
    assert sigma.item() == float(np.float16(math.exp(-5)))
    got = normal_log_probability(3 * sigma, torch.zeros_like(sigma), sigma)
    assert got.item() == pytest.approx(-4.5 + 5 - 0.5 * math.log(2 * math.pi), abs=4e-3)
    assert sigma**2 < 2.0**-14  # a subnormal number, with fewer bits
    assert bounded_deviation(torch.tensor([-20.0, 0.0, 20.0]).double()).log().tolist() == pytest.approx([-5, -1.5, 2])
