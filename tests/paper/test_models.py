"""The network is the one asked for, from the seed alone, and its loss is the cross-entropy."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch

import fpsim
from fpsim.paper import require
from fpsim.paper.models import LanguageModel, ModelConfig, llama

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
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fpsim\[paper\]'"):
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
