"""Models whose policy computes attention in tiles: values, gradients, plans, audits and profiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fpsim
from fpsim import FlashAttention
from fpsim.compile_backend.functional import functional
from fpsim.compile_backend.passes import flash

TILES = {"preset": "flash2_bf16", "block_q": 4, "block_k": 4}
X = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention of two heads of queries. It gives `scaled_dot_product_attention` other arguments on demand."""

    def __init__(self, heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.attend = F.scaled_dot_product_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, 2), (k, self.heads), (v, self.heads)))
        return self.attend(q, k, v, **self.options).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8 * attention.heads)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.q(x), *self.kv(x).chunk(2, -1))


def step(model: nn.Module, x: Tensor = X, backend: str = "fpsim_eager", **policy: Any) -> list[Tensor]:
    """The result of a model, and the gradients of its parameters; without a policy it is not compiled."""
    model.zero_grad(set_to_none=True)
    run = torch.compile(model, backend=backend, options=policy, fullgraph=True) if policy else model
    result = run(x)
    (result * torch.linspace(-1, 1, result.numel()).reshape(result.shape)).sum().backward()
    return [result.detach(), *(p.grad for p in model.parameters())]


def by_hand(model: Model, steps: Any, **more: Any) -> list[Tensor]:
    """`step` with `fpsim.flash_attention` in place of torch's."""
    model.attention.attend = lambda *args, **options: fpsim.flash_attention(*args, **options, steps=steps, **more)
    result = step(model)
    model.attention.attend = F.scaled_dot_product_attention
    return result


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert torch.equal(got[0], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):  # sums of linear layers may have another order
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


MASK = torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) < 0.7
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "a mask of booleans": {"attn_mask": MASK},
    "a mask of numbers": {"attn_mask": torch.where(MASK, 0.5, -torch.inf)},
    "grouped queries": {"enable_gqa": True, "heads": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_policy_replaces_torch_s_attention(name: str) -> None:
    model = Model(Attention(**OPTIONS[name]))
    got = step(model, format="none", attention=TILES)
    assert_same(got, by_hand(model, TILES))
    assert not torch.equal(got[0], step(model)[0])


def test_autocast_gives_attention_its_dtype() -> None:
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 5), 0.3)
    wanted = fpsim.flash_attention(*[q.bfloat16()] * 3, mask.bfloat16(), steps=TILES)
    call = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        backend="fpsim_eager",
        options={"format": "none", "attention": TILES},
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = call(q, q.bfloat16(), q)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)


def test_products_outside_are_rounded_by_the_policy_and_those_inside_by_the_steps() -> None:
    model = Model(Attention(is_causal=True))
    got = step(model, format="e4m3fn", output="bf16", elementwise="bf16", attention="flash")
    with torch.no_grad():

        def linear(layer: nn.Linear) -> Tensor:
            product = fpsim.round(X, "e4m3fn") @ fpsim.round(layer.weight, "e4m3fn").T + layer.bias
            return fpsim.round(product, "bf16")

        wanted = model.attention(linear(model.q), *linear(model.kv).chunk(2, -1))
        model.attention.attend = fpsim.flash_attention
        wanted = model.attention(linear(model.q), *linear(model.kv).chunk(2, -1))
    assert torch.equal(got[0], wanted)


def test_compiled_bits_are_those_of_the_interpreter_and_no_operator_is_left() -> None:
    model = Model(Attention(is_causal=True))
    steps = {**TILES, "block_q": 6, "block_k": 6, "output": "bf16/stochastic"}
    torch.manual_seed(3)
    wanted = step(model, format="none", attention=steps)
    torch.manual_seed(3)
    got, codes = run_and_get_code(lambda: step(model, backend="fpsim", format="none", attention=steps))
    assert_same(got, wanted)
    assert len(codes) == 2 and all("bmm" in code and "fpsim.flash_attention" not in code for code in codes)


def test_a_call_of_many_blocks_or_of_any_size_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Attention(is_causal=True))
    wanted = by_hand(model, TILES)
    policy = fpsim.Policy(format="none", attention=TILES)
    any_size = torch.compile(model, backend="fpsim_eager", options={"policy": policy}, dynamic=True)
    assert torch.equal(any_size(X), wanted[0]) and any_size(X[:, :7]).shape == (2, 7, 8)
    monkeypatch.setattr(flash, "MOST_BLOCKS", 2)
    with torch.no_grad():
        got, codes = run_and_get_code(lambda: torch.compile(model, backend="fpsim", options={"policy": policy})(X))
    assert torch.equal(got, wanted[0]) and "fpsim.flash_attention" in codes[0]


@pytest.mark.parametrize(("length", "width", "left"), [(6, 80, 0), (80, 6, 1)])
def test_the_number_of_keys_decides_whether_inductor_gets_the_operations(length: int, width: int, left: int) -> None:
    """With blocks of 2, 6 keys are few and 80 are many: also in tensors of three axes."""
    x = torch.randn(2, length, width)
    steps = {**TILES, "block_q": 2, "block_k": 2}
    traced = make_fx(lambda x: fpsim.flash_attention(x, x, x, steps=steps), tracing_mode="fake")(x)
    assert len(flash.find_flash(traced.graph)) == 1
    flash.Expansion()(traced.graph)
    assert len(flash.find_flash(traced.graph)) == left


