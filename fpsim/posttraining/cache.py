"""A cache of keys and values for `generate` of transformers that stores them in a format."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fpsim.casts import Cast, CastLike
from fpsim.posttraining.key_value_casts import TOKENS, Along, cast_along, round_heads, round_tokens

Current = Literal["rounded", "exact"]
CURRENTS: tuple[str, ...] = get_args(Current)


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
        axes = (along, along if values_along is None else values_along)
        if current not in CURRENTS:
            raise ValueError(f"unknown current={current!r}: use one of {', '.join(CURRENTS)}")
        casts = tuple(cast_along(axis, given) for axis, given in zip(axes, (keys, values), strict=True))
        settings = (casts, axes, current)
        super().__init__(config=config)
        if self.layers:
            self.layers = [_layer_like(layer, settings) for layer in self.layers]
        else:
            self.layer_class_to_replicate = lambda: RoundedLayer(*settings)


def _layer_like(layer: Any, settings: Any) -> Any:
    """A layer in place of one of transformers' own."""
    if type(layer) is DynamicLayer:
        return RoundedLayer(*settings)
    if type(layer) is not DynamicSlidingWindowLayer:
        raise ValueError(
            f"the model keeps a state of type {type(layer).__name__}: RoundedCache rounds plain keys and values only"
        )
    if "tokens" in settings[1]:
        raise ValueError("a sliding window drops tokens, and has no blocks along tokens: use along='head_dim'")
    return RoundedSlidingWindowLayer(layer.sliding_window, *settings)


class RoundedLayer(DynamicLayer):
    """The keys and values of one layer of a `RoundedCache`."""

    def __init__(self, casts: tuple[Cast | None, Cast | None], axes: tuple[str, str], current: str) -> None:
        super().__init__()
        self.casts, self.axes, self.current = casts, axes, current
        # A block that is complete is rounded, and cannot be taken apart again.
        self.is_croppable = "tokens" not in axes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return those that the attention of this step reads.

        Both have the shape (batch, heads, tokens, head_dim).
        """
        new = (key_states, value_states)
        entering = [
            round_heads(x, cast) if axis == "head_dim" else x
            for x, cast, axis in zip(new, self.casts, self.axes, strict=True)
        ]
        before = self.get_seq_length()
        stored = super().update(*entering, *args, **kwargs)
        exact = [
            torch.cat([x[..., :before, :], y], TOKENS) if self.current == "exact" else x
            for x, y in zip(stored, new, strict=True)
        ]
        self.keys, self.values = (
            round_tokens(x, cast, before) if axis == "tokens" else x
            for x, cast, axis in zip(stored, self.casts, self.axes, strict=True)
        )
        return tuple(exact) if self.current == "exact" else (self.keys, self.values)  # type: ignore[return-value]

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

    def __init__(
        self, window: int, casts: tuple[Cast | None, Cast | None], axes: tuple[str, str], current: str
    ) -> None:
        super().__init__(window)
        self.casts, self.current = casts, current

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`RoundedLayer.update`."""
        new = (key_states, value_states)
        stored = super().update(
            *(round_heads(x, cast) for x, cast in zip(new, self.casts, strict=True)), *args, **kwargs
        )
        if self.current == "rounded":
            return stored
        count = key_states.shape[TOKENS]
        return tuple(torch.cat([x[..., :-count, :], y], TOKENS) for x, y in zip(stored, new, strict=True))  # type: ignore[return-value]
