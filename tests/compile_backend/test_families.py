"""The lists of operators without products: each entry exists, and none of them multiplies matrices.

The judges are torch's own counter of floating-point operations, torch's tags, and the derivatives that torch writes.
"""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

import fpsim
from fpsim.compile_backend.graph.families import FAMILIES, OTHER_NAMESPACES, Work, family_of, is_known
from fpsim.compile_backend.graph.operations import operations
from fpsim.compile_backend.graph.products import OPAQUE, PRODUCTS, opaque_family

OVERLOADS = set(torch._C._dispatch_get_all_op_names())
NAMES = {name.partition(".")[0] for name in OVERLOADS}
ATEN = sorted(name.removeprefix("aten::") for name in NAMES if name.startswith("aten::"))


def test_every_entry_is_an_operator_of_torch_and_in_one_family() -> None:
    listed = [name for family in FAMILIES for name in family.names]
    assert len(set(listed)) == len(listed)
    bases = {re.sub("(?<=[^_])_$", "", name.removeprefix("_foreach_")) for name in ATEN}
    assert not set(listed) - bases


def test_no_operator_with_a_count_of_multiplications_is_trusted() -> None:
    counted = {op.__name__ for op in flop_registry if str(op).startswith("aten.")}
    assert {"mm", "bmm", "convolution", "_scaled_mm", "_scaled_dot_product_flash_attention"} <= counted
    assert not {name for name in counted if family_of(name)}


def test_no_product_and_no_operator_with_a_remedy_is_trusted() -> None:
    assert not {entry.name for entry in PRODUCTS if family_of(entry.packet.__name__)}
    assert not {name for name in ATEN if family_of(name) and opaque_family(f"aten.{name}") in OPAQUE}


#: Words in the names of operators that multiply matrices, and the operators with such a name that do not.
WORDS = (
    r"mm(_|$)|matmul|conv_|conv\d|convolution|linear|attention|linalg|cholesky|solve|lstm|gru|rnn|addmv|addr|dot|trilin"
)
HARMLESS = {
    "linalg_cross", "linalg_vector_norm", "linalg__powsum",  # no sums of products of two operands
    "_thnn_fused_gru_cell", "_thnn_fused_gru_cell_backward",  # elementwise gates
    "_thnn_fused_lstm_cell", "_thnn_fused_lstm_cell_backward_impl",
    "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa_backward", "upsample_bilinear2d",  # interpolation
    "upsample_bilinear2d_backward", "upsample_linear1d", "upsample_linear1d_backward", "upsample_trilinear3d",
    "upsample_trilinear3d_backward",
}  # fmt: skip


def test_no_operator_whose_name_sounds_like_a_product_is_trusted() -> None:
    assert {name for name in ATEN if re.search(WORDS, name) and family_of(name)} == HARMLESS


def test_unknown_operators_are_refused_and_counted() -> None:
    """A new version of torch may add operators: this number then grows, and each is refused until somebody looks."""
    leaves = [op for name in ATEN for op in _overloads(name) if not _is_composed(op)]
    unknown = {op._opname for op in leaves if not is_known(op)} - {entry.packet.__name__ for entry in PRODUCTS}
    assert len(unknown) < 260
    assert {"_foreach_mm", "_slow_conv2d_forward", "_int_mm", "_linalg_svd", "linalg_lu_solve", "_spsolve"} <= unknown


def _overloads(name: str) -> list[OpOverload]:
    packet = getattr(torch.ops.aten, name)
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return [op for op in found if op.name() in OVERLOADS]


def _is_composed(op: OpOverload) -> bool:
    return op.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    ) and not op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)


