"""The table of products, judged entry by entry by what torch computes.

A new entry is tested by itself: give `CASES` the operands of a call, and the tests below check its operands, contracted
axes, gradients and eager spelling against torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fpsim
from fpsim.compile_backend.graph.composites import recorded
from fpsim.compile_backend.graph.products import (
    OPAQUE,
    PRODUCTS,
    ProductOperator,
    opaque_family,
    product_events,
    product_operator,
    remedy,
)

aten = torch.ops.aten
OVERLOADS = [(entry, overload) for entry in PRODUCTS for overload in entry.overloads]


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call: integers of a few bits, so that all sums are exact in any order."""

    arguments: tuple[Any, ...]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).double()


MATRIX, OTHER = numbers(4, 6, seed=1), numbers(6, 5, seed=2)
BATCH, OTHERS = numbers(3, 4, 6, seed=3), numbers(3, 6, 5, seed=4)
VECTOR, VECTOR2 = numbers(6, seed=5), numbers(6, seed=6)
IMAGES, KERNEL = numbers(4, 6, 5, 5, seed=7), numbers(8, 6, 3, 3, seed=8)
TRANSPOSED = numbers(6, 8, 3, 3, seed=9)
SETTINGS: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1])
GROUPS = torch.tensor([2, 4], dtype=torch.int32)

#: One call for every entry, or several where the axes depend on the arguments.
CASES: dict[str, list[Case]] = {
    "aten.mm": [Case((MATRIX, OTHER))],
    "aten.bmm": [Case((BATCH, OTHERS))],
    "aten.addmm": [Case((numbers(4, 5, seed=10), MATRIX, OTHER))],
    "aten.baddbmm": [Case((numbers(3, 4, 5, seed=11), BATCH, OTHERS))],
    "aten.addbmm": [Case((numbers(4, 5, seed=12), BATCH, OTHERS))],
    "aten.mv": [Case((MATRIX, VECTOR))],
    "aten.addmv": [Case((numbers(4, seed=13), MATRIX, VECTOR))],
    "aten.dot": [Case((VECTOR, VECTOR2))],
    "aten.vdot": [Case((VECTOR, VECTOR2))],
    "aten.ger": [Case((VECTOR, VECTOR2))],
    "aten.addr": [Case((numbers(6, 6, seed=18), VECTOR, VECTOR2))],
    "aten.affine_grid_generator": [Case((numbers(1, 2, 3, seed=19), [1, 1, 2, 2], True))],
    "aten._grouped_mm": [Case((numbers(4, 8, seed=17).bfloat16(), numbers(2, 8, 16, seed=14).bfloat16(), GROUPS))],
    "aten.convolution": [
        Case((IMAGES, KERNEL, None, *SETTINGS, False, [0, 0], 1)),
        Case((IMAGES, TRANSPOSED, None, *SETTINGS, True, [0, 0], 1)),
        Case((IMAGES[:, :, 0], KERNEL[:, :, 0], None, [1], [0], [1], False, [0], 1)),
    ],
    "aten.convolution_backward": [
        Case((numbers(4, 8, 3, 3, seed=15), IMAGES, KERNEL, None, *SETTINGS, False, [0, 0], 1, [True, True, False])),
        Case((numbers(4, 8, 7, 7, seed=16), IMAGES, TRANSPOSED, None, *SETTINGS, True, [0, 0], 1, [True, True, False])),
    ],
}
CALLS = [(entry, case) for entry in PRODUCTS for case in CASES[entry.name]]
IDS = [f"{entry.name}-{CASES[entry.name].index(case)}" for entry, case in CALLS]
DIFFERENTIABLE = [(entry, case) for entry, case in CALLS if entry.gradients]


def test_every_entry_has_a_case() -> None:
    assert set(CASES) == {entry.name for entry in PRODUCTS}


