"""Measurements beside the loss agree with an independent computation."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from fpsim.compile_backend.report.profiler import Profiler
from fpsim.paper.data import batches
from fpsim.paper.measurements import hessian_eigenvalue, logit_signals, max_attention_logit, range_shares
from fpsim.paper.models import LanguageModel, LossAndLogits, build, llama
from fpsim.paper.record import smoothing_span
from fpsim.paper.training import run


def closed_form(logits: np.ndarray, target: int, epsilon: float) -> float:
    """The paper's metric by its definition, at the corner of the box where the loss is largest."""
    step = epsilon * (np.abs(logits) + 1)
    step[target] *= -1
    before, after = (-log_softmax(z)[target] for z in (logits, logits + step))
    return 100 * (after - before) / (1 + before)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"family": "qwen3"}, {"family": "gpt2"}])
def test_the_largest_attention_logit_is_that_of_scores_a_query_sees(config, data, changes):
    """The probabilities of attention that transformers writes out give back the scores, up to a constant per row."""
    model = replace(config.model, layers=2, **changes)
    network = build(model, seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)  # so that some scores are large
    inputs, _ = next(batches(data.train, batch=3, context=12, seed=1))
    found = max_attention_logit(network, inputs)
    seen = []
    written_out = build(model, seed=1)
    written_out.load_state_dict(network.state_dict())
    written_out.set_attn_implementation("eager")
    softmax = torch.nn.functional.softmax

    def noting(scores, *args, **kwargs):
        seen.append(scores.max().item())
        return softmax(scores, *args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", noting)
        written_out(inputs)
    assert len(seen) == 2 and found == pytest.approx(max(seen), rel=1e-4)


def test_attention_logits_see_masks_and_scales():
    class Model(nn.Module):
        def __init__(self, **how):
            super().__init__()
            self.weight, self.how = nn.Parameter(torch.ones(1)), how

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, -x, x, **self.how)

    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])  # scores -(x_i . x_j): the largest is 3, of rows 0 and 2
    for how, expected in (
        ({"scale": 1.0}, 3.0),
        ({}, 3 / 2**0.5),
        ({"scale": 1.0, "is_causal": True}, 3.0),
        ({"scale": 1.0, "attn_mask": torch.full((3, 3), -1.0)}, 2.0),
    ):
        assert max_attention_logit(Model(**how), x) == pytest.approx(expected)
    assert max_attention_logit(Model(scale=1.0, attn_mask=torch.eye(3, dtype=torch.bool)), x) == -1.0
    assert max_attention_logit(nn.Linear(2, 2), x) is None


def test_attention_logits_are_recorded_where_they_are_due(config, data, eager):
    history = run(replace(config, attention_every=4), data, compile=eager)
    assert [record.step for record in history if record.max_attention_logit is not None] == [4]
    plain = run(config, data, compile=eager)
    assert [record.loss for record in plain] == [record.loss for record in history]
    first = run(replace(config, attention_every=1, steps=1), data, compile=eager)[0]
    inputs, _ = next(batches(data.train, batch=4, context=12, seed=config.seed))
    assert first.max_attention_logit == max_attention_logit(llama(config.model, seed=config.seed), inputs)


def test_the_signals_of_a_step_are_those_of_its_own_forward_pass(config, data, eager):
    history = run(replace(config, measure_every=3, lbfgsb_every=6), data, compile=eager)
    assert [record.step for record in history if record.sharpness_5e4 is not None] == [3, 6]
    assert [record.step for record in history if record.lbfgsb_5e4 is not None] == [6]
    first = run(replace(config, measure_every=1, steps=1, warmup=0), data, compile=eager)[0]
    inputs, targets = next(batches(data.train, batch=4, context=12, seed=config.seed))
    with torch.no_grad():
        logits = LanguageModel(llama(config.model, seed=config.seed)).logits(inputs)[:, -1].double().numpy()
    last = targets[:, -1].tolist()
    for name, epsilon in (("sharpness_5e4", 5e-4), ("sharpness_1e3", 1e-3)):
        expected = np.mean([closed_form(row.copy(), t, epsilon) for row, t in zip(logits, last, strict=True)])
        assert getattr(first, name) == pytest.approx(expected, rel=1e-4)
    assert first.max_abs_logit == pytest.approx(np.abs(logits).max(), rel=1e-5)
    assert first.mean_logit == pytest.approx(logits.mean(), rel=1e-4, abs=1e-6)


