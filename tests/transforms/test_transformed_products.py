"""Products whose operands are transformed before they are rounded: exact arithmetic, bits, plans, and refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fpsim
from fpsim import Policy, reference
from fpsim.compile_backend.errors import UnroundedError
from fpsim.policy.shorthand import parse_shorthand
from fpsim.transforms.chain import Chain
from fpsim.transforms.hadamard import Hadamard
from fpsim.transforms.names import parse_transform
from fpsim.transforms.permutation import Permutation
from fpsim.transforms.smoothing import Smoothing
from tests.shared.models import case

TRANSFORMS = (
    "hadamard:16:te",
    "hadamard:8:seed=1",
    "hadamard:12",
    "smooth",
    "smooth:alpha=1",
    "permute:amax",
    "permute:norm:second",
    "smooth/hadamard:16:te",
    "permute:amax/smooth/hadamard:8:seed=1",
)
#: Transforms that leave a product of small integers as it is, to the last bit.
EXACT = (
    "hadamard:16:te",
    "hadamard:4:seed=1",
    "smooth:power_of_two",
    "permute:amax",
    "permute:norm:second",
    "smooth:power_of_two/permute:amax/hadamard:4:seed=1",
)


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], backend: str | None = None, **options: Any
) -> list[Tensor]:
    """The result of a function and the gradients of its inputs, for a gradient of small integers."""
    torch._dynamo.reset()
    inputs = [x.clone().requires_grad_() for x in inputs]
    compiled = function if backend is None else torch.compile(function, backend=backend, options=options)
    y = compiled(*inputs)
    y.backward((torch.arange(y.numel()) % 7 - 3).to(y.dtype).view(y.shape))
    return [y.detach(), *(x.grad for x in inputs)]


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(len(shape))).double()


#: Axes of 4, 5, 16, 20, 21 and 36 elements fall into blocks of 16, 4 and 1, whose square roots are powers of two.
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "linear": (F.linear, [integers(2, 10, 36), integers(21, 36)]),
    "linear with bias": (F.linear, [integers(20, 36), integers(21, 36), integers(21)]),
    "weight first": (lambda w, x: w @ x, [integers(21, 36), integers(36, 5)]),
    "bmm": (torch.bmm, [integers(3, 5, 20), integers(3, 20, 21)]),
    "baddbmm": (torch.baddbmm, [integers(3, 5, 21), integers(3, 5, 20), integers(3, 20, 21)]),
    "addbmm": (torch.addbmm, [integers(5, 21), integers(3, 5, 20), integers(3, 20, 21)]),
    "expanded": (lambda a, b: a.expand(3, 5, 20) @ b, [integers(3, 5, 1), integers(3, 20, 21)]),
    "expanded batch": (lambda a, b: a.expand(4, 5, 20) @ b, [integers(1, 5, 20), integers(20, 21)]),
    "mm of one": (torch.mm, [integers(5, 1), integers(1, 4)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0).round(),
        [integers(1, 2, 16, 4), integers(1, 2, 16, 4), integers(1, 2, 16, 4)],
    ),
    "heads": (lambda a, b: torch.einsum("bthd,bshd->bhts", a, b), [integers(2, 5, 3, 16), integers(2, 4, 3, 16)]),
}


#: With a linear layer and a batch every run tries all transforms, with the others one transform and a chain of three.
IN_EVERY_RUN = ("hadamard:16:te", "smooth:power_of_two/permute:amax/hadamard:4:seed=1")


@pytest.mark.parametrize(
    ("product", "transform"),
    [
        case(product, transform, in_every_run=product in ("linear", "bmm") or transform in IN_EVERY_RUN)
        for product in PRODUCTS
        for transform in (TRANSFORMS if product in ("linear", "bmm") else EXACT)
    ],
)
def test_a_product_stays_as_it_is_in_exact_arithmetic(product: str, transform: str) -> None:
    function, inputs = PRODUCTS[product]
    wanted = run(function, inputs)
    got = run(function, inputs, "fpsim_eager", format="fp64", transform=transform)
    for a, b in zip(got, wanted, strict=True):
        if transform in EXACT and product != "attention":
            assert torch.equal(a, b)
        else:
            assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max())


@pytest.mark.parametrize("transform", [case(each, in_every_run=each in IN_EVERY_RUN) for each in EXACT])
def test_convolutions_are_transformed_along_channels(transform: str) -> None:
    for function, weight in ((F.conv2d, integers(4, 16, 3, 3)), (F.conv_transpose2d, integers(16, 4, 3, 3))):
        inputs = [integers(2, 16, 5, 6), weight]
        options = {"format": "fp64", "transform": {"fprop": transform, "dgrad": transform}}
        for a, b in zip(run(function, inputs, "fpsim_eager", **options), run(function, inputs), strict=True):
            assert torch.equal(a, b)


# -- bits --------------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, cast: str | None, axis: int, size: int, signs: str) -> Tensor:
    """``x`` rotated along ``axis`` and rounded by the reference; a result in the dtype of ``x``."""
    moved = x.detach().movedim(axis, -1)
    lines = [reference.hadamard(line, size, signs) for line in moved.reshape(-1, moved.shape[-1]).tolist()]
    flat = torch.tensor([[reference.to_float(v) for v in line] for line in lines], dtype=torch.float64)
    values = flat.view(moved.shape).movedim(-1, axis)
    if cast is not None:
        results = reference.round_blocks(values.flatten().tolist(), cast, tuple(x.shape), axis)
        values = torch.tensor([reference.to_float(v) for v in results], dtype=torch.float64).view(x.shape)
    narrow = "bf16" if x.dtype == torch.bfloat16 else "fp32"
    once = [reference.to_float(reference.round(v, narrow)) for v in values.flatten().tolist()]
    return torch.tensor(once, dtype=torch.float64).to(x.dtype).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_six_operands_of_a_linear_layer_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 17, 32).to(dtype), torch.randn(24, 32).to(dtype)
    dy = (torch.arange(2 * 17 * 24) % 7 - 3).to(dtype).view(34, 24)
    tokens = x.view(34, 32)

    def r(value: Tensor, axis: int, cast: str | None = "mxfp4") -> Tensor:
        return rounded(value, cast, axis, 16, "te")

    y, dx, dw = run(F.linear, [x, w], "fpsim_eager", format="mxfp4", transform="hadamard:16:te")
    assert torch.equal(y.view(34, 24), r(tokens, 1) @ r(w, 1).t())
    assert torch.equal(dx.view(34, 32), r(dy, 1) @ r(w, 0))
    assert torch.equal(dw, r(dy, 0).t() @ r(tokens, 0))
    # An operand without a cast is transformed too, and rounded once to the dtype of the product.
    y, dx, dw = run(F.linear, [x, w], "fpsim_eager", activation="mxfp4", transform={"fprop": "hadamard:16:te"})
    assert torch.equal(y.view(34, 24), r(tokens, 1) @ r(w, 1, None).t())
    assert torch.equal(dx.view(34, 32), dy @ w)


def test_transforms_follow_one_another_in_the_order_in_which_they_are_named() -> None:
    """Division by given powers of two is exact, and the reference rotates."""
    torch.manual_seed(0)
    x, w, factors = torch.randn(6, 32), torch.randn(24, 32), 2.0 ** torch.randint(-3, 4, (32,))
    smooth = f"smooth:factors={','.join(map(str, factors.tolist()))}"

    def blocks(value: Tensor) -> Tensor:
        results = reference.round_blocks(value.flatten().tolist(), "mxfp4", tuple(value.shape), 1)
        return torch.tensor([reference.to_float(v) for v in results]).view(value.shape)

    def rotated(value: Tensor) -> Tensor:
        return rounded(value, None, 1, 16, "te")

    for transform, a, b in (
        (f"{smooth}/hadamard:16:te", rotated(x / factors), rotated(w * factors)),
        (f"hadamard:16:te/{smooth}", rotated(x) / factors, rotated(w) * factors),
    ):
        got = run(F.linear, [x, w], "fpsim_eager", format="mxfp4", transform={"fprop": transform})[0]
        assert torch.equal(got, blocks(a) @ blocks(b).t())


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(32, 32, bias=bias) for bias in (True, False, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.q(x)) * self.k(x))


def _step(model: nn.Module, compiled: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # the draws of stochastic rounding
    y = compiled(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def test_compiled_steps_have_the_bits_of_eager_ones_for_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    model, xs = nn.Linear(32, 16, bias=False), [torch.randn(tokens, 32) for tokens in (48, 40, 34)]
    steps = []
    for backend in ("fpsim_eager", "fpsim"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, options={"policy": "nvfp4"}, dynamic=True)
        steps.append([_step(model, compiled, x) for x in xs])
    for wanted, got in zip(*steps, strict=True):
        assert all(map(torch.equal, got, wanted))
    torch._dynamo.reset()  # tokens that fill blocks have a kernel of their own
    compiled = torch.compile(model, backend="fpsim", options={"policy": "nvfp4"}, dynamic=False)
    assert all(map(torch.equal, _step(model, compiled, xs[0]), steps[0][0]))


def test_products_of_one_value_share_its_transform() -> None:
    graphs: list[list[str]] = []
    torch._dynamo.reset()
    model, x = Layers(), torch.randn(4, 16, 32)
    original = fpsim.compile_backend.passes.rounding_pass.rewrite

    def spy(graph: Any, *args: Any, **kwargs: Any) -> Any:
        plan = original(graph, *args, **kwargs)
        graphs.append([str(node.args[0]) for node in graph.nodes if "transform_operand" in str(node.target)])
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpsim.compile_backend.passes.rounding_pass.rewrite", spy)
        options = {"format": "e4m3fn", "transform": {"fprop": "hadamard:16", "wgrad": "hadamard:16"}}
        torch.compile(model, backend="fpsim_eager", options=options)(x).sum().backward()
    operands = max(graphs, key=len)
    # fprop: x once for q and k, the three weights, and the input of the last layer. wgrad: x once for q and k, the
    # gradients of the three results, and the input of the last layer.
    assert len(operands) == (1 + 3 + 1) + (1 + 3 + 1)


def test_a_permutation_under_a_scale_of_the_tensor_changes_no_rounded_value() -> None:
    x, w = torch.randn(6, 32), torch.randn(8, 32)
    inputs = [x.double(), w.double()]
    for cast in ("e4m3fn/tensor", "e4m3fn/power_of_two"):
        plain = run(F.linear, inputs, "fpsim_eager", format=cast)
        for transform in ("permute:amax", f"permute:order={','.join(str(31 - i) for i in range(32))}"):
            got = run(F.linear, inputs, "fpsim_eager", format=cast, transform={"fprop": transform})
            for a, b in zip(got, plain, strict=True):
                assert (a - b).abs().max() < 1e-12  # the sums have another order


def test_sorted_channels_and_rotations_lower_the_error_where_outliers_are_few() -> None:
    """HALO for rotations under one scale, K-sort for permutations under blocks of 32; the margins are theirs."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 128), torch.randn(32, 128)
    x[:, [3, 40, 77, 111]] *= 10
    exact = x.double() @ w.double().t()

    def error(cast: str, transform: str | None) -> float:
        y = run(F.linear, [x, w], "fpsim_eager", format=cast, transform=transform)[0]
        return float((y - exact).norm() / exact.norm())

    assert error("int4/block:32", "permute:norm") < 0.9 * error("int4/block:32", None)
    x[:, 3] *= 10
    exact = x.double() @ w.double().t()
    assert error("int8/tensor", "hadamard:full") < 0.3 * error("int8/tensor", None)
    assert error("int8/tensor", "smooth") < 0.3 * error("int8/tensor", None)


