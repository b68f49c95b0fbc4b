"""Fused steps that round the state as they write it, judged by torch's own kernels and the rounding after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

import fpsim
from tests.shared.judge import assert_same_bits

#: Tensors that are left to torch's kernels: a short one, one with elements after the last vector, one that is not laid
#: out in order, and a scalar. The first two are large and in order.
SHAPES = [(256, 260), (1 << 16,), (48,), (257, 257), (16, 16, 16, 17), ()]
TAKEN = {256 * 260, 1 << 16}

STEPS: dict[str, tuple[Callable[[Any], Optimizer], Mapping[str, str]]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), {"exp_avg": "e4m3fn", "exp_avg_sq": "e5m2"}),
    "Adam": (
        lambda p: torch.optim.Adam(
            p, lr=0.01, betas=(0.4, 0.9), weight_decay=0.1, amsgrad=True, maximize=True, fused=True
        ),
        {"exp_avg_sq": "bf16", "max_exp_avg_sq": "e5m2/toward_zero"},
    ),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr_decay=0.1, weight_decay=0.1, fused=True), {"sum": "e8m3"}),
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
        {"momentum_buffer": "e5m2"},
    ),
}


class Lengths(TorchFunctionMode):
    """The lengths of the tensors that torch's fused kernels get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith("_fused_"):
            self.seen |= {p.numel() for p in args[0]}
        return func(*args, **(kwargs or {}))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t) for t in tensors]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * 10.0 ** (3 - 2 * step))


def take_step(optimizer: Optimizer, params: list[nn.Parameter], step: int) -> set[int]:
    set_gradients(params, step)
    with Lengths() as lengths:
        optimizer.step()
    return lengths.seen


def tensors_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    states = [value for p in params for _, value in sorted(optimizer.state[p].items()) if isinstance(value, Tensor)]
    return [*(p.detach() for p in params), *states]


@pytest.mark.parametrize("name", STEPS)
def test_large_tensors_take_a_compiled_step_with_the_bits_of_torchs_kernel(name: str) -> None:
    make, casts = STEPS[name]
    params, plain_params = parameters(), parameters()
    optimizer, plain = make(params), make(plain_params)
    fpsim.round_optimizer(optimizer, casts, compiled=True)
    for step in range(3):
        seen = take_step(optimizer, params, step)
        if step > 0:  # the first step of SGD has no momentum yet
            assert seen.isdisjoint(TAKEN) and len(seen) == len(SHAPES) - len(TAKEN)
        take_step(plain, plain_params, step)
        for p in plain_params:
            for key, cast in casts.items():
                format, _, rounding = cast.partition("/")
                state = plain.state[p][key]
                state.copy_(fpsim.round(state, format, rounding=rounding or "nearest_even"))
        for ours, theirs in zip(tensors_of(optimizer, params), tensors_of(plain, plain_params), strict=True):
            assert_same_bits(ours, theirs)


def test_random_draws_and_scales_are_those_of_rounding_after_the_step() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        params = parameters()
        optimizer = torch.optim.AdamW(params, lr=0.01, fused=True)
        casts = {"exp_avg": "e4m3fn/stochastic", "exp_avg_sq": "e4m3fn/power_of_two"}
        fpsim.round_optimizer(optimizer, casts, weights="bf16", kahan=True, seed=3, compiled=compiled)
        for step in range(2):
            assert take_step(optimizer, params, step).isdisjoint(TAKEN) == compiled
        return tensors_of(optimizer, params)

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert_same_bits(ours, theirs)


def rounded(compiled: bool | None = True) -> tuple[Optimizer, list[nn.Parameter], fpsim.RoundedOptimizer]:
    make, casts = STEPS["AdamW"]
    params = parameters()
    optimizer = make(params)
    return optimizer, params, fpsim.round_optimizer(optimizer, casts, compiled=compiled)


def test_few_numbers_are_left_to_torchs_kernel() -> None:
    optimizer, params, _ = rounded(compiled=None)
    assert take_step(optimizer, params, 0) >= TAKEN


def test_a_hook_that_comes_first_sees_states_that_are_not_rounded() -> None:
    make, casts = STEPS["AdamW"]
    params, seen = parameters(), []
    optimizer = make(params)
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o.state[params[0]]["exp_avg"].clone()))
    fpsim.round_optimizer(optimizer, casts, compiled=True)
    assert take_step(optimizer, params, 0) >= TAKEN
    assert not torch.equal(seen[0], fpsim.round(seen[0], "e4m3fn"))


def test_a_step_with_a_closure_is_left_to_torchs_kernel() -> None:
    optimizer, params, _ = rounded()
    set_gradients(params, 0)
    with Lengths() as lengths:
        optimizer.step(lambda: torch.tensor(1.0))
    assert lengths.seen >= TAKEN


def test_a_scheduler_may_wrap_the_step_before_and_after() -> None:
    make, casts = STEPS["AdamW"]
    for schedulers_first in (True, False):
        params = parameters()
        optimizer = make(params)
        if schedulers_first:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        of = fpsim.round_optimizer(optimizer, casts, compiled=True)
        if not schedulers_first:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        assert take_step(optimizer, params, 0).isdisjoint(TAKEN)
        scheduler.step()  # warns, and so fails, if it believes that the optimizer has not stepped
        of.remove()
        assert take_step(optimizer, params, 1) >= TAKEN
        assert scheduler.get_last_lr() == [0.005]


def test_remove_leaves_the_optimizer_as_it_was() -> None:
    optimizer, params, of = rounded()
    assert "step" in vars(optimizer)
    of.remove()
    assert "step" not in vars(optimizer)
    assert take_step(optimizer, params, 0) >= TAKEN
