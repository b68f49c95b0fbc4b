"""Inductor's generated code for rounded graphs, and the settings that compiling leaves unchanged."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel

import fpsim
from fpsim.compile_backend import UnroundedError

BACKENDS = ("fpsim", "fpsim_eager")


class LlamaBlock(nn.Module):
    """A layer of a Llama: norms, grouped-query causal attention, and a gated MLP."""

    def __init__(self, width: int = 32, head: int = 8) -> None:
        super().__init__()
        self.head = head
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (project(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for project in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


LINEARS = sum(isinstance(module, nn.Linear) for module in LlamaBlock().modules())
PASSES = (1, 2)  #: products of a linear layer forward and backward (the weight of the norm needs the first dgrad)
ATTENTION_PRODUCTS = (2, 4)


@functools.cache
def code_of_a_step(backend: str, *, opened: bool = False, **options: str) -> tuple[str, str]:
    """The code that is generated for a `LlamaBlock`, forward and backward; ``opened``: with attention decomposed."""
    model, x = LlamaBlock(), torch.randn(2, 16, 32)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH) if opened else contextlib.nullcontext():
            torch.compile(model, backend=backend, options=options or None)(x).sum().backward()

    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        _, (forward, backward) = run_and_get_code(step)
    assert "primals_1" in forward and "tangents_1" in backward
    return forward, backward


def launches(code: str) -> list[str]:
    """The names of the kernels that generated code calls, one for each call."""
    return re.findall(r"^\s+(cpp_fused\w*)\(", code, re.MULTILINE)


def products(code: str) -> int:
    return len(re.findall(r"extern_kernels\.(?:add)?b?mm\(", code))


def without_comments(code: str) -> str:
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))


#: The kernels of the code are not compiled: only its text is looked at.
only_code = pytest.mark.usefixtures("kernels_left_out")


# -- the code of a transformer layer -----------------------------------------------------------------------------------


@only_code
def test_rounding_is_compiled_and_not_called() -> None:
    for code in code_of_a_step("fpsim"):
        assert "fpsim" not in without_comments(code)
        assert any("round" in name for name in launches(code))


@only_code
def test_attention_is_opened_forward_and_backward() -> None:
    for code, inner, passes in zip(code_of_a_step("fpsim"), ATTENTION_PRODUCTS, PASSES, strict=True):
        assert not re.search(r"scaled_dot_product|flash", code)
        assert products(code) == passes * LINEARS + inner


@only_code
def test_attention_that_is_kept_is_called_fused() -> None:
    for code, passes in zip(code_of_a_step("fpsim", policy="fp8_hybrid", attention="keep"), PASSES, strict=True):
        assert re.search(r"torch\.ops\.aten\._scaled_dot_product\w+\.default\(", code)
        assert products(code) == passes * LINEARS


@only_code
def test_rounding_joins_the_kernels_that_are_there() -> None:
    """Only values from outside need separate kernels: weights in both passes, and the incoming gradient."""
    rounded, plain = code_of_a_step("fpsim"), code_of_a_step("inductor", opened=True)
    assert not any("round" in name for code in plain for name in launches(code))
    assert len(launches(rounded[0])) <= len(launches(plain[0])) + LINEARS
    assert len(launches(rounded[1])) <= len(launches(plain[1])) + LINEARS + 1
    assert [products(code) for code in rounded] == [products(code) for code in plain]


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers)


def elements_kept_for_backward(model: nn.Module, x: Tensor, backend: str) -> int:
    """How many numbers the compiled forward pass of ``model`` keeps for its backward, without parameters."""
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = torch.compile(model, backend=backend)(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert y.requires_grad and kept.keys() & parameters
    return sum(n for pointer, n in kept.items() if pointer not in parameters)


@only_code
@pytest.mark.parametrize(("build", "shape"), [(LlamaBlock, (2, 16, 32)), (convolutions, (2, 3, 12, 12))])
def test_backward_keeps_no_more_than_without_rounding(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain, rounded = (elements_kept_for_backward(build(), torch.randn(shape), name) for name in ("inductor", "fpsim"))
    assert rounded <= plain


@only_code
def test_where_nothing_is_rounded_the_code_is_that_of_plain_inductor() -> None:
    nothing_rounded = code_of_a_step("fpsim", format="none", attention="keep")
    for ours, plain in zip(nothing_rounded, code_of_a_step("inductor"), strict=True):
        assert launches(ours) == launches(plain) and products(ours) == products(plain)


@only_code
def test_a_policy_for_forward_leaves_the_backward_code_unrounded() -> None:
    forward, backward = code_of_a_step("fpsim", format="none", fprop="e4m3fn")
    assert "round" in str(launches(forward)) and "round" not in str(launches(backward))


@only_code
def test_no_unrounded_copy_of_an_activation_is_written() -> None:
    """Activation and rounding are one kernel. Only the two rounded operands and the product are allocated."""
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    compiled = torch.compile(lambda x, w: torch.relu(x) @ w, backend="fpsim")
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        _, (code,) = run_and_get_code(compiled, x, w)
    assert any({"relu", "round"} <= set(name.split("_")) for name in launches(code))
    assert len(launches(code)) <= 2
    assert len(re.findall(r"= empty_strided_cpu\(", code)) == 3


# -- passes of the user ------------------------------------------------------------------------------------------------


def sine_to_cosine(graph: fx.Graph) -> None:
    """A pass of the user that changes values. It must run before the roundings are inserted."""
    assert not any("fpsim" in str(node.target) for node in graph.nodes)
    for node in graph.nodes:
        if node.target is torch.ops.aten.sin.default:
            node.target = torch.ops.aten.cos.default


class SineToCosine(CustomGraphPass):
    def __init__(self, key: str = "sine to cosine") -> None:
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        sine_to_cosine(graph)

    def uuid(self) -> str:
        return self.key


def nothing(graph: fx.Graph) -> None:
    pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("users", [sine_to_cosine, SineToCosine(), [nothing, sine_to_cosine], (SineToCosine(),)])
def test_the_users_own_pass_runs_before_the_rounding(users: Any, backend: str) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    with inductor_config.patch(joint_custom_pre_pass=users):
        y = torch.compile(lambda x, w: torch.sin(x) @ w, backend=backend, options={"format": "e2m1fn"})(x, w)
        assert inductor_config.joint_custom_pre_pass is users
    assert torch.equal(y, fpsim.round(torch.cos(x), "e2m1fn") @ fpsim.round(w, "e2m1fn"))


@only_code
def test_the_users_own_pass_is_in_the_cache_key() -> None:
    def caches(users: Any) -> tuple[int, int, int]:
        torch._dynamo.reset()
        counters.clear()
        with inductor_config.patch(joint_custom_pre_pass=users):
            torch.compile(torch.mm, backend="fpsim")(torch.randn(4, 8), torch.randn(8, 8))
        found = counters["aot_autograd"]
        return tuple(found[f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass"))  # type: ignore[return-value]

    miss, hit, bypass = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    with fresh_cache():
        assert caches(None) == miss
        assert caches(SineToCosine("one")) == miss
        assert caches(SineToCosine("two")) == miss
        assert caches(SineToCosine("one")) == hit
        assert caches([SineToCosine("one"), SineToCosine("two")]) == miss
        assert caches(None) == hit
        assert caches(nothing) == bypass  # a pass without a key: nothing is cached
        assert caches([SineToCosine("one"), nothing]) == bypass


# -- what stays as it was ----------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """All settings of Inductor, AOTAutograd and attention."""
    kernels = [name for name in dir(torch.backends.cuda) if name.endswith("_sdp_enabled")]
    return {
        "inductor": inductor_config.get_config_copy(),
        "functorch": functorch_config.get_config_copy(),
        "attention": {name: getattr(torch.backends.cuda, name)() for name in kernels},
    }


@contextlib.contextmanager
def unchanged(current: Callable[[], dict[str, Any]]) -> Iterator[None]:
    before = current()
    yield
    after = current()
    for group, values in before.items():
        assert {name for name in values if values[name] != after[group][name]} == set(), group


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", ["round", "keep"])
@only_code
def test_compiling_leaves_the_settings_of_the_process_as_they_were(backend: str, attention: str) -> None:
    with unchanged(settings):
        y = torch.compile(LlamaBlock(), backend=backend, options={"policy": "fp8_hybrid", "attention": attention})(
            torch.randn(2, 16, 32)
        )
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refusal_leaves_the_settings_of_the_process_as_they_were(backend: str) -> None:
    with unchanged(settings), pytest.raises(Exception) as caught:
        torch.compile(lambda x: torch.cdist(x, x), backend=backend)(torch.randn(5, 3))
    assert isinstance(caught.value.inner_exception, UnroundedError)


def test_looking_leaves_the_settings_of_the_process_as_they_were() -> None:
    with unchanged(settings):
        fpsim.explain(nn.Linear(8, 8), torch.randn(4, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_dynamo_only_the_recompile_limit_is_set_and_made_an_error(backend: str) -> None:
    with dynamo_config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        before = dynamo_config.get_config_copy()
        torch.compile(nn.Linear(8, 8), backend=backend)(torch.randn(4, 8))
        after = dynamo_config.get_config_copy()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"recompile_limit", "fail_on_recompile_limit_hit"}


def test_plain_inductor_stays_plain_beside_fpsim() -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    q = fpsim.round(x, "e2m1fn") @ fpsim.round(w, "e2m1fn")
    ours, plain = torch.compile(torch.mm, backend="fpsim", options={"format": "e2m1fn"}), torch.compile(torch.mm)
    for _ in range(2):
        assert torch.equal(ours(x, w), q)
        assert torch.equal(plain(x, w), x @ w)
        torch._dynamo.reset()