# -- plans and policies ------------------------------------------------------------------------------------------------


def test_explain_and_profile_show_the_transform() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(16, 32)
    plan = fpsim.explain(model, x, policy="nvfp4")
    assert [str(site.transform) for site in plan.sites if site.kind == "wgrad"] == ["hadamard:16:te"] * 2
    assert all(site.transform is None for site in plan.sites if site.kind != "wgrad")
    assert "transform" in str(plan) and "hadamard:16:te" in str(plan)
    assert "transform" not in str(fpsim.explain(model, x, policy="mxfp8"))
    profile = fpsim.profile(model, x, policy={"format": "mxfp8", "transform": "hadamard:32:seed=1"})
    again = type(profile).from_json(profile.to_json())
    assert [str(site.transform) for site in again.sites] == ["hadamard:32:seed=1"] * len(profile.sites)
    exact = fpsim.profile(model.double(), x.double(), policy={"format": "fp64", "transform": "hadamard:32:seed=1"})
    assert all(product.relative_error < 1e-15 for product in exact.products)
    assert all(site.statistics.noise == 0 for site in exact.sites)


def test_a_profile_counts_the_same_in_bfloat16_and_float32_where_all_numbers_are_in_both() -> None:
    layer, x = nn.Linear(32, 16, bias=False).bfloat16(), torch.randn(16, 32).bfloat16()
    for scale in ("power_of_two/history:4", "power_of_two", "mx"):
        policy = {"format": f"e4m3fn/{scale}", "transform": {"fprop": "hadamard:16:te"}}
        narrow = fpsim.profile(layer, x, policy=policy)
        wide = fpsim.profile(deepcopy(layer).float(), x.float(), policy=policy)
        statistics = [[site.statistics for site in each.sites if site.kind == "fprop"] for each in (narrow, wide)]
        assert statistics[0] == statistics[1]


