"""The paper's eight experiments and three of ours: their conditions, their sizes, and the claims of the paper.

An experiment is a set of conditions, each a few changes of a base configuration, over a grid of learning rates and
seeds. The base comes in three sizes: ``quick`` (minutes on 2 cores), ``full`` (hours) and ``paper`` (GPUs; the paper's
own models, and token files that the user must bring). Facts that the paper does not give are inferred, and are settings
here: rounding, attention, the bias of narrow exponents, epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fpsim.recipes import RECIPES

from .config import Options, RunConfig
from .data import DataConfig
from .models import MODELS, ModelConfig
from .sweeps import Planned
from .verdicts import rules

#: Changes of a base configuration, by condition.
Conditions = dict[str, dict[str, Any]]

_TRUNCATED, _NEAREST, _STOCHASTIC = "toward_zero", "nearest_even", "stochastic"
_WORDS = {_TRUNCATED: "truncated", _NEAREST: "nearest", _STOCHASTIC: "stochastic"}


@dataclass(frozen=True)
class Setting:
    """The size of an experiment.

    Attributes:
        base: the configuration that conditions change.
        rates: learning rates.
        seeds: the number of seeds.
        low: mantissa bits of the truncated format that is unstable at this size: 3 in the paper's models, 1 in small
            ones.
        first_seed: the first of the seeds; the others follow it.
    """

    base: RunConfig
    rates: tuple[float, ...]
    seeds: int
    low: int = 1
    first_seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, or one of ours on the same question.

    Attributes:
        number: 1 to 8 are the paper's, 9 to 11 ours. Those are registered (`fpsim.paper.hypotheses`).
        title: a few words.
        question: the question of the experiment.
        claim: the paper's answer, or that of another paper, as far as it is known.
        differs: how the experiment differs from the paper's, and why.
        reference: the condition with which the others are compared.
        conditions: from the setting to the conditions.
        settings: the settings by size.
        pairs: conditions that Fisher's exact test compares, the supposedly worse one first.
    """

    number: int
    title: str
    question: str
    claim: str
    differs: str
    reference: str
    conditions: Callable[[Setting], Conditions]
    settings: Mapping[str, Setting]
    pairs: tuple[tuple[str, str], ...] = ()

    def differences(self, size: str) -> str:
        """`differs`, and whether the runs of ``size`` use the bf16 mixed precision in which the paper trained."""
        base, changes = self.settings[size].base, self.conditions(self.settings[size]).values()
        used = {each.get("autocast", base.autocast) for each in changes}
        carrier = " and ".join(sorted({each.get("dtype", base.dtype) for each in changes}))
        if None not in used:
            precision = "The runs train in bf16 mixed precision with float32 weights and optimizer, as the paper's did."
        elif len(used) == 1:
            precision = f"The paper trained in bf16 mixed precision. Here everything that is not rounded is {carrier}."
        else:
            precision = (
                "The paper trained in bf16 mixed precision. Here only the conditions named autocast do; in the others "
                f"everything that is not rounded is {carrier}."
            )
        return f"{self.differs} {precision}"

    def registration(self, size: str, setting: Setting) -> dict[str, bool]:
        """For ``sweep.json``: whether ``setting`` is the registered one but for its seeds; empty without claims."""
        registered = self.settings[size]
        if str(self.number) not in rules().experiments:
            return {}
        is_same = (setting.base, setting.rates) == (registered.base, registered.rates)
        return {"is_registered": is_same and size in ("quick", "full")}

    def plan(self, setting: Setting) -> list[Planned]:
        """All runs: seeds vary slowest, so that an interrupted experiment is balanced."""
        chosen = self.conditions(setting)
        return [
            Planned(name, replace(setting.base, learning_rate=rate, seed=seed, **changes))
            for seed in range(setting.first_seed, setting.first_seed + setting.seeds)
            for name, changes in chosen.items()
            for rate in setting.rates
        ]


def _linears(cast: str) -> dict[str, Any]:
    """The paper's sites: both operands of all three products of linear layers, the LM head included."""
    return {"format": cast, "products": "weights"}


