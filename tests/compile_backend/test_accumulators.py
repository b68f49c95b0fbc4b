"""Accumulators in whole models: every product has the sums of `fpsim.reference.dot`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fpsim
from fpsim.compile_backend.functional import functional
from fpsim.compile_backend.observe.lost_sums import SumStatistics
from fpsim.compile_backend.passes.rounding_pass import RoundingPass
from fpsim.reference import dot, to_float

#: Few bits, so that almost every sum differs from that of torch.
POLICY: dict[str, Any] = {"format": "e4m3fn", "accumulator": "e5m4"}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Values of e4m3fn."""
    return fpsim.round(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), "e4m3fn")


def summed(a: Tensor, b: Tensor, accumulator: str = "e5m4", **options: Any) -> Tensor:
    """The product of two matrices, element by element by the reference."""
    rows = [[to_float(dot(x, y, "fp32", accumulator=accumulator, **options)) for y in b.T.tolist()] for x in a.tolist()]
    return torch.tensor(rows)


def run(function: Callable[..., Tensor], *arguments: Tensor, backend: str = "fpsim_eager", **policy: Any) -> Tensor:
    return torch.compile(function, backend=backend, options={**POLICY, **policy})(*arguments)


A, B, C = numbers(3, 20, seed=1), numbers(20, 4, seed=2), numbers(3, 4, seed=3)
X, Y = numbers(2, 3, 20, seed=4), numbers(2, 20, 4, seed=5)
PRODUCT = summed(A, B)
BATCHES = torch.stack([summed(x, y) for x, y in zip(X, Y, strict=True)])

#: Every spelling of a product, its arguments, and its result.
SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]] = {
    "mm": (torch.mm, (A, B), PRODUCT),
    "matmul of a batch and a matrix": (torch.matmul, (X, B), torch.stack([summed(x, B) for x in X])),
    "addmm": (torch.addmm, (C, A, B), C + PRODUCT),
    "addmm with factors": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (C, A, B), C * 0.5 + PRODUCT * 2),
    "addmm without its addend": (lambda c, a, b: torch.addmm(c, a, b, beta=0), (C / 0, A, B), PRODUCT),
    "linear": (nn.functional.linear, (A, B.T, C[0]), PRODUCT + C[0]),
    "bmm": (torch.bmm, (X, Y), BATCHES),
    "baddbmm": (torch.baddbmm, (C.expand(2, 3, 4), X, Y), C + BATCHES),
    "addbmm": (torch.addbmm, (C, X, Y), C + summed(torch.cat([*X], 1), torch.cat([*Y]))),
    "mv": (torch.mv, (A, B[:, 0]), PRODUCT[:, 0]),
    "addmv": (torch.addmv, (C[:, 0], A, B[:, 0]), C[:, 0] + PRODUCT[:, 0]),
    "dot": (torch.dot, (A[0], B[:, 0]), PRODUCT[0, 0]),
    "vdot": (torch.vdot, (A[0], B[:, 0]), PRODUCT[0, 0]),
    "outer": (torch.outer, (A[0], B[:, 0]), summed(A[:1].T, B[:, :1].T)),
    "einsum": (lambda a, b: torch.einsum("mk,kn->nm", a, b), (A, B), PRODUCT.T),
    "einsum that sums over two axes": (
        lambda x, y: torch.einsum("bmk,bkn->mn", x, y), (X, Y), summed(torch.cat([*X], 1), torch.cat([*Y]))),
    "one row": (torch.matmul, (A[:1], B), PRODUCT[:1]),
    "one column": (torch.matmul, (A, B[:, :1]), PRODUCT[:, :1]),
    "a single product": (torch.mm, (A[:, :1], B[:1]), summed(A[:, :1], B[:1])),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_product_has_the_sums_of_the_reference(spelling: str) -> None:
    function, arguments, wanted = SPELLINGS[spelling]
    assert torch.equal(run(function, *arguments), wanted)


def test_compiled_products_are_those_of_the_interpreter_also_of_any_size() -> None:
    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
            return a @ b @ v

    wanted = run(Both(), A, B, C[0])
    assert torch.equal(wanted, summed(fpsim.round(PRODUCT, "e4m3fn"), C[:1].T)[:, 0])
    assert torch.equal(run(Both(), A, B, C[0], backend="fpsim"), wanted)
    any_size = torch.compile(Both(), backend="fpsim_eager", options=POLICY, dynamic=True)
    assert torch.equal(any_size(A, B, C[0]), wanted)
    assert torch.equal(any_size(A[:2], B, C[0]), wanted[:2])


