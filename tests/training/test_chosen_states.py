"""Rounding of chosen states and weights, scaled master copies, and states kept as roots, by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim import reference
from fpsim.training.in_place import draw_of_step

SHAPES = [(4, 6), (5,), (3, 3)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_only_chosen_parameters_and_large_states_are_rounded(fused: bool) -> None:
    """Weights of the first parameter, states of the first and the second with at least 9 elements: so those of it."""
    params, plain = parameters(), parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=fused)
    twin = torch.optim.AdamW(plain, lr=0.1, fused=fused)
    rounded = fpsim.round_optimizer(
        optimizer, "e5m2", weights="bf16", master="fp32", weights_of=params[:1], state_of=params[:2], least_size=9
    )
    assert [len(x or ()) for x in (rounded.state_of, rounded.weights_of)] == [2, 1]
    master = plain[0].detach().clone()
    with torch.no_grad():
        for step in range(3):
            run(optimizer, params, range(step, step + 1))
            plain[0].copy_(master)
            run(twin, plain, range(step, step + 1))
            master = plain[0].detach().clone()
            plain[0].copy_(fpsim.round(master, "bf16"))
            for name in ("exp_avg", "exp_avg_sq"):
                twin.state[plain[0]][name].copy_(fpsim.round(twin.state[plain[0]][name], "e5m2"))
            for p, q in zip(params, plain, strict=True):
                assert torch.equal(p, q)
                assert all(torch.equal(optimizer.state[p][n], twin.state[q][n]) for n in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(rounded.masters[params[0]], master) and len(rounded.masters) == 1


def test_a_fused_step_takes_chosen_parameters_only() -> None:
    """Large tensors go through the compiled step. Those that are not chosen keep the bits of torch's kernel."""
    tensors = [torch.randn(1 << 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    params, plain = ([nn.Parameter(x.clone()) for x in tensors] for _ in range(2))
    optimizer, twin = (torch.optim.AdamW(p, lr=0.1, fused=True) for p in (params, plain))
    fpsim.round_optimizer(optimizer, "e5m2/stochastic", seed=3, state_of=params[1:], compiled=True)
    for step in range(2):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(50 + step))
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        s = draw_of_step(3, step + 1)
        for j, q in enumerate(plain):
            for i, name in enumerate(("exp_avg", "exp_avg_sq")):
                if j:  # a parameter has four casts: two states, the master copy and the weights
                    x = twin.state[q][name]
                    x.copy_(fpsim.round(x, "e5m2", rounding="stochastic", seed=s + 4 * j + i))
                assert torch.equal(optimizer.state[params[j]][name], twin.state[q][name])


def test_a_resumed_run_of_chosen_weights_has_the_bits_of_one_that_was_not_interrupted() -> None:
    def start() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = parameters()
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        fpsim.round_optimizer(optimizer, "e4m3fn/power_of_two", weights="e4m3fn/power_of_two",
                              master="fp16/power_of_two", weights_of=[params[2], params[0]])  # fmt: skip
        return params, optimizer

    params, optimizer = start()
    run(optimizer, params, range(3))
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in params]))
    assert ["fpsim_master" in saved[0]["state"][j] for j in range(3)] == [True, False, True]
    run(optimizer, params, range(3, 6))
    resumed, other = start()
    with torch.no_grad():
        for p, q in zip(resumed, saved[1], strict=True):
            p.copy_(q)
    other.load_state_dict(saved[0])
    run(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))

    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    fpsim.round_optimizer(optimizer, weights="e4m3fn", master="fp32", weights_of=params[:2])
    with pytest.raises(ValueError, match="and weights_of too"):
        optimizer.load_state_dict(saved[0])


def floor2(x: float) -> float:
    return 2.0 ** (math.frexp(x)[1] - 1)


def scaled(x: np.ndarray, format: str, largest: float) -> np.ndarray:
    """Numbers rounded with the scale 2^floor(log2(largest / amax)), in exact arithmetic."""
    s = floor2(largest / np.abs(x).max()) if np.abs(x).max() else 1.0
    return np.array([float(reference.round(v * s, format)) / s for v in x.tolist()])