def test_the_audit_finds_no_product_in_a_transform() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(16, 32)
    for transform in ("hadamard:full", "hadamard:full:seed=1", "smooth", "permute:amax", "permute:amax/hadamard:16"):
        options = {"format": "mxfp8", "transform": {"fprop": transform}}
        assert len(fpsim.explain(model, x, policy=options).sites) == len(fpsim.explain(model, x, policy="mxfp8").sites)
        torch._dynamo.reset()
        assert not fpsim.audit(torch.compile(model, backend="fpsim_eager", options=options), x).unrounded


POLICIES: tuple[tuple[Any, Any], ...] = (
    ("hadamard:16:te", "hadamard:16:te"),
    (Hadamard(16, "te"), "hadamard:16:te"),
    ({"wgrad": "hadamard:16:te"}, {"wgrad": "hadamard:16:te"}),
    ({"dgrad": None, "fprop": Smoothing(None, torch.tensor([1.0, 2.0]))}, {"fprop": "smooth:factors=1.0,2.0"}),
    ({"fprop": Permutation(None, order=torch.tensor([1, 0])), "dgrad": "smooth"}, None),
    (dict.fromkeys(("wgrad", "fprop", "dgrad"), "smooth"), "smooth:alpha=0.5"),
    (Chain((Smoothing(), Hadamard(16, "+" * 16))), "smooth:alpha=0.5/hadamard:16:++++++++++++++++"),
)