def test_measuring_changes_no_bit_of_the_run(config, data, eager):
    plain = run(config, data, compile=eager)
    measured = run(replace(config, measure_every=1, lbfgsb_every=2, hessian_every=3), data, compile=eager)
    facts = ("loss", "gradient_norm", "validation_loss", "smoothed_loss")
    assert [[getattr(r, f) for f in facts] for r in measured] == [[getattr(r, f) for f in facts] for r in plain]


def test_lbfgsb_finds_at_most_the_exact_sharpness():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4
    signals = logit_signals(logits, torch.arange(6), lbfgsb=True)
    assert 0.5 * signals["sharpness_5e4"] < signals["lbfgsb_5e4"] <= signals["sharpness_5e4"] * (1 + 1e-12)
    assert 0.5 * signals["sharpness_1e3"] < signals["lbfgsb_1e3"] <= signals["sharpness_1e3"] * (1 + 1e-12)


class Square(nn.Module):
    """A loss whose Hessian is diag(2, 6, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, inputs, targets):
        return (inputs * self.w.square()).sum()


def test_the_largest_eigenvalue_is_that_of_the_hessian():
    batch = (torch.tensor([1.0, 3.0, 10.0]), torch.zeros(()))
    assert hessian_eigenvalue(Square(), batch, seed=0) == pytest.approx(20.0, rel=1e-3)


def test_the_largest_eigenvalue_of_a_broken_model_is_not_a_number():
    batch = (torch.tensor([1.0, float("nan"), 10.0]), torch.zeros(()))
    assert np.isnan(hessian_eigenvalue(Square(), batch, seed=0))


class OneLayer(nn.Module):
    """A layer whose operands are chosen: the inputs are activations, and so is what the gradient is made of."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data = torch.tensor(weight)

    def forward(self, inputs, factors):
        return (self.layer(inputs) * factors).sum()


def test_saturated_and_underflowed_values_are_counted_by_role():
    # e4m3fn: largest 448, halfway to the smallest subnormal 2^-10. The input's gradient is not asked for.
    model = OneLayer([[500.0, 1.0], [2.0**-11, 0.0]])
    inputs = torch.tensor([[1e4, 1.0], [-1e4, 448.0], [2.0**-12, 0.0], [1.0, 2.0]])
    factors = torch.tensor([[1e5, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0**-10]])
    profiler = Profiler(model, policy={"format": "e4m3fn"})
    assert range_shares(model, profiler, (inputs, factors), loss_scale=0.5) == {
        "saturated_activation": 2 / 8,
        "underflowed_activation": 1 / 8,
        "saturated_weight": 1 / 4,
        "underflowed_weight": 1 / 4,
        "saturated_gradient": 1 / 8,
        "underflowed_gradient": 1 / 8,
    }
    assert model.layer.weight.grad is None


def test_scaled_operands_are_counted_by_role_as_the_scale_leaves_them():
    # Largest powers of two that bring 500, 7 and 0.5 * 1e5 to at most 448: 2^-1, 2^6 and 2^-7. What they leave at
    # 2^-10 or below underflows. Unscaled, 500 and 5e4 would saturate, and other values would underflow.
    model = OneLayer([[500.0, 2.0**-9], [2.0**-13, 0.0]])
    inputs = torch.tensor([[7.0, 2.0**-16], [2.0**-15, 0.0], [-7.0, 1.0], [1.0, 2.0]])
    factors = torch.tensor([[1e5, 0.25], [0.5, 0.0], [1.0, 1.0], [2.0**-20, -1.0]])
    profiler = Profiler(model, policy={"format": "e4m3fn", "scale": "power_of_two"})
    assert range_shares(model, profiler, (inputs, factors), loss_scale=0.5) == {
        "saturated_activation": 0.0,
        "underflowed_activation": 1 / 8,
        "saturated_weight": 0.0,
        "underflowed_weight": 2 / 4,
        "saturated_gradient": 0.0,
        "underflowed_gradient": 2 / 8,
    }