def test_fp8_lm_by_hand() -> None:
    """O3 of MS-AMP: m in E4M3 and v in FP16, weights in E4M3 over master copies in FP16, each with a tensor scale."""
    lr, (beta1, beta2), eps, decay = 2.0**-6, (0.5, 0.75), 2.0**-20, 2.0**-4
    start = np.linspace(-0.03, 0.02, 11)
    p = nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    fpsim.round_optimizer(
        optimizer, {"exp_avg": "e4m3fn/power_of_two", "exp_avg_sq": "fp16/power_of_two"},
        weights="e4m3fn/power_of_two", master="fp16/power_of_two",
    )  # fmt: skip
    master, m, v = scaled(start, "fp16", 65504.0), np.zeros(11), np.zeros(11)
    for t in range(1, 5):
        np.testing.assert_array_equal(p.detach().numpy(), scaled(master, "e4m3fn", 448.0))
        g = 1e-4 * np.cos(np.arange(11.0) * t)
        p.grad = torch.tensor(g)
        optimizer.step()
        m, v = m + (1 - beta1) * (g - m), v * beta2 + (1 - beta2) * g * g  # the step sees these, before rounding
        denominator = np.sqrt(v) / math.sqrt(1 - beta2**t) + eps
        master = scaled(master * (1 - lr * decay) - lr / (1 - beta1**t) * (m / denominator), "fp16", 65504.0)
        m, v = scaled(m, "e4m3fn", 448.0), scaled(v, "fp16", 65504.0)
        np.testing.assert_array_equal(optimizer.state[p]["exp_avg"].numpy(), m)
        np.testing.assert_array_equal(optimizer.state[p]["exp_avg_sq"].numpy(), v)


