"""From modules to losses: Hugging Face models without changes, tied weights, cross-entropy in closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fpsim.curvature import (
    CrossEntropy,
    cross_entropy,
    functional_loss,
    functional_outputs,
    gauss_newton,
    hessian,
    label_count,
    shifted_labels,
)
from tests.curvature.small_models import case, dense_hessian, relative, token_loss

transformers = pytest.importorskip("transformers")


def hugging_face(kind: str):
    common = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2, **common),
        "llama": lambda: transformers.LlamaConfig(num_key_value_heads=1, **sizes, **common),
        "qwen3": lambda: transformers.Qwen3Config(
            num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, **sizes, **common
        ),
        "olmo2": lambda: transformers.Olmo2Config(num_key_value_heads=2, **sizes, **common),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            transformers.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="sdpa").double().eval()
        )
        tokens = torch.randint(3, 11, (2, 6))
    tokens[1, 4:] = 0
    labels = tokens.masked_fill(tokens == 0, -100)
    return model.double().eval(), {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


#: These models compute their loss and some of their norms in float32, for every dtype of the parameters.
FLOAT32 = 1e-6


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "olmo2"])
def test_hugging_face_models_without_changes(kind, mode):
    """With sdpa attention, padding and tied weights; one product is compared with that of two reverse passes."""
    model, batch = hugging_face(kind)
    params = dict(model.named_parameters())
    loss = functional_loss(model, batch=batch)
    assert float(loss(params).detach()) == float(model(**batch).loss.detach())
    operator = hessian(loss, params, mode=mode)
    assert operator.symmetry_error() <= FLOAT32
    v = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = hessian(loss, params, mode="double_backward") @ v
    assert relative(operator @ v, want) <= FLOAT32


def next_token_loss(logits, batch):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_a_hugging_face_model_against_the_dense_judge():
    model, batch = hugging_face("gpt2")
    params = {name: value for name, value in model.named_parameters() if ".h.0." not in name}
    loss = functional_loss(model, lambda out, batch: next_token_loss(out.logits, batch), batch=batch)
    assert relative(hessian(loss, params).to_dense(), dense_hessian(loss, params)) <= 1e-12


def test_batches_of_a_hugging_face_model_weighted_by_its_own_labels():
    model, batch = hugging_face("llama")
    params = dict(model.named_parameters())
    loss = functional_loss(model)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    assert [label_count(row) for row in rows] == [5, 3]
    v = torch.ones(sum(p.numel() for p in params.values()), dtype=torch.float64)
    whole = hessian(loss, params, batches=[batch]) @ v
    assert relative(hessian(loss, params, batches=rows, weight=label_count) @ v, whole) <= FLOAT32


def test_gauss_newton_of_a_hugging_face_model():
    model, batch = hugging_face("llama")
    params = dict(model.named_parameters())
    outputs = functional_outputs(model)
    closed = gauss_newton(outputs, CrossEntropy(shifted_labels), params, batches=[batch])
    general = gauss_newton(outputs, next_token_loss, params, batches=[batch], mode="forward")
    v = torch.randn(closed.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(closed @ v, general @ v) <= FLOAT32
    assert float(v @ (closed @ v)) > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(2, 6), st.integers(1, 9), st.integers(0, 1000))
def test_cross_entropy_is_torchs_and_its_hessian_the_closed_form(tokens, classes, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, classes, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, classes, (tokens,), generator=generator)
    targets[1:][torch.rand(tokens - 1, generator=generator) < 0.3] = -100
    torch.testing.assert_close(cross_entropy(logits, targets), functional.cross_entropy(logits, targets))
    dense = torch.autograd.functional.hessian(lambda z: functional.cross_entropy(z, targets), logits)
    ours = torch.autograd.functional.hessian(lambda z: cross_entropy(z, targets), logits)
    torch.testing.assert_close(ours, dense)
    u = torch.randn(tokens, classes, dtype=torch.float64, generator=generator)
    want = (dense.reshape(tokens * classes, -1) @ u.reshape(-1)).view_as(u)
    torch.testing.assert_close(CrossEntropy(targets, chunk=chunk).output_product(None)(logits)(u.clone()), want)


def test_forms_of_batches():
    model = nn.Linear(2, 1)
    params = dict(model.named_parameters())
    x, y = torch.randn(3, 2), torch.randn(3, 1)
    want = functional.mse_loss(model(x), y)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, y):
            return functional.mse_loss(self.inner(x), y)

    outer = WithLoss()
    inside = dict(outer.named_parameters())
    assert torch.equal(functional_loss(model, functional.mse_loss, batch=(x, y))(params), want)
    assert torch.equal(functional_loss(outer, batch=(x, y))(inside), want)
    assert torch.equal(functional_loss(outer)(inside, {"x": x, "y": y}), want)
    assert torch.equal(functional_loss(model, lambda z, b: z.sum(), batch={"input": x})(params), model(x).sum())
    assert torch.equal(functional_loss(model, torch.sum)(params, x), model(x).sum())
    assert torch.equal(functional_outputs(model)(params, (x, y)), model(x))


def test_parameters_by_either_name_of_a_tied_weight():
    small = case("tied")
    weight = small.model.embed.weight.detach() * 2
    loss = functional_loss(small.model, token_loss, batch=small.batch)
    by_first = loss({**small.params, "embed.weight": weight})
    by_second = loss({"head.weight": weight})
    assert torch.equal(by_first, by_second) and not torch.equal(by_first, loss(small.params))
    both = dict(small.model.named_parameters(remove_duplicate=False))
    assert hessian(loss, both).size == hessian(loss, small.params).size


def test_models_in_data_parallel_wrappers_are_unwrapped():
    small = case("gelu")
    wrapped = nn.DataParallel(small.model)
    loss = functional_loss(wrapped, token_loss, batch=small.batch)
    assert torch.equal(loss(dict(wrapped.named_parameters())), small.loss(small.params))
    assert torch.equal(loss(small.params), small.loss(small.params))


def test_batches_and_models_without_a_loss_are_errors():
    model = nn.Linear(2, 1)
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match="no parameter 'other'"):
        functional_loss(model, torch.sum)({"other": torch.ones(1)}, torch.ones(1, 2))
    with pytest.raises(ValueError, match="got 3 entries"):
        functional_loss(model, torch.sum)(params, (1, 2, 3))
    with pytest.raises(ValueError, match="no labels to count, only input_ids"):
        label_count({"input_ids": torch.ones(1)})
    with pytest.raises(ValueError, match="pairs"):
        label_count(torch.ones(2))
    with pytest.raises(ValueError, match="do not fit logits"):
        CrossEntropy(torch.zeros(3, dtype=torch.long)).output_product(None)(torch.ones(2, 5))
    tiny, batch = hugging_face("llama")
    with pytest.raises(ValueError, match="give the batch labels"):
        functional_loss(tiny)(dict(tiny.named_parameters()), {"input_ids": batch["input_ids"]})
    with pytest.raises(TypeError, match="without logits"):
        functional_outputs(nn.LSTM(2, 2))(dict(nn.LSTM(2, 2).named_parameters()), torch.ones(1, 1, 2))
