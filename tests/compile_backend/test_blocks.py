"""Products whose operands have scales along the axis that the product sums over.

The operands of every product are rounded by the exact reference, along the axis that each product sums over, and
multiplied by the same kernel of torch. Scales that do not vary along this axis multiply the result. So every bit must
agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Operand:
    """An operand: the elements that the product multiplies, and the scale that multiplies its result."""

    elements: Tensor
    scale: Tensor | None = None

    def t(self) -> Operand:
        return Operand(self.elements.mT, self.scale if self.scale is None or not self.scale.dim() else self.scale.mT)

    def __matmul__(self, other: Operand) -> Tensor:
        """The product, in float32 for bfloat16 tensors: see docs/scaled_formats.md."""
        wide = torch.float64 if self.elements.dtype == torch.float64 else torch.float32
        return times(self.elements.to(wide) @ other.elements.to(wide), self, other).to(self.elements.dtype)


def times(product: Tensor, *operands: Operand) -> Tensor:
    """``product`` times the scales of its operands."""
    scales = [operand.scale.to(product.dtype) for operand in operands if operand.scale is not None]
    if len(scales) == 2 and not scales[0].dim() and not scales[1].dim():
        return product * (scales[0] * scales[1])
    for scale in scales:
        product = product * scale
    return product


def rounded(x: Tensor, cast: str, axis: int | tuple[int, ...], rows: bool = True) -> Operand:
    """``x`` rounded by the reference. ``rows``: whether the product lets the scales of rows multiply its result."""
    values = [reference.as_value(value) for value in x.detach().double().flatten().tolist()]
    working = "fp64" if x.dtype == torch.float64 else "fp32"
    parsed = reference.parse_cast(cast)
    scale, is_nv = parsed.scale, parsed.scale.rule in reference.scales.NV_RULES
    is_affine = scale.asymmetric or cast.startswith("uint")
    is_row = scale.shared_by == "row" and rows
    if not is_nv and (scale.rule not in ("fp32", "bf16") or is_affine or not (is_row or scale.shared_by == "tensor")):
        decoded = reference.round_blocks(values, cast, tuple(x.shape), axis, working=working)
        return Operand(tensor_of(decoded, x))
    blocks = reference.quantize_blocks(values, cast, tuple(x.shape), axis, working=working)
    elements, outer = [reference.NAN] * x.numel(), [reference.NAN] * x.numel()
    for indices, block in blocks:
        for i, element in zip(indices, block.elements, strict=True):
            elements[i] = reference.mul(element, block.scale, "fp32") if is_nv else element
            outer[i] = block.scale
            if is_nv:
                whole = block.tensor_scale
                outer[i] = whole if scale.rule == "torchao" else reference.div(1, whole, "fp32")
    factor = tensor_of(outer, x, torch.float32)
    factor = factor.narrow(axis, 0, 1) if is_row else factor.flatten()[0]
    return Operand(tensor_of(elements, x), factor)


def tensor_of(values: Sequence[reference.Value], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    numbers = torch.tensor([reference.to_float(value) for value in values], dtype=torch.float64)
    return numbers.to(dtype or like.dtype).view(like.shape)


def run(model: nn.Module, x: Tensor, cast: str | dict[str, str], backend: str) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = torch.compile(model, backend=backend, options=cast if isinstance(cast, dict) else {"format": cast})(x)
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


@pytest.mark.parametrize("cast", ["mxfp6_e3m2", "int8", "nvfp4"])
def test_batched_products_are_rounded_along_the_axes_they_sum_over(cast: str) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(3, 5, 48, requires_grad=True), torch.randn(3, 48, 33, requires_grad=True)
    compiled = torch.compile(torch.bmm, backend="fpsim_eager", options={"format": cast})
    y = compiled(a, b)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy)

    def r(x: Tensor, axis: int) -> Operand:
        return rounded(x, cast, axis)

    assert torch.equal(y, r(a, 2) @ r(b, 1))
    assert torch.equal(a.grad, r(dy, 2) @ r(b, 2).t())
    assert torch.equal(b.grad, r(a, 1).t() @ r(dy, 1))


def test_a_convolution_is_rounded_along_channels_and_along_images_and_places() -> None:
    torch.manual_seed(2)
    layer, x = nn.Conv2d(8, 6, 3, bias=False), torch.randn(2, 8, 7, 6, requires_grad=True)
    y = torch.compile(layer, backend="fpsim_eager", options={"format": "mxfp8"})(x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy)
    weight = layer.weight.detach()

    def r(x: Tensor, *axes: int) -> Tensor:
        return rounded(x, "mxfp8", axes).elements

    assert torch.equal(y, F.conv2d(r(x, 1), r(weight, 1)))
    assert torch.equal(x.grad, torch.nn.grad.conv2d_input(x.shape, r(weight, 0), r(dy, 1)))
    assert torch.equal(layer.weight.grad, torch.nn.grad.conv2d_weight(r(x, 0, 2, 3), weight.shape, r(dy, 0, 2, 3)))


@pytest.mark.parametrize("cast", ["mxfp8", {"activation": "nvfp4", "weight": "int8", "gradient": "e4m3fn/tensor"}])
def test_compiled_as_eager(cast: str | dict[str, str]) -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 24)), torch.randn(2, 25, 40)
    for a, b in zip(run(model, x, cast, "fpsim_eager"), run(model, x, cast, "fpsim"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # Inductor's GELU has other bits
    linear = nn.Linear(40, 24, bias=False)  # the sum over tokens, a bias's gradient, has other bits too
    if isinstance(cast, dict):  # two maxima of bfloat16 in one loop
        linear, x = linear.bfloat16(), x.bfloat16()
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
        expected = F.linear(
            rounded(tokens, "mxfp8", 1).elements, rounded(linear.weight, "mxfp8", 1).elements, linear.bias
        )
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


@pytest.mark.parametrize("cast", ["mxfp4", "int8", "nvfp4", "e4m3fn/tensor", "e4m3fn/power_of_two"])
def test_results_have_scales_along_their_last_axis(cast: str) -> None:
    """Those of products and of other operations, forward and backward; a number is a row of its own."""

    def r(x: Tensor) -> Tensor:
        values = [reference.as_value(value) for value in x.detach().double().flatten().tolist()]
        return tensor_of(reference.round_blocks(values, cast, tuple(x.shape), -1 if x.dim() else ()), x)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return (torch.mm(x, w).relu() * x).sum()

    torch.manual_seed(8)
    x, w = torch.randn(3, 40, requires_grad=True), torch.randn(40, 40)
    torch._dynamo.reset()
    loss = torch.compile(f, backend="fpsim_eager", options={"elementwise": cast, "output": cast})(x, w)
    loss.backward()
    product = r(x @ w)
    hidden = r(product.relu())
    assert torch.equal(loss, r(r(hidden * x).sum()))
    ones = torch.ones(3, 40)
    through = r(r(ones * x) * (hidden > 0))
    assert torch.equal(x.grad, r(r(ones * hidden) + r(through @ w.t())))


# -- scales that multiply the result ----------------------------------------------------------------------------------

#: Pairs of casts of the operands: two numbers, a number and a column, a row and a column, one operand without a scale
#: outside, both scales of NVFP4.
OUTSIDE = (
    ("e4m3fn/tensor", "e5m2/tensor:bf16"), ("e4m3fn/tensor", "int8/row"), ("int8/row", "int4:full/row"),
    ("mxfp8", "int8/row"), ("nf4/group:32", "e4m3fn/tensor"), ("nvfp4", "nvfp4"), ("e2m1fn/nv:torchao", "int8/row"),
    ("none", "nvfp4"), ("uint4", "int8"),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scales_multiply_the_result_and_the_bias_comes_last(dtype: torch.dtype) -> None:
    """Of a linear layer. The gradients of its products have scales of their own."""
    torch.manual_seed(5)
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((17, 40), (12, 40), (12,)))
    dy = torch.randn(17, 12).to(dtype)

    def r(value: Tensor, cast: str, axis: int) -> Operand:
        return Operand(value.detach()) if cast == "none" else rounded(value, cast, axis)

    for first, second in OUTSIDE:
        torch._dynamo.reset()
        options = {"activation": first, "weight": second, "gradient": first}
        y = torch.compile(F.linear, backend="fpsim_eager", options=options)(x, weight, bias)
        gradients = torch.autograd.grad(y, (x, weight, bias), dy)
        a, b = r(x, first, 1), r(weight, second, 1)
        if a.scale is None and b.scale is None:
            expected = F.linear(a.elements, b.elements, bias.detach())
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            product = times(a.elements.to(wide) @ b.elements.to(wide).t(), a, b.t())
            expected = (bias.detach().to(wide) + product).to(dtype)
        assert torch.equal(y, expected), (first, second)
        assert torch.equal(gradients[0], r(dy, first, 1) @ r(weight, second, 0)), (first, second)
        assert torch.equal(gradients[1], r(dy, first, 0).t() @ r(x, first, 0)), (first, second)


@pytest.mark.parametrize("cast", ["int8", "e4m3fn/tensor", "nvfp4"])
def test_products_of_vectors_and_sums_with_alpha_and_beta(cast: str) -> None:
    torch.manual_seed(6)
    a, b, v, c = torch.randn(5, 48), torch.randn(48, 7), torch.randn(48), torch.randn(5, 7)
    stack = torch.stack([a, -2 * a])

    def products(a, b, v, c, stack):
        added = torch.addmm(c, a, b, beta=0.5, alpha=3)
        batches = torch.baddbmm(c, stack, torch.stack([b, b]), beta=2)
        return torch.mv(a, v), torch.dot(v, v), added, batches, torch.addmv(c[:, 0], a, v)

    def r(x: Tensor, axis: int) -> Operand:
        return rounded(x, cast, axis)

    torch._dynamo.reset()
    got = torch.compile(products, backend="fpsim_eager", options={"format": cast})(a, b, v, c, stack)
    column = r(v[:, None], 0)
    of_vector = Operand(column.elements[:, 0], column.scale if column.scale is None else column.scale.flatten()[0])
    rows = r(a, 1)
    by_row = Operand(rows.elements, rows.scale[:, 0] if rows.scale.dim() else rows.scale)
    by_number = of_vector if not rows.scale.dim() else Operand(of_vector.elements, of_vector.scale.view(1))
    mv = times(rows.elements @ of_vector.elements, by_row, by_number)
    exact = (rows.elements.double() * of_vector.elements.double()).sum(1)
    assert torch.equal(got[0], mv) or torch.allclose(got[0].double(), times(exact, by_row, by_number), rtol=3e-7)
    square = of_vector.scale if of_vector.scale is not None else torch.tensor(1.0)
    total = (of_vector.elements.double() ** 2).sum()
    assert torch.allclose(got[1].double(), total * square.double() ** 2, rtol=3e-7)
    assert torch.equal(got[2], c * 0.5 + (rows @ r(b, 0)) * 3)
    assert torch.equal(got[3], c * 2 + r(stack, 2) @ r(torch.stack([b, b]), 1))
    assert torch.allclose(got[4], c[:, 0] + mv, rtol=1e-6)


def test_the_scales_of_a_row_and_a_column_multiply_their_product_one_after_the_other() -> None:
    """Torch makes a multiplication and a sum of this product alone that keeps the axis which it sums over."""
    product = torch.compile(torch.mm, backend="fpsim_eager", options={"format": "int8"})
    differences = 0
    for seed in range(8):
        torch.manual_seed(seed)
        a, b = torch.randn(1, 48), torch.randn(48, 1)
        row, column = rounded(a, "int8", 1), rounded(b, "int8", 0)
        y = product(a, b)
        assert torch.equal(y, row @ column)
        differences += not torch.equal(y, row.elements @ column.elements * (row.scale * column.scale))
    assert differences  # so that the order shows


@pytest.mark.parametrize("cast", ["e4m3fn/tensor", "nvfp4", "int8"])
def test_the_scale_of_a_tensor_multiplies_the_result_of_a_convolution(cast: str) -> None:
    """The scales of rows, which vary from place to place, multiply the operand."""
    torch.manual_seed(7)
    layer, x = nn.Conv2d(6, 4, 3), torch.randn(2, 6, 5, 6, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(layer, backend="fpsim_eager", options={"format": cast})(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    def r(x: Tensor, *axes: int) -> Operand:
        return rounded(x, cast, axes, rows=False)

    places, weight = (0, 2, 3), layer.weight.detach()
    a, b, bias = r(x, 1), r(weight, 1), layer.bias.detach()
    plain = a.scale is None
    fprop = F.conv2d(a.elements, b.elements, bias if plain else None)
    assert torch.equal(y, fprop if plain else bias.view(-1, 1, 1) + times(fprop, a, b))
    a, b = r(weight, 0), r(dy, 1)
    assert torch.equal(x.grad, times(torch.nn.grad.conv2d_input(x.shape, a.elements, b.elements), b, a))
    a, b = r(x, *places), r(dy, *places)
    assert torch.equal(
        layer.weight.grad, times(torch.nn.grad.conv2d_weight(a.elements, weight.shape, b.elements), b, a)
    )
    assert torch.allclose(layer.bias.grad, dy.sum(places))


def test_profile_compares_a_convolution_whose_result_is_scaled_without_its_bias() -> None:
    torch.manual_seed(9)
    cast, layer, x = "e4m3fn/tensor", nn.Conv2d(6, 4, 3), torch.randn(2, 6, 5, 6)
    [product] = [each for each in fpsim.profile(layer, x, policy={"format": cast}).products if each.kind == "fprop"]
    weight = layer.weight.detach()
    a, b = (rounded(t, cast, (1,), rows=False) for t in (x, weight))
    simulated, exact = times(F.conv2d(a.elements, b.elements), a, b), F.conv2d(x.double(), weight.double())
    assert product.error == pytest.approx(float((simulated.double() - exact).norm()), rel=1e-5)


def test_inductor_leaves_scales_before_a_softmax_where_they_are() -> None:
    """It would subtract the largest number of a row before it multiplies by the scale."""

    def shifted(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y - y.amax(-1, keepdim=True)

    torch.manual_seed(10)
    x, w = torch.randn(6, 48), torch.randn(48, 40)
    y = rounded(x, "e4m3fn/tensor", 1) @ rounded(w, "e4m3fn/tensor", 0)
    torch._dynamo.reset()
    got = torch.compile(shifted, backend="fpsim", options={"format": "e4m3fn/tensor"})(x, w)
    assert torch.equal(got, y - y.amax(-1, keepdim=True))


def test_narrow_accumulators_add_products_of_elements() -> None:
    """Machines multiply elements. Scales of blocks, which vary along the sum, need a promotion after each block."""
    torch.manual_seed(9)
    x, layer = torch.randn(6, 64), nn.Linear(64, 5)
    for cast, element in (("e4m3fn/tensor", "e4m3fn"), ("e4m3fn/row", "e4m3fn")):
        torch._dynamo.reset()
        options = {"format": cast, "accumulator": "hopper_fp8"}
        y = torch.compile(layer, backend="fpsim_eager", options=options)(x)
        a, b = rounded(x, cast, 1), rounded(layer.weight, cast, 1).t()
        total = fpsim.matmul(a.elements, b.elements, accumulator="hopper_fp8", format=element)
        assert torch.equal(y, layer.bias + times(total, a, b))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"multiply partial sums .*got blocks of 32 and no promotion"):
        torch.compile(layer, backend="fpsim_eager", options={"format": "mxfp8", "accumulator": "hopper_fp8"})(x)


def test_a_cast_with_a_transform_of_its_own_keeps_its_scale() -> None:
    x, layer = torch.randn(6, 64), nn.Linear(64, 5, bias=False)
    torch._dynamo.reset()
    y = torch.compile(layer, backend="fpsim_eager", options={"format": "e4m3fn/row/expand"})(x)
    assert torch.equal(y, fpsim.round(x, "e4m3fn/row/expand") @ fpsim.round(layer.weight, "e4m3fn/row/expand").t())


def test_the_results_of_rows_with_nan_or_infinity_are_nan() -> None:
    x, w = torch.ones(3, 32), torch.ones(32, 2)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    for cast, wanted in (("int8", [True, True, False]), ("e4m3fn/tensor", [True] * 3)):
        torch._dynamo.reset()
        y = torch.compile(torch.mm, backend="fpsim_eager", options={"format": cast})(x, w)
        assert y.isnan().all(1).tolist() == wanted == y.isnan().any(1).tolist()


@pytest.mark.parametrize("cast", [*CASTS, "e2m1fn/nv:torchao", "e4m3fn/row", "uint8"])
def test_special_numbers_and_no_numbers(cast: str) -> None:
    """Rows with a NaN, an infinity, only zeros, a subnormal number and the largest numbers; and products without rows,
    columns or elements to sum over."""
    torch.manual_seed(11)
    x, w = torch.randn(8, 32), torch.randn(32, 6)
    x[0, 3], x[1, 4], x[2], x[3], x[4, ::3] = torch.nan, -torch.inf, -0.0, 2.0**-130, 3e38
    empty = torch.randn(0, 32), torch.randn(8, 0), torch.randn(0, 6), torch.randn(32, 0)

    def products(x: Tensor, w: Tensor, rows: Tensor, a: Tensor, b: Tensor, columns: Tensor) -> list[Tensor]:
        return [x @ w, x[2:] @ w, x[2:4] @ w, x[5:] @ w, rows @ w, a @ b, x @ columns]

    torch._dynamo.reset()
    got = torch.compile(products, backend="fpsim_eager", options={"format": cast})(x, w, *empty)
    for y, part in zip(got, (x, x[2:], x[2:4], x[5:]), strict=False):
        torch.testing.assert_close(y, rounded(part, cast, 1) @ rounded(w, cast, 0), rtol=0, atol=0, equal_nan=True)
    assert [tuple(y.shape) for y in got[4:]] == [(0, 6), (8, 6), (8, 0)] and not got[5].any()


def test_explain_and_profile_tell_which_scales_are_in_the_epilogue() -> None:
    x, layer = torch.randn(4, 48, requires_grad=True), nn.Linear(48, 24)
    policy = fpsim.Policy(activation="nvfp4", weight="int8", gradient="e4m3fn/block:16")
    sites = fpsim.explain(layer, x, policy=policy).sites
    assert [(site.scales, site.epilogue) for site in sites] == [
        ("12 along 1, 1 in the epilogue", True),
        ("24 along 0, in the epilogue", True),
        ("8 along 1", False),
        ("48 along 0, in the epilogue", True),
        ("24 along 1", False),
        ("48 along 0, 1 in the epilogue", True),
    ]
    profile = fpsim.profile(layer, x, policy=policy)
    assert [site.epilogue for site in profile.sites] == [site.epilogue for site in sites]
    assert fpsim.compile_backend.Profile.from_json(profile.to_json()).sites == profile.sites
    [product] = [product for product in profile.products if product.kind == "fprop"]
    exact = x.detach().double() @ layer.weight.detach().double().t()
    simulated = (rounded(x, "nvfp4", 1) @ rounded(layer.weight, "int8", 1).t()).double()
    assert abs(product.error - float((simulated - exact).norm())) < 1e-5 * float(exact.norm())
    [site] = [site for site in profile.sites if site.kind == "fprop" and site.role == "weight"]
    noise = (fpsim.round(layer.weight.detach(), "int8") - layer.weight.detach()).double().norm()
    assert abs(site.statistics.noise / float(noise) - 1) < 1e-6


# -- statistics -------------------------------------------------------------------------------------------------------


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


# -- tiles and columns need both axes of a matrix ----------------------------------------------------------------------


def alone(x: Tensor) -> Tensor:
    """``x`` in e4m3fn under one float32 ratio, by PyTorch's own conversion."""
    ratio = x.abs().amax() / 448
    return (x / ratio).to(torch.float8_e4m3fn).float() * ratio


