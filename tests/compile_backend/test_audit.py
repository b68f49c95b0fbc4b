"""`audit` is a witness of its own: it names products that the pass does not know, and claims no more than it has seen.

The tests of what `audit` finds in compiled models of the usual kinds stand in `test_inspect.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import fpsim
from fpsim.compile_backend import Audit
from fpsim.compile_backend.passes import rounding_pass
from fpsim.compile_backend.witness import may_multiply

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SQUARE = X @ X.T + torch.eye(4)
IMAGE = X.reshape(1, 2, 4, 4)
BYTES = torch.ones(32, 32, dtype=torch.int8)


@torch.library.custom_op("test_audit::lookup", mutates_args=())
def lookup(index: Tensor) -> Tensor:
    """A product in an operator whose arguments are integers."""
    return F.one_hot(index, 4).float() @ X


@lookup.register_fake
def _(index: Tensor) -> Tensor:
    return torch.empty(*index.shape, 8)


@pytest.fixture(autouse=True)
def without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def found(audit: Audit) -> list[tuple[str, int, bool]]:
    return sorted((escape.operator, escape.count, escape.inside) for escape in audit.escaped)


# -- operators that run outside of graphs ------------------------------------------------------------------------------


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Sequential(nn.Linear(8, 8))
        return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)


def scaled(x: Tensor) -> Tensor:
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    return torch._scaled_mm(ones, ones.t(), torch.tensor(1.0), torch.tensor(1.0))


EAGER: dict[str, tuple[Callable[[Tensor], object], list[str]]] = {
    "outer": (lambda x: torch.outer(x[0], x[1]), ["aten.outer"]),
    "ger": (lambda x: torch.ger(x[0], x[1]), ["aten.ger"]),
    "addr": (lambda x: torch.addr(torch.zeros(8, 8), x[0], x[1]), ["aten.addr"]),
    "addr_": (lambda x: torch.zeros(8, 8).addr_(x[0], x[1]), ["aten.addr_"]),
    "kron": (lambda x: torch.kron(x, x), ["aten.kron"]),
    "cov": (lambda x: torch.cov(x), ["aten.mm"]),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), ["aten.bmm"]),
    "lists of products": (lambda x: torch._foreach_mm([x], [x.T])[0], ["aten._foreach_mm"]),
    "affine_grid": (lambda x: F.affine_grid(x[:1, :6].view(1, 2, 3), (1, 1, 2, 2)), ["aten.affine_grid_generator"]),
    "cdist": (lambda x: torch.cdist(x.repeat(9, 1), x), ["aten._euclidean_dist"]),
    "bilinear": (lambda x: F.bilinear(x, x, torch.ones(3, 8, 8)), ["aten._trilinear"]),
    "solve": (lambda x: torch.linalg.solve(SQUARE, x), ["aten._linalg_solve_ex"]),
    "inv": (lambda x: torch.linalg.inv(SQUARE), ["aten.linalg_inv_ex"]),
    "svd": (lambda x: torch.linalg.svd(x), ["aten._linalg_svd"]),
    "cholesky": (lambda x: torch.linalg.cholesky(SQUARE), ["aten.linalg_cholesky_ex"]),
    "matrix_exp": (lambda x: torch.linalg.matrix_exp(SQUARE), ["aten.linalg_matrix_exp"]),
    "householder": (
        lambda x: torch.linalg.householder_product(x.T, x[0, :4]),
        ["aten.linalg_householder_product"],
    ),
    "sparse": (lambda x: torch.sparse.mm(SQUARE.to_sparse(), x), ["aten._sparse_addmm"]),
    "a quantized layer": (quantized(), ["quantized.linear_dynamic"]),
    "weights of 8 bits": (
        lambda x: torch._weight_int8pack_mm(x, torch.ones(3, 8, dtype=torch.int8), torch.ones(3)),
        ["aten._weight_int8pack_mm"],
    ),
    "integers": (lambda x: torch._int_mm(BYTES, BYTES), ["aten._int_mm"]),
    "scaled": (scaled, ["aten._scaled_mm"]),
    "a slow convolution": (
        lambda x: torch._C._nn.thnn_conv2d(IMAGE, torch.ones(3, 2, 2, 2), [2, 2], None, [1, 1], [0, 0]),
        ["aten._slow_conv2d_forward"],
    ),
    "another library": (lambda x: torch.ops.test_audit.lookup(torch.arange(4)), ["test_audit.lookup"]),
    "weighted embeddings": (
        lambda x: F.embedding_bag(torch.arange(4), x, torch.tensor([0, 2]), mode="sum", per_sample_weights=x[0, :4]),
        ["aten._embedding_bag_forward_only"],
    ),
    "a recurrent layer": (lambda x: nn.LSTM(8, 8)(x[:, None])[0].detach(), ["aten.lstm"]),
    "embeddings": (lambda x: F.embedding_bag(torch.arange(4), x, torch.tensor([0, 2])), []),
    "norms and sums": (lambda x: F.layer_norm(F.gelu(torch.softmax(x * x, -1)), (8,)).cumsum(0).std(), []),
    "sorting and pooling": (lambda x: F.interpolate(F.max_pool1d(x, 2).sort()[0][None], scale_factor=2), []),
    "transforms and paddings": (lambda x: F.pad(torch.fft.fft(F.group_norm(x, 2)).abs() + F.dropout(x), (1, 1)), []),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", EAGER)
def test_a_product_in_code_that_is_left_out_is_named(name: str) -> None:
    function, operators = EAGER[name]
    helper = torch.compiler.disable(function)
    audit = fpsim.audit(torch.compile(lambda x: (x * 1.5, helper(x)), backend="fpsim_eager"), X)
    assert found(audit) == [(operator, 1, False) for operator in operators]
    assert audit.covered == 0 and audit.compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "fpsim"])
def test_a_model_of_which_fpsim_compiles_nothing_is_said_to_be_so(backend: str) -> None:
    model = nn.Linear(8, 8)
    if backend == "fpsim":
        model.forward = torch.compiler.disable(model.forward)
    audit = fpsim.audit(torch.compile(model, backend=backend), X)
    assert not audit.compiled and audit.covered == 0
    assert {escape.operator for escape in audit.escaped} == {"aten.addmm", "aten.mm"}
    text = str(audit)
    assert "nothing was compiled" in text and "no matrix product escaped" not in text


# -- operators inside graphs that the pass does not know ---------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, drop: Callable) -> None:
    """Let the pass overlook the products for which ``drop`` is true."""
    find = rounding_pass.find_products
    monkeypatch.setattr(rounding_pass, "find_products", lambda *a: [p for p in find(*a) if not drop(p)])


class Products(nn.Module):
    """One product of each form, with operands of sizes that no other product has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 5), nn.Conv1d(5, 3, 2)
        self.v, self.u = nn.Parameter(torch.ones(11)), nn.Parameter(torch.ones(11))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.conv(h.T[None]).sum() + (h @ h.T).sum() + torch.dot(self.v, self.u)


