"""The operator that computes scales, the rules that torch's compilers need for it, and `fpsim.power_of_two_scale`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.carriers import check_carrier, check_tensor, working_dtype
from fpsim.rounding.ops import SOURCE, register_lowerings
from fpsim.scaling.definitions import shape_of_outer_scale

#: Arguments: a tensor, the name of a format, and `fpsim.rounding.ops.SOURCE`. The result is the scale of the tensor.
scale_op: Callable[[Tensor, str, str], Tensor] = torch.ops.fpsim.power_of_two_scale.default

#: The operator of each rule (`fpsim.scaling.scale.RULES`), with the arguments and results of `scale_op`.
SCALE_OPERATORS: dict[str, Callable[[Tensor, str, str], Tensor]] = {"power_of_two": scale_op}

#: Rounds with any scale. Arguments: a tensor with an axis, the name of an element format, a rounding, an overflow mode,
#: the name of a scale or "" for none, the axes along which a product sums, the source, for stochastic rounding the
#: random words of the elements (`fpsim.rounding.ops.random_words_op`), for timed scales the factor in use, and whether
#: `outer_scale_op` is left out.
round_scaled_op: Callable[..., Tensor] = torch.ops.fpsim.round_scaled.default

#: The factor of a scale that may multiply the result of a product instead of an operand. Arguments: a tensor, the name
#: of an element format, the name of a scale, the axes along which a product sums, the source. See
#: `fpsim.scaling.steps.outer_scale`.
outer_scale_op: Callable[..., Tensor] = torch.ops.fpsim.outer_scale.default

_library = torch.library.Library("fpsim", "FRAGMENT")


def check_scaled_carrier(dtype: torch.dtype, fmt: FloatFormat) -> None:
    """Raise an error if ``dtype`` cannot carry ``fmt``, or numbers that are scaled into its range and back.

    Raises:
        TypeError, ValueError: in the same cases as `fpsim.rounding.carriers.check_carrier`.
        ValueError: ``dtype`` is float16, in which scaled numbers would overflow.
    """
    check_carrier(dtype, fmt)
    if dtype == torch.float16:
        raise ValueError(
            "scaled rounding of float16 tensors would overflow: convert them to bfloat16 or float32, or leave out the "
            "scale and scale the loss"
        )


def power_of_two_scale(x: Tensor, format: str | FloatFormat) -> Tensor:
    """The largest power of two by which ``x`` can be multiplied without exceeding ``format``'s largest finite value.

    The scale is ``2**floor(log2(format.max / amax))``, where ``amax`` is the largest magnitude in ``x``. It is computed
    from bits, without the error of a logarithm. It is 1 if ``amax`` is zero, infinite or NaN, or if ``x`` is empty. It
    is limited to the powers of two that are normal numbers of the dtype and whose reciprocals are normal numbers too:
    2^-126 to 2^126, in float64 2^-1022 to 2^1022.

    With this scale ``s``, ``fpsim.round(x, format, scale="power_of_two")`` equals ``fpsim.round(x * s, format) / s``
    with an exact product.

    Args:
        x: float64, float32 or bfloat16, any shape, strides and device. Under `torch.vmap` each sample has its own
            scale.
        format: a name (`fpsim.parse_format`) or a `FloatFormat`.

    Returns:
        A tensor without dimensions, of the dtype and device of ``x``. It has no derivative.

    Raises:
        TypeError: ``x`` is not a dense tensor (`fpsim.rounding.carriers.check_tensor`) of a carrier dtype.
        ValueError: the format is unknown or has values that the dtype of ``x`` lacks, or the dtype is float16.

    Source: the code of FP8-LM (arXiv 2310.18313), MS-AMP, with a history of one step.

    >>> power_of_two_scale(torch.tensor([0.3, -1.7]), "e4m3fn")
    tensor(256.)
    """
    fmt = parse_format(format)
    check_scaled_carrier(check_tensor(x, "scale"), fmt)
    return scale_op(x.detach(), fmt.name, SOURCE)


def _register_lowerings() -> None:
    register_lowerings()
    if "torch._inductor.lowering" in sys.modules:  # something is being compiled
        import fpsim.scaling.inductor  # noqa: F401


@torch.library.register_fake("fpsim::power_of_two_scale", lib=_library)
def _scale_fake(x: Tensor, format: str, source: str) -> Tensor:
    _register_lowerings()
    return x.new_empty(())


@torch.library.register_fake("fpsim::mx_multiplier", lib=_library)
def _mx_multiplier_fake(amax: Tensor, element: str, rule: str, source: str) -> Tensor:
    _register_lowerings()
    return torch.empty_like(amax)


@torch.library.register_fake("fpsim::round_mx", lib=_library)
def _round_mx_fake(x: Tensor, *arguments: Any) -> Tensor:
    _register_lowerings()
    return torch.empty_like(x)


@torch.library.register_fake("fpsim::round_scaled", lib=_library)
def _round_scaled_fake(x: Tensor, *arguments: Any) -> Tensor:
    _register_lowerings()
    return torch.empty_like(x)


@torch.library.register_fake("fpsim::outer_scale", lib=_library)
def _outer_scale_fake(x: Tensor, element: str, scale: str, axes: list[int], source: str) -> Tensor:
    _register_lowerings()
    return x.new_empty(shape_of_outer_scale(x.shape, scale, axes), dtype=working_dtype(x.dtype))


@torch.library.register_vmap("fpsim::power_of_two_scale", lib=_library)
def _scale_vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, format: str, source: str) -> tuple[Tensor, int]:
    xs = x.movedim(in_dims[0] or 0, 0)
    return torch.stack([scale_op(each, format, source) for each in xs]), 0


@torch.library.register_vmap("fpsim::round_scaled", lib=_library)
def _round_scaled_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    axes: list[int],
    source: str,
    words: Tensor | None = None,
    factor: Tensor | None = None,
    outside: bool = False,
) -> tuple[Tensor, int]:
    if factor is not None:
        raise NotImplementedError("scales that other steps determine have no rule for torch.vmap")
    xs = [x] * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
    own = [words] * len(xs) if words is None or in_dims[7] is None else words.unbind(in_dims[7])
    return torch.stack(
        [
            round_scaled_op(each, element, rounding, overflow, scale, axes, source, drawn, None, outside)
            for each, drawn in zip(xs, own, strict=True)
        ]
    ), 0


@torch.library.register_vmap("fpsim::outer_scale", lib=_library)
def _outer_scale_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, element: str, scale: str, axes: list[int], source: str
) -> tuple[Tensor, int]:
    return torch.stack([outer_scale_op(each, element, scale, axes, source) for each in x.movedim(in_dims[0], 0)]), 0
