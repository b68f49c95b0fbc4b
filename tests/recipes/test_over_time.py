"""FracTrain, low-precision layer norm, rotary positions, microcontrollers: against formulas in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim import recipes
from fpsim.policy import Policy
from fpsim.recipes.mosaic_layernorm import NarrowLayerNorm, NarrowLayerNorms
from fpsim.recipes.rotary import anchor_mask, frequencies, rotary_tables, rotate, shift_distance
from fpsim.recipes.scaled_loss import ScaledLoss
from fpsim.training.dynamic_precision import CostTarget, choices, gate_parameters


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


# -- FracTrain ---------------------------------------------------------------------------------------------------------


def affine(x: Tensor, bits: int, rows: bool = False) -> Tensor:
    """The code's quantizer, for the whole tensor or for each of its rows."""
    flat = x.flatten(1) if rows else x.reshape(1, -1)
    low, high = flat.min(1, keepdim=True)[0], flat.max(1, keepdim=True)[0]
    d = torch.maximum((high - low) / (2**bits - 1), torch.tensor(1e-8))
    return (((flat - low) / d).clamp(0, 2**bits - 1).round() * d + low).reshape(x.shape)


@pytest.mark.parametrize("bits", [3, 8])
def test_integers_count_from_the_least_element(bits: int) -> None:
    torch.manual_seed(bits)
    for x in (torch.randn(8, 33) * 3 + 1, torch.relu(torch.randn(8, 33)) + 0.25, torch.randn(8, 33) * 1e-9):
        assert torch.equal(fpsim.round(x, f"uint{bits}/tensor:range"), affine(x, bits))
        assert torch.equal(fpsim.round(x, f"uint{bits}/row:range"), affine(x, bits, rows=True))
    constant = torch.full((2, 3), 0.3)
    assert torch.equal(fpsim.round(constant, "uint3/tensor:range"), constant)
    assert fpsim.round(torch.tensor([-1.0, 0.0, 1.1]), "uint2/tensor:range").abs().min() > 0.1, "zero is no value"


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_products_of_fractrain_are_those_of_its_formulas(kind: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16) if kind is nn.Linear else nn.Conv2d(3, 8, 3)
    x = torch.randn((10, 24) if kind is nn.Linear else (2, 3, 6, 6), requires_grad=True)
    recipe = recipes.fractrain(forward=(4,), backward=(6,))
    assert recipe.policy is not None
    policy = replace(recipe.policy, gradient=None)
    compiled = torch.compile(layer, backend="fpsim_eager", options={"policy": policy})
    y = compiled(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)

    w = affine(layer.weight.detach(), 4, rows=True).requires_grad_()
    q = affine(x.detach(), 4).requires_grad_()
    function = nn.functional.linear if kind is nn.Linear else nn.functional.conv2d
    want = function(q, w, layer.bias)
    want.backward(gradient)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, q.grad, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-6, atol=1e-5)


def test_gradients_of_fractrain_are_rounded_stochastically_once_for_both_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Identity(), nn.Linear(8, 8, bias=False))
    compiled, _ = recipes.fractrain(forward=(8,), backward=(4,)).apply(model, backend="fpsim_eager")
    model[0].weight.data = torch.eye(8)
    gradient = torch.randn(8, 8)
    x = torch.eye(8, requires_grad=True)
    rounded = torch.zeros(8, 8)
    draws = 300
    first = torch.compile(model[0], backend="fpsim_eager", options={"policy": replace(compiled.policy, skip=())})
    d = (gradient.max() - gradient.min()) / 15
    for _ in range(draws):
        x.grad = model[0].weight.grad = None
        first(x).backward(gradient)
        assert torch.equal(x.grad, model[0].weight.grad.T), "dgrad and wgrad see the same draw"
        codes = (x.grad - gradient.min()) / d
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        rounded += x.grad / draws
    assert (rounded - gradient).abs().max() < 5 * float(d) / 2 / draws**0.5


def test_fractrain_trains_through_its_stages_and_keeps_the_last_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    recipe = recipes.fractrain(forward=(3, 8), backward=(6, 8), interval=1, threshold=10.0)
    compiled, optimizer = recipe.apply(model, torch.optim.SGD(model.parameters(), lr=0.1), backend="fpsim_eager")
    x, stages = torch.randn(12, 6), []
    for _ in range(7):
        stages.append(compiled.policy.cast("fprop", "activation").format.bits)
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        compiled.step(loss)
    assert stages == [3] * 5 + [8] * 2
    assert compiled.policy.at("2") is None
    assert compiled.policy.attention == "keep"


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.layer, self.short = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + self.short(x))


