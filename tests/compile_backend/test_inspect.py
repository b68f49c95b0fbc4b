"""`explain` lists every site and gap of a model; `audit` finds the products that escape when it runs."""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fpsim
from fpsim.casts import parse_cast
from fpsim.compile_backend import Audit, Escape, Gap, Plan, Site, UnroundedError
from fpsim.compile_backend.torch_settings import TORCH, apply_settings

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 16, 64, 256

LLAMA_LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
GPT2_LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

#: The operands of the products of a linear layer: a product each for fprop, dgrad and wgrad.
LINEAR = Counter(
    {
        ("fprop", "activation"): 1,
        ("fprop", "weight"): 1,
        ("dgrad", "gradient"): 1,
        ("dgrad", "weight"): 1,
        ("wgrad", "gradient"): 1,
        ("wgrad", "activation"): 1,
    }
)
#: Those of attention: two products of activations, each with two derivatives.
ATTENTION = Counter({("fprop", "activation"): 4, ("dgrad", "gradient"): 4, ("dgrad", "activation"): 4})


def llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama with grouped-query attention."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes, **tokens, **changes))


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    """A tiny GPT-2, whose output layer shares the weight of its embedding."""
    sizes = {"n_embd": WIDTH, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False, **sizes, **tokens))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def expected_sites(layer: str, linears: list[str], attention: str, layers: int = 2) -> dict[str, Counter]:
    """Path -> (kind, role) -> number of operands, from the architecture."""
    sites = {"lm_head": LINEAR}
    for i in range(layers):
        sites |= {f"{layer}.{i}.{name}": LINEAR for name in linears} | {f"{layer}.{i}.{attention}": ATTENTION}
    return sites


def counted(plan: Plan) -> dict[str, Counter]:
    """The sites of a plan in the form of `expected_sites`."""
    counts: dict[str, Counter] = {}
    for site in plan.sites:
        counts.setdefault(site.path, Counter())[site.kind, site.role] += 1
    return counts


def total(counts: dict[str, Counter]) -> int:
    return sum(sum(counter.values()) for counter in counts.values())


# -- explain: transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_plan() -> Plan:
    model, x = llama(), tokens()
    return fpsim.explain(model, x, labels=x)


@pytest.fixture(scope="module")
def gpt2_plan() -> Plan:
    model, x = gpt2(), tokens()
    model.loss_type = "ForCausalLM"  # unset, transformers logs a warning in forward, which breaks the graph
    return fpsim.explain(model, x, labels=x)


def test_every_operand_of_every_product_of_llama_is_a_site(llama_plan: Plan) -> None:
    expected = expected_sites("model.layers", LLAMA_LINEARS, "self_attn")
    assert counted(llama_plan) == expected
    assert total(expected) == 2 * (7 * 6 + 12) + 6  # layers x (linears x operands + attention) + lm_head


def test_every_operand_of_every_product_of_gpt2_is_a_site(gpt2_plan: Plan) -> None:
    expected = expected_sites("transformer.h", GPT2_LINEARS, "attn")
    assert counted(gpt2_plan) == expected
    assert total(expected) == 2 * (4 * 6 + 12) + 6


