"""Outlier channels of activations in blocks of their own, which have more bits than the other blocks.

Source: COMET's fine-grained mixed-precision quantization, Liu et al. (arXiv 2410.12168), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.posttraining.layers import check_reached, linear_layers, replace_module, watch_inputs


class SplitLinear(nn.Module):
    """A linear layer whose input channels are in another order, as two layers: the first channels, and the others.

    Its output is that of the layer, but for the order of sums. The parts are modules, so that a policy gives
    ``*.outliers`` and ``*.others`` different formats, in blocks along their channels.

    Args:
        weight: of shape (outputs, inputs).
        bias: of shape (outputs,), or None.
        order: the order of the inputs, int64 of shape (inputs,): the outliers first.
        count: how many inputs the part ``outliers`` has, 1 or more and fewer than all.
    """

    order: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, order: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.count = count
        self.outliers = _linear(weight[:, order[:count]], None)
        self.others = _linear(weight[:, order[count:]], bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output of shape (..., outputs) for ``x`` of shape (..., inputs)."""
        x = x[..., self.order]
        output: Tensor = self.outliers(x[..., : self.count]) + self.others(x[..., self.count :])
        return output


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@torch.no_grad()
def split_outlier_channels(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ratio: float = 6.0,
    block: int = 128,
    most: float = 0.2,
    skip: Iterable[str] | str = (),
) -> dict[str, int]:
    """Gather the outlier channels of the inputs of each linear layer in blocks of their own, a `SplitLinear`.

    The channels are sorted by their largest magnitude in the batches. Those above ``ratio`` times the median are
    outliers. Their number is rounded up to whole blocks, of at most ``most`` of all channels. Layers without outliers
    stay as they are.

    Args:
        model: an uncompiled module, which changes in place.
        batches: mappings (keyword arguments), tuples and lists (positional arguments), or single arguments.
        ratio: how far above the median an outlier is.
        block: the number of channels in a block.
        most: the largest share of channels that become outliers, more than 0 and less than 1. One block is allowed in
            any case, in a layer that has others.
        skip: globs of the paths of layers to leave out.

    Returns:
        For the path of each layer that was split the number of channels in its part ``outliers``.

    Raises:
        ValueError: no layer has outliers, an argument is out of range, a layer is not reached, or the errors of
            `fpsim.posttraining.linear_layers`.
    """
    if not (ratio >= 1 and 0 < most < 1) or isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(
            f"ratio is 1 or more, most is between 0 and 1, and block is a number of channels, got {ratio!r}, {most!r} "
            f"and {block!r}"
        )
    layers = linear_layers(model, skip)
    largest: dict[str, Tensor] = {}

    def see(path: str, x: Tensor) -> None:
        amax = x.abs().reshape(-1, x.shape[-1]).amax(0).double()
        largest[path] = torch.maximum(largest[path], amax) if path in largest else amax

    count = watch_inputs(model, {path: layer.module for path, layer in layers.items()}, batches, see)
    check_reached(layers.keys() - largest.keys(), count)
    split = {}
    for path, layer in layers.items():
        order = torch.sort(largest[path], descending=True, stable=True).indices
        outliers = int((largest[path] > ratio * largest[path].median()).sum())
        channels = len(order)
        blocks = min(-(-outliers // block), max(1, int(most * channels) // block))
        if not outliers or blocks * block >= channels:
            continue
        split[path] = blocks * block
        replace_module(model, layer.module, SplitLinear(layer.matrix, layer.bias, order, split[path]))
    if not split:
        raise ValueError(
            f"no linear layer has a block of outliers, channels above {ratio} times the median, beside others: use a "
            "policy with one format for all, or a smaller ratio or block"
        )
    return split
