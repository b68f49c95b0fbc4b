"""A module under a policy as a pure function, with the values of the backend and derivatives checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.func import grad, jvp, vjp, vmap

import fpsim
from fpsim import Policy, curvature
from fpsim.compile_backend.functional import functional

State = Mapping[str, Tensor]


def e4m3(x: Tensor) -> Tensor:
    return fpsim.round(x, "e4m3fn")


class Network(nn.Module):
    """Two linear layers with a norm, a softmax and a product of activations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.last(torch.softmax(h @ h.T, -1) @ h)


def by_hand(state: State, x: Tensor, last: Callable[[Tensor], Tensor] = e4m3) -> Tensor:
    h = e4m3(x) @ e4m3(state["first.weight"]).T + state["first.bias"]
    h = F.layer_norm(h, (4,), state["norm.weight"], state["norm.bias"])
    h = e4m3(torch.softmax(e4m3(h) @ e4m3(h).T, -1)) @ e4m3(h)
    return last(h) @ last(state["last.weight"]).T + state["last.bias"]


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def state(network: Network) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(got: State, want: State) -> None:
    torch.testing.assert_close(dict(got), dict(want), rtol=1e-12, atol=1e-12)


def test_values_are_those_of_the_backend(network: Network, state: State) -> None:
    call = functional(network, Policy(format="e4m3fn"))
    compiled = torch.compile(network, backend="fpsim_eager", options={"format": "e4m3fn"})
    for x in (drawn(5, 6), drawn(5, 6, seed=1), drawn(2, 6, seed=2)):  # the third has another shape
        assert torch.equal(call(state, (x,), {}), compiled(x))
        assert torch.equal(call(state, (), {"x": x}), compiled(x))
    doubled = {name: 2 * value for name, value in state.items()}
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(2)
    assert torch.equal(call(doubled, (drawn(5, 6),), {}), compiled(drawn(5, 6)))


def test_derivatives_are_those_of_the_straight_through_surrogate(network: Network, state: State) -> None:
    call, x = functional(network, Policy(format="e4m3fn")), drawn(5, 6)
    direction = {name: drawn(*value.shape, seed=9) for name, value in state.items()}

    def loss(state: State) -> Tensor:
        return call(state, (x,), {}).square().sum()

    def loss_by_hand(state: State) -> Tensor:
        return by_hand(state, x).square().sum()

    assert_close(grad(loss)(state), grad(loss_by_hand)(state))
    product = jvp(grad(loss_by_hand), (state,), (direction,))[1]
    assert_close(jvp(grad(loss), (state,), (direction,))[1], product)
    assert_close(vjp(grad(loss), state)[1](direction)[0], product)


def test_each_example_of_a_batch(network: Network, state: State) -> None:
    call, xs = functional(network, Policy(format="e4m3fn")), drawn(3, 5, 6)
    got = vmap(lambda x: grad(lambda s: call(s, (x,), {}).sum())(state))(xs)
    want = [grad(lambda s, x=x: by_hand(s, x).sum())(state) for x in xs]
    assert_close(got, {name: torch.stack([one[name] for one in want]) for name in state})


def test_rules_for_modules_hold(network: Network, state: State) -> None:
    call = functional(network, Policy(format="e4m3fn").with_modules({"last": "bf16"}))
    want = by_hand(state, drawn(5, 6), lambda t: fpsim.round(t, "bf16"))
    torch.testing.assert_close(call(state, (drawn(5, 6),), {}), want, rtol=1e-14, atol=1e-14)