@pytest.mark.parametrize("name", ["llama_plan", "gpt2_plan"])
def test_transformers_have_no_gaps(name: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(name).gaps == ()


@pytest.mark.parametrize("name", ["llama_plan", "gpt2_plan"])
def test_every_site_has_the_cast_of_its_role_in_the_hybrid(name: str, request: pytest.FixtureRequest) -> None:
    hybrid = {
        "activation": "e4m3fn/nearest_even/sat_finite",
        "weight": "e4m3fn/nearest_even/sat_finite",
        "gradient": "e5m2/nearest_even/sat_finite",
    }
    plan: Plan = request.getfixturevalue(name)
    assert [str(site.cast) for site in plan.sites] == [hybrid[site.role] for site in plan.sites]
    assert {site.dtype for site in plan.sites} == {"float32"}


@pytest.mark.parametrize("name", ["llama_plan", "gpt2_plan"])
def test_the_sites_of_the_head_have_its_shapes(name: str, request: pytest.FixtureRequest) -> None:
    rows = BATCH * LENGTH
    plan: Plan = request.getfixturevalue(name)
    head = [site for site in plan.sites if site.path == "lm_head"]
    assert {site.operator for site in head} == {"aten.mm"}
    assert sorted((site.kind, site.role, site.shape) for site in head) == [
        ("dgrad", "gradient", (rows, VOCABULARY)),
        ("dgrad", "weight", (VOCABULARY, WIDTH)),
        ("fprop", "activation", (rows, WIDTH)),
        ("fprop", "weight", (WIDTH, VOCABULARY)),
        ("wgrad", "activation", (rows, WIDTH)),
        ("wgrad", "gradient", (VOCABULARY, rows)),
    ]


def test_the_two_sites_of_each_product_fit_together(llama_plan: Plan, gpt2_plan: Plan) -> None:
    for plan in (llama_plan, gpt2_plan):
        for left, right in zip(plan.sites[::2], plan.sites[1::2], strict=True):
            assert (left.path, left.operator, left.kind) == (right.path, right.operator, right.kind)
            assert left.shape[-1] == right.shape[-2], (left, right)


def test_a_tied_llama_has_the_same_sites(llama_plan: Plan) -> None:
    model, x = llama(tie_word_embeddings=True), tokens()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert fpsim.explain(model, x, labels=x) == llama_plan


def test_the_head_of_gpt2_is_tied() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_policy_shows_in_the_casts_and_gaps_of_llama() -> None:
    model, x = llama(layers=1), tokens()
    policy = fpsim.Policy(
        format="bf16/toward_zero",
        wgrad={"gradient": "none"},
        skip=["lm_head"],
        modules={"*.mlp": {"weight": "e2m1fn"}},
        output="fp16",
    )
    plan = fpsim.explain(model, x, labels=x, policy=policy)
    assert Counter(plan.gaps) == {Gap("lm_head", "aten.mm", f"{k} left unrounded by the policy"): 1 for k in KINDS}
    for site in plan.sites:
        if site.role == "output":
            expected = None if ".mlp." in site.path else "e5m10/nearest_even/ovf_inf"
        elif ".mlp." in site.path:
            expected = "e2m1fn/nearest_even/sat_finite" if site.role == "weight" else None
        else:
            expected = None if (site.kind, site.role) == ("wgrad", "gradient") else "e8m7/toward_zero/ovf_inf"
        assert (site.cast and str(site.cast)) == expected, site
    outputs = Counter(site.path for site in plan.sites if site.role == "output")
    attention = "model.layers.0.self_attn"
    assert outputs == {attention: 6} | {f"{attention}.{name}_proj": 3 for name in "qkvo"}


KINDS = ("fprop", "dgrad", "wgrad")


# -- explain: what it leaves alone -------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    """A model with everything that a training step changes: buffers, gradients, random state."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


def state_of(model: nn.Module, *inputs: Tensor) -> list[Any]:
    """The state that `explain` and `audit` promise to leave unchanged."""
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    return [
        [t.detach().clone() for t in tensors],
        [(id(t), t.requires_grad, t._version, id(t.grad)) for t in model.parameters()],
        [None if t.grad is None else t.grad.clone() for t in tensors],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    ]


def assert_same_state(before: list[Any], after: list[Any]) -> None:
    for old, new in zip(before, after, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new)
        elif isinstance(old[0], Tensor) or old[0] is None:
            for a, b in zip(old, new, strict=True):
                assert a is b is None or torch.equal(a, b)
        else:
            assert old == new


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.audit])
@pytest.mark.parametrize("gradients", [False, True])
def test_looking_changes_no_state(look: Callable[..., Any], gradients: bool) -> None:
    torch.manual_seed(1)
    model, x = Normed(), torch.randn(4, 8, requires_grad=True)
    model[1].running_mean.fill_(0.5)
    if gradients:
        model(x).sum().backward()
    before = state_of(model, x)
    look(model, x)
    assert_same_state(before, state_of(model, x))


