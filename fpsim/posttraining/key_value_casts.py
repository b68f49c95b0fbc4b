"""The casts that can round the queries, keys and values of attention: token by token, or blocks of tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fpsim.casts import UNSCALED, Cast, CastLike, parse_cast, refuse_timed
from fpsim.scaling.scale import NV_RULES
from fpsim.tensor_functions import round

#: The axes of queries, keys and values, tensors of shape (batch, heads, tokens, head_dim).
TOKENS, HEAD_DIM = -2, -1
#: The axis along which the scales of keys and values lie.
Along = Literal["head_dim", "tokens"]
ALONGS: tuple[str, ...] = get_args(Along)


def cast_along(axis: str, given: CastLike | None) -> Cast | None:
    """`along_heads` or `along_tokens`, as ``axis`` says."""
    if axis not in ALONGS:
        raise ValueError(f"scales of keys and values lie along one of {', '.join(ALONGS)}, got {axis!r}")
    return along_heads(given) if axis == "head_dim" else along_tokens(given)


def along_heads(given: CastLike | None) -> Cast | None:
    """The cast that ``given`` denotes, if it rounds each token of each head by itself.

    Raises:
        ValueError: its scale is shared by other elements than those of one token and head, or it draws random numbers.
    """
    cast = _cast(given)
    scale = None if cast is None else cast.scale
    if scale is not None and (scale.kind not in ("row", "block") or scale.rule in NV_RULES):
        raise ValueError(
            f"tokens enter one after the other, and scale {str(scale)!r} is shared between tokens: use a scale of rows "
            "or blocks along head_dim, such as int8/row or int4/block:32, or none"
        )
    return cast


def along_tokens(given: CastLike | None) -> Cast | None:
    """The cast that ``given`` denotes, if its scales belong to one channel and a number of consecutive tokens.

    Raises:
        ValueError: it has other scales, or draws random numbers.
    """
    cast = _cast(given)
    if cast is not None and (
        cast.scale is None or cast.scale.kind != "block" or cast.scale.rule in NV_RULES or cast.transform
    ):
        raise ValueError(
            f"scales along tokens belong to blocks of tokens, and {str(cast)!r} has none: use a format such as "
            "int4/block:32"
        )
    return cast


def round_heads(x: Tensor, cast: Cast | None) -> Tensor:
    """Queries, keys or values of shape (batch, heads, tokens, head_dim), rounded along head_dim; None leaves them."""
    return x if cast is None else round(x, text_of(cast), axis=HEAD_DIM)


def round_tokens(x: Tensor, cast: Cast | None, before: int = 0) -> Tensor:
    """Keys or values with the blocks of tokens rounded that became complete since there were ``before`` tokens.

    None leaves them.
    """
    if cast is None:
        return x
    assert cast.scale is not None, "casts along tokens have blocks"
    size = cast.scale.sizes[-1]
    first, last = before // size * size, x.shape[TOKENS] // size * size
    if first == last:
        return x
    blocks = round(x[..., first:last, :], text_of(cast), axis=TOKENS)
    return torch.cat([x[..., :first, :], blocks, x[..., last:, :]], TOKENS)


def text_of(cast: Cast) -> str:
    """A name of ``cast``; Dynamo of some versions of torch passes names, and no casts, to functions that it skips."""
    return f"{cast}/{UNSCALED}" if cast.scale is None else str(cast)


def _cast(given: CastLike | None) -> Cast | None:
    cast = None if given is None else parse_cast(given)
    refuse_timed(cast, "a cache of keys and values")
    if cast is not None and cast.is_stochastic:
        raise ValueError(f"keys and values are rounded to nearest values, got {cast.rounding!r}: leave it out")
    return cast
