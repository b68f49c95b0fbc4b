"""Low-precision layer normalization, as MosaicBERT trains with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe

#: The formats of 16 bits that torch has, and its dtypes.
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
STATISTICS = ("fp32", "same")


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm whose argument, parameters and result, and the gradients of all three, are in 16 bits.

    Attributes:
        format: the format, one of `FORMATS`.
        statistics: ``"fp32"`` if torch's kernel computes mean and variance in float32, or ``"same"`` if every result on
            the way is rounded to the format (sums once, at their end).
    """

    format: str
    statistics: str

    def forward(self, input: Tensor) -> Tensor:
        """The normalized ``input``, in its dtype."""
        dtype = FORMATS[self.format]
        x, weight, bias = (None if t is None else t.to(dtype) for t in (input, self.weight, self.bias))
        if self.statistics == "fp32":
            return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(input.dtype)
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred = x - x.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True) + self.eps
        y = centred * variance.float().rsqrt().to(dtype)  # torch's kernel for 16 bits rounds the root too
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(input.dtype)


@dataclass(frozen=True)
class NarrowLayerNorms:
    """All layer norms of the model become `NarrowLayerNorm`, in place, with their parameters.

    Attributes:
        format, statistics: those of `NarrowLayerNorm`.
    """

    format: str = "bf16"
    statistics: str = "fp32"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"layer norms have a format of torch, got {self.format!r}: use {' or '.join(FORMATS)}")
        if self.statistics not in STATISTICS:
            raise ValueError(f"unknown statistics {self.statistics!r}: use one of {', '.join(STATISTICS)}")

    def apply(self, model: nn.Module, batches: Iterable[Any] | None = None) -> nn.Module:
        """``model`` with other layer norms.

        Raises:
            ValueError: it has no module of the class `torch.nn.LayerNorm`.
        """
        norms: list[Any] = [module for module in model.modules() if type(module) is nn.LayerNorm]
        if not norms:
            raise ValueError(f"{type(model).__name__} has no torch.nn.LayerNorm: leave this part out")
        for norm in norms:
            norm.__class__ = NarrowLayerNorm  # keeps the parameters and the hooks
            norm.format, norm.statistics = self.format, self.statistics
        return model

    def __str__(self) -> str:
        statistics = "in float32" if self.statistics == "fp32" else f"in {self.format}"
        return f"layer norms {self.format}: argument, parameters, result, gradients; statistics {statistics}"


def mosaic_layernorm(*, format: str = "bf16", statistics: str = "fp32") -> Recipe:
    """Layer norms that read and write 16 bits under mixed precision, in place of float32.

    Args:
        format: the format of arguments, parameters and results of layer norms.
        statistics: ``"fp32"`` as in the source, or ``"same"``, the control: statistics in the format too.

    Raises:
        ValueError: an argument is unknown.
    """
    return Recipe(
        name="mosaic_layernorm",
        source="Portes et al., MosaicBERT, NeurIPS 2023, arXiv 2312.17482; mosaicml/composer, "
        "low_precision_layernorm.py",
        policy=Policy.preset("bf16"),
        preparation=NarrowLayerNorms(format, statistics),
        notes=(
            "The code casts argument and parameters to the dtype of autocast, and calls torch's kernel, which computes "
            "the statistics in float32. The paper says low precision.",
            "The rest of the model is that of amp_bf16.",
        ),
    )