def _masked(bits: int, rounding: str = _TRUNCATED) -> dict[str, Any]:
    """With ``_TRUNCATED``, the paper's bit mask: infinities and NaN pass."""
    return _linears(f"e8m{bits}/{rounding}/sat_propagate")


def _mantissa(_: Setting) -> Conditions:
    # bfloat16 rounded to nearest is the reference and comes first, since the report keeps the order
    return {
        f"e8m{bits} {_WORDS[rounding]}": {"options": _masked(bits, rounding)}
        for rounding in (_NEAREST, _TRUNCATED, _STOCHASTIC)
        for bits in range(7, 0, -1)
    }


def _exponent(_: Setting) -> Conditions:
    """Centred E_n: bias 2^(n-1) - 1. ``outer`` takes its largest value and no smallest, ``inner`` the reverse.

    The two sides need numbers beyond the exponents of float32, so all of these conditions run in float64.
    """

    def rounded(name: str) -> dict[str, Any]:
        return {"options": _linears(f"{name}/toward_zero/sat_finite"), "dtype": "float64", "autocast": None}

    conditions = {
        "e8m7": rounded("e8m7"),
        "e7m7, bias kept": rounded("e7m7finite:bias=127"),
        "e7m7, centred": rounded("e7m7"),
    }
    for bits in (5, 4):
        bias = 2 ** (bits - 1) - 1
        conditions |= {
            f"e{bits}m7, centred": rounded(f"e{bits}m7"),
            f"e{bits}m7, outer only": rounded(f"e8m7finite:bias={255 - bias}"),
            f"e{bits}m7, inner only": rounded(f"e8m7:bias={bias}"),
        }
    return conditions


def _rates(_: Setting) -> Conditions:
    return {
        "e8m7 truncated": {"options": _masked(7)},
        "e8m5 truncated": {"options": _masked(5)},
        "e8m5 nearest": {"options": _masked(5, _NEAREST)},
    }


def _bf16_or_tf32(_: Setting) -> Conditions:
    bf16, tf32 = {"format": "bf16", "output": "bf16"}, {"format": "tf32"}
    precisions: dict[str, dict[str, Any]] = {
        "tf32": {"options": tf32, "autocast": None},
        "bf16": {"options": bf16, "autocast": None},
        "autocast bf16": {"options": None, "autocast": "bfloat16"},
    }
    return {
        f"{name}, {attention}": {**changes, "attention": attention}
        for name, changes in precisions.items()
        for attention in ("opened", "fused")
    }


_HYBRID: dict[str, Any] = {"policy": "fp8_hybrid", "products": "weights"}


def _hybrid(_: Setting) -> Conditions:
    hybrid, per_tensor = _HYBRID, {**_HYBRID, "scale": "power_of_two"}
    unscaled = {"loss_scale": 1.0}
    return {
        "bf16": {"options": _linears("bf16")},
        "fp8 hybrid, scaled": {"options": per_tensor, **unscaled},
        "fp8 hybrid, scaled, head bf16": {"options": {**per_tensor, "modules": {"*lm_head": "bf16"}}, **unscaled},
        "fp8 hybrid": {"options": hybrid},
        "fp8 hybrid, head bf16": {"options": {**hybrid, "modules": {"*lm_head": "bf16"}}},
        "fp8 hybrid, unscaled": {"options": hybrid, **unscaled},
        "fp8 hybrid, head bf16, unscaled": {"options": {**hybrid, "modules": {"*lm_head": "bf16"}}, **unscaled},
    }


def _quality(setting: Setting) -> Conditions:
    formats = {"bf16": _linears("bf16"), "fp8 hybrid": _HYBRID, "truncated": _masked(setting.low)}
    spoiled: dict[str, dict[str, Any]] = {
        "clean": {},
        "half shuffled": {"quality": "shuffled", "level": 0.5},
        "9/10 duplicated": {"quality": "duplicated", "level": 0.9},
        "1/5 noise": {"quality": "noisy", "level": 0.2},
    }
    return {
        f"{name}, {words}": {"options": options, "data": replace(setting.base.data, **changes)}
        for words, changes in spoiled.items()
        for name, options in formats.items()
    }


