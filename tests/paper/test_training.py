"""A run follows its recipe to the letter, and the same configuration gives the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from statistics import median

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fpsim
from fpsim.paper.compiled_loss import OpenAttention, compile_loss
from fpsim.paper.config import RunConfig, compile_key, from_dict, run_key, to_dict
from fpsim.paper.data import batches, validation_batches
from fpsim.paper.models import LanguageModel, llama
from fpsim.paper.record import Record, step_seconds
from fpsim.paper.sweeps import Planned, sweep
from fpsim.paper.trainer import Trainer, evaluate, learning_rate
from fpsim.paper.training import records, run
from fpsim.policy import Policy
from fpsim.recipes import RECIPES, Recipe, RoundedState, fp8_lm
from fpsim.recipes.scaled_loss import ScaledLoss


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, warmup=4, steps=24)

    assert [rate(step) for step in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rate(9) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))))
    assert rate(14) == pytest.approx(1.1)
    assert rate(24) == pytest.approx(0.2)
    assert rate(1000) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_learning_rate_has_a_value_for_every_step_of_the_shortest_run(warmup):
    assert 0 < learning_rate(0, peak=1.0, warmup=warmup, steps=1) <= 1


def test_the_run_is_the_recipe_written_out(config, data, eager):
    model = LanguageModel(llama(config.model, seed=config.seed))
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    history = run(config, data, compile=eager)
    assert [record.step for record in history] == [1, 2, 3, 4, 5, 6]
    for index, (inputs, targets) in enumerate(islice(batches(data.train, batch=4, context=12, seed=1337), 6)):
        rate = learning_rate(index, peak=config.learning_rate, warmup=2, steps=6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(inputs, targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, 1.0 / norm)
        optimizer.step()
        assert history[index].learning_rate == rate
        assert history[index].loss == pytest.approx(loss.item(), rel=1e-5)
        assert history[index].gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    held_out = validation_batches(data.validation, batch=4, context=12, count=2)
    expected = sum(model(*batch).item() for batch in held_out) / 2
    assert history[-1].validation_loss == pytest.approx(expected, rel=1e-5)


def test_validation_is_due_at_its_interval_and_at_the_end(config, data, eager):
    history = run(config, data, compile=eager)
    assert [record.step for record in history if record.validation_loss is not None] == [4, 6]


def test_training_lowers_the_loss(config, data, eager):
    history = run(replace(config, steps=40, learning_rate=1e-2), data, compile=eager)
    assert history[0].loss == pytest.approx(math.log(256), abs=0.2)
    assert history[-1].loss < history[0].loss - 1.5
    assert history[-1].validation_loss < history[0].loss - 1.5


def test_the_same_configuration_gives_the_same_bits(config, data, eager):
    history = run(config, data, compile=eager)
    assert history == run(config, data, compile=eager)
    assert history != run(replace(config, seed=1), data, compile=eager)


def test_measured_logits_are_those_of_the_forward_pass(config, data):
    """Not what the backward pass leaves in their memory: compiled code may use that again."""
    config = replace(config, options={"format": "bf16", "output": "bf16"}, measure_every=1, batch=8)
    # The first step alone: validation would be compiled too, and takes a third of the time.
    compiled, interpreted = (next(records(replace(config, backend=kind), data)) for kind in ("compiled", "interpreted"))
    assert compiled.max_abs_logit == pytest.approx(interpreted.max_abs_logit, rel=2**-7)
    assert compiled.sharpness_5e4 == pytest.approx(interpreted.sharpness_5e4, rel=1e-3)


def test_the_same_configuration_gives_the_same_bits_compiled(config, data):
    # Without deterministic kernels about four runs in ten differ: threads race to add up the embedding's gradient.
    config = replace(config, batch=64)
    history = run(config, data)
    assert all(run(config, data) == history for _ in range(6))


def test_a_simulated_run_rounds_and_repeats(config, data):
    def simulated(module, options):
        return torch.compile(module, backend="fpsim_eager", options=options, fullgraph=True, dynamic=False)

    histories = {}
    for name in ("e8m3", "e8m3/toward_zero", "fp32"):
        histories[name] = run(replace(config, options={"format": name}), data, compile=simulated)
    assert run(replace(config, options={"format": "e8m3"}), data, compile=simulated) == histories["e8m3"]
    losses = {name: history[-1].loss for name, history in histories.items()}
    assert len(set(losses.values())) == 3
    assert losses["e8m3"] == pytest.approx(losses["fp32"], abs=0.2)


def test_a_run_of_a_recipe_has_its_policy_and_its_optimizer(config, data):
    config = replace(config, backend="interpreted", attention="opened", steps=3)
    policy = Policy(format="bf16")
    plain = run(replace(config, options={"policy": policy}), data)
    assert _losses(run(replace(config, recipe=Recipe("mine", "", policy)), data)) == _losses(plain)
    # The state that round_optimizer rounds, rounded here by hand after each step of a fresh optimizer.
    recipe = Recipe("mine", "", policy, optimizer=RoundedState({"exp_avg": "e4m3fn", "exp_avg_sq": "bf16"}))
    trainer = Trainer(replace(config, options={"policy": policy}), None)
    expected = []
    for index, batch in enumerate(islice(batches(data.train, batch=4, context=12, seed=1337), 3)):
        expected.append(trainer.step(index, batch, [batch], None).loss)
        for state in trainer.optimizer.state.values():
            state["exp_avg"].copy_(fpsim.round(state["exp_avg"], "e4m3fn"))
            state["exp_avg_sq"].copy_(fpsim.round(state["exp_avg_sq"], "bf16"))
    assert _losses(run(replace(config, recipe=recipe), data)) == expected != _losses(plain)


def test_an_exchange_of_gradients_takes_several_processes(config, data, tmp_path):
    config = replace(config, recipe=fp8_lm(processes=True))
    with pytest.raises(ValueError, match=r"one process averages none: .* fp8_lm\(processes=False\)"):
        run(config, data)
    with pytest.raises(ValueError, match="one process averages none"):  # before a worker starts
        sweep([Planned("fp8_lm", config)], tmp_path)


def test_a_recipe_stands_in_place_of_options_and_is_part_of_the_key():
    recipe = Recipe("mine", "", Policy(format="bf16"))
    config = RunConfig(recipe=recipe)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    other = RunConfig(recipe=Recipe("mine", "", Policy(format="bf16"), optimizer=RoundedState("bf16")))
    assert len({run_key(each) for each in (RunConfig(), config, other)}) == 3
    assert len({compile_key(each) for each in (RunConfig(), config, other)}) == 3
    with pytest.raises(ValueError, match="leave out options and stages"):
        RunConfig(recipe=recipe, options={})
    with pytest.raises(ValueError, match="a recipe has a name"):
        RunConfig(recipe={"source": ""})


def test_validation_leaves_scales_of_earlier_steps_alone(config, data):
    recipe = Recipe("delayed", "", Policy(format="e4m3fn/tensor/history:3", products="weights"))
    config = replace(config, recipe=recipe, backend="interpreted", ranges_every=1)
    often, once = (run(replace(config, validate_every=every), data) for every in (1, config.steps))
    assert _losses(often) == _losses(once)
    assert often[-1].validation_loss == once[-1].validation_loss
    assert all(record.saturated_weight is None for record in often)  # a profile would begin with other scales


def test_the_loss_scale_of_a_recipe_is_recorded_and_an_overflow_is_a_skipped_step(config, data):
    recipe = Recipe("scaled", "", Policy(format="fp16"), optimizer=ScaledLoss(initial=2.0**26, interval=2))
    config = replace(config, recipe=recipe, backend="interpreted", model=replace(config.model, layers=1), steps=12)
    history = run(config, data)
    scales = [record.loss_scale for record in history]
    assert scales[0] == 2.0**26
    skipped = [not math.isfinite(record.gradient_norm) for record in history]
    assert skipped[0] and not all(skipped)
    good = 0
    for before, after, skip in zip(scales, scales[1:], skipped, strict=False):
        good = 0 if skip else good + 1
        assert after == (before / 2 if skip else 2 * before if good == 2 else before)
        good %= 2
    assert run(replace(config, recipe=Recipe("plain", "", Policy(format="bf16")), steps=1), data)[0].loss_scale is None


def test_recipes_for_trained_models_and_those_with_a_loss_of_their_own_are_refused():
    for name, make in RECIPES.items():
        try:
            recipe = make()
        except TypeError:
            continue  # it has arguments without a default
        if type(recipe.preparation).__module__ == "fpsim.recipes.post_training":
            with pytest.raises(ValueError, match=f"recipe '{recipe.name}' changes a trained model"):
                RunConfig(recipe=recipe)
        elif name == "fractrain_dynamic":
            with pytest.raises(ValueError, match="its loss has a term of its own"):
                RunConfig(recipe=recipe)
        else:
            assert RunConfig(recipe=recipe).recipe["name"] == recipe.name, name


def _losses(history: list[Record]) -> list[float]:
    return [record.loss for record in history]


def test_interleaved_runs_do_not_touch_each_other(config, data, eager):
    streams = [records(replace(config, seed=seed), data, compile=eager) for seed in (1, 2)]
    first, second = (list(history) for history in zip(*zip(*streams, strict=True), strict=True))
    assert first == run(replace(config, seed=1), data, compile=eager)
    assert second == run(replace(config, seed=2), data, compile=eager)


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**12])
def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(config, data, eager, scale):
    assert run(replace(config, loss_scale=scale), data, compile=eager) == run(config, data, compile=eager)


def test_divergence_is_recorded_and_does_not_stop_the_run(config, data):
    def exploding(module, options):
        return lambda inputs, targets: module(inputs, targets) * float("inf")

    history = run(config, data, compile=exploding)
    assert len(history) == config.steps
    assert history[0].loss == math.inf
    assert math.isnan(history[-1].loss)
    assert math.isnan(history[-1].validation_loss)


def test_the_callers_settings_come_back(config, data, eager):
    before = torch._dynamo.config.recompile_limit
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        run(replace(config, steps=1), data, compile=eager)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        stream = records(config, data, compile=eager)
        next(stream)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch._dynamo.config.recompile_limit == before


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_opened_attention_is_made_of_products(config, data):
    model = LanguageModel(llama(config.model, seed=0))
    inputs, targets = next(batches(data.train, batch=2, context=12, seed=0))
    with Operators() as opened:
        loss = OpenAttention(model)(inputs, targets)
    with Operators() as fused:
        expected = model(inputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert any("flash" in name or "efficient" in name for name in fused.names)
    assert not any("flash" in name or "efficient" in name for name in opened.names)
    assert "aten.bmm.default" in opened.names


def test_the_baseline_opens_attention_and_the_others_take_the_policy(config, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **arguments: calls.append((model, arguments)))
    module = torch.nn.Identity()
    compile_loss(module, None)
    compile_loss(module, {"format": "bf16"})
    (plain, inductor), (simulated, fpsim) = calls
    assert isinstance(plain, OpenAttention)
    assert plain.module is simulated is module
    assert "backend" not in inductor
    assert (fpsim["backend"], fpsim["options"]) == ("fpsim", {"format": "bf16"})
    assert fpsim["fullgraph"]
    assert inductor["fullgraph"]


def test_validation_loss_is_the_mean_over_batches():
    losses = iter([1.0, 2.0, 6.0])
    batch = (torch.zeros(1), torch.zeros(1))
    assert evaluate(lambda *_: torch.tensor(next(losses)), [batch] * 3) == 3.0


def test_step_time_leaves_the_first_step_out():
    history = [Record(step, 0.0, 0.0, 0.0, None, seconds) for step, seconds in enumerate([90.0, 1.0, 4.0, 2.0])]
    assert step_seconds(history) == median([1.0, 4.0, 2.0])
    assert math.isnan(step_seconds(history[:1]))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"validate_every": 0}, {"loss_scale": 0.0}])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunConfig(**wrong)


def test_configurations_are_values():
    assert RunConfig(options={"format": "bf16"}) == RunConfig(options={"format": "bf16"})
    assert RunConfig(options={"format": "bf16"}) != RunConfig(options=None)
    assert len({RunConfig(), RunConfig(seed=1), RunConfig(seed=1)}) == 2


@pytest.mark.parametrize("cast", ["mxfp8", "nvfp4"])
def test_a_run_with_scaled_operands(config, data, cast):
    """Its first loss is that of a model whose layers round, and its curvature is measured through the scales."""
    short = replace(
        config, options={"format": cast, "products": "weights"}, steps=2, backend="interpreted", hessian_every=1
    )
    history = run(short, data)
    model = LanguageModel(llama(config.model, seed=config.seed))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = lambda x, layer=layer: torch.nn.functional.linear(
                fpsim.round(x, cast), fpsim.round(layer.weight, cast), layer.bias
            )
    inputs, targets = next(batches(data.train, batch=4, context=12, seed=1337))
    assert history[0].loss == pytest.approx(float(model(inputs, targets)), rel=1e-5)
    assert all(math.isfinite(record.loss) for record in history)
    assert all(math.isfinite(record.hessian_eigenvalue) for record in history)
