"""The table of products, judged entry by entry by what torch computes.

A new entry is tested by itself: give `CASES` the operands of a call, and the tests below check its operands, contracted
axes, gradients and eager spelling against torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fpsim
from fpsim.compile_backend.graph.products import (
    OPAQUE,
    PRODUCTS,
    ProductOperator,
    is_product_function,
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
    # Overloads that write into a given tensor are made functional before any pass; an outer product is decomposed.
    assert {name for name in left_out if not name.endswith("out")} <= {"aten.ger.default"}


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
    "_euclidean_dist": "Write the", "_cdist_backward": "Write the", "_pdist_forward": "Write the",
    "mkldnn_rnn_layer": "Let", "_cudnn_rnn": "Let", "lstm": "Replace", "gru": "Replace", "rnn_tanh": "Replace",
    "_thnn_fused_lstm_cell": "Replace", "convolution_overrideable": "Replace", "_convolution": "Replace",
    "conv_tbc": "Replace", "cudnn_convolution": "Replace", "mkldnn_convolution": "Replace",
    "miopen_convolution": "Replace", "_grouped_mm": "Replace", "_scaled_grouped_mm": "Replace",
    "_scaled_mm": "Replace", "_addmm_activation": "Replace", "_sparse_mm": "Replace", "_weight_int8pack_mm": "Replace",
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


@pytest.mark.parametrize("name", ["linear", "matmul", "einsum", "outer", "kron", "addr", "inner", "multi_dot"])
def test_functions_that_are_decomposed_count_as_products(name: str) -> None:
    assert is_product_function(name)


@pytest.mark.parametrize("name", ["mul", "softmax", "layer_norm", "cross", None])
def test_other_functions_do_not(name: str | None) -> None:
    assert not is_product_function(name)


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