def call(entry: ProductOperator, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    results = entry.packet(*arguments)
    return tuple(results) if isinstance(results, tuple | list) else (results,)


# -- operands and axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "case"), CALLS, ids=IDS)
def test_a_result_is_linear_in_each_operand_and_in_no_other_argument_alone(entry: ProductOperator, case: Case) -> None:
    results = call(entry, case.arguments)
    for number, multiplication in enumerate(entry.multiplications):
        for position in multiplication.operands:
            arguments = list(case.arguments)
            if entry.addend is not None and isinstance(arguments[entry.addend], Tensor):
                arguments[entry.addend] = torch.zeros_like(arguments[entry.addend])
            plain = call(entry, tuple(arguments))[number]
            arguments[position] = 2 * arguments[position]
            assert torch.equal(call(entry, tuple(arguments))[number], 2 * plain)
            assert plain.any() and results[number].shape == plain.shape


def exchanged(operand: Tensor, axis: int) -> Tensor:
    """``operand`` with the order along an axis reversed."""
    return operand.flip(axis)


@pytest.mark.parametrize(("entry", "case"), CALLS, ids=IDS)
def test_reversing_both_operands_along_the_contracted_axes_changes_no_sum(entry: ProductOperator, case: Case) -> None:
    """Axes beside the contracted ones do change the result, so that this tells the axes apart."""
    for number, multiplication in enumerate(entry.multiplications):
        first, second = multiplication.operands
        along = entry.contracted(number, case.arguments)
        ranks = [case.arguments[i].dim() for i in (first, second)]
        axes = [sorted(axis % rank for axis in own if axis < rank) for own, rank in zip(along, ranks, strict=True)]
        plain = call(entry, case.arguments)[number]
        shared = [pair for pair in zip(*axes, strict=True) if not is_spatial(entry, pair)]
        for a, b in shared:
            arguments = list(case.arguments)
            arguments[first], arguments[second] = exchanged(arguments[first], a), exchanged(arguments[second], b)
            assert torch.equal(call(entry, tuple(arguments))[number], plain), (a, b)
        for position, own in ((first, axes[0]), (second, axes[1])):
            for axis in set(range(case.arguments[position].dim())) - set(own):
                arguments = list(case.arguments)
                arguments[position] = exchanged(arguments[position], axis)
                assert not torch.equal(call(entry, tuple(arguments))[number], plain), (position, axis)


def is_spatial(entry: ProductOperator, axes: tuple[int, int]) -> bool:
    """Whether the axes are those of an image: a gradient and the image do not run along them in step."""
    return entry.is_joint and max(axes) > 1


@pytest.mark.parametrize(("entry", "case"), CALLS, ids=IDS)
def test_contracted_axes_have_the_same_length(entry: ProductOperator, case: Case) -> None:
    for number, multiplication in enumerate(entry.multiplications):
        operands = [case.arguments[i] for i in multiplication.operands]
        first, second = entry.contracted(number, case.arguments)
        for a, b in zip(first, second, strict=True):
            if not is_spatial(entry, (a, b)):
                assert operands[0].shape[a] == operands[1].shape[b]


# -- gradients and eager spellings -------------------------------------------------------------------------------------


class ProductsSeen(TorchDispatchMode):
    """The products of the table that run, and the multiplications of decomposed ones, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        self.names += [f"aten.{each.__name__}" for each in (aten.mul, *(e.packet for e in PRODUCTS)) if each is packet]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("entry", "case"), DIFFERENTIABLE)
def test_autograd_differentiates_by_the_operators_that_the_table_names(entry: ProductOperator, case: Case) -> None:
    positions = entry.multiplications[0].operands if entry.multiplications else (0, 1)
    for position, expected in zip(positions, entry.gradients, strict=True):
        arguments = list(case.arguments)
        arguments[position] = arguments[position].clone().requires_grad_()
        result = call(entry, tuple(arguments))[0]
        with ProductsSeen() as seen:
            result.backward(torch.ones_like(result))
        assert seen.names == [expected]


@pytest.mark.parametrize(("entry", "case"), CALLS, ids=IDS)
def test_the_profiler_reports_a_product_under_its_event(entry: ProductOperator, case: Case) -> None:
    with torch.profiler.profile() as profiler:
        call(entry, case.arguments)
    assert entry.event in {event.name for event in profiler.events()}
    assert not entry.overloads or product_events()[entry.event]


# -- what graphs contain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "overload"), OVERLOADS, ids=[f"{e.name}.{o}" for e, o in OVERLOADS])
def test_every_overload_is_found_by_its_entry(entry: ProductOperator, overload: str) -> None:
    assert product_operator(getattr(entry.packet, overload)) is entry


def test_no_other_overload_that_makes_new_tensors_is_taken_for_a_product() -> None:
    named = {getattr(entry.packet, overload) for entry, overload in OVERLOADS}
    every = [getattr(entry.packet, overload) for entry in PRODUCTS for overload in entry.packet.overloads()]
    assert {op for op in every if product_operator(op)} == named
    left_out = {
        str(op) for op in every if op not in named and not op._schema.is_mutable and not op._schema.name.endswith("_")
    }
    # Overloads that write into a given tensor are made functional before any pass; tracing decomposes the others.
    assert {name for name in left_out if not name.endswith("out")} <= {
        "aten.ger.default",
        "aten.affine_grid_generator.default",
    }


class Product(nn.Module):
    """A call of one entry with its operands as inputs."""

    def __init__(self, entry: ProductOperator, case: Case) -> None:
        super().__init__()
        self.entry, self.case = entry, case

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        arguments = list(self.case.arguments)
        positions = self.entry.multiplications[0].operands
        arguments[positions[0]], arguments[positions[1]] = first, second
        return self.entry.packet(*arguments)


FORWARD = [(entry, case) for entry, case in CALLS if entry.multiplications and not entry.is_joint]


@pytest.mark.parametrize(("entry", "case"), FORWARD, ids=[f"{e.name}-{CASES[e.name].index(c)}" for e, c in FORWARD])
def test_a_graph_rounds_both_operands_and_reports_their_axes(entry: ProductOperator, case: Case) -> None:
    positions = entry.multiplications[0].operands
    operands = [case.arguments[i] for i in positions]
    policy = fpsim.Policy(format="e3m1")
    model = Product(entry, case)
    got = torch.compile(model, backend="fpsim_eager", options={"policy": policy}, fullgraph=True)(*operands)
    arguments = list(case.arguments)
    for position, operand in zip(positions, operands, strict=True):
        arguments[position] = fpsim.round(operand, "e3m1")
        assert not torch.equal(arguments[position], operand)
    assert torch.equal(got, entry.packet(*arguments))
    sites = fpsim.explain(model, *operands, policy=policy).sites
    assert [site.operator for site in sites] == [entry.name] * 2
    wanted = [
        tuple(sorted(axis % operand.dim() for axis in axes))
        for axes, operand in zip(entry.contracted(0, case.arguments), operands, strict=True)
    ]
    assert [site.contracted for site in sites] == wanted


def test_the_three_products_of_a_linear_layer_sum_along_the_axes_of_hardware() -> None:
    """in_features forward, out_features for the gradient of the input, tokens for the gradient of the weight."""
    layer = nn.Linear(8, 5, bias=False)
    plan = fpsim.explain(nn.Sequential(nn.Linear(3, 8), layer), torch.randn(4, 3), policy={"format": "e4m3"})
    axes = {(site.kind, site.role): (site.shape, site.contracted) for site in plan.sites if site.path == "1"}
    assert axes == {
        ("fprop", "activation"): ((4, 8), (1,)),
        ("fprop", "weight"): ((8, 5), (0,)),  # the transposed weight, as the product gets it
        ("dgrad", "gradient"): ((4, 5), (1,)),
        ("dgrad", "weight"): ((5, 8), (0,)),
        ("wgrad", "gradient"): ((5, 4), (1,)),  # the transposed gradient
        ("wgrad", "activation"): ((4, 8), (0,)),
    }


# -- operators that are refused ----------------------------------------------------------------------------------------


def test_every_family_of_refused_operators_exists_in_torch() -> None:
    names = {name.partition(".")[0].replace("::", ".") for name in torch._C._dispatch_get_all_op_names()}
    for family in OPAQUE:
        members = [name for name in names if opaque_family(name) is family]
        assert members, family.names
        assert all(remedy(name) == family.remedy for name in members)


#: One operator for each alternative in the patterns of `OPAQUE`; the beginning of its family's remedy.
REFUSED = {
    "_transformer_encoder_layer_fwd": "Turn", "_native_multi_head_attention": "Turn",
    "_scaled_dot_product_efficient_attention": "Leave", "_flash_attention_forward": "Leave",
    "_efficient_attention_forward": "Leave", "_fused_sdp_choice": "Leave",
    "_transform_bias_rescale_qkv": "Replace", "_triton_scaled_dot_attention": "Replace", "_trilinear": "Write it as",
    "_euclidean_dist": "Give torch.cdist",
    "mkldnn_rnn_layer": "Let", "_cudnn_rnn": "Let", "lstm": "Replace", "gru": "Replace", "rnn_tanh": "Replace",
    "quantized_gru": "Replace", "_lstm_mps": "Replace", "miopen_rnn": "Replace", "convolution_overrideable": "Use",
    "_convolution": "Use", "conv_tbc": "Use", "_conv_depthwise2d": "Use", "cudnn_convolution": "Use",
    "mkldnn_convolution": "Use", "miopen_convolution": "Use", "_mps_convolution": "Use",
    "mps_convolution_backward": "Use", "_slow_conv2d_forward": "Use", "slow_conv_dilated3d": "Use",
    "thnn_conv2d": "Use", "_nnpack_spatial_convolution": "Use", "_grouped_mm": "Replace",
    "_scaled_grouped_mm": "Replace", "_scaled_mm": "Replace", "_addmm_activation": "Replace",
    "_sparse_addmm": "Make", "_sparse_mm_reduce_impl": "Make",
    "_sparse_semi_structured_mm": "Make", "_sparse_sparse_matmul": "Make", "sparse_sampled_addmm": "Make",
    "sspaddmm": "Make", "hspmm": "Make", "_cslt_sparse_mm": "Make", "_weight_int8pack_mm": "Replace",
    "_int_mm": "Replace", "_mixed_dtypes_linear": "Replace", "linear_backward": "Replace",
    "_dyn_quant_matmul_4bit": "Replace", "linalg_inv_ex": "Replace", "_linalg_svd": "Replace", "cholesky": "Replace",
    "matrix_exp": "Replace", "triangular_solve": "Replace", "lu_solve": "Replace", "ormqr": "Replace",
    "_compute_linear_combination": "Replace",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_alternative_of_a_pattern_refuses_an_operator(name: str) -> None:
    assert opaque_family(f"aten.{name}") is not None
    assert remedy(f"aten.{name}").startswith(REFUSED[name])
    assert opaque_family(f"aten.{name}").is_attention is (REFUSED[name] == "Leave")


@pytest.mark.parametrize("name", ["linalg_vector_norm", "linalg_cross", "mul", "softmax", "embedding"])
def test_operators_without_products_are_in_no_family(name: str) -> None:
    assert opaque_family(f"aten.{name}") is None


def test_every_event_of_a_family_is_an_operator_of_it() -> None:
    for family in OPAQUE:
        for event in family.events:
            assert opaque_family(f"aten.{event}") is not None
            assert product_events()[f"aten::{event}"] is False


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vector": lambda a, b: a[0] @ b[:, 0],
    "matrix": lambda a, b: a @ b[:, 0],
    "outer": lambda a, b: torch.outer(a[0], b[:, 0]),
}


@pytest.mark.parametrize(("name", "axes"), [("vector", [(0,), (0,)]), ("matrix", [(1,), (0,)]), ("outer", [(), ()])])
def test_products_that_may_be_decomposed_report_the_axes_of_their_sum(name: str, axes: list[tuple[int, ...]]) -> None:
    with torch.no_grad():
        sites = fpsim.explain(FUNCTIONS[name], MATRIX, OTHER, policy={"format": "e3m1"}).sites
    assert [site.contracted for site in sites] == axes


# -- products under other names ----------------------------------------------------------------------------------------


def in_place(x: Tensor, w: Tensor) -> Tensor:
    x = x * 1.0
    x @= w
    return x


def added_outer(x: Tensor, w: Tensor) -> Tensor:
    return torch.zeros(6, 6, dtype=torch.float64).addr_(x, w)


def grid(theta: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.affine_grid(theta.reshape(1, 2, 3), [1, 1, 2, 2], align_corners=True).sum() * w


SQUARE = numbers(6, 6, seed=20)
#: Spellings: the function, its arguments, and the same product as a sum over outer indices, which einsum's twin writes.
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, str]] = {
    "addr_": (added_outer, VECTOR, VECTOR2, "i,j->ij"),
    "outer": (torch.outer, VECTOR, VECTOR2, "i,j->ij"),
    "ger": (torch.ger, VECTOR, VECTOR2, "i,j->ij"),
    "kron": (lambda x, w: torch.kron(x, w).view(6, 6), VECTOR, VECTOR2, "i,j->ij"),
    "einsum": (lambda x, w: torch.einsum("i,j->ij", x, w), VECTOR, VECTOR2, "i,j->ij"),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 0), VECTOR, VECTOR2, "i,j->ij"),
    "multiply.outer": (lambda x, w: torch.linalg.matmul(x[:, None], w[None]), VECTOR, VECTOR2, "i,j->ij"),
    "linalg.matmul": (torch.linalg.matmul, VECTOR, VECTOR2, "i,i->"),
    "@=": (in_place, VECTOR, VECTOR2, "i,i->"),
    "__rmatmul__": (lambda x, w: w.__rmatmul__(x), VECTOR, VECTOR2, "i,i->"),
    "inner": (torch.inner, VECTOR, VECTOR2, "i,i->"),
    "vdot": (torch.vdot, VECTOR, VECTOR2, "i,i->"),
    "linalg.vecdot": (torch.linalg.vecdot, SQUARE, SQUARE + 1, "ij,ij->i"),
    "vmap of dot": (torch.vmap(torch.dot), SQUARE, SQUARE + 1, "ij,ij->i"),
    "vmap of outer": (torch.vmap(torch.outer), SQUARE, SQUARE + 1, "ij,ik->ijk"),
    "vmap of kron": (lambda x, w: torch.vmap(torch.kron)(x, w).view(6, 6, 6), SQUARE, SQUARE + 1, "ij,ik->ijk"),
    "vmap of einsum": (torch.vmap(lambda a, b: torch.einsum("j,k->jk", a, b)), SQUARE, SQUARE + 1, "ij,ik->ijk"),
    "vmap of addr": (
        torch.vmap(lambda a, b: torch.addr(torch.zeros(6, 6, dtype=a.dtype), a, b)),
        SQUARE,
        SQUARE + 1,
        "ij,ik->ijk",
    ),
    "vmap of mv": (torch.vmap(torch.mv, in_dims=(None, 0)), SQUARE, SQUARE + 1, "jk,ik->ij"),
    "mv": (torch.mv, SQUARE, VECTOR, "ij,j->i"),
    "addmv_": (lambda x, w: torch.zeros(6, dtype=x.dtype).addmv_(x, w), SQUARE, VECTOR, "ij,j->i"),
    "linear": (nn.functional.linear, VECTOR, SQUARE, "j,ij->i"),
    "linear of a vector": (nn.functional.linear, SQUARE, VECTOR, "ij,j->i"),
    "matmul of a row": (lambda x, w: (x[None] @ w.T)[0], VECTOR, SQUARE, "j,ij->i"),
    "chain_matmul": (lambda x, w: torch.linalg.multi_dot([x, w]), SQUARE, SQUARE + 1, "ij,jk->ik"),
    "foreign sum": (lambda x, w: torch.linalg.vecdot(x[:, None], w.T[None]), SQUARE, SQUARE + 1, "ij,jk->ik"),
}


def exact_product(equation: str, x: Tensor, w: Tensor, rounded: Callable[[Tensor], Tensor], dy: Tensor) -> list[Tensor]:
    """The product and both derivatives, of operands ``rounded`` once each, written as a sum over all indices."""
    left, right, out = re.split(",|->", equation)
    letters = sorted(set(left + right))

    def spread(t: Tensor, own: str) -> Tensor:
        ordered = t.permute([own.index(c) for c in letters if c in own])
        return ordered[tuple(slice(None) if c in own else None for c in letters)]

    def total(t: Tensor, own: str) -> Tensor:
        summed = t.sum([i for i, c in enumerate(letters) if c not in own]) if set(own) != set(letters) else t
        kept = [c for c in letters if c in own]
        return summed.permute([kept.index(c) for c in own])

    a, b, g = spread(rounded(x), left), spread(rounded(w), right), spread(rounded(dy), out)
    return [total(a * b, out), total((g * b).expand(torch.broadcast_shapes(a.shape, b.shape)), left),
            total((g * a).expand(torch.broadcast_shapes(a.shape, b.shape)), right)]  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_product_is_rounded_whatever_it_is_called(name: str) -> None:
    function, x, w, equation = SPELLINGS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(w.clone())

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.w)

    torch._dynamo.reset()
    model, given = Model(), x.clone().requires_grad_()
    result = torch.compile(model, backend="fpsim_eager", options={"format": "e8m1"}, fullgraph=True)(given)
    dy = numbers(*result.shape, seed=21)
    result.backward(dy)
    wanted = exact_product(equation, x, w, lambda t: fpsim.round(t, "e8m1"), dy)
    for got, exact in zip((result, given.grad, model.w.grad), wanted, strict=True):
        assert torch.equal(got, exact)
    assert not torch.equal(wanted[0], exact_product(equation, x, w, lambda t: t, dy)[0])


def test_powers_of_a_matrix_of_one_element_are_products() -> None:
    x = torch.tensor([[3.5]], dtype=torch.float64)
    torch._dynamo.reset()
    cube = torch.compile(
        lambda x: torch.linalg.matrix_power(x, 3), backend="fpsim_eager", options={"format": "e8m0"}, fullgraph=True
    )
    assert cube(x).item() == 16 * 4  # 3.5 is rounded to 4


def test_the_product_of_a_grid_with_affine_maps_is_rounded() -> None:
    theta = torch.tensor([1.25, 0.5, 3.0, -0.75, 1.0, 2.5], dtype=torch.float64)
    torch._dynamo.reset()
    given = theta.clone().requires_grad_()
    compiled = torch.compile(
        lambda t: torch.nn.functional.affine_grid(t.view(1, 2, 3), [1, 1, 2, 2], align_corners=True),
        backend="fpsim_eager",
        options={"format": "e8m1"},
        fullgraph=True,
    )
    result = compiled(given)
    corners = torch.tensor([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], dtype=torch.float64)
    rounded = torch.tensor([1.0, 0.5, 3.0, -0.75, 1.0, 2.0], dtype=torch.float64).view(2, 3)
    assert torch.equal(result.flatten(0, 2), corners @ rounded.T)
    result.backward(torch.full_like(result, 1.25))
    assert torch.equal(given.grad, torch.tensor([0.0, 0.0, 4.0] * 2, dtype=torch.float64))


def test_a_multiplication_beside_a_product_without_derivative_stays_elementwise() -> None:
    x, y = numbers(6, seed=22), numbers(6, seed=23)
    torch._dynamo.reset()
    a = x.clone().requires_grad_()
    compiled = torch.compile(
        lambda a, b: (a * b).sum() + torch.dot(b, b), backend="fpsim_eager", options={"format": "e8m1"}, fullgraph=True
    )
    compiled(a, y).backward(torch.tensor(5.0, dtype=torch.float64))
    assert torch.equal(a.grad, 5 * y)
    assert not torch.equal(fpsim.round(y, "e8m1"), y)


def test_kernels_of_composed_operators_are_torchs_own_again_after_the_last_of_several_compilations() -> None:
    """Two threads may compile at the same time, and the first to begin may be the first to end."""
    outer, linear = torch.ops.aten.outer.default, torch.ops.aten.linear.default
    own = [dict(outer.py_kernels), dict(linear.py_kernels)]
    first, second = recorded(), recorded()
    first.__enter__()
    noting = [dict(outer.py_kernels), dict(linear.py_kernels)]
    assert all(len(after) > len(before) for before, after in zip(own, noting, strict=True))
    second.__enter__()
    assert [outer.py_kernels, linear.py_kernels] == noting
    first.__exit__(None, None, None)
    assert [outer.py_kernels, linear.py_kernels] == noting
    second.__exit__(None, None, None)
    assert [outer.py_kernels, linear.py_kernels] == own