def test_running_the_model_would_have_changed_the_state() -> None:
    """A step of the model changes the state, so that the test above can fail."""
    model, x = Normed(), torch.randn(4, 8, requires_grad=True)
    before = state_of(model, x)
    model(x).sum().backward()
    after = state_of(model, x)
    assert not torch.equal(before[-1], after[-1])  # random state
    assert not torch.equal(before[0][4], after[0][6]) and after[2][0] is not None  # buffers, gradients


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.audit])
def test_a_model_that_fails_is_left_as_it_was(look: Callable[..., Any]) -> None:
    class Failing(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return helper_that_fails(super().forward(x))

    @torch._dynamo.disable
    def helper_that_fails(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    model, x = Failing(), torch.randn(4, 8)
    before = state_of(model, x)
    with pytest.raises(RuntimeError, match="out of luck"):
        look(model, x)
    assert_same_state(before, state_of(model, x))


def partial_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return functools.partial(lambda model, x: model(x), model)


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.audit])
@pytest.mark.parametrize("function", [lambda model: lambda x: model(x), lambda model: model.forward, partial_of])
def test_looking_changes_no_buffer_of_what_a_function_holds(look: Callable, function: Callable) -> None:
    model, x = Normed(), torch.randn(4, 8)
    before = state_of(model, x)
    look(function(model), x)
    assert_same_state(before, state_of(model, x))


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.audit])
def test_looking_changes_no_buffer_of_a_module_that_is_an_argument(look: Callable) -> None:
    model, x = Normed(), torch.randn(4, 8)
    before = state_of(model, x)
    look(lambda x, model: model(x), x, model=model)
    assert_same_state(before, state_of(model, x))


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.audit, fpsim.profile])
def test_a_parameter_that_the_model_itself_writes_is_told_of(look: Callable[..., Any]) -> None:
    class Decaying(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            with torch.no_grad():
                self.bias.mul_(0.5)
            return y

    with pytest.warns(UserWarning, match="writes its own parameters bias, and this run has changed them too"):
        look(Decaying(3, 2), torch.randn(4, 3))


def test_gradients_of_what_a_function_closes_over_are_left_alone() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    assert fpsim.audit(lambda x: layer(x), x).covered == 2
    assert layer.weight.grad is None and layer.bias.grad is None


def test_explaining_a_compiled_model_leaves_its_code_alone() -> None:
    model, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    compiled = torch.compile(model, backend="fpsim_eager", options={"format": "e2m1fn"})
    y = compiled(x)
    assert fpsim.explain(compiled, x) == fpsim.explain(model, x)
    with dynamo_config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), y)


def test_twenty_explanations_are_equal_and_the_model_can_still_be_compiled() -> None:
    """After 8 versions of a function Dynamo would run it uncompiled."""
    model, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    with dynamo_config.patch(recompile_limit=8, accumulated_recompile_limit=16):
        plans = [fpsim.explain(model, x) for _ in range(20)]
    assert plans == [plans[0]] * 20
    assert len(plans[0].sites) == 4 and not plans[0].gaps
    y = torch.compile(model, backend="fpsim_eager", options={"format": "e2m1fn"})(x)
    assert torch.equal(y, fpsim.round(x, "e2m1fn") @ fpsim.round(model.weight, "e2m1fn").T)


# -- explain: modes and pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_fprop_only(mode: Callable[[], Any]) -> None:
    with mode():
        plan = fpsim.explain(Normed(), torch.randn(4, 8))
    assert [(site.path, site.kind, site.role) for site in plan.sites] == [
        (path, "fprop", role) for path in ("0", "3") for role in ("activation", "weight")
    ]


def test_a_size_that_varies_is_shown_by_its_symbol() -> None:
    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    activation, weight = fpsim.explain(nn.Linear(8, 8), x).sites[:2]
    assert isinstance(activation.shape[0], str) and activation.shape[1:] == (8,)
    assert weight.shape == (8, 8)
    assert f"{activation.shape[0]} x 8" in str(Plan((activation,), ()))


def test_the_policy_may_be_given_as_its_fields() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    by_fields = fpsim.explain(model, x, policy={"format": "bf16"})
    assert by_fields == fpsim.explain(model, x, policy=fpsim.Policy(format="bf16")) != fpsim.explain(model, x)
    with pytest.raises(ValueError, match="did you mean 'format'"):
        fpsim.explain(model, x, policy={"fromat": "bf16"})


