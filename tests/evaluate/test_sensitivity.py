"""`sensitivity` against losses and gradients under policies that round exactly one place, and against derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fpsim
from fpsim.evaluate import sensitivity
from fpsim.evaluate.sensitivities import Unit


class Model(nn.Module):
    """Three layers. The weights of the second one are tiny, and what it gives is enlarged again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.planted, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.planted.weight.mul_(2.0**-14)
            self.planted.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.planted(torch.tanh(self.first(x))) * 2.0**14))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(9, 6, generator=generator), torch.randint(3, (9,), generator=generator)) for _ in range(3)]


@pytest.fixture(scope="module")
def result(model, batches):
    return sensitivity(model, iter(batches), policy="e4m3fn", loss=cross_entropy, by="site")


def under(model, modules):
    torch._dynamo.reset()
    return torch.compile(model, backend="fpsim_eager", options={"format": "none", "modules": modules})


def losses(model, batches) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([cross_entropy(model(x), y) for x, y in batches]).double()


def test_a_planted_layer_whose_weights_underflow_comes_first(model, result):
    assert not fpsim.round(model.planted.weight.detach(), "e4m3fn").any()
    assert result.forward[0].unit == Unit("planted", "forward", "fprop", "weight")
    assert result["planted"] is result.forward[0]
    assert result.forward[0].size > 5 * result.forward[1].size
    worst = next(each for each in result.backward if each.unit == Unit("planted", "backward", "dgrad", "weight"))
    assert worst.layers["first"].relative.value == 1 and worst.layers["last"].relative.value == 0


def test_losses_are_those_of_policies_that_round_one_place(model, batches, result):
    exact = losses(under(model, {}), batches)
    assert result.loss.value == pytest.approx(float(exact.mean()), abs=1e-12)
    every = losses(under(model, {"*": {"fprop": "e4m3fn", "format": "none"}}), batches) - exact
    assert result.rounded.value == pytest.approx(float(every.mean()), abs=1e-12)
    assert len(result.forward) == 6
    for effect in result.forward:
        path, role = effect.unit.path, effect.unit.role
        other = {"weight": "activation", "activation": "weight"}[role]
        alone = losses(under(model, {path: {"format": "none", "fprop": {role: "e4m3fn"}}}), batches) - exact
        rest = {path: {"format": "none", "fprop": {other: "e4m3fn"}}, "*": {"format": "none", "fprop": "e4m3fn"}}
        without = losses(under(model, rest), batches) - exact
        for got, want in ((effect.alone, alone), (effect.without, without)):
            assert got.value == pytest.approx(float(want.mean()), abs=1e-12)
            assert got.stderr == pytest.approx(float(want.std() / math.sqrt(3)), abs=1e-12)
        assert effect.size == pytest.approx(float(alone.square().mean().sqrt()), abs=1e-12)
    assert list(result.forward) == sorted(result.forward, key=lambda effect: -effect.size)


def test_gradients_are_those_of_policies_that_round_one_place(model, batches, result):
    def gradients(compiled, batch):
        loss = cross_entropy(compiled(batch[0]), batch[1])
        return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    names = [name for name, _ in model.named_parameters()]
    plain = under(model, {})
    exact = [gradients(plain, batch) for batch in batches]
    assert len(result.backward) == 4 + 4 + 2
    for effect in [each for each in result.backward if each.unit.path == "planted"]:
        rule = {"format": "none", effect.unit.step: {effect.unit.role: "e4m3fn"}}
        rounded = under(model, {"planted": rule})
        found = [gradients(rounded, batch) for batch in batches]
        for layer, change in {None: effect.gradient, **effect.layers}.items():
            own = [name for name in names if layer is None or name.startswith(f"{layer}.")]
            pairs = [
                [torch.cat([g[name].flatten() for name in own]).double() for g in pair]
                for pair in zip(exact, found, strict=True)
            ]
            relative = torch.stack([(b - a).norm() / a.norm() for a, b in pairs])
            cosine = torch.stack([a @ b / (a.norm() * b.norm()) if b.any() else a.new_zeros(()) for a, b in pairs])
            ratio = torch.stack([b.norm() / a.norm() for a, b in pairs])
            for got, want in ((change.relative, relative), (change.cosine, cosine), (change.norm, ratio)):
                assert got.value == pytest.approx(float(want.mean()), abs=1e-9)
                assert got.stderr == pytest.approx(float(want.std() / math.sqrt(3)), abs=1e-9)


