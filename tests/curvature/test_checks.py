"""Symmetry and determinism: the verdicts, and the reasons in the messages."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fpsim.curvature import Operator, check_determinism, check_symmetry, functional_loss, hessian, label_count
from tests.curvature.small_models import case, token_loss


def only_reason(result):
    assert not result.deterministic
    (reason,) = result.reasons
    return reason


def test_a_plain_loss_is_deterministic():
    small = case("layer norm")
    result = check_determinism(small.loss, small.params)
    assert result.deterministic and result.difference == 0 and result.reasons == ()


def test_dropout_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    loss = functional_loss(model, functional.mse_loss, batch=(torch.ones(8, 3), torch.zeros(8, 3)))
    result = check_determinism(loss, dict(model.named_parameters()))
    assert "dropout" in only_reason(result) and "model.eval()" in only_reason(result)
    assert result.difference > 1e-3
    model.eval()
    assert check_determinism(loss, dict(model.named_parameters())).deterministic


def test_stochastic_rounding_that_is_not_frozen_is_named():
    def loss(params):
        noise = torch.rand_like(params["x"].detach())
        return (params["x"] + (torch.floor(params["x"].detach() * 4 + noise) / 4 - params["x"].detach())).pow(2).sum()

    reason = only_reason(check_determinism(loss, {"x": torch.linspace(0, 1, 20)}))
    assert "rand_like" in reason and "stochastic rounding" in reason and "frozen" in reason


def test_a_state_is_named():
    calls = count()
    reason = only_reason(check_determinism(lambda p: p["x"].pow(2).sum() * (1 + next(calls)), {"x": torch.ones(3)}))
    assert "keeps a state" in reason


def test_noise_of_kernels_is_told_from_a_state():
    calls = count()
    loss = lambda p: p["x"].pow(2).sum() * (1 + 1e-6 * next(calls))  # noqa: E731
    reason = only_reason(check_determinism(loss, {"x": torch.ones(3, dtype=torch.float64)}))
    assert "use_deterministic_algorithms" in reason


def test_a_shuffled_loader_is_named():
    small = case("gelu")
    loss = functional_loss(small.model, token_loss)
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, 5, (12, 6)), torch.randint(0, 5, (12, 6)))
    for size, message in ((1, "another order"), (5, "differ from pass to pass")):
        loader = DataLoader(data, batch_size=size, shuffle=True)
        result = check_determinism(loss, small.params, batches=loader, weight=label_count)
        assert message in only_reason(result) and "shuffle=False" in only_reason(result)
    loader = DataLoader(data, batch_size=5)
    assert check_determinism(loss, small.params, batches=loader, weight=label_count).deterministic


def test_batch_norm_in_training_mode_is_named_for_several_batches():
    small = case("batch norm, training")
    loss = functional_loss(small.model, token_loss)
    result = check_determinism(loss, small.params, batches=[small.batch, small.batch], weight="equal")
    assert result.deterministic and "batch_norm in training mode" in result.reasons[0]
    small.model.eval()
    assert check_determinism(loss, small.params, batches=[small.batch], weight="equal").reasons == ()


def test_running_statistics_that_move_are_named():
    model = nn.BatchNorm1d(3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 3

    def loss(params):
        functional_call(model, params, (x,))  # moves the running statistics
        return functional.batch_norm(x, model.running_mean, model.running_var, params["weight"]).pow(2).sum()

    assert "running statistics" in only_reason(check_determinism(loss, dict(model.named_parameters())))


def test_a_loss_that_ignores_the_params_is_named():
    with pytest.raises(ValueError, match="the loss does not depend on the params"):
        check_determinism(lambda params: torch.ones(()), {"x": torch.ones(3)})


def test_the_global_random_state_is_left_as_it_was():
    state = torch.random.get_rng_state()
    check_determinism(lambda p: (p["x"] * torch.rand(3)).sum(), {"x": torch.ones(3)})
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetry(dtype):
    small = case("attention")
    params = {name: value.to(dtype) for name, value in small.params.items()}
    assert check_symmetry(hessian(small.loss, params)).symmetric
    skew = torch.randn(20, 20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    result = check_symmetry(Operator.of_matrix(skew))
    assert not result.symmetric and result.error > 0.1
    assert check_symmetry(Operator.of_matrix(skew), tolerance=10.0).symmetric