def test_what_torch_calls_pointwise_is_known_and_computes() -> None:
    tagged = {op for name in ATEN for op in _overloads(name) if torch.Tag.pointwise in op.tags and not _is_composed(op)}
    unknown = {op._opname for op in tagged if not is_known(op)}
    assert not unknown
    idle = {op._opname for op in tagged if family_of(op._opname).work is Work.NONE}  # type: ignore[union-attr]
    assert idle <= {
        "_conj_copy", "_to_copy", "bernoulli", "clone", "copy", "copy_", "fill", "fill_", "fmax", "fmin",
        "equal", "masked_fill", "masked_fill_", "maximum", "minimum", "where", "zero", "zeros_like", "ones_like",
        "_foreach_copy", "_foreach_copy_", "_foreach_zero", "_foreach_zero_", "_foreach_maximum",
        "_foreach_maximum_", "_foreach_minimum", "_foreach_minimum_", "_foreach_clone",
    }  # fmt: skip


def test_operators_of_other_namespaces_are_refused_but_for_those_listed() -> None:
    for namespace in ("quantized", "onednn", "mkldnn", "sparse", "symm_mem", "_dtensor"):
        assert namespace not in OTHER_NAMESPACES
    assert "svd" not in OTHER_NAMESPACES["prims"]
    assert is_known(torch.ops.prims.add.default)
    assert not is_known(torch.ops.prims.svd.default)
    assert not is_known(torch.ops.inductor._mm_plus_mm.default)
    assert not is_known(torch.ops.onednn.qlinear_pointwise.default)


def test_operations_compute_and_are_known() -> None:
    assert all(family_of(op._opname).work is Work.ARITHMETIC for op in operations())  # type: ignore[union-attr]


# -- models that use them ----------------------------------------------------------------------------------------------

IMAGE, KERNEL = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 2, 2)
VOLUME, KERNEL_3D = torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 2, 2, 2)
nn_functions = torch._C._nn
UNKNOWN = {
    "aten._slow_conv2d_forward": lambda: nn_functions.thnn_conv2d(IMAGE, KERNEL, [2, 2], None, [1, 1], [0, 0]),
    "aten.slow_conv3d_forward": lambda: nn_functions.slow_conv3d(
        VOLUME, KERNEL_3D, [2, 2, 2], None, [1, 1, 1], [0, 0, 0]
    ),
    "aten.slow_conv_dilated2d": lambda: nn_functions.slow_conv_dilated2d(
        IMAGE, KERNEL, [2, 2], None, [1, 1], [0, 0], [2, 2]
    ),
    "aten.slow_conv_transpose2d": lambda: nn_functions.slow_conv_transpose2d(
        IMAGE, KERNEL.transpose(0, 1), [2, 2], None, [1, 1], [0, 0], [0, 0], [1, 1]
    ),
    "aten.conv_tbc": lambda: torch.conv_tbc(torch.randn(5, 2, 3), torch.randn(2, 3, 4), torch.randn(4)),
    "aten._int_mm": lambda: torch._int_mm(torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)),
    "aten._foreach_mm": lambda: torch.ops.aten._foreach_mm([IMAGE[0, 0]], [IMAGE[0, 1]])[0],
    "aten._linalg_det": lambda: torch.linalg.det(IMAGE[0, 0]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_that_nobody_looked_at_are_refused(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(UNKNOWN[name], backend="fpsim_eager", options={"format": "e8m1"}, fullgraph=True)
    with pytest.raises(Exception, match=re.escape(name)), torch.no_grad():
        compiled()
    torch._dynamo.reset()
    compiled = torch.compile(
        UNKNOWN[name], backend="fpsim_eager", options={"format": "e8m1", "gaps": [name + "*"]}, fullgraph=True
    )
    with torch.no_grad():
        assert torch.isfinite(compiled()).all()


@torch.library.custom_op("fpsim_tests::table_lookup", mutates_args=())
def table_lookup(i: torch.Tensor) -> torch.Tensor:
    """A product in disguise: it takes integers and returns floating-point numbers."""
    return torch.nn.functional.one_hot(i, 10).float() @ torch.ones(10, 6)


@table_lookup.register_fake
def _(i: torch.Tensor) -> torch.Tensor:
    return torch.empty(*i.shape, 6)


@torch.library.custom_op("fpsim_tests::integer_product", mutates_args=())
def integer_product(i: torch.Tensor) -> torch.Tensor:
    return i @ i.mT


@integer_product.register_fake
def _(i: torch.Tensor) -> torch.Tensor:
    return i @ i.mT


@torch.library.custom_op("fpsim_tests::source", mutates_args=())
def source() -> torch.Tensor:
    return torch.ones(3, 3) @ torch.ones(3, 3)


@source.register_fake
def _() -> torch.Tensor:
    return torch.empty(3, 3)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("table_lookup", lambda: table_lookup(torch.tensor([1, 2])) * 1.0),
        ("integer_product", lambda: integer_product(torch.ones(2, 3, dtype=torch.int64)).float()),
        ("source", lambda: source() + 1),
    ],
)
def test_operators_of_other_libraries_are_refused_whatever_their_inputs_are(name, function) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"fpsim_tests.{name}"):
        torch.compile(function, backend="fpsim_eager", options={"format": "e8m1"}, fullgraph=True)()
    assert [gap.operator for gap in fpsim.explain(function).gaps] == [f"fpsim_tests.{name}"]