class Residuals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([Residual(4, 4), Residual(4, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def lstm(gate: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A long short-term memory by its formulas: input, forget and output gates, and the new content."""
    both = x @ gate.weight_ih.T + gate.bias_ih + state[0] @ gate.weight_hh.T + gate.bias_hh
    i, f, g, o = both.chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def rounded_straight_through(x: Tensor, bits: int, rows: bool = False) -> Tensor:
    return x + (affine(x.detach(), bits, rows) - x).detach()


def test_dynamic_precision_is_that_of_its_formulas() -> None:
    """Per-sample gates, the shared LSTM, straight-through derivatives and the term for the cost, without the backend.

    Gradients of products stay unrounded here, since rounding them is stochastic.
    """
    torch.manual_seed(3)
    model = Residuals()
    widths = ((2, 6), (3, 6), (6, 8))
    recipe = recipes.fractrain_dynamic(forward=(2, 3, 6), backward=(6, 6, 8))
    x = (torch.randn(6, 3, 7, 7) + 3 * torch.randn(6, 3, 1, 1)).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert recipe.policy is not None and recipe.preparation is not None and recipe.optimizer is not None
    recipe.preparation.apply(model, [x.detach()])
    recipe.optimizer.apply(optimizer, model)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    nn.init.normal_(model.blocks[0].gate.projection.weight, std=4.0)  # samples differ in their choices
    for block in model.blocks:
        nn.init.normal_(block.embed[2].weight, std=4.0)
    rules = {glob: replace(rule, gradient=None) for glob, rule in recipe.policy.modules}
    compiled = torch.compile(model, backend="fpsim_eager", options={"policy": replace(recipe.policy, modules=rules)})
    target = CostTarget(0.02, weight=0.05)
    y = compiled(x)
    loss = y.square().sum() + target.term(compiled)
    got = torch.autograd.grad(loss, [x, *model.parameters()])

    gate = model.blocks[0].gate
    state = (torch.zeros(6, 16), torch.zeros(6, 16))
    h, cost, picked = model.stem(x), torch.zeros(()), []
    for block in model.blocks:
        inner = block.precisions[0]
        first, _, second = block.embed
        pooled = torch.relu(h.mean((2, 3)) @ first.weight.T + first.bias) @ second.weight.T + second.bias
        state = lstm(gate.cell, pooled, state)
        p = torch.softmax(state[0] @ gate.projection.weight.T + gate.projection.bias, 1)
        mask = (p == p.max(1, keepdim=True)[0]).float() - p.detach() + p
        out: Any = 0.0
        for k, (bits, gradient_bits) in enumerate(widths):
            q = rounded_straight_through(h, bits)
            parts = [
                nn.functional.conv2d(q, rounded_straight_through(each.weight, 4, True), each.bias, padding=each.padding)
                for each in (inner.layer, inner.short)
            ]
            out = out + mask[:, k, None, None, None] * torch.relu(parts[0] + parts[1])
            cost = cost + mask[:, k].sum() * (4 * bits + 4 * gradient_bits + bits * gradient_bits) / 32**2
        picked.append(mask.argmax(1))
        h = out
    want = model.head(h.mean((2, 3)))
    sign = 1 if float(cost.detach()) / 6 / (2 * 3) >= 0.02 else -1
    expected = torch.autograd.grad(want.square().sum() + sign * 0.05 * cost, [x, *model.parameters()])
    assert all(len(set(choice.tolist())) > 1 for choice in picked), "samples choose differently"
    assert [choice.argmax(1).tolist() for choice in choices(compiled).values()] == [each.tolist() for each in picked]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


def test_dynamic_precision_rounds_each_copy_in_its_widths_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    recipe = recipes.fractrain_dynamic(blocks="[12]")
    compiled, optimizer = recipe.apply(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches=iter([torch.randn(5, 4)]), backend="fpsim_eager"
    )
    before = [p.clone() for p in gate_parameters(model)]
    (compiled(torch.randn(5, 4)).square().sum() + CostTarget().term(compiled)).backward()
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(gate_parameters(model), before, strict=True))
    plan = fpsim.explain(model, torch.randn(5, 4), policy=recipe.policy)
    found: dict[tuple[str, str], set[str]] = {}
    for site in plan.sites:
        if site.kind is not None:
            key = site.path.partition(".precisions.")[2].partition(".")[0], site.role
            found.setdefault(key, set()).add(str(site.cast))
    for k, (a, g) in enumerate(((3, 6), (4, 6), (4, 8), (6, 8), (6, 12))):
        assert found.pop((str(k), "activation")) == {f"uint{a}/nearest_even/sat_finite/tensor:range"}
        assert found.pop((str(k), "weight")) == {"uint4/nearest_even/sat_finite/channel:range"}
        assert found.pop((str(k), "gradient")) == {f"uint{g}/stochastic:23/sat_finite/tensor:range"}
    assert set().union(*found.values()) == {"None"}, "gates and the other layers"


def test_blocks_of_dynamic_precision_are_found_or_named() -> None:
    recipe, x = recipes.fractrain_dynamic(), torch.randn(2, 4)
    shared = nn.Sequential(nn.Linear(4, 4))
    twice = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    for model, given, batches, message in (
        (nn.Linear(4, 4), (), [x], "no list of blocks found in Linear"),
        (nn.Sequential(nn.Linear(4, 4)), ("1",), [x], "blocks='1' matches no module of Sequential"),
        (twice, ("0.0",), [x], "calls block '0.0' twice"),
        (twice, ("0.0",), None, r"give batches=\.\.\."),
        (nn.Sequential(nn.Linear(4, 4)), ("0",), [], "does not reach block '0'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(recipe.preparation, blocks=given).apply(model, batches)  # type: ignore[arg-type, type-var]
    with pytest.raises(ValueError, match="the model has no gates"):
        recipe.optimizer.apply(None, nn.Linear(1, 1))  # type: ignore[union-attr]
    for widths in ({"forward": (3,), "backward": (6,)}, {"forward": (3, 4), "backward": (6,)}):
        with pytest.raises(ValueError, match="one width for each of two or more choices"):
            recipes.fractrain_dynamic(**widths)


# -- layer norms -------------------------------------------------------------------------------------------------------


def test_a_narrow_layer_norm_rounds_its_argument_parameters_and_result() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    nn.init.normal_(model[1].weight, 1.0, 0.5)
    nn.init.normal_(model[1].bias)
    compiled, _ = recipes.mosaic_layernorm().apply(model, backend="fpsim_eager")
    assert type(model[1]) is NarrowLayerNorm
    x = torch.randn(32, 16)
    y = compiled(x)
    h = torch.compile(model[0], backend="fpsim_eager", options={"policy": "amp_bf16"})(x).detach()
    wide, w, b = (bf16(t.detach()).double() for t in (h, model[1].weight, model[1].bias))
    mean, variance = wide.mean(-1, keepdim=True), wide.var(-1, keepdim=True, correction=0)
    want = bf16(((wide - mean) / (variance + 1e-5).sqrt() * w + b).float())
    assert torch.equal(y, want)
    y.sum().backward()
    gradient = model[1].weight.grad
    assert torch.equal(gradient, bf16(gradient))


def test_the_control_has_narrow_statistics() -> None:
    torch.manual_seed(0)
    norm = NarrowLayerNorms(statistics="same").apply(nn.Sequential(nn.LayerNorm(8)))
    x = torch.randn(4, 8) + 4
    step = [bf16(x)]
    mean = bf16(step[0].double().mean(-1, keepdim=True)).float()
    centred = bf16(step[0] - mean)
    variance = bf16(bf16(centred.square()).double().mean(-1, keepdim=True)).float()
    rstd = bf16((bf16(variance + 1e-5).double() ** -0.5).float())
    assert torch.equal(norm(x), bf16(centred * rstd))
    with pytest.raises(ValueError, match=r"has no torch\.nn\.LayerNorm"):
        NarrowLayerNorms().apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 'e5m2': use bf16 or fp16"):
        recipes.mosaic_layernorm(format="e5m2")


# -- rotary positions --------------------------------------------------------------------------------------------------


def test_tables_and_rotations_are_rounded_where_the_precision_says() -> None:
    positions, inverse = torch.tensor([0, 1, 256, 257, 1000]), frequencies(8)
    exact = positions.double()[:, None] * inverse.double()
    exact = torch.cat((exact, exact), -1)
    cos, sin = rotary_tables(positions, inverse, "fp32")
    torch.testing.assert_close(cos.double(), exact.cos(), rtol=0, atol=1e-4)
    narrow_cos, narrow_sin = rotary_tables(positions, inverse, "products")
    assert torch.equal(narrow_cos, bf16(cos))
    assert torch.equal(narrow_sin, bf16(sin))
    angles = bf16(bf16(positions.float())[:, None] * bf16(inverse))
    assert bf16(positions.float())[3] == 256
    assert torch.equal(rotary_tables(positions, inverse, "positions")[0][:, :4], bf16(angles.cos()))
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    swapped = torch.cat((-bf16(x)[:, 4:], bf16(x)[:, :4]), -1)
    want = bf16(bf16(bf16(x) * narrow_cos) + bf16(swapped * narrow_sin))
    assert torch.equal(rotate(x, narrow_cos, narrow_sin), want)
    with pytest.raises(ValueError, match="unknown precision 'bf16'"):
        rotary_tables(positions, inverse, "bf16")


def test_attention_depends_on_the_origin_in_bfloat16_and_more_so_in_longer_sequences() -> None:
    """The measure D of the paper. The first key is a sink, as in trained models."""
    distances: dict[str, list[float]] = {}
    for length in (128, 512):
        torch.manual_seed(0)
        q, k = torch.randn(2, length, 64)
        q[:, 31], q[:, 63] = 8.0, 8.0  # the slowest pair of channels
        k[0, 31], k[0, 63] = 3.0, 3.0
        for precision in ("fp32", "products", "positions"):
            found = shift_distance(q, k, 16, precision)
            distances.setdefault(precision, []).append(found.distance)
            if precision == "products":
                assert found.first_key > 10 / length
    assert all(narrow > 100 * exact for narrow, exact in zip(distances["products"], distances["fp32"], strict=True))
    assert all(worse > narrow for worse, narrow in zip(distances["positions"], distances["products"], strict=True))
    assert distances["products"][1] > distances["products"][0]


def test_packed_documents_share_the_anchor_only() -> None:
    mask = anchor_mask([3, 2])
    by_hand = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0]]
    assert mask.int().tolist() == [*by_hand, [1, 0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="at least one token"):
        anchor_mask([2, 0])


def test_llama_has_the_tables_of_the_recipe() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    original = model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    compiled, _ = recipes.bf16_rope().apply(model, backend="fpsim_eager")
    tables = model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    for table, narrow in zip(original, tables, strict=True):
        assert torch.equal(narrow, bf16(table))
    with torch.no_grad():
        logits = compiled(torch.arange(9)[None] % 11).logits
    assert torch.equal(logits, bf16(logits))
    with pytest.raises(ValueError, match="no module with a buffer 'inv_freq'"):
        recipes.bf16_rope().apply(nn.Linear(2, 2))


# -- microcontrollers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "multiply_add"])
def test_sums_on_a_microcontroller_are_rounded_in_every_step(order: str) -> None:
    """K = 576, as in a 3x3 convolution of 64 channels."""
    torch.manual_seed(0)
    layer = nn.Linear(576, 3, bias=False)
    layer.weight.data = bf16(layer.weight.data)
    x = bf16(torch.rand(2, 576))
    policy = recipes.mcu_fp16(order=order).policy
    compiled = torch.compile(layer, backend="fpsim_eager", options={"policy": policy})
    total = torch.zeros(2, 3, dtype=torch.float64)
    for k in range(576):
        product = x[:, k : k + 1].double() * layer.weight.detach()[:, k].double()
        product = product if order == "sequential" else product.bfloat16().double()
        total = (total + product).bfloat16().double()
    with torch.no_grad():
        assert torch.equal(compiled(x), total.float())


def test_weights_without_a_master_copy_stagnate() -> None:
    """An update below half an ulp is lost: w = 1 has neighbours at 1 - 2**-8 and 1 + 2**-7."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    part = recipes.mcu_fp16().optimizer
    assert part is not None
    part.apply(optimizer, nn.Identity())
    for _ in range(10):
        weight.grad = torch.tensor([2.0**-10, 2.0**-8])
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0 - 10 * 2.0**-8]


def test_the_loss_of_amp_is_scaled() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = ScaledLoss(initial=8.0, interval=1).apply(torch.optim.SGD([weight], lr=1.0), nn.Identity())
    (weight * 2 * optimizer.param_groups[0]["loss_scale"]).sum().backward()
    optimizer.step()
    assert (weight.item(), optimizer.param_groups[0]["loss_scale"]) == (-1.0, 16.0)
    static = ScaledLoss(static=4.0).apply(torch.optim.SGD([weight], lr=1.0), nn.Identity())
    assert static.param_groups[0]["loss_scale"] == 4.0
    assert isinstance(recipes.amp_fp16().optimizer, ScaledLoss)
    assert recipes.amp_fp16().policy == Policy.preset("fp16")
