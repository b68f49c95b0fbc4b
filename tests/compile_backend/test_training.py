"""Training loops under a compiled policy: accumulation, autocast, loss scaling, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fpsim
from tests.shared.models import dyadic

BACKENDS = pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
OPTIONS = {"activation": "e4m2", "weight": "e4m1", "gradient": "e5m1"}


def layer() -> nn.Linear:
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(dyadic(4, 8, seed=0))
    return linear


def test_gradients_of_several_batches_accumulate() -> None:
    linear, want = layer(), torch.zeros(4, 8)
    compiled = torch.compile(linear, backend="fpsim_eager", options=OPTIONS)
    for seed in (1, 2, 3):
        x, dy = dyadic(5, 8, seed=seed), dyadic(5, 4, seed=10 + seed)
        compiled(x).backward(dy)
        want += fpsim.round(dy, "e5m1").T @ fpsim.round(x, "e4m2")
    assert torch.equal(linear.weight.grad, want)


@BACKENDS
def test_autocast_in_training(backend: str) -> None:
    """Operands are cast to bfloat16, then rounded, forward and backward. The gradient of the weight is float32."""
    linear, x, dy = layer(), dyadic(5, 8, seed=1).requires_grad_(), dyadic(5, 4, seed=2)
    compiled = torch.compile(linear, backend=backend, options=OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
    y.backward(dy.bfloat16())
    xq, wq = fpsim.round(x.detach().bfloat16(), "e4m2"), fpsim.round(linear.weight.detach().bfloat16(), "e4m1")
    dyq = fpsim.round(dy.bfloat16(), "e5m1")
    assert y.dtype == torch.bfloat16 and torch.equal(y, xq @ wq.T)
    assert torch.equal(x.grad, (dyq @ wq).float())
    assert torch.equal(linear.weight.grad, (dyq.T @ xq).float())


def test_a_scaled_loss_is_scaled_before_gradients_are_rounded() -> None:
    """Gradients that would underflow in their format survive. `GradScaler` divides after the rounding."""
    linear, x, dy = layer(), dyadic(5, 8, seed=1), dyadic(5, 4, seed=2, unit=2.0**-19)
    compiled = torch.compile(linear, backend="fpsim_eager", options=OPTIONS)
    optimizer = torch.optim.SGD(linear.parameters(), lr=2.0**10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before, xq = linear.weight.detach().clone(), fpsim.round(x, "e4m2")
    assert not fpsim.round(dy / 2, "e5m1").any()

    scaler.scale((compiled(x) * dy).sum()).backward()
    scaler.step(optimizer)
    gradient = fpsim.round(dy * 2.0**12, "e5m1").T @ xq / 2.0**12
    assert torch.equal(linear.weight.grad, gradient)
    assert torch.equal(linear.weight.detach(), before - 2.0**10 * gradient)


def test_a_scale_that_overflows_the_gradients_format_is_halved_and_the_step_skipped() -> None:
    linear, x, dy = layer(), dyadic(5, 8, seed=1), dyadic(5, 4, seed=2)
    compiled = torch.compile(linear, backend="fpsim_eager", options={**OPTIONS, "overflow": "ovf_inf"})
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = linear.weight.detach().clone()
    scaler.scale((compiled(x) * dy).sum()).backward()
    assert not linear.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(linear.weight.detach(), before) and scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(("backend", "reentrant"), [("fpsim", False), ("fpsim_eager", False), ("fpsim_eager", True)])
def test_checkpointed_activations_are_rounded_again_as_they_were(backend: str, reentrant: bool) -> None:
    first, second = layer(), nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        second.weight.copy_(dyadic(3, 4, seed=5))
    x, dy = dyadic(5, 8, seed=1).requires_grad_(), dyadic(5, 3, seed=2)
    block = nn.Sequential(first, nn.ReLU())
    compiled = torch.compile(
        lambda x: second(checkpoint(block, x, use_reentrant=reentrant)), backend=backend, options=OPTIONS
    )
    compiled(x).backward(dy)

    xq, w1, w2 = (fpsim.round(t.detach(), f) for t, f in ((x, "e4m2"), (first.weight, "e4m1"), (second.weight, "e4m1")))
    h, dyq = xq @ w1.T, fpsim.round(dy, "e5m1")
    assert torch.equal(second.weight.grad, dyq.T @ fpsim.round(h.relu(), "e4m2"))
    dh = fpsim.round((dyq @ w2) * (h > 0), "e5m1")
    assert torch.equal(first.weight.grad, dh.T @ xq)
    assert torch.equal(x.grad, dh @ w1)


def test_a_whole_step_with_everything_rounded() -> None:
    """Two steps of SGD with momentum, by hand: forward and backward, then the optimizer's state and the weights."""
    linear, w = layer(), dyadic(4, 8, seed=0)
    compiled = torch.compile(linear, backend="fpsim", options=OPTIONS)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.125, momentum=0.5)
    fpsim.round_optimizer(optimizer, "e4m3fn", weights="e4m3fn", master="bf16")
    master, momentum = fpsim.round(w, "bf16"), None
    for step in range(2):
        x, dy = dyadic(5, 8, seed=20 + step), dyadic(5, 4, seed=30 + step)
        optimizer.zero_grad()
        compiled(x).backward(dy)
        optimizer.step()
        gradient = fpsim.round(dy, "e5m1").T @ fpsim.round(x, "e4m2")
        raw = gradient if momentum is None else 0.5 * momentum + gradient
        master, momentum = fpsim.round(master - 0.125 * raw, "bf16"), fpsim.round(raw, "e4m3fn")
        assert torch.equal(linear.weight.detach(), fpsim.round(master, "e4m3fn"))
        assert torch.equal(optimizer.state[linear.weight]["momentum_buffer"], momentum)
