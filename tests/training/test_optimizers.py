"""Optimizers in simulated precision, judged by their arithmetic written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fpsim
from fpsim import reference
from fpsim.training.in_place import draw_of_step
from fpsim.training.optimizer_state import state_names
from tests.shared.judge import assert_same_bits

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}
STATES = {
    "AdamW": ["exp_avg", "exp_avg_sq"],
    "Adam amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "SGD": ["momentum_buffer"],
    "RMSprop": ["grad_avg", "momentum_buffer", "square_avg"],
    "Adagrad": ["sum"],
    "Adadelta": ["acc_delta", "square_avg"],
    "Adamax": ["exp_avg", "exp_inf"],
    "ASGD": ["ax"],
    "Rprop": ["prev", "step_size"],
    "Adafactor": ["col_var", "row_var", "variance"],
}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a vector, a scalar and a tensor whose memory is not in the order of its elements."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 6), (5,), (), (2, 3, 2, 2)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def tensors_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """The parameters and all their state."""
    states = [value for p in params for _, value in sorted(optimizer.state[p].items()) if isinstance(value, Tensor)]
    return [*(p.detach() for p in params), *states]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_rounds_the_results_of_the_plain_step(name: str) -> None:
    params, plain_params = parameters(), parameters()
    optimizer, plain = OPTIMIZERS[name](params), OPTIMIZERS[name](plain_params)
    fpsim.round_optimizer(optimizer, state="e5m2", weights="bf16")
    names = STATES.get(name, state_names(plain))
    with torch.no_grad():
        for p in plain_params:
            p.copy_(fpsim.round(p, "bf16"))
        for step in range(4):
            run(optimizer, params, range(step, step + 1))
            run(plain, plain_params, range(step, step + 1))
            for p in plain_params:
                p.copy_(fpsim.round(p, "bf16"))
                for key in names:
                    if key in plain.state[p]:
                        plain.state[p][key].copy_(fpsim.round(plain.state[p][key], "e5m2"))
            assert_same(tensors_of(optimizer, params), tensors_of(plain, plain_params))


def test_sgd_with_momentum_by_hand() -> None:
    """b = q(0.5 b + g), w = q(w - 0.25 (0.5 b + g)): the step itself sees the momentum before it is rounded."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([p], lr=0.25, momentum=0.5)
    fpsim.round_optimizer(optimizer, state="e2m1fn", weights="e4m3fn")
    w, b = Fraction(1), None
    for g in (Fraction(5, 4), Fraction(-7, 8), Fraction(3, 8), Fraction(3)):
        p.grad = torch.tensor([float(g)])
        optimizer.step()
        raw = g if b is None else b / 2 + g
        b, w = reference.round(raw, "e2m1fn"), reference.round(w - raw / 4, "e4m3fn")
        assert (optimizer.state[p]["momentum_buffer"].item(), p.item()) == (b, w)


def test_adamw_with_a_format_for_each_moment_and_master_weights_by_hand() -> None:
    lr, (beta1, beta2), eps, decay = 0.1, (0.9, 0.99), 1e-8, 0.01
    p = nn.Parameter(torch.linspace(-2, 2, 9, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    rounded = fpsim.round_optimizer(
        optimizer, {"exp_avg": "e4m3fn/toward_zero", "exp_avg_sq": "bf16"}, weights="e4m3fn", master="fp16"
    )
    master = fpsim.round(torch.linspace(-2, 2, 9, dtype=torch.float64), "fp16")
    m = v = torch.zeros(9, dtype=torch.float64)
    for t in range(1, 6):
        g = torch.sin(torch.arange(9, dtype=torch.float64) * t)
        p.grad = g.clone()
        assert torch.equal(p.detach(), fpsim.round(master, "e4m3fn"))
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        master = fpsim.round(master * (1 - lr * decay) - lr * update, "fp16")
        m, v = fpsim.round(m, "e4m3fn", rounding="toward_zero"), fpsim.round(v, "bf16")
        assert torch.equal(optimizer.state[p]["exp_avg"], m)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], v)
        assert torch.equal(rounded.masters[p], master)
    assert torch.equal(p.detach(), fpsim.round(master, "e4m3fn"))


