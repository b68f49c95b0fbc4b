"""Numbers, casts and comparisons for tests of whole models.

The numbers are small dyadic rationals, and so are the rounded ones: every sum of products is exact, and the order of
additions cannot change a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim


def case(*values: Any, in_every_run: bool) -> Any:
    """A case of `pytest.mark.parametrize`: one of every run, or one of the slow tests."""
    return pytest.param(*values, marks=() if in_every_run else pytest.mark.exhaustive)


#: The backends for tests whose promise is about the rewritten graph. Inductor's code for it is left to the slow tests.
BACKENDS_OF_A_GRAPH = ("fpsim_eager", case("fpsim", in_every_run=False))

#: Shapes (m, n, k) of small products. Inductor treats an axis of one element in a way of its own, so that every run has
#: all shapes of axes with one element and with eight. Shapes of two and another number are slow tests.
SMALL_SHAPES = [
    case(*shape, in_every_run=2 not in shape or shape == (2, 2, 2)) for shape in itertools.product([1, 2, 8], repeat=3)
]


def dyadic(*shape: int, seed: int, top: int = 16, unit: float = 0.125) -> Tensor:
    """Random multiples of ``unit``, in float32, from ``-top`` to ``top`` units.

    These have more bits than the formats of the tests, so that rounding matters, and few enough for exact sums.
    """
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)) * unit


def dyadic_(model: nn.Module, top: int = 16) -> nn.Module:
    """Give a model dyadic parameters."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(dyadic(*parameter.shape, seed=seed, top=top))
    return model


class Casts:
    """The casts that a policy applies to the operands of a product, spelled out with `fpsim.round`."""

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self.policy = fpsim.Policy.from_options(options)

    def __call__(self, x: Tensor, kind: str, role: str) -> Tensor:
        cast = self.policy.cast(kind, role)
        if cast is None:
            return x
        return fpsim.round(x, cast.format, rounding=cast.rounding, overflow=cast.overflow, scale=cast.scale)


def assert_equal(got: Tensor, want: Tensor, name: str) -> None:
    """Fails unless two tensors have the same dtype, shape and values."""
    assert got.dtype == want.dtype and got.shape == want.shape, name
    assert torch.equal(got, want), f"{name}: {(got != want).sum()} of {got.numel()} differ\n{got}\n{want}"


def assert_all_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Fails unless two sets of named tensors are equal."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_equal(got[name], value, name)
