"""The kind, the roles and the module of every product, read from the joint graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim


def sites(model, *args: Tensor) -> list[tuple[str, str, str, str]]:
    """(path, kind, role, role) of each product, in graph order."""
    found = fpsim.explain(model, *args).sites
    pairs = list(zip(found[::2], found[1::2], strict=True))
    return [(a.path, a.kind, a.role, b.role) for a, b in pairs]


def test_a_linear_layer_has_three_products() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert sites(nn.Sequential(nn.Linear(4, 5)), x) == [
        ("0", "fprop", "activation", "weight"),
        ("0", "dgrad", "gradient", "weight"),
        ("0", "wgrad", "gradient", "activation"),
    ]


def test_the_first_layer_has_no_dgrad_when_its_input_needs_no_gradient() -> None:
    assert [kind for _, kind, _, _ in sites(nn.Linear(4, 5), torch.randn(3, 4))] == ["fprop", "wgrad"]


def test_inference_has_only_forward_products() -> None:
    with torch.no_grad():
        assert sites(nn.Linear(4, 5), torch.randn(3, 4)) == [("", "fprop", "activation", "weight")]


def test_a_frozen_layer_has_dgrad_but_no_wgrad() -> None:
    model = nn.Linear(4, 5).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    assert sites(model, x) == [("", "fprop", "activation", "weight"), ("", "dgrad", "gradient", "weight")]


def test_products_of_two_activations_are_differentiated_by_dgrad() -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert sorted(sites(torch.matmul, a, b)) == [
        ("", "dgrad", "activation", "gradient"),
        ("", "dgrad", "gradient", "activation"),
        ("", "fprop", "activation", "activation"),
    ]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_has_two_products_forward_and_four_backward_in_its_module() -> None:
    model = nn.Sequential(nn.Identity(), Attention())
    inner = [site for site in sites(model, torch.randn(2, 4, 8)) if site[0] == "1"]
    assert [kind for _, kind, _, _ in inner] == ["fprop"] * 2 + ["dgrad"] * 4
    assert all({"gradient", "activation"} == set(roles) for _, kind, *roles in inner if kind == "dgrad")


class LoRA(nn.Module):
    """A weight computed from weights: the product of two parameters, added to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(5, 4))
        self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.a @ self.b).T


def test_what_is_computed_from_parameters_alone_is_a_weight() -> None:
    found = sites(LoRA(), torch.randn(3, 4))
    assert found[0] == ("", "fprop", "weight", "weight")
    assert found[1] == ("", "fprop", "activation", "weight")
    backward = [(kind, {*roles}) for _, kind, *roles in found[2:]]
    assert backward[0] == ("wgrad", {"activation", "gradient"})  # of the merged weight
    assert backward[1:] == [("wgrad", {"weight", "gradient"})] * 2  # of its two factors


class Tied(nn.Module):
    """An embedding whose weight is also that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_a_tied_weight_is_a_weight_and_a_looked_up_embedding_an_activation() -> None:
    assert sites(Tied(), torch.tensor([[1, 2, 3]])) == [
        ("head", "fprop", "activation", "weight"),
        ("head", "wgrad", "gradient", "activation"),
        ("head", "dgrad", "gradient", "weight"),
    ]


class Rotary(nn.Module):
    """A table of angles: a product of a buffer and integers that is a constant of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(4, 2))
        self.proj = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(6, device=x.device).view(2, 3).float()
        return self.proj(x) * (self.frequencies @ positions).cos().sum(0)


def test_a_product_of_constants_is_listed_and_left_alone() -> None:
    plan = fpsim.explain(Rotary(), torch.randn(2, 3))
    assert {site.path for site in plan.sites} == {"proj"}
    assert [gap.operator for gap in plan.gaps] == ["aten.mm"] and "constant" in plan.gaps[0].reason


def test_a_frozen_buffer_that_multiplies_an_input_is_a_weight() -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    assert sites(Projection(), torch.randn(3, 4)) == [("", "fprop", "activation", "weight")]


class HandWritten(torch.autograd.Function):
    """A linear layer with a hand-written backward, for which torch records neither module nor forward product."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w.T, x.T @ dy


def test_hand_written_backwards_are_told_apart_by_what_they_multiply() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return HandWritten.apply(x, self.w)

    x = torch.randn(3, 4, requires_grad=True)
    assert sorted(sites(Model(), x)) == [
        ("", "dgrad", "gradient", "weight"),
        ("", "fprop", "activation", "weight"),
        ("", "wgrad", "activation", "gradient"),
    ]


def test_a_no_grad_product_before_an_elementwise_one_lends_it_no_role() -> None:
    """Operators outside of autograd share the sequence number of the next operator inside."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                table = x @ x.T
            return table * self.scale * self.scale

    assert [kind for _, kind, _, _ in sites(Model(), torch.randn(3, 3))] == ["fprop"]


def test_elementwise_multiplication_is_no_product() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    plan = fpsim.explain(lambda a, b: (a * b).sum(-1), x, torch.randn(3, 4))
    assert plan.sites == () and plan.gaps == ()


def test_a_hand_written_gradient_of_an_input_is_no_gradient_of_a_weight() -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    found = [(kind, {*roles}) for _, kind, *roles in sites(HandWritten.apply, a, b)]
    assert found == [("fprop", {"activation"})] + [("dgrad", {"gradient", "activation"})] * 2