@pytest.mark.parametrize("compiled", [False, True])
def test_every_tensor_has_its_own_scale(compiled: bool) -> None:
    """Second moments of 1e-12 do not become zero in FP8, as they do without a scale. Also SGD by hand."""
    sizes = [1e-6, 1.0, 1e6]
    params = [nn.Parameter(torch.randn(20) * size) for size in sizes]
    starts = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.5)
    fpsim.round_optimizer(
        optimizer, state="e4m3fn/power_of_two", weights="e5m2/power_of_two/toward_zero", compiled=compiled
    )

    def q(x: Tensor) -> Tensor:
        return fpsim.round(x, "e5m2", rounding="toward_zero", scale="power_of_two")

    weights, momenta = [q(start) for start in starts], [torch.zeros(20)] * 3
    for step in range(3):
        for i, (p, size) in enumerate(zip(params, sizes, strict=True)):
            p.grad = torch.randn(20, generator=torch.Generator().manual_seed(10 * step + i)) * size
            assert_same_bits(p.detach(), weights[i])
            momenta[i] = momenta[i].mul(0.5).add(p.grad)
            weights[i] = q(weights[i].add(momenta[i], alpha=-0.5))
            momenta[i] = fpsim.round(momenta[i], "e4m3fn", scale="power_of_two")
        optimizer.step()
        for p, momentum in zip(params, momenta, strict=True):
            assert_same_bits(optimizer.state[p]["momentum_buffer"], momentum)
            assert momentum.count_nonzero() == 20


@pytest.mark.parametrize("compiled", [False, True])
def test_scaled_stochastic_rounding_has_the_draws_of_the_definition(compiled: bool) -> None:
    p = nn.Parameter(torch.randn(50) * 1e-5)
    optimizer = torch.optim.SGD([p], lr=0.0)
    want = fpsim.round(p.detach(), "e4m3fn", rounding="stochastic", seed=draw_of_step(3, 0) + 1, scale="power_of_two")
    fpsim.round_optimizer(optimizer, weights="e4m3fn/stochastic/power_of_two", seed=3, compiled=compiled)
    assert_same_bits(p.detach(), want)


def test_scales_that_are_impossible_are_errors() -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="master weights in e5m10 cannot hold scaled weights"):
        fpsim.round_optimizer(torch.optim.SGD([p]), weights="e4m3fn/power_of_two", master="fp16")
    half = nn.Parameter(torch.ones(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="scaled rounding of float16 tensors would overflow"):
        fpsim.round_optimizer(torch.optim.SGD([half]), weights="e4m3fn/power_of_two")


def test_parameters_may_be_scaled() -> None:
    layer = nn.Linear(5, 3)
    want = [fpsim.round(p.detach() * 1e-7, "e2m1fn", scale="power_of_two") for p in layer.parameters()]
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1e-7)
    fpsim.round_parameters(layer, "e2m1fn/power_of_two")
    for p, values in zip(layer.parameters(), want, strict=True):
        assert_same_bits(p.detach(), values)


def test_kahan_compensation_by_hand() -> None:
    """Updates far below the last place of bfloat16 add up, as in exact arithmetic rounded as defined."""
    p, plain = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer, without = torch.optim.SGD([p], lr=1.0), torch.optim.SGD([plain], lr=1.0)
    rounded = fpsim.round_optimizer(optimizer, weights="bf16", kahan=True)
    fpsim.round_optimizer(without, weights="bf16")
    w, c = Fraction(1), Fraction(0)
    for step in range(40):
        update = Fraction(3 + step % 5, 2**12)
        for each in (p, plain):
            each.grad = torch.tensor([-float(update)])
        optimizer.step()
        without.step()
        total = w + c + update
        w = reference.round(total, "bf16")
        c = reference.round(total - w, "bf16")
        assert (p.item(), rounded.compensations[p].item()) == (w, c)
    assert plain.item() == 1.0 and p.item() == 1.0 + 6 / 2**7  # the updates add up to 200 / 2**12
    rounded.remove()
    assert p.item() == 1 + Fraction(200, 2**12)


