"""The recipes after training: what each does to a model, against the same steps written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fpsim
from fpsim import posttraining, recipes


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def ids(seed: int = 1) -> Tensor:
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(2)}, {"input_ids": ids(3)}]


MODELS = pytest.mark.parametrize("make", [llama, gpt2])


def logits(model: nn.Module) -> Tensor:
    return model(ids()).logits


class TestWeights:
    @MODELS
    def test_zeroquant_fp_rounds_weights_by_gptq_and_activations_per_token(self, make: Callable[[], Any]) -> None:
        by_hand = make()
        posttraining.round_weights(
            by_hand, "e2m1fn/block:16", batches(), skip="lm_head", rank=2, factors="int8",
            constraint=lambda ratios: posttraining.power_of_two_ratios(ratios, 4),
        )  # fmt: skip
        weights = {name: parameter.clone() for name, parameter in by_hand.named_parameters()}

        def round_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (fpsim.round(args[0], "e4m3fn/row"),)

        for layer in posttraining.linear_layers(by_hand, "lm_head").values():
            layer.module.register_forward_pre_hook(round_input)
        model = make()
        compiled, _ = recipes.zeroquant_fp(group=16, rank=2, rows=4).apply(
            model, batches=batches(), backend="fpsim_eager"
        )
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
        torch.testing.assert_close(logits(compiled), logits(by_hand), rtol=1e-4, atol=1e-4)

    def test_options_of_zeroquant_fp(self) -> None:
        model = llama()
        recipes.zeroquant_fp(constraint="m1", rank=0, method="nearest", group=32).preparation.apply(model, None)
        weight = llama().model.layers[0].self_attn.q_proj.weight
        want = fpsim.round(weight.detach(), "e2m1fn/block:32:rceil")
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, want)
        recipes.zeroquant_fp(rank=1, method="nearest", group=32, as_product=True).preparation.apply(model, None)
        assert isinstance(model.model.layers[0].mlp.up_proj, posttraining.CompensatedLinear)
        with pytest.raises(ValueError, match="needs batches"):
            recipes.zeroquant_fp().preparation.apply(llama(), None)
        with pytest.raises(ValueError, match="m1, m2, m2_up"):
            recipes.zeroquant_fp(constraint="m3")

    @MODELS
    def test_nf4_quantizes_all_layers_but_the_head(self, make: Callable[[], Any]) -> None:
        model, plain = make(), make()
        compiled, _ = recipes.nf4().apply(model, backend="fpsim_eager")
        layers, before = posttraining.linear_layers(model, "lm_head"), posttraining.linear_layers(plain, "lm_head")
        for path, layer in layers.items():
            assert torch.equal(layer.matrix, fpsim.round(before[path].matrix, "nf4/group:64:double")), path
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        by_hand = make()
        for path, layer in posttraining.linear_layers(by_hand, "lm_head").items():
            layer.write(fpsim.round(layers[path].matrix, "bf16"))
            layer.module.register_forward_pre_hook(lambda module, args: (fpsim.round(args[0], "bf16"),))
            layer.module.register_forward_hook(lambda module, args, output: fpsim.round(output, "bf16"))
        torch.testing.assert_close(logits(compiled), logits(by_hand), rtol=1e-2, atol=1e-2)
        fp4 = recipes.nf4(format="fp4_bnb", double=False, compute=None)
        assert fp4.preparation.format == "fp4_bnb/group:64" and fp4.policy is None
        with pytest.raises(ValueError, match="nf4, fp4_bnb"):
            recipes.nf4(format="fp4")


class TestAttention:
    @MODELS
    def test_k_sort_blocks_sorted_keys_and_queries(self, make: Callable[[], Any]) -> None:
        model, by_hand = make(), make()
        prepared, _ = recipes.k_sort(block=4).apply(model)
        order = list(posttraining.sort_key_channels(by_hand).values())
        assert len(order) == 1
        key, query = "int4:unit=-2/mx:4:floor", "int8:unit=-6/mx:4:floor"
        posttraining.round_attention(by_hand, query, key)
        assert torch.equal(logits(prepared), logits(by_hand))
        assert not torch.equal(logits(prepared), logits(recipes.k_sort(block=4, sort=False).apply(make())[0]))
        # 4-bit integers times 2^(e-2) with e = floor(log2(amax)): 12 with steps of 2, saturated at 14
        x = torch.tensor([15.0, 9.0, -3.0, 0.9])
        assert fpsim.round(x, key).tolist() == [14.0, 8.0, -4.0, 0.0]


class TestComet:
    def test_outlier_channels_have_blocks_of_their_own(self) -> None:
        model = llama()
        model.model.layers[0].input_layernorm.weight.data[[3, 20]] = 40.0
        compiled, _ = recipes.comet(block=8, ratio=12, key_value="int8/block:4", along="head_dim").apply(
            model, batches=batches(), backend="fpsim_eager"
        )
        layer = model.model.layers[0].self_attn.q_proj
        assert isinstance(layer, posttraining.SplitLinear) and set(layer.order[:2].tolist()) == {3, 20}
        assert layer.count == 8 and not isinstance(model.lm_head, posttraining.SplitLinear)
        assert model.config._attn_implementation.startswith("fpsim")
        got = logits(compiled)
        for path, module in model.named_modules():  # the same with roundings written out
            if isinstance(module, nn.Linear) and path != "lm_head":
                activation = "int8/block:8" if path.endswith(".outliers") else "int4/block:8"
                module.weight.data = fpsim.round(module.weight.data, "int4/block:8")
                module.register_forward_pre_hook(lambda _, args, cast=activation: (fpsim.round(args[0], cast),))
        torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="batches="):
            recipes.comet().preparation.apply(llama(), None)


class TestIntegers:
    def test_int8_qat_prepares_a_model_that_trains(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        model(torch.randn(8, 2, 6, 6))
        model.eval()
        x = torch.randn(4, 2, 6, 6)
        want = model(x)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(ValueError, match="replaces parameters that the optimizer has"):
            recipes.int8_qat().apply(model, optimizer, batches=[x])
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        want = model(x)
        prepared, same = recipes.int8_qat(skip="3").apply(model, optimizer, batches=[x])
        assert same is optimizer and prepared is model
        assert (model(x) - want).abs().max() < 0.05
        assert "weight" in dict(model[3].named_parameters()) and "weight" not in dict(model[0].named_parameters())
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model(x), want)


@pytest.mark.parametrize("name", ["comet", "int8_qat", "k_sort", "nf4", "zeroquant_fp"])
def test_text_and_json(name: str) -> None:
    recipe = recipes.RECIPES[name]()
    assert recipes.Recipe.from_json(recipe.to_json()) == recipe
    text = str(recipe)
    assert text.splitlines()[0] == name and "preparation" in text and max(map(len, text.splitlines())) <= 120
