"""Layers whose inputs are integers below bounds that are fixed in the course of training (AQT).

Source: Abdolrashidi et al., Pareto-Optimal Quantized ResNet Is Mostly 4-bit (arXiv 2105.03536), and the code,
google/aqt 9d1667e, ``aqt/jax_legacy/jax``: ``stats.py``, ``get_bounds.py``, ``quantization.py``, ``primitives.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.training.layers import is_linear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: The name under which a layer holds the bounds of its input.
_INPUT = "input_bounds"
#: What is added to a bound, so that it is not zero: the distance of 1 and the next float32.
_EPSILON = 2.0**-23


@dataclass(frozen=True)
class Integers:
    """The integers that an input becomes.

    Attributes:
        bits: their width.
        positive: True for inputs without a sign: q = floor(x 2^bits / bound), limited to 0 ... 2^bits - 1. False:
            q = floor(x (2^(bits-1) - 1) / bound + 1/2), where x is limited to the bound in magnitude first.
    """

    bits: int
    positive: bool

    @property
    def levels(self) -> int:
        """What the bound becomes."""
        return 2**self.bits if self.positive else 2 ** (self.bits - 1) - 1


class FixedBounds(nn.Module):
    """An input rounded to integers below bounds, once these are fixed; before, the input itself.

    Each call in training is a step. With the largest and the least number of a batch but for zeros, and r = ``rate``::

        high = high + r (max - high),    low = low + r (min - low)          both 0 at first
        bound = max(abs(high), abs(low))                                    set in step ``start``, counted from 0

    A channel whose numbers are all zero keeps its averages. The result is q / s with s = levels / (bound + 2^-23) and
    the integer q of `Integers`. The derivative is 1 where q was not limited, and 0 elsewhere.

    Args:
        integers: the integers.
        channels: the number of channels, each with its own bound, or None for one bound.
        axis: the axis of the channels.
        start, rate: as above.
        like: a tensor whose dtype (float32 for narrower ones) and device the bounds have.
    """

    high: Tensor
    low: Tensor
    bound: Tensor
    steps: Tensor

    def __init__(
        self, integers: Integers, channels: int | None, axis: int, *, start: int, rate: float, like: Tensor
    ) -> None:
        super().__init__()
        self.integers, self.channels, self.axis, self.start, self.rate = integers, channels, axis, start, rate
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name in ("high", "low", "bound"):
            self.register_buffer(name, torch.zeros(channels or 1, dtype=dtype, device=like.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its integers, of its shape and dtype."""
        wide = x.to(self.bound.dtype)
        if self.training:
            self._watch(wide.detach())
        levels = self.integers.levels
        quotient = torch.full_like(self.bound, levels) / (self.bound + _EPSILON)  # a number divided is a reciprocal
        scale = self._along(quotient, x)
        scaled = wide * scale
        if self.integers.positive:
            q, low, high = scaled.floor(), 0, levels - 1
        else:
            q, low, high = (scaled.clamp(-levels, levels) + 0.5).floor(), -levels, levels
        is_inside = (q >= low) & (q <= high) & (scaled.abs() <= levels)
        kept = torch.where(is_inside, wide, wide.detach())
        rounded = (q.clamp(low, high) / scale).detach() + (kept - kept.detach())
        return torch.where(self.steps > self.start, rounded, wide).to(x.dtype)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        axes = [axis for axis in range(x.dim()) if self.channels is None or axis != self.axis % x.dim()]
        is_zero = x == 0
        for average, extreme, end in (
            (self.high, torch.amax, -torch.inf),
            (self.low, torch.amin, torch.inf),
        ):
            found = extreme(torch.where(is_zero, end, x), axes).reshape(-1)
            average.copy_(torch.where(found.isfinite(), average + self.rate * (found - average), average))
        bound = torch.maximum(self.high.abs(), self.low.abs())
        self.bound.copy_(torch.where(self.steps == self.start, bound, self.bound))
        self.steps.add_(1)

    def _along(self, values: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        if self.channels is not None:
            shape[self.axis] = self.channels
        return values.reshape(shape)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"{self.integers}, channels={self.channels}, start={self.start}, rate={self.rate}"


def fix_bounds(
    model: nn.Module, integers: Mapping[str, Integers], *, by_channel: bool = True, start: int = 7500, rate: float = 0.1
) -> nn.Module:
    """Let layers of ``model`` round their inputs below bounds that are fixed in step ``start``, in place.

    Args:
        model: the model.
        integers: for the path of each layer, a linear layer or convolution, its integers.
        by_channel: whether each channel has a bound of its own, or the tensor one.
        start, rate: those of `FixedBounds`.

    Returns:
        ``model``.

    Raises:
        ValueError: a module is no linear layer or convolution, a layer has bounds already, or a number is out of range.
    """
    if start < 0 or not 0 < rate <= 1:
        raise ValueError(f"start is a step from 0 on and rate is between 0 and 1, got start={start}, rate={rate}")
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in integers}
    for path, layer in layers.items():
        if not is_linear(layer) and not isinstance(layer, _CONVOLUTIONS):
            raise ValueError(f"{path!r} is a {type(layer).__name__}: bounds belong to linear layers and convolutions")
        if hasattr(layer, _INPUT):
            raise ValueError(f"{path!r} has bounds already: prepare the model once")
        if integers[path].bits < 2:
            raise ValueError(f"integers have 2 bits or more, got {integers[path].bits} for {path!r}")
    for path, layer in layers.items():
        is_convolution = isinstance(layer, _CONVOLUTIONS)
        count = layer.in_channels if is_convolution else _inputs(layer)
        axis = 1 - layer.weight.dim() if is_convolution else -1
        bounds = FixedBounds(
            integers[path], count if by_channel else None, axis, start=start, rate=rate, like=layer.weight
        )
        layer.add_module(_INPUT, bounds.train(layer.training))
        layer.register_forward_pre_hook(_round_input)
    return model


def _inputs(layer: Any) -> int:
    """The number of inputs of a linear layer; the weight of Hugging Face's GPT-2 has its inputs first."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0])


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (getattr(layer, _INPUT)(inputs[0]), *inputs[1:])
