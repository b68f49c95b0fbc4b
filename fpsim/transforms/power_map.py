"""The power map of COAT: a state is raised to a power per group, so that its range fills that of the format.

Source: COAT (arXiv 2410.19313), section 4, and its kernel ``fp8_adamw_expand_cuda_kernel.cu``. With the largest
magnitude M and the least magnitude m of a group, and the largest value F of the format, COAT stores (|x|/c)^k / d with
c = sqrt(M m) and d = (M/c)^k / F. The centre c cancels: this is F (|x|/M)^k, which is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fpsim.formats import ElementFormat, FloatFormat, IntegerFormat
from fpsim.scaling.groups import OnTensors, split
from fpsim.scaling.scale import Scale
from fpsim.scaling.steps import Elements
from fpsim.transforms.rounding import in_dtype
from fpsim.transforms.transform import Transform

_SMALLEST_NORMAL = 2.0**-126
#: Powers are multiples of this.
STEP = 2.0**-4
#: A ratio of logarithms this close below an integer counts as that integer: an exact one may be computed too small.
_NEARLY = 1 + 2.0**-40
#: What COAT adds to the largest and to the least magnitude, in float32.
_COAT_EPSILON = 1e-30


@dataclass(frozen=True)
class PowerMap(Transform):
    """A power of the magnitudes of a group: y = F sign(x) (|x|/M)^k is rounded, and back it is M sign(y) (|y|/F)^(1/k).

    M is the largest magnitude of the group, m the least one, F the largest value of the format, and k =
    floor(16 log2(F^2/2) / log2(M/m)) / 16, but at least 1/16. Where M = m, k is 1.

    Attributes:
        least: which magnitude is m. ``nonzero``: the least one that is not zero. ``kernel``: the one that COAT's kernel
            finds in a group of 128, in which some zeros count and others hide magnitudes; 1e-30 is added to M and to
            m.
        expands_only: whether k is at least 1, so that no range is compressed.

    The steps after M and m are in float64, whose logarithm and power are within a few units in the last place and not
    correctly rounded; the result is rounded once to the dtype of the tensor. Zeros and signs stay. The largest element
    of a group stays too if F is a value of the format, and so do groups of one magnitude. Magnitudes below 2^-126 count
    as zero. A NaN or an infinity makes every element of its group NaN. The map is no projection: a second rounding may
    use another k.
    """

    least: Literal["nonzero", "kernel"] = "nonzero"
    expands_only: bool = False

    is_of_casts: ClassVar[bool] = True
    has_axis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.least not in ("nonzero", "kernel"):
            raise ValueError(f"unknown least magnitude {self.least!r} of a power map: use 'nonzero' or 'kernel'")

    def __str__(self) -> str:
        return "expand" + ":kernel" * (self.least == "kernel") + ":clamp" * self.expands_only

    def check_cast(self, element: ElementFormat, scale: Scale | None) -> None:
        name = f"{element.name}/{'' if scale is None else f'{scale}/'}{self}"
        if scale is None or scale.rule != "fp32":
            raise ValueError(f"cast {name!r} has no groups with a ratio: write such as {element.name}/group:128/{self}")
        if not (isinstance(element, FloatFormat) or (isinstance(element, IntegerFormat) and element.is_symmetric)):
            raise ValueError(f"cast {name!r}: a power map takes floating-point formats and symmetric integers")
        if element.max**2 <= 2:
            raise ValueError(f"cast {name!r}: a power map needs a format with values above sqrt(2)")
        if self.least == "kernel" and scale.granularity != "group:128":
            raise ValueError(f"cast {name!r}: COAT's kernel has groups of 128: write {element.name}/group:128/{self}")

    def rounded(
        self,
        x: Tensor,
        element: ElementFormat,
        rounding: str,
        overflow: str,
        scale: Scale | None,
        axes: list[int],
        words: Tensor | None,
    ) -> Tensor:
        assert scale is not None, "check_cast refuses a power map without a scale"
        call = OnTensors()
        groups = split(x, scale, axes, call)
        values = groups.values.double()
        values = torch.where(values.abs() < _SMALLEST_NORMAL, values * 0.0, values)
        largest = values.abs().amax(groups.axes, keepdim=True)
        top = largest
        if self.least == "kernel":
            top = _plus_epsilon(largest)
            smallest = _plus_epsilon(_least_of_kernel(values.abs(), int(x.numel())))
        else:
            magnitudes = torch.where(values == 0, math.inf, values.abs())
            smallest = torch.minimum(magnitudes.amin(groups.axes, keepdim=True), largest)
        k = power(top, smallest, element.max, self.expands_only)
        is_usable = largest.isfinite() & (largest > 0)
        top = torch.where(is_usable, top, 1.0)
        y = torch.copysign((values.abs() / top).pow(k) * element.max, values)
        own_words = None if words is None else split(words, scale, axes, call).values
        y = Elements(element, rounding, overflow, own_words, call).rounded(y, torch.float64)
        back = torch.copysign((y.abs() / element.max).pow(1 / k) * top, y)
        back = torch.where(largest.isfinite(), back, math.nan)
        return groups.restore(in_dtype(back, x.dtype))


def power(largest: Tensor, smallest: Tensor, top: float, expands_only: bool) -> Tensor:
    """The power k of groups with these magnitudes, for a format with the largest value ``top``; float64."""
    steps = torch.log2(torch.full_like(largest, top * top / 2)) / STEP
    is_constant = ~(largest > smallest)
    ratio = torch.where(is_constant, 2.0, largest / smallest)
    k = torch.floor(steps / torch.log2(ratio) * _NEARLY) * STEP
    k = k.clamp(min=1.0 if expands_only else STEP)
    return torch.where(is_constant, 1.0, k)


def _plus_epsilon(x: Tensor) -> Tensor:
    return (x.float() + torch.tensor(_COAT_EPSILON, dtype=torch.float32, device=x.device)).double()


def _least_of_kernel(magnitudes: Tensor, count: int) -> Tensor:
    """The least magnitude of each group of 128 as COAT's kernel finds it: shape (groups, 1).

    Four warps of 32 lanes, and then the results of the four, are folded in halves. A zero in the second half is
    skipped, together with the magnitudes that were folded into it; a zero in the first half stays.
    """
    size = magnitudes.shape[-1]
    padded = magnitudes.new_full((magnitudes.shape[0], 128), float.fromhex("0x1.fffffep127"))
    padded[:, :size] = magnitudes
    missing = torch.arange(padded.numel(), device=padded.device).view_as(padded) >= count
    padded = padded.masked_fill(missing, float.fromhex("0x1.fffffep127")).view(-1, 4, 32)
    warps = _folded(padded)
    return _folded(torch.cat([warps, warps.new_full((len(warps), 28), 1e9)], -1))[:, None]


def _folded(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        own, other = x.chunk(2, -1)
        x = torch.where(other > 0, torch.minimum(own, other), own)
    return x.squeeze(-1)
