"""The protocol of transforms: what a policy and a cast ask of one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fpsim.formats import ElementFormat
from fpsim.scaling.scale import Scale


class Transform:
    """A change of a tensor before it is rounded. It is a frozen value; ``str`` is a name that `parse_transform` reads.

    A transform of products changes both operands along the axis over which the product sums, and leaves the product as
    it is in exact arithmetic. A transform of casts changes one tensor, which is then rounded and changed back.

    The result of a change has the working dtype: float32 for float32, bfloat16 and float16, and float64 for float64.
    """

    #: Whether a policy may apply it to both operands of a product.
    is_of_products: ClassVar[bool] = False
    #: Whether a cast may contain it.
    is_of_casts: ClassVar[bool] = False
    #: Whether it depends on the axis over which a product sums.
    has_axis: ClassVar[bool] = True
    #: Whether it changes the axis of the first operand that the product keeps, and the result back, in place of both
    #: operands along the axis over which the product sums.
    of_kept_axis: bool = False
    #: Whether both operands of a product determine it, or a list does, so that `parameters` has to be called.
    has_parameters: ClassVar[bool] = False
    #: Whether the parameters are indices, int64; otherwise they have the working dtype.
    parameters_are_indices: ClassVar[bool] = False

    @property
    def stages(self) -> tuple[Transform, ...]:
        """The transforms that change the operands one after the other: several for a `fpsim.transforms.chain.Chain`."""
        return (self,)

    def parameters(self, first: Tensor, second: Tensor, axes: tuple[int, int]) -> Tensor:
        """The numbers that the changes of both operands share, one for each index along the axis that they sum over.

        Raises:
            ValueError: a given list has another length.
        """
        raise NotImplementedError(f"{self} has no parameters")

    def operand(self, x: Tensor, number: int, axis: int, parameters: Tensor | None, out: Tensor) -> None:
        """Write one operand of a product, changed, to ``out``.

        Args:
            x: the operand.
            number: 0 for the first and 1 for the second operand; with `of_kept_axis` 1 is for the result, which is
                changed back.
            axis: the axis of ``x`` over which the product sums; with `of_kept_axis` the one that it keeps.
            parameters: the result of `parameters`, if there are any.
            out: a tensor of the shape of ``x`` in the working dtype.

        Raises:
            ValueError: the transform does not go with the length of the axis.
        """
        raise NotImplementedError(f"{self} is no transform of products")

    def linear(self, x: Tensor, number: int, axis: int, parameters: Tensor | None = None) -> Tensor:
        """`operand`, with other last bits, by operations that have derivatives; ``x`` has the working dtype."""
        raise NotImplementedError(f"{self} is no transform of products")

    def check_axis(self, length: int) -> None:
        """Raise ValueError if a product that sums over ``length`` elements cannot be transformed."""

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
        """``x`` changed, rounded, and changed back, in the dtype of ``x``. ``axes`` and ``words`` are as for scales."""
        raise NotImplementedError(f"{self} is no transform of casts")

    def check_cast(self, element: ElementFormat, scale: Scale | None) -> None:
        """Raise ValueError if a cast with this element format and scale cannot contain the transform."""
