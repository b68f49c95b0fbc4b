"""Arithmetic in a narrow format: operations on wider tensors whose every result is rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpsim.casts import CastLike, apply_cast, check_cast, parse_cast, refuse_timed
from fpsim.rounding.carriers import check_tensor

#: A function that rounds a tensor.
Rounding = Callable[[Tensor], Tensor]

_OF_DTYPE = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def rounding_to(format: CastLike | None, caller: str) -> Rounding:
    """The function that rounds a tensor to ``format``; the identity for None.

    Raises:
        ValueError: the format is unknown, or its cast is stochastic or has a scale that depends on other steps.
            ``caller`` is named in the message. In a call: the dtype of the tensor lacks values of the format.
    """
    cast = None if format is None else parse_cast(format)
    refuse_timed(cast, caller)
    if cast is None:
        return lambda x: x
    if cast.is_stochastic:
        raise ValueError(f"{caller} keeps no random numbers, got {str(cast)!r}: use a deterministic rounding")

    def rounded(x: Tensor) -> Tensor:
        check_cast(check_tensor(x), cast)
        return apply_cast(x, cast, axes=(-1,) if x.dim() else ())

    return rounded


def format_of(dtype: torch.dtype, format: CastLike | None) -> CastLike | None:
    """The format in which tensors of ``dtype`` are computed: ``format``, or else that of float16 and bfloat16."""
    return _OF_DTYPE.get(dtype) if format is None else format