@pytest.mark.parametrize("case", range(len(POLICIES)))
def test_a_policy_keeps_its_transforms_in_json_pickles_and_copies(case: int) -> None:
    given, written = POLICIES[case]
    policy = Policy(format="e4m3fn", transform=given)
    assert written is None or json.loads(policy.to_json())["transform"] == written
    for copy in (
        Policy.from_json(policy.to_json()),
        pickle.loads(pickle.dumps(policy)),
        Policy.from_options(policy.to_dict()),
        Policy(**policy.to_dict()).with_modules({}),
    ):
        assert copy == policy and hash(copy) == hash(policy) and copy.canonical() == policy.canonical()
    assert policy != Policy(format="e4m3fn") and policy.canonical() != Policy(format="e4m3fn").canonical()
    inside = Policy(format="e5m2", modules={"layer": policy})
    assert Policy.from_json(inside.to_json()) == inside
    assert inside.at("layer") == policy


def test_a_rule_for_modules_does_not_inherit_the_transform() -> None:
    policy = Policy(format="mxfp8", transform="hadamard:16", modules={"head": "bf16"})
    assert policy.at("head").transform == () and policy.product_transform("dgrad") == Hadamard(16)
    assert Policy(format="mxfp8", transform=None) == Policy(format="mxfp8")