class Two(nn.Module):
    def __init__(self, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention(is_causal=True)
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, x, x, use_reentrant=False) if self.is_checkpointed else self.first(x, x, x)
        return self.second(x, x, x)


def test_modules_may_differ_and_skipped_ones_stay_fused() -> None:
    def expected(first: Any, second: Any) -> Tensor:
        return second(first(X.unflatten(-1, (2, -1)).transpose(1, 2)), True).transpose(1, 2).flatten(2)

    def tiled(name: str) -> Any:
        return lambda x, causal=False: fpsim.flash_attention(x, x, x, is_causal=causal, steps=name)

    def fused(x: Tensor, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal)

    def run(**policy: Any) -> Tensor:
        return torch.compile(Two(), backend="fpsim_eager", options=policy)(X)

    both = run(format="none", attention="all_bf16", modules={"second": {"format": "none", "attention": "flash"}})
    assert torch.equal(both, expected(tiled("all_bf16"), tiled("flash2_bf16")))
    assert torch.equal(run(format="none", attention="flash", skip="first"), expected(fused, tiled("flash")))
    kept = run(format="none", attention="keep", modules={"first": {"format": "none", "attention": "flash2_fp16"}})
    assert torch.equal(kept, expected(tiled("flash2_fp16"), fused))
    plan = fpsim.explain(Two(), X, policy={"format": "none", "attention": "flash", "skip": "first"})
    assert {site.path for site in plan.sites} == {"second"}
    assert [(gap.path, gap.reason) for gap in plan.gaps] == [("first", "left unrounded by the policy")]


def test_a_checkpointed_module_computes_the_same_again() -> None:
    def gradient(model: nn.Module, attention: Any) -> Tensor:
        x = X.clone().requires_grad_()
        options = {"format": "none", "attention": attention}
        torch.compile(model, backend="fpsim_eager", options=options)(x).sum().backward()
        return x.grad

    assert torch.equal(gradient(Two(True), TILES), gradient(Two(), TILES))
    with pytest.raises(Exception, match="attention in 'first' rounds stochastically in tiles, and its module is check"):
        gradient(Two(True), {"output": "bf16/stochastic"})


def test_stochastic_steps_are_reproducible_and_fair() -> None:
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = fpsim.flash_attention(q, q, q, steps={})
    steps = FlashAttention(output="e8m2/stochastic")
    many = fpsim.flash_attention(*[q.expand(2000, -1, -1, -1)] * 3, steps=steps, seed=0)
    assert ((many.mean(0) - exact[0]).abs() < exact[0].abs() * 2.0**-2 / 2 * 4.5 / 2000**0.5).all()  # standard errors
    assert torch.equal(*(fpsim.flash_attention(q, q, q, steps=steps, seed=5) for _ in range(2)))
    model = Model(Attention())
    assert_same(by_hand(model, steps, seed=7), by_hand(model, steps, seed=7))
    assert not torch.equal(by_hand(model, steps, seed=7)[0], by_hand(model, steps, seed=8)[0])


def test_backward_sees_the_scores_that_forward_has_rounded() -> None:
    """With one key the exponential of the score minus its own logarithm is 1, if both passes draw the same score."""
    q, k, v = (torch.randn(64, 1, 3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    steps = {"inputs": "e5m3/stochastic", "scores": "e8m2/stochastic"}
    fpsim.flash_attention(q, k, v, steps=steps, seed=1).sum().backward()
    assert torch.equal(v.grad, torch.ones_like(v))


def test_explain_lists_every_step_by_module() -> None:
    plan = fpsim.explain(Model(Attention()), X, policy={"format": "none", "attention": "flash3_fp8"})
    sites = [site for site in plan.sites if site.operator == "fpsim.flash_attention"]
    assert {site.path for site in sites} == {"attention"} and not plan.gaps
    assert Counter((site.step, site.role) for site in sites) == {
        ("fprop", "activation"): 4, ("forward", "scores"): 1, ("forward", "exponentials"): 1, ("forward", "sums"): 1,
        ("forward", "accumulator"): 1, ("forward", "output"): 1, ("backward", "delta"): 1, ("dgrad", "activation"): 6,
        ("dgrad", "gradient"): 4, ("backward", "scores"): 1, ("backward", "exponentials"): 1,
        ("backward", "accumulator"): 1, ("backward", "output"): 1,
    }  # fmt: skip
    texts = {(site.step, site.role, site.cast.written) for site in sites}
    assert ("fprop", "activation", "e4m3fn/nearest_even/sat_finite/block:128x256:fp32") in texts
    assert ("dgrad", "activation", "bf16/nearest_even/ovf_inf") in texts
    assert {site.shape for site in sites} == {(2, 2, 10, 4), (2, 2, 10, 10), (2, 2, 10)}
    summed = fpsim.explain(
        Model(Attention()), X, policy={"format": "none", "attention": {**TILES, "products": "fp32 chunk=16"}}
    )
    products = Counter((each.path, each.kind) for each in summed.sums)
    assert products == {("attention", "fprop"): 2, ("attention", "dgrad"): 5}


def test_audit_finds_no_escape() -> None:
    audit = fpsim.audit(
        torch.compile(Model(Attention()), backend="fpsim_eager", options={"format": "bf16", "attention": TILES}), X
    )
    assert audit.escaped == () and audit.compared
    assert audit.covered == 2 + 2 + 2  # two linear layers, the gradients of their weights, attention and its gradient


def test_profile_measures_every_step() -> None:
    q = fpsim.round(torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0)), "bf16").requires_grad_()
    model = Attention()
    run = lambda x: model.attend(x, x, x)  # noqa: E731
    profile = fpsim.profile(run, q, policy={"format": "none", "attention": {**TILES, "scores": "bf16"}})
    found = {(site.step, site.role): site.statistics for site in profile.sites}
    scores = (q @ q.mT).detach()
    first = fpsim.round(scores, "bf16") * 0.5
    assert found["forward", "scores"].elements == 2 * 36  # the product, and its multiple
    assert found["forward", "scores"].amax == float(scores.abs().max())
    assert float(first.abs().max()) < float(scores.abs().max())
    assert found["forward", "output"].elements == 24 and found["backward", "delta"].elements == 6
    assert found["fprop", "activation"].elements in (24, 36)


