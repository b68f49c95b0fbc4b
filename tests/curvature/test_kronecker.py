"""Kronecker factors against dense Gauss-Newton blocks where they are exact, and else against loops over samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fpsim.curvature import CrossEntropy, diagonal, functional_outputs, gauss_newton, inverse, kronecker_factors
from tests.curvature.small_models import Tied, case, relative


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def dense_blocks(operator, names):
    dense = operator.to_dense()
    masks = [operator.layout.mask(name) for name in names]
    keep = sum(torch.outer(mask, mask).double() for mask in masks)
    return dense * keep


@pytest.mark.parametrize("loss", ["cross-entropy", "squared"])
def test_one_sample_has_exact_blocks(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.GELU(), nn.Linear(3, 3)).double()
    batch = (drawn(1, 4), torch.tensor([2]))
    loss = CrossEntropy(batch[1]) if loss == "cross-entropy" else loss
    found = kronecker_factors(model, loss, [batch])
    exact = gauss_newton(functional_outputs(model, batch=batch), loss, dict(model.named_parameters()))
    want = dense_blocks(exact, found.layout.names)
    assert found.layout.names == exact.layout.names and not found.missing and found.gradient_count == 1 + 3
    assert relative(found.operator().to_dense(), want) <= 1e-12
    identity = torch.eye(len(want), dtype=torch.float64)
    assert relative(found.inverse(0.05).to_dense(), torch.linalg.inv(want + 0.05 * identity)) <= 1e-10
    b = drawn(len(want))
    assert relative(found.inverse(0.05) @ b, inverse(found.operator(), b, damping=0.05, tol=1e-12).solution) <= 1e-10


def test_linear_networks_have_exact_blocks_under_the_squared_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    batches = [(drawn(6, 4), None), (drawn(2, 4), None)]
    found = kronecker_factors(model, "squared", batches, weight=lambda batch: len(batch[0]))
    exact = gauss_newton(
        functional_outputs(model),
        "squared",
        dict(model.named_parameters()),
        batches=batches,
        weight=lambda batch: len(batch[0]),
    )
    want = dense_blocks(exact, found.layout.names)
    assert relative(found.operator().to_dense(), want) <= 1e-12 and found.gradient_count == 2 * (1 + 2)


@pytest.mark.parametrize("name", ["group norm and convolution", "attention", "encoder layer"])
def test_shared_weights_have_the_factors_of_loops_over_positions(name):
    """A by windows cut by hand, and B by the Jacobian of the outputs with respect to those of the layer."""
    small = case(name)
    tokens, targets = small.batch
    found = kronecker_factors(small.model, CrossEntropy(targets), [small.batch])
    seen = {}
    layers = {
        n: m for n, m in small.model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d) and m.weight is not None
    }
    for layer_name, module in layers.items():
        module.register_forward_hook(lambda m, x, y, n=layer_name: seen.setdefault(n, (x[0], y)) and None)
    logits = small.model(tokens)
    counted = targets != -100
    p = logits.detach().softmax(-1)
    checked = 0
    for layer_name, module in layers.items():
        if layer_name not in seen:
            continue
        x, y = seen[layer_name]
        if isinstance(module, nn.Conv1d):
            padded = functional.pad(x.detach(), (1, 1))
            rows = [padded[b, :, i : i + 3].flatten() for b in range(len(x)) for i in range(x.shape[2])]
        else:
            rows = list(x.detach().reshape(-1, x.shape[-1]))
        a = sum(torch.outer(row, row) for row in rows) / len(rows)
        b = torch.zeros(module.weight.shape[0], module.weight.shape[0], dtype=torch.float64)
        for place in map(tuple, counted.nonzero()):
            for c in range(5):
                unit = (functional.one_hot(torch.tensor(c), 5) - p[place]) * (p[place][c] / counted.sum()).sqrt()
                (g,) = torch.autograd.grad(logits[place] @ unit, y, retain_graph=True)
                g = g.transpose(1, 2) if isinstance(module, nn.Conv1d) else g
                b += g.flatten(0, -2).T @ g.flatten(0, -2)
        assert relative(found.activations[f"{layer_name}.weight"], a) <= 1e-10
        assert relative(found.gradients[f"{layer_name}.weight"], b) <= 1e-10
        checked += 1
    assert checked >= 2
    weights = {name for name in found.layout.names if name.endswith("weight")}
    assert set(found.activations) == weights and "embed.weight" in found.missing


def test_convolutions_in_two_dimensions_with_stride_dilation_and_padding():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), nn.Flatten()
    ).double()
    x = drawn(2, 2, 4, 5)
    found = kronecker_factors(model, "squared", [(x, None)])
    padded = functional.pad(x, (1, 1, 0, 0))
    rows = [
        padded[b, :, i : i + 3 : 2, j : j + 3].flatten() for b in range(2) for i in range(2) for j in range(0, 5, 2)
    ]
    want = sum(torch.outer(row, row) for row in rows) / len(rows)
    assert relative(found.activations["0.weight"], want) <= 1e-12
    assert relative(found.gradients["0.bias"], 6 * torch.eye(3, dtype=torch.float64)) <= 1e-12


def test_the_diagonal_of_the_factors_and_a_selection():
    small = case("gelu")
    found = kronecker_factors(small.model, CrossEntropy(small.batch[1]), [small.batch], select="head.*")
    assert found.layout.names == ("head.weight", "head.bias")
    outer = torch.outer(found.gradients["head.weight"].diagonal(), found.activations["head.weight"].diagonal())
    want = torch.cat([outer.flatten(), found.gradients["head.bias"].diagonal()])
    assert relative(diagonal(found.operator(), method="exact").estimate, want) <= 1e-12


def test_what_has_no_factors_is_named():
    tied = Tied().double()
    tokens, targets = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    found = kronecker_factors(tied, CrossEntropy(targets), [(tokens, targets)])
    assert found.layout.names == ("inner.weight", "inner.bias") and found.missing == ("embed.weight",)
    with pytest.raises(ValueError, match=r"embed\.weight belongs to no linear layer or convolution, or to several"):
        kronecker_factors(tied, CrossEntropy(targets), [(tokens, targets)], select="embed.weight")
    with pytest.raises(ValueError, match="no linear layer or convolution that owns its weights alone"):
        kronecker_factors(nn.LayerNorm(3), "squared", [(torch.ones(1, 3), None)])
    with pytest.raises(ValueError, match="factors are known for a CrossEntropy and 'squared', got 'cubed'"):
        kronecker_factors(tied, "cubed", [(tokens, targets)])
    with pytest.raises(ValueError, match="several batches need a weight each"):
        kronecker_factors(tied, CrossEntropy(targets), [(tokens, targets)] * 2)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        found.inverse(0.0)
    with pytest.raises(FloatingPointError, match="the outputs have infinities or NaN"):
        kronecker_factors(nn.Linear(2, 2), "squared", [(torch.full((1, 2), float("inf")), None)])


def judged(model, x, **options):
    """The relative error of the blocks, under the squared error."""
    model = model.double()
    found = kronecker_factors(model, "squared", [(x, None)], **options)
    params = {name: p for name, p in model.named_parameters() if name in found.layout.names}
    exact = gauss_newton(functional_outputs(model, batch=(x, None)), "squared", params)
    return relative(found.operator().to_dense(), dense_blocks(exact, found.layout.names))


def test_outputs_that_are_overwritten_and_several_tokens_of_one_sample_are_exact():
    torch.manual_seed(0)
    overwritten = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    assert judged(overwritten, drawn(1, 4)) <= 1e-12
    assert judged(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))), drawn(1, 4)) <= 1e-12


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


def test_reduce_is_exact_for_means_over_positions_and_expand_for_outputs_of_positions():
    torch.manual_seed(0)
    assert judged(Pooled(), drawn(5, 3, 4), sharing="reduce") <= 1e-12
    assert judged(Pooled(), drawn(5, 3, 4), sharing="expand") > 0.1
    flat = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    assert judged(flat, drawn(5, 3, 4), sharing="expand") <= 1e-12


@pytest.mark.parametrize("loss", ["cross-entropy", "squared"])
def test_factors_of_drawn_labels_have_the_exact_ones_as_mean(loss):
    small = case("attention")
    loss = CrossEntropy(small.batch[1]) if loss == "cross-entropy" else loss
    found = [
        kronecker_factors(small.model, loss, [small.batch], samples=4, seed=s, select="inner.*") for s in range(60)
    ]
    exact = kronecker_factors(small.model, loss, [small.batch], select="inner.*")
    assert (found[0].gradient_count, exact.gradient_count) == (1 + 4, 1 + 6 * 5)
    for name, want in exact.gradients.items():
        values = torch.stack([each.gradients[name].trace() for each in found])
        assert abs(float(values.mean() - want.trace())) <= 4 * float(values.std()) / 60**0.5
        assert 0 < float(values.std()) < 0.5 * float(want.trace())


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return functional.linear(torch.tanh(self.inner(x)), self.inner.weight)


def test_models_whose_factors_would_be_wrong_are_refused():
    x = drawn(3, 4)
    for model, message in (
        (Reused(), r"inner\.weight does not act by the calls of its layer alone"),
        (nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)), "dropout is active"),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "batch_norm in training mode: call model.eval"),
    ):
        with pytest.raises(ValueError, match=message):
            kronecker_factors(model.double(), "squared", [(x, None)])
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (5, 3))).double()
    with pytest.raises(ValueError, match="gets 15 rows for 5 samples: sharing='reduce' needs the samples"):
        kronecker_factors(flat, "squared", [(drawn(5, 3, 4), None)], sharing="reduce")
    with pytest.raises(ValueError, match="unknown sharing 'mean': use 'expand' or 'reduce'"):
        kronecker_factors(flat, "squared", [(x, None)], sharing="mean")
    with pytest.raises(ValueError, match="no batch has a weight above zero"):
        kronecker_factors(flat, "squared", [(drawn(5, 3, 4), None)], weight=[0])
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), nn.Linear(2, 2)).double()
    assert kronecker_factors(normed, "squared", [(x, None)]).layout.names == ("1.weight", "1.bias")


def test_a_derivative_that_is_not_finite_has_no_factors():
    model = nn.Sequential(nn.Linear(4, 3))
    model.forward = lambda x: (model[0](x) * 0).abs().sqrt()
    with pytest.raises(FloatingPointError, match=r"the layer of 0\.weight has infinities or NaN"):
        kronecker_factors(model.eval(), "squared", [(torch.ones(2, 4),)])