class Swallowing(nn.Linear):
    """Takes any keyword argument, as models of Hugging Face do, and ignores it."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("look", [fpsim.explain, fpsim.profile, fpsim.audit])
@pytest.mark.parametrize("kind", [nn.Linear, Swallowing])
def test_fields_of_a_policy_among_the_inputs_are_an_error_that_names_policy(
    look: Callable[..., Any], kind: type[nn.Module]
) -> None:
    x = torch.randn(4, 8)
    for given in ({"format": "bf16"}, {"options": {"format": "bf16"}}):
        words = f"{kind.__name__} has no argument {next(iter(given))!r}: a policy is given as policy="
        with pytest.raises(TypeError, match=re.escape(words + "{'format': 'bf16'}")):
            look(kind(8, 8), x, **given)
    with pytest.raises(TypeError, match=re.escape("policy={'format': 'bf16', 'skip': ['head']}")):
        look(torch.compile(kind(8, 8)), x, format="bf16", skip=["head"])


def test_inputs_with_the_names_of_fields_are_the_models() -> None:
    def scaled(x: Tensor, format: str, scale: Tensor) -> Tensor:
        return x @ scale if format == "bf16" else x

    x = torch.randn(4, 8)
    assert len(fpsim.explain(scaled, x, format="bf16", scale=torch.randn(8, 2)).sites) == 2
    assert len(fpsim.explain(Swallowing(8, 8), x, weight=torch.randn(2), scale=0.5, format=None).sites) == 4
    bound = functools.partial(Swallowing(8, 8), format="bf16")
    assert len(fpsim.explain(bound, x).sites) == 4


def test_the_arguments_of_the_model_may_have_names() -> None:
    def scaled(x: Tensor, *, by: Tensor) -> Tensor:
        return x @ by

    assert len(fpsim.explain(scaled, torch.randn(4, 8), by=torch.randn(8, 2)).sites) == 2


def printed(value: object) -> str:
    """The text that rich prints on a wide screen."""
    console = Console(file=io.StringIO(), width=200)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined]


PLAN = Plan(
    (
        Site("layers.0.up", "aten.mm", "fprop", "forward", "activation", (4, 8), "float32", parse_cast("e4m3fn"), (1,)),
        Site("", "aten.dot", "wgrad", "backward", "gradient", ("s0",), "bfloat16", None, (0,)),
        Site("head", "aten.addmm", "dgrad", "backward", "output", (), "float64", parse_cast("e5m2/up"), ()),
    ),
    (Gap("stem", "aten.convolution", "because"), Gap("", "(graph break)", "of [square brackets]")),
)


@pytest.mark.parametrize("show", [str, printed])
def test_a_plan_is_shown_as_tables(show: Callable[[object], str]) -> None:
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in show(PLAN).splitlines() if "│" in line]
    assert "2 of 3 values rounded" in show(PLAN) and "2 gaps" in show(PLAN)
    assert lines == [
        ["layers.0.up", "aten.mm", "fprop", "activation", "4 x 8", "float32", "e4m3fn/nearest_even/sat_finite"],
        ["(root)", "aten.dot", "wgrad", "gradient", "s0", "bfloat16", "unrounded"],
        ["head", "aten.addmm", "dgrad", "output", "scalar", "float64", "e5m2/up/ovf_inf"],
        ["stem", "aten.convolution", "because"],
        ["(root)", "(graph break)", "of [square brackets]"],
    ]


@pytest.mark.parametrize("show", [str, printed])
def test_the_plan_of_llama_is_shown_whole(llama_plan: Plan, show: Callable[[object], str]) -> None:
    text = show(llama_plan)
    assert f"{len(llama_plan.sites)} of {len(llama_plan.sites)} values rounded" in text
    assert "no gaps: every matrix product is covered" in text
    for site in llama_plan.sites:
        assert site.path in text
    assert text.count("e4m3fn/nearest_even/sat_finite") + text.count("e5m2/nearest_even/sat_finite") == 114


@pytest.mark.parametrize("show", [str, printed])
def test_an_audit_is_shown_as_a_table(show: Callable[[object], str]) -> None:
    escape = Escape("aten.mm", ((4, 8), (8, 2)), 3, inside=False)
    text = show(Audit((escape, Escape("aten.lstm", ((1,),), 1, inside=True)), covered=7))
    assert "7 matrix products ran inside graphs that fpsim rewrote" in text
    assert "4 matrix products escaped" in text
    for word in ("aten.mm", "4x8, 8x2", "outside of fpsim's graphs", "aten.lstm", "inside, a gap of the policy"):
        assert word in text
    assert "no matrix product escaped" in show(Audit((), covered=7))


# -- gaps --------------------------------------------------------------------------------------------------------------


class Distances(nn.Module):
    """Distances from points: an operator with products inside."""

    def __init__(self, points: int, size: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(points, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class OfDistances(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Distances(18, 3), nn.Flatten(), nn.Linear(18, 8))


DISTANCES = ("aten._cdist_forward",)


def test_an_opaque_operator_is_listed_as_a_gap() -> None:
    plan = fpsim.explain(OfDistances(), torch.randn(4, 3))
    reason = "cannot be rounded: an error unless listed in the policy's gaps"
    assert plan.gaps == tuple(Gap("0", name, reason) for name in DISTANCES)
    assert counted(plan) == {"2": LINEAR}


def test_compiling_an_opaque_operator_raises_and_names_the_remedies() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(OfDistances(), backend="fpsim_eager")(torch.randn(4, 3))
    error = caught.value.inner_exception
    assert isinstance(error, UnroundedError)
    for part in ("aten._cdist_forward in module '0'", "gaps=['aten._cdist*']", "skip=['0']", "fpsim.explain"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": "fp8_hybrid", "gaps": ["aten._cdist*"]}, "allowed by the policy's gaps"),
        ({"policy": "fp8_hybrid", "gaps": DISTANCES}, "allowed by the policy's gaps"),
        ({"policy": "fp8_hybrid", "gaps": "*"}, "allowed by the policy's gaps"),
        ({"policy": "fp8_hybrid", "skip": ["0"]}, "left unrounded by the policy"),
        ({"policy": "fp8_hybrid", "modules": {"0": "none"}}, "left unrounded by the policy"),
    ],
)
def test_a_gap_that_the_policy_names_stays_unrounded_and_the_rest_is_rounded(options: dict, reason: str) -> None:
    model, x = OfDistances(), torch.randn(4, 3)
    plan = fpsim.explain(model, x, policy=options)
    assert plan.gaps == tuple(Gap("0", name, reason) for name in DISTANCES)
    y = torch.compile(model, backend="fpsim_eager", options=options)(x)
    linear = model[2]
    h, w = (fpsim.round(t, "e4m3fn", overflow="sat_finite") for t in (model[1](model[0](x)), linear.weight))
    assert torch.equal(y, torch.addmm(linear.bias, h, w.T))
    y.sum().backward()
    assert model[0].points.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "fp8_hybrid", "gaps": ["aten._cdist"]},
        {"policy": "fp8_hybrid", "gaps": ["_cdist_forward"]},
        {"policy": "fp8_hybrid", "skip": ["2"]},
    ],
)
def test_a_gap_that_the_policy_does_not_name_is_still_an_error(options: dict) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"aten\._cdist_forward"):
        torch.compile(OfDistances(), backend="fpsim_eager", options=options)(torch.randn(4, 3))


def attention(x: Tensor, w: Tensor) -> Tensor:
    """Causal attention, and a matrix product that is not a part of it."""
    heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2) @ w


def test_attention_kept_fused_is_a_gap() -> None:
    x, w = torch.randn(2, 4, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    plan = fpsim.explain(attention, x, w, policy={"policy": "fp8_hybrid", "attention": "keep"})
    assert {gap.reason for gap in plan.gaps} == {"attention kept fused by the policy"}
    assert [gap.operator.removesuffix("_backward") for gap in plan.gaps] == [plan.gaps[0].operator] * 2
    assert plan.gaps[0].operator.startswith("aten._scaled_dot_product")
    assert {site.operator for site in plan.sites} == {"aten.mm"} and len(plan.sites) == 6


def test_a_table_of_constants_is_a_gap_that_needs_no_permission() -> None:
    """Rotary angles: positions times frequencies."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequency", torch.rand(1, 3))

        def forward(self, positions: Tensor, x: Tensor) -> Tensor:
            return x * torch.cos(positions.float() @ self.frequency)

    model, positions, x = Rotary(), torch.arange(2).view(2, 1), torch.randn(2, 3)
    plan = fpsim.explain(model, positions, x)
    assert plan.sites == ()
    assert [(gap.operator, gap.reason.split(":")[0]) for gap in plan.gaps] == [("aten.mm", "constant")]
    assert torch.equal(torch.compile(model, backend="fpsim_eager")(positions, x), model(positions, x))