def test_first_order_is_the_gradient_times_the_error_and_second_order_comes_near(batches):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    result = sensitivity(model, batches, policy="e3m4", loss=cross_entropy, by="site", gradients=False)
    assert result.backward == () and result.gradient is None
    changes = []
    for x, y in batches:
        h = torch.tanh(model[0](x)).detach()
        values = {"0": (x, model[0].weight.detach()), "2": (h, model[2].weight.detach())}
        for path, operands in values.items():
            for number, role in enumerate(("activation", "weight")):
                error = fpsim.round(operands[number], "e3m4") - operands[number]

                def loss(part, path=path, number=number, error=error, x=x, y=y):
                    for name, layer in model.named_children():
                        if isinstance(layer, nn.Linear):
                            pair = [x, layer.weight.detach()]
                            if name == path:
                                pair[number] = pair[number] + part * error
                            x = pair[0] @ pair[1].T + layer.bias.detach()
                        else:
                            x = layer(x)
                    return cross_entropy(x, y)

                zero = torch.zeros((), requires_grad=True)
                (slope,) = torch.autograd.grad(loss(zero), zero, create_graph=True)
                (curvature,) = torch.autograd.grad(slope, zero)
                changes.append((path, role, float(slope.detach()), float((slope + curvature / 2).detach())))
    for effect in result.forward:
        own = [(a, b) for path, role, a, b in changes if (path, role) == (effect.unit.path, effect.unit.role)]
        first, second = (sum(column) / 3 for column in zip(*own, strict=True))
        assert effect.first.value == pytest.approx(first, rel=1e-3, abs=1e-7)
        # Two products per batch estimate e.He: the terms between units have mean zero, and are not zero.
        assert effect.second.value == pytest.approx(second, abs=0.5 * abs(second - first) + 3e-5)
        assert effect.alone.value == pytest.approx(second, rel=0.05, abs=2e-5)


