"""Choices of precision: the one-hot choice and its derivative, costs as the code of FracTrain sums them, and errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fpsim.training.dynamic_precision import (
    CostTarget,
    GatedBlock,
    choices,
    choose,
    gate_blocks,
    gate_parameters,
    mean_cost,
    mix,
    relative_costs,
)

#: The bits of activations and gradients in the code.
WIDTHS = ((3, 6), (4, 6), (4, 8), (6, 8), (6, 12))


def test_a_choice_is_exactly_one_or_zero_and_has_the_derivative_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(64, 5) / 4).requires_grad_()
    weights = torch.randn(64, 5)
    choice = choose(logits)
    rows = logits.tolist()
    assert choice.tolist() == [[float(k == row.index(max(row))) for k in range(5)] for row in rows]
    choice.backward(weights)
    p = torch.tensor([[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows])
    torch.testing.assert_close(logits.grad, p * (weights - (p * weights).sum(-1, keepdim=True)))
    assert choose(torch.zeros(1, 3)).tolist() == [[1.0, 0.0, 0.0]], "the first of equal numbers"
    assert choose(torch.tensor([[0.0, math.nan]])).isnan().all()


def test_a_mixture_has_the_numbers_that_each_sample_chose() -> None:
    choice = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    results = torch.arange(16.0).view(2, 2, 2, 2)
    got = mix(choice, list(results))
    assert torch.equal(got, torch.stack([results[1, 0], results[0, 1]]))
    got.sum().backward()
    assert choice.grad is not None
    assert choice.grad.tolist() == [[6.0, 38.0], [22.0, 54.0]], "sums of each result over the sample"
    with pytest.raises(TypeError, match="returns one tensor, got tuple"):
        mix(choice, [(results[0],), (results[1],)])  # type: ignore[list-item]


def test_costs_are_those_of_the_code() -> None:
    """Its sums: over layers and choices, for fprop, the error and the weight gradient, with layers of unequal size."""
    samples, sizes, beta, w = 6, {"a": 1.0, "b": 2.5, "c": 4.0}, 1e-3, 4
    model = nn.Sequential()
    for name in sizes:
        model.add_module(name, nn.Linear(2, 2))
    gate_blocks(model, dict.fromkeys(sizes, 2), relative_costs(WIDTHS, w))
    torch.manual_seed(1)
    masks = [nn.functional.one_hot(torch.randint(5, (samples,)), 5).float() for _ in sizes]
    for name, mask in zip(sizes, masks, strict=True):
        model.get_submodule(name).choice = mask
    total = 0.0
    for (_, size), mask in zip(sizes.items(), masks, strict=True):
        for k, (a, g) in enumerate(WIDTHS):
            chosen = float(mask[:, k].sum()) * size
            total += chosen * a / 32 * w / 32 + chosen * g / 32 * w / 32 + chosen * a * g / 32 / 32
    percent = total / samples / (sum(sizes.values()) * 3) * 100
    loss = total / (sum(sizes.values()) / 3) * beta
    torch.testing.assert_close(float(mean_cost(model, sizes)) * 100, percent, rtol=1e-6, atol=0)
    for target, sign in ((percent * 0.9, 1), (percent * 1.1, -1)):
        term = CostTarget(target / 100, beta).term(model, sizes)
        torch.testing.assert_close(float(term), sign * loss, rtol=1e-6, atol=0)
    near = CostTarget(0.03, margin=0.01)
    assert [near.sign(cost) for cost in (0.0199, 0.0201, 0.0299, 0.03, 0.0399, 0.0401)] == [-1, -0.1, -0.1, 0.1, 0.1, 1]
    equal = [sum(cost * float(mask[:, k].sum()) for k, cost in enumerate(relative_costs(WIDTHS, w))) for mask in masks]
    torch.testing.assert_close(float(mean_cost(model)), sum(equal) / samples / 3, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="block_costs names a, and the gated blocks are a, b, c"):
        mean_cost(model, {"a": 1.0})


class Lists(nn.Module):
    """A block that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def test_models_stay_models_and_what_no_gate_can_do_is_an_error() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    block.kind = "full"  # type: ignore[assignment]
    model = nn.Sequential(block, nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 1)).eval()
    before = list(model.parameters())
    gate_blocks(model, {"0": 3, "1": 3}, relative_costs(WIDTHS[:2], 4))
    gates = gate_parameters(model)
    assert {id(p) for p in model.parameters()} == {id(p) for p in (*before, *gates)} and len(gates) == 6 + 2 * 4
    assert model[0].kind == "full" and not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="'0' has chosen nothing yet"):
        choices(model)
    x = torch.randn(4, 3)
    model.train()(x)
    assert [tuple(choice.shape) for choice in choices(model).values()] == [(4, 2)] * 2
    assert int(model[0].precisions[1][1].num_batches_tracked) == 2, "once for each copy"
    for copied in (copy.deepcopy(model.eval()), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    assert model[1].gate.state is None, "nothing is left of a pass"

    def plain() -> nn.Sequential:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2)), Lists())

    costs = relative_costs(WIDTHS, 4)
    for channels, these, message in (
        ({}, costs, "one block or more among two or more, got 0 and 5"),
        ({"0": 2}, costs[:1], "got 1 and 1"),
        ({"0": 2, "0.0": 2}, costs, "block '0.0' is the model itself, or lies in another block"),
        ({"7": 2}, costs, "a block is no module of Sequential"),
    ):
        with pytest.raises(ValueError, match=message):
            gate_blocks(plain(), channels, these)
    gated = gate_blocks(plain(), {"1": 2}, costs)
    assert isinstance(gated[1], GatedBlock)  # type: ignore[index]
    with pytest.raises(ValueError, match="has gated blocks already"):
        gate_blocks(gated, {"0": 2}, costs)
    with pytest.raises(TypeError, match="returns one tensor, got tuple"):
        gated(x[:, :2])
    with pytest.raises(ValueError, match="no gated block"):
        choices(plain())
    with pytest.raises(ValueError, match="a target is positive"):
        CostTarget(0.0)