@pytest.mark.parametrize("master", [None, "e8m12/stochastic"])
def test_every_tensor_in_every_step_has_the_documented_draw(master: str | None) -> None:
    params, plain_params = parameters(), parameters()
    optimizer, plain = OPTIMIZERS["AdamW"](params), OPTIMIZERS["AdamW"](plain_params)
    fpsim.round_optimizer(optimizer, "e4m3fn/stochastic", weights="bf16/stochastic:8", master=master, seed=-5)
    kept = [p.detach().clone() for p in plain_params]

    def rounded(x: Tensor, format: str, rounding: str, step: int, j: int, i: int) -> Tensor:
        return fpsim.round(x, format, rounding=rounding, seed=draw_of_step(-5, step) + 4 * j + i)

    def settle(step: int) -> None:
        for j, p in enumerate(plain_params):
            for i, key in enumerate(("exp_avg", "exp_avg_sq")):
                if key in plain.state[p]:
                    plain.state[p][key].copy_(rounded(plain.state[p][key], "e4m3fn", "stochastic", step, j, i))
            kept[j] = rounded(p, "e8m12", "stochastic", step, j, 2) if master else p.clone()
            p.copy_(rounded(kept[j], "bf16", "stochastic:8", step, j, 3))

    with torch.no_grad():
        settle(0)
        for step in range(3):
            run(optimizer, params, range(step, step + 1))
            if master:
                for p, m in zip(plain_params, kept, strict=True):
                    p.copy_(m)
            run(plain, plain_params, range(step, step + 1))
            settle(step + 1)
            assert_same(tensors_of(optimizer, params), tensors_of(plain, plain_params))


def test_compiled_rounding_changes_no_bit() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [*[(130, 130)] * 6, (17,), (3, 5), (), (1 << 14,)]  # more tensors than one call rounds
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        params.append(
            nn.Parameter(torch.randn(2, 16, 32, 32, generator=generator).to(memory_format=torch.channels_last))
        )
        optimizer = OPTIMIZERS["AdamW fused"](params)
        casts = {"exp_avg": "e4m3fn", "exp_avg_sq": "bf16/stochastic"}
        fpsim.round_optimizer(optimizer, casts, weights="bf16", kahan=True, seed=3, compiled=compiled)
        run(optimizer, params, range(2))
        return tensors_of(optimizer, params)

    assert_same(trained(True), trained(False))


def test_rounding_is_compiled_once_for_tensors_of_all_lengths() -> None:
    lengths = [1 << 15, 1 << 15, (1 << 15) + 1, 1 << 16, 1 << 15, 40_000]
    for cast in ("e3m2fn", "e3m2fn/stochastic", "e3m2fn/power_of_two"):
        seed = 0 if "stochastic" in cast else None
        torch._dynamo.utils.counters.clear()
        for count in (1, 4, 6):
            params = [nn.Parameter(torch.randn(n)) for n in lengths[:count]]
            optimizer = torch.optim.SGD(params, momentum=0.9)
            fpsim.round_optimizer(optimizer, cast, seed=seed, compiled=True)
            run(optimizer, params, range(2))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, cast


def test_lbfgs_evaluates_its_closure_at_rounded_weights() -> None:
    p = nn.Parameter(torch.tensor([3.0, -2.0, 0.7]))
    optimizer = torch.optim.LBFGS([p], lr=0.5, max_iter=3)
    fpsim.round_optimizer(optimizer, "bf16", weights="e4m3fn", master="fp32")
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        loss = ((p - 0.3) ** 4).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(seen) > 4
    for values in (*seen, p.detach()):
        assert_same_bits(values, fpsim.round(values, "e4m3fn"))
    state = optimizer.state[p]
    kept = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
    assert len(kept) > 4
    for tensor in kept:
        assert_same_bits(tensor, fpsim.round(tensor, "bf16"))