def test_a_state_kept_as_its_root_by_hand() -> None:
    """q(sqrt(v))^2 in float16: 1e-12 is a normal number squared, and below 2^-25 / 2 roots vanish."""
    x = torch.tensor([4.0, 2.0, 1e-12, 2.0**-48, 2.0**-51, 0.0, 1e5], dtype=torch.float64)
    wanted = [float(reference.round(math.sqrt(v), "fp16")) ** 2 for v in x.tolist()]
    assert wanted[3:6] == [2.0**-48, 0.0, 0.0]
    got = fpsim.round(x, "fp16/sqrt")
    assert got.tolist() == wanted
    assert torch.equal(fpsim.round(got, "fp16/sqrt"), got)
    assert fpsim.round(x[:2].float(), "e4m3fn/power_of_two/sqrt").tolist() == [
        (float(reference.round(v * 128, "e4m3fn")) / 128) ** 2 for v in (2.0, float(np.sqrt(np.float32(2))))
    ]
    assert fpsim.round(torch.tensor([-1.0]), "fp16/sqrt").isnan().all()
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([p], alpha=0.5)
    fpsim.round_optimizer(optimizer, "fp16/sqrt")
    p.grad = torch.tensor([1e-5, 1.0, 3e-4])
    optimizer.step()
    v = np.float32(0.5) * p.grad.numpy() ** 2
    roots = [float(reference.round(float(root), "fp16")) for root in np.sqrt(v)]
    assert optimizer.state[p]["square_avg"].tolist() == [root**2 for root in roots]
    assert fpsim.round(torch.tensor(v), "fp16")[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_of": [torch.ones(2)]}, r"state_of holds \(2,\), which is no parameter of the optimizer"),
        ({"weights_of": []}, "weights_of chooses among the parameters whose weights is rounded"),
        ({"weights": "e4m3fn/tensor", "master": "fp16/power_of_two"}, "give both the scale power_of_two"),
        ({"weights": "bf16/power_of_two", "master": "fp16/power_of_two"}, "cannot hold weights e8m7"),
        ({"weights": "e4m3fn", "master": "fp16/power_of_two"}, "cannot hold weights"),
        ({"weights": "e4m3fn/power_of_two", "master": "fp16/tensor"}, "cannot hold weights"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(change: dict[str, Any], message: str) -> None:
    params = parameters()
    change = {"state": "bf16", **change}
    with pytest.raises(ValueError, match=message):
        fpsim.round_optimizer(torch.optim.AdamW(params), **change)


# -- COAT --------------------------------------------------------------------------------------------------------------


def coat(x: np.ndarray, expands: bool) -> np.ndarray:
    """E4M3 in groups of 128, in float64, with COAT's formulas: c = sqrt(M m), z = (|x|/c)^k, d = (M/c)^k / 448."""
    out = []
    for group in x.reshape(-1, 128):
        top, least = np.abs(group).max(), np.abs(group)[group != 0].min()
        k = math.floor(16 * math.log2(448**2 / 2) / math.log2(top / least)) / 16 if expands else 1.0
        c = math.sqrt(top) * math.sqrt(least)
        z, d = np.sign(group) * (np.abs(group) / c) ** k, (top / c) ** k / 448
        q = np.array([float(reference.round(v, "e4m3fn")) for v in (z / d).tolist()]) * d
        out.append(np.sign(q) * np.abs(q) ** (1 / k) * c)
    return np.concatenate(out)


def test_range_expansion_lowers_the_error_of_both_moments_as_coat_says() -> None:
    random = np.random.default_rng(0)
    m, v = random.standard_normal(4096), np.exp(0.35 * random.standard_normal(4096)) * 1e-8
    rounded: dict[bool, list[np.ndarray]] = {}
    for expands in (False, True):
        cast = "e4m3fn/group:128" + "/expand" * expands
        rounded[expands] = [fpsim.round(torch.tensor(x), cast).numpy() for x in (m, v)]
        for got, x in zip(rounded[expands], (m, v), strict=True):
            np.testing.assert_allclose(got, coat(x, expands), rtol=1e-12 if expands else 2e-7)  # float32 scales

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x * x)))

    plain, expanded = ([rms(got - x) for got, x in zip(rounded[e], (m, v), strict=True)] for e in (False, True))
    assert plain[0] / expanded[0] > 1.5 and plain[1] / expanded[1] > 4  # the notes have 1.8 and 6
    updates = [rms(r[0] / np.sqrt(r[1]) - m / np.sqrt(v)) ** 2 for r in (rounded[False], rounded[True])]
    assert updates[0] / updates[1] > 1.5  # the notes have 3.8


def test_zeros_among_second_moments_spoil_the_kernel_and_not_the_cast() -> None:
    """5 % of exact zeros, as rows of embeddings have: a zero in front makes the kernel's k as small as 0.19."""
    random = np.random.default_rng(1)
    v = np.exp(0.35 * random.standard_normal((32, 128))) * 1e-8
    v[random.random(v.shape) < 0.05] = 0
    v[:, 0] = 0
    x = torch.tensor(v.ravel())
    intended, kernel = (fpsim.round(x, f"e4m3fn/group:128/expand{mode}") for mode in ("", ":kernel"))
    plain = fpsim.round(x, "e4m3fn/group:128")

    def error(got: Tensor) -> float:
        return float((got - x).square().mean().sqrt())

    assert error(plain) / error(intended) > 1.5 and error(kernel) / error(plain) > 1.5
    assert not fpsim.round(torch.full((128,), 0.1), "e4m3fn/group:128/expand").isnan().any()


def test_adamw_with_coats_states_resumes_with_the_same_bits() -> None:
    def start() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(torch.linspace(-1, 1, 300))
        optimizer = torch.optim.AdamW([p], lr=0.01)
        fpsim.round_optimizer(optimizer, "e4m3fn/group:128/expand")
        return p, optimizer

    p, optimizer = start()
    run(optimizer, [p], range(2))
    saved = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    run(optimizer, [p], range(2, 4))
    q, other = start()
    with torch.no_grad():
        q.copy_(saved[1])
    other.load_state_dict(saved[0])
    run(other, [q], range(2, 4))
    # A second rounding of the loaded states would take another power.
    assert torch.equal(p, q)
