"""Convolutions, bit for bit: forward, the gradients of input and weight with separate casts, and the bias.

All numbers are small dyadic rationals, and so are the rounded ones: every sum is exact, whatever its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fpsim
from fpsim.compile_backend import Gap
from tests.shared.models import BACKENDS_OF_A_GRAPH, Casts, assert_all_equal, case, dyadic, dyadic_

aten = torch.ops.aten

BACKENDS = pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
OF_A_GRAPH = pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)

#: Six casts, of which no two in one product or pass agree.
OPTIONS = {
    "activation": "e4m2",
    "weight": "e3m1",
    "gradient": "e5m1",
    "dgrad": {"weight": "e4m1/toward_zero"},
    "wgrad": {"gradient": "e5m2", "activation": "e4m3"},
    "overflow": "sat_finite",
}


def step(model: Callable[..., Tensor], parameters: Mapping[str, Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward value and all gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in parameters.items()}}  # type: ignore[dict-item]


def by_hand(layers: Mapping[str, nn.Module], casts: Sequence[Casts], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward value and all gradients of convolutions in a row, each product computed from its own rounded operands."""

    def convolve(layer: nn.Module, x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        parameters = dict(zip(("weight", "bias"), (w, *(b.detach() for b in bias)), strict=False))
        return torch.func.functional_call(layer, {"bias": None, **parameters}, (x,))

    inputs = []
    for layer, q in zip(layers.values(), casts, strict=True):
        inputs.append(x)
        bias = () if layer.bias is None else (layer.bias,)
        x = convolve(layer, q(x, "fprop", "activation"), q(layer.weight.detach(), "fprop", "weight"), *bias)
    result = {"y": x}
    for (name, layer), q, x in reversed(list(zip(layers.items(), casts, inputs, strict=True))):
        w, a = q(layer.weight.detach(), "dgrad", "weight"), q(x, "wgrad", "activation")
        result[f"{name}weight"] = torch.func.vjp(lambda w: convolve(layer, a, w), layer.weight.detach())[1](  # noqa: B023
            q(dy, "wgrad", "gradient")
        )[0]
        if layer.bias is not None:
            result[f"{name}bias"] = dy.sum([0, *range(2, dy.dim())])
        dy = torch.func.vjp(lambda x: convolve(layer, x, w), x)[1](q(dy, "dgrad", "gradient"))[0]  # noqa: B023
    return result | {"x": dy}


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 3, 5)),
    "no batch": (nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 5)),
    "of one pixel": (nn.Conv2d(3, 4, 1), (2, 3, 4, 4)),
    "of one channel and one pixel": (nn.Conv1d(1, 1, 1), (1, 1, 1)),
    "strided": (nn.Conv2d(3, 4, 3, stride=(2, 3)), (2, 3, 7, 9)),
    "padded": (nn.Conv2d(3, 4, 3, padding=(1, 2)), (2, 3, 5, 4)),
    "padded to the same size": (nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 7)),
    "padded around": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 4)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "depthwise with a multiplier": (nn.Conv1d(3, 6, 3, groups=3), (2, 3, 7)),
    "all at once": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2), (2, 4, 8, 7)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, bias=False), (1, 2, 3, 2, 3)),
    "transposed and grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_computes_what_the_policy_says(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    dyadic_(layer).zero_grad()
    x = dyadic(*shape, seed=10)
    dy = dyadic(*layer(x).shape, seed=11, top=8)
    compiled = torch.compile(layer, backend="fpsim_eager", options=OPTIONS)
    batched = layer.weight.dim() == x.dim()
    want = by_hand({"": layer}, [Casts(OPTIONS)], *((x, dy) if batched else (x[None], dy[None])))
    if not batched:
        want |= {"y": want["y"][0], "x": want["x"][0]}
    assert_all_equal(step(compiled, dict(layer.named_parameters()), x, dy), want)


class Network(nn.Sequential):
    """A stem, a depthwise and a transposed convolution."""

    def __init__(self) -> None:
        stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        super().__init__(stem, nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.ConvTranspose2d(8, 4, 2, stride=2))
        dyadic_(self, top=4)


