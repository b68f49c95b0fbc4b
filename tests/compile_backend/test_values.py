"""The backend's values, bit for bit, against the same arithmetic written by hand.

All numbers are small dyadic rationals, and so are the rounded ones: every sum of products is exact in float32,
so the order of summation cannot matter and equality means equality. The rounding itself is proven elsewhere.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.shared.models import BACKENDS_OF_A_GRAPH, SMALL_SHAPES, Casts, assert_equal, case, dyadic

BACKENDS = ("fpsim", "fpsim_eager")

#: Formats coarse enough that rounding changes most of the numbers below; all differ.
POLICIES = {
    "hybrid": {},
    "truncated": {"format": "e5m1", "rounding": "toward_zero"},
    "roles": {"activation": "e4m2", "weight": "e3m1", "gradient": "e5m2"},
    "switchback": {
        "activation": "e4m2",
        "weight": "e3m1",
        "gradient": "e5m1",
        "wgrad": {"activation": "bf16", "gradient": "bf16"},
    },
    "forward only": {"fprop": "e4m1", "format": "none"},
    "weights only": {"weight": "e2m1fn"},
    "nothing": {"format": "none"},
    "scaled": {"policy": "fp8_hybrid", "scale": "power_of_two"},
    "scaled to fewer bits": {"scale": "power_of_two", "format": "e2m1fn", "gradient": "e4m1:bias=20/toward_zero"},
    "one role scaled": {"activation": "e4m1", "weight": "e3m1", "gradient": "e2m1fn/power_of_two"},
}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 5, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(dyadic(8, 6, seed=1, top=32))
            self.up.bias.copy_(dyadic(8, seed=2, top=32))
            self.down.weight.copy_(dyadic(5, 8, seed=3, top=32))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def mlp_by_hand(model: MLP, x: Tensor, dy: Tensor, casts: Casts) -> dict[str, Tensor]:
    """Forward value and all gradients of the `MLP`, as a chip with rounded operands would compute them."""
    w1, b1, w2 = model.up.weight.detach(), model.up.bias.detach(), model.down.weight.detach()
    h = casts(x, "fprop", "activation") @ casts(w1, "fprop", "weight").T + b1
    a = F.relu(h)
    y = casts(a, "fprop", "activation") @ casts(w2, "fprop", "weight").T
    da = casts(dy, "dgrad", "gradient") @ casts(w2, "dgrad", "weight")
    dh = da * (h > 0)
    return {
        "y": y,
        "x": casts(dh, "dgrad", "gradient") @ casts(w1, "dgrad", "weight"),
        "down.weight": casts(dy, "wgrad", "gradient").T @ casts(a, "wgrad", "activation"),
        "up.weight": casts(dh, "wgrad", "gradient").T @ casts(x, "wgrad", "activation"),
        "up.bias": dh.sum(0),
    }


def run(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward value and all gradients of a compiled model."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # Inductor compiles two policies in every run: one in which all six casts differ, and one with scales.
        case(name, backend, in_every_run=backend == "fpsim_eager" or name in ("switchback", "scaled"))
        for name in POLICIES
        for backend in BACKENDS
    ],
)
def test_linear_layers_compute_what_the_policy_says(name: str, backend: str) -> None:
    options = POLICIES[name]
    model, x, dy = MLP(), dyadic(4, 6, seed=4, top=32), dyadic(4, 5, seed=5, top=8)
    want = mlp_by_hand(model, x, dy, Casts(options))
    got = run(torch.compile(model, backend=backend, options=options), x, dy)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert_equal(got[key], value, f"{name} {key}")


def test_every_role_of_every_product_shows_in_the_values() -> None:
    """Each cast alone changes the numbers that it should, and no others, so that the test above can fail."""
    model, x, dy = MLP(), dyadic(4, 6, seed=4, top=32), dyadic(4, 5, seed=5, top=8)
    plain = mlp_by_hand(model, x, dy, Casts({"format": "none"}))
    touched = {
        ("fprop", "activation"): {"y", "x", "up.weight", "up.bias", "down.weight"},
        ("fprop", "weight"): {"y", "x", "up.weight", "up.bias", "down.weight"},
        ("dgrad", "gradient"): {"x", "up.weight", "up.bias"},
        ("dgrad", "weight"): {"x", "up.weight", "up.bias"},
        ("wgrad", "gradient"): {"up.weight", "down.weight"},
        ("wgrad", "activation"): {"up.weight", "down.weight"},
    }
    for (kind, role), allowed in touched.items():
        result = mlp_by_hand(model, x, dy, Casts({"format": "none", kind: {role: "e3m1"}}))
        changed = {key for key in plain if not torch.equal(plain[key], result[key])}
        assert changed and changed <= allowed, (kind, role, changed)


class Layers(nn.Module):
    """Two equal layers and a head, to tell modules apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
        self.head = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            for seed, layer in enumerate([*self.layers, self.head]):
                layer.weight.copy_(dyadic(*layer.weight.shape, seed=10 + seed, top=8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def layers_by_hand(model: Layers, x: Tensor, dy: Tensor, casts: dict[str, Casts]) -> dict[str, Tensor]:
    names = ["layers.0", "layers.1", "head"]
    weights = [model.get_submodule(name).weight.detach() for name in names]
    inputs, result = [], {}
    for name, w in zip(names, weights, strict=True):
        inputs.append(x)
        x = casts[name](x, "fprop", "activation") @ casts[name](w, "fprop", "weight").T
    result["y"] = x
    for name, w, a in reversed(list(zip(names, weights, inputs, strict=True))):
        result[f"{name}.weight"] = casts[name](dy, "wgrad", "gradient").T @ casts[name](a, "wgrad", "activation")
        dy = casts[name](dy, "dgrad", "gradient") @ casts[name](w, "dgrad", "weight")
    result["x"] = dy
    return result


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_module_rules_hold_in_forward_and_backward(backend: str) -> None:
    inner = {"activation": "e4m2", "weight": "e3m2", "gradient": "e5m1"}
    options = {"format": "e5m2", "modules": {"layers.1": inner}, "skip": ["head"]}
    casts = {"layers.0": Casts({"format": "e5m2"}), "layers.1": Casts(inner), "head": Casts({"format": "none"})}
    model, x, dy = Layers(), dyadic(3, 6, seed=20, top=8), dyadic(3, 4, seed=21, top=4)
    want = layers_by_hand(model, x, dy, casts)
    got = run(torch.compile(model, backend=backend, options=options), x, dy)
    for key, value in want.items():
        assert_equal(got[key], value, key)


class Recomputing(torch.autograd.Function):
    """Three linear layers whose backward, written by hand, computes the forward pass again."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b, c)
        return F.relu(F.relu(x @ a) @ b) @ c

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, a, b, c = ctx.saved_tensors
        first = F.relu(x @ a)
        second = F.relu(first @ b)
        dsecond = (dy @ c.T) * (second > 0)
        dfirst = (dsecond @ b.T) * (first > 0)
        return dfirst @ a.T, x.T @ dfirst, first.T @ dsecond, second.T @ dy


def recomputing_by_hand(x: Tensor, a: Tensor, b: Tensor, c: Tensor, dy: Tensor, casts: Casts) -> dict[str, Tensor]:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return casts(x, "fprop", "activation") @ casts(w, "fprop", "weight")

    def dgrad(dy: Tensor, w: Tensor) -> Tensor:
        return casts(dy, "dgrad", "gradient") @ casts(w, "dgrad", "weight").T

    def wgrad(x: Tensor, dy: Tensor) -> Tensor:
        return casts(x, "wgrad", "activation").T @ casts(dy, "wgrad", "gradient")

    first = F.relu(forward(x, a))
    second = F.relu(forward(first, b))
    dsecond = dgrad(dy, c) * (second > 0)
    dfirst = dgrad(dsecond, b) * (first > 0)
    gradients = {"a": wgrad(x, dfirst), "b": wgrad(first, dsecond), "c": wgrad(second, dy)}
    return {"y": forward(second, c), "x": dgrad(dfirst, a), **gradients}


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_forward_code_that_runs_in_backward_is_rounded_as_forward_code(backend: str) -> None:
    """A product belongs to backward if it depends on an incoming gradient, not if it was traced in backward."""
    options = {
        "activation": "e4m2",
        "weight": "e3m1",
        "gradient": "e5m1",
        "dgrad": {"weight": "e4m1/toward_zero"},
        "wgrad": {"activation": "e4m3", "gradient": "e5m2"},
        "overflow": "sat_finite",
    }
    x, dy = dyadic(4, 6, seed=70), dyadic(4, 5, seed=71, top=8)
    weights = [dyadic(*shape, seed=72 + i) for i, shape in enumerate([(6, 8), (8, 7), (7, 5)])]
    want = recomputing_by_hand(x, *weights, dy, Casts(options))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = map(nn.Parameter, weights)

        def forward(self, x: Tensor) -> Tensor:
            return Recomputing.apply(x, self.a, self.b, self.c)

    got = run(torch.compile(Model(), backend=backend, options=options), x, dy)
    for key, value in want.items():
        assert_equal(got[key], value, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_rounded_where_the_policy_says_output(backend: str) -> None:
    options = {"format": "e4m2", "output": "e5m1/toward_zero"}
    model, x, dy = nn.Linear(6, 4), dyadic(3, 6, seed=30, top=32), dyadic(3, 4, seed=31, top=32)
    with torch.no_grad():
        model.weight.copy_(dyadic(4, 6, seed=32, top=32))
        model.bias.copy_(dyadic(4, seed=33, top=32))
    q = Casts({"format": "e4m2"})
    out = Casts({"format": "e5m1", "rounding": "toward_zero"})
    w, b = model.weight.detach(), model.bias.detach()
    want = {
        "y": out(q(x, "fprop", "activation") @ q(w, "fprop", "weight").T + b, "fprop", "activation"),
        "x": out(q(dy, "dgrad", "gradient") @ q(w, "dgrad", "weight"), "fprop", "activation"),
        "weight": out(q(dy, "wgrad", "gradient").T @ q(x, "wgrad", "activation"), "fprop", "activation"),
        "bias": dy.sum(0),
    }
    got = run(torch.compile(model, backend=backend, options=options), x, dy)
    for key, value in want.items():
        assert_equal(got[key], value, key)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, casts: Casts) -> dict[str, Tensor]:
    """Scaled dot-product attention and its gradients, every inner product with rounded operands.

    As in torch's math kernel, q and k are each scaled by the square root of the scale before their product.
    """
    root = (1 / q.shape[-1] ** 0.5) ** 0.5
    activation = ("fprop", "activation")
    qs, ks = q * root, k * root
    s = casts(qs, *activation) @ casts(ks, *activation).mT
    p = torch.softmax(s, -1)
    y = casts(p, *activation) @ casts(v, *activation)
    dp = casts(dy, "dgrad", "gradient") @ casts(v, "dgrad", "activation").mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return {
        "y": y,
        "q": casts(ds, "dgrad", "gradient") @ casts(ks, "dgrad", "activation") * root,
        "k": casts(ds, "dgrad", "gradient").mT @ casts(qs, "dgrad", "activation") * root,
        "v": casts(p, "dgrad", "activation").mT @ casts(dy, "dgrad", "gradient"),
    }


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        *(("sdpa", backend) for backend in BACKENDS),
        ("written out", "fpsim_eager"),
        case("written out", "fpsim", in_every_run=False),
    ],
)
def test_the_inner_products_of_attention_are_rounded(form: str, backend: str) -> None:
    """With k = 0 the softmax is exactly 1/4 everywhere, so that attention is exact too."""
    options = {"activation": "e4m1", "weight": "e2m1fn", "gradient": "e5m1"}
    shape = (2, 3, 4, 16)  # scale 1/4, so that its root is exact too
    q, v, dy = dyadic(*shape, seed=40, top=32), dyadic(*shape, seed=41, top=32), dyadic(*shape, seed=42, top=32)
    k = torch.zeros(shape)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax((q * 0.5) @ (k * 0.5).mT, -1) @ v

    want = attention_by_hand(q, k, v, dy, Casts(options))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    y = torch.compile(attention, backend=backend, options=options)(*inputs)
    y.backward(dy)
    got = {"y": y.detach(), **{name: t.grad for name, t in zip("qkv", inputs, strict=True)}}
    assert want["k"].any() and not torch.equal(
        want["v"], attention_by_hand(q, k, v, dy, Casts({"format": "none"}))["v"]
    )
    for key, value in want.items():
        assert_equal(got[key], value, f"{form} {key}")


PRODUCTS = {
    "matmul": (lambda a, b: a @ b, (3, 5), (5, 4)),
    "bmm": (torch.bmm, (2, 3, 5), (2, 5, 4)),
    "broadcast matmul": (torch.matmul, (2, 2, 3, 5), (5, 4)),
    "matrix times vector": (lambda a, b: a @ b, (3, 5), (5,)),
    "vector times matrix": (lambda a, b: a @ b, (5,), (5, 3)),
    "dot": (torch.dot, (5,), (5,)),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->bij", a, b), (2, 3, 5), (2, 5, 4)),
    "einsum with a contraction over two axes": (lambda a, b: torch.einsum("ikl,klj->ij", a, b), (3, 2, 5), (2, 5, 4)),
    "outer product by einsum": (lambda a, b: torch.einsum("i,j->ij", a, b), (3,), (4,)),
    "linear": (F.linear, (2, 3, 5), (4, 5)),
}


def exact_product(fn, a: Tensor, b: Tensor, dy: Tensor, casts: Casts, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of a bilinear ``fn`` of rounded operands. ``role`` is that of ``b``."""
    of_b = "wgrad" if role == "weight" else "dgrad"
    y = fn(casts(a, "fprop", "activation"), casts(b, "fprop", role))
    da = torch.func.vjp(lambda t: fn(t, casts(b, "dgrad", role)), a)[1](casts(dy, "dgrad", "gradient"))[0]
    db = torch.func.vjp(lambda t: fn(casts(a, of_b, "activation"), t), b)[1](casts(dy, of_b, "gradient"))[0]
    return y, da, db


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # Inductor compiles three kinds in every run: a product of matrices, one that is taken apart, and a batch.
        case(
            name, backend, in_every_run=backend == "fpsim_eager" or name in ("linear", "matrix times vector", "einsum")
        )
        for name in PRODUCTS
        for backend in BACKENDS
    ],
)
def test_all_ways_to_write_a_matrix_product(name: str, backend: str) -> None:
    options = {"activation": "e4m2", "gradient": "e5m1", "weight": "e2m1fn"}
    fn, shape_a, shape_b = PRODUCTS[name]
    a, b = dyadic(*shape_a, seed=50, top=32), dyadic(*shape_b, seed=51, top=32)
    dy = dyadic(*fn(a, b).shape, seed=52, top=32)
    want = exact_product(fn, a, b, dy, Casts(options), "weight" if name == "linear" else "activation")
    a, b = a.requires_grad_(), b.requires_grad_()
    y = torch.compile(fn, backend=backend, options=options)(a, b)
    y.backward(dy)
    for got, value, what in zip((y.detach(), a.grad, b.grad), want, ("value", "da", "db"), strict=True):
        assert_equal(got, value, f"{name}: {what}")


