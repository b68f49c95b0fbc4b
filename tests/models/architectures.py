"""Tiny models of real architectures, and the number of operands of matrix products that each must have.

Some models are code of transformers, built from a configuration; the others are written here with `torch.nn`. Weights
and inputs come from a fixed seed, and nothing is downloaded. Every model maps its inputs to a loss, so that forward,
loss and backward can be one graph. The operands are counted by hand from the architecture, to check `fpsim.explain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY, CLASSES = 2, 12, 64, 10
LAYERS, WIDTH, HEADS, INNER = 2, 32, 2, 64
PIXELS, PATCH = 16, 4
MEL_BINS = 8
OBJECTS, QUERIES = 3, 6
TIMES = 50

#: Operands of a linear layer or a convolution: two in each of fprop, dgrad and wgrad.
LINEAR = 6
#: Operands of such a layer whose input needs no gradient: it has no dgrad.
FIRST = 4
#: Operands of a product of two activations: fprop, and a gradient for each of the two.
INNER_PRODUCT = 6
#: Attention: queries with keys, probabilities with values.
ATTENTION = 2 * INNER_PRODUCT

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: its name on the command line and in the table.
        create: makes the model, which maps the inputs, as keyword arguments, to the loss.
        inputs: makes the inputs.
        operands: the number of operands of all its matrix products, forward and backward, counted by hand.
        note: why its row is not clean; empty if it is.
    """

    name: str
    create: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    operands: int
    note: str = ""

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model, in training mode and without dropout, and its inputs; both are the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.create().train(), self.inputs()


# -- models of transformers --------------------------------------------------------------------------------------------


class OutputLoss(nn.Module):
    """A model of transformers as a function that returns the loss that the model computes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs).loss


class Detector(nn.Module):
    """DETR as a function of tensors: transformers wants the objects of each image as a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(classes, boxes, strict=True)]
        return self.network(pixel_values=pixel_values, labels=labels).loss


def detector() -> nn.Module:
    """A DETR with a ResNet of two basic blocks as its backbone."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        num_queries=QUERIES,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        d_model=WIDTH,
        dropout=0.0,
        num_labels=CLASSES,
    )
    return Detector(transformers.DetrForObjectDetection(config))


def pretrained(class_name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A function that builds a model of transformers with these sizes, random weights and no dropout."""

    def create() -> nn.Module:
        model_class = getattr(transformers, class_name)
        config = model_class.config_class(**sizes)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        return OutputLoss(model_class(config))

    return create


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))


def text() -> Inputs:
    """Tokens that are their own labels: causal models shift the labels, masked models learn to copy."""
    inputs = tokens()
    return {"input_ids": inputs, "labels": inputs}


def translation() -> Inputs:
    return {"input_ids": tokens(), "labels": tokens()}


def images() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, PIXELS, PIXELS), "labels": torch.randint(CLASSES, (BATCH,))}


def detections() -> Inputs:
    """Images, and the class and the box (centre, width, height) of three objects in each."""
    centres, sizes = 0.3 + 0.4 * torch.rand(BATCH, OBJECTS, 2), 0.1 + 0.4 * torch.rand(BATCH, OBJECTS, 2)
    return {
        "pixel_values": torch.randn(BATCH, 3, 2 * PIXELS, 2 * PIXELS),
        "classes": torch.randint(CLASSES, (BATCH, OBJECTS)),
        "boxes": torch.cat([centres, sizes], dim=2),
    }


def speech() -> Inputs:
    return {"input_features": torch.randn(BATCH, MEL_BINS, 2 * LENGTH), "labels": tokens()}


# -- a model of diffusers ----------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A model of diffusers as a function that returns the mean squared error of the noise that it predicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor, noise: Tensor, **conditions: Tensor) -> Tensor:
        return F.mse_loss(self.network(noisy, **conditions).sample, noise)