def test_a_loss_in_functional_form_has_the_derivative_of_exact_attention() -> None:
    model = Model(Attention(is_causal=True))
    call = functional(model, fpsim.Policy(format="none", attention=TILES))
    state = {name: p.detach() for name, p in model.named_parameters()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        return call(state, (X,), {}).square().sum()

    value = call(state, (X,), {})
    assert torch.equal(value, step(model, format="none", attention=TILES)[0])

    def exact(state: dict[str, Tensor]) -> Tensor:
        result = torch.func.functional_call(model, state, (X,))
        return (result * (2 * value - result.detach() * 0)).sum()  # the derivative of a square at the rounded value

    wanted = torch.func.grad(exact)(state)
    for name, gradient in torch.func.grad(loss)(state).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_examples_of_vmap_are_those_of_a_loop() -> None:
    q, k, v = (torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(4)) < 0.7
    call = lambda q, k, v, mask: fpsim.flash_attention(q, k, v, mask, steps=TILES)  # noqa: E731
    together = torch.vmap(call, in_dims=(0, 0, None, 0))(q, k, v[0], mask)
    assert torch.equal(together, torch.stack([call(q[i], k[i], v[0], mask[i]) for i in range(3)]))


Q = torch.zeros(2, 3, 4)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("simulates no dropout, got dropout_p=0.1: set it to 0", {"dropout_p": 0.1}),
    ("takes a mask or is_causal=True, not both", {"attn_mask": torch.ones(3, 3), "is_causal": True}),
    ("gives a mask no gradient, and attn_mask needs one: detach it", {"attn_mask": torch.zeros(3, 3).requires_grad_()}),
    ("attn_mask of shape \\(4, 3\\) does not broadcast to \\(2, 3, 3\\)", {"attn_mask": torch.zeros(4, 3)}),
    ("query, key and value have one dtype, got torch.float32 and torch.float64", {"value": Q.double()}),
    ("query and key share E, and key and value share their length", {"key": torch.zeros(2, 3, 5)}),
    ("enable_gqa needs heads that divide those of the query, got 3 and 2",
        {"key": torch.zeros(3, 3, 4), "enable_gqa": True}),
    ("takes tensors of shape \\(..., L, E\\), got \\(4,\\)", {"value": torch.zeros(4)}),
    ("a seed has no meaning without stochastic rounding", {"seed": 1}),
    ("needs a seed", {"steps": {"output": "bf16/stochastic"}}),
    ("reductions='e8m7/nearest_even/ovf_inf' adds numbers of float32, and the tensors are float64",
        {"query": Q.double(), "key": Q.double(), "value": Q.double(), "steps": {"reductions": "bf16"}}),
    ("e8m30 has values that torch.float32 lacks", {"steps": {"arithmetic": "e8m30"}}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "options"), WRONG, ids=[message for message, _ in WRONG])
def test_wrong_arguments_are_refused_in_words(message: str, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fpsim.flash_attention(**{"query": Q, "key": Q, "value": Q, **options})


def test_a_model_with_dropout_is_refused_when_it_is_compiled() -> None:
    model = Model(Attention(dropout_p=0.5))
    with pytest.raises(Exception, match=r"tiled attention simulates no dropout, got dropout_p=0\.5"):
        step(model, format="none", attention="flash")


def test_attention_has_no_second_derivative() -> None:
    q = torch.randn(1, 3, 2, requires_grad=True)
    (first,) = torch.autograd.grad(fpsim.flash_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: use attention='round'"):
        first.sum().backward()