def test_operands_count_once_for_every_product_that_reads_them():
    model = nn.Sequential(OneLayer([[1.0, 2.0**-11], [1.0, 1.0]]).layer, OneLayer([[1.0, 1.0], [1.0, 1.0]]).layer)
    profiler = Profiler(lambda inputs, _: model(inputs).sum(), policy={"weight": "e4m3fn", "gradient": "none"})
    shares = range_shares(model, profiler, (torch.ones(2, 2), torch.ones(2, 2)), loss_scale=1.0)
    # fprop reads both weights, dgrad the second alone: the input's gradient is not asked for.
    assert shares["underflowed_weight"] == 1 / 12
    assert not [name for name in shares if name.endswith("gradient")]


def test_counting_ranges_leaves_gradients_and_random_state_alone():
    model = OneLayer([[1.0, 2.0], [3.0, 4.0]])
    model.layer.weight.grad = gradient = torch.full((2, 2), 7.0)
    state = torch.get_rng_state()
    profiler = Profiler(model, policy={"format": "e2m1fn/stochastic"})
    range_shares(model, profiler, (torch.ones(4, 2), torch.ones(4, 2)), loss_scale=1.0)
    assert model.layer.weight.grad is gradient
    assert torch.equal(gradient, torch.full((2, 2), 7.0))
    assert torch.equal(state, torch.get_rng_state())


def test_counting_ranges_changes_no_bit_of_a_stochastic_run(config, data):
    config = replace(config, options={"format": "e4m3fn/stochastic"}, backend="interpreted")
    counted = run(replace(config, ranges_every=2), data)
    assert [record.step for record in counted if record.underflowed_gradient is not None] == [2, 4, 6]
    facts = ("loss", "gradient_norm", "validation_loss")
    assert [[getattr(r, f) for f in facts] for r in counted] == [
        [getattr(r, f) for f in facts] for r in run(config, data)
    ]


def test_values_that_backward_rounds_are_told_apart(config, data):
    model = LossAndLogits(llama(config.model, seed=0))
    inputs, targets = next(batches(data.train, batch=4, context=12, seed=0))
    shares = range_shares(model, Profiler(model, policy={"format": "e8m3"}), (inputs, targets), loss_scale=1.0)
    assert set(shares.values()) == {0.0}  # the exponents are those of float32
    profiler = Profiler(model, policy={"activation": "bf16", "weight": "bf16", "gradient": "e2m1fn"})
    shares = range_shares(model, profiler, (inputs, targets), loss_scale=1.0)
    # Every gradient of a logit underflows, and what is computed from it is zero already: 48 x 256 of all gradients that
    # are rounded, with 48 x (16 x 5 + 24 x 2) of linear layers, and of scores and attended values in two heads. Two
    # products read each of them.
    assert shares["underflowed_gradient"] == 12288 / (12288 + 6144 + 4 * 2 * 12 * 12 + 4 * 2 * 12 * 8)
    assert {name: share for name, share in shares.items() if not name.endswith("gradient")} == dict.fromkeys(
        ["saturated_activation", "underflowed_activation", "saturated_weight", "underflowed_weight"], 0.0
    )


def test_the_smoothed_loss_is_a_mean_first_and_exponential_later(config, data, eager):
    history = run(replace(config, steps=30), data, compile=eager)
    losses = [record.loss for record in history]
    assert smoothing_span(30) == 10
    assert history[4].smoothed_loss == pytest.approx(np.mean(losses[:5]))
    average = np.mean(losses[:5])  # 2 / (span + 1) = 1/5.5: from the sixth step on the exponential one is slower
    for record in islice(history, 5, None):
        average += 2 / 11 * (record.loss - average)
        assert record.smoothed_loss == pytest.approx(average)
