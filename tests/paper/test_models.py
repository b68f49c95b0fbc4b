"""The network is the one asked for, from the seed alone, and its loss is the cross-entropy."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import fpsim
from fpsim.paper import require
from fpsim.paper.models import MODELS, LanguageModel, LossAndLogits, ModelConfig, build, gpt2, llama, model_config

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, mlp=24, context=12, vocabulary=32)


def test_the_sizes_are_those_of_the_configuration():
    network = llama(CONFIG, seed=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (32, 16)
    assert shapes["model.layers.1.mlp.gate_proj.weight"] == (24, 16)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 16)
    assert "model.layers.2.mlp.gate_proj.weight" not in shapes
    assert network.lm_head.weight is not network.model.embed_tokens.weight
    assert not network.config.use_cache
    assert network.config._attn_implementation == "sdpa"


def test_the_weights_depend_on_the_seed_alone():
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in llama(CONFIG, seed=seed).parameters()])

    state = torch.get_rng_state()
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    model = LanguageModel(llama(CONFIG, seed=0))
    inputs, targets = torch.randint(32, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    loss = model(inputs, targets)
    logits = model.network(input_ids=inputs).logits.double()
    expected = (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(math.log(32), abs=0.1)


def test_the_z_loss_changes_derivatives_alone():
    network = llama(CONFIG, seed=0)
    inputs, targets = torch.randint(32, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    plain, penalised = LanguageModel(network)(inputs, targets), LanguageModel(network, 0.1)(inputs, targets)
    assert torch.equal(plain, penalised)
    assert torch.equal(LossAndLogits(network, 0.1)(inputs, targets)[0], plain)
    z = network(input_ids=inputs).logits.double()
    expected = torch.autograd.grad(
        functional.cross_entropy(z.flatten(0, 1), targets.flatten()) + 0.1 * (z.exp().sum(-1).log() ** 2).mean(),
        network.lm_head.weight,
    )[0]
    found = torch.autograd.grad(penalised, network.lm_head.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, torch.autograd.grad(plain, network.lm_head.weight)[0], rtol=1e-2)


def test_qk_normalisation_divides_queries_and_keys_by_their_root_mean_square():
    config = replace(CONFIG, layers=1, family="qwen3", kv_heads=1)
    network, plain = build(config, seed=3), llama(replace(config, family="llama"), seed=3)
    own = dict(network.named_parameters())
    norms = {name for name in own if "_norm" in name and "self_attn" in name}
    assert {name.rpartition("self_attn.")[2] for name in norms} == {"q_norm.weight", "k_norm.weight"}
    for name, parameter in plain.named_parameters():
        assert torch.equal(own.pop(name), parameter), name
    assert set(own) == norms
    # Without the rotary embedding at position 0: a query and a key of length sqrt(head dimension) each.
    attention, hidden = network.model.layers[0].self_attn, torch.randn(1, 16)
    for project, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
        heads = project(hidden).view(-1, 8)
        expected = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(norm(heads), expected)
    assert config.size == "1 x 16 with QK norm"


def test_no_token_sees_the_future():
    network = llama(CONFIG, seed=0)
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 8] = 31
    before, after = (network(input_ids=ids).logits for ids in (tokens, changed))
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"vocabulary": -1}, {"hidden": 12, "heads": 4}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModelConfig(**wrong)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fpsim-torch\[paper\]'"):
        llama(CONFIG, seed=0)


def test_an_error_inside_an_extra_is_not_mistaken_for_its_absence(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("broken_extra")


def test_every_product_of_the_network_is_found_and_none_turns_positions():
    batch = torch.zeros(2, 2, 12, dtype=torch.int64)
    plan = fpsim.explain(LanguageModel(llama(CONFIG, seed=0)), *batch)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = Counter(site.path.rpartition(".")[2] for site in plan.sites)
    # Two operands of fprop, dgrad and wgrad; attention has two forward products with two gradients each.
    assert found == {name: 6 * CONFIG.layers for name in linears} | {"lm_head": 6, "self_attn": 12 * CONFIG.layers}
    assert not plan.gaps


# -- other models ------------------------------------------------------------------------------------------------------


def parameters(name: str) -> int:
    """How many a named model has, without memory for them."""
    with torch.device("meta"):
        network = build(MODELS[name], seed=0)
    return sum(parameter.numel() for parameter in network.parameters())


def test_named_models_have_the_papers_sizes():
    # GPT-2: 124 M in nanoGPT with biases and a tied head. TinyLlama's 120 M: multi-query attention, untied head.
    assert parameters("gpt2-124m") == 124_439_808
    attention, mlp, norms = 768 * 768 * 2 + 768 * 64 * 2, 3 * 768 * 2048, 2 * 768
    assert parameters("llama-120m") == 12 * (attention + mlp + norms) + 768 + 2 * 32000 * 768 == 121_129_728
    assert parameters("llama2-7b") == 6_738_415_616


def test_gpt2_is_initialised_as_nanogpt_and_depends_on_its_seed_alone():
    config = ModelConfig(layers=8, hidden=64, heads=2, mlp=256, context=32, family="gpt2", tied=True)
    network = gpt2(config, seed=3)
    weights = dict(network.named_parameters())
    assert weights["transformer.h.0.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["transformer.h.5.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert network.lm_head.weight is network.transformer.wte.weight
    again = gpt2(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(tokens).logits, network(tokens).logits)  # no dropout in training mode


def test_a_model_may_be_the_users_own(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import torch\n"
        "def build(vocabulary): return torch.nn.Embedding(vocabulary, vocabulary)\n"
        "def both(**sizes): return torch.nn.Linear(sizes['context'], sizes['vocabulary'])\n"
        "def wrong(): return 3\n"
    )
    config = ModelConfig(family="script", script=f"{script}:build", vocabulary=7, context=3)
    network = build(config, seed=1)
    assert network.weight.shape == (7, 7)
    assert torch.equal(network.weight, build(config, seed=1).weight)
    assert not torch.equal(network.weight, build(config, seed=2).weight)
    inputs, targets = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 6]])
    expected = functional.cross_entropy(network.weight[:3], targets[0])
    assert LanguageModel(network)(inputs, targets).item() == pytest.approx(expected.item())
    loss, logits = LossAndLogits(network)(inputs, targets)
    assert loss.item() == pytest.approx(expected.item())
    assert torch.equal(logits, network.weight[2:3])
    assert not logits.requires_grad
    assert build(model_config(f"{script}:both"), seed=0).weight.shape == (256, 128)


def test_a_script_that_cannot_be_used_says_why(tmp_path):
    script = tmp_path / "own.py"
    script.write_text("def build_model(): return None\ndef other(): pass\n")
    with pytest.raises(ValueError, match=r"no function 'build_modle' .did you mean 'build_model'.*build_model, other"):
        build(model_config(f"{script}:build_modle"), seed=0)
    with pytest.raises(ValueError, match=r"must return a torch.nn.Module, got NoneType"):
        build(model_config(f"{script}:build_model"), seed=0)
    with pytest.raises(FileNotFoundError, match="no script at"):
        build(model_config(f"{tmp_path}/none.py:build"), seed=0)
    with pytest.raises(ValueError, match=r"unknown model 'gpt2-124' .did you mean 'gpt2-124m'"):
        model_config("gpt2-124")
    with pytest.raises(ValueError, match="belong together"):
        ModelConfig(family="script")
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        ModelConfig(kv_heads=3)
