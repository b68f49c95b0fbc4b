"""Every way to multiply matrices in torch is computed from rounded operands, bit for bit, or refused.

`product` is the arithmetic by hand: a matrix product and its two derivatives, each from its own rounded operands. All
numbers are small dyadic rationals, and so are the rounded ones: sums are exact, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention

import fpsim
from fpsim.compile_backend import UnroundedError
from fpsim.compile_backend.passes.rounding_pass import RoundingPass
from tests.shared.models import SMALL_SHAPES, case, dyadic, dyadic_

#: Casts that tell roles and kinds apart.
OPTIONS: dict[str, Any] = {
    "activation": "e4m2",
    "weight": "e3m1",
    "gradient": "e5m1",
    "dgrad": {"activation": "e4m1/toward_zero", "weight": "e4m1"},
    "wgrad": {"gradient": "e5m2", "activation": "e4m3"},
    "overflow": "sat_finite",
}
POLICY = fpsim.Policy.from_options(OPTIONS)


def q(x: Tensor, kind: str, role: str) -> Tensor:
    cast = POLICY.cast(kind, role)
    assert cast is not None
    return fpsim.round(x.detach(), cast.format, rounding=cast.rounding, overflow=cast.overflow)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, multiply: Callable, roles: Sequence[str]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.multiply, ctx.roles = multiply, roles
        return multiply(q(a, "fprop", roles[0]), q(b, "fprop", roles[1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b = ("wgrad" if role == "weight" else "dgrad" for role in ctx.roles)
        with torch.enable_grad():
            da = torch.func.vjp(lambda a: ctx.multiply(a, q(b, of_a, ctx.roles[1])), a)[1](q(dy, of_a, "gradient"))[0]
            db = torch.func.vjp(lambda b: ctx.multiply(q(a, of_b, ctx.roles[0]), b), b)[1](q(dy, of_b, "gradient"))[0]
        return da, db, None, None


def product(a: Tensor, b: Tensor, multiply: Callable = torch.matmul, roles: str = "activation activation") -> Tensor:
    """A bilinear function of rounded operands, whose derivatives are bilinear functions of rounded operands too."""
    return Product.apply(a, b, multiply, roles.split())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = product(x, weight, F.linear, "activation weight")
    return y if bias is None else y + bias


def results(fn: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> list[Tensor]:
    """Values and all gradients of ``fn``, for dyadic incoming gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    for parameter in parameters:
        parameter.grad = None
    values = fn(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    torch.autograd.backward(values, [dyadic(*y.shape, seed=i, top=8).to(y.dtype) for i, y in enumerate(values)])
    return [*(y.detach() for y in values), *(x.grad for x in (*leaves, *parameters))]  # type: ignore[misc]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape, f"result {i}"
        assert torch.equal(g, w), f"result {i}: {(g != w).sum()} of {w.numel()} differ\n{g}\n{w}"


def assert_rounded(
    fn: Callable[..., Any],
    by_hand: Callable[..., Any],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    backend: str = "fpsim_eager",
) -> None:
    compiled = torch.compile(fn, backend=backend, options=OPTIONS, dynamic=False)
    assert_same(results(compiled, inputs, parameters), results(by_hand, inputs, parameters))


# -- all shapes and spellings ------------------------------------------------------------------------------------------

#: Functions of two matrices, m x k and k x n, and the bilinear function that they are.
SPELLINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "matmul": (lambda a, b: a @ b, torch.matmul),
    "addmm": (lambda a, b: torch.addmm(torch.ones(b.shape[1]), a, b), lambda a, b: a @ b + 1),
    "linear": (lambda a, b: F.linear(a, b.T), torch.matmul),
    "bmm": (lambda a, b: torch.bmm(torch.stack([a, a]), torch.stack([b, b])), lambda a, b: torch.stack([a @ b] * 2)),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.ones(1, 1, 1), a[None], b[None]), lambda a, b: (a @ b + 1)[None]),
    "addbmm": (lambda a, b: torch.addbmm(torch.ones(1), a[None], b[None], beta=2), lambda a, b: a @ b + 2),
    "einsum": (lambda a, b: torch.einsum("mk,kn->nm", a, b), lambda a, b: (a @ b).T),
    "mv": (lambda a, b: torch.mv(a, b[:, 0]), lambda a, b: a @ b[:, 0]),
    "addmv": (lambda a, b: torch.addmv(torch.ones(1), a, b[:, 0]), lambda a, b: a @ b[:, 0] + 1),
    "dot": (lambda a, b: torch.dot(a[0], b[:, 0]), lambda a, b: a[0] @ b[:, 0]),
    "outer": (lambda a, b: torch.outer(a[:, 0], b[0]), lambda a, b: a[:, :1] * b[0]),
}
#: The spellings that are linear layers: their second operand is a weight, whatever tensor it is.
LAYERS = ("addmm", "linear")


