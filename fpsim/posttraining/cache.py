"""A cache of keys and values for `generate` of transformers that stores them in a format."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fpsim.casts import CastLike
from fpsim.posttraining.key_value_casts import (
    TOKENS,
    Along,
    TokenRounding,
    round_blocks,
    round_tokens,
    token_rounding,
)

Current = Literal["rounded", "exact"]
CURRENTS: tuple[str, ...] = get_args(Current)

#: The roundings of keys and of values.
Roundings = tuple[TokenRounding, TokenRounding]


class RoundedCache(DynamicCache):
    """The cache that transformers keeps between the steps of `generate`, with rounded keys and values.

    Every token is rounded once, when it enters. The attention of that step reads the rounded keys and values of all
    tokens, its own included. With ``current="exact"`` it reads the keys and values of the step's own tokens as they
    were before rounding, and later steps read them rounded.

    Along ``tokens``, a scale belongs to one channel and ``block:N`` consecutive tokens, counted from the first one of
    the sequence. Tokens of a block that is not yet complete are stored unrounded, as in KIVI (arXiv 2402.02750). They
    are rounded together when the last one enters.

    Keys enter after rotary embedding, as transformers passes them on. Padding is stored like other tokens.

    Args:
        keys, values: the format of each: a format alone, or with a scale of rows (one token of one head) or blocks
            along ``head_dim``, or of blocks along ``tokens``: ``e4m3fn``, ``int8``, ``int4/block:32``, ``msfp12``. None
            leaves them as they are.
        along, values_along: ``head_dim`` or ``tokens``, for keys and for values. ``values_along=None`` means ``along``.
        current: ``rounded`` or ``exact``.
        config: the configuration of the model. Models with sliding windows need it, and have blocks along ``head_dim``.

    Raises:
        ValueError: a format cannot round token by token, an argument is unknown, or the model keeps other states than
            keys and values.

    Use it with `generate` of a model, also one that ``model.compile(backend="fpsim", options=...)`` compiled in place::

        model.generate(inputs, past_key_values=RoundedCache("int4/block:32", "e4m3fn", config=model.config))
    """

    def __init__(
        self,
        keys: CastLike | None,
        values: CastLike | None,
        *,
        along: Along = "head_dim",
        values_along: Along | None = None,
        current: Current = "rounded",
        config: Any = None,
    ) -> None:
        if current not in CURRENTS:
            raise ValueError(f"unknown current={current!r}: use one of {', '.join(CURRENTS)}")
        roundings = (
            token_rounding(along, keys),
            token_rounding(along if values_along is None else values_along, values),
        )
        super().__init__(config=config)
        if self.layers:
            self.layers = [_layer_like(layer, roundings, current) for layer in self.layers]
        else:
            self.layer_class_to_replicate = lambda: RoundedLayer(roundings, current)  # type: ignore[assignment]


def _layer_like(layer: Any, roundings: Roundings, current: str) -> Any:
    """A layer in place of one of transformers' own."""
    if type(layer) is DynamicLayer:
        return RoundedLayer(roundings, current)
    if type(layer) is not DynamicSlidingWindowLayer:
        raise ValueError(
            f"the model keeps a state of type {type(layer).__name__}: RoundedCache rounds plain keys and values only"
        )
    if any(rounding.block for rounding in roundings):
        raise ValueError("a sliding window drops tokens, and has no blocks along tokens: use along='head_dim'")
    return RoundedSlidingWindowLayer(layer.sliding_window, roundings, current)


class RoundedLayer(DynamicLayer):
    """The keys and values of one layer of a `RoundedCache`."""

    def __init__(self, roundings: Roundings, current: str) -> None:
        super().__init__()
        self.roundings, self.current = roundings, current
        # A block that is complete is rounded, and cannot be taken apart again.
        self.is_croppable = not any(rounding.block for rounding in roundings)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return those that the attention of this step reads.

        Both have the shape (batch, heads, tokens, head_dim).
        """
        of_keys, of_values = self.roundings
        before = self.get_seq_length()
        new = round_tokens(key_states, of_keys), round_tokens(value_states, of_values)
        keys, values = super().update(*new, *args, **kwargs)
        self.keys, self.values = round_blocks(keys, of_keys, before), round_blocks(values, of_values, before)
        if self.current == "exact":
            return (
                torch.cat([keys[..., :before, :], key_states], TOKENS),
                torch.cat([values[..., :before, :], value_states], TOKENS),
            )
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number.

        Raises:
            ValueError: scales lie along tokens, and the tokens are in rounded blocks.
        """
        if tokens_to_remove and not self.is_croppable:
            raise ValueError("a cache with scales along tokens cannot give up tokens: use along='head_dim'")
        super().crop(tokens_to_remove)


class RoundedSlidingWindowLayer(DynamicSlidingWindowLayer):
    """`RoundedLayer` for a layer that keeps the last tokens only; scales lie along ``head_dim``."""

    def __init__(self, window: int, roundings: Roundings, current: str) -> None:
        super().__init__(window)
        self.roundings, self.current = roundings, current

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`RoundedLayer.update`."""
        of_keys, of_values = self.roundings
        new = round_tokens(key_states, of_keys), round_tokens(value_states, of_values)
        keys, values = super().update(*new, *args, **kwargs)
        if self.current == "exact":
            count = key_states.shape[TOKENS]
            return (
                torch.cat([keys[..., :-count, :], key_states], TOKENS),
                torch.cat([values[..., :-count, :], value_states], TOKENS),
            )
        return keys, values
