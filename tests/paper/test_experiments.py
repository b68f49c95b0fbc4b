"""The conditions of the paper's experiments are those that their names say, and they run from plan to report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import fpsim
from fpsim import parse_format, reference
from fpsim.casts import parse_cast
from fpsim.paper.config import run_key
from fpsim.paper.data import DataConfig, batches, load
from fpsim.paper.experiments import EXPERIMENTS, SIZES, Setting, experiment
from fpsim.paper.models import ModelConfig, build
from fpsim.paper.report import report
from fpsim.paper.storage import read_records
from fpsim.paper.sweeps import Planned, read_sweep, sweep
from fpsim.paper.training import run
from fpsim.paper.verdicts import rules
from fpsim.policy import Policy

SCRIPT = """
import torch


class Bigram(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 8)
        self.lm_head = torch.nn.Linear(8, vocabulary, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.embed(tokens))


def build(vocabulary):
    return Bigram(vocabulary)
"""


@pytest.fixture
def toy(text, tmp_path):
    """From a setting to one that takes seconds: a model with one product, four steps, one seed and rate."""
    script, source = tmp_path / "bigram.py", tmp_path / "times.txt"
    script.write_text(SCRIPT)
    source.write_bytes(text)

    def shrink(setting: Setting) -> Setting:
        model = ModelConfig(family="script", script=f"{script}:build", context=12)
        base = replace(
            setting.base,
            model=model,
            data=DataConfig(str(source)),
            steps=4,
            batch=4,
            validate_every=4,
            validation_batches=1,
            measure_every=2,
            ranges_every=min(setting.base.ranges_every, 4),
            backend="interpreted",
        )
        return replace(setting, base=base, rates=setting.rates[:1], seeds=1)

    return shrink


@pytest.mark.parametrize("number", [1, 2, 8])
def test_the_quick_setting_runs_from_plan_to_report(number, toy, tmp_path):
    chosen = experiment(number)
    plan = chosen.plan(toy(chosen.settings["quick"]))
    assert [planned.condition for planned in plan] == list(chosen.conditions(chosen.settings["quick"]))
    facts = {"experiment": {"reference": chosen.reference, "pairs": chosen.pairs, "question": chosen.question}}
    outcome = sweep(plan, tmp_path / "sweep", executor="serial", facts=facts, console=Console(quiet=True))
    assert (outcome.computed, outcome.failures) == (len(plan), ())
    page = report(tmp_path / "sweep").read_text()
    assert chosen.question in page
    numbers = json.loads((page_folder := tmp_path / "sweep").joinpath("outcomes.json").read_text())
    assert [row["condition"] for row in numbers["Conditions"]] == [planned.condition for planned in plan]
    figures = {path.stem for path in (page_folder / "figures").iterdir()}
    assert figures >= {"loss", "loss_differences", "sharpness"}
    assert "heat_maps" not in figures  # there is one rate
    runs, _ = read_sweep(page_folder)
    losses = {run.condition: run["loss"][-1] for run in runs}
    if number == 1:
        assert len(set(losses.values())) == len(plan)  # every width and rounding makes another run
    if number == 2:
        assert losses["e7m7, centred"] == losses["e8m7"]  # nothing lies beyond 2^64 or below 2^-62
        ranges = {run.condition: run["underflowed_gradient"][3] for run in runs}
        assert ranges["e4m7, centred"] == ranges["e4m7, inner only"] > 0.5
        assert ranges["e4m7, outer only"] == ranges["e8m7"] == 0.0
    if number == 8:
        history, _ = read_records(tmp_path / "sweep" / "runs" / f"{run_key(plan[0].config)}.parquet")
        assert [record.hessian_eigenvalue is not None for record in history] == [False, True, False, True]
        assert all(record.lbfgsb_5e4 <= record.sharpness_5e4 * (1 + 1e-9) for record in history[1::2])


@pytest.mark.parametrize("number", list(EXPERIMENTS))
@pytest.mark.parametrize("size", SIZES)
def test_every_plan_is_a_full_grid_of_valid_policies(number, size):
    chosen = experiment(number)
    setting = chosen.settings[size]
    plan = chosen.plan(setting)
    conditions = chosen.conditions(setting)
    assert len(plan) == len(conditions) * len(setting.rates) * setting.seeds
    assert chosen.reference in conditions
    assert {name for pair in chosen.pairs for name in pair} <= set(conditions)
    for planned in plan:
        for options in (planned.config.options, *(options for _, options in planned.config.stages)):
            if options is not None:
                Policy.from_options(options).check_names_format()
    assert len({_identity(planned) for planned in plan}) == len(plan)


def _identity(planned: Planned) -> str:
    return repr(planned.config)


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match="no experiment 12: there are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"):
        experiment(12)


def rounded(number: int, condition: str, value: Fraction | float) -> Fraction:
    """What a condition makes of an activation, by the exact reference."""
    chosen = experiment(number)
    options = chosen.conditions(chosen.settings["quick"])[condition]["options"]
    cast = Policy.from_options(options).cast("fprop", "activation")
    return reference.round(Fraction(value), cast.format, cast.rounding, cast.overflow)


def test_a_truncated_mantissa_is_a_bit_mask():
    value = Fraction(0b1_1111111, 128)
    assert rounded(1, "e8m3 truncated", value) == Fraction(0b1_111, 8)
    assert rounded(1, "e8m3 nearest", value) == 2
    assert rounded(1, "e8m7 truncated", value) == rounded(1, "e8m7 nearest", value) == value


def test_the_two_readings_of_seven_exponent_bits():
    assert rounded(2, "e7m7, bias kept", 100) == 2 - Fraction(1, 128)
    assert rounded(2, "e7m7, bias kept", Fraction(1, 2**126)) == Fraction(1, 2**126)
    assert rounded(2, "e7m7, centred", 2**40) == 2**40
    assert rounded(2, "e7m7, centred", 2**70) == (2 - Fraction(1, 128)) * 2**63
    assert rounded(2, "e7m7, centred", Fraction(1, 2**70)) == 0


@pytest.mark.parametrize("bits", [4, 5])
def test_the_ends_of_a_narrow_exponent_are_clipped_one_at_a_time(bits):
    bias = 2 ** (bits - 1) - 1
    largest, tiny = (2 - Fraction(1, 128)) * 2**bias, Fraction(1, 2 ** (bias + 20))
    both, outer, inner = (f"e{bits}m7, {end}" for end in ("centred", "outer only", "inner only"))
    assert [rounded(2, name, 2**20) for name in (both, outer, inner)] == [largest, largest, 2**20]
    assert [rounded(2, name, tiny) for name in (both, outer, inner)] == [0, tiny, 0]
    smallest = Fraction(1, 2 ** (bias + 6))  # the smallest subnormal
    assert rounded(2, both, smallest) == rounded(2, inner, smallest) == smallest


@pytest.mark.parametrize("size", ["quick", "full"])
def test_every_remedy_rounds_other_layers_or_at_other_times(size):
    setting = experiment(7).settings[size]
    network = build(setting.base.model, seed=0)
    linears = [f"network.{name}" for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    casts = {}
    for name, changes in experiment(7).conditions(setting).items():
        policy = Policy.from_options(changes["options"])
        high = [path for path in linears if policy.at(path).cast("fprop", "weight").format == parse_format("e8m7")]
        casts[name] = (*high, *changes.get("stages", ()))
    assert len(set(map(repr, casts.values()))) == len(casts) == 9
    head, last = "network.lm_head", f"network.model.layers.{setting.base.model.layers - 1}."
    assert casts["low"] == ()
    assert casts["low, head high"] == (head,)
    assert all(path.startswith("network.model.layers.0.") for path in casts["low, first layer high"])
    assert all(path.startswith(last) for path in casts["low, last layer high"])
    assert len(casts["low, first layer high"]) == len(casts["low, last layer high"]) == 7
    assert len(casts["low, head and both ends high"]) == 15


@pytest.mark.parametrize("bits", range(1, 8))
def test_truncation_is_the_mask_of_the_bits_of_every_bfloat16(bits):
    """The mask keeps sign, exponent and the highest bits of the mantissa. Infinities pass, and NaN stays NaN."""
    options = experiment(1).conditions(experiment(1).settings["paper"])[f"e8m{bits} truncated"]["options"]
    cast = Policy.from_options(options).cast("dgrad", "gradient")
    codes = torch.arange(1 << 16, dtype=torch.int32)
    values, masked = ((each << 16).view(torch.float32) for each in (codes, codes & (0xFFFF << (7 - bits))))
    for dtype in (torch.bfloat16, torch.float32):
        got = fpsim.round(values.to(dtype), cast.format, rounding=cast.rounding, overflow=cast.overflow).float()
        number = ~values.isnan()
        assert got[~number].isnan().all()
        assert torch.equal(got[number].view(torch.int32), masked[number].view(torch.int32))


def test_the_paper_s_recipe_is_the_preset():
    masked = experiment(1).conditions(experiment(1).settings["quick"])["e8m3 truncated"]["options"]
    own = Policy.from_options({**masked, "attention": "keep"})
    assert own == Policy.preset("paper:e8m3")
    assert parse_cast("e8m3/toward_zero/sat_propagate") == own.cast("wgrad", "gradient")
    assert parse_cast("e8m3/toward_zero") == replace(own.cast("wgrad", "gradient"), overflow="ovf_inf")


class _Mask(torch.autograd.Function):
    """A linear layer without bias in bf16, whose operands a bit mask truncates in all three products."""

    @staticmethod
    def forward(ctx, x, weight, bits):
        ctx.bits = bits
        ctx.save_for_backward(x, weight)
        return (_masked(x, bits).float() @ _masked(weight, bits).float().t()).bfloat16()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = (_masked(each, ctx.bits).float() for each in ctx.saved_tensors)
        masked = _masked(gradient, ctx.bits).float()
        return (masked @ weight).bfloat16(), (masked.flatten(0, 1).t() @ x.flatten(0, 1)).bfloat16(), None


def _masked(x: torch.Tensor, bits: int) -> torch.Tensor:
    assert x.dtype == torch.bfloat16
    codes = x.view(torch.int16).to(torch.int32) & (0xFFFF << (7 - bits))
    return codes.to(torch.int16).view(torch.bfloat16)


def test_the_paper_s_size_is_a_mask_in_bf16_mixed_precision(toy):
    """One layer and three steps of AdamW, with the mask written out; accumulation may differ in the last place."""
    setting = toy(experiment(1).settings["paper"])
    changes = experiment(1).conditions(setting)["e8m3 truncated"]
    config = replace(setting.base, **changes, device="cpu", accumulate=1, warmup=0, steps=3, learning_rate=0.01)
    assert config.autocast == "bfloat16"
    network = build(config.model, seed=config.seed)
    data = load(config.data, context=12)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    stream = batches(data.train, batch=4, context=12, seed=config.seed)
    losses = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 3)))
        inputs, targets = next(stream)
        hidden = network.embed(inputs).bfloat16()
        logits = _Mask.apply(hidden, network.lm_head.weight.bfloat16(), 3)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [record.loss for record in run(config, data)] == pytest.approx(losses, rel=1e-5)
    unmasked = [record.loss for record in run(replace(config, options=None), data)]
    assert unmasked != pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("number", "size", "sentence"),
    [
        (1, "paper", "The runs train in bf16 mixed precision with float32 weights and optimizer, as the paper's did."),
        (1, "quick", "The paper trained in bf16 mixed precision. Here everything that is not rounded is float32."),
        (2, "paper", "The paper trained in bf16 mixed precision. Here everything that is not rounded is float64."),
        (4, "paper", "in the others everything that is not rounded is float32."),
    ],
)
def test_the_report_says_whether_the_runs_use_the_mixed_precision_of_the_paper(number, size, sentence):
    assert experiment(number).differences(size).endswith(sentence)


def test_mixed_precision_is_used_at_the_paper_s_size_alone():
    for number, chosen in EXPERIMENTS.items():
        for size in SIZES:
            setting = chosen.settings[size]
            used = {planned.config.autocast for planned in chosen.plan(replace(setting, seeds=1))}
            if number == 4:
                assert used == {None, "bfloat16"}
            else:
                assert used == ({"bfloat16"} if size == "paper" and number not in (2, 9, 10, 11) else {None})


def test_the_sizes_of_the_sensitivity_are_those_that_their_names_say():
    setting = experiment(9).settings["quick"]
    conditions = experiment(9).conditions(setting)
    sizes = {name: (changes.get("model") or setting.base.model) for name, changes in conditions.items()}
    base = setting.base.model
    for name, model in sizes.items():
        width, depth = (
            next((factor for suffix, factor in known.items() if name.endswith(suffix)), 1)
            for known in ({"half width": 0.5, "double width": 2}, {"twice as deep": 2, "four times as deep": 4})
        )
        assert (model.hidden, model.layers) == (base.hidden * width, base.layers * depth), name
        assert model.mlp / model.hidden == base.mlp / base.hidden
        assert model.family == ("qwen3" if name.endswith("QK norm") else "llama")
        assert conditions[name].get("z_loss", 0.0) == (1e-4 if name.endswith("z-loss") else 0.0)
    # Every format stands at three widths, with all its roundings.
    assert len([name for name in sizes if name.endswith("half width")]) == 15
    with pytest.raises(ValueError, match="experiment 9 varies the sizes of a Llama, and gpt2, 1 layers"):
        experiment(9).plan(replace(setting, base=replace(setting.base, model=replace(base, family="gpt2"))))


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_attention_is_the_one_that_its_name_says(size):
    setting = experiment(10).settings[size]
    found = {}
    for planned in experiment(10).plan(replace(setting, seeds=1)):
        assert planned.config.attention is None and planned.config.autocast is None  # both would override the policy
        policy = Policy.from_options(planned.config.options)
        found[planned.condition] = policy.attention, policy.cast("fprop", "activation").format.name
    assert found.pop("tf32, opened") == ("round", parse_format("tf32").name)
    kernels = {name.removeprefix("bf16, "): attention for name, (attention, format) in found.items()}
    assert {format for _, format in found.values()} == {parse_format("bf16").name}
    assert (kernels.pop("fused"), kernels.pop("opened")) == ("keep", "round")
    stored = {"probabilities": "bf16", "output": "bf16", "score_gradients": "bf16"}
    flash = {
        "flash2_bf16": fpsim.FlashAttention(inputs="bf16", arithmetic="fp32", **stored),
        "all_bf16": fpsim.FlashAttention(inputs="bf16", arithmetic="bf16", block_q=512, block_k=512, late_scale=False),
    }
    expected = {**flash, **{f"{name}, cured": replace(steps, cure=2.0) for name, steps in flash.items()}}
    assert kernels == expected


def test_registered_seeds_are_fresh_and_registered_settings_are_recognised():
    known = [range(0, 10), range(300, 310)]  # those of paper/README.md
    for number in (9, 10, 11):
        chosen = experiment(number)
        for size in SIZES:
            setting = chosen.settings[size]
            seeds = range(setting.first_seed, setting.first_seed + setting.seeds)
            assert not any(seed in other for other in known for seed in seeds)
            assert chosen.registration(size, setting) == {"is_registered": size != "paper"}
            other = replace(setting, base=replace(setting.base, steps=7))
            assert chosen.registration(size, other) == {"is_registered": False}
        names = chosen.conditions(chosen.settings["quick"])
        for claim in rules().experiments[str(number)]["claims"]:
            for side in (claim["first"], claim["second"]):
                assert set([side] if isinstance(side, str) else side) <= set(names), claim["text"]
    assert experiment(1).registration("quick", experiment(1).settings["quick"]) == {}


def test_the_readme_in_python_is_short():
    text = (Path(__file__).parents[2] / "paper" / "README.md").read_text()
    code = text.split("```python")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    compile(code, "README", "exec")
