"""Low-rank compensation against the singular values of NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fpsim.posttraining import CompensatedLinear, low_rank_factors, round_weights
from tests.shared.plain_numbers import integers


@pytest.fixture
def error() -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_factors_are_the_best_approximation_and_share_the_singular_values(error: torch.Tensor) -> None:
    singular = np.linalg.svd(error.numpy(), compute_uv=False)
    for rank in range(1, 7):
        left, right = low_rank_factors(error, rank)
        assert left.shape == (6, rank) and right.shape == (rank, 9)
        rest = np.sqrt((singular[rank:] ** 2).sum())
        np.testing.assert_allclose((error - left @ right).norm().item(), rest, atol=1e-12)
        for gram in (left.T @ left, right @ right.T):
            np.testing.assert_allclose(gram.numpy(), np.diag(singular[:rank]), atol=1e-12)


def test_factors_are_rounded_along_their_last_axis(error: torch.Tensor) -> None:
    error = error.float()
    exact, rounded = low_rank_factors(error, 3), low_rank_factors(error, 3, "int8")
    for before, after in zip(exact, rounded, strict=True):
        assert np.array_equal(after.numpy(), integers(before.numpy(), 8))


def test_the_product_is_added_to_the_weight_or_stands_beside_it() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Conv1D(4, 6)).double().eval()

    x = torch.randn(5, 8, dtype=torch.float64)
    plain, added, beside = model(), model(), model()
    round_weights(plain, "int3/row", method="nearest")
    round_weights(added, "int3/row", method="nearest", rank=2)
    round_weights(beside, "int3/row", method="nearest", rank=2, as_product=True)
    assert isinstance(beside[0], CompensatedLinear) and isinstance(beside[2], CompensatedLinear)
    assert not beside[0].training and "rank=2" in str(beside)
    assert torch.equal(beside[0].weight, plain[0].weight) and torch.equal(beside[2].weight, plain[2].weight.T)
    left, right = low_rank_factors((model()[0].weight - plain[0].weight).detach(), 2)
    assert torch.equal(added[0].weight, plain[0].weight + left @ right)
    torch.testing.assert_close(beside(x), added(x), rtol=0, atol=1e-14)
    full = model()
    round_weights(full, "int3/row", method="nearest", rank=4, skip="0")
    torch.testing.assert_close(full(x), model()(x), rtol=0, atol=1e-13)


def test_wrong_ranks_are_named(error: torch.Tensor) -> None:
    for rank in (0, 7, True):
        with pytest.raises(ValueError, match="the rank is from 1 to 6"):
            low_rank_factors(error, rank)