def test_the_sparse_gradient_of_an_embedding_is_no_product() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 2, bias=False))
    tokens = torch.tensor([[1, 2], [2, 3]])
    torch.compile(model, backend="fpsim_eager", options={"format": "e4m3fn"})(tokens).sum().backward()
    gradient = model[0].weight.grad
    assert gradient.layout is torch.sparse_coo
    row = fpsim.round(torch.ones(1, 2), "e4m3fn") @ fpsim.round(model[1].weight.detach(), "e4m3fn")
    expected = torch.zeros(10, 4).index_add_(0, tokens.flatten(), row.expand(4, 4))
    assert torch.equal(gradient.to_dense(), expected)


def test_an_operator_that_changes_its_arguments_is_refused_by_its_own_name() -> None:
    @torch.library.custom_op("test_families::product_into", mutates_args=("result",))
    def product_into(x: torch.Tensor, result: torch.Tensor) -> None:
        result.copy_(x @ x.T)

    def gram(x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(2, 2)
        product_into(x, result)
        return result * 1

    with pytest.raises(
        BackendCompilerFailed, match=r"test_families\.product_into may multiply.*'test_families\.product"
    ):
        torch.compile(gram, backend="fpsim_eager")(torch.ones(2, 3))
    options = {"format": "e8m1", "gaps": ["test_families.product_into"]}
    assert torch.equal(
        torch.compile(gram, backend="fpsim_eager", options=options)(torch.ones(2, 3)), torch.full((2, 2), 3.0)
    )


FORMATS = [
    "e8m1", "e4m3fn/power_of_two", "mxfp4", "int8", "nf4/group:16:double", "nvfp4/stochastic", "nvfp4/hadamard:16:te",
    "e4m3fn/group:16/expand",
]  # fmt: skip


def test_every_operator_of_fpsim_is_known_or_a_product() -> None:
    """A new one has to be added to the table, or compiled models refuse it."""
    importlib.import_module("fpsim.compile_backend.backend")
    own = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpsim::")}
    products = {"accumulate_mm", "accumulate_scaled_mm", "accumulate_grouped_mm"}
    products |= {"flash_attention", "flash_attention_backward"}
    known = {name.partition(".")[0].removeprefix("fpsim::") for name in own} - products
    assert known == set(OTHER_NAMESPACES["fpsim"])


@pytest.mark.parametrize("format", FORMATS)
def test_every_rounding_of_fpsim_may_stand_in_a_compiled_model(format: str) -> None:
    """Its own operators, elementwise or with scales, are known to hold no product."""
    weight = torch.eye(32)
    seed = 1 if "stochastic" in format else None

    def function(x: torch.Tensor) -> torch.Tensor:
        return fpsim.round(x, format, seed=seed) @ weight

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(function, backend="fpsim_eager", options={"gradient": "e8m1"}, fullgraph=True)
    assert torch.equal(compiled(x), fpsim.round(x, format, seed=seed))