ALL_PRODUCTS = 2 + 2 + 3  # addmm and its wgrad; the convolution, twice; h @ h.T, thrice; a dot is decomposed


@pytest.mark.parametrize("backend", ["fpsim_eager", "fpsim"])
def test_with_all_products_known_nothing_escapes(backend: str) -> None:
    audit = fpsim.audit(torch.compile(Products(), backend=backend), X)
    assert audit == Audit((), covered=ALL_PRODUCTS) and audit.compared and audit.unrounded == ()


@pytest.mark.parametrize(
    ("operator", "kinds", "names", "covered"),
    [
        ("aten.addmm", ("fprop",), {"aten.addmm": 1}, ALL_PRODUCTS - 1),
        ("aten.convolution", ("fprop",), {"aten.convolution": 1}, ALL_PRODUCTS - 1),
        ("aten.convolution_backward", ("dgrad", "wgrad"), {"aten.convolution_backward": 1}, ALL_PRODUCTS - 1),
        ("aten.dot", ("fprop",), {"aten.dot": 1}, ALL_PRODUCTS),
        ("aten.dot", ("dgrad", "wgrad"), {"aten.mul": 2}, ALL_PRODUCTS),
    ],
)
def test_a_product_that_the_pass_overlooks_is_named(
    monkeypatch: pytest.MonkeyPatch, operator: str, kinds: tuple[str, ...], names: dict[str, int], covered: int
) -> None:
    without(monkeypatch, lambda p: p.operator == operator and p.kind in kinds)
    audit = fpsim.audit(torch.compile(Products(), backend="fpsim_eager"), X)
    assert found(audit) == [(name, count, True) for name, count in names.items()]
    assert audit.covered == covered
    assert "rounded by no graph of fpsim" in str(audit)


