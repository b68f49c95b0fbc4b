"""Gradients of FP8-LM between two processes. (The processes import this file, and so nothing slow is imported here.)"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fpsim
from fpsim import reference
from fpsim.recipes.fp8_lm import NarrowGradients
from fpsim.training.wire import NarrowExchange
from tests.shared.ranks import error_of, results_of_two_ranks


def layer_and_gradients(rank: int) -> tuple[nn.Linear, Tensor, list[Tensor]]:
    """A layer, the batch of a rank, and the gradients of that rank alone."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))
    layer(x).square().sum().backward()
    return layer, x, [p.grad.clone() for p in layer.parameters() if p.grad is not None]


def exchange(rank: int) -> tuple[list[Tensor], list[bool], str]:
    layer, x, _ = layer_and_gradients(rank)
    layer.zero_grad()
    parallel = DistributedDataParallel(layer)
    part = fpsim.recipes.fp8_lm("O1", processes=True).gradients
    assert part is not None
    part.apply(parallel, torch.optim.AdamW(layer.parameters()))
    parallel(x).square().sum().backward()
    state = NarrowGradients("e5m2", "automatic").apply(DistributedDataParallel(nn.Linear(2, 2)), None)
    kinds = [isinstance(state, NarrowExchange), state is not None and len(list(state.parameters or ())) == 1]
    return [p.grad for p in layer.parameters()], kinds, error_of(lambda: part.apply(nn.Linear(2, 2), None))


def test_two_processes_add_gradients_of_weights_in_fp8(tmp_path: Path) -> None:
    """Each rank's gradient is rounded by s = 2^floor(log2(448 / amax)) / sqrt(2), with the amax of both."""
    results = results_of_two_ranks(exchange, tmp_path)
    (a, a_bias), (b, b_bias) = (layer_and_gradients(rank)[2] for rank in range(2))
    power = 2.0 ** (math.frexp(448 / max(a.abs().max().item(), b.abs().max().item()))[1] - 1)
    s = np.float32(power) * np.float32(1 / math.sqrt(2))

    def q(x: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda v: np.float32(float(reference.round(float(v), "e4m3fn", overflow="sat_finite"))))(x)

    wanted = q(q(a.numpy() * s) + q(b.numpy() * s)) * (np.float32(1) / s / np.float32(2))
    for (weight, bias), kinds, error in results:
        np.testing.assert_array_equal(weight.numpy(), wanted)
        assert torch.equal(bias, (a_bias + b_bias) / 2)
        assert kinds == [True, True] and "wrap the model" in error
    assert NarrowGradients().apply(nn.Linear(2, 2), None) is None  # one process
