"""Language models of the study, built from frozen configurations with a given seed: Llama, GPT-2, or the user's own.

Nothing is downloaded: weights are initialised here. The module that ``torch.compile`` takes maps tokens to the loss, so
that forward, loss and backward are one graph.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.evaluate.load import built, errors_of_script, is_script, script_file, script_function
from fpsim.suggestions import did_you_mean

from . import require
from .choices import check_choice
from .data import VOCABULARY

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM

FAMILIES = ("llama", "qwen3", "gpt2", "script")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a language model; the defaults are the demo's Llama (about 0.44 M parameters).

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream, a multiple of ``heads``.
        heads: attention heads; the head dimension is ``hidden / heads``.
        mlp: width of the feed-forward layer, gated (SwiGLU) in a Llama and a Qwen3.
        context: tokens per window.
        vocabulary: number of tokens; 256 for bytes.
        family: ``llama``; ``qwen3``, a Llama that normalises queries and keys (QK normalisation); ``gpt2``; or
            ``script`` for the user's own model, which takes only context and vocabulary.
        kv_heads: heads of keys and values in a Llama or a Qwen3; None means one for each of ``heads``.
        tied: one matrix for the input and output embedding.
        norm_epsilon: added to the variance in norms; None is the library's own (1e-6 for Llama, 1e-5 for GPT-2).
        script: ``path/to/script.py:function`` that builds the user's own model (`from_script`).
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    mlp: int = 352
    context: int = 128
    vocabulary: int = VOCABULARY
    family: str = "llama"
    kv_heads: int | None = None
    tied: bool = False
    norm_epsilon: float | None = None
    script: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "norm_epsilon" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_choice("family", self.family, FAMILIES)
        if (self.script is None) == (self.family == "script"):
            raise ValueError("family 'script' and a script belong together: give both or neither")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden must be a multiple of 2 * heads (rotary embedding turns pairs), "
                f"got hidden={self.hidden}, heads={self.heads}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got heads={self.heads}, kv_heads={self.kv_heads}")

    @property
    def label(self) -> str:
        """Short form for tables."""
        if self.script:
            return self.script
        return f"{self.family}, {self.layers} layers of width {self.hidden}, context {self.context}"

    @property
    def size(self) -> str:
        """Layers and width, and whether queries and keys are normalised, to tell the models of one sweep apart."""
        return self.script or f"{self.layers} x {self.hidden}" + " with QK norm" * (self.family == "qwen3")


#: Models by name: the demo's, one for experiments of minutes, and the paper's (GPT-2 as nanoGPT has it, but with
#: biases; the two Llamas as TinyLlama's ``tiny_LLaMA_120M`` and Llama 2 have them).
MODELS = {
    "tiny": ModelConfig(),
    "toy": ModelConfig(layers=1, hidden=32, heads=2, mlp=88, context=32),
    "gpt2-124m": ModelConfig(12, 768, 12, 3072, 1024, 50257, family="gpt2", tied=True),
    "llama-120m": ModelConfig(12, 768, 12, 2048, 2048, 32000, kv_heads=1, norm_epsilon=1e-5),
    "llama2-7b": ModelConfig(32, 4096, 32, 11008, 4096, 32000, norm_epsilon=1e-5),
}


def model_config(name: str) -> ModelConfig:
    """The configuration that ``name`` stands for: one of `MODELS`, or ``path/to/script.py:function``.

    Raises:
        ValueError: neither, or a script without a function.
        FileNotFoundError: no such script.

    >>> model_config("llama-120m").kv_heads
    1
    """
    if name in MODELS:
        return MODELS[name]
    if is_script(name):
        script_file(name)
        return ModelConfig(family="script", script=name)
    raise ValueError(
        f"unknown model {name!r}{did_you_mean(name, MODELS)}: "
        f"use one of {', '.join(MODELS)}, or path/to/script.py:function for your own"
    )


def build(config: ModelConfig, *, seed: int) -> nn.Module:
    """The float32 network of ``config`` on the CPU: tokens, shape (batch, context), to logits or an object with them.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
        ValueError, TypeError: as `from_script`.
    """
    if config.family == "script":
        return from_script(config, seed=seed)
    return {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}[config.family](config, seed=seed)


def from_script(config: ModelConfig, *, seed: int) -> nn.Module:
    """The user's own model: what the function named in ``config.script`` returns.

    The function is called after `torch.manual_seed`, with ``vocabulary`` and ``context`` if it has these parameters.
    The script is executed once per process, as a module named after its place and content: Dynamo looks up the module
    of a function by name.

    Raises:
        FileNotFoundError: no such script.
        ValueError: the script has no such function (those it has are listed), it needs other arguments, or it returns
            no `nn.Module` or a compiled one, or the script raises an error.
    """
    script = config.script or ""
    known = {"vocabulary": config.vocabulary, "context": config.context}
    return built(script, script_function(script)[1], known, seed)


def check_script(config: ModelConfig, *, batch: int, device: str, dtype: torch.dtype) -> None:
    """Build the user's own model and run it once forward, if ``config`` names a script.

    Where ``device`` is on other machines alone, the model is built and not run.

    Args:
        batch: the number of windows.
        dtype: of the weights.

    Raises:
        FileNotFoundError, ValueError: as `from_script`, or the module does not map tokens to logits of the vocabulary.
    """
    if config.script is None:
        return
    network = from_script(config, seed=0)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return
    shape = (batch, config.context)
    tokens = (torch.arange(batch * config.context) % config.vocabulary).flip(0).view(shape)
    told = f"on tokens of shape {shape} below {config.vocabulary}"
    with torch.no_grad(), torch.random.fork_rng(), errors_of_script(config.script, told):
        output = network.to(device, dtype)(tokens.to(device))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the module of {config.script} must return logits, or an object with .logits: it returns "
            f"{type(output).__name__}"
        )
    if logits.shape[:2] != shape or logits.dim() != 3 or logits.shape[2] < config.vocabulary:
        raise ValueError(
            f"the module of {config.script} must map tokens of shape {shape} to logits of shape "
            f"{(*shape, config.vocabulary)}: it returns shape {tuple(logits.shape)}"
        )


def llama(config: ModelConfig, *, seed: int) -> LlamaForCausalLM:
    """A float32 ``transformers.LlamaForCausalLM`` on the CPU; the weights depend on ``config`` and ``seed`` alone.

    Attention is ``torch.nn.functional.scaled_dot_product_attention``, there is no dropout and no key-value cache, and
    input and output embeddings are separate. The modules that hold matrix products are ``model.layers.*.self_attn``
    (four linears and the attention), ``model.layers.*.mlp`` (three linears), ``lm_head``. In transformers 5.23
    ``model.rotary_emb`` multiplies elementwise. Versions that compute its angles as ``inv_freq @ position_ids`` have a
    matrix product there too, which a policy should name in ``skip`` (rounded positions are wrong positions).

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
    """
    transformers = require("transformers")
    return _initialised(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_llama_sizes(config)), seed)


def qwen3(config: ModelConfig, *, seed: int) -> Qwen3ForCausalLM:
    """A float32 ``transformers.Qwen3ForCausalLM`` on the CPU: the Llama of `llama` with QK normalisation.

    An RMS norm with learned gains acts on each head's queries and on its keys, before the rotary embedding
    (``self_attn.q_norm``, ``self_attn.k_norm``). All other weights have the values that they have in `llama`.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
    """
    transformers = require("transformers")
    sizes = transformers.Qwen3Config(**_llama_sizes(config), head_dim=config.hidden // config.heads)
    return _initialised(transformers.Qwen3ForCausalLM, sizes, seed)


def _llama_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        **_shared(config, "rms_norm_eps"),
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "max_position_embeddings": config.context,
        "attention_dropout": 0.0,
    }


def gpt2(config: ModelConfig, *, seed: int) -> GPT2LMHeadModel:
    """A float32 ``transformers.GPT2LMHeadModel`` on the CPU without dropout; attention and caches as in `llama`.

    Initialised as nanoGPT: normal with standard deviation 0.02, projections into the residual stream divided by the
    square root of twice the layers. Unlike nanoGPT's default it has biases.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
    """
    transformers = require("transformers")
    sizes = transformers.GPT2Config(
        **_shared(config, "layer_norm_epsilon"),
        n_embd=config.hidden,
        n_inner=config.mlp,
        n_layer=config.layers,
        n_head=config.heads,
        n_positions=config.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _initialised(transformers.GPT2LMHeadModel, sizes, seed)


def _shared(config: ModelConfig, epsilon: str) -> dict[str, Any]:
    """What a configuration of transformers takes for every family; ``epsilon`` is the family's name of that field."""
    shared: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return shared if config.norm_epsilon is None else {**shared, epsilon: config.norm_epsilon}


