"""`search` against all choices of small models, computed with operands that `fpsim.round` rounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fpsim
from fpsim import Policy
from fpsim.casts import parse_cast
from fpsim.compile_backend import Site
from fpsim.evaluate import search
from fpsim.evaluate.costs import bit_operations, bits_of, weight_bits, weight_bytes
from fpsim.evaluate.searching import best_choice

FORMATS = ("e2m1fn", "e3m2fn", "bf16x")
CASTS = {"e2m1fn": "e2m1fn", "e3m2fn": "e3m2fn", "bf16x": "bf16"}
BITS = {"e2m1fn": 4, "e3m2fn": 6, "bf16x": 16}
POLICIES = {name: {"format": cast} for name, cast in CASTS.items()}


def trained(seed: int) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A small classifier that has learned a little, and batches for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(96, 6)
    y = (x @ torch.randn(6, 3)).argmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]


def by_hand(model, batches, choice) -> float:
    """The mean loss when the linear layers are rounded to the formats of ``choice``; None rounds nothing."""
    losses = []
    with torch.no_grad():
        for x, y in batches:
            formats = iter(choice)
            for layer in model:
                if not isinstance(layer, nn.Linear):
                    x = layer(x)
                    continue
                name = next(formats)
                a, w = (v if name is None else fpsim.round(v, CASTS[name]) for v in (x, layer.weight))
                x = a @ w.T + layer.bias
            losses.append(float(cross_entropy(x, y)))
    return sum(losses) / len(losses)


def all_choices(model, batches) -> dict[tuple[str, ...], tuple[float, float]]:
    """For each choice its cost and the change of the loss."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    exact = by_hand(model, batches, [None] * len(layers))
    return {
        choice: (
            sum(BITS[name] * layer.weight.numel() for name, layer in zip(choice, layers, strict=True)),
            by_hand(model, batches, choice) - exact,
        )
        for choice in itertools.product(FORMATS, repeat=len(layers))
    }


#: The greatest cost of one step: the widest layer in the next wider format.
STEP = 12 * 8 * 10


def test_the_cheapest_within_a_tolerance_is_within_one_step_of_the_optimum():
    near = exact = 0
    for seed in range(10):
        model, batches = trained(seed)
        every = all_choices(model, batches)
        tolerance = sorted(change for _, change in every.values())[len(every) // 3]
        result = search(model, batches, formats=POLICIES, tolerance=tolerance + 1e-7, loss=cross_entropy, trials=8)
        cost, change = every[tuple(result.choices.values())]
        assert result.cost == cost and result.change.value == pytest.approx(change, abs=1e-6)
        assert result.met and len(result.measured) <= 8
        optimum = min(cost for cost, change in every.values() if change <= tolerance)
        near += cost <= optimum + STEP
        exact += cost == optimum
    assert near >= 9 and exact >= 7


def test_a_format_that_fails_in_one_layer_does_not_drown_the_others():
    generator = torch.Generator().manual_seed(0)
    for trial in range(12):
        costs = 16.0 * torch.randint(1, 100, (5, 3), generator=generator).double().sort(1).values
        changes = 1e-3 * torch.rand(5, 3, generator=generator).double().sort(1, descending=True).values
        changes[trial % 5, 0] = (1e6, 1.0, 1e-3)[trial % 3]  # infinite, large, and none
        every = list(itertools.product(range(3), repeat=5))

        def total(values, choice):
            return sum(float(values[g, f]) for g, f in enumerate(choice))

        for wanted, limited, limit in ((costs, changes, 2e-3), (changes, costs, float(costs.mean()) * 5)):
            optimum = min((total(wanted, c) for c in every if total(limited, c) <= limit), default=None)
            found = best_choice(wanted.numpy(), limited.numpy(), limit)
            if optimum is None:
                assert found is None
            else:
                assert total(limited, found) <= limit * (1 + 1e-6)
                assert total(wanted, found) == pytest.approx(optimum, rel=1e-6)


def test_a_module_that_is_called_twice_has_one_weight():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 2)).eval()
    batches = [(torch.randn(3, 4), torch.randint(2, (3,)))]
    costs = {}
    for cost in ("bits", "bytes", "macs"):
        found = search(model, batches, formats=["e2m1fn", "bf16"], budget=1e9, loss=cross_entropy, cost=cost, trials=1)
        assert len(found.measured) == 1
        costs[cost] = found.cost
    width = {"e2m1fn": 4, "bf16": 16}
    choice = {"macs" if "3" not in path else "last": width[name] for path, name in found.choices.items()}
    assert costs["macs"] == 2 * 48 * choice["macs"] ** 2 + 24 * choice["last"] ** 2
    assert costs["bits"] == 8 * costs["bytes"] == 16 * choice["macs"] + 8 * choice["last"]