# -- products outside of the graphs ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Dynamo by itself does not compile a function that calls a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner, self.head = kind(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


class Disabled(nn.Module):
    """A product in a function that is never compiled, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.planted = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(product(self.a(x), self.planted))


@torch._dynamo.disable
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


class Broken(Disabled):
    """A graph break within ``try``: the whole function around it runs uncompiled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))

    def middle(self, x: Tensor) -> Tensor:
        try:
            torch._dynamo.graph_break()
            return x @ self.planted
        finally:
            pass


PRODUCT_8 = (
    Escape("aten.mm", ((4, 8), (8, 8)), 2, inside=False),  # fprop and dgrad
    Escape("aten.mm", ((8, 4), (4, 8)), 1, inside=False),  # wgrad
)


@pytest.mark.parametrize("kind", [Disabled, Broken])
def test_audit_finds_exactly_the_products_in_code_that_is_not_compiled(kind: type[Disabled]) -> None:
    audit = fpsim.audit(kind(), torch.randn(4, 8))
    assert Counter(audit.escaped) == Counter(PRODUCT_8)
    assert audit.covered == 2 + 3  # the first layer has no dgrad


HEAD = Counter(
    {
        ("aten.addmm", ((8,), (12, 8), (8, 8))): 1,  # fprop
        ("aten.mm", ((12, 8), (8, 8))): 1,  # dgrad
        ("aten.mm", ((8, 12), (12, 8))): 1,  # wgrad
    }
)