@pytest.mark.parametrize("cast", ["e4m3fn/column", "e4m3fn/block:4x4"])
def test_a_product_over_one_element_keeps_its_tiles_and_columns(cast: str) -> None:
    """torch decomposes it into a multiplication, which has no axis to sum over."""
    torch.manual_seed(0)
    head, x, gradient = nn.Linear(6, 1), torch.randn(5, 6, requires_grad=True), torch.randn(5, 1)
    torch.compile(head, backend="fpsim_eager", options={"dgrad": cast})(x).backward(gradient)
    parts = [4, 4] if "x" in cast else [6, 6]  # one scale for a column
    q, w = (
        torch.cat([alone(part) for part in operand.flatten().split(length)])
        for operand, length in zip((gradient, head.weight.detach()), parts, strict=True)
    )
    assert torch.equal(x.grad, torch.outer(q, w))


@pytest.mark.parametrize(("m", "n"), [(5, 1), (1, 1), (3, 4)])
def test_rows_of_one_element_multiply_the_result(m: int, n: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(m, 1), torch.randn(1, n)
    got = torch.compile(torch.mm, backend="fpsim_eager", options={"format": "e4m3fn/row"})(a, b)
    ratios = a.abs() / 448, b.abs() / 448
    codes = [(x / ratio).to(torch.float8_e4m3fn).float() for x, ratio in zip((a, b), ratios, strict=True)]
    assert torch.equal(got, codes[0] * codes[1] * ratios[0] * ratios[1])


@pytest.mark.parametrize("tile", ["4x4", "2x4", "4x2"])
def test_square_tiles_of_three_axes_are_those_of_the_axis_that_the_product_sums_over(tile: str) -> None:
    """The input's gradient of a one-dimensional convolution sums over output channels: tiles have both channels."""
    torch.manual_seed(0)
    layer, x = nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 5, requires_grad=True)
    y = torch.compile(layer, backend="fpsim_eager", options={"dgrad": {"weight": f"e4m3fn/block:{tile}"}})(x)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    across, along = map(int, tile.split("x"))
    weight = layer.weight.detach().clone()
    for tap in range(3):
        for i in range(0, 8, along):
            for j in range(0, 6, across):
                part = weight[i : i + along, j : j + across, tap]
                part.copy_(alone(part))
    want = F.conv_transpose1d(gradient, weight, padding=1)
    torch.testing.assert_close(x.grad, want, rtol=0, atol=1e-6)


def test_profile_counts_the_scales_of_a_product_without_a_sum() -> None:
    """Every element of an outer product is a row and a block of its own."""
    a, b = torch.arange(1.0, 9.0), torch.arange(1.0, 5.0)
    sites = fpsim.profile(torch.outer, a, b, policy={"format": "e2m1fn/row"}).sites
    assert [(site.statistics.scales, site.statistics.noise < 1e-6) for site in sites] == [(8, True), (4, True)]
