"""A sample of real architectures: the rounded operands are those counted by hand, none escapes, no bit differs.

The command ``python -m tests.models`` makes the whole table, with Inductor's kernels compiled.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fpsim
from fpsim.compile_backend import Gap, Plan

from .__main__ import LARGEST_DIFFERENCE, cells, markdown
from .architectures import ARCHITECTURES, CLASSES, FIRST, LAYERS, Architecture, images
from .emulation import emulated_step
from .measure import Row, atens_kernels, difference, first_step, largest_difference, measure, same_bits, step

#: Fast models that share little: disentangled attention, convolutions of every kind, recurrences, only linear layers.
SAMPLE = ("deberta-v2", "vit", "convnext", "resnet", "unet", "lstm-cell", "lstm", "gru", "mixer")
#: Models that run interpreted and are emulated: latent attention with experts, local attention, a scan in chunks,
#: modulated layers, convolutions, recurrences.
EMULATED = ("deepseek-v3-batched", "modernbert", "mamba2", "dit", "unet", "lstm")
#: The models that also run: interpreted, and compiled.
AUDITED = ("vit", "resnet", "unet", "mixer")
COMPILED = ("unet", "mixer")


def installed(name: str) -> Architecture:
    """The architecture; the test is skipped if the library of the model is not installed."""
    if name == "dit":
        pytest.importorskip("diffusers")
    return ARCHITECTURES[name]


def explained(name: str) -> Plan:
    model, inputs = ARCHITECTURES[name].build()
    return fpsim.explain(model, **inputs)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_operands_are_those_counted_by_hand_and_all_are_rounded(name: str) -> None:
    plan = explained(name)
    assert len(plan.sites) == ARCHITECTURES[name].operands
    assert all(site.cast for site in plan.sites)
    assert plan.gaps == ()


@pytest.mark.parametrize("name", AUDITED)
def test_the_products_that_run_are_those_counted_by_hand_and_none_escapes(name: str) -> None:
    model, inputs = ARCHITECTURES[name].build()
    audit = fpsim.audit(torch.compile(model, backend="fpsim_eager"), **inputs)
    assert audit.escaped == ()
    sites = explained(name).sites
    joint = sum(site.operator == "aten.convolution_backward" and site.kind == "dgrad" for site in sites) // 2
    assert audit.covered == ARCHITECTURES[name].operands // 2 - joint  # one call computes dgrad and wgrad


@pytest.mark.parametrize("name", EMULATED)
def test_a_step_has_the_bits_of_an_emulation_that_shares_no_code(name: str) -> None:
    architecture = installed(name)
    emulated, operands = emulated_step(architecture)
    assert operands == architecture.operands
    assert same_bits(first_step(architecture, "fpsim_eager"), emulated)


def test_experts_in_an_operator_of_their_own_are_refused() -> None:
    """The remedy is the configuration of ``deepseek-v3-batched``, which is emulated above."""
    with pytest.raises(BackendCompilerFailed, match="Set experts_implementation='batched_mm' in the model's conf"):
        first_step(ARCHITECTURES["deepseek-v3"], "fpsim_eager")


@pytest.mark.exhaustive
def test_detr_is_the_emulation_but_for_the_order_of_one_sum() -> None:
    """Dynamo traces it for a minute: it breaks the graph in the model and in the loss."""
    detector = ARCHITECTURES["detr"]
    emulated, operands = emulated_step(detector)
    assert operands == detector.operands
    assert difference(first_step(detector, "fpsim_eager"), emulated) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_bits_are_the_interpreters_where_sums_have_the_same_order(name: str) -> None:
    """Inductor partitions, recomputes and schedules, but calls the same kernels as the interpreter."""
    with atens_kernels():
        compiled = first_step(ARCHITECTURES[name], "fpsim")
    interpreted = first_step(ARCHITECTURES[name], "fpsim_eager")
    assert same_bits(compiled, interpreted)
    model, inputs = ARCHITECTURES[name].build()
    assert not same_bits(interpreted, step(model, model, inputs)), "rounding changes something"


def test_the_first_layer_has_no_dgrad_and_the_others_have() -> None:
    kinds: dict[str, Counter[str]] = {}
    for site in explained("mixer").sites:
        kinds.setdefault(site.path, Counter())[site.kind] += 1
    assert kinds.pop("network.embed") == {"fprop": 2, "wgrad": 2}
    assert len(kinds) == LAYERS * 4 + 1
    assert all(counted == {"fprop": 2, "dgrad": 2, "wgrad": 2} for counted in kinds.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_the_same_at_every_build(name: str) -> None:
    architecture = installed(name)
    (model, inputs), (other, others) = architecture.build(), architecture.build()
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert inputs.keys() == others.keys()
    assert all(torch.equal(inputs[each], others[each]) for each in inputs)


# -- the table ---------------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    """A model with a matrix inverse, an operator that cannot be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.linalg.inv(pixel_values)).sum()


def test_a_refused_model_is_a_row_with_the_error() -> None:
    row = measure(Architecture("refused", Refused, images, FIRST))
    assert row.plan is not None and row.gaps.total() >= 1
    assert list(row.errors) == ["compile"] and row.errors["compile"].startswith("UnroundedError: aten.linalg_inv")
    assert cells(row)[-5:] == ("error",) * 5
    assert "UnroundedError" in markdown([row])


def test_a_gap_and_a_break_are_told_apart() -> None:
    gaps = (Gap("a", "aten.convolution", "why"), Gap("", "(graph break)", "print: code there runs uncompiled"))
    row = Row(ARCHITECTURES["mixer"], plan=Plan((), gaps))
    assert row.gaps == {("aten.convolution", "why"): 1} and row.breaks == ["print"]


def test_differences_are_relative_to_the_largest_gradient() -> None:
    ours = {"loss": torch.tensor(2.0), "a": torch.tensor([4.0, 0.0]), "b": torch.tensor([1e-9])}
    others = {"loss": torch.tensor(2.0), "a": torch.tensor([4.0, 1.0]), "b": torch.tensor([2e-9])}
    assert largest_difference(ours, others) == 0.25
    assert same_bits(ours, ours) and not same_bits(ours, others)
    assert not same_bits({"loss": torch.tensor(0.0)}, {"loss": torch.tensor(-0.0)})