#: Whether torch compiles what stands beside a layer that it leaves out, and layers of its own compiled in place.
COMPILES_MORE = TORCH >= (2, 15)


def escapes_of(model: nn.Module) -> Counter:
    """The operators, shapes and counts of products that escape when Dynamo does not trace recurrent layers."""
    apply_settings()  # they are changed once, and here a user changes one back
    with dynamo_config.patch(allow_rnn=False):
        audit = fpsim.audit(model, torch.randn(3, 4, 8))
    assert audit.covered == (HEAD.total() if COMPILES_MORE else 0)
    assert not any(escape.inside for escape in audit.escaped)
    found = Counter({(escape.operator, escape.shapes): escape.count for escape in audit.escaped})
    return found + HEAD if COMPILES_MORE else found


def test_audit_finds_an_lstm_and_what_runs_beside_it() -> None:
    found = escapes_of(Recurrent(nn.LSTM))
    forward = Counter({("aten.lstm", ((3, 4, 8),)): 1})
    assert forward + HEAD <= found
    assert found - forward - HEAD  # its backward is one operator or several, as the machine has it


def test_audit_finds_a_gru_once_forward_and_the_products_of_its_backward() -> None:
    """Three steps of a batch of four. Products inside `aten.gru` are not counted a second time."""
    assert escapes_of(Recurrent(nn.GRU)) == HEAD + Counter(
        {
            ("aten.gru", ((3, 4, 8), (1, 4, 8))): 1,
            ("aten.mm", ((4, 24), (24, 8))): 2,  # hidden to hidden, dgrad: the state before the first step needs none
            ("aten.mm", ((24, 4), (4, 8))): 3,  # hidden to hidden, wgrad
            ("aten.mm", ((24, 12), (12, 8))): 1,  # input to hidden, wgrad: all steps at once
        }
    )