@pytest.mark.parametrize(("m", "n", "k"), SMALL_SHAPES)
def test_no_shape_of_any_product_is_too_small(m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor turns small products into multiplications and sums before any pass sees them, backward as well."""
    rounded: list[int] = []
    original = RoundingPass.__call__

    def counting(self: RoundingPass, graph: fx.Graph) -> None:
        original(self, graph)
        rounded.append(len(graph.find_nodes(op="call_function", target=torch.ops.fpsim.round.default)))

    monkeypatch.setattr(RoundingPass, "__call__", counting)
    inputs = [dyadic(*shape, seed=i) for i, shape in enumerate([(m, k), (k, n)] * len(SPELLINGS))]

    def every(multiply: Callable[[str, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: tuple(multiply(name, x[2 * i], x[2 * i + 1]) for i, name in enumerate(SPELLINGS))

    def by_hand(name: str, a: Tensor, b: Tensor) -> Tensor:
        roles = "activation weight" if name in LAYERS else "activation activation"
        return product(a, b, SPELLINGS[name][1], roles)

    assert_rounded(every(lambda name, a, b: SPELLINGS[name][0](a, b)), every(by_hand), inputs)
    # of each product: two operands by two casts, fprop and dgrad, and the gradient; a layer's gradient has two casts
    assert rounded == [5 * len(SPELLINGS) + len(LAYERS)]


PAIRS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "inner": (torch.inner, (3, 4), (5, 4)),
    "ger": (torch.ger, (3,), (4,)),
    "addr": (lambda a, b: torch.addr(torch.ones(1, 1), a, b, beta=3), (3,), (4,)),
    "vdot": (torch.vdot, (5,), (5,)),
    "vecdot": (torch.linalg.vecdot, (3, 5), (3, 5)),
    "kron": (torch.kron, (2, 3), (3, 2)),
    "linalg.matmul": (torch.linalg.matmul, (2, 3, 4), (4, 5)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=2), (2, 3, 4), (3, 4, 5)),
    "multi_dot": (lambda a, b: torch.linalg.multi_dot([a, b]), (3, 4), (4, 5)),
    "multi_dot of vectors": (lambda a, b: torch.linalg.multi_dot([a, b]), (4,), (4,)),
    "addbmm": (lambda a, b: torch.addbmm(torch.ones(3, 5), a, b, beta=0.5), (2, 3, 4), (2, 4, 5)),
    "baddbmm scaled": (lambda a, b: torch.baddbmm(torch.ones(2, 3, 5), a, b, beta=2), (2, 3, 4), (2, 4, 5)),
    "einsum of rows": (lambda a, b: torch.einsum("ij,ij->i", a, b), (3, 4), (3, 4)),
    "einsum of batches": (lambda a, b: torch.einsum("...ij,...jk->...ik", a, b), (2, 2, 3, 4), (2, 1, 4, 5)),
    "einsum over two axes": (lambda a, b: torch.einsum("bij,bjk->ik", a, b), (2, 3, 4), (2, 4, 5)),
    "matmul by method": (lambda a, b: a.matmul(b), (2, 3, 4), (4,)),
    "outer by method": (lambda a, b: a.outer(b), (3,), (4,)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_products_of_two_tensors(name: str) -> None:
    fn, *shapes = PAIRS[name]
    inputs = [dyadic(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_rounded(fn, lambda a, b: product(a, b, fn), inputs)


CHAINS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "multi_dot": (
        lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
        lambda a, b, c: product(a, product(b, c)),
        ((2, 4), (4, 5), (5, 1)),
    ),
    "matrix_power": (
        lambda a: torch.linalg.matrix_power(a, 3),
        lambda a: product(product(a, a), a),
        ((2, 2),),
    ),
    "einsum": (
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c),
        lambda a, b, c: product(product(a, b), c),
        ((2, 3), (3, 2), (2, 4)),
    ),
    "bilinear by einsum": (  # what the refusal of `bilinear` advises
        lambda x, w, y: torch.einsum("bi,kij,bj->bk", x, w, y),
        lambda x, w, y: product(
            product(x, w, lambda x, w: torch.einsum("bi,kij->bkj", x, w)),
            y,
            lambda t, y: torch.einsum("bkj,bj->bk", t, y),
        ),
        ((2, 3), (4, 3, 2), (2, 2)),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_products_of_several_tensors(name: str) -> None:
    fn, by_hand, shapes = CHAINS[name]
    assert_rounded(fn, by_hand, [dyadic(*shape, seed=i, top=4) for i, shape in enumerate(shapes)])


# -- mixtures of experts -----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Rows of the input, sorted by expert, each multiplied by the matrix of its expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(dyadic(2, 8, 16, seed=5, top=4).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight, offs=torch.tensor([2, 4], dtype=torch.int32, device=x.device))

    def by_hand(self, x: Tensor) -> Tensor:
        return torch.cat([product(x[2 * i : 2 * i + 2], self.weight[i], roles="activation weight") for i in range(2)])


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_the_products_of_experts(backend: str) -> None:
    model, x = Experts(), dyadic(4, 8, seed=1, top=4).bfloat16()
    assert_rounded(model, model.by_hand, [x], [model.weight], backend)


def test_grouped_products_of_batches() -> None:
    inputs = [dyadic(2, 8, 8, seed=i, top=4).bfloat16() for i in range(2)]
    assert_rounded(F.grouped_mm, product, inputs)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    scales: tuple[float, float] | None = None,
) -> Tensor:
    """Scaled dot-product attention; ``mask`` is added to the scores, ``kept`` multiplies the probabilities.

    As in torch's math kernel, query and key are each scaled by the square root of the scale before their product.
    """
    root = math.sqrt(1 / math.sqrt(query.shape[-1]))
    of_query, of_key = scales or (root, root)
    scores = product(query * of_query, (key * of_key).mT)
    p = torch.softmax(scores if mask is None else scores + mask, -1)
    return product(p if kept is None else p * kept, value)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1)


HALF = torch.tensor([True, False, True, False]).expand(4, 4)

#: Keyword arguments of `scaled_dot_product_attention`, of `attention_by_hand`, and the number of positions. The keys
#: are zero, so that the softmax is one over the number of positions that a query sees, which must be a power of two.
ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 4),
    "causal": ({"is_causal": True}, {"mask": causal(2)}, 2),
    "boolean mask": ({"attn_mask": HALF}, {"mask": torch.zeros(4, 4).masked_fill(~HALF, -math.inf)}, 4),
    "additive mask": ({"attn_mask": torch.ones(4, 4)}, {"mask": torch.ones(4, 4)}, 4),
    "scale": ({"scale": 0.25 * 0.25}, {"scales": (0.25, 0.25)}, 4),
}


def heads(length: int, dtype: torch.dtype = torch.float32, groups: int = 1) -> list[Tensor]:
    """Queries, keys and values of two heads; the keys are zero."""
    shapes = [(2, 2, length, 16), *[(2, 2 // groups, length, 16)] * 2]
    query, key, value = (dyadic(*shape, seed=i, top=8).to(dtype) for i, shape in enumerate(shapes))
    return [query, torch.zeros_like(key), value]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    given, by_hand, length = ATTENTIONS[name]
    assert_rounded(
        lambda *x: F.scaled_dot_product_attention(*x, **given),
        lambda *x: attention_by_hand(*x, **by_hand),
        heads(length),
    )


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_grouped_query_attention(backend: str) -> None:
    def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_by_hand(query, *(t.repeat_interleave(2, 1) for t in (key, value)), mask=causal(2))

    assert_rounded(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
        by_hand,
        heads(2, groups=2),
        backend=backend,
    )


def test_attention_without_gradients_and_in_bfloat16() -> None:
    inputs = heads(4, torch.bfloat16)
    with torch.no_grad():
        got = torch.compile(F.scaled_dot_product_attention, backend="fpsim_eager", options=OPTIONS)(*inputs)
        assert torch.equal(got, attention_by_hand(*inputs))


def test_attention_with_dropout() -> None:
    """The product of the probabilities and the identity shows which ones dropout set to zero."""
    query, key, value = heads(4)

    def attend(options: Mapping[str, Any]) -> Callable[..., Tensor]:
        def seeded(*x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return compiled(*x)

        compiled = torch.compile(
            lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.5), backend="fpsim_eager", options=options
        )
        return seeded

    kept = attend({"format": "none"})(query, key, torch.eye(4).expand(2, 2, 4, 4)) * 4
    assert {*kept.unique().tolist()} == {0, 2}
    got = results(attend(OPTIONS), (query, key, value))
    assert_same(got, results(lambda *x: attention_by_hand(*x, kept=kept), (query, key, value)))


class HalfUniform(nn.MultiheadAttention):
    """Two heads of 16; the projection to the keys is zero, so that the softmax is uniform."""

    def __init__(self) -> None:
        super().__init__(32, 2, batch_first=True)
        dyadic_(self, top=4)
        with torch.no_grad():
            self.in_proj_weight[32:64] = 0
            self.in_proj_bias[32:64] = 0

    def by_hand(self, x: Tensor, scales: tuple[float, float] | None = None) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        split = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = attention_by_hand(*split, scales=scales).transpose(1, 2).flatten(2)
        return linear(y, self.out_proj.weight, self.out_proj.bias)


SEQUENCE = dyadic(2, 4, 32, seed=9, top=2)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights: bool) -> None:
    """With ``need_weights`` torch scales only the queries."""
    model = HalfUniform()
    scales = (0.25, 1.0) if need_weights else None
    assert_rounded(
        lambda x: model(x, x, x, need_weights=need_weights)[0],
        lambda x: model.by_hand(x, scales),
        [SEQUENCE],
        [*model.parameters()],
    )


def test_multi_head_attention_in_inference() -> None:
    model = HalfUniform().eval()
    with torch.no_grad():
        got = torch.compile(model, backend="fpsim_eager", options=OPTIONS)(*[SEQUENCE] * 3, need_weights=False)[0]
        assert torch.equal(got, model.by_hand(SEQUENCE))


class Layer(nn.TransformerEncoderLayer):
    """A layer without its norms, whose sums are not exact."""

    def __init__(self) -> None:
        super().__init__(32, 2, 16, dropout=0, batch_first=True)
        self.self_attn = HalfUniform()
        self.norm1, self.norm2 = nn.Identity(), nn.Identity()
        dyadic_(self.linear1, top=2)
        dyadic_(self.linear2, top=2)

    def by_hand(self, x: Tensor) -> Tensor:
        x = x + self.self_attn.by_hand(x)  # type: ignore[operator]
        h = F.relu(linear(x, self.linear1.weight, self.linear1.bias))
        return x + linear(h, self.linear2.weight, self.linear2.bias)


def test_a_transformer_layer() -> None:
    model = Layer()
    assert_rounded(model, model.by_hand, [SEQUENCE], [*model.parameters()])


def test_the_fast_path_of_a_transformer_layer_is_refused_and_rounded_when_turned_off() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 16, batch_first=True), 1).eval()
    with torch.no_grad():
        message = refused(model, SEQUENCE)
        assert "aten._transformer_encoder_layer_fwd in module 'layers.0'" in message
        assert "torch.backends.mha.set_fastpath_enabled(False)" in message
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plan = fpsim.explain(model, SEQUENCE)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    modules = {"self_attn": 8, "linear1": 2, "linear2": 2}  # operands
    assert not plan.gaps
    assert {f"layers.0.{name}": n for name, n in modules.items()} == {
        path: sum(site.path == path for site in plan.sites) for path in {site.path for site in plan.sites}
    }


# -- recurrent networks ------------------------------------------------------------------------------------------------


def gates(cell: nn.RNNCellBase, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return linear(x, cell.weight_ih, cell.bias_ih), linear(h, cell.weight_hh, cell.bias_hh)


def rnn_by_hand(cell: nn.RNNCell, x: Tensor, h: Tensor) -> Tensor:
    i, h = gates(cell, x, h)
    return torch.relu(i + h)


def test_a_recurrent_cell() -> None:
    cell = dyadic_(nn.RNNCell(4, 5, nonlinearity="relu"), top=8)
    inputs = [dyadic(2, 4, seed=8), dyadic(2, 5, seed=9)]
    assert_rounded(cell, lambda x, h: rnn_by_hand(cell, x, h), inputs, [*cell.parameters()])


def gru_by_hand(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    i, g = gates(cell, x, h)
    (ir, iz, new), (hr, hz, hn) = i.chunk(3, 1), g.chunk(3, 1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    n = torch.tanh(new + hn * r)
    return (h - n) * z + n


def lstm_by_hand(cell: nn.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
    i, f, g, o = sum(gates(cell, x, h)).chunk(4, 1)  # type: ignore[attr-defined]
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c)


def test_gated_cells_in_inference() -> None:
    gru, lstm = dyadic_(nn.GRUCell(4, 5), top=8), dyadic_(nn.LSTMCell(4, 5), top=8)
    x, h, c = dyadic(2, 4, seed=7), dyadic(2, 5, seed=8), dyadic(2, 5, seed=9)
    with torch.no_grad():
        got = torch.compile(gru, backend="fpsim_eager", options=OPTIONS)(x, h)
        assert torch.equal(got, gru_by_hand(gru, x, h))
        got = torch.compile(lstm, backend="fpsim_eager", options=OPTIONS)(x, (h, c))[0]
        assert torch.equal(got, lstm_by_hand(lstm, x, h, c))


def test_a_recurrent_layer() -> None:
    model = dyadic_(nn.RNN(4, 5, nonlinearity="relu", batch_first=True), top=2)

    def by_hand(x: Tensor) -> Tensor:
        """The inputs of all steps are multiplied at once."""
        h, states = torch.zeros(2, 5), []
        i = linear(x, model.weight_ih_l0, model.bias_ih_l0)
        for t in range(3):
            h = torch.relu(i[:, t] + linear(h, model.weight_hh_l0, model.bias_hh_l0))
            states.append(h)
        return torch.stack(states, 1)

    assert_rounded(lambda x: model(x)[0], by_hand, [dyadic(2, 3, 4, seed=8, top=4)], [*model.parameters()])


@pytest.mark.parametrize(("kind", "cell"), [(nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)])
def test_a_layer_of_gated_cells_is_the_cell_step_by_step(
    kind: type[nn.RNNBase], cell: type[nn.GRUCell | nn.LSTMCell]
) -> None:
    layer, one = dyadic_(kind(4, 5), top=8), cell(4, 5)
    one.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, h, c = dyadic(3, 2, 4, seed=7), torch.zeros(2, 5), torch.zeros(2, 5)
    states = []
    for step in x:
        if kind is nn.GRU:
            h = gru_by_hand(one, step, h)
        else:
            i, f, g, o = sum(gates(one, step, h)).chunk(4, 1)  # type: ignore[attr-defined]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        got = torch.compile(layer, backend="fpsim_eager", options=OPTIONS)(x)[0]
    assert_same([got], [torch.stack(states).detach()])


def test_a_layer_that_one_operator_computes_is_refused() -> None:
    message = refused(nn.LSTM(4, 5), torch.randn(3, 2, 4))
    assert "aten.mkldnn_rnn_layer" in message and "torch.backends.mkldnn.enabled = False" in message


# -- backward by hand --------------------------------------------------------------------------------------------------


class Outer(torch.autograd.Function):
    """A matrix times a vector. The backward computes the gradient of the matrix as an outer product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return w @ x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return w.T @ dy, torch.outer(dy, x)


def test_a_function_with_a_backward_of_its_own() -> None:
    layer = dyadic_(nn.Linear(4, 3, bias=False), top=8)

    def by_hand(x: Tensor) -> Tensor:
        return product(layer.weight, x, roles="weight activation")

    assert_rounded(lambda x: Outer.apply(x, layer.weight), by_hand, [dyadic(4, seed=1)], [layer.weight])


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(fn: Callable[..., Any], *inputs: Tensor) -> str:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(fn, backend="fpsim_eager")(*inputs)
    assert isinstance(caught.value.inner_exception, UnroundedError)
    return str(caught.value.inner_exception)


def test_a_refusal_names_the_module_the_remedy_and_the_exemption() -> None:
    message = refused(nn.Sequential(nn.ReLU(), nn.Flatten(), Bilinear()), torch.randn(2, 3))
    for part in ("aten._trilinear in module '2.form'", "torch.einsum('bi,kij,bj->bk'", "gaps=['aten._trilinear*']"):
        assert part in message
    assert "skip=['2.form']" in message


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


X = torch.randn(4, 4)


@torch.library.custom_op("fpsim_test::square_matrix", mutates_args=())
def square_matrix(x: Tensor) -> Tensor:
    """An operator of another library, of which this backend knows nothing."""
    return x @ x


@square_matrix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


REFUSALS: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "distances of few points": (lambda x: torch.cdist(x, x), "aten._cdist_forward", "donot_use_mm_for_euclid_dist"),
    "distances of many": (
        lambda x: torch.cdist(x.repeat(9, 1), x),
        "aten._euclidean_dist",
        "donot_use_mm_for_euclid_dist",
    ),
    "weighted embeddings": (
        lambda x: F.embedding_bag(torch.zeros(4, 4, dtype=torch.int64), x, per_sample_weights=x, mode="sum"),
        "aten._embedding_bag",
        "torch.einsum('bn,bnd->bd', per_sample_weights, embedding(indices))",
    ),
    "cond": (
        lambda x: torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x + 1, (x,)),
        "higher_order.cond",
        "plain Python",
    ),
    "scan": (lambda x: scan(lambda c, y: (c @ c, y + c), x, x[None])[0], "higher_order.scan", "plain Python"),
    "map": (lambda x: torch_map(lambda row: row @ row, x), "higher_order.map", "plain Python"),
    "inverse": (torch.linalg.inv, "aten.linalg_inv_ex", "Replace it"),
    "decomposition": (torch.linalg.svdvals, "aten._linalg_svd", "Replace it"),
    "operator of another library": (square_matrix, "fpsim_test.square_matrix", "Replace it"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_rounded_is_refused_with_a_remedy(name: str) -> None:
    fn, operator, remedy = REFUSALS[name]
    message = refused(fn, X)
    assert message.startswith(operator) and remedy in message and "gaps=[" in message


def test_weighted_embeddings_are_rounded_as_the_refusal_advises() -> None:
    indices, shapes = torch.tensor([[0, 2, 2], [1, 0, 3]]), ((2, 3), (4, 2))
    weights, table = (dyadic(*shape, seed=i, top=4) for i, shape in enumerate(shapes))
    assert_rounded(
        lambda w, t: torch.einsum("bn,bnd->bd", w, F.embedding(indices, t)),
        lambda w, t: product(w, F.embedding(indices, t), lambda w, e: torch.einsum("bn,bnd->bd", w, e)),
        [weights, table],
    )


def test_embeddings_without_weights_are_only_added_up() -> None:
    table = torch.randn(4, 2, requires_grad=True)
    plan = fpsim.explain(lambda t: F.embedding_bag(torch.tensor([[0, 2], [1, 0]]), t, mode="sum"), table)
    assert plan.sites == plan.gaps == ()


def complex_numbers(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.complex64)


#: Products of complex numbers, and the operator that the error names.
COMPLEX: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], str]] = {
    "mm": (torch.mm, ((4, 4), (4, 4)), "aten.mm"),
    "bmm": (torch.bmm, ((2, 4, 4), (2, 4, 4)), "aten.bmm"),
    "addmm": (torch.addmm, ((4, 4), (4, 4), (4, 4)), "aten.addmm"),
    "baddbmm": (torch.baddbmm, ((2, 4, 4), (2, 4, 4), (2, 4, 4)), "aten.baddbmm"),
    "addbmm": (torch.addbmm, ((4, 4), (2, 4, 4), (2, 4, 4)), "aten.addbmm"),
    "mv": (torch.mv, ((4, 4), (4,)), "aten.mv"),
    "addmv": (torch.addmv, ((4,), (4, 4), (4,)), "aten.addmv"),
    "dot": (torch.dot, ((4,), (4,)), "aten.dot"),
    "vdot": (torch.vdot, ((4,), (4,)), "aten.vdot"),
    "vecdot": (torch.linalg.vecdot, ((4,), (4,)), "aten.vdot"),
    "outer": (torch.outer, ((4,), (4,)), "aten.outer"),
    "addr": (torch.addr, ((4, 4), (4,), (4,)), "aten.addr"),
    "kron": (torch.kron, ((2, 2), (2, 2)), "aten.kron"),
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y), ((4, 4), (4, 4)), "aten.bmm"),
    "linear": (F.linear, ((4, 4), (4, 4)), "aten.mm"),
    "cov": (torch.cov, ((4, 4),), "aten.mm"),
    "conv1d": (F.conv1d, ((1, 2, 4), (3, 2, 2)), "aten.conv1d"),
    "conv1d, padded": (lambda x, w: F.conv1d(x, w, padding="same"), ((1, 2, 4), (3, 2, 3)), "aten.conv1d"),
    "conv2d": (F.conv2d, ((1, 2, 4, 4), (3, 2, 2, 2)), "aten.conv2d"),
    "conv3d": (F.conv3d, ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2)), "aten.conv3d"),
    "conv_transpose1d": (F.conv_transpose1d, ((1, 2, 4), (2, 3, 2)), "aten.conv_transpose1d"),
    "conv_transpose2d": (F.conv_transpose2d, ((1, 2, 4, 4), (2, 3, 2, 2)), "aten.conv_transpose2d"),
    "conv_transpose3d": (F.conv_transpose3d, ((1, 2, 4, 4, 4), (2, 3, 2, 2, 2)), "aten.conv_transpose3d"),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1),
        ((1, 2, 4), (3, 2, 2)),
        "aten.convolution",
    ),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_products_of_complex_numbers_are_refused(name: str) -> None:
    function, shapes, operator = COMPLEX[name]
    message = refused(function, *[complex_numbers(*shape) for shape in shapes])
    assert message == f"{operator} in '' multiplies torch.complex64 numbers"


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex128])
@pytest.mark.parametrize("name", ["mm", "outer", "conv2d", "conv_transpose1d"])
def test_products_of_other_complex_numbers_are_refused(name: str, dtype: torch.dtype) -> None:
    function, shapes, operator = COMPLEX[name]
    arguments = [complex_numbers(*shape).to(dtype).requires_grad_() for shape in shapes]
    assert refused(function, *arguments) == f"{operator} in '' multiplies {dtype} numbers"


