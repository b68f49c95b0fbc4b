"""Products whose operands have scales along the axis that the product sums over.

The operands of every product are rounded by the exact reference, along the axis that each product sums over, and
multiplied by the same kernel of torch. So every bit must agree.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim
from fpsim import reference

CASTS = (
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "int8",
    "int4/group:32",
    "e4m3fn/block:16:bf16",
    "e4m3fn/block:16x16",
    "e5m2/tensor",
)


def rounded(x: Tensor, cast: str, axis: int | tuple[int, ...]) -> Tensor:
    values = reference.round_blocks(x.detach().flatten().tolist(), cast, tuple(x.shape), axis)
    return torch.tensor([reference.to_float(value) for value in values], dtype=torch.float64).to(x.dtype).view(x.shape)


def run(model: nn.Module, x: Tensor, cast: str, backend: str) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = torch.compile(model, backend=backend, options={"format": cast})(x)
    weights = torch.linspace(-2, 2, y.numel()).view(y.shape)
    (y * weights).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in model.parameters())


@pytest.mark.parametrize("cast", CASTS)
def test_a_linear_layer_has_six_roundings(cast: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(40, 12, bias=False), torch.randn(2, 17, 40)  # 34 tokens: a block crosses both sequences
    y, dx, dw = run(model, x, cast, "fpsim_eager")
    tokens, weight = x.view(34, 40), model.weight.detach()
    dy = torch.linspace(-2, 2, 34 * 12).view(34, 12)
    whole = cast.endswith("group:32")  # groups lie in the flattened tensor, whatever the product
    assert torch.equal(y.view(34, 12), rounded(tokens, cast, 1) @ rounded(weight, cast, 1).t())
    assert torch.equal(dx.view(34, 40), rounded(dy, cast, 1) @ rounded(weight, cast, 1 if whole else 0))
    assert torch.equal(dw, rounded(dy, cast, 0).t() @ rounded(tokens, cast, 0))


def test_batched_products_are_rounded_along_the_axes_they_sum_over() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(3, 5, 48, requires_grad=True), torch.randn(3, 48, 33, requires_grad=True)
    compiled = torch.compile(torch.bmm, backend="fpsim_eager", options={"format": "mxfp6_e3m2"})
    y = compiled(a, b)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy)

    def r(x: Tensor, axis: int) -> Tensor:
        return rounded(x, "mxfp6_e3m2", axis)

    assert torch.equal(y, r(a, 2) @ r(b, 1))
    assert torch.equal(a.grad, r(dy, 2) @ r(b, 2).transpose(1, 2))
    assert torch.equal(b.grad, r(a, 1).transpose(1, 2) @ r(dy, 1))


def test_a_convolution_is_rounded_along_channels_and_along_images_and_places() -> None:
    torch.manual_seed(2)
    layer, x = nn.Conv2d(8, 6, 3, bias=False), torch.randn(2, 8, 7, 6, requires_grad=True)
    y = torch.compile(layer, backend="fpsim_eager", options={"format": "mxfp8"})(x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy)
    weight = layer.weight.detach()

    def r(x: Tensor, *axes: int) -> Tensor:
        return rounded(x, "mxfp8", axes)

    assert torch.equal(y, F.conv2d(r(x, 1), r(weight, 1)))
    assert torch.equal(x.grad, torch.nn.grad.conv2d_input(x.shape, r(weight, 0), r(dy, 1)))
    assert torch.equal(layer.weight.grad, torch.nn.grad.conv2d_weight(r(x, 0, 2, 3), weight.shape, r(dy, 0, 2, 3)))


@pytest.mark.parametrize("cast", ["mxfp8", "nvfp4"])
def test_compiled_as_eager(cast: str) -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 24)), torch.randn(2, 25, 40)
    for a, b in zip(run(model, x, cast, "fpsim_eager"), run(model, x, cast, "fpsim"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # Inductor's GELU has other bits
    linear = nn.Linear(40, 24, bias=False)  # the sum over tokens, a bias's gradient, has other bits too
    for a, b in zip(run(linear, x, cast, "fpsim_eager"), run(linear, x, cast, "fpsim"), strict=True):
        assert torch.equal(a, b)


def test_dynamic_shapes() -> None:
    torch.manual_seed(4)
    linear = nn.Linear(48, 24)
    compiled = torch.compile(linear, backend="fpsim", options={"format": "mxfp8"}, dynamic=True)
    for length in (5, 16):
        linear.zero_grad()
        x = torch.randn(2, length, 48, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        tokens, ones = x.detach().view(-1, 48), torch.ones(2 * length, 24)
        expected = F.linear(rounded(tokens, "mxfp8", 1), rounded(linear.weight, "mxfp8", 1), linear.bias)
        assert torch.equal(y.view(-1, 24), expected)
        assert torch.equal(linear.weight.grad, rounded(ones, "mxfp8", 0).t() @ rounded(tokens, "mxfp8", 0))


def test_square_tiles_and_whole_tensors_are_rounded_once_for_both_directions() -> None:
    layer, x = nn.Linear(32, 32), torch.randn(4, 32, requires_grad=True)

    def count(cast: str) -> int:
        """The number of nodes that round, in the joint graph."""
        graphs = []

        def observed(graph):
            graphs.append(sum("round" in str(node.target) for node in graph.nodes))

        from fpsim.compile_backend.passes import rounding_pass

        rewrite = rounding_pass.rewrite

        def spy(graph, *args, **kwargs):
            plan = rewrite(graph, *args, **kwargs)
            observed(graph)
            return plan

        rounding_pass.rewrite = spy
        try:
            run(layer, x.detach(), cast, "fpsim_eager")
        finally:
            rounding_pass.rewrite = rewrite
        return graphs[0]

    assert [count(cast) for cast in ("mxfp8", "e4m3fn/block:16x16", "e4m3fn/tensor")] == [6, 3, 3]


def test_explain_shows_scales_and_their_axes() -> None:
    x = torch.randn(4, 40, requires_grad=True)
    sites = fpsim.explain(nn.Linear(40, 24), x, policy=fpsim.Policy(format="mxfp8")).sites
    assert [(site.kind, site.role, site.scales) for site in sites] == [
        ("fprop", "activation", "8 along 1"),
        ("fprop", "weight", "48 along 0"),
        ("dgrad", "gradient", "4 along 1"),
        ("dgrad", "weight", "40 along 0"),
        ("wgrad", "gradient", "24 along 1"),
        ("wgrad", "activation", "40 along 0"),
    ]


def test_results_of_operations_take_no_scales() -> None:
    with pytest.raises(ValueError, match="the result of an operation cannot be scaled: leave 'mx:32:rceil' out"):
        fpsim.Policy(elementwise="mxfp8")


def test_profile_counts_what_block_scales_clip() -> None:
    x = torch.tensor([[1.9375, *[1.0] * 31]], requires_grad=True)  # floor: 1.9375 * 2^8 is above 448
    layer = nn.Linear(32, 1, bias=False)
    nn.init.ones_(layer.weight)
    sites = fpsim.profile(layer, x, policy=fpsim.Policy(activation="e4m3fn/mx:32:floor")).sites
    assert [site.statistics.saturations for site in sites if site.role == "activation" and site.kind == "fprop"] == [1]


def test_profile_counts_groups_and_scales() -> None:
    x = torch.zeros(4, 32)
    x[0], x[1], x[2] = 1.9375, 2.0**-130, torch.tensor([3.0] + 31 * [torch.inf])  # clipped; the least scale; NaN
    layer = nn.Linear(32, 1, bias=False)
    profile = fpsim.profile(layer, x, policy=fpsim.Policy(activation="e4m3fn/mx:32:floor"))
    [site] = [site for site in profile.sites if site.role == "activation" and site.kind == "fprop"]
    statistics = site.statistics
    assert (statistics.scales, statistics.clipped_groups, statistics.zero_groups) == (4, 1, 1)
    assert (statistics.lowest_scales, statistics.highest_scales) == (1, 0)
    assert statistics.scale_exponents == ((-127, 2), (-8, 1))
    assert fpsim.compile_backend.Profile.from_json(profile.to_json()).sites == profile.sites
