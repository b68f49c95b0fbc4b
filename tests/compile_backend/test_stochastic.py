"""Stochastic rounding in the backend: a seed per run of a graph, a salt per rounding, shared by forward and backward.

The models are written by hand, with the next seed of torch's generator and the salts in the backend's order of values:
for each product first the left operand, then the right one. A value that was rounded before keeps its rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fpsim
from tests.shared.models import BACKENDS_OF_A_GRAPH, dyadic

BACKENDS = pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
OF_A_GRAPH = pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)


class Network(nn.Module):
    """Two layers with a sum of squares between, whose derivative uses the value that the second layer rounds."""

    def __init__(self, wrap: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        self.wrap = wrap
        with torch.no_grad():
            self.a.weight.copy_(dyadic(16, 8, seed=1, top=32))
            self.b.weight.copy_(dyadic(4, 16, seed=2, top=32))

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.wrap(self.block, x) if self.wrap else self.block(x))


def next_seed() -> Tensor:
    """The seed that the next run will draw. The generator is left unchanged."""
    with torch.random.fork_rng():
        return torch.randint(-(2**63), 2**63 - 1, [1])


def q(x: Tensor, cast: str, seed: Tensor, salt: int) -> Tensor:
    name, rounding = cast.split("/")
    return fpsim.round(x, name, rounding=rounding, overflow="sat_finite", seed=seed, salt=salt)


ROLES = {"activation": "e4m2/stochastic", "weight": "e3m1/stochastic:5", "gradient": "e5m2/stochastic_b:4"}


def by_hand(model: Network, x: Tensor, dy: Tensor, seed: Tensor) -> dict[str, Tensor]:
    a, b = model.a.weight.detach(), model.b.weight.detach()
    x_q, a_q = q(x, ROLES["activation"], seed, 1), q(a, ROLES["weight"], seed, 2)
    h = F.relu(x_q @ a_q.T)
    h_q, b_q = q(h, ROLES["activation"], seed, 3), q(b, ROLES["weight"], seed, 4)
    dy_q = q(dy, ROLES["gradient"], seed, 5)
    dh = dy_q @ b_q * (h > 0)
    dh_q = q(dh, ROLES["gradient"], seed, 6)
    return {"y": h_q @ b_q.T, "b": dy_q.T @ h_q, "a": dh_q.T @ x_q, "x": dh_q @ a_q}


def run(model: Network, compiled: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = compiled(x)
    y.backward(dy)
    return {"y": y.detach(), "b": model.b.weight.grad, "a": model.a.weight.grad, "x": x.grad}  # type: ignore[dict-item]


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert torch.equal(got[name], want[name]), name


OPTIONS = {**ROLES, "overflow": "sat_finite"}


@BACKENDS
def test_a_step_is_that_written_by_hand_with_the_seed_of_the_generator(backend: str) -> None:
    model, x, dy = Network(), dyadic(6, 8, seed=3, top=32), dyadic(6, 4, seed=4, top=32)
    compiled = torch.compile(model, backend=backend, options=OPTIONS)
    run(model, compiled, x, dy)
    torch.manual_seed(11)
    draws = []
    for _ in range(3):
        seed = next_seed()
        got = run(model, compiled, x, dy)
        assert_equal(got, by_hand(model, x, dy, seed))
        draws.append(got["y"])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    torch.manual_seed(11)
    assert torch.equal(run(model, compiled, x, dy)["y"], draws[0])


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_recomputation_sees_the_same_draw(budget: float) -> None:
    model, x, dy = Network(), dyadic(6, 8, seed=3, top=32), dyadic(6, 4, seed=4, top=32)
    with functorch_config.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, backend="fpsim", options=OPTIONS)
        run(model, compiled, x, dy)
        torch.manual_seed(5)
        seed = next_seed()
        assert_equal(run(model, compiled, x, dy), by_hand(model, x, dy, seed))


@BACKENDS
def test_activation_checkpointing_sees_the_same_draw(backend: str) -> None:
    model = Network(lambda block, x: checkpoint(block, x, use_reentrant=False))
    x, dy = dyadic(6, 8, seed=3, top=32), dyadic(6, 4, seed=4, top=32)
    compiled = torch.compile(model, backend=backend, options=OPTIONS)
    run(model, compiled, x, dy)
    torch.manual_seed(5)
    seed = next_seed()
    assert_equal(run(model, compiled, x, dy), by_hand(model, x, dy, seed))


@OF_A_GRAPH
def test_one_role_may_be_stochastic(backend: str) -> None:
    layer, x, dy = nn.Linear(8, 8, bias=False), dyadic(4, 8, seed=1, top=32), dyadic(4, 8, seed=2, top=32)
    with torch.no_grad():
        layer.weight.copy_(dyadic(8, 8, seed=3, top=32))
    options = {"activation": "e4m2", "weight": "e4m2", "gradient": "e5m1/stochastic:8"}
    compiled = torch.compile(layer, backend=backend, options=options)
    seed = next_seed()
    compiled(x).backward(dy)
    gradient = fpsim.round(dy, "e5m1", rounding="stochastic:8", seed=seed, salt=1)
    assert torch.equal(layer.weight.grad, gradient.T @ fpsim.round(x, "e4m2"))


def test_two_products_of_one_value_share_its_rounding_and_two_casts_do_not() -> None:
    x, a, b = dyadic(8, 8, seed=1, top=32), dyadic(8, 8, seed=2, top=32), dyadic(8, 8, seed=3, top=32)
    compiled = torch.compile(lambda x: (x @ a, x @ b), backend="fpsim_eager", options={"format": "e4m2/stochastic"})
    seed = next_seed()
    left, right = compiled(x)
    x_q = q(x, "e4m2/stochastic", seed, 1)
    assert torch.equal(left, x_q @ q(a, "e4m2/stochastic", seed, 2))
    assert torch.equal(right, x_q @ q(b, "e4m2/stochastic", seed, 3))


def test_deterministic_policies_take_nothing_from_the_generator() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    compiled = torch.compile(layer, backend="fpsim", options={"format": "e4m2"})
    before = torch.get_rng_state()
    compiled(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_is_drawn_once_per_run_of_a_graph() -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="fpsim", options={"format": "e4m2/stochastic"})
    x = torch.randn(4, 8)
    compiled(x)
    torch.manual_seed(0)
    compiled(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(-(2**63), 2**63 - 1, [1])
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_names_the_rounding_and_its_bits() -> None:
    plan = fpsim.explain(nn.Linear(8, 8), torch.randn(4, 8), policy={"format": "e4m2", "rounding": "stochastic"})
    assert {str(site.cast) for site in plan.sites} == {"e4m2/stochastic:23/ovf_inf"}


@OF_A_GRAPH
def test_the_policy_of_one_module_may_be_stochastic(backend: str) -> None:
    model, x = Network(), dyadic(6, 8, seed=3, top=32)
    compiled = torch.compile(model, backend=backend, options={"format": "none", "modules": {"b": "e4m2/stochastic"}})
    seed = next_seed()
    h = F.relu(x @ model.a.weight.T)
    h_q, b_q = (
        fpsim.round(t, "e4m2", rounding="stochastic", seed=seed, salt=i) for i, t in ((1, h), (2, model.b.weight))
    )
    assert torch.equal(compiled(x), h_q @ b_q.T)


@BACKENDS
def test_results_may_be_rounded_stochastically(backend: str) -> None:
    a, b = dyadic(6, 8, seed=3, top=32), dyadic(8, 4, seed=4, top=32)
    compiled = torch.compile(lambda a: a @ b, backend=backend, options={"format": "none", "output": "e4m2/stochastic"})
    seed = next_seed()
    assert torch.equal(compiled(a), fpsim.round(a @ b, "e4m2", rounding="stochastic", seed=seed, salt=1))