def test_real_parts_of_complex_numbers_are_rounded_in_a_convolution() -> None:
    x, w = (dyadic(*shape, seed=i) for i, shape in enumerate(((1, 2, 4), (3, 2, 2))))

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        z = F.conv1d(torch.complex(x, x).real, w)
        return torch.complex(z, z)

    y = torch.compile(convolve, backend="fpsim_eager", options={"format": "e4m2"})(x, w)
    assert torch.equal(y.real, F.conv1d(fpsim.round(x, "e4m2"), fpsim.round(w, "e4m2"))) and torch.equal(y.real, y.imag)


# -- covariances -------------------------------------------------------------------------------------------------------

#: Eight observations of integers, so that means are exact.
ROWS = dyadic(3, 8, seed=5, unit=1.0)
TIMES, WEIGHTS = torch.tensor([1, 0, 2, 1, 1, 1, 1, 1]), torch.tensor([1.0, 2, 1, 1, 0, 1, 1, 1])


def covariance_by_hand(x: Tensor, correction: float, weights: Tensor, divisor: float) -> Tensor:
    centred = x - (x * weights).sum(1, keepdim=True) / weights.sum()
    return fpsim.round(centred, "e4m2") @ fpsim.round(centred * weights, "e4m2").T / divisor


def test_the_product_of_a_covariance_is_rounded() -> None:
    for call, weights, divisor in (
        (lambda x: torch.cov(x), torch.ones(8), 7.0),
        (lambda x: x.cov(correction=0), torch.ones(8), 8.0),
        (lambda x: torch.cov(x, fweights=TIMES), TIMES, 7.0),
        (lambda x: torch.cov(x, aweights=WEIGHTS), WEIGHTS, 8 - 10 / 8),
        (lambda x: torch.cov(x, fweights=TIMES, aweights=WEIGHTS, correction=0), TIMES * WEIGHTS, 7.0),
    ):
        y = torch.compile(call, backend="fpsim_eager", options={"format": "e4m2"}, fullgraph=True)(ROWS)
        torch.testing.assert_close(y, covariance_by_hand(ROWS, 1, weights, divisor), rtol=1e-6, atol=0)
        torch._dynamo.reset()