def test_a_closure_of_an_ordinary_optimizer_sees_the_weights_and_not_the_master_copies() -> None:
    p = nn.Parameter(torch.tensor([1.03]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    fpsim.round_optimizer(optimizer, weights="e4m3fn", master="fp32")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0  # at the weight, 1.0
    want = torch.tensor([1.03]) - 0.5 * 2.0  # the master copy, minus the gradient at the weight
    assert_same_bits(p.detach(), fpsim.round(want, "e4m3fn"))


# -- between the steps -------------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "state": {"state": "e4m3fn"},
    "master": {"state": {"exp_avg": "e5m2"}, "weights": "e4m3fn", "master": "bf16"},
    "kahan": {"state": "bf16", "weights": "bf16", "kahan": True},
    "stochastic": {"state": "e5m2/stochastic", "weights": "e4m3fn/stochastic", "master": "fp32", "seed": 9},
}


@pytest.mark.parametrize("saved_after", [0, 2])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_resumed_from_its_state_dict_gives_the_same_bits(name: str, saved_after: int, tmp_path) -> None:
    params, other = parameters(), parameters(seed=1)
    optimizer, resumed = OPTIMIZERS["AdamW"](params), OPTIMIZERS["AdamW"](other)
    fpsim.round_optimizer(optimizer, **CONFIGURATIONS[name])
    rounded = fpsim.round_optimizer(resumed, **CONFIGURATIONS[name])
    run(optimizer, params, range(saved_after))
    torch.save([optimizer.state_dict(), [p.data for p in params]], tmp_path / "run.pt")
    assert not any(str(key).startswith("fpsim") for state in optimizer.state.values() for key in state)
    run(optimizer, params, range(saved_after, 4))

    state_dict, values = torch.load(tmp_path / "run.pt")
    for p, value in zip(other, values, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(state_dict)
    assert rounded.steps == saved_after
    run(resumed, other, range(saved_after, 4))
    assert_same(tensors_of(resumed, other), tensors_of(optimizer, params))
    assert rounded.steps == 4


def test_param_groups_and_parameters_without_gradients() -> None:
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2], "lr": 0.5}, {"params": params[2:], "momentum": 0.9}], lr=0.1)
    fpsim.round_optimizer(optimizer, {"momentum_buffer": "e5m2"}, weights="e4m3fn")
    before = params[0].detach().clone()
    set_gradients(params, 0)
    params[0].grad = None
    want = fpsim.round(params[3].detach() - 0.1 * params[3].grad, "e4m3fn")
    optimizer.step()
    assert_same_bits(params[0].detach(), before)
    assert_same_bits(params[3].detach(), want)
    assert_same_bits(optimizer.state[params[3]]["momentum_buffer"], fpsim.round(params[3].grad, "e5m2"))
    assert "momentum_buffer" not in optimizer.state[params[1]] or optimizer.state[params[1]]["momentum_buffer"] is None


def test_a_learning_rate_scheduler_does_not_count_the_step_that_finds_the_states() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert state_names(optimizer) == ["exp_avg", "exp_avg_sq"]
    assert not calls and not optimizer.state and torch.equal(p, torch.ones(2))
    p.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert len(calls) == 1


def test_existing_state_is_rounded_at_once() -> None:
    params = parameters()
    optimizer = OPTIMIZERS["AdamW"](params)
    run(optimizer, params, range(1))
    want = [fpsim.round(optimizer.state[p]["exp_avg"], "e4m3fn") for p in params]
    fpsim.round_optimizer(optimizer, {"exp_avg": "e4m3fn"})
    assert_same([optimizer.state[p]["exp_avg"] for p in params], want)


def test_remove_restores_the_master_copies_and_ends_rounding() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = OPTIMIZERS["AdamW"](params)
    rounded = fpsim.round_optimizer(optimizer, "e5m2", weights="e4m3fn", master="fp32")
    assert all(torch.equal(p, fpsim.round(b, "e4m3fn")) for p, b in zip(params, before, strict=True))
    rounded.remove()
    assert_same([p.detach() for p in params], before)
    plain_params = parameters()
    plain = OPTIMIZERS["AdamW"](plain_params)
    run(optimizer, params, range(2))
    run(plain, plain_params, range(2))
    assert_same(tensors_of(optimizer, params), tensors_of(plain, plain_params))
    assert sorted(optimizer.state_dict()["state"][0]) == ["exp_avg", "exp_avg_sq", "step"]