def network_by_hand(model: Network, casts: Sequence[Casts], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    return by_hand({f"{name}.": layer for name, layer in model.named_children()}, casts, x, dy)


X, DY = dyadic(2, 3, 9, 9, seed=20, top=4), dyadic(2, 4, 6, 6, seed=21, top=4)


@OF_A_GRAPH
def test_casts_may_differ_between_layers(backend: str) -> None:
    options = {**OPTIONS, "modules": {"1": {"format": "e5m2", "gradient": "e4m1"}}, "skip": ["2"]}
    model = Network()
    casts = [Casts(OPTIONS), Casts({"format": "e5m2", "gradient": "e4m1"}), Casts({"format": "none"})]
    got = step(torch.compile(model, backend=backend, options=options), dict(model.named_parameters()), X, DY)
    assert_all_equal(got, network_by_hand(model, casts, X, DY))


def test_the_channels_may_be_last() -> None:
    model, x = Network().to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = step(torch.compile(model, backend="fpsim", options=OPTIONS), dict(model.named_parameters()), x, DY)
    assert_all_equal(got, network_by_hand(model, [Casts(OPTIONS)] * 3, x, DY))


@pytest.mark.parametrize(
    ("memory_format", "backend"),
    [
        (torch.contiguous_format, "fpsim_eager"),
        case(torch.contiguous_format, "fpsim", in_every_run=False),
        (torch.channels_last, "fpsim_eager"),
        (torch.channels_last, "fpsim"),
    ],
    ids=str,
)
def test_bfloat16(memory_format: torch.memory_format, backend: str) -> None:
    """The integers are so small that all sums of products are at most 256 and exact."""
    options = {"format": "e5m1", "wgrad": {"activation": "e5m0"}}
    layer = dyadic_(nn.Conv2d(2, 2, (1, 2)), top=8).to(dtype=torch.bfloat16, memory_format=memory_format)  # type: ignore[call-overload]
    x = dyadic(1, 2, 2, 3, seed=1, top=8).to(torch.bfloat16, memory_format=memory_format)
    dy = dyadic(1, 2, 2, 2, seed=2, top=8).bfloat16()
    got = step(torch.compile(layer, backend=backend, options=options), dict(layer.named_parameters()), x, dy)
    assert_all_equal(got, by_hand({"": layer}, [Casts(options)], x, dy))


@OF_A_GRAPH
def test_inference(backend: str) -> None:
    model = Network()
    with torch.no_grad():
        y = torch.compile(model, backend=backend, options=OPTIONS)(X)
    assert torch.equal(y, network_by_hand(model, [Casts(OPTIONS)] * 3, X, DY)["y"])


def test_sizes_may_vary() -> None:
    model = Network()
    compiled = torch.compile(model, backend="fpsim_eager", options=OPTIONS, dynamic=True)
    for batch in (2, 3):
        x, dy = dyadic(batch, 3, 9, 9, seed=1, top=4), dyadic(batch, 4, 6, 6, seed=2, top=4)
        model.zero_grad()
        got = step(compiled, dict(model.named_parameters()), x, dy)
        assert_all_equal(got, network_by_hand(model, [Casts(OPTIONS)] * 3, x, dy))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = Network()
    compiled = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=reentrant), backend="fpsim_eager", options=OPTIONS
    )
    got = step(compiled, dict(model.named_parameters()), X, DY)
    assert_all_equal(got, network_by_hand(model, [Casts(OPTIONS)] * 3, X, DY))


@BACKENDS
def test_each_result_is_rounded_where_the_policy_says_output(backend: str) -> None:
    """The two gradients that are products are rounded too; the gradient of the bias is not."""
    layer, out = dyadic_(nn.Conv2d(3, 4, 3)), Casts({"format": "e5m1/toward_zero"})
    x, dy = dyadic(2, 3, 6, 5, seed=10), dyadic(2, 4, 4, 3, seed=11, top=8)
    want = by_hand({"": layer}, [Casts(OPTIONS)], x, dy)
    want |= {name: out(want[name], "fprop", "weight") for name in ("y", "x", "weight")}
    compiled = torch.compile(layer, backend=backend, options={**OPTIONS, "output": "e5m1/toward_zero/ovf_inf"})
    assert_all_equal(step(compiled, dict(layer.named_parameters()), x, dy), want)


