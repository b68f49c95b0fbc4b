"""Logit sharpness of a model: all forms of a batch give the same tokens, and streaming equals one large batch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpsim
from fpsim.sharpness import LogitMetrics, gradient_norm, logit, logit_metrics, logit_stream, summarize

VOCABULARY = 13


class Tiny(nn.Module):
    """A language model that sees only the current token, optionally rounded."""

    def __init__(self, format: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.format = format

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden, weight = self.embedding(input_ids), self.head.weight
        if self.format is not None:
            hidden, weight = fpsim.round(hidden, self.format), fpsim.round(weight, self.format)
        return functional.linear(hidden, weight, self.head.bias)


@pytest.fixture
def model(generator) -> Tiny:
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def tokens(generator) -> Tensor:
    return torch.randint(0, VOCABULARY, (6, 9), generator=generator)


def assert_same(got: LogitMetrics, want: LogitMetrics) -> None:
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-14, atol=1e-16, equal_nan=True)


def test_each_token_is_the_target_of_the_previous_one(model, tokens):
    (metrics,) = logit_stream(model, [tokens])
    assert metrics.sharpness.shape == tokens.shape
    assert torch.equal(metrics.counted, torch.arange(9).expand(6, 9) < 8)
    want = logit(model(tokens)[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(metrics.sharpness[:, :-1], want, rtol=1e-14, atol=0)
    (last,) = logit_stream(model, [tokens], tokens="last")
    torch.testing.assert_close(last.sharpness, want[:, -1], rtol=1e-14, atol=0)


def test_every_form_of_a_batch_means_the_same(model, tokens):
    (want,) = logit_stream(model, [tokens])
    shifted = functional.pad(tokens[:, 1:], (0, 1), value=-100)
    forms = [
        {"input_ids": tokens},
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        {"input_ids": tokens, "labels": tokens},
        (tokens, shifted),
    ]
    for form in forms:
        (got,) = logit_stream(model, [form])
        assert_same(got, want)


@pytest.mark.parametrize("wrap", [lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, None)])
def test_every_form_of_an_output_means_the_same(model, tokens, wrap):
    (want,) = logit_stream(model, [tokens])
    (got,) = logit_stream(lambda batch: wrap(model(batch)), [tokens])
    assert_same(got, want)


def test_padding_is_no_target(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    mask[1, :3] = 0
    (metrics,) = logit_stream(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert torch.equal(metrics.counted[:, :-1], mask[:, 1:] != 0)
    (last,) = logit_stream(model, [{"input_ids": tokens, "attention_mask": mask}], tokens="last")
    torch.testing.assert_close(last.sharpness[0], metrics.sharpness[0, 3], rtol=1e-14, atol=0)


def test_streaming_equals_one_shot(model, tokens):
    want = summarize(logit_stream(model, [tokens]))
    for sizes in ([1] * 6, [1, 5], [4, 2]):
        got = summarize(logit_stream(model, tokens.split(sizes)))
        assert vars(got) == pytest.approx(vars(want), rel=1e-12)


def test_a_summary_has_the_usual_statistics(model, tokens):
    (metrics,) = logit_stream(model, [tokens])
    values = metrics.sharpness[metrics.counted]
    got = summarize([metrics])
    assert got.tokens == 48
    assert got.nonfinite == 0
    assert got.sharpness == pytest.approx(values.mean().item(), rel=1e-13)
    assert got.stderr == pytest.approx(values.std().item() / math.sqrt(48), rel=1e-12)
    assert got.max_sharpness == values.max()
    assert got.max_abs_logit == metrics.max_abs_logit[metrics.counted].max()
    for name in ("loss", "mean_logit", "gradient_norm"):
        assert getattr(got, name) == pytest.approx(getattr(metrics, name)[metrics.counted].mean().item(), rel=1e-13)


def test_losses_that_are_not_finite_are_counted_and_left_out():
    z = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [-math.inf, 1.0], [3.0, 1.0]])
    targets = torch.tensor([0, 0, 0, -100])
    got = summarize([logit_metrics(z, targets)])
    assert (got.tokens, got.nonfinite) == (1, 2)
    assert got.sharpness == pytest.approx(logit(z[0], targets[0]).item(), rel=1e-14)
    assert math.isnan(got.stderr)
    only = summarize([logit_metrics(z[1:2], targets[1:2])])
    assert (only.tokens, only.nonfinite) == (0, 1)
    assert math.isnan(only.sharpness)
    with pytest.raises(ValueError, match="no token counts"):
        summarize([logit_metrics(z[3:], targets[3:])])


def test_batches_are_taken_one_at_a_time(model, tokens):
    taken = []

    def batches():
        for row in tokens:
            taken.append(row)
            yield row.unsqueeze(0)

    stream = logit_stream(model, batches())
    assert not taken
    next(stream)
    assert len(taken) == 1
    assert torch.is_grad_enabled()
    next(stream)
    assert len(taken) == 2


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_gradient_norm_is_that_of_the_mean_loss(model, tokens):
    model.double()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(mean_loss(model, tokens), parameters)
    want = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    assert gradient_norm(model, [tokens]) == pytest.approx(want, rel=1e-12)
    with torch.no_grad():
        assert gradient_norm(model, tokens.split([1, 3, 2])) == pytest.approx(want, rel=1e-12)
    assert all(parameter.grad is None for parameter in parameters)
    model.embedding.requires_grad_(False)
    head = math.sqrt(sum(float(part.square().sum()) for part in gradient[1:]))
    assert gradient_norm(model, [tokens]) == pytest.approx(head, rel=1e-12)


def test_a_rounded_model_is_measured_with_its_own_logits(model, tokens):
    rounded = Tiny("e4m3fn").eval()
    rounded.load_state_dict(model.state_dict())
    (got,) = logit_stream(rounded, [tokens])
    want = logit(rounded(tokens)[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(got.sharpness[:, :-1], want, rtol=1e-14, atol=0)
    assert not torch.equal(got.loss, next(logit_stream(model, [tokens])).loss)
    gradient = torch.autograd.grad(mean_loss(rounded, tokens), list(rounded.parameters()))
    length = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    assert gradient_norm(rounded, [tokens]) == pytest.approx(length, rel=1e-5)


def test_errors_name_the_value_and_the_remedy(model, tokens):
    with pytest.raises(TypeError, match="a mapping needs 'input_ids', got labels"):
        next(logit_stream(model, [{"labels": tokens}]))
    with pytest.raises(TypeError, match=r"a batch is a tensor of tokens, .* got str"):
        next(logit_stream(model, ["text"]))
    with pytest.raises(TypeError, match=r"must return logits, or an object with \.logits, got NoneType"):
        next(logit_stream(lambda batch: None, [tokens]))
    with pytest.raises(ValueError, match="no token counts"):
        gradient_norm(model, [])
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        gradient_norm(nn.Identity().eval(), [tokens])
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        next(logit_stream(model.train(), [tokens]))