def test_the_estimates_of_all_sites_cost_less_than_six_gradients():
    """Counted in operations of matrix products, on a second batch: the first one is traced."""
    torch.manual_seed(6)
    layers = [layer for width in (16, 32, 32, 32) for layer in (nn.LazyLinear(width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.LazyLinear(8)).eval()
    batches = [(torch.randn(9, 16), torch.randint(8, (9,))) for _ in range(2)]
    model(batches[0][0])

    def operations(profiler) -> int:
        products = ("aten::mm", "aten::addmm", "aten::bmm")
        return sum(event.flops for event in profiler.events() if event.name in products)

    def of_a_batch(estimates: bool) -> int:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True)
        sensitivity(
            model, batches, policy="e3m4", loss=cross_entropy, by="site", gradients=False, estimates=estimates,
            progress=lambda done: profiler.start() if done == 1 else profiler.stop(),
        )  # fmt: skip
        return operations(profiler)

    x, y = batches[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profiler:
        loss = cross_entropy(model(x.clone().requires_grad_()), y)
        torch.autograd.grad(loss, list(model.parameters()))
    gradient = operations(profiler)
    elements = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    first = model[0].weight.numel()
    products = 2 * 9 * (3 * elements - first)  # the input of the first layer needs no gradient
    assert gradient == products
    assert 0 < (of_a_batch(True) - of_a_batch(False)) / gradient <= 6


def test_one_unit_has_the_exact_second_order(batches):
    """With a single unit no terms lie between units, so the products give e.He itself."""
    torch.manual_seed(4)
    model = nn.Linear(6, 3).eval()
    result = sensitivity(model, batches, policy={"weight": "e2m1fn"}, loss=cross_entropy)
    (effect,) = result.forward
    error = fpsim.round(model.weight.detach(), "e2m1fn") - model.weight.detach()
    want = []
    for x, y in batches:
        p = torch.softmax(model(x).detach(), -1).double()
        u = (x @ error.T).double()
        first = ((p - nn.functional.one_hot(y, 3)) * u).sum() / len(y)
        curvature = ((p * u * u).sum(-1) - (p * u).sum(-1) ** 2).mean()
        want.append((float(first), float(first + curvature / 2)))
    first, second = (sum(column) / 3 for column in zip(*want, strict=True))
    assert effect.first.value == pytest.approx(first, rel=1e-4)
    assert effect.second.value == pytest.approx(second, rel=1e-4)


def test_modules_switch_their_sites_together_and_overflow_is_marked(model, batches):
    result = sensitivity(model, batches, policy="e5m2/ovf_inf", loss=lambda z, y: cross_entropy(z, y))
    assert {effect.unit for effect in result.forward} == {
        Unit(path, "forward") for path in ("first", "planted", "last")
    }
    large = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        large[0].weight.mul_(1e6)
        large[1].weight.mul_(1e-6)
    result = sensitivity(large, batches, policy="e5m2/ovf_inf", loss=cross_entropy, gradients=False)
    assert result.forward[0].nonfinite == 3 and not math.isfinite(result.forward[0].alone.value)
    assert math.isnan(result.forward[0].first.value) and math.isnan(result.forward[0].second.value)


def test_tied_weights_are_one_parameter_with_two_sites(batches):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()
    model[2].weight = model[0].weight
    result = sensitivity(model, batches, policy="e3m4", loss=cross_entropy)
    assert {effect.unit.path for effect in result.forward} == {"0", "2"}
    for effect in result.forward:
        assert effect.alone.value == pytest.approx(effect.second.value, abs=0.2 * abs(effect.alone.value) + 1e-4)


def test_stochastic_rounding_is_measured_with_one_draw_per_batch_and_has_no_estimates(model, batches):
    options = {"policy": "e3m4/stochastic", "loss": cross_entropy, "gradients": False, "estimates": False}
    first, again = (sensitivity(model, batches, **options) for _ in range(2))
    assert first.forward == again.forward and all(effect.first is None for effect in first.forward)
    assert all(math.isfinite(effect.alone.value) for effect in first.forward)


def test_stochastic_rounding_in_backward_leaves_the_estimates_as_they_are(model, batches):
    stochastic = {"activation": "e3m4", "weight": "e3m4", "gradient": "e3m4/stochastic"}
    found, want = (
        sensitivity(model, batches[:1], policy=policy, loss=cross_entropy, gradients=False)
        for policy in (stochastic, "e3m4")
    )
    numbers = [[(e.unit, e.first.value, e.second.value) for e in result.forward] for result in (found, want)]
    assert numbers[0] == numbers[1]


def test_results_are_shown_as_text_frames_html_and_plots(result):
    pytest.importorskip("matplotlib")
    frame = result.to_pandas()
    assert list(frame["alone"][:6]) == [effect.alone.value for effect in result.forward]
    assert list(frame["gradient_change"][6:]) == [effect.gradient.relative.value for effect in result.backward]
    for text in (str(result), result._repr_html_()):
        assert all(word in text for word in ("planted fprop weight", "g.e + e.He/2", "planted dgrad weight", "cosine"))
    measured = result.plot(most=4).containers[0].lines[0]
    assert measured.get_xdata().tolist() == [effect.alone.value for effect in result.forward[:4]]


def test_wrong_input_is_refused_with_a_remedy(model, batches):
    cases = [
        ({"policy": None}, ValueError, "rounds nothing"),
        ({"policy": {"format": "none"}}, ValueError, "rounds nothing in this model"),
        ({"policy": {"gradient": "e5m2"}, "gradients": False}, ValueError, "forward pass.*measure gradients too"),
        ({"by": "layer"}, ValueError, "unknown by 'layer'"),
        ({"policy": {"format": "bf16", "accumulator": "fp32"}}, ValueError, "leave accumulator out"),
        ({"policy": {"format": "bf16", "modules": {"x": "e4m3fn"}}}, ValueError, "'x' matches no module"),
        ({"loss": lambda z, y: z.detach().sum()}, ValueError, "the loss has no gradient.* pass gradients=False"),
        ({"loss": lambda z, y: z.sum() * math.nan}, FloatingPointError, "unrounded model is nan on batch 0"),
        ({"policy": "e4m3fn/stochastic"}, ValueError, "stochastic rounding draws new ones.*pass estimates=False"),
        ({"backend": "inductor"}, ValueError, "unknown backend 'inductor'"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            sensitivity(model, batches, **{"policy": "bf16", "loss": cross_entropy, **changes})
    with pytest.raises(KeyError, match="no module 'head' is rounded: there are first, last, planted"):
        sensitivity(model, batches[:1], policy="bf16", loss=cross_entropy, estimates=False)["head"]


def test_gradients_that_are_not_finite_are_no_change_and_small_ones_have_a_cosine():
    linear = nn.Linear(3, 2).double().eval()
    batches = [torch.randn(4, 3).double()]
    with pytest.raises(FloatingPointError, match=r"gradient of weight .* not finite on batch 0: pass gradients=False"):
        sensitivity(linear, batches, policy="bf16", estimates=False, loss=lambda z: (z * 0).abs().sqrt().sum())
    result = sensitivity(linear, batches, policy="e11m7", estimates=False, loss=lambda z: 1e-100 * z.square().sum())
    plain = sensitivity(linear, batches, policy="e11m7", estimates=False, loss=lambda z: z.square().sum())
    assert result.gradient.cosine.value == pytest.approx(plain.gradient.cosine.value, rel=1e-6)
