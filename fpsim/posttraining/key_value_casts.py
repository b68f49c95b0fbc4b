"""The casts that can round the queries, keys and values of attention: token by token, or blocks of tokens.

Casts are text here: Dynamo passes text, and no casts, to the functions that it does not trace.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fpsim.casts import Cast, CastLike, parse_cast, refuse_timed
from fpsim.posttraining.columns import name_of
from fpsim.scaling.scale import NV_RULES
from fpsim.tensor_functions import round

#: The axes of queries, keys and values, tensors of shape (batch, heads, tokens, head_dim).
TOKENS, HEAD_DIM = -2, -1
#: The axis along which the scales of keys and values lie.
Along = Literal["head_dim", "tokens"]
ALONGS: tuple[str, ...] = get_args(Along)


class TokenRounding(NamedTuple):
    """How queries, keys or values are rounded.

    Attributes:
        cast: the name of the cast; None leaves them.
        block: along tokens, the number of tokens in a block; 0 along head_dim.
    """

    cast: str | None
    block: int


def token_rounding(axis: str, given: CastLike | None) -> TokenRounding:
    """The rounding that ``given`` denotes, with scales along ``axis``.

    Raises:
        ValueError: the axis is unknown, the format draws random numbers, or its scales are not those of one token of
            one head (``head_dim``), or of some consecutive tokens of one channel (``tokens``).
    """
    if axis not in ALONGS:
        raise ValueError(f"scales of keys and values lie along one of {', '.join(ALONGS)}, got {axis!r}")
    cast = None if given is None else parse_cast(given)
    if cast is None:
        return TokenRounding(None, 0)
    refuse_timed(cast, "a cache of keys and values")
    if cast.is_stochastic:
        raise ValueError(f"keys and values are rounded to nearest values, got {cast.rounding!r}: leave it out")
    block = _block_of_tokens(cast) if axis == "tokens" else 0
    if axis == "head_dim":
        _check_along_heads(cast)
    return TokenRounding(name_of(cast), block)


def _check_along_heads(cast: Cast) -> None:
    scale = cast.scale
    if scale is not None and (scale.kind not in ("row", "block") or scale.rule in NV_RULES):
        raise ValueError(
            f"tokens enter one after the other, and scale {str(scale)!r} is shared between tokens: use a scale of rows "
            "or blocks along head_dim, such as int8/row or int4/block:32, or none"
        )


def _block_of_tokens(cast: Cast) -> int:
    scale = cast.scale
    if scale is None or scale.kind != "block" or scale.rule in NV_RULES or cast.transform is not None:
        raise ValueError(
            f"scales along tokens belong to blocks of tokens, and {str(cast)!r} has none: use a format such as "
            "int4/block:32"
        )
    return scale.sizes[-1]


def round_tokens(x: Tensor, rounding: TokenRounding) -> Tensor:
    """Queries, keys or values rounded along head_dim, each token of each head by itself.

    Those with scales along tokens stay as they are.
    """
    return x if rounding.cast is None or rounding.block else round(x, rounding.cast, axis=HEAD_DIM)


def round_blocks(x: Tensor, rounding: TokenRounding, before: int = 0) -> Tensor:
    """Keys or values with the blocks of tokens rounded that became complete since there were ``before`` tokens.

    Those with scales along head_dim stay as they are.
    """
    if rounding.cast is None or not rounding.block:
        return x
    size = rounding.block
    first, last = before // size * size, x.shape[TOKENS] // size * size
    if first == last:
        return x
    blocks = round(x[..., first:last, :], rounding.cast, axis=TOKENS)
    return torch.cat([x[..., :first, :], blocks, x[..., last:, :]], TOKENS)