def test_every_kind_of_product_has_its_own_accumulator() -> None:
    """fprop in e5m4, dgrad in chunks of 4 exact products, wgrad as torch sums."""
    layer = nn.Linear(20, 4, bias=False)
    layer.weight.data = B.T.clone()
    x, gradient = A.clone().requires_grad_(), numbers(3, 4, seed=9)
    policy = {"accumulator": {"fprop": "e5m4", "dgrad": "e5m3"}, "chunk": {"dgrad": 4}}
    y = torch.compile(layer, backend="fpsim_eager", options={**POLICY, **policy})(x)
    y.backward(gradient)
    assert torch.equal(y, PRODUCT)
    assert torch.equal(x.grad, summed(gradient, B.T, "e5m3", order=("chunked", 4)))
    assert torch.equal(layer.weight.grad, gradient.T @ A)


def test_machines_chunks_and_promotion_reach_the_products() -> None:
    long = torch.full((1, 4096), 2.0**-3)
    assert run(torch.mm, long, long.T, accumulator="hopper_fp8").item() == 64
    steps = torch.full((1, 131072), 2.0**-5)
    assert run(torch.mm, steps, steps.T, accumulator="hopper_fp8").item() == 16
    assert run(torch.mm, steps, steps.T, accumulator="hopper_fp8", promote=128).item() == 128
    assert torch.equal(run(torch.mm, A, B, chunk=5), summed(A, B, order=("chunked", 5)))
    assert torch.equal(run(torch.mm, A, B, order="pairwise"), summed(A, B, order="pairwise"))


def test_operands_may_stay_unrounded() -> None:
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(7)) for shape in ((2, 9), (9, 2)))
    assert torch.equal(run(torch.mm, a, b, format="none", accumulator="e8m13"), summed(a, b, "e8m13"))
    only = torch.compile(torch.mm, backend="fpsim_eager", options={"accumulator": "e8m13"})
    assert torch.equal(only(a, b), summed(a, b, "e8m13"))


def test_a_bias_is_added_before_a_16_bit_result_is_rounded() -> None:
    a, b, c = A.bfloat16(), B.bfloat16(), C[0].bfloat16() / 256
    got = run(torch.addmm, c, a, b, accumulator="fp32")
    wanted = (summed(A, B, "fp32") + c.float()).bfloat16()
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)
    assert not torch.equal(got, summed(A, B, "fp32").bfloat16() + c)  # two roundings would differ


def test_attention_is_summed_in_the_accumulator() -> None:
    q, k, v = (numbers(1, 1, 5, 16, seed=seed) for seed in (11, 12, 13))
    got = run(nn.functional.scaled_dot_product_attention, q, k, v, accumulator="e8m5", format="none")
    scale = 16**-0.25  # torch multiplies both factors before the product
    scores = summed(q[0, 0] * scale, (k[0, 0] * scale).T, "e8m5")
    wanted = summed(torch.softmax(scores, -1), v[0, 0], "e8m5")
    torch.testing.assert_close(got[0, 0], wanted, rtol=2**-5, atol=0)
    assert torch.equal(got, fpsim.round(got, "e8m5"))


def test_stochastic_sums_are_reproducible_and_differ_between_products() -> None:
    def twice(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a @ b, (2 * a) @ b / 2])

    options = {**POLICY, "accumulator": "e5m4/stochastic"}
    compiled = torch.compile(twice, backend="fpsim_eager", options=options)
    torch.manual_seed(1)
    first = compiled(A, B)
    torch.manual_seed(1)
    assert torch.equal(compiled(A, B), first)
    assert not torch.equal(compiled(A, B), first) and not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert torch.equal(torch.compile(twice, backend="fpsim", options=options)(A, B), first)


