"""Batches and weights: the operator is that of all data, for every cut into batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fpsim.curvature import CrossEntropy, functional_loss, functional_outputs, gauss_newton, hessian, label_count
from tests.curvature.small_models import case, dense_hessian, relative, token_loss


def cut(batch):
    tokens, targets = batch
    return [(tokens[:1], targets[:1]), (tokens[1:], targets[1:])]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "double_backward"])
def test_batches_weighted_by_tokens_are_the_whole(mode, keep):
    small = case("layer norm")
    loss = functional_loss(small.model, token_loss)
    operator = hessian(loss, small.params, batches=cut(small.batch), weight=label_count, mode=mode, keep=keep)
    assert relative(operator.to_dense(), dense_hessian(small.loss, small.params)) <= 1e-12


def test_a_plain_mean_over_uneven_batches_is_another_loss():
    small = case("layer norm")
    loss = functional_loss(small.model, token_loss)
    operator = hessian(loss, small.params, batches=cut(small.batch), weight="equal", mode="forward")
    assert relative(operator.to_dense(), dense_hessian(small.loss, small.params)) > 1e-2


def test_weights_may_be_numbers():
    small = case("tied")
    loss = functional_loss(small.model, token_loss)
    counts = [label_count(batch) for batch in cut(small.batch)]
    operator = hessian(loss, small.params, batches=cut(small.batch), weight=counts)
    assert relative(operator.to_dense(), dense_hessian(small.loss, small.params)) <= 1e-12


def test_gauss_newton_over_batches():
    small = case("rms norm")
    closed = CrossEntropy(lambda batch: batch[1])
    outputs = functional_outputs(small.model)
    got = gauss_newton(outputs, closed, small.params, batches=cut(small.batch), weight=label_count).to_dense()
    want = gauss_newton(outputs, closed, small.params, batches=[small.batch]).to_dense()
    assert relative(got, want) <= 1e-12


def test_a_loader_is_read_again_for_every_product():
    small = case("gelu")
    loader = DataLoader(TensorDataset(*small.batch), batch_size=2)
    loss = functional_loss(small.model, token_loss)
    operator = hessian(loss, small.params, batches=loader, weight=label_count)
    want = dense_hessian(small.loss, small.params)
    v = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert relative(operator @ v, want @ v) <= 1e-12


def test_batches_that_cannot_be_used_are_errors():
    small = case("gelu")
    loss = functional_loss(small.model, token_loss)
    vector = torch.ones(sum(p.numel() for p in small.params.values()))
    for batches, weight, message in (
        (iter(cut(small.batch)), label_count, "read only once"),
        ([], None, "empty"),
        (cut(small.batch), None, "label_count"),
        (cut(small.batch), "tokens", "unknown weight 'tokens'"),
        ({"labels": small.batch[1]}, None, r"\[batch\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(loss, small.params, batches=batches, weight=weight)
    for weight, message in (
        ([1.0], "fewer weights"),
        ([1.0, 2.0, 3.0], "more weights"),
        ([1.0, -1.0], "not negative"),
        ([0.0, 0.0], "no batch has a weight"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian(loss, small.params, batches=cut(small.batch), weight=weight).matvec(vector)