def test_presets_of_microscaling_formats_are_policies_and_their_names_stay_formats() -> None:
    nvfp4, mxfp8 = Policy.preset("nvfp4"), Policy.from_options({"policy": "mxfp8"})
    assert str(nvfp4.cast("fprop", "activation")) == "e2m1fn/nearest_even/sat_finite/nv:16:te"
    assert str(nvfp4.cast("dgrad", "weight")) == "e2m1fn/nearest_even/sat_finite/nv:16x16:te"
    assert str(nvfp4.cast("wgrad", "gradient")) == "e2m1fn/stochastic:8/sat_finite/nv:16:te"
    assert [nvfp4.product_transform(kind) for kind in ("fprop", "dgrad", "wgrad")] == [None, None, Hadamard(16, "te")]
    assert (nvfp4.products, nvfp4.attention) == ("weights", "keep")
    assert mxfp8 == Policy(format="e4m3fn/mx")
    assert parse_shorthand("nvfp4") == {"format": "nvfp4"}
    assert Policy(format="bf16", modules={"a": "nvfp4"}).at("a") == Policy(format="nvfp4")


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"format": "bf16", "transform": "hadamard:7"}, "no Hadamard matrix of 7 rows is built here: use hadamard:16"),
    ({"format": "bf16", "transform": "hadamard:32:te"}, "'te' are for blocks of 16, and the size is 32"),
    ({"format": "bf16", "transform": {"forward": "smooth"}}, "unknown kind 'forward' in transform: use fprop, dgrad"),
    ({"format": "bf16", "transform": "expand"}, "'expand' changes one tensor, not both operands of a product"),
    ({"format": "bf16", "transform": 3}, "transform must be a mapping, got 3"),
    ({"activation": "nvfp4/hadamard:16"}, "transforms one operand, and 'hadamard:16' is to change both operands"),
    ({"activation": "nvfp4", "output": "bf16/hadamard:16"}, "the result of an operation takes no transform"),
    ({"transform": "hadamard:16"}, "no option names a format"),
)


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_bad_policies_are_errors_with_the_value_and_the_remedy(case: int) -> None:
    options, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        Policy(**options).check_names_format()