def test_forward_and_backward_share_their_random_draws() -> None:
    layer = dyadic_(nn.Conv2d(3, 4, 3))
    x, dy = dyadic(2, 3, 6, 5, seed=10), dyadic(2, 4, 4, 3, seed=11, top=8)
    compiled = torch.compile(layer, backend="fpsim_eager", options={"format": "e4m1/stochastic"})
    with torch.random.fork_rng():
        seed = torch.randint(-(2**63), 2**63 - 1, [1])
    got = step(compiled, dict(layer.named_parameters()), x, dy)
    qx, qw, qdy = (
        fpsim.round(t, "e4m1", rounding="stochastic", seed=seed, salt=i)
        for i, t in enumerate((x, layer.weight.detach(), dy), start=1)
    )
    want = {
        "y": F.conv2d(qx, qw, layer.bias.detach()),
        "x": torch.func.vjp(lambda x: F.conv2d(x, qw), x)[1](qdy)[0],
        "weight": torch.func.vjp(lambda w: F.conv2d(qx, w), qw)[1](qdy)[0],
        "bias": dy.sum((0, 2, 3)),
    }
    assert_all_equal(got, want)


# -- kinds, roles and modules ------------------------------------------------------------------------------------------


def sites(model: Callable[..., Tensor], *args: Tensor) -> list[tuple[str, ...]]:
    """(path, operator, kind, role, role) of each product, in graph order."""
    found = fpsim.explain(model, *args).sites
    pairs = zip(found[::2], found[1::2], strict=True)
    return [(a.path, a.operator.removeprefix("aten."), a.kind, a.role, b.role) for a, b in pairs]


FPROP = ("convolution", "fprop", "activation", "weight")
DGRAD = ("convolution_backward", "dgrad", "gradient", "weight")
WGRAD = ("convolution_backward", "wgrad", "gradient", "activation")


def test_a_convolution_has_three_products_and_the_first_one_two() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3))
    want = [("0", *FPROP), ("1", *FPROP), ("1", *DGRAD), ("1", *WGRAD), ("0", *WGRAD)]
    assert sites(model, torch.randn(2, 2, 7)) == want


def test_a_frozen_convolution_has_no_wgrad() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 3).requires_grad_(False))
    assert sites(model, torch.randn(2, 2, 7)) == [("0", *FPROP), ("1", *FPROP), ("1", *DGRAD), ("0", *WGRAD)]


def test_without_gradients_there_is_fprop_only() -> None:
    with torch.no_grad():
        assert sites(nn.Conv1d(2, 3, 3), torch.randn(2, 2, 7)) == [("", *FPROP)]


def test_a_filter_is_a_weight_unless_the_model_computes_it_from_its_input_by_a_product() -> None:
    x, filters = torch.randn(2, 2, 7, requires_grad=True), torch.randn(3, 2, 3, requires_grad=True)
    assert sites(F.conv1d, x, filters) == [("", *FPROP), ("", *DGRAD), ("", *WGRAD)]
    assert sites(lambda x, f: F.conv1d(x, f * 2 - f.mean()), x, filters) == [("", *FPROP), ("", *DGRAD), ("", *WGRAD)]
    found = sites(lambda x, f: F.conv1d(x, (f.view(3, 6) @ f.view(6, 3) @ f.view(3, 6)).view(3, 2, 3)), x, filters)
    assert [site for site in found if site[1].startswith("convolution")] == [
        ("", "convolution", "fprop", "activation", "activation"),
        ("", "convolution_backward", "dgrad", "gradient", "activation"),
        ("", "convolution_backward", "dgrad", "gradient", "activation"),
    ]


