"""The cache of keys and values against attention that is written out by hand, and sorted channels of keys."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fpsim.posttraining import RoundedCache, round_attention, sort_key_channels
from fpsim.posttraining.cache import RoundedLayer
from fpsim.posttraining.key_value_casts import token_rounding
from tests.shared.plain_numbers import blocks

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 32
PROMPT, STEPS = 6, 6


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, initializer_range=0.5, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def prompt() -> Tensor:
    return torch.randint(0, 32, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def generate(model: Any, cache: Any = None, steps: int = STEPS) -> Any:
    return model.generate(
        prompt(), attention_mask=torch.ones(2, PROMPT), past_key_values=cache, max_new_tokens=steps,
        min_new_tokens=steps, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def rounded(x: np.ndarray, along: str, bits: int, complete: int) -> np.ndarray:
    """Blocks of 4 channels, or of 4 tokens as far as they were complete when there were ``complete`` tokens."""
    if along == "head_dim":
        return blocks(x, 4, bits)
    last = complete // 4 * 4
    return np.concatenate([blocks(x[..., :last, :], 4, bits, axis=-2), x[..., last:, :]], -2)


def by_hand(model: Any, tokens: Tensor, start: int, along: str, exact: bool) -> Tensor:
    """The logits of the last of some tokens, when those from ``start`` on came in this step."""
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = model.model.embed_tokens(tokens)
        x = layer.input_layernorm(hidden).numpy()
        weights = {name: getattr(layer.self_attn, f"{name}_proj").weight.numpy() for name in "qkv"}
        q, k, v = ((x @ weights[name].T).reshape(2, len(x[0]), -1, SIZE).swapaxes(1, 2) for name in "qkv")
        angles = np.arange(len(x[0]), dtype=np.float32)[:, None] / np.float32(10000.0) ** (
            np.arange(0, SIZE, 2, dtype=np.float32) / np.float32(SIZE)
        )
        turn = torch.exp(1j * torch.from_numpy(angles)).numpy().astype(np.complex64)
        half = SIZE // 2

        def rope(y: np.ndarray) -> np.ndarray:
            z = (y[..., :half] + 1j * y[..., half:]) * turn.astype(np.complex128)
            return np.concatenate([z.real, z.imag], -1)

        q, k = rope(q), rope(k)
        if exact:  # the step's own tokens are read as they are, earlier ones as they were stored then
            k, v = (
                np.concatenate([rounded(y, along, bits, start)[..., :start, :], y[..., start:, :]], -2)
                for y, bits in ((k, 4), (v, 5))
            )
        else:
            k, v = (rounded(y, along, bits, len(x[0])) for y, bits in ((k, 4), (v, 5)))
        output = np.zeros((2, len(x[0]), HEADS, SIZE))
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head // 2].swapaxes(1, 2) / np.sqrt(SIZE)
            scores = np.where(np.tril(np.ones(scores.shape[1:])), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            output[:, :, head] = (p / p.sum(-1, keepdims=True)) @ v[:, head // 2]
        hidden = hidden + layer.self_attn.o_proj(torch.from_numpy(output.reshape(2, len(x[0]), WIDTH)))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.lm_head(model.model.norm(hidden[:, -1]))


@pytest.mark.parametrize("current", ["rounded", "exact"])
@pytest.mark.parametrize("along", ["head_dim", "tokens"])
def test_every_step_of_generate_reads_the_rounded_cache(along: str, current: str) -> None:
    model = llama()
    cache = RoundedCache("int4/block:4", "int5/block:4", along=along, current=current, config=model.config)
    result = generate(model, cache)
    tokens = result.sequences
    assert tokens.shape == (2, PROMPT + STEPS)
    for step, logits in enumerate(result.logits):
        length = PROMPT + step
        start = 0 if step == 0 else length - 1
        want = by_hand(model, tokens[:, :length], start, along, current == "exact")
        # cosines and sines are float32 numbers
        torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-5)


def test_the_formats_matter_in_these_tests() -> None:
    model = llama()
    plain, coarse = generate(model).logits[0], generate(model, RoundedCache("int4/block:4", None)).logits[0]
    assert (plain - coarse).abs().max() > 1e-3


@pytest.mark.parametrize("model", [llama, gpt2, lambda: llama(attn_implementation="eager")])
@pytest.mark.parametrize("along", ["head_dim", "tokens"])
def test_attention_that_rounds_what_it_reads_has_the_bits_of_the_cache(model: Any, along: str) -> None:
    plain, rounding = model(), model()
    round_attention(rounding, key="int4/block:4", value="int8/block:4", along=along)
    want = generate(plain, RoundedCache("int4/block:4", "int8/block:4", along=along, config=plain.config))
    got = generate(rounding)
    assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, got.logits, want.logits))
    with pytest.raises(ValueError, match="rounded already"):
        round_attention(rounding, key="int8")


def test_other_models_of_the_configuration_keep_their_attention() -> None:
    model = llama()
    rounding = type(model)(model.config)
    round_attention(rounding, key="e4m3fn")
    assert model.config._attn_implementation == "sdpa" and rounding.config._attn_implementation.startswith("fpsim")


def test_compiled_attention_rounds_in_one_graph() -> None:
    """The format without a scale, whose name is made of parts."""
    model = llama()
    round_attention(model, "e4m3fn", "int8/row", "int4/block:2", values_along="tokens")
    want = model(prompt(), use_cache=False).logits
    compiled = torch.compile(model, backend="fpsim_eager", options={"format": "fp64"}, fullgraph=True)
    torch.testing.assert_close(compiled(prompt(), use_cache=False).logits, want, rtol=1e-12, atol=1e-12)


def test_queries_are_rounded_too() -> None:
    model = gpt2()
    round_attention(model, query="int4/block:4")
    ids = prompt()
    seen = []
    hook = model.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids)
    hook.remove()
    query, key, value = (x.view(2, PROMPT, HEADS, SIZE).transpose(1, 2).detach() for x in seen[0].split(WIDTH, -1))
    query = torch.from_numpy(blocks(query.numpy(), 4, 4))
    want = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    outputs = []
    hook = model.transformer.h[0].attn.c_proj.register_forward_hook(
        lambda module, args, output: outputs.append(args[0])
    )
    model(ids)
    hook.remove()
    torch.testing.assert_close(outputs[0].view(2, PROMPT, HEADS, SIZE).transpose(1, 2), want)


def test_a_compiled_model_generates_the_same() -> None:
    plain, compiled = llama(), llama()
    compiled.compile(backend="fpsim_eager", options={"format": "fp64"})
    caches = [RoundedCache("int4/block:4", "int5/row", config=plain.config) for _ in range(2)]
    want, got = generate(plain, caches[0], 2), generate(compiled, caches[1], 2)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(caches[1].layers[0].keys, caches[0].layers[0].keys, rtol=1e-12, atol=1e-12)


def test_compiled_blocks_of_tokens_are_the_same() -> None:
    """Before and at the end of a block, and behind it."""
    roundings = token_rounding("tokens", "int4/block:4"), token_rounding("tokens", "int5/block:2")
    layers = [RoundedLayer(roundings, "rounded") for _ in range(2)]

    def step(layer: Any, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = layer.update(keys, values)
        return keys.transpose(-1, -2) @ values

    compiled = torch.compile(step, backend="fpsim_eager", options={"format": "fp32"}, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for count in (3, 1, 1):
        keys, values = (torch.randint(-40, 40, (1, 1, count, 4), generator=generator).float() for _ in "kv")
        step(layers[0], keys, values)
        compiled(layers[1], keys, values)
        assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)


def test_sliding_windows_and_cropping() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, sliding_window=5, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).double().eval()
    rounding = copy.deepcopy(model)
    round_attention(rounding, key="int4/block:4", value="e4m3fn")
    got = generate(model, RoundedCache("int4/block:4", "e4m3fn", config=config))
    want = generate(rounding)
    assert all(map(torch.equal, got.logits, want.logits))
    exact = generate(model, RoundedCache("int4/block:4", "e4m3fn", config=config, current="exact"))
    assert torch.equal(exact.logits[0], generate(model).logits[0])
    assert not torch.equal(exact.logits[1], generate(model).logits[1])
    with pytest.raises(ValueError, match="a sliding window drops tokens"):
        RoundedCache("int4/block:4", None, along="tokens", config=config)
    with pytest.raises(ValueError, match="a sliding window drops tokens"):
        round_attention(copy.deepcopy(model), key="int4/block:4", along="tokens")
    cache = RoundedCache("int4/block:4", None, along="tokens")
    llama()(prompt(), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot give up tokens"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("int8/tensor", None), {}, "shared between tokens"),
        (("nvfp4", None), {}, "shared between tokens"),
        (("int8/group:32", None), {}, "shared between tokens"),
        ((None, "e4m3fn"), {"along": "tokens"}, "belong to blocks of tokens"),
        ((None, "int4/row"), {"along": "tokens"}, "belong to blocks of tokens"),
        (("e4m3fn/stochastic", None), {}, "nearest values"),
        (("int8", None), {"along": "channels"}, "head_dim, tokens"),
        (("int8", None), {"current": "both"}, "rounded, exact"),
    ],
)
def test_formats_that_cannot_round_a_cache_are_named(arguments: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoundedCache(*arguments, **changes)


class TestSortedKeys:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
    def test_the_model_computes_the_same(self, kind: str, implementation: str) -> None:
        torch.manual_seed(0)
        window = {"sliding_window": 5} if kind == "Mistral" else {}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, initializer_range=0.5, attn_implementation=implementation, **window,
        )  # fmt: skip
        model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
        want = generate(model)
        names = set(dict(model.named_parameters()))
        order = sort_key_channels(model)
        got = generate(model)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)  # norms are float32
        assert set(dict(model.named_parameters())) == names and next(iter(order)) == "model.layers.0.self_attn"
        with pytest.raises(ValueError, match="sorted once"):
            sort_key_channels(model)

    def test_channels_are_sorted_per_head_and_pairs_stay_together(self) -> None:
        model, plain = llama(), llama()
        (order,) = sort_key_channels(model).values()
        weight = plain.model.layers[0].self_attn.k_proj.weight.detach().numpy().reshape(GROUPS, SIZE, WIDTH)
        for head in range(GROUPS):
            squares = (weight[head] ** 2).sum(1)
            pairs = np.argsort(-(squares[:4] + squares[4:]), kind="stable")
            assert order[head].tolist() == [channel for pair in pairs for channel in (pair, pair + 4)]
        caches = [RoundedCache("e4m3fn", None) for _ in range(2)]
        for each, cache in zip((plain, model), caches, strict=True):
            each(prompt(), past_key_values=cache)
        before, after = (cache.layers[0].keys for cache in caches)
        for head in range(GROUPS):
            assert torch.equal(after[:, head], before[:, head][..., order[head]])

    def test_gpt2_is_sorted_in_its_fused_projection(self) -> None:
        model, plain = gpt2(), gpt2()
        order = sort_key_channels(model)["transformer.h.1.attn"]
        weight = plain.transformer.h[1].attn.c_attn.weight.detach()[:, WIDTH : 2 * WIDTH]
        norms = weight.square().sum(0).view(HEADS, SIZE)
        assert torch.equal(order, norms.argsort(dim=1, descending=True))
        torch.testing.assert_close(model(prompt()).logits, plain(prompt()).logits, rtol=1e-12, atol=1e-12)

    def test_other_models_are_named(self) -> None:
        with pytest.raises(ValueError, match="none of the attention modules"):
            sort_key_channels(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="self_attn is a MultiheadAttention"):
            sort_key_channels(nn.TransformerEncoderLayer(8, 2, 8))
