"""Layers on grids with learned clipping values: what they compute, what they learn, and what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fpsim.training.federated import round_to_grid, send
from fpsim.training.learned_clipping import clipping_values, learn_clipping, messages


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def test_a_prepared_model_computes_with_rounded_weights_and_inputs() -> None:
    plain, x = model(), torch.randn(5, 4, dtype=torch.float64)
    prepared = learn_clipping(copy.deepcopy(plain))
    first, _, last = plain
    a = round_to_grid(x, float(x.abs().max()))
    h = torch.relu(a @ round_to_grid(first.weight, float(first.weight.detach().abs().max())).T + first.bias)
    b = round_to_grid(h, float(h.detach().abs().max()))
    wanted = b @ round_to_grid(last.weight, float(last.weight.detach().abs().max())).T + last.bias
    torch.testing.assert_close(prepared(x), wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(prepared(1e6 * x), prepared(1e9 * x))  # the first batch has set the clipping values
    values = clipping_values(prepared)
    assert sorted(values) == [
        f"{i}.{name}.alpha" for i in (0, 2) for name in ("input_grid", "parametrizations.weight.0")
    ]
    assert set(values) <= set(dict(prepared.named_parameters()))
    weight = dict(prepared.named_parameters())["0.parametrizations.weight.original"]
    assert torch.equal(weight, first.weight)


def test_gradients_reach_the_master_weights_and_the_clipping_values() -> None:
    """d loss / d alpha of a weight is the sum of d loss / d weight times (q - w) / alpha, where it is not clipped."""
    prepared = learn_clipping(nn.Linear(3, 2).double(), activations=False)
    (alpha,) = clipping_values(prepared).values()
    with torch.no_grad():
        alpha.mul_(0.7)
    w, a = prepared.parametrizations["weight"].original, alpha.item()
    x = torch.randn(4, 3, dtype=torch.float64)
    prepared(x).square().sum().backward()
    q = round_to_grid(w.detach(), a)
    d = 2 * (x @ q.T + prepared.bias.detach()).T @ x
    inside = w.detach().abs() <= a
    torch.testing.assert_close(w.grad, d * inside, rtol=1e-12, atol=1e-12)
    slope = torch.where(inside, (q - w.detach()) / a, w.detach().sign())
    assert alpha.grad is not None and w.grad is not None
    torch.testing.assert_close(alpha.grad, (d * slope).sum(), rtol=1e-12, atol=1e-12)


def test_a_resumed_model_has_the_bits_of_one_that_was_not_interrupted() -> None:
    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            (module(x) - x[:, :2]).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in module.parameters()]

    prepared = learn_clipping(model())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
    train(prepared, optimizer, range(3))
    saved = copy.deepcopy((prepared.state_dict(), optimizer.state_dict()))
    wanted = train(prepared, optimizer, range(3, 6))
    other = learn_clipping(model())
    resumed = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert all(torch.equal(a, b) for a, b in zip(wanted, train(other, resumed, range(3, 6)), strict=True))


def test_messages_are_the_master_weights_with_their_clipping_values() -> None:
    prepared = learn_clipping(model())
    found = messages(prepared)
    assert list(found) == ["0.weight", "2.weight"]
    weight, alpha = found["2.weight"]
    assert torch.equal(weight, model()[2].weight) and alpha == float(weight.abs().max())
    received = send(weight, alpha, torch.Generator().manual_seed(0))
    torch.testing.assert_close(round_to_grid(received, alpha), received, rtol=1e-14, atol=0)


def test_what_cannot_be_prepared_is_an_error() -> None:
    prepared = learn_clipping(model())
    with pytest.raises(ValueError, match="has learned clipping values already"):
        learn_clipping(prepared)
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        learn_clipping(nn.ReLU())
