"""Rounding the queries, keys and values of attention in models of transformers, in every forward pass."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fpsim.casts import CastLike
from fpsim.posttraining.key_value_casts import Along, round_blocks, round_tokens, token_rounding

#: The prefix of the names under which rounded attention is registered in transformers.
_PREFIX = "fpsim"


def round_attention(
    model: nn.Module,
    query: CastLike | None = None,
    key: CastLike | None = None,
    value: CastLike | None = None,
    *,
    along: Along = "head_dim",
    values_along: Along | None = None,
) -> None:
    """Let the attention of ``model`` read rounded queries, keys and values, from now on, in place.

    They are rounded after rotary embedding. A cache of transformers stores them unrounded, and every step rounds them
    again, to the same bits: the results are those of a `fpsim.posttraining.RoundedCache` with the same formats. Unlike
    the cache, it acts in every forward pass. Along ``tokens`` the scale of a block depends on all its tokens, so that a
    token's output depends on later ones of its block, as it does in the first step of `generate`. A static cache passes
    its empty places on as tokens: along ``tokens`` use a dynamic one.

    Args:
        model: a `PreTrainedModel` of transformers with the attention ``eager`` or ``sdpa``.
        query, key, value: the format of each, as for a `RoundedCache`. None leaves it.
        along, values_along: the axis of the scales of keys and values, as for a `RoundedCache`. Those of queries lie
            along ``head_dim``.

    Raises:
        ValueError: no format is given, a format cannot round token by token, the attention of the model is another one,
            or it is rounded already.
        TypeError: ``model`` is no model of transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"round_attention takes a PreTrainedModel of transformers, got {type(model).__name__}")
    axes = ("head_dim", along, along if values_along is None else values_along)
    roundings = [token_rounding(axis, given) for axis, given in zip(axes, (query, key, value), strict=True)]
    if not any(rounding.cast for rounding in roundings):
        raise ValueError("no format is given: name one for query, key or value")
    if any(rounding.block for rounding in roundings) and getattr(model.config, "sliding_window", None) is not None:
        raise ValueError("a sliding window drops tokens, and has no blocks along tokens: use along='head_dim'")
    base = model.config._attn_implementation
    if base == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise ValueError("reorder_and_upcast_attn has a way to multiply of its own: set it to False")
    if base not in ("eager", "sdpa"):
        done = str(base).startswith(_PREFIX)
        raise ValueError(
            f"the attention of the model is {base!r}: {'it is rounded already' if done else 'use eager or sdpa'}, "
            "model.set_attn_implementation('sdpa')"
        )
    file = sys.modules[type(model).__module__]
    if base == "eager":
        plain = _eager_function(file)
    else:
        plain = getattr(file, "ALL_ATTENTION_FUNCTIONS", AttentionInterface())[base]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = (
            round_blocks(round_tokens(x, rounding), rounding)
            for x, rounding in zip((query, key, value), roundings, strict=True)
        )
        return plain(module, *rounded, *args, **kwargs)

    texts = [f"{rounding.cast}_{axis}".replace("/", "_") for rounding, axis in zip(roundings, axes, strict=True)]
    name = "-".join([_PREFIX, file.__name__.rpartition(".")[2], base, *texts])
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    _own_config(model)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not take another attention: use RoundedCache")


def _own_config(model: Any) -> None:
    """Give ``model`` a configuration of its own, so that other models made of the same one keep their attention."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(getattr(module, "config", None)) in copies:
            module.config = copies[id(module.config)]


def _eager_function(file: Any) -> Callable[..., Any]:
    """The function ``eager_attention_forward`` of the module that defines the model."""
    if not hasattr(file, "eager_attention_forward"):
        raise ValueError(f"{file.__name__} has no eager_attention_forward: model.set_attn_implementation('sdpa')")
    return file.eager_attention_forward
