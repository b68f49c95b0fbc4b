"""Switches give the bits of the policy that names exactly the roundings that are on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fpsim
from fpsim import Policy
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.functional import functional
from fpsim.compile_backend.switches import CAPACITY, Place, Switches
from fpsim.evaluate.switched import SwitchedModel
from fpsim.policy.policy import OPERANDS


class Model(nn.Module):
    """Two linear layers, one without a bias, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(torch.tanh(h @ h.T) @ h)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def results(model, call, x) -> list[torch.Tensor]:
    """The output and the gradient of every parameter."""
    value = call(x)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), list(model.parameters()))]


def under(model, options, backend="fpsim_eager"):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options=options)


def assert_same(got, want) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


POLICIES = [
    {"format": "e4m3fn"},
    {"format": "mxfp4"},
    {"policy": "bf16"},
    {"format": "e2m1fn", "elementwise": "e4m3fn"},
    {"format": "int8/row"},
    {"format": "nvfp4"},
    {"format": "e3m2fn/tensor:fp32", "output": "e5m2"},
    {"format": "e2m1fn", "transform": "hadamard:4", "skip": ["a"]},
]


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_all_on_is_the_policy_and_all_off_the_unrounded_model(options, model, x):
    if "transform" in options:
        x = x[:4]  # 4 rows: products of activations sum over them too
    switched = SwitchedModel(model, [Policy.from_options(options)])
    exact = results(model, under(model, {"format": "none"}), x)
    assert_same(results(model, switched, x), exact)
    switched.turn(switched.places)
    rounded = results(model, switched, x)
    assert_same(rounded, results(model, under(model, options), x))
    assert not torch.equal(rounded[0], exact[0])
    switched.turn([])
    assert_same(results(model, switched, x), exact)


def test_inductor_compiles_switches_to_the_same_bits(model, x):
    policy, bits = Policy(format="int8/row", output="bf16"), {}
    h = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)).mul(8).round().div(8)
    for backend in ("fpsim", "fpsim_eager"):
        switched = SwitchedModel(model.b, [policy], backend)
        off = results(model.b, switched, h)
        switched.turn([place for place in switched.places if place.role == "weight"])
        some = results(model.b, switched, h)
        switched.turn(switched.places)
        bits[backend] = [*off, *some, *results(model.b, switched, h)]
    assert_same(bits["fpsim"], bits["fpsim_eager"])


def test_one_place_alone_is_the_policy_that_rounds_it_alone(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    casts = {"0": "e2m1fn", "2": "int8/row"}
    switched = SwitchedModel(model, [Policy(format="none", modules=casts)])
    results(model, switched, x)
    operands = OPERANDS - {("dgrad", "activation")}
    assert {(p.path, p.step, p.role) for p in switched.places} == {
        *(("0", *rest) for rest in operands - {("dgrad", "gradient"), ("dgrad", "weight")}),
        *(("2", *rest) for rest in operands),
    }
    for place in switched.places:
        switched.turn([place])
        rule = {"format": "none", place.step: {place.role: casts[place.path]}}
        only = under(model, {"format": "none", "modules": {place.path: rule}})
        assert_same(results(model, switched, x), results(model, only, x))


def test_several_policies_take_turns_at_one_place(model, x):
    policies = [Policy(format="e4m3fn"), Policy(format="int8/row"), Policy.preset("bf16")]
    switched = SwitchedModel(model, policies)
    with torch.no_grad():
        switched(x)
        chosen = {"a": 2, "b": 1, "": 0}
        switched.turn([place for place in switched.places if place.policy == chosen[place.path]])
        mixed = policies[0].with_modules({"a": policies[2], "b": policies[1]})
        assert_same([switched(x)], [under(model, {"policy": mixed})(x)])
        for number, policy in enumerate(policies):
            switched.turn([place for place in switched.places if place.policy == number])
            assert_same([switched(x)], [under(model, {"policy": policy})(x)])


def test_a_blended_switch_adds_a_part_of_the_error(x):
    linear = nn.Linear(8, 3, bias=False)
    switches = Switches([Policy(weight="int8/row")], is_blended=True)
    call = functional(linear, switches.policies[0], switches)
    exact, weights = linear.weight.detach(), torch.zeros(CAPACITY)
    call({"weight": exact}, (x,), {}, weights)
    assert list(switches.numbers) == [Place("", "fprop", "weight")]
    error = fpsim.round(exact, "int8/row", axis=-1) - exact
    for part in (0.0, 0.25, 1.0):
        weights[0] = part
        got = call({"weight": exact}, (x,), {}, weights)
        torch.testing.assert_close(got, x @ (exact + part * error).T)
    jacobian = torch.func.jacrev(lambda s: call({"weight": exact}, (x,), {}, s))(torch.zeros(1))
    torch.testing.assert_close(jacobian[..., 0], x @ error.T)


def test_an_error_that_is_infinite_counts_as_zero_and_is_told(x):
    linear = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        linear.weight[0, 0] = 1e6
    switches = Switches([Policy(weight="e4m3fn/ovf_inf", activation="e4m3fn")], is_blended=True)
    call = functional(linear, switches.policies[0], switches)
    value = call({"weight": linear.weight.detach()}, (x,), {}, torch.zeros(CAPACITY))
    assert torch.equal(value, linear(x).detach())
    assert switches.overflowed == {switches.numbers[Place("", "fprop", "weight")]}


def test_what_has_no_switches_is_refused(model, x):
    with pytest.raises(ValueError, match="leave accumulator out"):
        Switches([Policy(format="e4m3fn", modules={"a": {"format": "bf16", "accumulator": "fp32"}})])
    for field in ("saved", "reductions"):
        with pytest.raises(ValueError, match=f"leave {field} out"):
            Switches([Policy.from_options({"format": "e4m3fn", field: "bf16"})])
    with pytest.raises(ValueError, match="history, every and calibrated"):
        Switches([Policy(format="e4m3fn/tensor/history:4")])
    with pytest.raises(ValueError, match="attention in tiles has no switches"):
        Switches([Policy(format="bf16", modules={"a": {"attention": "flash"}})])
    with pytest.raises(ValueError, match="elementwise"):
        Switches([Policy(format="bf16"), Policy(elementwise="bf16")])
    with pytest.raises(ValueError, match="attention alike"):
        Switches([Policy(format="bf16"), Policy(format="bf16", attention="keep")])
    convolution = nn.Conv2d(2, 3, 3)
    switched = SwitchedModel(convolution, [Policy(format="e4m3fn/tensor:fp32")])
    image = torch.randn(1, 2, 6, 6, requires_grad=True)
    with pytest.raises(Exception, match=r"aten\.convolution.*cannot be switched") as caught:
        switched(image)
    assert isinstance(caught.value.inner_exception, UnroundedError)
    with pytest.raises(ValueError, match="unknown backend 'inductor'"):
        SwitchedModel(model, [Policy(format="bf16")], "inductor")


def test_a_graph_break_is_an_error():
    class Broken(nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(ValueError, match="as one graph"):
        SwitchedModel(Broken(2, 2), [Policy(format="bf16")])(torch.ones(1, 2))
