"""Sorted channels of keys: the channels of each head in the order of their magnitude, so that blocks hold similar ones.

Source: K-sort, Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers (arXiv 2403.20137).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.posttraining.layers import is_conv1d


@torch.no_grad()
def sort_key_channels(model: nn.Module) -> dict[str, Tensor]:
    """Sort the channels of the keys of every head by the norm of their row in the key projection, largest first.

    The queries of all heads that read these keys get the same order, so that the model computes the same logits but for
    the order of sums. Rotary embedding turns channels i and i + d/2 of a head together (d is its size). Such pairs are
    sorted by their common norm and become neighbours, so that both are in one block. Each head has its own cosines and
    sines.

    Args:
        model: a model of transformers, which changes in place: Llama, Mistral or Qwen2, also with grouped queries, or
            GPT-2. In the first three each attention module gets the buffer ``key_order``, and a class that turns each
            head by its own cosines and sines.

    Returns:
        For the path of each attention module the order of the channels, int64 of shape (heads of keys, d): channel i of
        head h was channel ``order[h, i]``.

    Raises:
        ValueError: the model has no attention, or some of an unknown class, which includes sorted ones.
    """
    attentions = {path: module for path, module in model.named_modules() if type(module).__name__.endswith("Attention")}
    for path, module in attentions.items():
        if type(module).__name__ not in _SORTERS:
            raise ValueError(
                f"{path} is a {type(module).__name__}, and sort_key_channels knows {', '.join(_SORTERS)}. A model is "
                "sorted once"
            )
    if not attentions:
        raise ValueError(f"{type(model).__name__} has none of the attention modules {', '.join(_SORTERS)}")
    for module in attentions.values():
        _check(module)
    return {path: _SORTERS[type(module).__name__](module) for path, module in attentions.items()}


def _check(attention: Any) -> None:
    """Raise ValueError if the attention has parts that the sorters do not know."""
    if hasattr(attention, "c_attn"):
        if attention.is_cross_attention or not is_conv1d(attention.c_attn):
            raise ValueError("GPT-2 is sorted without cross attention, and before its layers are replaced")
        return
    for name in ("q_proj", "k_proj"):
        if type(getattr(attention, name)) is not nn.Linear:
            raise ValueError(f"{name} is no torch.nn.Linear: sort the channels before the layers are replaced")
    rotary = getattr(attention.config, "rope_parameters", None) or {}
    if rotary.get("partial_rotary_factor", 1) != 1:
        raise ValueError("rotary embedding of a part of the channels is unknown to sort_key_channels")


def _sort_rotary(attention: Any) -> Tensor:
    """Sort an attention module with ``q_proj`` and ``k_proj`` and rotary embedding."""
    size, group = attention.head_dim, attention.num_key_value_groups
    heads = attention.k_proj.out_features // size
    squares = attention.k_proj.weight.double().square().sum(1).reshape(heads, 2, size // 2).sum(1)
    pairs = torch.sort(squares, dim=1, descending=True, stable=True).indices
    order = torch.stack([pairs, pairs + size // 2], 2).flatten(1)
    _reorder_rows(attention.k_proj, order)
    _reorder_rows(attention.q_proj, order.repeat_interleave(group, 0))
    file = sys.modules[type(attention).__module__]
    attention.eager_attention = file.eager_attention_forward
    attention.register_buffer("key_order", order)
    attention.__class__ = _sorted_class(attention.__class__)
    return order


def _reorder_rows(layer: nn.Linear, order: Tensor) -> None:
    """Reorder the outputs of each head of a linear layer."""
    rows = (order + torch.arange(len(order), device=order.device)[:, None] * order.shape[1]).flatten()
    layer.weight.copy_(layer.weight[rows])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[rows])


def _sort_gpt2(attention: Any) -> Tensor:
    """Sort the attention module of GPT-2, whose ``c_attn`` gives queries, keys and values one after the other."""
    heads, size, width = attention.num_heads, attention.head_dim, attention.embed_dim
    weight, bias = attention.c_attn.weight, attention.c_attn.bias
    squares = weight[:, width : 2 * width].double().square().sum(0).reshape(heads, size)
    order = torch.sort(squares, dim=1, descending=True, stable=True).indices
    columns = (order + torch.arange(heads, device=order.device)[:, None] * size).flatten()
    for first in (0, width):  # queries, then keys
        weight[:, first : first + width] = weight[:, first + columns]
        bias[first : first + width] = bias[first + columns]
    return order


_SORTERS: dict[str, Callable[[Any], Tensor]] = {
    "LlamaAttention": _sort_rotary,
    "MistralAttention": _sort_rotary,
    "Qwen2Attention": _sort_rotary,
    "GPT2Attention": _sort_gpt2,
}


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of an attention module whose heads have their own orders of channels."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    # (batch, tokens, d) becomes (batch, heads, tokens, d)
    cos, sin = (table[..., self.key_order].transpose(1, 2) for table in position_embeddings)
    key = _turned(key, cos, sin)
    group = self.num_key_value_groups
    query = _turned(query, cos.repeat_interleave(group, 1), sin.repeat_interleave(group, 1))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    output, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **({} if window is None else {"sliding_window": window}),
        **kwargs,
    )
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x``, of shape (batch, heads, tokens, d), which turns neighbours together."""
    first, second = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin


@cache
def _sorted_class(kind: type) -> type:
    """A subclass of an attention class, so that transformers still recognizes it, with the forward pass above."""
    return type(f"Sorted{kind.__name__}", (kind,), {"forward": _attend, "__module__": kind.__module__})
