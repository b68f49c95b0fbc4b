"""What happens between the steps of a rounded optimizer: steps that are skipped, and weights that are written."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim import Optimizer

import fpsim
from tests.shared.judge import assert_same_bits

FUSED: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, fused=True),
}
UNFUSED: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "SGD loop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "kahan": {"weights": "e4m3fn/stochastic", "kahan": True, "seed": 1},
    "master": {"weights": "e4m3fn", "master": "bf16"},
    "weights and state": {"state": "e5m2/stochastic", "weights": "bf16/stochastic", "seed": 2},
}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 6), (5,)]]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * scale


def everything(optimizer: Optimizer, params: list[nn.Parameter], rounded: fpsim.RoundedOptimizer) -> list[Tensor]:
    """Copies of the parameters, their state, master copies and compensations, and the number of steps."""
    states = [value for p in params for _, value in sorted(optimizer.state[p].items()) if isinstance(value, Tensor)]
    kept = [*rounded.masters.values(), *rounded.compensations.values()]
    return [x.detach().clone() for x in [*params, *states, *kept]] + [torch.tensor(rounded.steps)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


# -- skipped steps -----------------------------------------------------------------------------------------------------


class TakesScaler(torch.optim.SGD):
    """An optimizer of the older convention: its step is given the scaler, and decides itself."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> Any:
        if grad_scaler is not None:
            found = grad_scaler._check_inf_per_device(self)
            if any(value.item() for value in found.values()):
                return None
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.div_(grad_scaler.get_scale())
        return super().step(closure)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*FUSED, *UNFUSED, "TakesScaler"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself")
def test_a_step_that_the_scaler_skips_leaves_no_trace(name: str, rounding: str, unscale: bool) -> None:
    """The run with a skipped step has the bits of the run without it, up to the end."""
    makers = {**FUSED, **UNFUSED, "TakesScaler": lambda p: TakesScaler(p, lr=0.1, momentum=0.9)}
    if unscale and name == "TakesScaler":
        pytest.skip("this optimizer divides by the scale itself")

    def trained(steps: list[int | None]) -> tuple[list[Tensor], list[list[Tensor]]]:
        params = parameters()
        optimizer = makers[name](params)
        rounded = fpsim.round_optimizer(optimizer, **ROUNDINGS[rounding])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        around_skip = []
        for step in steps:
            set_gradients(params, step or 0, scale=8.0)
            scaler.scale(torch.ones(()))
            if step is None:
                params[1].grad[2] = torch.inf
                around_skip.append(everything(optimizer, params, rounded))
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(8.0)
            if step is None:
                around_skip.append(everything(optimizer, params, rounded))
        return everything(optimizer, params, rounded), around_skip

    skipped, [before, after] = trained([1, 2, None, 3])
    assert_same(after, before)
    assert_same(skipped, trained([1, 2, 3])[0])


def _fused_by_its_state_dict(params: list[nn.Parameter]) -> Optimizer:
    optimizer = torch.optim.AdamW(params)
    optimizer.load_state_dict(torch.optim.AdamW(parameters(), fused=True).state_dict())
    return optimizer


