"""The kind, the roles and the module of every product, read from the joint graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim
from fpsim import Policy
from fpsim.compile_backend import UnroundedError
from fpsim.compile_backend.passes.places import policy_at


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


def test_an_unknown_module_is_an_error_only_where_modules_have_rules() -> None:
    plain, rules = Policy(format="e4m3fn"), Policy(format="e4m3fn", modules={"inner": "none"})
    with pytest.raises(UnroundedError, match="module of the dgrad product mm is unknown, and the policy has rules for"):
        policy_at(None, "dgrad product mm", rules, True)
    assert policy_at(None, "dgrad product mm", plain, True) == plain.at("") == plain
    assert policy_at(None, "dgrad product mm", rules, False) == rules.at("")
    assert policy_at("inner", "dgrad product mm", rules, True) is None


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


# -- what makes a weight a weight --------------------------------------------------------------------------------------

OPTIONS = {"activation": "bf16", "weight": "e8m1", "gradient": "e5m2", "wgrad": {"activation": "e8m3"}}
LAYER = [("fprop", "activation", "weight"), ("wgrad", "gradient", "activation"), ("dgrad", "gradient", "weight")]


def kinds_and_roles(model, *args) -> list[tuple[str, str, str]]:
    """(kind, role, role) of each product in the order of the graph; in backward the gradient first."""
    found = [(kind, *sorted(roles, key=lambda role: role != "gradient")) for _, kind, *roles in sites(model, *args)]
    return [(kind, *sorted((a, b))) if kind == "fprop" else (kind, a, b) for kind, a, b in found]


def values_and_gradients(function, leaves: dict[str, Tensor], x: Tensor, backend: str | None) -> dict[str, Tensor]:
    torch._dynamo.reset()
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    call = function if backend is None else torch.compile(function, backend=backend, options=OPTIONS, fullgraph=True)
    y = call(leaves, x)
    y.backward(torch.linspace(-3, 3, y.numel(), dtype=y.dtype).view(y.shape))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 1), nn.ConvTranspose1d(6, 4, 1)])
@pytest.mark.parametrize("fast", [False, True])
def test_the_weights_of_functional_call_are_weights(layer: nn.Module, fast: bool) -> None:
    """``fast``: after a step of gradient descent inside the graph, as in MAML."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    x = x if isinstance(layer, nn.Linear) else x[..., None]
    weights = dict(layer.named_parameters())
    steps = {name: torch.randn_like(value) for name, value in weights.items()}

    def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.125 * steps[name] for name, value in weights.items()} if fast else weights

    got = values_and_gradients(
        lambda weights, x: torch.func.functional_call(layer, moved(weights), (x,)), weights, x, "fpsim_eager"
    )
    functions = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.ConvTranspose1d: F.conv_transpose1d}
    function = functions[type(layer)]
    leaves = {name: value.detach() for name, value in moved(weights).items()}
    r = lambda t, cast: fpsim.round(t, cast)  # noqa: E731
    want = function(r(x, "bf16"), r(leaves["weight"], "e8m1"), leaves["bias"])
    assert torch.equal(got["y"], want)
    dy = torch.linspace(-3, 3, want.numel(), dtype=torch.float64).view(want.shape)
    w = leaves["weight"].requires_grad_()
    (dw,) = torch.autograd.grad(function(r(x, "e8m3"), w, None), w, r(dy, "e5m2"))
    assert torch.equal(got["weight"], dw)


def test_a_linear_layer_written_as_addmm_has_a_weight() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight)

    x, bias = torch.randn(3, 6, requires_grad=True), torch.randn(4)
    assert sorted(kinds_and_roles(layer, x, torch.randn(6, 4, requires_grad=True), bias)) == sorted(LAYER)
    row = torch.randn(1, 6, requires_grad=True)  # torch decomposes a product of a row
    assert sorted(kinds_and_roles(layer, row, torch.randn(6, 4, requires_grad=True), bias)) == sorted(LAYER)
    square = torch.randn(3, 4)  # an addend of the product's shape makes no layer
    assert ("fprop", "activation", "activation") in kinds_and_roles(layer, x, torch.randn(6, 4), square)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 2, 3, 6)])
@pytest.mark.parametrize("weight", [(6,), (1, 6), (4, 6)])
def test_the_second_argument_of_linear_is_a_weight_in_every_shape(shape: tuple, weight: tuple) -> None:
    x, w = torch.randn(*shape, requires_grad=True), torch.randn(*weight, requires_grad=True)
    assert sorted(kinds_and_roles(F.linear, x, w)) == sorted(LAYER)


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (None, 0)])
def test_the_weights_of_an_ensemble_are_weights(dims: tuple) -> None:
    ensemble = torch.vmap(lambda w, x: F.linear(x, w), in_dims=dims)
    x = torch.randn(3, 6) if dims[1] is None else torch.randn(5, 3, 6)
    w = torch.randn(4, 6) if dims[0] is None else torch.randn(5, 4, 6)
    assert sorted(kinds_and_roles(ensemble, w.requires_grad_(), x.requires_grad_())) == sorted(LAYER)