@pytest.mark.parametrize(("m", "n", "k"), SMALL_SHAPES)
def test_no_shape_is_too_small_to_be_rounded(m: int, n: int, k: int) -> None:
    """Inductor turns small products into multiply-and-sum before any pass sees them, in backward as well."""
    options = {"activation": "e4m2", "weight": "e3m1", "gradient": "e5m1"}
    model = nn.Linear(k, n)
    with torch.no_grad():
        model.weight.copy_(dyadic(n, k, seed=60, top=32))
        model.bias.copy_(dyadic(n, seed=61, top=32))
    x, dy, casts = dyadic(m, k, seed=62, top=32), dyadic(m, n, seed=63, top=32), Casts(options)
    w, b = model.weight.detach(), model.bias.detach()
    want = {
        "y": casts(x, "fprop", "activation") @ casts(w, "fprop", "weight").T + b,
        "x": casts(dy, "dgrad", "gradient") @ casts(w, "dgrad", "weight"),
        "weight": casts(dy, "wgrad", "gradient").T @ casts(x, "wgrad", "activation"),
        "bias": dy.sum(0),
    }
    got = run(torch.compile(model, backend="fpsim_eager", options=options, dynamic=False), x, dy)
    for key, value in want.items():
        assert_equal(got[key], value, f"{m}x{k} @ {k}x{n}: {key}")
