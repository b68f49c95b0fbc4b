"""Hugging Face language models of the study, built from frozen configurations with a given seed.

Nothing is downloaded: weights are initialised here. The module handed to ``torch.compile`` maps tokens to the loss,
so that forward, loss and backward are one graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import require
from .data import VOCABULARY

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama; the defaults are the demo's (about 0.44 M parameters).

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream, a multiple of ``heads``.
        heads: attention heads, each with its own keys and values; the head dimension is ``hidden / heads``.
        mlp: width of the gated (SwiGLU) feed-forward layer.
        context: tokens per window.
        vocabulary: number of tokens; 256 for bytes.
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    mlp: int = 352
    context: int = 128
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden must be a multiple of 2 * heads (rotary embedding turns pairs), "
                f"got hidden={self.hidden}, heads={self.heads}"
            )


def llama(config: ModelConfig, *, seed: int) -> LlamaForCausalLM:
    """A float32 ``transformers.LlamaForCausalLM`` on the CPU; the weights depend on ``config`` and ``seed`` alone.

    Attention is ``torch.nn.functional.scaled_dot_product_attention``, there is no dropout and no key-value cache, and
    input and output embeddings are separate. Which module holds which matrix products: ``model.layers.*.self_attn``
    (four linears and the attention), ``model.layers.*.mlp`` (three linears), ``lm_head``. In transformers 5.23
    ``model.rotary_emb`` multiplies elementwise; versions that write its angles as ``inv_freq @ position_ids`` make
    that a product too, which a policy should name in ``skip`` (rounded positions are wrong positions).

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
    """
    transformers = require("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM._from_config(sizes, attn_implementation="sdpa")


class LanguageModel(nn.Module):
    """Tokens and targets to the mean cross-entropy in nats per token.

    Attributes:
        network: maps ``input_ids`` of shape (batch, context) to an output with ``logits`` of shape
            (batch, context, vocabulary), as Hugging Face's causal language models do.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a float32 scalar, of int64 ``inputs`` and ``targets`` of shape (batch, context)."""
        logits = self.network(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