class Plain(nn.Module):
    """A layer whose weight is neither a parameter nor a buffer."""

    def __init__(self, frozen: Tensor) -> None:
        super().__init__()
        self.frozen = frozen
        self.layers = {"head": frozen}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.frozen) + x @ self.frozen.T + x @ self.layers["head"].T


def test_tensors_that_hang_on_a_module_are_weights() -> None:
    assert kinds_and_roles(Plain(torch.randn(4, 6)), torch.randn(3, 6)) == [("fprop", "activation", "weight")] * 3


def test_a_tensor_that_forward_writes_down_is_a_weight() -> None:
    found = sites(lambda x: x @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.randn(3, 2))
    assert found == [("", "fprop", "activation", "weight")]


def replay(replay_buffers: Tensor) -> Tensor:
    return replay_buffers @ replay_buffers.mT


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._buffers_ = nn.Parameter(torch.randn(6, 4))

    def forward(self, state_buffers: Tensor, _parameters: Tensor) -> Tensor:
        return (state_buffers + _parameters) @ self._buffers_


def test_names_do_not_make_buffers() -> None:
    assert kinds_and_roles(replay, torch.randn(4, 6)) == [("fprop", "activation", "activation")]
    x = torch.randn(3, 6)
    assert kinds_and_roles(Named(), x, x) == [("fprop", "activation", "weight"), ("wgrad", "gradient", "activation")]
    by_key = {"_buffers['w']": torch.randn(6, 4), "_parameters": x}
    assert kinds_and_roles(lambda d: d["_parameters"] @ d["_buffers['w']"], by_key) == [
        ("fprop", "activation", "activation")
    ]


class Decoder(nn.Module):
    """Learned queries, as in DETR: what a layer computes from them is an activation."""

    def __init__(self, normalise: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm(8) if normalise else nn.Identity()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(torch.relu(self.q(self.norm(self.queries)))) @ x.mT


@pytest.mark.parametrize(("normalise", "first"), [(False, "weight"), (True, "activation")])
def test_what_a_layer_computes_from_learned_queries_is_an_activation(normalise: bool, first: str) -> None:
    found = kinds_and_roles(Decoder(normalise), torch.randn(3, 8))
    assert found[:3] == [
        ("fprop", first, "weight"),
        ("fprop", "activation", "weight"),
        ("fprop", "activation", "activation"),
    ]
    # The derivatives: of the product, of both operands of k, of both operands of q.
    of_queries = ("dgrad" if normalise else "wgrad", "gradient", "weight")
    assert sorted(found[3:]) == sorted(
        [("dgrad", "gradient", "activation"), *LAYER[1:], of_queries, ("wgrad", "gradient", first)]
    )


def test_queries_that_a_product_of_parameters_projects_are_activations() -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents, self.w = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.latents @ self.w) @ x.mT

    assert kinds_and_roles(Latents(), torch.randn(3, 8))[1] == ("fprop", "activation", "activation")


# -- integers ----------------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3))
        self.register_buffer("head", torch.randn(4, 10))

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image.float() / 256, self.kernel).mean((2, 3)) @ self.head


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_integers_that_meet_weights_held_as_buffers_are_rounded(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, image = Frozen(), torch.randint(0, 256, (2, 3, 8, 8)).to(dtype)
    got = torch.compile(model, backend="fpsim_eager", options={"format": "e8m1"}, fullgraph=True)(image)
    r = lambda t: fpsim.round(t, "e8m1")  # noqa: E731
    hidden = F.conv2d(r(image.float() / 256), r(model.kernel)).mean((2, 3))
    assert torch.equal(got, r(hidden) @ r(model.head))


def test_a_lookup_written_as_a_product_is_rounded() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(10, 6))

        def forward(self, tokens: Tensor) -> Tensor:
            return F.one_hot(tokens, 10).float() @ self.table

    assert kinds_and_roles(Lookup(), torch.tensor([1, 2, 3])) == [("fprop", "activation", "weight")]


def test_a_table_of_angles_of_given_positions_belongs_to_the_model() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.rand(4))
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            angles = positions[:, None].float() @ self.frequencies[None]
            outer = torch.outer(positions.float(), self.frequencies)
            return self.proj(x) * torch.cat([angles.cos(), outer.sin()], -1)

    plan = fpsim.explain(Angles(), torch.randn(3, 8), torch.tensor([0, 1, 2]))
    assert {site.path for site in plan.sites} == {"proj"}
    assert [gap.operator for gap in plan.gaps] == ["aten.mm", "aten.outer"]