REFUSED: dict[str, tuple[Callable[..., Tensor], list[Tensor], str, str]] = {
    "no axis": (torch.addr, [integers(3, 4), integers(3), integers(4)], "hadamard:4", "sums over no axis of both"),
    "convolution": (F.conv1d, [integers(2, 4, 9), integers(4, 4, 3)], "hadamard:4", "does not pair the elements"),
    "groups": (
        lambda x, w: F.conv1d(x, w, groups=2),
        [integers(2, 8, 9), integers(4, 4, 3)],
        "smooth",
        "pairs 8 elements of one operand with 4",
    ),
    "length": (F.linear, [integers(5, 6), integers(3, 6)], "permute:order=1,0", "has 2 items, and the product sums"),
    "full": (F.linear, [integers(5, 6), integers(3, 6)], "hadamard:full", "no Hadamard matrix of 6 rows is built here"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_products_that_a_transform_would_change_are_errors_and_gaps_of_the_plan(name: str) -> None:
    function, inputs, transform, message = REFUSED[name]
    with pytest.raises(Exception, match=message) as caught:
        run(function, inputs, "fpsim_eager", format="fp64", transform=transform)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnroundedError)
    inputs = [x.requires_grad_() for x in inputs]
    plan = fpsim.explain(function, *inputs, policy={"format": "fp64", "transform": transform})
    assert any(message in gap.reason for gap in plan.gaps)


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", ["hadamard:16:te", "hadamard:12:seed=1", "smooth", "permute:norm", "smooth/hadamard:16:te"]
)
def test_derivatives_of_a_loss_are_those_of_rounding_passed_straight_through(transform: str) -> None:
    torch.manual_seed(0)
    layer, x, dw = nn.Linear(24, 5, bias=False).double(), torch.randn(7, 24).double(), torch.randn(5, 24).double()
    policy = {"format": "e4m3fn", "transform": {"fprop": transform}}
    loss = fpsim.curvature.functional_loss(layer, lambda y: y.pow(3).sum(), batch=x, policy=policy)
    weight = layer.weight.detach()
    there = back = torch.eye(24).double()  # the matrices of both changes
    for stage in parse_transform(transform).stages:
        parameters = (stage.parameters(x @ there, weight @ back, (1, 1)),) if stage.has_parameters else ()
        there, back = stage.linear(there, 0, 1, *parameters), stage.linear(back, 1, 1, *parameters)

    def by_hand(w: Tensor) -> Tensor:
        return (fpsim.round(x @ there, "e4m3fn") @ fpsim.round(w @ back, "e4m3fn").t()).pow(3).sum()

    for order in (0, 1, 2):
        ours: Any = lambda w: loss({"weight": w})  # noqa: E731
        theirs: Any = by_hand
        for _ in range(order):
            ours, theirs = (lambda w, f=f: torch.func.jvp(f, (w,), (dw,))[1] for f in (ours, theirs))
        assert torch.allclose(ours(weight), theirs(weight), rtol=1e-9)
    assert torch.allclose(torch.func.grad(lambda w: loss({"weight": w}))(weight), torch.func.grad(by_hand)(weight))
    stacked = torch.stack([weight, 2 * weight])
    samples = torch.vmap(lambda w: loss({"weight": w}))(stacked)
    assert torch.equal(samples, torch.stack([loss({"weight": w}) for w in stacked]))
    rounded = run(F.linear, [x, weight], "fpsim_eager", **policy)[0]
    assert torch.equal(loss({"weight": weight}), rounded.pow(3).sum())


def test_derivatives_pass_the_rounding_to_the_dtype_of_the_product() -> None:
    """Small integers are exact in bfloat16 before and after the rotation: derivatives are plain but for bfloat16."""
    layer = nn.Linear(16, 4, bias=False).bfloat16()
    x, weight = integers(5, 16).clamp(-2, 2).bfloat16(), {"weight": integers(4, 16).clamp(-2, 2).bfloat16()}
    policy = {"activation": "bf16", "transform": "hadamard:16:te"}
    losses = [
        fpsim.curvature.functional_loss(layer, lambda y: y.float().square().sum(), batch=x, policy=policy)
        for policy in (policy, None)
    ]
    for derivative in (torch.func.grad, torch.func.hessian):
        rounded, plain = (tree_leaves(derivative(loss)(weight)) for loss in losses)
        for a, b in zip(rounded, plain, strict=True):
            assert (a - b).abs().max() <= 2.0**-7 * b.abs().max()


# -- states of optimizers ----------------------------------------------------------------------------------------------


def test_states_are_rounded_under_power_maps_fused_or_not_compiled_or_not() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 130), [torch.randn(3, 130) for _ in range(3)]
    state = {"exp_avg": "e4m3fn/group:128/expand", "exp_avg_sq": "e4m3fn/group:128/expand:kernel:clamp"}
    results = []
    for fused in (False, True):
        for compiled in (False, True):
            p = nn.Parameter(start.clone())
            optimizer = torch.optim.Adam([p], fused=fused)
            fpsim.round_optimizer(optimizer, state, compiled=compiled)
            for gradient in gradients:
                p.grad = gradient.clone()
                optimizer.step()
            results.append([p.detach(), *(optimizer.state[p][name] for name in state)])
    p = nn.Parameter(start.clone())
    plain = torch.optim.Adam([p])
    for gradient in gradients:
        p.grad = gradient.clone()
        plain.step()
        for name, cast in state.items():
            plain.state[p][name].copy_(fpsim.round(plain.state[p][name], cast))
    wanted = [p.detach(), *(plain.state[p][name] for name in state)]
    for number, tensors in enumerate(results):
        for a, b in zip(tensors, wanted, strict=True):
            # Fused steps of torch have other last bits; the map is the same.
            assert torch.equal(a, b) if number < 2 else torch.allclose(a, b, rtol=0.1, atol=1e-4)
    weights = nn.Parameter(start.clone())
    with pytest.raises(ValueError, match="master weights in e8m7 cannot hold weights with 'expand'"):
        fpsim.round_optimizer(torch.optim.SGD([weights], lr=0.1), weights="e4m3fn/group:128/expand", master="bf16")