class HandWritten(torch.autograd.Function):
    """A convolution with a hand-written backward that calls torch's functions for it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return nn.grad.conv2d_input(x.shape, w, dy), nn.grad.conv2d_weight(x, w.shape, dy)


def test_a_backward_written_by_hand_is_rounded() -> None:
    layer = dyadic_(nn.Conv2d(3, 4, 3, bias=False))
    x, dy = dyadic(2, 3, 6, 5, seed=10), dyadic(2, 4, 4, 3, seed=11, top=8)
    compiled = torch.compile(lambda x: HandWritten.apply(x, layer.weight), backend="fpsim_eager", options=OPTIONS)
    got = step(compiled, dict(layer.named_parameters()), x, dy)
    assert_all_equal(got, by_hand({"": layer}, [Casts(OPTIONS)], x, dy))


def test_audit_counts_convolutions_as_covered() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3))
    assert fpsim.audit(model, torch.randn(2, 2, 7)) == fpsim.compile_backend.Audit((), covered=4)


# -- the graph ---------------------------------------------------------------------------------------------------------


def trained(options: Mapping, layer: nn.Module, *, needs_dx: bool = True) -> None:
    x = torch.randn(2, 3, 6, 5, requires_grad=needs_dx)
    torch.compile(lambda x: layer(torch.sin(x)), backend="fpsim_eager", options=options)(x).sum().backward()


def backwards(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=aten.convolution_backward.default)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "none"},
        {"policy": "fp8_hybrid", "skip": ["*"]},
        {"format": "none", "fprop": "e4m3"},
        {"format": "fp32"},
    ],
)
def test_an_unrounded_backward_stays_one_operator(options: Mapping, graphs: list[fx.Graph]) -> None:
    trained(options, nn.Conv2d(3, 4, 3))
    (backward,) = backwards(graphs[0])
    assert backward.args[-1] == [True, True, True]


def test_the_plan_lists_both_gradients_of_a_convolution_that_is_skipped() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3))
    plan = fpsim.explain(model, torch.randn(2, 2, 7, requires_grad=True), policy={"policy": "fp8_hybrid", "skip": "0"})
    kinds = [("convolution", "fprop"), ("convolution_backward", "dgrad"), ("convolution_backward", "wgrad")]
    assert plan.gaps == tuple(Gap("0", f"aten.{name}", f"{kind} left unrounded by the policy") for name, kind in kinds)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "e4m3"},
        {"format": "e5m2/stochastic"},
        {"format": "none", "gradient": "e5m2"},
        {"format": "none", "fprop": "e4m3", "wgrad": {"activation": "bf16"}},
        {"format": "e5m2", "dgrad": {"weight": "bf16"}, "output": "bf16", "elementwise": "bf16"},
    ],
)
def test_two_products_of_one_gradient_are_one_call(options: Mapping, graphs: list[fx.Graph]) -> None:
    trained(options, nn.Conv2d(3, 4, 3))
    (backward,) = backwards(graphs[0])
    assert backward.args[-1] == [True, True, False]
    assert [None if value is None else value.shape for value in backward.meta["val"]] == [
        (2, 3, 6, 5),
        (4, 3, 3, 3),
        None,
    ]


def test_no_operand_is_kept_for_its_shape(graphs: list[fx.Graph]) -> None:
    """Each of two calls takes the other's operand for its shape; a single call the operand that forward rounded."""
    both, frozen = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).requires_grad_(False)
    trained({"format": "e4m3", "wgrad": {"gradient": "e5m2"}}, both)
    trained({"format": "e4m3"}, frozen)
    dgrad, wgrad = backwards(graphs[0])
    assert dgrad.args[1:3] == wgrad.args[1:3]
    assert [node.args[-1] for node in (dgrad, wgrad)] == [[True, False, False], [False, True, False]]
    (alone,) = backwards(graphs[1])
    (forward,) = graphs[1].find_nodes(op="call_function", target=aten.convolution.default)
    assert alone.args[1] is forward.args[0] and alone.args[-1] == [True, False, False]
    assert all(node.target is torch.ops.fpsim.round.default for node in (*dgrad.args[:3], *alone.args[:3]))