def _remedies(setting: Setting) -> Conditions:
    base, low, high = setting.base, _masked(setting.low), _masked(7)
    is_gpt2 = base.model.family == "gpt2"
    layers = "*.h" if is_gpt2 else "*.layers"
    places = {"head": "*lm_head", "first": f"{layers}.0", "last": f"{layers}.{base.model.layers - 1}"}

    def kept(*names: str) -> Options:
        return {**low, "modules": {places[name]: high for name in names}}

    return {
        "high": {"options": high},
        "low": {"options": low},
        "high, from 1/4 on low": {"options": high, "stages": ((base.steps // 4, low),)},
        "high, from 1/2 on low": {"options": high, "stages": ((base.steps // 2, low),)},
        "low, from 1/2 on high": {"options": low, "stages": ((base.steps // 2, high),)},
        "low, head high": {"options": kept("head")},
        "low, first layer high": {"options": kept("first")},
        "low, last layer high": {"options": kept("last")},
        "low, head and both ends high": {"options": kept(*places)},
    }


def _early_signs(setting: Setting) -> Conditions:
    base = setting.base
    sparse = base.measure_every * max(1, base.steps // (30 * base.measure_every))
    measured = {"hessian_every": sparse, "lbfgsb_every": sparse}
    widths = dict.fromkeys([7, 5, 4, 3, setting.low + 1, setting.low])
    return {f"e8m{bits} truncated": {"options": _masked(bits), **measured} for bits in widths}


#: Three decades of rates, as in arXiv 2309.14322: far below the best rate of small models to beyond all stable ones.
_THREE_DECADES = (3e-4, 8e-4, 2e-3, 6e-3, 1.5e-2, 4e-2, 1e-1, 3e-1)


def _sized(base: RunConfig, layers: int, width: int, family: str = "llama") -> ModelConfig:
    """The Llama of ``base`` with other sizes; the ratio of the feed-forward layer to the width stays."""
    if base.model.family != "llama":
        raise ValueError(
            f"experiment 9 varies the sizes of a Llama, and {base.model.label} is none: use fpsim study run with "
            "several learning rates for your own model"
        )
    mlp = base.model.mlp * width // base.model.hidden
    return replace(base.model, layers=layers, hidden=width, mlp=mlp, family=family)


def _sensitivity(setting: Setting) -> Conditions:
    """Formats at three widths; three of them also at other depths, with QK normalisation, and with the z-loss."""
    base = setting.base
    layers, width = base.model.layers, base.model.hidden
    models = {
        "": base.model,
        ", half width": _sized(base, layers, width // 2),
        ", double width": _sized(base, layers, 2 * width),
    }
    others = {
        ", twice as deep": _sized(base, 2 * layers, width),
        ", four times as deep": _sized(base, 4 * layers, width),
        ", QK norm": _sized(base, layers, width, "qwen3"),
    }
    formats: dict[str, Options] = {"fp32": None, "tf32": _linears("tf32"), "bf16": _linears("bf16")}
    for rounding in (_TRUNCATED, _NEAREST, _STOCHASTIC):
        formats |= {f"e8m{bits} {_WORDS[rounding]}": _masked(bits, rounding) for bits in (5, 4, 3)}
    formats |= {"fp8 hybrid": {**_HYBRID, "scale": "power_of_two"}}
    formats |= {name: _linears(name) for name in ("mxfp8", "nvfp4")}
    chosen = {name: formats[name] for name in ("fp32", "bf16", "e8m3 truncated")}
    conditions: Conditions = {
        name + suffix: {"options": options, "model": model}
        for several, sizes in ((formats, models), (chosen, others))
        for suffix, model in sizes.items()
        for name, options in several.items()
    }
    return conditions | {f"{name}, z-loss": {"options": options, "z_loss": 1e-4} for name, options in chosen.items()}


def _attention(_: Setting) -> Conditions:
    """bf16 operands and results with attention as five kinds of code compute it; the cure is that of the paper."""
    bf16 = {"format": "bf16", "output": "bf16"}
    kernels: dict[str, Any] = {
        "fused": "keep",
        "opened": "round",
        "flash2_bf16": "flash2_bf16",
        "flash2_bf16, cured": {"preset": "flash2_bf16", "cure": 2.0},
        "all_bf16": "all_bf16",
        "all_bf16, cured": {"preset": "all_bf16", "cure": 2.0},
    }
    options = {"tf32, opened": {"format": "tf32", "attention": "round"}}
    options |= {f"bf16, {name}": {**bf16, "attention": attention} for name, attention in kernels.items()}
    return {name: {"options": each, "attention": None} for name, each in options.items()}


#: The recipes of experiment 11: those for pretraining whose parts act in a single process.
_TRAINING_RECIPES = ("amp_bf16", "te_current", "te_delayed", "deepseek_v3", "coat", "mxfp8", "nvfp4", "switchback")


def _recipes(_: Setting) -> Conditions:
    # The blocks that nvfp4 keeps high are 16 % of 62: of one or two layers none would be left to round.
    kept: dict[str, dict[str, Any]] = {"nvfp4": {"first_blocks": 0, "last_blocks": 0}}
    return {"fp32": {}, **{name: {"recipe": RECIPES[name](**kept.get(name, {}))} for name in _TRAINING_RECIPES}}


# The regime in which runs of this size diverge: paper/README.md tells how it was found.
QUICK = RunConfig(
    model=MODELS["toy"],
    steps=300,
    batch=8,
    warmup=0,
    clip=None,
    schedule="constant",
    attention="fused",
    validate_every=300,
    validation_batches=4,
    measure_every=5,
    stop_nonfinite=3,
)
FULL = replace(
    QUICK,
    model=MODELS["tiny"],
    steps=3000,
    batch=16,
    validate_every=500,
    validation_batches=8,
    measure_every=10,
)
#: TinyLlama's recipe for 120 M parameters: a million tokens per step in bf16 mixed precision; the learning rate of the
#: repository.
LLAMA_120M = RunConfig(
    model=MODELS["llama-120m"],
    steps=10_000,
    batch=8,
    accumulate=64,
    warmup=2000,
    attention="fused",
    validate_every=500,
    measure_every=10,
    stop_nonfinite=10,
    data=DataConfig("data/slimpajama"),
    autocast="bfloat16",
    device="cuda",
)
#: nanoGPT's recipe for GPT-2, the first 5 % of its 600,000 steps.
GPT2_124M = replace(
    LLAMA_120M, model=MODELS["gpt2-124m"], steps=30_000, batch=12, accumulate=40, data=DataConfig("data/openwebtext")
)


def _settings(
    rates: tuple[float, ...],
    seeds: int,
    *,
    paper: RunConfig = LLAMA_120M,
    paper_rates: tuple[float, ...] = (4e-4,),
    paper_seeds: int = 3,
    layers: int = 1,
    **changes: Any,
) -> dict[str, Setting]:
    quick, full = (
        replace(base, model=replace(base.model, layers=max(layers, base.model.layers))) for base in (QUICK, FULL)
    )
    return {
        "quick": Setting(replace(quick, **changes), rates, seeds),
        "full": Setting(replace(full, **changes), rates, 4 * seeds),
        "paper": Setting(replace(paper, **changes), paper_rates, paper_seeds, low=3),
    }


#: The setting of arXiv 2309.14322 at the size of `QUICK`: warmup over 5 % of the steps, a cosine almost to 0, gradients
#: clipped. Its independent weight decay of 1e-4 would change weights by 3 % in 300 steps, and is left out.
_ROBUST: dict[str, Any] = {
    "warmup": 15,
    "clip": 1.0,
    "schedule": "cosine",
    "floor": 0.001,
    "weight_decay": 0.0,
    "measure_every": 10,
    "attention_every": 10,
    "stop_nonfinite": 10,
}


def _registered(
    number: int,
    rates: tuple[float, ...],
    *,
    paper_rates: tuple[float, ...] | None = None,
    paper: RunConfig = LLAMA_120M,
    seeds: int,
    **changes: Any,
) -> dict[str, Setting]:
    """The sizes of an experiment with registered seeds: ``quick`` and ``full`` take ``changes``, ``paper`` does not."""
    by = rules().experiments[str(number)]
    sizes = {
        "quick": Setting(replace(QUICK, **changes), rates, int(by["seeds"])),
        "full": Setting(replace(FULL, **{**changes, "warmup": 10 * changes.get("warmup", 0)}), rates, int(by["seeds"])),
        "paper": Setting(replace(paper, autocast=None, attention_every=10), paper_rates or rates, seeds, low=3),
    }
    return {name: replace(setting, first_seed=int(by["first_seed"])) for name, setting in sizes.items()}


SIZES = ("quick", "full", "paper")

EXPERIMENTS: dict[int, Experiment] = {
    experiment.number: experiment
    for experiment in (
        Experiment(
            1,
            "Mantissa bits",
            "How much of the instability is the bias of truncation, and how much the loss of bits?",
            "Stability falls with every mantissa bit removed; E8M3 and E8M4 diverge early, E8M5 and more do not.",
            "The paper truncates (a bit mask) and shows single seeds; here every width is also rounded to nearest and "
            "stochastically, over seeds and learning rates.",
            "e8m7 nearest",
            _mantissa,
            _settings((4e-2, 8e-2), 2),
            tuple(
                (f"e8m{bits} truncated", f"e8m{bits} {other}")
                for other in ("nearest", "stochastic")
                for bits in range(7, 0, -1)
            ),
        ),
        Experiment(
            2,
            "Exponent bits",
            "Why did E7M7 not train: large values clipped, small ones lost, or the bias kept?",
            "E7M7 never trains; clipping of large values (the outer range) is to blame.",
            "The paper does not say which bias E7 has. Both are run: kept at 127 (so |x| < 2), and re-centred; for "
            "narrower exponents the two ends are also clipped one at a time.",
            "e8m7",
            _exponent,
            _settings((1e-2,), 2, ranges_every=100),
            (("e7m7, bias kept", "e8m7"), ("e7m7, centred", "e8m7")),
        ),
        Experiment(
            3,
            "Learning rate x 10",
            "Does E8M5 lose some of the learning rates at which bf16 trains?",
            "At ten times the learning rate E8M5 spikes clearly more often than BF16 (18 seeds each); none diverges.",
            "The absolute learning rates are not known; the quick grid spans the edge of stability.",
            "e8m7 truncated",
            _rates,
            _settings((8e-3, 8e-2), 9, paper_rates=(4e-4, 4e-3), paper_seeds=18),
            (("e8m5 truncated", "e8m7 truncated"), ("e8m5 nearest", "e8m7 truncated")),
        ),
        Experiment(
            4,
            "bf16 against tf32",
            "Does bf16 diverge more often than tf32, and is it bf16 or its attention kernel?",
            "18 of 188 seeds diverge in BF16 within the first 5 % of training, 0 of 70 in TF32.",
            "A TF32 run cannot use the fused kernel that a BF16 run uses, so the paper's comparison confounds the two; "
            "here each is run with both. PyTorch's own autocast stands beside simulation.",
            "tf32, opened",
            _bf16_or_tf32,
            _settings((4e-2, 8e-2), 4, paper=GPT2_124M, paper_rates=(6e-4,), paper_seeds=188),
            (
                ("bf16, opened", "tf32, opened"),
                ("bf16, fused", "tf32, fused"),
                ("autocast bf16, opened", "tf32, opened"),
                ("autocast bf16, fused", "tf32, fused"),
            ),
        ),
        Experiment(
            5,
            "FP8 hybrid",
            "Does FP8 reach the loss of bf16, with the LM head in it and without?",
            "MS-AMP O1 does not reach BF16's loss, even with the LM head excluded.",
            "e4m3fn forward and e5m2 gradients in linear layers, with MS-AMP's power of two per tensor, but from the "
            "tensor at hand instead of the last 16 steps, and with weights and their gradients in float32 instead of "
            "float16 and e4m3fn. Runs with one constant scale on the loss (4096) and unscaled ones stand beside.",
            "bf16",
            _hybrid,
            _settings((1e-2,), 3, paper=GPT2_124M, paper_rates=(6e-4,), loss_scale=4096.0, ranges_every=100),
            (("fp8 hybrid, scaled", "bf16"), ("fp8 hybrid", "bf16"), ("fp8 hybrid", "fp8 hybrid, head bf16")),
        ),
        Experiment(
            6,
            "Data quality",
            "Does spoiled data make low precision less stable than it makes bf16?",
            "The stability of FP8 depends on the quality of the data.",
            "The paper's data sets are not named; here the same text is shuffled, duplicated or made noisy.",
            "bf16, clean",
            _quality,
            _settings((4e-2,), 2, loss_scale=4096.0),
            tuple((f"{name}, half shuffled", f"{name}, clean") for name in ("bf16", "fp8 hybrid", "truncated")),
        ),
        Experiment(
            7,
            "The two remedies",
            "Do high precision early, or in chosen layers, make low precision stable?",
            "Both are proposed and left untested.",
            "Untested in the paper. High is E8M7; low is the truncated format that is unstable at this size: E8M3 in "
            "the paper's models, E8M1 in small ones.",
            "high",
            _remedies,
            _settings((4e-2, 8e-2), 2, layers=3),  # with two layers, the head and both ends would be all layers
            tuple(
                ("low", name) for name in ("high, from 1/2 on low", "low, head high", "low, head and both ends high")
            ),
        ),
        Experiment(
            8,
            "Who warns first",
            "Does logit sharpness announce divergence earlier or better than plain signals?",
            "Sharpness rises before the loss; it predicts divergence.",
            "The paper shows curves and no measure of prediction; here every signal has an AUC with an interval, and a "
            "lead over the divergence at a fixed rate of false alarms.",
            "e8m7 truncated",
            _early_signs,
            _settings((4e-2, 8e-2), 2, measure_every=2),
        ),
        Experiment(
            9,
            "Learning-rate sensitivity",
            "Do fewer bits narrow the learning rates at which a model trains, and does that grow with the model?",
            "Low precision should have hyperparameter sensitivities similar to those of high precision.",
            "The paper asks for it in words and measures nothing. The measure is that of arXiv 2309.14322, over three "
            "decades of rates, with three widths and depths, QK normalisation and the z-loss.",
            "fp32",
            _sensitivity,
            _registered(9, _THREE_DECADES, seeds=3, **_ROBUST),
        ),
        Experiment(
            10,
            "Attention in bf16",
            "Does bf16 fail because of the arithmetic inside attention?",
            "One-sided rounding errors of bf16 inside flash attention make the training of GPT-2 explode, and a change "
            "of the row maximum cures it (arXiv 2510.04212). 18 of 188 bf16 runs diverge, 0 of 70 in tf32.",
            "GPT-2 with 124 M parameters took thousands of steps to fail there. Here a toy model trains at the two "
            "rates where experiment 1 saw runs diverge; no smaller setting is known in which bf16 fails.",
            "tf32, opened",
            _attention,
            _registered(10, (4e-2, 8e-2), paper_rates=(1e-3,), paper=GPT2_124M, seeds=20, attention_every=10),
            tuple(
                (f"bf16, {name}", "tf32, opened")
                for name in ("fused", "opened", "flash2_bf16", "flash2_bf16, cured", "all_bf16", "all_bf16, cured")
            )
            + tuple((f"bf16, {name}", f"bf16, {name}, cured") for name in ("flash2_bf16", "all_bf16")),
        ),
        Experiment(
            11,
            "Recipes and the learning rate",
            "Do published recipes train over the same learning rates as float32?",
            "Their papers report one learning rate, or few.",
            "Each recipe is its simulation (fpsim recipes), with the defaults of its source. NVFP4 keeps the head "
            "high and no blocks, of which these models have too few.",
            "fp32",
            _recipes,
            _registered(11, _THREE_DECADES, seeds=3, **_ROBUST),
        ),
    )
}


def experiment(number: int) -> Experiment:
    """The experiment with this number.

    Raises:
        ValueError: there is none.
    """
    if number not in EXPERIMENTS:
        raise ValueError(f"no experiment {number}: there are {', '.join(map(str, EXPERIMENTS))}")
    return EXPERIMENTS[number]
