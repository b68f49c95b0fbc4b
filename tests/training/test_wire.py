"""Sums of gradients in a narrow format, judged by the exact reference one element at a time."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpsim import reference
from fpsim.training.wire import AutomaticFactor, NarrowExchange, mean_in_format, narrow_exchange_hook
from tests.shared.ranks import error_of, results_of_two_ranks


def floor2(x: float) -> float:
    return 2.0 ** (math.frexp(x)[1] - 1)


def q(x: np.float32 | Fraction | float) -> np.float32:
    return np.float32(float(reference.round(float(x), "e4m3fn", overflow="sat_finite")))


def mean_by_hand(ranks: list[list[float]], factor: float, own_scales: bool = False) -> list[float]:
    """FP8-LM's mean, with float32 steps as MS-AMP has them."""
    powers = [floor2(448 / max(abs(x) for x in rank)) for rank in ranks]
    power = min(powers)
    s = np.float32(power) * np.float32(factor)
    means = []
    for elements in zip(*ranks, strict=True):
        terms = [np.float32(x) for x in elements]
        if own_scales:
            terms = [q(x * np.float32(p)) / np.float32(p) for x, p in zip(terms, powers, strict=True)]
        total = q(terms[0] * s)
        for x in terms[1:]:
            total = q(total + q(x * s))
        means.append(float(total * (np.float32(1) / s / np.float32(len(ranks)))))
    return means


def gradients(ranks: int, size: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(ranks)
    sizes = 1e-3 * 4.0 ** torch.arange(ranks)
    return [torch.randn(size, generator=generator) * each for each in sizes]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("own_scales", [False, True])
def test_every_partial_sum_is_rounded(ranks: int, own_scales: bool) -> None:
    given = gradients(ranks)
    got = mean_in_format(given, own_scales=own_scales).mean
    assert got.tolist() == mean_by_hand([g.tolist() for g in given], 1 / math.sqrt(ranks), own_scales)
    got = mean_in_format([g.reshape(5, 8) for g in given], factor=0.75, own_scales=own_scales).mean
    assert got.flatten().tolist() == mean_by_hand([g.tolist() for g in given], 0.75, own_scales)


def test_the_root_of_the_number_of_ranks_leaves_room_for_the_sum() -> None:
    """16 ranks of noise and a signal: without the factor 1/4 the sum saturates, and the mean has 10 dB more noise."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(8192, generator=generator)
    ranks = [0.25 * signal + torch.randn(8192, generator=generator) for _ in range(16)]
    exact = torch.stack(ranks).double().mean(0)

    def decibels(factor: float | None) -> float:
        error = mean_in_format(ranks, factor=factor).mean.double() - exact
        return float(10 * torch.log10(exact.square().mean() / error.square().mean()))

    assert decibels(None) > 20 and decibels(1.0) < 12
    assert (mean_in_format(ranks).saturated, mean_in_format(ranks, factor=1.0).saturated > 1000) == (0, True)


def test_mu_halves_where_sums_saturate_and_doubles_in_a_thousand_steps() -> None:
    factor = AutomaticFactor()
    assert factor.after(1e-5).mu > 1 and factor.after(1.1e-5).mu == 0.5  # 0.001 % is the threshold
    for _ in range(1000):
        factor = factor.after(0.0)
    assert factor.mu == pytest.approx(2.0, rel=1e-12) and factor.after(1.0).mu == factor.mu / 2
    with pytest.raises(ValueError, match="mu is positive"):
        AutomaticFactor(mu=0.0)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    given = [g.bfloat16() for g in gradients(3)]
    wanted = torch.tensor(mean_by_hand([g.tolist() for g in given], 1 / math.sqrt(3))).bfloat16()
    assert torch.equal(mean_in_format(given).mean, wanted)


def test_zeros_and_numbers_that_are_not_finite() -> None:
    zero = torch.zeros(3)
    assert mean_in_format([zero, zero]).mean.tolist() == [0.0] * 3
    inf = torch.tensor([math.inf, 1.0, math.nan])
    assert mean_in_format([zero, inf], factor=1.0).mean[1:].isnan().tolist() == [False, True]
    assert mean_in_format([zero, inf], "e5m2/ovf_inf", factor=1.0).mean[0] == math.inf


@pytest.mark.parametrize(
    ("ranks", "format", "factor", "message"),
    [
        ([], "e4m3fn", None, "one shape and dtype, got 0 of none"),
        ([torch.ones(2), torch.ones(3)], "e4m3fn", None, "one shape and dtype, got 2"),
        ([torch.ones(2)], "e4m3fn/tensor", None, "without a scale of its own"),
        ([torch.ones(2)], "int8", None, "without a scale of its own"),
        ([torch.ones(2)], "e4m3fn/stochastic", None, "use a deterministic rounding"),
        ([torch.ones(2)], "e4m3fn", 0.0, "positive number, got 0.0"),
    ],
)
def test_what_cannot_be_summed_is_an_error(ranks: list[Tensor], format: str, factor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_in_format(ranks, format, factor=factor)


# -- two processes -----------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def backward(module: nn.Module, rank: int, step: int) -> list[Tensor]:
    """The gradients of a batch of this rank; a third step has large ones."""
    module.zero_grad()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    module(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def exchange_in_two_steps(rank: int) -> tuple[list[list[Tensor]], list[float], str]:
    parallel = DistributedDataParallel(model())
    matrices = [p for p in parallel.parameters() if p.dim() == 2]
    exchange = NarrowExchange("e4m3fn", AutomaticFactor(mu=1.0, growth_steps=1), parameters=matrices)
    parallel.register_comm_hook(exchange, narrow_exchange_hook)
    steps, factors = [], []
    for step in range(3):
        factors.append(exchange.factor.mu)  # type: ignore[union-attr]
        steps.append(backward(parallel, rank, step))
    assert exchange.elements == 45
    other = NarrowExchange("e4m3fn", AutomaticFactor())
    other.load_state_dict(exchange.state_dict())
    assert other.factor.mu == exchange.factor.mu  # type: ignore[union-attr]
    return steps, factors, error_of(lambda: NarrowExchange("e4m3fn").load_state_dict(exchange.state_dict()))


def test_two_processes_exchange_matrices_in_fp8_and_vectors_in_float32(tmp_path: Path) -> None:
    results = results_of_two_ranks(exchange_in_two_steps, tmp_path)
    module, mu = model(), 1.0
    for step in range(3):
        ranks = [backward(module, rank, step) for rank in range(2)]
        count = saturated = 0
        for i, (a, b) in enumerate(zip(*ranks, strict=True)):
            wanted = (a + b) / 2
            if a.dim() == 2:
                flat = [x.flatten().tolist() for x in (a, b)]
                wanted = torch.tensor(mean_by_hand(flat, mu)).view_as(a)
                s = floor2(448 / max(abs(x) for x in [*flat[0], *flat[1]])) * mu
                saturated += int((wanted.abs() == np.float32(448) / np.float32(s) / 2).sum())
                count += a.numel()
            for got, factors, _ in results:
                assert torch.equal(got[step][i], wanted)
                assert factors[step] == mu
        mu = mu / 2 if saturated / count > 1e-5 else mu * 2
    assert len(set(results[0][1])) > 1
    assert "has the state [], and was given ['mu']" in results[0][2]