def test_a_pass_that_finds_nothing_is_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, lambda p: True)
    audit = fpsim.audit(torch.compile(Products(), backend="fpsim_eager"), X)
    assert audit.covered == 0
    names = {"aten.addmm": 1, "aten.mm": 4, "aten.convolution": 1, "aten.convolution_backward": 1, "aten.dot": 1}
    counted: dict[str, int] = {}
    for escape in audit.escaped:
        counted[escape.operator] = counted.get(escape.operator, 0) + escape.count
    assert counted == names | {"aten.mul": 2}


def test_what_runs_unknown_inside_a_graph_is_named_as_such() -> None:
    policy = {"format": "e8m1", "gaps": ["aten.*", "test_audit.*"]}  # whatever the pass takes for a product is accepted
    function = torch.compile(
        lambda x: torch.ops.test_audit.lookup(torch.arange(4)) * x, backend="fpsim_eager", options=policy
    )
    assert found(fpsim.audit(function, X)) == [("test_audit.lookup", 1, True)]


def test_a_product_whose_result_is_unused_is_named() -> None:
    """An eager run computes it; nobody can tell from outside why the graph lacks it."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    audit = fpsim.audit(torch.compile(Unused(), backend="fpsim_eager"), X)
    assert found(audit) == [("aten.addmm", 1, True)] and "or its result is unused" in str(audit)
    assert audit.covered == 2


# -- no false alarm ----------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """Fused attention with fewer keys than queries, which decomposition repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).view(1, 4, 2, 4).transpose(1, 2), self.kv(x).view(1, 4, 1, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 6, bias=False), nn.GELU(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x) @ self.layer(x).mT


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w = nn.Linear(8, 8), nn.Parameter(torch.ones(3, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return torch.einsum("sd,hde->hse", x, self.w) + torch.outer(self.w[0, :, 0], x[0]).sum()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, 0].long().abs() % 11
        return F.cross_entropy(self.table(tokens) @ self.table.weight.T, tokens)


@pytest.mark.parametrize(
    "model",
    [
        Grouped,
        Checkpointed,
        Mixed,
        Looping,
        Tied,
        lambda: nn.GRU(8, 6),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, groups=2), nn.ConvTranspose1d(4, 2, 2)),
    ],
)
def test_models_without_an_escape_have_none(model: Callable[[], nn.Module]) -> None:
    audit = fpsim.audit(torch.compile(model(), backend="fpsim_eager"), X)
    assert audit.escaped == () and audit.compared and audit.covered > 0


def test_sizes_that_vary_are_no_escape() -> None:
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    assert fpsim.audit(torch.compile(nn.Linear(8, 3), backend="fpsim_eager"), x) == Audit((), covered=2)


def test_a_model_in_inference_is_audited_forward_alone() -> None:
    with torch.no_grad():
        assert fpsim.audit(torch.compile(nn.Linear(8, 3), backend="fpsim_eager"), X) == Audit((), covered=1)


# -- what the policy leaves unrounded ----------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("policy", "left", "covered"),
    [
        ({"format": "e8m1"}, set(), 5),
        ({"policy": "fp8_hybrid", "skip": ["0"]}, {("0", "fprop"), ("0", "wgrad")}, 3),
        ({"policy": "fp8_hybrid", "modules": {"2": "none"}}, {("2", "fprop"), ("2", "dgrad"), ("2", "wgrad")}, 2),
    ],
)
def test_products_that_the_policy_leaves_unrounded_are_not_counted_as_covered(
    policy: dict, left: set, covered: int
) -> None:
    audit = fpsim.audit(torch.compile(two_layers(), backend="fpsim_eager", options=policy), X)
    assert {(gap.path, gap.reason.split()[0].rstrip(":")) for gap in audit.unrounded} == left
    assert all("the policy" in gap.reason for gap in audit.unrounded)
    assert (audit.covered, audit.escaped) == (covered, ())
    if left:
        assert f"{len(left)} matrix products that the policy leaves unrounded" in str(audit)


def test_products_with_no_rounded_operand_are_left_by_the_policy() -> None:
    """Under this policy activations alone are rounded: no operand of dgrad is an activation."""
    options = {"activation": "e8m1", "weight": None, "gradient": None}
    plan = fpsim.explain(two_layers(), X, policy=options)
    unrounded = [site for site in plan.sites if site.kind == "dgrad"]
    assert unrounded and all(site.cast is None for site in unrounded)
    audit = fpsim.audit(torch.compile(two_layers(), backend="fpsim_eager", options=options), X)
    assert [(gap.path, gap.operator, gap.reason) for gap in audit.unrounded] == [
        ("2", "aten.mm", "dgrad: the policy leaves it unrounded")
    ]
    assert audit.escaped == ()