def test_small_parameters_are_transformed_one_by_one() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5))
    for cast in ("e4m3fn/hadamard:4", "e4m3fn/group:128/expand", "int4/row/hadamard:2:+-"):
        wanted = [fpsim.round(p.detach(), cast) for p in module.parameters()]
        fpsim.round_parameters(module, cast)
        assert all(map(torch.equal, module.parameters(), wanted))


# -- the axis that a product keeps -------------------------------------------------------------------------------------


def test_a_rotation_of_the_kept_axis_is_undone_on_the_result() -> None:
    """In exact arithmetic nothing changes: rows of a gradient and of its product, columns of the one in wgrad."""
    for kinds in ({"dgrad": "hadamard:4:seed=1:kept"}, {"wgrad": "hadamard:4:kept"}):
        for name in ("linear", "linear with bias", "weight first"):
            function, inputs = PRODUCTS[name]
            got = run(function, inputs, "fpsim_eager", format="fp64", transform=kinds)
            for a, b in zip(got, run(function, inputs), strict=True):
                assert torch.equal(a, b), (name, kinds)


def test_only_the_first_operand_is_rotated_and_the_plan_says_so() -> None:
    layer = nn.Linear(4, 8, bias=False)
    plan = fpsim.explain(
        nn.Sequential(nn.Linear(4, 4), layer), torch.ones(3, 4),
        policy={"format": "int8/tensor", "transform": {"dgrad": "hadamard:2:kept"}},
    )  # fmt: skip
    found = [(site.kind, site.role) for site in plan.sites if site.transform is not None]
    assert found == [("dgrad", "gradient")]


def test_second_derivatives_pass_a_rotation_of_the_kept_axis() -> None:
    """The rotation and the way back have derivatives: those of an unrotated loss, up to rounding in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    x, parameters = torch.randn(4, 4).double(), dict(model.named_parameters())
    policy = Policy(format="fp64", transform={"fprop": "hadamard:4:seed=3:kept"})
    loss = fpsim.curvature.functional_loss(model, lambda y: y.square().sum(), batch=x, policy=policy)
    plain = fpsim.curvature.functional_loss(model, lambda y: y.square().sum(), batch=x)
    vector = torch.randn(42).double()
    got, want = (fpsim.curvature.hessian(f, parameters) @ vector for f in (loss, plain))
    assert torch.allclose(got, want, rtol=1e-10) and not torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transform": {"fprop": "hadamard:4:kept"}},
            r"changes the rows or columns .* and aten\.addmm \(fprop\) in 'layer'",
        ),
        (
            {"transform": {"dgrad": "hadamard:full:kept"}},
            r"aten\.mm \(dgrad\) in 'layer': no Hadamard matrix of 3 rows",
        ),
    ],
)
def test_a_product_whose_kept_axis_cannot_be_rotated_is_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(4, 4))
    x = torch.ones(3, 4, requires_grad=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="fpsim_eager", options={"format": "int8/tensor", **options})(x)


def test_a_cast_takes_no_rotation_of_the_kept_axis() -> None:
    assert str(parse_transform("hadamard:16:te:bf16:kept")) == "hadamard:16:te:bf16:kept"
    with pytest.raises(ValueError, match="changes the result of a product too: leave ':kept' out of a cast"):
        fpsim.round(torch.ones(16), "e4m3fn/hadamard:16:kept")