def test_a_rule_for_modules_has_its_own_accumulator() -> None:
    model = nn.Sequential(nn.Linear(20, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.data, model[1].weight.data = B.T.clone(), numbers(4, 4, seed=8)
    policy = {"modules": {"1": {"format": "e4m3fn"}}}
    assert torch.equal(run(model, A, **policy), fpsim.round(PRODUCT, "e4m3fn") @ model[1].weight.T)
    plan = fpsim.explain(model, A, policy={**POLICY, **policy})
    assert [(each.path, each.kind, each.accumulator) for each in plan.sums] == [
        ("0", "fprop", "e5m4/nearest_even/ovf_inf"), ("0", "wgrad", "e5m4/nearest_even/ovf_inf"),
    ]  # fmt: skip
    assert "2 products with accumulators" in str(plan)


def test_audit_counts_products_with_accumulators() -> None:
    layer = nn.Linear(20, 4)
    for policy in (POLICY, {"accumulator": "hopper_fp8", "format": "e4m3fn"}, {"accumulator": "fp32"}):
        audit = fpsim.audit(layer, A, policy=policy)
        assert audit.escaped == () and audit.covered == 2 and audit.unrounded == ()


def test_profile_measures_the_error_of_the_accumulator() -> None:
    """The operands are values of the format: all of the error is that of the sums."""
    profile = fpsim.profile(lambda a, b: a @ b, A, B, policy=POLICY)
    exact = A.double() @ B.double()
    (product,) = profile.products
    assert product.error == pytest.approx(float((PRODUCT - exact).norm()))


def test_profile_counts_sums_that_stagnated() -> None:
    """In e5m4 by the reference, step by step. On Hopper by hand: 512 steps of 2**-5 reach 16; 3584 change nothing."""

    def counted(x: list[float], y: list[float]) -> tuple[bool, int, int]:
        sums = [to_float(dot(x[:k], y[:k], "fp32", accumulator="e5m4")) for k in range(len(x) + 1)]
        steps = [(sums[k], sums[k + 1]) for k in range(len(x)) if x[k] * y[k]]
        idle = sum(before == after for before, after in steps)
        return idle > 0, idle, len(steps)

    (product,) = fpsim.profile(lambda a, b: a @ b, A, B, policy=POLICY).products
    counts = [counted(x, y) for x in A.tolist() for y in B.T.tolist()]
    lost, exact = product.sum, A.double() @ B.double()
    assert (lost.stagnated, lost.idle_steps, lost.steps) == tuple(map(sum, zip(*counts, strict=True)))
    assert lost.sums == 12 and 0 < lost.stagnated < 12
    assert lost.relative_error == pytest.approx(float((PRODUCT - exact).norm() / exact.norm()))

    steps = torch.full((1, 131072), 2.0**-5)
    policy = {"format": "e4m3fn", "accumulator": "hopper_fp8"}
    profile = fpsim.profile(lambda a, b: a @ b, steps, steps.T, policy=policy)
    (product,) = profile.products
    assert product.sum == SumStatistics("hopper_fp8", 112.0, 128.0, 1, 1, 4096, 3584)
    assert product.sum.relative_error == 0.875 and product.sum.idle_share == 0.875
    assert "1 products with accumulators" in str(profile) and "87.5%" in str(profile).replace(" %", "%")
    assert type(profile).from_json(profile.to_json()).products == profile.products
    both = (profile + profile).products[0].sum
    assert (both.sums, both.stagnated, both.steps, both.idle_steps) == (2, 2, 8192, 7168)
    promoted = fpsim.profile(lambda a, b: a @ b, steps, steps.T, policy={**policy, "promote": 128}).products[0].sum
    assert (promoted.error, promoted.stagnated, promoted.steps) == (0, 0, 4096)


def test_profile_counts_the_sums_of_every_kind_of_product() -> None:
    """Scales of blocks, groups and a model with gradients: the numbers of sums and steps follow from the shapes."""
    layer, x = nn.Linear(300, 10, bias=False), torch.randn(70, 300, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    products = fpsim.profile(loss, x, policy=BLOCKS["deepseek"]).products
    assert [(each.kind, each.sum.sums) for each in products] == [("fprop", 700), ("wgrad", 3000)]
    assert 6990 <= products[0].sum.steps <= 7000  # 10 for each, but where products add up to zero
    assert 8990 <= products[1].sum.steps <= 9000
    assert all(0 < each.sum.relative_error < 1e-3 for each in products)
    a, b = numbers(20, 16, seed=1).bfloat16(), numbers(3, 16, 8, seed=2).bfloat16()
    grouped = fpsim.profile(lambda a, b: torch._grouped_mm(a, b, offs=ENDS), a, b, policy=POLICY).products[0].sum
    assert grouped.sums == 160 and grouped.steps == sum(
        int(torch.count_nonzero(a[i:j, :, None] * b[n])) for n, (i, j) in enumerate([(0, 7), (7, 7), (7, 20)])
    )
    convolve, image = nn.Conv1d(4, 3, 2), numbers(2, 4, 6, seed=1).requires_grad_()
    convolve.weight.data = numbers(3, 4, 2, seed=2)
    products = fpsim.profile(lambda x: convolve(x).square().sum(), image, policy=POLICY).products
    assert [(each.kind, each.sum.sums) for each in products] == [("fprop", 30), ("dgrad", 48), ("wgrad", 24)]
    columns, kernel = (
        image.detach().unfold(2, 2, 1).transpose(1, 2).reshape(10, 8),
        convolve.weight.detach().reshape(3, 8),
    )
    exact = columns.double() @ kernel.T.double()
    own = products[0].sum.relative_error
    assert own == pytest.approx(float((summed(columns, kernel.T) - exact).norm() / exact.norm()))
    assert products[0].relative_error == pytest.approx(own, rel=1e-6)  # rounding leaves these operands as they are
    pairwise = fpsim.profile(torch.mm, A, B, policy={**POLICY, "order": "pairwise"}).products[0].sum
    assert pairwise.stagnated is None and pairwise.idle_share is None and pairwise.relative_error > 0


def test_profile_measures_other_sums_too() -> None:
    """By hand: 16 numbers 2**-4 reach 1 in e8m3, and more change nothing. The sums of a softmax: by the reference."""
    x = torch.full((1, 64), 2.0**-4)
    policy = {"format": "e4m3fn", "reductions": "e8m3"}
    profile = fpsim.profile(lambda x: x.sum(1), x, policy=policy)
    (found,) = profile.reductions
    assert (found.path, found.operator, found.kind) == ("", "aten.sum", "forward")
    assert found.sum == SumStatistics("e8m3/nearest_even/ovf_inf", 3.0, 4.0, 1, 1, 64, 48)
    assert found.relative_error == 0.75 and "0 products with accumulators, 1 other sums" in str(profile)
    assert type(profile).from_json(profile.to_json()) == profile
    assert (profile + profile).reductions[0].sum.idle_steps == 96
    with pytest.raises(ValueError, match="merge those of the same policy"):
        profile + fpsim.profile(lambda x: x.sum(1), x, policy={"format": "e4m3fn", "reductions": "e8m4"})

    scores = numbers(3, 20, seed=1).requires_grad_()
    found = fpsim.profile(lambda x: torch.softmax(x, 1)[:, 0], scores, policy=policy).reductions
    assert [each.operator for each in found] == ["aten._softmax", "aten._softmax_backward_data"]
    assert [each.kind for each in found] == ["forward", "backward"]
    terms = (scores - scores.amax(1, keepdim=True)).exp().detach()
    sums = [to_float(dot([1.0] * 20, row, "fp32", accumulator="e8m3")) for row in terms.tolist()]
    exact = terms.double().sum(1)
    assert found[0].sum.error == pytest.approx(float((torch.tensor(sums).double() - exact).norm()))
    assert found[0].sum.reference == pytest.approx(float(exact.norm()))


def test_the_key_of_compiled_code_covers_the_accumulator() -> None:
    policies = [{}, {"accumulator": "fp16"}, {"accumulator": "fp16", "chunk": 4}, {"accumulator": {"fprop": "fp16"}},
                {"accumulator": "hopper_fp8"}, {"accumulator": "hopper_fp8", "promote": 128}]  # fmt: skip
    keys = [RoundingPass(fpsim.Policy(format="e4m3fn", **policy), [], []).uuid() for policy in policies]
    assert len(set(keys)) == len(keys)


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


#: Convolutions: the function, its arguments beside image and weight, and the shapes of these two.
CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "plain": (nn.functional.conv2d, {}, (2, 4, 5, 6), (6, 4, 3, 3)),
    "all arguments": (
        nn.functional.conv2d, {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2},
        (2, 4, 9, 11), (6, 2, 3, 4)),
    "a stride that leaves a rest": (nn.functional.conv1d, {"stride": 3, "padding": 4}, (2, 4, 10), (6, 4, 3)),
    "three dimensions": (nn.functional.conv3d, {"stride": 2, "padding": 1}, (1, 2, 4, 5, 6), (3, 2, 3, 2, 3)),
    "transposed": (
        nn.functional.conv_transpose2d, {"stride": 2, "padding": 1, "output_padding": 1}, (2, 4, 4, 5), (4, 3, 3, 3)),
    "transposed in groups": (
        nn.functional.conv_transpose2d, {"stride": 2, "dilation": 2, "groups": 2}, (2, 4, 4, 5), (4, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_unfolded_into_products(name: str) -> None:
    """Sums of integers are exact in float32, in any order: torch's own convolution is the judge."""
    function, arguments, of_image, of_weight = CONVOLUTIONS[name]
    results = []
    for convolve in (
        torch.compile(function, backend="fpsim_eager", options={"accumulator": "fp32", "order": "pairwise"}), function
    ):  # fmt: skip
        image, weight = (integers(*s, seed=n).requires_grad_() for n, s in enumerate((of_image, of_weight)))
        result = convolve(image, weight, **arguments)
        result.backward(integers(*result.shape, seed=3))
        results.append((result, image.grad, weight.grad))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def test_a_convolution_takes_any_number_of_images_and_refuses_any_size() -> None:
    convolve = torch.compile(nn.functional.conv2d, backend="fpsim_eager", options={"accumulator": "fp32"})
    weight = integers(6, 4, 3, 3, seed=1)
    for count in (2, 3, 5):
        image = integers(count, 4, 5, 6, seed=count).requires_grad_()
        result = convolve(image, weight)
        assert torch.equal(result, nn.functional.conv2d(image, weight))
        result.sum().backward()
        assert torch.equal(image.grad, nn.functional.conv_transpose2d(torch.ones_like(result), weight))
    with pytest.raises(Exception, match=r"images of any size.*compile with dynamic=False"):
        convolve(integers(2, 4, 9, 7, seed=1), weight)


def test_a_machine_multiplies_elements_that_a_power_of_two_scales() -> None:
    """hopper_fp8 gets the operands times their scales, and the result is divided by both, before the bias is added."""
    x, weight, bias = A / 1000, B.T * 64, C[0]
    policy = {"format": "e4m3fn/power_of_two", "accumulator": "hopper_fp8"}
    factors = [fpsim.power_of_two_scale(each, "e4m3fn") for each in (x, weight)]
    exact = fpsim.matmul(x * factors[0], (weight * factors[1]).T, accumulator="hopper_fp8", format="e4m3fn")
    wanted = exact / factors[0] / factors[1]
    assert torch.equal(run(nn.functional.linear, x, weight, bias, **policy), wanted + bias)
    own = fpsim.matmul(x, weight.T, accumulator="hopper_fp8", format="e4m3fn/power_of_two")
    assert torch.equal(own, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_sums_of_a_gradient_know_the_format_of_each_operand(transposed: bool, graphs: list[fx.Graph]) -> None:
    """In the gradient of a transposed convolution's weight the image comes first."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    options = {"activation": "e4m3fn", "weight": "e2m1fn", "gradient": "e5m2", "accumulator": {"wgrad": "e5m4"}}
    torch.compile(kind(2, 3, 2), backend="fpsim_eager", options=options)(integers(1, 2, 4, 4, seed=1)).sum().backward()
    (product,) = graphs[0].find_nodes(op="call_function", target=torch.ops.fpsim.accumulate_mm.default)
    names = [each for each in product.args if each in ("e4m3fn", "e2m1fn", "e5m2")]
    assert names == (["e4m3fn", "e5m2"] if transposed else ["e5m2", "e4m3fn"])


def test_the_sums_of_a_convolution_are_over_channels_and_then_taps() -> None:
    """In the order of `torch.nn.functional.unfold`, forward and for the weight; the gradient is in another format."""
    layer = nn.Conv2d(3, 4, 2)
    layer.weight.data, layer.bias.data = numbers(4, 3, 2, 2, seed=1), numbers(4, seed=2)
    image, gradient = numbers(2, 3, 4, 3, seed=3), fpsim.round(torch.randn(2, 4, 3, 2), "e5m2")
    policy = {
        "activation": "e4m3fn",
        "weight": "e4m3fn",
        "gradient": "e5m2",
        "accumulator": "hopper_fp8",
        "format": None,
    }
    result = torch.compile(layer, backend="fpsim_eager", options={**POLICY, **policy})(image)
    result.backward(gradient)
    columns, rows = nn.functional.unfold(image, 2), layer.weight.detach().reshape(4, -1)
    sums = fpsim.matmul(columns.transpose(1, 2), rows.T, accumulator="hopper_fp8").transpose(1, 2)
    assert torch.equal(result, sums.reshape(result.shape) + layer.bias[:, None, None])
    left, right = gradient.flatten(2).transpose(0, 1).flatten(1), columns.transpose(1, 2).flatten(0, 1)
    of_weight = fpsim.matmul(left, right, accumulator="hopper_fp8", format=("e5m2", "e4m3fn"))
    assert torch.equal(layer.weight.grad, of_weight.reshape(layer.weight.shape))


#: Casts by role whose blocks have scales, with the accumulator that takes these.
BLOCKS: dict[str, dict[str, Any]] = {
    "deepseek": {
        "activation": "e4m3fn/block:128", "weight": "e4m3fn/block:128x128", "gradient": "e4m3fn/block:128",
        "accumulator": "hopper_fp8", "promote": 128, "format": None,
    },
    "mxfp8": {"format": "mxfp8", "accumulator": "blackwell_mxfp8"},
    "nvfp4": {"format": "nvfp4", "weight": "e2m1fn/nv:16x16", "accumulator": "blackwell_nvfp4"},
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_of_blocks_reach_the_sums_of_all_three_products(name: str) -> None:
    """`fpsim.matmul`, whose judge is the reference, gets the same operands: along features, and along tokens."""
    policy, draw = BLOCKS[name], torch.Generator().manual_seed(1)
    layer, x = nn.Linear(300, 10), torch.randn(2, 70, 300, generator=draw)
    gradient = torch.randn(2, 70, 10, generator=draw)
    options = {key: policy[key] for key in ("accumulator", "promote") if key in policy}
    cast = policy.get("activation", policy["format"])
    weight = policy.get("weight", policy["format"])
    rows, tangent = x.flatten(0, 1), gradient.flatten(0, 1)
    of_weight = fpsim.matmul(tangent.T, rows, format=cast, **options)
    of_input = fpsim.matmul(gradient, layer.weight.detach(), format=(cast, weight), **options)
    wanted = fpsim.matmul(x, layer.weight.detach().T, format=(cast, weight), **options) + layer.bias
    for backend in ("fpsim_eager", *(["fpsim"] if name == "deepseek" else [])):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        result = torch.compile(layer, backend=backend, options=policy)(own)
        result.backward(gradient)
        assert torch.equal(result, wanted) and torch.equal(own.grad, of_input)
        assert torch.equal(layer.weight.grad, of_weight)
    (first, *_) = fpsim.explain(layer, x, policy=policy).sums
    assert (
        first.accumulator
        == {
            "deepseek": "hopper_fp8 promote=128, scales of 128 times partial sums",
            "mxfp8": "blackwell_mxfp8, scales of 32 in the sum",
            "nvfp4": "blackwell_nvfp4, scales of 16 in the sum",
        }[name]
    )
    assert fpsim.audit(layer, x, policy=policy).escaped == ()


def test_a_functional_loss_has_the_sums_and_straight_through_derivatives() -> None:
    layer, x = nn.Linear(40, 6, bias=False), torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for name, policy in BLOCKS.items():
        call = functional(layer, fpsim.Policy.from_options(policy))
        parameters = {"weight": layer.weight.detach()}
        wanted = torch.compile(layer, backend="fpsim_eager", options=policy)(x)
        assert torch.equal(call(parameters, (x,), {}), wanted)
        got = torch.func.grad(lambda p, call=call: call(p, (x,), {}).sum())(parameters)["weight"]
        rounded = fpsim.round(x, policy.get("activation", policy["format"]))
        torch.testing.assert_close(got, rounded.sum(0).expand(6, 40), msg=name)


def test_stochastic_elements_are_those_of_the_rounded_operand() -> None:
    """The elements times their scales are the operand that the plan shows: products of one term give them back."""
    x, one = torch.randn(6, 1, generator=torch.Generator().manual_seed(1)), torch.ones(1, 4)
    cast = "e4m3fn/block:128:power_of_two/stochastic"
    options = {"activation": cast, "accumulator": "hopper_fp8", "promote": 128, "format": None}
    results = []
    for policy in (options, {"activation": cast}):
        torch.manual_seed(1)
        results.append(torch.compile(torch.mm, backend="fpsim_eager", options=policy)(x, one))
    assert torch.equal(*results) and not torch.equal(results[0][:, :1], x)


def test_small_products_that_torch_takes_apart_have_scales_of_blocks_too() -> None:
    """A row times a matrix is a multiplication and a sum in the graph."""
    x, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(2)) for shape in ((1, 300), (300, 1)))
    policy = {**BLOCKS["deepseek"], "weight": "e4m3fn/block:128"}
    wanted = fpsim.matmul(x, weight, accumulator="hopper_fp8", promote=128, format="e4m3fn/block:128")
    assert torch.equal(run(torch.mm, x, weight, **policy), wanted)


ENDS = torch.tensor([7, 7, 20], dtype=torch.int32)


def test_grouped_products_have_the_sums_of_their_groups() -> None:
    """Forward and backward: groups of rows, groups along the sum, and an empty group; 4 of 24 rows are in no group."""
    a, b = numbers(24, 16, seed=1).bfloat16(), numbers(3, 16, 8, seed=2).bfloat16()
    gradient = numbers(24, 8, seed=3).bfloat16()
    parts = [(0, 7), (7, 7), (7, 20)]
    wanted = torch.zeros(24, 8)
    of_a, of_b = torch.zeros(24, 16), torch.zeros(3, 16, 8)
    for number, (i, j) in enumerate(parts):
        if i < j:
            wanted[i:j] = summed(a[i:j], b[number])
            of_a[i:j] = summed(gradient[i:j], b[number].T)
            of_b[number] = summed(a[i:j].T, gradient[i:j])
    own, weight = a.clone().requires_grad_(), b.clone().requires_grad_()
    result = run(lambda x, y: torch._grouped_mm(x, y, offs=ENDS), own, weight)
    result[:20].backward(gradient[:20])
    assert torch.equal(result[:20], wanted[:20].bfloat16()) and torch.equal(own.grad[:20], of_a[:20].bfloat16())
    assert torch.equal(weight.grad, of_b.bfloat16())
    columns = run(lambda x, y: torch._grouped_mm(x, y, offs=ENDS), b.transpose(1, 2).contiguous(), a.T)
    assert torch.equal(columns[:, :20], torch.cat([summed(b[n].T, a[i:j].T) for n, (i, j) in enumerate(parts)], 1))


def test_grouped_products_take_scales_of_blocks_and_draw_for_every_element() -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((16, 192), (2, 192, 8)))
    ends = torch.tensor([8, 16], dtype=torch.int32)

    def grouped(x: Tensor, y: Tensor) -> Tensor:
        return torch._grouped_mm(x, y, offs=ends)

    policy = {key: value for key, value in BLOCKS["deepseek"].items() if key != "weight"}
    policy = {**policy, "weight": "e4m3fn/block:128", "accumulator": {"fprop": "hopper_fp8"}, "promote": {"fprop": 128}}
    options: dict[str, Any] = {"accumulator": "hopper_fp8", "promote": 128, "format": "e4m3fn/block:128"}
    wanted = [fpsim.matmul(a[i : i + 8].float(), b[n].float(), **options) for n, i in enumerate((0, 8))]
    assert torch.equal(run(grouped, a, b, **policy), torch.cat(wanted).bfloat16())
    same_groups = torch.cat([a[:8], a[:8]]), torch.stack([b[0], b[0]])
    torch.manual_seed(1)
    drawn = run(grouped, *same_groups, accumulator="e5m4/stochastic")
    assert not torch.equal(drawn[:8], drawn[8:])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"format": "e5m2", "accumulator": "hopper"}, "fprop product aten.mm in module '': hopper multiplies fp16, or"),
        ({"format": "none", "accumulator": "hopper_fp8"}, "hopper_fp8 multiplies e4m3fn and e5m2, and not e8m23"),
        ({"format": "mxfp8", "accumulator": "hopper_fp8"}, "got blocks of 32 and no promotion: use promote=32"),
        ({"format": "e4m3fn/row:power_of_two", "accumulator": "hopper_fp8"}, "scales that are none of blocks"),
        ({"format": "e4m3fn", "accumulator": "blackwell_mxfp8"}, "give format='mxfp8'"),
        ({"format": "e5m10", "accumulator": "e5m4"}, "fewer than the operands in e5m10"),
    ],
)
def test_operands_that_the_accumulator_does_not_add_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(torch.mm, A, B, **policy)