def _initialised(kind: Any, sizes: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind._from_config(sizes, attn_implementation="sdpa")


class LanguageModel(nn.Module):
    """Tokens and targets to the mean cross-entropy in nats per token.

    With a ``z_loss`` the value is the same, and the derivatives are those of the cross-entropy plus ``z_loss`` times
    the mean of log(sum(exp(logits)))^2 over tokens, which keeps output logits from drifting (PaLM, arXiv 2204.02311).

    Attributes:
        network: maps tokens of shape (batch, context) to logits of shape (batch, context, vocabulary), or to an
            output with ``logits``, as Hugging Face's causal language models do (these are called without a cache).
    """

    def __init__(self, network: nn.Module, z_loss: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.z_loss = z_loss
        self._options = {"use_cache": False} if _takes(network, "use_cache") else {}

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a float32 scalar, of int64 ``inputs`` and ``targets`` of shape (batch, context)."""
        return self.loss(self.logits(inputs), targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`mean_cross_entropy`, with the derivatives of the z-loss too."""
        found = mean_cross_entropy(logits, targets)
        if not self.z_loss:
            return found
        penalty = self.z_loss * logits.logsumexp(-1).square().mean()
        return found + (penalty - penalty.detach())

    def logits(self, inputs: Tensor) -> Tensor:
        """The network's logits in float32, shape (batch, context, vocabulary)."""
        output = self.network(inputs, **self._options)
        return (output if isinstance(output, Tensor) else output.logits).float()


class LossAndLogits(LanguageModel):
    """`LanguageModel` that also returns the logits of each window's last token, for `fpsim.sharpness`.

    They are an output of the graph that trains, so that measuring them costs no second forward pass.
    """

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The loss, and logits of shape (batch, vocabulary) without derivative, in memory that backward never uses."""
        logits = self.logits(inputs)
        return self.loss(logits, targets), logits[:, -1].detach().clone()


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of ``logits`` (batch, context, vocabulary) and int64 ``targets`` (batch, context).

    A scalar, in nats per token.
    """
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _takes(network: nn.Module, name: str) -> bool:
    return name in inspect.signature(network.forward).parameters
