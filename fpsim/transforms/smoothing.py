"""Smoothing: a factor for each channel divides one operand of a product and multiplies the other.

Source: SmoothQuant (arXiv 2211.10438), equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fpsim.rounding.carriers import CODES_OF, working_dtype
from fpsim.transforms.channels import along, amax_of_channels, check_length
from fpsim.transforms.transform import Transform


@dataclass(frozen=True)
class Smoothing(Transform):
    """Factors for the channels of a product: the first operand is divided by them, the second is multiplied.

    Attributes:
        alpha: the factor of a channel is amax(first)**alpha / amax(second)**(1 - alpha), from 0 to 1. With 1 only the
            first operand determines it, with 0 only the second. None if `factors` are given.
        factors: given factors, positive and finite, such as those of a calibration; any sequence or tensor of them.
        power_of_two: whether the factors are rounded to the nearest power of two, halves up. The product is then
            unchanged also in floating point, unless numbers leave the range of normal numbers.

    The logarithms and the power are computed in float64, and the factor is rounded once to the working dtype of the
    operand with more bits. It is limited to 2^-126 to 2^126 (2^-1022 to 2^1022 in float64). It is 1 where one of the
    largest magnitudes that determine it is zero, infinite or NaN. Each quotient and product is one operation.

    Raises:
        ValueError: ``alpha`` is not between 0 and 1, a factor is not positive and finite, or both or neither are given.
    """

    alpha: float | None = 0.5
    factors: tuple[float, ...] = ()
    power_of_two: bool = False

    is_of_products: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        factors = _numbers(self.factors)
        object.__setattr__(self, "factors", factors)
        if wrong := [each for each in factors if not (each > 0 and math.isfinite(each))]:
            raise ValueError(f"factors of smoothing are positive and finite, got {wrong[0]}")
        if (self.alpha is None) != bool(factors):
            raise ValueError(
                f"smoothing takes either alpha or factors, got alpha={self.alpha} and {len(factors)} factors: with "
                "factors set alpha=None"
            )
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
                raise ValueError(f"alpha of smoothing is a number from 0 to 1, got {self.alpha!r}: use 0.5")
            object.__setattr__(self, "alpha", float(self.alpha))

    def __str__(self) -> str:
        how = f"factors={','.join(map(repr, self.factors))}" if self.factors else f"alpha={self.alpha!r}"
        return f"smooth:{how}" + ":power_of_two" * self.power_of_two

    def check_axis(self, length: int) -> None:
        if self.factors:
            check_length(str(self), len(self.factors), length)

    def parameters(self, first: Tensor, second: Tensor, axes: tuple[int, int]) -> Tensor:
        working = torch.promote_types(working_dtype(first.dtype), working_dtype(second.dtype))
        if self.alpha is None:
            self.check_axis(first.shape[axes[0]])
            factors = torch.tensor(self.factors, dtype=torch.float64, device=first.device)
        else:
            a, b = (amax_of_channels(x, axis) for x, axis in zip((first, second), axes, strict=True))
            factors = torch.exp2(_weighted(a, self.alpha) - _weighted(b, 1 - self.alpha)).nan_to_num(1.0)
        limit = 126 if working == torch.float32 else 1022
        factors = factors.clamp(2.0**-limit, 2.0**limit).to(working)
        return _nearest_power_of_two(factors).clamp(max=2.0**limit) if self.power_of_two else factors

    def operand(self, x: Tensor, number: int, axis: int, parameters: Tensor | None, out: Tensor) -> None:
        assert parameters is not None, "smoothing has parameters"
        factors = along(parameters.to(out.dtype), x, axis)
        if number:
            torch.mul(x, factors, out=out)
        else:
            torch.div(x, factors, out=out)

    def linear(self, x: Tensor, number: int, axis: int, parameters: Tensor | None = None) -> Tensor:
        assert parameters is not None, "smoothing has parameters"
        factors = along(parameters.to(x.dtype), x, axis)
        return x * factors if number else x / factors


def _weighted(amax: Tensor, weight: float) -> Tensor:
    """The logarithm of ``amax``, times ``weight``; 0 if no factor depends on it, NaN where it is unusable."""
    if weight == 0:
        return torch.zeros_like(amax)
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, weight * torch.log2(amax), math.nan)


def _nearest_power_of_two(x: Tensor) -> Tensor:
    """The nearest powers of two to positive normal numbers, halves up."""
    integer = CODES_OF[x.dtype]
    mantissa_bits = 23 if x.dtype == torch.float32 else 52
    codes = x.view(integer) + (1 << (mantissa_bits - 1))
    return (codes >> mantissa_bits << mantissa_bits).view(x.dtype)


def _numbers(given: Any) -> tuple[float, ...]:
    items = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(items, Iterable) or isinstance(items, str):
        raise TypeError(f"factors of smoothing are a list or a tensor of numbers, got {given!r}")
    return tuple(float(each) for each in items)