def test_the_best_within_a_budget_is_near_the_optimum():
    for seed in range(2):
        model, batches = trained(seed)
        every = all_choices(model, batches)
        budget = 192 * 7.0
        result = search(model, batches, formats=POLICIES, budget=budget, loss=cross_entropy, trials=8)
        cost, change = every[tuple(result.choices.values())]
        assert result.met and cost <= budget and result.cost == cost
        better = [other for price, other in every.values() if price <= budget and other < change - 1e-6]
        assert len(better) <= 2


@pytest.fixture(scope="module")
def found():
    model, batches = trained(0)
    return model, batches, search(model, batches, formats=POLICIES, tolerance=0.02, loss=cross_entropy, trials=20)


def test_the_policy_is_the_choice_and_goes_through_json(found):
    model, batches, result = found
    policy = Policy.from_json(result.policy.to_json())
    assert policy == result.policy
    for path, name in result.choices.items():
        assert policy.at(path) == Policy(format=CASTS[name])
    compiled = torch.compile(model, backend="fpsim_eager", options={"policy": policy})
    with torch.no_grad():
        loss = sum(float(cross_entropy(compiled(x), y)) for x, y in batches) / 3
    exact = by_hand(model, batches, [None] * 3)
    assert result.change.value == pytest.approx(loss - exact, abs=1e-6)


def test_the_frontier_has_no_point_that_another_one_beats(found):
    pytest.importorskip("matplotlib")
    _, _, result = found
    costs, changes = zip(*((point.cost, point.change.value) for point in result.frontier), strict=True)
    assert list(costs) == sorted(set(costs)) and list(changes) == sorted(set(changes), reverse=True)
    for point in result.measured:
        assert any(
            cost <= point.cost and change <= point.change.value for cost, change in zip(costs, changes, strict=True)
        )
    assert list(result.to_pandas()["cost"]) == list(costs)
    assert result.plot().get_lines()[0].get_xdata().tolist() == list(costs)
    assert all(
        word in text for text in (str(result), result._repr_html_()) for word in ("tolerance 0.02 met", "e3m2fn")
    )


def test_a_tolerance_or_budget_that_nothing_meets_is_said_to_fail():
    model, batches = trained(1)
    coarse = ["e2m1fn", "e2m0fn"]
    result = search(model, batches, formats=coarse, tolerance=1e-9, loss=cross_entropy, trials=20)
    assert not result.met and "not met" in str(result)
    assert result.change.value == pytest.approx(min(point.change.value for point in result.measured), abs=1e-9)
    result = search(model, batches, formats=POLICIES, budget=100, loss=cross_entropy)
    assert not result.met and set(result.choices.values()) == {"e2m1fn"} and result.cost == 4 * 192


def test_a_loss_that_is_not_finite_under_every_format_meets_no_tolerance():
    model, batches = trained(1)
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    result = search(model, batches, formats=["e5m2/ovf_inf", "e4m3fn/ovf_inf"], tolerance=1e9, loss=cross_entropy)
    assert not result.met and not math.isfinite(result.change.value)


