"""Transforms of products that follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fpsim.transforms.transform import Transform


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms of products, of which each changes what the one before it has made of both operands.

    With the transforms S and H the first operand x becomes H(S(x)), and the second one likewise. What both operands
    determine (the factors of smoothing, an order of channels) is computed from the operands as the transforms before
    have changed them. Nothing is rounded between two transforms: numbers stay in the working dtype.

    Attributes:
        parts: two or more transforms, in the order in which they are applied.

    Raises:
        ValueError: there are fewer than two, or one is a chain itself, is no transform of products, or changes the axis
            that the product keeps.
    """

    parts: tuple[Transform, ...]

    is_of_products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) < 2:
            raise ValueError(f"a chain has two transforms or more, got {len(self.parts)}: name one transform alone")
        for part in self.parts:
            if isinstance(part, Chain) or not part.is_of_products or part.of_kept_axis:
                raise ValueError(
                    f"{str(part)!r} has no place in {str(self)!r}: transforms that follow one another change both "
                    "operands of a product along the axis over which it sums"
                )

    @property
    def stages(self) -> tuple[Transform, ...]:
        return self.parts

    def __str__(self) -> str:
        return "/".join(map(str, self.parts))

    def check_axis(self, length: int) -> None:
        for part in self.parts:
            part.check_axis(length)