def dit() -> nn.Module:
    """A diffusion transformer, without the random dropout of class labels."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=3,
        num_layers=LAYERS,
        norm_num_groups=4,
        sample_size=PIXELS,
        patch_size=PATCH,
        num_embeds_ada_norm=TIMES,
    )
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return Denoiser(network)


def noisy_classes() -> Inputs:
    """Noisy images, their noise, and the time and class of each."""
    shape = (BATCH, 3, PIXELS, PIXELS)
    return {
        "noisy": torch.randn(shape),
        "noise": torch.randn(shape),
        "timestep": torch.randint(TIMES, (BATCH,)),
        "class_labels": torch.randint(TIMES, (BATCH,)),
    }


#: The sizes of a language model, by the names that most configurations use.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**DECODER, "num_key_value_heads": 1, "head_dim": WIDTH // HEADS}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": LENGTH // 2}
DEEPSEEK = {
    **DECODER,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
IMAGES = {
    "image_size": PIXELS,
    "num_channels": 3,
    "num_labels": CLASSES,
    # If it is not set, transformers sets it in the first call, and the second call compiles again.
    "problem_type": "single_label_classification",
}


# -- models of torch.nn ------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The cross-entropy of the predictions of a network for images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(pixel_values), labels)


class Residual(nn.Module):
    """The basic block of a ResNet: two convolutions with batch normalisation, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A ResNet of two basic blocks; the second one halves the size of the image."""
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = (Residual(8, 8, 1), Residual(8, 16, 2))
    return Classifier(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)))


class PixelAttention(nn.Module):
    """Self-attention between the pixels of an image, as in the middle of a diffusion model's U-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unsqueeze(1).transpose(2, 3).chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """A U-Net that predicts the noise in images: a strided convolution, attention, a transposed convolution, a skip."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.attention = PixelAttention(2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        high = F.silu(self.enter(pixels + noise))
        low = self.attention(F.silu(self.down(high)))
        return F.mse_loss(self.leave(torch.cat([high, F.silu(self.up(low))], dim=1)), noise)


def noisy_images() -> Inputs:
    shape = (BATCH, 3, PIXELS, PIXELS)
    return {"pixels": torch.randn(shape), "noise": torch.randn(shape)}


