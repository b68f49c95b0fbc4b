"""The square root of a state: what is kept of a second moment is its root, which has half the range of exponents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fpsim.formats import ElementFormat
from fpsim.rounding.carriers import working_dtype
from fpsim.scaling.scale import Scale
from fpsim.transforms.rounding import in_dtype, rounded_plainly
from fpsim.transforms.transform import Transform


@dataclass(frozen=True)
class Root(Transform):
    """q = round(sqrt(x)), and back it is q * q: the elements of a second moment are kept as their roots.

    The root and the square are float32 operations (float64 for float64), each rounded once, to nearest even. A scale of
    the cast is that of the roots. Negative numbers become NaN. If q has at most 12 significant bits, its square is
    exact, and a second rounding changes nothing.

    Source of the idea: hAdam (arXiv 2102.13565) keeps sqrt(v), since v underflows in float16
    (`fpsim.training.hypot_adam`).
    """

    is_of_casts: ClassVar[bool] = True
    has_axis: ClassVar[bool] = False

    def __str__(self) -> str:
        return "sqrt"

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
        root = x.to(working_dtype(x.dtype)).sqrt()
        kept = rounded_plainly(root, element, rounding, overflow, scale, axes, words)
        return in_dtype(kept * kept, x.dtype)