@pytest.mark.parametrize("make", [*FUSED.values(), _fused_by_its_state_dict], ids=[*FUSED, "by its state dict"])
def test_the_attribute_found_inf_skips_a_fused_step(make: Callable[[Any], Optimizer]) -> None:
    params = parameters()
    optimizer = make(params)
    rounded = fpsim.round_optimizer(optimizer, **ROUNDINGS["kahan"])
    set_gradients(params, 0)
    optimizer.step()
    before = everything(optimizer, params, rounded)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_same(everything(optimizer, params, rounded), before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert rounded.steps == 2


def test_an_optimizer_that_ignores_found_inf_takes_its_step_and_is_rounded() -> None:
    params = parameters()
    optimizer = torch.optim.RMSprop(params, lr=0.5, alpha=0.0, eps=0.0)  # its update is 0.5 times the gradient's sign
    rounded = fpsim.round_optimizer(optimizer, weights="e4m3fn")
    optimizer.found_inf = torch.tensor(1.0)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    optimizer.step()
    assert rounded.steps == 1
    assert_same_bits(params[0].detach(), fpsim.round(before - 0.5 * params[0].grad.sign(), "e4m3fn"))


def test_one_scaler_skips_the_step_of_one_of_two_optimizers() -> None:
    good, bad, alone = parameters(), parameters(1), parameters()
    optimizers = [FUSED["AdamW"](params) for params in (good, bad, alone)]
    rounded = [fpsim.round_optimizer(optimizer, **ROUNDINGS["kahan"]) for optimizer in optimizers]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_gradients(good, 0, scale=8.0)
    set_gradients(bad, 0, scale=torch.inf)
    before = everything(optimizers[1], bad, rounded[1])[:2]
    scaler.step(optimizers[0])
    scaler.step(optimizers[1])
    set_gradients(alone, 0)
    optimizers[2].step()
    assert [each.steps for each in rounded] == [1, 0, 1]
    assert_same([p.detach() for p in bad], before)
    assert_same(everything(optimizers[0], good, rounded[0]), everything(optimizers[2], alone, rounded[2]))


def test_a_closure_that_raises_leaves_the_weights() -> None:
    for kept in ({"master": "fp32"}, {"kahan": True}, {}):
        params = parameters()
        optimizer = torch.optim.SGD(params, lr=0.1)
        rounded = fpsim.round_optimizer(optimizer, weights="e4m3fn", **kept)
        set_gradients(params, 0)
        optimizer.step()
        before = everything(optimizer, params, rounded)
        with pytest.raises(ArithmeticError):
            optimizer.step(lambda: 1 // 0)
        assert_same(everything(optimizer, params, rounded), before)


# -- weights that are written ------------------------------------------------------------------------------------------


def _load(module: nn.Linear, values: Tensor) -> None:
    module.load_state_dict({"weight": values})


def _copy_data(module: nn.Linear, values: Tensor) -> None:
    module.weight.data.copy_(values)


def _copy_in_place(module: nn.Linear, values: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(values)


def _vector(module: nn.Linear, values: Tensor) -> None:
    vector_to_parameters(values.flatten(), module.parameters())


def _new_memory(module: nn.Linear, values: Tensor) -> None:
    module.weight.data = values.t().contiguous().t()


def _swap(module: nn.Linear, values: Tensor) -> None:
    other = nn.Parameter(values)
    torch.utils.swap_tensors(module.weight, other)


WRITERS = (_load, _copy_data, _copy_in_place, _vector, _new_memory, _swap)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("kept", ["master", "kahan"])
def test_the_next_step_starts_from_the_weights_that_were_written(write: Callable[..., None], kept: str) -> None:
    """By hand: elements that were written start from their value, the others from their master copy or sum."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3, bias=False)
    options: dict[str, Any] = {"master": "bf16"} if kept == "master" else {"kahan": True}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.125)
    rounded = fpsim.round_optimizer(optimizer, weights="e4m3fn", **options)
    module.weight.grad = torch.full((3, 4), 0.171)
    optimizer.step()
    weight = module.weight.detach().clone()
    start = rounded.masters[module.weight] if kept == "master" else weight + rounded.compensations[module.weight]
    assert not torch.equal(start, weight)
    start = start.clone()
    values = weight.clone()
    values[1] = torch.tensor([0.3, -7.7, 0.0, 100.3])
    start[1] = fpsim.round(values[1], "bf16") if kept == "master" else values[1]
    write(module, values)
    module.weight.grad = torch.full((3, 4), -0.377)
    optimizer.step()
    total = start + 0.125 * 0.377
    if kept == "master":
        total = fpsim.round(total, "bf16")
        assert_same_bits(rounded.masters[module.weight], total)
    assert_same_bits(module.weight.detach(), fpsim.round(total, "e4m3fn"))


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_order_of_loading_does_not_matter(rounding: str, optimizer_first: bool) -> None:
    def step(module: nn.Linear, optimizer: Optimizer, number: int) -> None:
        set_gradients(list(module.parameters()), number)
        optimizer.step()

    torch.manual_seed(0)
    modules = [nn.Linear(5, 4), nn.Linear(5, 4)]
    optimizers = [FUSED["AdamW"](module.parameters()) for module in modules]
    rounded = [fpsim.round_optimizer(optimizer, **ROUNDINGS[rounding]) for optimizer in optimizers]
    step(modules[0], optimizers[0], 0)
    saved = copy.deepcopy([modules[0].state_dict(), optimizers[0].state_dict()])
    step(modules[1], optimizers[1], 7)
    targets: list[Any] = [modules[1], optimizers[1]]
    for i in (1, 0) if optimizer_first else (0, 1):
        targets[i].load_state_dict(saved[i])
    for each in (0, 1):
        step(modules[each], optimizers[each], 1)
    got, want = (everything(optimizers[i], list(modules[i].parameters()), rounded[i]) for i in (1, 0))
    assert_same(got, want)


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_other_weights_than_those_of_the_state_dict_hold(optimizer_first: bool) -> None:
    modules = [nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0) for module in modules]
    for optimizer in optimizers:
        fpsim.round_optimizer(optimizer, weights="e4m3fn", master="fp32")
    zeros = {"weight": torch.zeros(4, 5)}
    if not optimizer_first:
        modules[1].load_state_dict(zeros)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    if optimizer_first:
        modules[1].load_state_dict(zeros)
    modules[1].weight.grad = torch.ones(4, 5)
    optimizers[1].step()
    assert_same_bits(modules[1].weight.detach(), torch.zeros(4, 5))


def test_master_copies_outlive_a_change_of_the_weights_format() -> None:
    params, resumed = parameters(), parameters(1)
    optimizer, other = (torch.optim.SGD(p, lr=0.0) for p in (params, resumed))
    masters = fpsim.round_optimizer(optimizer, weights="e4m3fn", master="fp32").masters
    fpsim.round_optimizer(other, weights="e5m2", master="fp32")
    for p, value in zip(resumed, params, strict=True):
        p.data.copy_(value)
    other.load_state_dict(optimizer.state_dict())
    set_gradients(resumed, 0)
    other.step()
    assert_same([p.detach() for p in resumed], [fpsim.round(m, "e5m2") for m in masters.values()])


def test_an_average_of_weights_may_be_swapped_in_and_out() -> None:
    """After the swap back, the run goes on with the bits of a run without it."""
    finals = []
    for swaps in (False, True):
        params = parameters()
        optimizer = FUSED["AdamW"](params)
        rounded = fpsim.round_optimizer(optimizer, **ROUNDINGS["master"])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            if swaps:
                kept = [p.detach().clone() for p in params]
                for p, value in zip(params, kept, strict=True):
                    p.data.copy_(torch.full_like(value, 0.123))
                for p, value in zip(params, kept, strict=True):
                    p.data.copy_(value)
        finals.append(everything(optimizer, params, rounded))
    assert_same(*finals)


def test_the_master_copy_of_a_weight_that_overflowed_is_kept() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=1.0)
    fpsim.round_optimizer(optimizer, weights="e4m3fn/nearest_even/ovf_inf", master="fp32")
    p.grad = torch.tensor([-999.0, 0.0])
    optimizer.step()
    assert p[0].isnan()  # the master copy is 1000
    p.grad = torch.tensor([990.0, 0.0])
    optimizer.step()
    assert p.tolist() == [10.0, 2.0]


@pytest.mark.parametrize("kept", [{"master": "fp32"}, {"kahan": True}])
def test_remove_keeps_what_was_written(kept: dict[str, Any]) -> None:
    p = nn.Parameter(torch.tensor([1.03, 1.03]))
    rounded = fpsim.round_optimizer(torch.optim.SGD([p], lr=0.1), weights="e4m3fn", **kept)
    p.data[1] = 7.7
    rounded.remove()
    lost = fpsim.round(torch.tensor(1.03) - 1, "e4m3fn")  # the weight is 1
    first = torch.tensor(1.03) if kept.get("master") else 1 + lost
    assert_same_bits(p.detach(), torch.stack([first, torch.tensor(7.7)]))


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.flatten], ids=["dtype", "shape"])
def test_a_parameter_of_another_kind_is_an_error_and_can_be_removed(change: Callable[[Tensor], Tensor]) -> None:
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    rounded = fpsim.round_optimizer(optimizer, weights="e4m3fn", master="fp32")
    p.data = change(p.data)
    with pytest.raises(RuntimeError, match=r"changed from torch.float32 of shape \(2, 3\) on cpu to .*call remove\(\)"):
        optimizer.step()
    rounded.remove()
    fpsim.round_optimizer(optimizer, weights="e4m3fn")
    assert torch.equal(p, torch.ones_like(p))


# -- optimizers of other libraries -------------------------------------------------------------------------------------


class Walker(torch.optim.Optimizer):
    """SGD whose momentum stands in a mapping, with a count beside it; on loading it walks over what it was given."""

    def __init__(self, params: Any, container: type = dict) -> None:
        super().__init__(params, {"lr": 0.5})
        self.container = container
        self.state["total_step"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["total_step"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = {"m": torch.zeros_like(p)} if self.container is dict else None
                    if self.container is not dict:
                        state["momentum"] = self.container([torch.zeros_like(p), torch.tensor(3)])
                held = state["momentum"]
                momentum = held["m"] if self.container is dict else held[0]
                momentum.mul_(0.5).add_(p.grad)
                p.sub_(momentum, alpha=group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    self.state[p] = {name: self.state[p][name] for name in state_dict["state"][key]}


@pytest.mark.parametrize("saved_after", [0, 1])
@pytest.mark.parametrize("rounding", ["master", "kahan"])
def test_optimizers_that_walk_over_the_state_on_loading_work(rounding: str, saved_after: int) -> None:
    params, resumed = parameters(), parameters(1)
    optimizer, other = Walker(params), Walker(resumed)
    rounded, again = (fpsim.round_optimizer(each, **ROUNDINGS[rounding]) for each in (optimizer, other))
    for step in range(saved_after):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for p, value in zip(resumed, params, strict=True):
        p.data.copy_(value)
    for _ in range(2):
        other.load_state_dict(saved)
    for each, own in ((optimizer, params), (other, resumed)):
        set_gradients(own, 5)
        each.step()
    assert_same(everything(other, resumed, again), everything(optimizer, params, rounded))
    assert not any(str(key).startswith("fpsim") for p in resumed for key in other.state[p])


@pytest.mark.parametrize("container", [dict, list, tuple, deque])
def test_a_state_in_a_container_is_rounded(container: type) -> None:
    """m = q(m / 2 + g) by hand."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = Walker([p], container)
    fpsim.round_optimizer(optimizer, "e2m1fn")
    gradient, momentum = torch.tensor([1.3, -0.7, 2.9]), torch.zeros(3)
    for _ in range(3):
        p.grad = gradient
        optimizer.step()
        momentum = fpsim.round(momentum / 2 + gradient, "e2m1fn")
        held = optimizer.state[p]["momentum"]
        assert_same_bits(held["m"] if container is dict else held[0], momentum)


def test_an_optimizer_without_hooks_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    with pytest.raises(ValueError, match=r"Wrapper lacks the hooks.*if it wraps another optimizer, round that one"):
        fpsim.round_optimizer(Wrapper(torch.optim.SGD(parameters())), weights="bf16")


# -- sparse gradients --------------------------------------------------------------------------------------------------


def sparse_gradient(step: int) -> Tensor:
    """A gradient of rows 1, 3 and 1 again, not coalesced: shape (5, 2)."""
    values = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
    return torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), values, (5, 2), check_invariants=True)


@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad", "SGD"])
@pytest.mark.parametrize("state", [False, True])
def test_sparse_gradients_round_as_their_plain_steps_do(name: str, state: bool) -> None:
    make = {
        "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }[name]
    torch.manual_seed(0)
    start = torch.randn(5, 2)
    p, plain_p = nn.Parameter(start.clone()), nn.Parameter(fpsim.round(start, "bf16"))
    optimizer, plain = make([p]), make([plain_p])
    rounded = fpsim.round_optimizer(optimizer, "e5m2" if state else None, weights="bf16", master="fp32")
    master = start.clone()
    for step in range(3):
        with torch.no_grad():
            plain_p.copy_(master)
        for each, own in ((optimizer, p), (plain, plain_p)):
            own.grad = sparse_gradient(step)
            each.step()
        master = plain_p.detach().clone()
        for key, value in plain.state[plain_p].items():
            if state and isinstance(value, Tensor) and value.ndim:
                plain.state[plain_p][key] = _rounded(value)
                assert_same_bits(optimizer.state[p][key].to_dense(), plain.state[plain_p][key].to_dense())
        assert_same_bits(p.detach(), fpsim.round(master, "bf16"))
        assert_same_bits(rounded.masters[p], master)


def _rounded(value: Tensor) -> Tensor:
    if value.layout is torch.strided:
        return fpsim.round(value, "e5m2")
    whole = value.coalesce()
    return torch.sparse_coo_tensor(
        whole.indices(), fpsim.round(whole.values(), "e5m2"), whole.shape, is_coalesced=True, check_invariants=True
    )