def test_buffers_are_given_and_left_as_they_are() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))
    state = dict(model.state_dict())
    before = {name: value.clone() for name, value in state.items()}
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    got = functional(model, Policy(format="e4m3fn"))(state, (x,), {})
    h = F.conv1d(e4m3(x), e4m3(state["0.weight"]), state["0.bias"])
    torch.testing.assert_close(got, F.batch_norm(h, None, None, *(state[f"1.{n}"] for n in ("weight", "bias")), True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("accumulator", ["e8m3/toward_zero", "hopper_fp8"])
def test_narrow_accumulators_pass_the_derivative_of_the_product(accumulator: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), drawn(5, 6).float()
    x[:, 0] *= 64  # beside these products the accumulators lose bits of the others
    policy = Policy(format="e4m3fn", accumulator=accumulator)
    call, state = functional(layer, policy), {name: value.detach() for name, value in layer.named_parameters()}
    y = torch.compile(layer, backend="fpsim_eager", options={"policy": policy})(x).detach()
    assert torch.equal(call(state, (x,), {}), y) and not torch.equal(y, e4m3(x) @ e4m3(layer.weight).T + layer.bias)
    got = grad(lambda state: call(state, (x,), {}).square().sum())(state)
    assert_close(got, {"weight": (2 * y).T @ e4m3(x), "bias": (2 * y).sum(0)})


def test_a_random_function_is_refused(network: Network) -> None:
    with pytest.raises(ValueError, match="stochastically rounded loss is a different function at every call"):
        functional(network, Policy(format="e4m3fn/stochastic"))
    for timing in ("history:4", "every:2", "calibrated"):
        with pytest.raises(ValueError, match="whose scales depend on other steps is another function at every call"):
            functional(network, Policy(format="bf16", modules={"first": f"e4m3fn/tensor/{timing}"}))


def test_what_a_policy_says_of_backward_does_not_count() -> None:
    """The preset nvfp4 draws random numbers for gradients and rotates them. The other policy has its way in all fields.

    Values have the bits of the compiled model. The derivative is that of the product of rounded operands: that of the
    scale which multiplies the result too.
    """
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 20), drawn(17, 32).float()
    state = {name: value.detach() for name, value in layer.named_parameters()}
    loss = curvature.functional_loss(layer, lambda y: y.square().sum(), batch=x, policy="nvfp4")
    compiled = torch.compile(layer, backend="fpsim_eager", options={"policy": "nvfp4"})
    y = compiled(x).detach()
    assert torch.equal(curvature.functional_outputs(layer, batch=x, policy="nvfp4")(state), y)
    assert torch.equal(loss(state), y.square().sum())
    want = {"weight": (2 * y).T @ fpsim.round(x, "nvfp4"), "bias": (2 * y).sum(0)}
    torch.testing.assert_close(grad(loss)(state), want, rtol=1e-5, atol=1e-4)

    model = nn.Sequential(nn.Linear(32, 20), nn.Softmax(-1), nn.Linear(20, 4))
    policy = Policy(
        format="e5m2/stochastic",
        fprop={"activation": "e4m3fn/power_of_two", "weight": "int8", "output": "bf16"},
        wgrad={"output": "bf16/stochastic"},
        elementwise={"forward": "e8m10", "backward": "e8m10/stochastic"},
        saved="e4m3fn/stochastic",
        accumulator={"fprop": "fp32 chunk=4", "dgrad": "bf16/stochastic"},
        reductions="bf16",
        transform={"fprop": "permute:amax", "wgrad": "hadamard:4"},
        modules={"2": {"format": "e4m3fn/tensor", "gradient": "e4m3fn/tensor/history:4"}},
    )
    got = functional(model, policy)({name: p.detach() for name, p in model.named_parameters()}, (x,), {})
    assert torch.equal(got, torch.compile(model, backend="fpsim_eager", options={"policy": policy})(x))
    assert not torch.equal(got, model(x)) and policy.of_forward.of_forward == policy.of_forward


def test_a_policy_that_does_not_fit_is_refused(network: Network, state: State) -> None:
    call = functional(network, Policy(format="e4m3fn", skip=("frist",)))
    with pytest.raises(BackendCompilerFailed, match=r"'frist' matches no module(.|\n)*first"):
        call(state, (drawn(5, 6),), {})


class Returning(nn.Linear):
    """A module that also returns an argument, or a view of it."""

    def __init__(self, passed: Callable[[Tensor], Tensor]) -> None:
        super().__init__(6, 2)
        self.passed = passed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.passed(x)


@pytest.mark.parametrize("passed", [lambda x: x, lambda x: x[:1], lambda x: x.T])
def test_a_returned_argument_is_no_constant(passed: Callable[[Tensor], Tensor]) -> None:
    model = Returning(passed).double()
    call = functional(model, Policy(format="e4m3fn"))
    with pytest.raises(RuntimeError, match=r"its graph does not compute.*\.clone\(\)"):
        call(dict(model.named_parameters()), (drawn(5, 6),), {})


def test_a_copy_of_an_argument_and_two_views_of_a_result_are_computed() -> None:
    model = Returning(lambda x: x.clone()).double()
    x = drawn(5, 6)
    result, copy = functional(model, Policy(format="e4m3fn"))(dict(model.named_parameters()), (x,), {})
    assert torch.equal(copy, x) and torch.equal(result, e4m3(x) @ e4m3(model.weight).T + model.bias)
    heads = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Unflatten(1, (2, 2))).double()
    got = functional(heads, Policy(format="e4m3fn"))(dict(heads.named_parameters()), (x,), {})
    assert torch.equal(got, (e4m3(x) @ e4m3(heads[0].weight).T).view(5, 2, 2))


# -- in curvature ------------------------------------------------------------------------------------------------------


def test_curvature_of_a_model_under_a_policy(network: Network, state: State) -> None:
    x, y = drawn(5, 6), drawn(5, 3, seed=1)
    loss = curvature.functional_loss(network, F.mse_loss, batch=(x, y), policy={"format": "e4m3fn"})
    hessian = curvature.hessian(loss, state)
    want = curvature.hessian(lambda s: F.mse_loss(by_hand(s, x), y), state)
    direction = drawn(hessian.size, seed=3)
    torch.testing.assert_close(hessian.matvec(direction), want.matvec(direction), rtol=1e-10, atol=1e-10)
    assert hessian.symmetry_error() < 1e-12
    outputs = curvature.functional_outputs(network, batch=(x, y), policy="bf16")
    compiled = torch.compile(network, backend="fpsim_eager", options={"policy": "bf16"})
    assert torch.equal(outputs(state), compiled(x))


def test_a_model_of_transformers_with_tied_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    tokens = torch.randint(0, 11, (2, 6))
    batch = {"input_ids": tokens, "labels": tokens}
    loss = curvature.functional_loss(model, batch=batch, policy={"format": "e4m3fn", "modules": {"lm_head": "bf16"}})
    logits = torch.compile(
        model, backend="fpsim_eager", options={"format": "e4m3fn", "modules": {"lm_head": "bf16"}}, fullgraph=True
    )(input_ids=tokens).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    params = dict(model.named_parameters())
    torch.testing.assert_close(loss(params), want, rtol=1e-6, atol=0)
    tied = grad(loss)({name: value.detach() for name, value in params.items()})["transformer.wte.weight"]
    assert tied.count_nonzero() == tied.numel()  # through the head every row of the table has a gradient


def test_a_module_with_two_names_keeps_its_parameters(network: Network) -> None:
    """Dynamo leaves the parameters of `functional_call` in a module that has two names."""
    network.alias = network.first
    network.register_buffer("scale", torch.ones(()).double())
    x, policy = torch.randn(5, 6, dtype=torch.float64), Policy(format="e4m3fn")
    before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    values = {name: value.clone() for name, value in before.items()}
    found = functional(network, policy)(values, (x,), {})
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], values[name]) for name in before)
    assert torch.equal(found, by_hand(values, x))
