"""Attention may be decomposed in some modules and kept fused in others."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fpsim
from fpsim.compile_backend.attention import decompose_attention
from fpsim.compile_backend.graph.dynamo import all_nodes

SHAPE = (1, 2, 8, 16)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def opened(x: Tensor, format: str) -> Tensor:
    """Attention as torch decomposes it, with both operands of both products rounded."""

    def rounded(value: Tensor) -> Tensor:
        return fpsim.round(value, format)

    scale = SHAPE[-1] ** -0.25
    weights = torch.softmax(rounded(x * scale) @ rounded((x * scale).transpose(-2, -1)), -1)
    return rounded(weights) @ rounded(x)


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
@pytest.mark.parametrize("first", ["round", "keep"])
def test_modules_may_differ_in_attention(backend: str, first: str) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    second = {"round": "keep", "keep": "round"}[first]
    policy = fpsim.Policy(format="e4m3", attention=second, modules={"first": {"format": "e4m3", "attention": first}})
    got = torch.compile(Two(), backend=backend, options={"policy": policy}, fullgraph=True)(x)
    value = x
    for choice in (first, second):
        value = opened(value, "e4m3") if choice == "round" else F.scaled_dot_product_attention(value, value, value)
    torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        assert (got - Two()(x)).abs().max() > 1e-3
    plan = fpsim.explain(Two(), x, policy=policy)
    kept = {"round": "second", "keep": "first"}[first]
    assert {site.path for site in plan.sites} == {"first", "second"} - {kept}
    assert Counter((gap.path, gap.reason) for gap in plan.gaps) == {(kept, "attention kept fused by the policy"): 1}


def test_gradients_are_rounded_where_attention_is_opened_only() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    policy = fpsim.Policy(format="e4m3", attention="keep", modules={"first": {"format": "e4m3", "attention": "round"}})
    plan = fpsim.explain(Two(), x, policy=policy)
    products = Counter((site.path, site.kind) for site in plan.sites)
    assert products == {("first", "fprop"): 4, ("first", "dgrad"): 8}
    assert {gap.path for gap in plan.gaps} == {"second"} and len(plan.gaps) == 2


def test_a_skipped_module_follows_the_policy_of_the_model() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    plan = fpsim.explain(Two(), x, policy={"format": "e4m3", "skip": "first"})
    assert {(gap.path, gap.operator) for gap in plan.gaps} == {("first", "aten.bmm")}


def test_the_gaps_of_a_module_hold_in_it_alone() -> None:
    class Distances(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Distances(), Distances()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    x = torch.randn(40, 40)
    rule = {"format": "e4m3", "gaps": ["aten._cdist*", "aten._euclidean*"]}
    both = fpsim.Policy(format="e4m3", modules={"first": rule, "second": rule})
    torch.compile(Model(), backend="fpsim_eager", options={"policy": both})(x)
    with pytest.raises(Exception, match="in module 'second' may multiply matrices"):
        torch.compile(Model(), backend="fpsim_eager", options={"format": "e4m3", "modules": {"first": rule}})(x)


def test_the_paper_s_recipe_may_hold_in_one_module() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    policy = fpsim.Policy(format="none", modules={"1": "paper:e8m3"})
    casts = {(site.path, str(site.cast)) for site in fpsim.explain(model, torch.randn(2, 8), policy=policy).sites}
    assert casts == {("0", "None"), ("1", "e8m3/toward_zero/sat_propagate")}


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_a_rule_for_a_checkpointed_module_holds_in_it(backend: str) -> None:
    """Its nodes stand in the body of a higher-order operator, of which Dynamo keeps the graph."""
    policy = fpsim.Policy(format="e4m3", attention="keep", modules={"first": {"format": "e4m3", "attention": "round"}})
    graphs = []

    def step(model: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = torch.compile(model, backend=backend, options={"policy": policy}, fullgraph=True)(x)
        y.sum().backward()
        return y.detach(), x.grad

    for got, want in zip(step(Checkpointed()), step(Two()), strict=True):
        assert torch.equal(got, want)

    def backend_that_looks(gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        before = [node.target for node in all_nodes(gm)]
        decompose_attention(gm, policy)
        graphs.append([node.target for node in all_nodes(gm)] == before)
        return gm

    torch.compile(Checkpointed(), backend=backend_that_looks)(torch.randn(SHAPE, requires_grad=True))
    assert graphs == [True]