class Attention(nn.Module):
    """A block whose projections stand side by side, with products of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.tanh(q @ k.transpose(-1, -2)) @ v)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = Attention(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x + self.attn(x))


def site(rows: int, columns: int, role: str, axis: int) -> Site:
    return Site("", "aten.mm", "fprop", "forward", role, (rows, columns), "float32", None, (axis,))


def test_queries_keys_and_values_share_a_format_and_costs_are_counted():
    torch.manual_seed(0)
    model = Network().eval()
    batches = [(torch.randn(2, 4, 8), torch.randn(2, 4, 3)) for _ in range(2)]

    def run(**options):
        return search(model, batches, formats={"mx": "mxfp4", "rows": "int8/row", "none": None},
                      loss=nn.functional.mse_loss, **options)  # fmt: skip

    result = run(tolerance=1e-3, trials=12)
    groups = ["attn.q_proj + attn.k_proj + attn.v_proj", "attn", "attn.o_proj", "head"]
    assert sorted(result.choices) == sorted(groups)
    elements = {groups[0]: 192, "attn": 0, "attn.o_proj": 64, "head": 24}
    rows = {groups[0]: 24, "attn": 0, "attn.o_proj": 8, "head": 3}

    def bits(choices):
        each = {
            "mx": lambda group: 4 * elements[group] + 8 * rows[group],  # rows of 8: one block each
            "rows": lambda group: 8 * elements[group] + 32 * rows[group],
            "none": lambda group: 32 * elements[group],
        }
        return sum(each[name](group) for group, name in choices.items())

    assert all(point.cost == bits(point.choices) for point in result.measured)
    ((weight, _), _) = operands = ((site(64, 32, "weight", 1), site(4, 32, "activation", 1)), (None, None))
    assert (weight_bits(operands), weight_bytes(operands)) == (64 * 32 * 32, 64 * 32 * 4)
    assert bit_operations(operands) == 4 * 64 * 32 * 32 * 32
    assert bits_of(weight, parse_cast("nvfp4")) == 64 * 32 * 4 + 64 * 2 * 8 + 32
    names = {path: result.policy.at(path) for path in ("attn.q_proj", "attn.k_proj", "attn.v_proj")}
    assert len(set(names.values())) == 1
    macs = run(budget=1e9, cost="macs", trials=3)
    exact = next(point for point in macs.measured if set(point.choices.values()) == {"none"})
    products = 8 * 8 * 8 * 4 + 2 * (4 * 4 * 8) * 2 + 8 * 8 * 3  # projections, two products of a batch of 2, the head
    assert exact.cost == products * 32 * 32


def test_wrong_input_is_refused_with_a_remedy(found):
    model, batches, _ = found
    cases = [
        ({}, ValueError, "either tolerance.*or budget"),
        ({"tolerance": 1, "budget": 1}, ValueError, "either tolerance.*or budget"),
        ({"tolerance": math.nan}, ValueError, "finite and not negative, got nan"),
        ({"tolerance": 1, "formats": ["bf16"]}, ValueError, "at least two formats"),
        ({"tolerance": 1, "formats": ["bf16", {"format": "e4m3fn", "skip": "0"}]}, ValueError, "rules for modules"),
        ({"tolerance": 1, "formats": ["bf16", "nvfp4"]}, ValueError, "attention alike"),
        ({"tolerance": 1, "cost": "bit"}, ValueError, "unknown cost 'bit'"),
        ({"tolerance": 1, "batches": iter(batches)}, ValueError, r"read only once.*list\(batches\)"),
        ({"tolerance": 1, "formats": [{"gradient": "e5m2"}, {"gradient": "e4m3fn"}]}, ValueError, "rounds anything"),
        ({"tolerance": 1, "trials": 0}, ValueError, "trials must be at least 1, got 0"),
        ({"tolerance": 1, "formats": ["none", "unrounded"]}, ValueError, "none of the formats none, unrounded rounds"),
        ({"tolerance": 1, "cost": lambda operands: math.nan}, ValueError, "the cost of 0 is nan"),
        ({"tolerance": 1, "cost": lambda operands: -1.0}, ValueError, r"the cost of 0 is -1\.0"),
        ({"tolerance": 1, "backend": "inductor"}, ValueError, "unknown backend 'inductor'"),
        ({"tolerance": 1, "loss": lambda z, y: z.sum() / 0}, FloatingPointError, "unrounded model is .* on batch 0"),
    ]  # fmt: skip
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            search(**{"model": model, "batches": batches, "formats": POLICIES, "loss": cross_entropy, **changes})

    class Shuffled:
        def __iter__(self):
            yield torch.randn(3, 6), torch.zeros(3, dtype=torch.int64)

    with pytest.raises(ValueError, match="differ from pass to pass"):
        search(model, Shuffled(), formats=POLICIES, tolerance=1, loss=cross_entropy)
