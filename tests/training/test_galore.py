"""GaLore, judged by its source's steps written out in NumPy."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fpsim
from fpsim.training.galore import GaLore

LR, BETAS, EPS, DECAY, RANK, GAP, SCALE = 0.05, (0.9, 0.99), 1e-8, 0.1, 2, 2, 0.25
SHAPES = [(6, 4), (3, 7), (5,)]


def gradient(shape: tuple[int, ...], step: int) -> np.ndarray:
    return np.random.default_rng(10 * step + len(shape) + shape[0]).standard_normal(shape)


def projected_adam(p: np.ndarray, steps: int, rank: int | None, signs: list[np.ndarray]) -> np.ndarray:
    """The new parameter after ``steps`` steps, in float64.

    ``signs``: the projections of each step, from which singular vectors take their signs, since moments outlive them.
    """
    is_tall = p.ndim == 2 and p.shape[0] >= p.shape[1]
    m = v = basis = None
    for t in range(1, steps + 1):
        g = r = gradient(p.shape, t)
        if rank is not None:
            if (t - 1) % GAP == 0:
                u, _, vh = np.linalg.svd(g, full_matrices=False)
                basis = vh[:rank].T if is_tall else u[:, :rank]
                like = signs[t - 1].T if is_tall else signs[t - 1]
                basis = basis * np.sign((basis * like).sum(0))
            r = g @ basis if is_tall else basis.T @ g
        m = BETAS[0] * (0 if m is None else m) + (1 - BETAS[0]) * r
        v = BETAS[1] * (0 if v is None else v) + (1 - BETAS[1]) * r * r
        d = -LR * (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        if rank is not None:
            d = SCALE * (d @ basis.T if is_tall else basis @ d)
        p = p + d
        p = p - LR * DECAY * p  # after the update, of the new parameter
    return p


def make(params: list[nn.Parameter], **options: Any) -> GaLore:
    groups = [{"params": params[:2], "rank": RANK, "update_gap": GAP, "scale": SCALE}, {"params": params[2:]}]
    return GaLore(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **options)


def run(optimizer: GaLore, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for p in params:
            p.grad = torch.tensor(gradient(tuple(p.shape), t), dtype=p.dtype)
        optimizer.step()


def test_steps_are_those_of_the_source() -> None:
    starts = [np.linspace(-1, 1, math.prod(shape)).reshape(shape) for shape in SHAPES]
    params = [nn.Parameter(torch.tensor(x)) for x in starts]
    optimizer = make(params)
    seen: list[list[np.ndarray]] = [[], [], []]
    for t in range(1, 6):
        run(optimizer, params, range(t, t + 1))
        for p, start, rank, signs in zip(params, starts, (RANK, RANK, None), seen, strict=True):
            signs.append(optimizer.state[p].get("projection", torch.ones(())).numpy().copy())
            wanted = projected_adam(start, t, rank, signs)
            np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-10, atol=1e-12)
    assert [tuple(optimizer.state[p]["exp_avg"].shape) for p in params] == [(6, 2), (2, 7), (5,)]
    assert [tuple(optimizer.state[p]["projection"].shape) for p in params[:2]] == [(2, 4), (3, 2)]


def test_full_rank_is_adamw_but_for_the_decay() -> None:
    """The moments are those in the basis of singular vectors, which for a diagonal gradient are the axes."""
    p, q = (nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2))
    galore = GaLore([p], lr=0.1, weight_decay=0.0, rank=3, scale=1.0, update_gap=100)
    adamw = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for t in range(4):
        p.grad = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) * (t + 1)
        q.grad = p.grad.clone()
        galore.step()
        adamw.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


def dynamic_map(signed: bool) -> np.ndarray:
    """bitsandbytes' map: in decade i midpoints of a linear split of [0.1, 1], times 10^(i - 6); 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        magnitudes = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*magnitudes, *(-magnitudes if signed else ())]
    return np.sort(np.float32(values))


@pytest.mark.parametrize("signed", [True, False])
def test_moments_of_8_bits_are_those_of_bitsandbytes(signed: bool) -> None:
    """The nearest value of the map times the largest magnitude, in groups of 256 of the flattened projected moment."""
    p = nn.Parameter(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = GaLore([p], lr=0.1, rank=16)
    small = nn.Parameter(torch.ones(64, 63))
    optimizer.add_param_group({"params": [small], "rank": None})
    fpsim.round_optimizer(optimizer, {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8:unsigned"}, least_size=4096)
    g = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    p.grad, small.grad = g, g[:64, :63].contiguous()
    optimizer.step()
    name, factor = ("exp_avg", np.float32(1 - 0.9)) if signed else ("exp_avg_sq", np.float32(1 - 0.999))
    r = (g @ optimizer.state[p]["projection"].T).numpy()
    exact = (r if signed else r * r) * factor
    values = dynamic_map(signed)
    kept = optimizer.state[p][name].flatten().numpy()
    for start in range(0, exact.size, 256):
        group = exact.flatten()[start : start + 256]
        top = np.abs(group).max()
        x = group / top
        distance = np.abs(kept[start : start + 256] / top - x)
        nearest = np.abs(values[None] - x[:, None]).min(1)
        np.testing.assert_allclose(distance, nearest, atol=3e-7)
    assert len(values) == 256 and values.min() >= (-0.993 if signed else 0)
    g = small.grad.numpy()
    np.testing.assert_allclose(optimizer.state[small][name].numpy(), (g if signed else g * g) * factor, rtol=1e-6)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted() -> None:
    def start() -> tuple[list[nn.Parameter], GaLore]:
        params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = make(params)
        fpsim.round_optimizer(optimizer, {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8:unsigned"})
        return params, optimizer

    params, optimizer = start()
    run(optimizer, params, range(1, 4))  # between two refreshes
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    run(optimizer, params, range(4, 7))
    others, resumed = start()
    with torch.no_grad():
        for p, value in zip(others, saved[1], strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved[0])
    run(resumed, others, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {"rank": 2}, r"projects matrices, got shape \(3,\)"),
        ((3, 3), {"rank": 0}, "rank of a projection is at least 1, got 0"),
        ((3, 3), {"rank": 2, "update_gap": 0}, "update_gap of GaLore is a number of steps, at least 1"),
        ((3, 3), {"lr": -1.0}, "lr of GaLore is at least 0, got -1.0"),
        ((3, 3), {"betas": (0.9, 1.0)}, "betas of GaLore"),
    ],
)
def test_options_out_of_range_are_errors(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLore([nn.Parameter(torch.ones(shape))], **options)