def test_a_step_that_the_gradient_scaler_skips_changes_nothing() -> None:
    params = parameters()
    optimizer = OPTIMIZERS["AdamW"](params)
    rounded = fpsim.round_optimizer(optimizer, "e5m2", weights="e4m3fn", master="bf16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert rounded.steps == 0 and scaler.get_scale() == 2.0**9
    assert_same([p.detach() for p in params], before)
    plain_params = parameters()
    plain = OPTIMIZERS["AdamW"](plain_params)
    fpsim.round_optimizer(plain, "e5m2", weights="e4m3fn", master="bf16")
    run(plain, plain_params, range(1))
    set_gradients(params, 0)
    for p in params:
        p.grad *= 2.0**9
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert rounded.steps == 1
    assert_same(tensors_of(optimizer, params), tensors_of(plain, plain_params))


# -- parameters of a module --------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2, bias=False)


def test_round_parameters_by_glob() -> None:
    torch.manual_seed(0)
    module = Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fpsim.round_parameters(module, {"head": "none", "*.0.weight": "e4m3fn", "body.0": "e5m2/toward_zero"})
    want = dict(before)
    want["body.0.weight"] = fpsim.round(before["body.0.weight"], "e4m3fn")
    want["body.0.bias"] = fpsim.round(before["body.0.bias"], "e5m2", rounding="toward_zero")
    for name, p in module.named_parameters():
        assert_same_bits(p.detach(), want[name], what=name)


def test_round_parameters_stochastically() -> None:
    torch.manual_seed(0)
    module = Small()
    want = [
        fpsim.round(p.detach(), "e4m3fn", rounding="stochastic", seed=draw_of_step(4, 0) + i)
        for i, p in enumerate(module.parameters())
    ]
    fpsim.round_parameters(module, "e4m3fn", rounding="stochastic", seed=4)
    assert_same([p.detach() for p in module.parameters()], want)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": {"exp_av": "bf16"}}, "has no state 'exp_av': the states it has are exp_avg, exp_avg_sq"),
        ({"state": {"momentum_buffer": "bf16"}}, "the states it has are exp_avg, exp_avg_sq"),
        ({"state": "e4m3nf"}, "did you mean e4m3fn"),
        ({"state": "e11m52"}, "torch.float64"),
        ({"weights": "bf16", "master": "e4m3fn"}, "e4m3fn cannot hold weights in e8m7"),
        ({"weights": "e5m2", "master": "e4m3fn"}, "e4m3fn cannot hold weights in e5m2"),
        ({"master": "fp32"}, "give weights"),
        ({"kahan": True, "state": "bf16"}, "give weights"),
        ({"weights": "bf16", "master": "fp32", "kahan": True}, "give one of the two"),
        ({}, "nothing to round"),
        ({"state": "bf16/stochastic"}, "needs a seed"),
        ({"state": "bf16", "seed": 3}, "no meaning without stochastic"),
        ({"state": "bf16/stochastic", "seed": 2**63}, "64 bits"),
        ({"state": "bf16/stochastic", "seed": True}, "64 bits"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_an_error_and_nothing_is_changed(arguments: dict[str, Any], message: str) -> None:
    params = parameters()
    optimizer = OPTIMIZERS["AdamW"](params)
    run(optimizer, params, range(1))
    before = [tensor.clone() for tensor in tensors_of(optimizer, params)]
    with pytest.raises(ValueError, match=message):
        fpsim.round_optimizer(optimizer, **arguments)
    assert_same(tensors_of(optimizer, params), before)
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    fpsim.round_optimizer(optimizer, "bf16")  # and it can still be rounded


def test_rounding_an_optimizer_twice_is_an_error() -> None:
    optimizer = OPTIMIZERS["AdamW"](parameters())
    fpsim.round_optimizer(optimizer, "bf16")
    with pytest.raises(ValueError, match="rounded already"):
        fpsim.round_optimizer(optimizer, weights="bf16")


def test_an_optimizer_without_state() -> None:
    with pytest.raises(ValueError, match="SGD keeps no state"):
        fpsim.round_optimizer(torch.optim.SGD(parameters(), lr=0.1), "bf16")


def test_parameters_added_later_without_a_master_copy_are_an_error() -> None:
    params = parameters()
    optimizer = OPTIMIZERS["AdamW"](params[:2])
    rounded = fpsim.round_optimizer(optimizer, weights="bf16", master="fp32")
    optimizer.add_param_group({"params": params[2:]})
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="remove"):
        optimizer.step()
    rounded.remove()
    fpsim.round_optimizer(optimizer, weights="bf16", master="fp32")
    optimizer.step()


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        ({}, {"state": "bf16"}, "was not rounded"),
        (
            {"state": "bf16"},
            {"weights": "bf16", "master": "fp32"},
            "of 0 parameters, and this optimizer of 4",
        ),
        ({"weights": "bf16", "kahan": True}, {"weights": "bf16"}, "with kahan as it was"),
    ],
    ids=str,
)
def test_a_state_dict_of_another_kind_is_an_error(saved: dict, loading: dict, message: str) -> None:
    params, other = parameters(), parameters()
    optimizer, resumed = OPTIMIZERS["AdamW"](params), OPTIMIZERS["AdamW"](other)
    if saved:
        fpsim.round_optimizer(optimizer, **saved)
    run(optimizer, params, range(1))
    fpsim.round_optimizer(resumed, **loading)
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(optimizer.state_dict())
    assert str(resumed.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ({"haed": "bf16"}, "'haed' matches no parameter: did you mean 'head'"),
        ({"body.0.wight": "bf16"}, "did you mean 'body.0.weight'"),
        ({"*": "fp64"}, "torch.float64"),
        ("e4m3fn/stochastic", "needs a seed"),
    ],
    ids=str,
)
def test_round_parameters_refuses(format: Any, message: str) -> None:
    module = Small()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fpsim.round_parameters(module, format)
    for name, value in module.state_dict().items():
        assert_same_bits(value, before[name])
