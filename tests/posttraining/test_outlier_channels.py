"""Linear layers split into outlier channels and others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fpsim.posttraining import SplitLinear, split_outlier_channels
from tests.shared.plain_numbers import blocks

OUTLIERS = [13, 2, 7]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 8, bias=False)).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = [torch.rand(5, 16, generator=generator) + 0.5 for _ in range(2)]
    for position, channel in enumerate(OUTLIERS):
        x[position % 2][2, channel] = -40.0 + position
    return x


def test_outliers_fill_blocks_of_their_own_and_the_output_stays(model: nn.Module) -> None:
    x = batches()[0]
    before, weight = model(x), model[0].weight.clone()
    assert split_outlier_channels(model, batches(), block=4, ratio=10) == {"0": 4}
    layer = model[0]
    assert isinstance(layer, SplitLinear) and isinstance(model[1], nn.Linear)
    order = layer.order.tolist()
    assert order[:3] == OUTLIERS and sorted(order) == list(range(16))
    assert torch.equal(layer.outliers.weight, weight[:, order[:4]]) and layer.outliers.bias is None
    torch.testing.assert_close(model(x), before)


def test_a_policy_gives_the_parts_their_formats(model: nn.Module) -> None:
    split_outlier_channels(model, batches(), block=4, ratio=10)
    layer, x = model[0], batches()[1]
    options = {
        "fprop": {"activation": "int4/block:4", "weight": "int4/block:4"},
        "modules": {"*outliers": {"fprop": {"activation": "int8/block:4", "weight": "int4/block:4"}}},
    }
    got = torch.compile(layer, backend="fpsim_eager", options=options)(x)
    outliers, others = layer.outliers.weight.detach().numpy(), layer.others.weight.detach().numpy()
    sorted_x = x.numpy()[:, layer.order.numpy()]
    want = blocks(sorted_x[:, :4], 4, 8) @ blocks(outliers, 4, 4).T
    want = want + blocks(sorted_x[:, 4:], 4, 4) @ blocks(others, 4, 4).T + layer.others.bias.detach().numpy()
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-6, atol=1e-5)


def test_the_share_of_outliers_is_bounded(model: nn.Module) -> None:
    assert split_outlier_channels(model, batches(), block=2, ratio=10, most=0.2, skip="1") == {"0": 2}


def test_a_model_without_outliers_is_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"above 1000 times the median"):
        split_outlier_channels(model, batches(), block=4, ratio=1000)
    with pytest.raises(ValueError, match="block is a number of channels"):
        split_outlier_channels(model, batches(), block=0)
    with pytest.raises(ValueError, match="no batch"):
        split_outlier_channels(model, [])