# -- models of which parts are compiled --------------------------------------------------------------------------------


def test_parts_compiled_one_by_one_are_not_compared_and_it_says_so() -> None:
    model = two_layers()
    model[0] = torch.compile(model[0], backend="fpsim_eager")
    audit = fpsim.audit(model, X)
    assert audit.compiled and not audit.compared and audit.covered == 2
    assert "not compared with an eager run" in str(audit)
    assert {escape.operator for escape in audit.escaped} == {"aten.addmm", "aten.mm"}


@pytest.mark.parametrize(
    "compiled",
    [
        lambda m: torch.compile(m, backend="fpsim_eager"),
        lambda m: torch.compile(lambda x: m(x), backend="fpsim_eager"),
        lambda m: m.compile(backend="fpsim_eager") or m,
        lambda m: m,
    ],
)
def test_whole_models_are_compared_however_they_are_compiled(compiled: Callable) -> None:
    class Owned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    audit = fpsim.audit(compiled(Owned()), X)
    assert audit == Audit((), covered=2) and audit.compared


# -- the list of harmless operators ------------------------------------------------------------------------------------

#: Words in the names of operators that multiply.
WORDS = (
    r"mm|matmul|conv\d|convol|linear|attention|rnn|lstm|gru|dot|outer|ger|mv|bmm|svd|lu|qr|eig|inv|solve|chol|kron|addr"
)

#: Operators with such a word that multiply no matrices, and why.
INNOCENT = {
    "the search for the best way to run a product, without its result": "_cslt_sparse_mm_search",
    "a cell computes gates from products that are done": r"_thnn_fused_(lstm|gru)_cell.*",
    "interpolation": r"upsample_.*|_upsample_.*",
    "a layout": r"mkldnn_reorder_.*|_cudnn_rnn_flatten_weight|lu_unpack|_conv.*copy.*",
    "activations": r".*(relu|elu|glu|celu|gelu|silu|selu).*",
    "Gamma functions": r".*lgamma.*|.*gamma.*|digamma.*|polygamma.*|mvlgamma.*",
    "inverse trigonometric functions and others": r".*(invert|inverse_.*|erfinv).*",
}


MOVING = {
    "c10d": "allgather_ allreduce_ broadcast_ reduce_scatter_",
    "fsdp": "all_gather_copy_in chunk_cat copy_ split_with_sizes_copy",
}


def test_no_operator_with_a_telling_name_is_taken_for_harmless() -> None:
    innocent = re.compile("|".join(INNOCENT.values()))
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    taken = []
    for name in sorted(name.removeprefix("aten::") for name in names):
        telling = any(re.fullmatch(WORDS, word) for word in re.findall("[a-z]+\\d?", name))
        if telling and not innocent.fullmatch(name) and not is_composed(name) and not may_multiply(f"aten::{name}"):
            taken.append(name)
    assert taken == []


def is_composed(name: str) -> bool:
    """Whether torch composes the operator of others, which are judged."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    overloads = [overload.replace("default", "") for overload in getattr(torch.ops.aten, name).overloads()]
    names = [f"aten::{name}.{overload}".rstrip(".") for overload in overloads]
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(n, key) for n in names if torch._C._dispatch_has_kernel(n)
    )


def test_whatever_has_flops_may_multiply() -> None:
    packets = [packet for packet in flop_registry if hasattr(packet, "_qualified_op_name")]
    assert len(packets) > 10
    assert [p for p in packets if not may_multiply(p._qualified_op_name)] == []


def test_operators_that_move_shards_between_ranks_multiply_nothing() -> None:
    """FSDP2 gathers parameters outside of compiled blocks; a warning there would hide those that matter."""
    import torch.distributed.fsdp  # registers the operators

    moving = [f"{library}::{name}" for library in ("c10d", "fsdp") for name in MOVING[library].split()]
    assert all(torch._C._jit_get_schemas_for_operator(name) for name in moving)
    assert not any(map(may_multiply, moving))


def test_names_that_are_no_operators_multiply_nothing() -> None:
    assert not any(map(may_multiply, ("AddmmBackward0", "autograd::engine::evaluate_function: MmBackward0", "mm", "")))