class Recurrent(nn.Module):
    """A recurrent language model: an LSTM cell applied token by token, or a whole layer."""

    def __init__(self, kind: type[nn.LSTMCell] | type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.recurrence = kind(WIDTH, WIDTH) if kind is nn.LSTMCell else kind(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self._states(self.embedding(input_ids)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def _states(self, x: Tensor) -> Tensor:
        if isinstance(self.recurrence, nn.RNNBase):
            return self.recurrence(x)[0]
        states, state = [], None
        for step in range(LENGTH):
            state = self.recurrence(x[:, step], state)
            states.append(state[0])
        return torch.stack(states, dim=1)


class MixerBlock(nn.Module):
    """One small network mixes patches, and another one mixes channels."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.patches = nn.Sequential(nn.Linear(patches, INNER), nn.GELU(), nn.Linear(INNER, patches))
        self.channels = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    """An MLP-Mixer that cuts its patches by reshaping, so that it has only linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.blocks = nn.Sequential(*(MixerBlock((PIXELS // PATCH) ** 2) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(patches.flatten(1, 2).flatten(2))
        return self.head(self.norm(self.blocks(x)).mean(1))


#: Why a mixture of experts is refused.
EXPERTS_NOTE = (
    "transformers computes the experts' products in an operator of its own, which no backend can inspect; "
    "`experts_implementation='batched_mm'` in the configuration avoids it"
)

# -- the table ---------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        # q, k, v, o, gate, up, down, and attention; the head
        Architecture(
            "llama",
            pretrained("LlamaForCausalLM", **GROUPED),
            text,
            LAYERS * (7 * LINEAR + ATTENTION) + LINEAR,
        ),
        # q, k and v together, o, up, down
        Architecture(
            "gpt2",
            pretrained(
                "GPT2LMHeadModel",
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=LENGTH,
                bos_token_id=0,
                eos_token_id=0,
            ),
            text,
            LAYERS * (4 * LINEAR + ATTENTION) + LINEAR,
            "transformers warns that this model names no loss function, and the call of the logger breaks the graph; "
            "the operands before and after the break are rounded; `model.loss_type = 'ForCausalLM'` avoids the break",
        ),
        Architecture(
            "qwen3",
            pretrained("Qwen3ForCausalLM", **GROUPED),
            text,
            LAYERS * (7 * LINEAR + ATTENTION) + LINEAR,
        ),
        # q, k, v, o; the router; for all experts together, gate with up, and down
        Architecture(
            "mixtral",
            pretrained("MixtralForCausalLM", **EXPERTS),
            text,
            LAYERS * (7 * LINEAR + ATTENTION) + LINEAR,
            EXPERTS_NOTE,
        ),
        Architecture(
            "mixtral-batched",
            pretrained("MixtralForCausalLM", **EXPERTS, experts_implementation="batched_mm"),
            text,
            LAYERS * (7 * LINEAR + ATTENTION) + LINEAR,
        ),
        # q, and k with v, in two steps each, and o; a layer with gate, up and down, and one with experts as above, and
        # the three layers of the shared expert
        Architecture(
            "deepseek-v3",
            pretrained("DeepseekV3ForCausalLM", **DEEPSEEK),
            text,
            LAYERS * (5 * LINEAR + ATTENTION) + 3 * LINEAR + 6 * LINEAR + LINEAR,
            EXPERTS_NOTE,
        ),
        Architecture(
            "deepseek-v3-batched",
            pretrained("DeepseekV3ForCausalLM", **DEEPSEEK, experts_implementation="batched_mm"),
            text,
            LAYERS * (5 * LINEAR + ATTENTION) + 3 * LINEAR + 6 * LINEAR + LINEAR,
        ),
        Architecture(
            "gemma3",
            pretrained(
                "Gemma3ForCausalLM",
                **GROUPED,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
            ),
            text,
            LAYERS * (7 * LINEAR + ATTENTION) + LINEAR,
        ),
        # q, k, v, o, up, down
        Architecture(
            "phi",
            pretrained("PhiForCausalLM", **DECODER),
            text,
            LAYERS * (6 * LINEAR + ATTENTION) + LINEAR,
        ),
        Architecture(
            "opt",
            pretrained("OPTForCausalLM", **DECODER, ffn_dim=INNER, word_embed_proj_dim=WIDTH),
            text,
            LAYERS * (6 * LINEAR + ATTENTION) + LINEAR,
        ),
        # q, k and v together, o, up, down
        Architecture(
            "gpt-neox",
            pretrained("GPTNeoXForCausalLM", **DECODER),
            text,
            LAYERS * (4 * LINEAR + ATTENTION) + LINEAR,
        ),
        # the head is two layers
        Architecture(
            "bert",
            pretrained("BertForMaskedLM", **DECODER),
            text,
            LAYERS * (6 * LINEAR + ATTENTION) + 2 * LINEAR,
        ),
        Architecture(
            "distilbert",
            pretrained(
                "DistilBertForMaskedLM",
                vocab_size=VOCABULARY,
                dim=WIDTH,
                hidden_dim=INNER,
                n_layers=LAYERS,
                n_heads=HEADS,
                max_position_embeddings=LENGTH,
            ),
            text,
            LAYERS * (6 * LINEAR + ATTENTION) + 2 * LINEAR,
        ),
        # q, k and v together, o, gate with up, down; the head is two layers
        Architecture(
            "modernbert",
            pretrained("ModernBertForMaskedLM", **DECODER, cls_token_id=0, sep_token_id=0, local_attention=4),
            text,
            LAYERS * (4 * LINEAR + ATTENTION) + 2 * LINEAR,
        ),
        # also keys and queries of relative positions, and products of content and position in both directions
        Architecture(
            "deberta-v2",
            pretrained(
                "DebertaV2ForMaskedLM",
                **DECODER,
                relative_attention=True,
                position_buckets=4,
                pos_att_type=["c2p", "p2c"],
                share_att_key=True,
            ),
            text,
            LAYERS * (8 * LINEAR + 4 * INNER_PRODUCT) + 2 * LINEAR,
        ),
        # the decoder attends twice
        Architecture(
            "t5",
            pretrained(
                "T5ForConditionalGeneration",
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=WIDTH // HEADS,
                d_ff=INNER,
                num_layers=LAYERS,
                num_heads=HEADS,
                decoder_start_token_id=0,
            ),
            translation,
            LAYERS * ((6 + 10) * LINEAR + 3 * ATTENTION) + LINEAR,
        ),
        # two convolutions before the encoder
        Architecture(
            "whisper",
            pretrained(
                "WhisperForConditionalGeneration",
                vocab_size=VOCABULARY,
                num_mel_bins=MEL_BINS,
                d_model=WIDTH,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=INNER,
                decoder_ffn_dim=INNER,
                max_source_positions=LENGTH,
                max_target_positions=LENGTH,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
                decoder_start_token_id=0,
            ),
            speech,
            FIRST + LINEAR + LAYERS * ((6 + 10) * LINEAR + 3 * ATTENTION) + LINEAR,
        ),
        # in, a convolution, x, dt, out; a product of states and read-outs
        Architecture(
            "mamba",
            pretrained("MambaForCausalLM", **MAMBA),
            text,
            LAYERS * (5 * LINEAR + INNER_PRODUCT) + LINEAR,
        ),
        # one product of states and read-outs per token
        Architecture(
            "mamba-sequential",
            pretrained("MambaForCausalLM", **MAMBA, use_associative_scan=False),
            text,
            LAYERS * (5 * LINEAR + LENGTH * INNER_PRODUCT) + LINEAR,
        ),
        # in, a convolution, out; products of read-outs with inputs, within chunks, for the states of chunks, across
        # chunks, and of read-outs with states
        Architecture(
            "mamba2",
            pretrained("Mamba2ForCausalLM", **MAMBA2),
            text,
            LAYERS * (3 * LINEAR + 5 * INNER_PRODUCT) + LINEAR,
        ),
        # attention and mamba2 side by side; gate, up, down
        Architecture(
            "falcon-h1",
            pretrained(
                "FalconH1ForCausalLM",
                **GROUPED,
                mamba_d_ssm=INNER,
                mamba_n_heads=4,
                mamba_d_head=16,
                mamba_n_groups=1,
                mamba_d_state=4,
                mamba_chunk_size=LENGTH // 2,
            ),
            text,
            LAYERS * (4 * LINEAR + ATTENTION + 3 * LINEAR + 5 * INNER_PRODUCT + 3 * LINEAR) + LINEAR,
        ),
        # time mixing: key, value, receptance, output; channel mixing: key, receptance, value
        Architecture(
            "rwkv",
            pretrained(
                "RwkvForCausalLM",
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                context_length=LENGTH,
                bos_token_id=0,
                eos_token_id=0,
            ),
            text,
            LAYERS * 7 * LINEAR + LINEAR,
        ),
        # a convolution cuts the patches
        Architecture(
            "vit",
            pretrained(
                "ViTForImageClassification",
                **IMAGES,
                patch_size=PATCH,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
            ),
            images,
            FIRST + LAYERS * (6 * LINEAR + ATTENTION) + LINEAR,
        ),
        # the stem, a convolution between the stages, and in each a depthwise convolution and two linear layers
        Architecture(
            "convnext",
            pretrained(
                "ConvNextForImageClassification",
                **IMAGES,
                num_stages=2,
                hidden_sizes=[8, 16],
                depths=[1, 1],
            ),
            images,
            FIRST + LINEAR + 2 * 3 * LINEAR + LINEAR,
        ),
        # the stem, two convolutions per block, one shortcut, the head
        Architecture("resnet", resnet, images, FIRST + 2 * 2 * LINEAR + LINEAR + LINEAR),
        # in, down, q, k and v together, o, up, out
        Architecture("unet", UNet, noisy_images, FIRST + 5 * LINEAR + ATTENTION),
        # a backbone of six frozen convolutions has fprop only; its projection; the encoder; the decoder, which attends
        # twice and whose first values are constants without dgrad; a layer for classes and three for boxes
        Architecture(
            "detr",
            detector,
            detections,
            6 * 2 + FIRST + LAYERS * ((6 + 10) * LINEAR + 3 * ATTENTION) - 2 + 4 * LINEAR,
            "scipy matches objects with predictions, which breaks the graph",
        ),
        # patches; in each block two layers for the time, the first of which has no dgrad, one for scales and shifts, q,
        # k, v, o, up, down; the two layers for the time again, scales and shifts, out
        Architecture(
            "dit",
            dit,
            noisy_classes,
            FIRST + LAYERS * (FIRST + 8 * LINEAR + ATTENTION) + FIRST + 3 * LINEAR,
        ),
        # reshaping cuts the patches
        Architecture("mixer", lambda: Classifier(Mixer()), images, FIRST + LAYERS * 4 * LINEAR + LINEAR),
        # per token a product with the input and one with the state, which is constant for the first token; the head
        Architecture("lstm-cell", lambda: Recurrent(nn.LSTMCell), text, LENGTH * 2 * LINEAR - 2 + LINEAR),
        # one product with the inputs of all steps, and one with the state per step; the head
        Architecture("lstm", lambda: Recurrent(nn.LSTM), text, LINEAR + LENGTH * LINEAR - 2 + LINEAR),
        Architecture("gru", lambda: Recurrent(nn.GRU), text, LINEAR + LENGTH * LINEAR - 2 + LINEAR),
    )
}
