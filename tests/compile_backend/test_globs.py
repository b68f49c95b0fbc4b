"""A glob that matches no module or no operator is an error that lists near matches."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fpsim
from fpsim.compile_backend.graph.module_paths import near_modules
from fpsim.compile_backend.guards import check_gaps, operator_names

PATHS = ["", "lm_head", "model", "model.layers", *(f"model.layers.{i}.{p}" for i in (0, 1) for p in ("attn", "mlp"))]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.lm_head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.layers(x))


def message_of(model: nn.Module, **options: object) -> str:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend="fpsim_eager", options=options)(torch.randn(2, 4))
    assert isinstance(caught.value.inner_exception, ValueError)
    return str(caught.value.inner_exception)


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("lm_haed", ["lm_head"]),
        ("lmhead", ["lm_head"]),
        ("model.layers.*.atn", ["model.layers.1.attn", "model.layers.0.attn", "model.layers"]),
        ("attn", ["*.attn"]),
        ("*.atnt", ["*.attn"]),
        ("decoder", []),
    ],
)
def test_near_modules(glob: str, near: list[str]) -> None:
    assert sorted(near_modules(glob, PATHS)) == sorted(near)


def test_a_module_that_does_not_exist() -> None:
    message = message_of(Model(), format="e8m1", skip=["lm_haed"])
    assert "'lm_haed' matches no module" in message and "(did you mean 'lm_head'?)" in message
    assert "whose modules are layers, layers.0, layers.1, lm_head." in message
    message = message_of(Model(), modules={"encoder.*": "bf16"})
    assert "'encoder.*' matches no module" in message and "did you mean" not in message


def test_a_glob_in_a_rule_that_applies_elsewhere() -> None:
    message = message_of(Model(), format="e8m1", modules={"lm_head": {"format": "bf16", "skip": ["layers.0"]}})
    assert "'layers.0' matches no module that computes anything in this graph and to which the rule around" in message


def test_long_lists_of_modules_are_cut() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))
    assert message_of(model, format="e8m1", skip=["40"]).count(",") < 40
    assert "and 10 more" in message_of(model, format="e8m1", skip=["40"])


def test_near_matches_in_a_profile_too() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"did you mean 'lm_head'"):
        fpsim.profile(Model(), torch.randn(2, 4), policy={"policy": "fp8_hybrid", "skip": ["lm_haed"]})


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("aten._cdits_forward", "'aten._cdist_forward'"),
        ("_cdist_forward", "'aten._cdist_forward'"),
        ("aten.mn", "'aten.m"),
    ],
)
def test_an_operator_that_does_not_exist(glob: str, near: str) -> None:
    with pytest.raises(ValueError, match="which matches no operator") as caught:
        check_gaps(fpsim.Policy(gaps=[glob]))
    assert f"gaps has {glob!r}" in str(caught.value) and near in str(caught.value)


def test_a_policy_with_such_an_operator_compiles_nothing() -> None:
    assert "did you mean 'aten._cdist_" in message_of(Model(), format="e8m1", gaps=["aten._cdits_forward"])


@pytest.mark.parametrize(
    "glob", ["*", "aten._cdist*", "aten.convolution", "higher_order.scan*", "a_library.its_operator"]
)
def test_operators_that_exist_or_may_exist(glob: str) -> None:
    check_gaps(fpsim.Policy(gaps=[glob]))


def test_operators_have_the_names_that_plans_show() -> None:
    assert {"aten.mm", "aten._cdist_forward", "fpsim.round"} <= operator_names()


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def takes_all(*args, **kwargs):
    return Wrapped.forward(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [takes_all, torch.autocast("cpu", torch.bfloat16)(Wrapped.forward)])
@pytest.mark.parametrize("in_place", [False, True])
def test_paths_are_those_of_the_module_where_its_forward_is_wrapped(wrapper, in_place: bool) -> None:
    model = Wrapped()
    model.forward = MethodType(wrapper, model)
    plan = fpsim.explain(model._call_impl if in_place else model, torch.randn(2, 4), policy={"format": "bf16"})
    assert {site.path for site in plan.sites} == {"body", "head"}
    options = {"format": "e2m1fn", "skip": "head"}
    if in_place:
        model.compile(backend="fpsim_eager", options=options)
        model(torch.randn(2, 4))
    else:
        torch.compile(model, backend="fpsim_eager", options=options)(torch.randn(2, 4))


class Delegating(nn.Module):
    """A wrapper that looks other attributes up in the model that it wraps, as models of peft do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.after = base, nn.Sequential(nn.Linear(4, 4))

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.base(x))


def test_paths_are_those_below_modules_with_a_getattr_of_their_own() -> None:
    model, x = nn.Sequential(Delegating(Wrapped())), torch.randn(2, 4)
    plan = fpsim.explain(model, x, policy={"format": "bf16"})
    assert {site.path for site in plan.sites} == {"0.base.body", "0.base.head", "0.after.0"}
    policy = {"format": "bf16", "skip": ["0.base.head", "0.after"]}
    assert {site.path for site in fpsim.explain(model, x, policy=policy).sites} == {"0.base.body"}
    torch.compile(model, backend="fpsim_eager", options=policy)(x)