def test_the_product_of_a_correlation_is_rounded() -> None:
    y = torch.compile(torch.corrcoef, backend="fpsim_eager", options={"format": "e4m2"}, fullgraph=True)(ROWS)
    covariance = covariance_by_hand(ROWS, 1, torch.ones(8), 7.0)
    deviations = covariance.diag().sqrt()
    torch.testing.assert_close(y, covariance / deviations[:, None] / deviations, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:cov.*degrees of freedom:UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cov(x[0]),
        lambda x: torch.cov(x, correction=20),  # a divisor below zero
        lambda x: torch.cov(x, fweights=TIMES, aweights=WEIGHTS),
        lambda x: torch.cov(x.long()),
        lambda x: torch.vmap(torch.cov)(x[None]),
    ],
)
def test_covariances_without_rounding_are_those_of_torch(call: Callable) -> None:
    x, y = (ROWS.clone().requires_grad_() for _ in range(2))
    got, want = torch.compile(call, backend="fpsim_eager", options={"format": "e8m23"}, fullgraph=True)(x), call(y)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if want.requires_grad and want.isfinite().all():
        gradients = [torch.autograd.grad(each.sum(), leaf)[0] for each, leaf in ((got, x), (want, y))]
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.cov(x, aweights=-WEIGHTS), "aweights cannot be negative"),
        (lambda x: torch.cov(x, fweights=-TIMES), "fweights cannot be negative"),
        (lambda x: torch.cov(x, aweights=0 * WEIGHTS), "weights sum to zero"),
        (lambda x: torch.cov(x, aweights=WEIGHTS[1:]), "aweights to have"),
        (lambda x: torch.cov(x, fweights=WEIGHTS), "fweights to be integral|fweights to have integral"),
        (lambda x: torch.cov(x[None]), "two or fewer dimensions"),
    ],
)
def test_what_torch_refuses_to_take_a_covariance_of_is_an_error_compiled_too(call: Callable, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(ROWS)
    with pytest.raises(Exception, match=message):
        torch.compile(call, backend="fpsim_eager", fullgraph=True)(ROWS)


WITHOUT_A_PRODUCT = "donot_use_mm_for_euclid_dist"


@pytest.mark.parametrize("rows", [2, 30])  # torch takes Euclidean distances of more than 25 points from a product
@pytest.mark.parametrize(
    ("p", "mode"),
    [
        case(p, mode, in_every_run=mode == WITHOUT_A_PRODUCT or p in (3.0, float("inf")))
        for p in (0.0, 0.5, 1.0, 2.0, 3.0, float("inf"))
        for mode in ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", WITHOUT_A_PRODUCT)
        if p != 2 or mode == WITHOUT_A_PRODUCT
    ],
)
def test_distances_without_a_product_are_computed_as_in_eager_mode(p: float, mode: str, rows: int) -> None:
    def distances(x: Tensor) -> Tensor:
        return torch.cdist(x, 2 * x, p=p, compute_mode=mode)

    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (distances, torch.compile(distances, backend="fpsim_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        results.append((y, gradient))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert fpsim.explain(distances, x.requires_grad_()).gaps == ()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_between_the_rows_of_one_tensor_are_no_product(p: float) -> None:
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.compile(lambda x: F.pdist(x, p), backend="fpsim_eager", fullgraph=True)(x)
    assert torch.equal(y, F.pdist(x, p))
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (y, F.pdist(x, p))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist"])
def test_euclidean_distances_are_refused_unless_the_call_asks_for_no_product(mode: str, rows: int) -> None:
    message = refused(lambda x: torch.cdist(x, x, compute_mode=mode), torch.randn(rows, 3))
    assert "Give torch.cdist compute_mode='donot_use_mm_for_euclid_dist'" in message


def test_flex_attention_is_refused() -> None:
    with torch.no_grad():
        refused(lambda x: flex_attention(*[x[None, None]] * 3), X)


def test_a_body_that_a_policy_exempts_is_left_alone() -> None:
    def steps(x: Tensor) -> Tensor:
        return scan(lambda c, y: (c @ c, y + c), x, X[None])[0] @ x

    options = {"format": "e4m2", "gaps": "higher_order.scan*"}
    y = torch.compile(steps, backend="fpsim_eager", options=options)(X)
    assert torch.equal(y, fpsim.round(X @ X, "e4m2") @ fpsim.round(X, "e4m2"))
