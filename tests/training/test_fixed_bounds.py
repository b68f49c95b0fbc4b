"""Inputs below bounds that are fixed in training, by the formulas of AQT written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fpsim
from fpsim import recipes
from fpsim.training.fixed_bounds import FixedBounds, Integers, fix_bounds

F = np.float32
RATE = 0.1


def batch(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers with many zeros; the channel 0 holds nothing else in the first batch."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(F)
    x[np.random.default_rng(seed + 100).random(shape) < 0.3] = 0
    if seed == 0:
        x[:, 0] = 0
    return x


def averages(batches: list[np.ndarray], axes: tuple[int, ...]) -> np.ndarray:
    """The bounds: averages from 0 on, of batches that have a number other than zero."""
    high = low = np.zeros(np.delete(batches[0].shape, axes), dtype=F)
    for x in batches:
        top, bottom = np.where(x == 0, -np.inf, x).max(axes), np.where(x == 0, np.inf, x).min(axes)
        seen = np.isfinite(top)
        high = np.where(seen, high + F(RATE) * (np.where(seen, top, 0).astype(F) - high), high)
        low = np.where(seen, low + F(RATE) * (np.where(seen, bottom, 0).astype(F) - low), low)
    return np.maximum(np.abs(high), np.abs(low))


def integers(x: np.ndarray, bound: np.ndarray, bits: int, positive: bool) -> np.ndarray:
    levels = 2**bits if positive else 2 ** (bits - 1) - 1
    scale = F(levels) / (bound + F(2.0**-23))
    if positive:
        return np.floor(x * scale).clip(0, 2**bits - 1) / scale
    return np.floor((x * scale).clip(-levels, levels) + F(0.5)) / scale


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 4, 4), 1), ((16, 5), -1)])
def test_bounds_are_averages_that_one_step_fixes(shape: tuple[int, ...], axis: int, positive: bool) -> None:
    axes = tuple(each for each in range(len(shape)) if each != axis % len(shape))
    module = FixedBounds(
        Integers(4, positive), shape[axis], axis - len(shape) if axis > 0 else axis, start=2, rate=RATE,
        like=torch.ones(1),
    )  # fmt: skip
    batches = [batch(seed, shape) for seed in range(4)]
    for x in batches[:2]:
        assert torch.equal(module(torch.tensor(x)), torch.tensor(x))
    bound = averages(batches[:3], axes).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    for x in batches[2:]:  # the later batch changes no bound
        np.testing.assert_array_equal(module(torch.tensor(x)).numpy(), integers(x, bound, 4, positive))
    module.eval()
    np.testing.assert_array_equal(module(torch.tensor(batches[0])).numpy(), integers(batches[0], bound, 4, positive))
    assert int(module.steps) == 4 and "bits=4" in repr(module)


def test_derivatives_stop_where_a_number_is_limited() -> None:
    module = FixedBounds(Integers(2, True), None, -1, start=0, rate=1.0, like=torch.ones(1))
    module(torch.tensor([4.0]))
    x = torch.tensor([0.0, 0.9, 2.5, 3.5, 4.0, 9.0, -0.5], requires_grad=True)
    y = module.eval()(x)
    assert [round(v, 3) for v in y.tolist()] == [0.0, 0.0, 2.0, 3.0, 3.0, 3.0, 0.0]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    signed = FixedBounds(Integers(3, False), None, -1, start=0, rate=1.0, like=torch.ones(1))
    signed(torch.tensor([3.0]))
    x = torch.tensor([0.5, -0.5, 1.5, -1.5, 4.0], requires_grad=True)
    y = signed.eval()(x)
    y.sum().backward()
    assert y.tolist() == [1.0, 0.0, 2.0, -1.0, 3.0]  # halves go up
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_products_of_aqt_with_fixed_bounds() -> None:
    """The middle layer multiplies integers below its bounds and 4-bit weights; the ends have 8 bits with a sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    biases = [model[i].bias.detach() for i in (0, 2, 4)]
    model = nn.ModuleDict({"body": model[:4], "head": model[4]})
    model.forward = lambda x: model["head"](model["body"](x))  # type: ignore[method-assign, assignment]
    compiled, _ = recipes.aqt(start=1).apply(model, backend="fpsim_eager")
    xs = [torch.tensor(batch(seed, (16, 6))) for seed in (1, 2)]
    bits = (8, 4, 8)

    def forward(x: torch.Tensor, seen: list[list[np.ndarray]] | None) -> torch.Tensor:
        """By hand; ``seen`` holds the inputs of each layer in both steps, once they are known."""
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            inputs[i].append(x.numpy())
            if len(inputs[i]) == 2:
                bound = averages(inputs[i], (0,))
                x = torch.tensor(integers(x.numpy(), bound, bits[i], i == 1))
            x = x @ fpsim.round(w, f"int{bits[i]}/channel:encode").T + b
            x = x.relu() if i < 2 else x
        return x

    inputs: list[list[np.ndarray]] = [[], [], []]
    for x in xs:
        torch.testing.assert_close(compiled(x), forward(x, inputs), rtol=1e-5, atol=1e-6)


def test_wrong_layers_and_numbers_are_errors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    four = Integers(4, True)
    fix_bounds(model, {"0": four})
    for integers_, options, message in (
        ({"0": four}, {}, "'0' has bounds already: prepare the model once"),
        ({"1": four}, {}, "'1' is a ReLU: bounds belong to linear layers"),
        ({}, {"rate": 0.0}, "rate is between 0 and 1, got start=7500, rate=0.0"),
        ({}, {"start": -1}, "start is a step from 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            fix_bounds(model, integers_, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 bits or more, got 1"):
        fix_bounds(nn.Sequential(nn.Linear(2, 2)), {"0": Integers(1, True)})