@pytest.mark.parametrize("kind", [Disabled, Broken])
def test_explain_says_where_a_graph_breaks(kind: type[Disabled]) -> None:
    plan = fpsim.explain(kind(), torch.randn(4, 8))
    assert [gap.operator for gap in plan.gaps] == ["(graph break)"]
    assert "runs uncompiled and unrounded; fpsim.audit lists it" in plan.gaps[0].reason


def test_explain_says_where_nothing_is_compiled() -> None:
    apply_settings()  # they are changed once, and here a user changes one back
    with dynamo_config.patch(allow_rnn=False):
        plan = fpsim.explain(Recurrent(nn.LSTM), torch.randn(3, 4, 8))
    assert len(plan.sites) == (2 * HEAD.total() if COMPILES_MORE else 0)
    assert [gap.operator for gap in plan.gaps] == ["(graph break)" if COMPILES_MORE else "(model)"]


def test_audit_lists_fused_attention_as_inside() -> None:
    x, w = torch.randn(2, 4, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    kept = fpsim.audit(attention, x, w, policy={"policy": "fp8_hybrid", "attention": "keep"})
    assert {escape.inside for escape in kept.escaped} == {True}
    assert [escape.count for escape in kept.escaped] == [1, 1]
    name = kept.escaped[0].operator
    assert name.startswith("aten._scaled_dot_product") and kept.escaped[1].operator == f"{name}_backward"
    assert kept.escaped[0].shapes[:3] == ((2, 2, 4, 8),) * 3
    assert kept.covered == 3
    opened = fpsim.audit(attention, x, w)
    assert opened == Audit((), covered=3 + 2 + 4)


TRANSFORMERS = pytest.mark.parametrize(("model", "linears"), [(llama, LLAMA_LINEARS), (gpt2, GPT2_LINEARS)])


@TRANSFORMERS
@pytest.mark.usefixtures("kernels_left_out")
def test_nothing_escapes_from_a_transformer(model: Callable[[int], nn.Module], linears: list[str]) -> None:
    assert_nothing_escapes(model, linears, layers=1)


@TRANSFORMERS
@pytest.mark.exhaustive
def test_nothing_escapes_from_a_transformer_with_its_kernels(
    model: Callable[[int], nn.Module], linears: list[str]
) -> None:
    assert_nothing_escapes(model, linears, layers=2)


def assert_nothing_escapes(model: Callable[[int], nn.Module], linears: list[str], layers: int) -> None:
    x = tokens()
    assert fpsim.audit(model(layers), x, labels=x) == Audit((), covered=layers * (3 * len(linears) + 6) + 3)


def compiled_module(backend: str) -> Callable[..., Any]:
    return torch.compile(Disabled(), backend=backend)


def compiled_function(backend: str) -> Callable[..., Any]:
    model = Disabled()
    return torch.compile(lambda x: model(x), backend=backend)


def compiled_in_place(backend: str) -> Callable[..., Any]:
    model = Disabled()
    model.compile(backend=backend)
    return model


class Layer(nn.Linear):
    """A user's layer, because torch skips its own modules when they are compiled in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def compiled_layers_in_place(backend: str) -> Callable[..., Any]:
    model = Disabled()
    model.a, model.b = Layer(8, 8), Layer(8, 8)
    model.a.compile(backend=backend)
    model.b.compile(backend=backend)
    return model


def compiled_layers(backend: str) -> Callable[..., Any]:
    model = Disabled()
    model.a, model.b = (torch.compile(layer, backend=backend) for layer in (model.a, model.b))
    return model


HOW_COMPILED = pytest.mark.parametrize(
    "compiled", [compiled_module, compiled_function, compiled_in_place, compiled_layers_in_place, compiled_layers]
)

#: What the layers of `Disabled` run: two of each product, but the first layer has no dgrad.
LAYERS_8 = Counter(
    {
        ("aten.addmm", ((8,), (4, 8), (8, 8))): 2,
        ("aten.mm", ((4, 8), (8, 8))): 1,
        ("aten.mm", ((8, 4), (4, 8))): 2,
    }
)


@HOW_COMPILED
@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
@pytest.mark.usefixtures("kernels_left_out")
def test_a_compiled_model_is_audited_as_it_is(compiled: Callable[[str], Callable[..., Any]], backend: str) -> None:
    audit = fpsim.audit(compiled(backend), torch.randn(4, 8))
    assert Counter(audit.escaped) == Counter(PRODUCT_8) and audit.covered == 5


@HOW_COMPILED
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
@pytest.mark.usefixtures("kernels_left_out")
def test_what_another_backend_compiled_has_escaped(compiled: Callable[[str], Callable[..., Any]], backend: str) -> None:
    audit = fpsim.audit(compiled(backend), torch.randn(4, 8))
    found = Counter({(escape.operator, escape.shapes): escape.count for escape in audit.escaped})
    assert audit.covered == 0 and not any(escape.inside for escape in audit.escaped)
    assert sum(found.values()) == 5 + 3
    if backend == "eager":
        assert found == LAYERS_8 + Counter({(escape.operator, escape.shapes): escape.count for escape in PRODUCT_8})


def test_a_layer_of_torch_compiled_in_place_has_escaped() -> None:
    """Torch before 2.14 silently compiles nothing there."""
    model = nn.Linear(8, 8)
    model.compile(backend="fpsim")
    audit = fpsim.audit(model, torch.randn(4, 8))
    escaped = [] if TORCH >= (2, 14) else ["aten.addmm", "aten.mm"]
    assert audit.covered == 2 - len(escaped) and [escape.operator for escape in audit.escaped] == escaped


def test_layers_of_two_backends_are_told_apart() -> None:
    model = nn.Sequential(Layer(8, 8, bias=False), Layer(8, 3, bias=False))
    model[0].compile(backend="inductor")
    model[1].compile(backend="fpsim")
    audit = fpsim.audit(model, torch.randn(4, 8))
    assert audit.covered == 3
    assert {(escape.operator, escape.inside) for escape in audit.escaped} == {("aten.mm", False)}
    assert sum(escape.count for escape in audit.escaped) == 2


def test_a_product_just_before_a_graph_is_not_taken_for_a_part_of_it() -> None:
    """Operators without a derivative share the sequence number of the next one that has a derivative."""

    class Before(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x @ (x.T @ x))

    model = Before()
    model.layer = Layer(8, 8)
    model.layer.compile(backend="fpsim")
    audit = fpsim.audit(model, torch.randn(4, 8))
    assert set(audit.escaped) == {
        Escape("aten.mm", ((8, 4), (4, 8)), 1, inside=False),
        Escape("aten.mm", ((4, 8), (8, 8)), 1, inside=False),
    }
    assert audit.covered == 2


@pytest.mark.parametrize("policy", [fpsim.Policy(), {}, {"format": "bf16"}])
def test_a_policy_for_a_compiled_model_is_an_error(policy: Any) -> None:
    model = torch.compile(nn.Linear(8, 8), backend="fpsim")
    with pytest.raises(ValueError, match="already compiled and keeps its policy"):
        fpsim.audit(model, torch.randn(4, 8), policy=policy)


def test_what_a_policy_does_not_allow_is_an_error_in_audit_too() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"gaps=\['aten\._cdist"):
        fpsim.audit(OfDistances(), torch.randn(4, 3))


def test_an_opaque_operator_that_the_policy_allows_is_listed() -> None:
    audit = fpsim.audit(OfDistances(), torch.randn(4, 3), policy={"policy": "fp8_hybrid", "gaps": "aten._cdist*"})
    assert audit.escaped == ()  # torch multiplies no matrices for so few points
    assert [gap.operator for gap in audit.unrounded] == ["aten._cdist_forward"]
    assert audit.covered == 3


class Learns(nn.Module):
    """A model that is compiled twice, because its first call changes a value that the code depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.kind: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is None:
            self.kind = "regression"
        return self.layer(x)


def test_audit_counts_nothing_that_compiling_runs() -> None:
    audit = fpsim.audit(torch.compile(Learns(), backend="fpsim_eager"), torch.randn(2, 8))
    assert audit.escaped == () and audit.covered == 2
