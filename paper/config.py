"""The frozen configuration of a run, its form in JSON, and the key under which its results are kept.

`RunConfig` holds everything that decides a single bit of a run. The machine and the number of processes are not in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fpsim.evaluate.load import script_file
from fpsim.policy import Policy
from fpsim.recipes import Recipe
from fpsim.suggestions import did_you_mean

from .choices import check_choice
from .data import DataConfig, fingerprint
from .models import ModelConfig

#: Options of ``torch.compile(backend="fpsim")``; None is no simulation.
Options = Mapping[str, object] | None

#: The parts of recipes that change a model before it trains. Other ones change a model that is trained already.
_PREPARATIONS = ("LearnedClipping", "NarrowLayerNorms", "RotaryTables", "SmoothUnits")

#: Increased when the same configuration comes to mean another run, so that old results are not taken for new ones.
CONFIG_VERSION = 1

_CHOICES = {
    "attention": (None, "opened", "fused"),
    "backend": ("compiled", "interpreted"),
    "autocast": (None, "bfloat16", "float16"),
    "schedule": ("cosine", "constant"),
    "dtype": ("float32", "float64"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
        model: sizes of the network.
        options: fields of the simulated policy, as ``torch.compile(backend="fpsim", options=...)`` takes them;
            ``{}`` is the backend's default, None is no simulation: plain Inductor in float32.
        recipe: a recipe (`fpsim.recipes.Recipe`) or its JSON object, in place of ``options``: its policy with all its
            parts. Stored is the JSON object. Recipes for trained models are refused.
        steps: optimizer steps, at least 1.
        batch: windows per step (per micro-batch, where there are several).
        learning_rate: the peak of the schedule.
        warmup: steps of linear warmup.
        weight_decay: that of AdamW, for parameters with two or more dimensions.
        clip: largest gradient norm; None leaves gradients as they are.
        loss_scale: factor on the loss in the backward pass, divided out of the gradients before they are clipped. It
            keeps small gradients above the smallest number of a narrow format. A power of two changes no bit of a run
            whose gradients neither over- nor underflow.
        z_loss: coefficient of the z-loss (`fpsim.paper.models.LanguageModel`), whose derivatives are added to those of
            the loss. Recorded losses are cross-entropies.
        validate_every: steps between validations; the last step is always validated.
        validation_batches: fixed batches per validation.
        seed: the seed of the weights, the order of the data and all random numbers.
        data: the text to train on.
        stages: pairs of a step (updates made before it) and the options that hold from there on, in order of steps.
        attention: ``opened`` into products and a softmax, or kept ``fused`` in one kernel; None follows the policy, and
            is opened without one.
        backend: ``compiled`` by Inductor, or ``interpreted``: the same rounding (`fpsim_eager`) without a compiler,
            which starts in seconds and runs several times slower.
        autocast: dtype of PyTorch's own mixed precision around the network, as nanoGPT uses it; None turns it off.
        schedule: ``cosine`` down to ``floor``, or ``constant`` after the warmup.
        floor: share of ``learning_rate`` at the end of the cosine.
        betas: those of AdamW.
        accumulate: micro-batches per step.
        measure_every: steps between measurements of the logits (sharpness, largest magnitude); 0 is never. The logits
            are those of the last token of each window of the step's own batch, from its own forward pass.
        attention_every: steps between measurements of the largest attention logit; 0 is never
            (`fpsim.paper.measurements.max_attention_logit`: one more forward pass of the unrounded network).
        lbfgsb_every: steps between searches by L-BFGS-B, as the paper measured; a multiple of ``measure_every``.
        hessian_every: steps between estimates of the Hessian's largest eigenvalue; 0 is never. The Hessian is that of
            the unrounded model on the first micro-batch, before the update.
        ranges_every: steps between counts of operands that saturate or underflow; 0 is never. Under scales that other
            steps determine nothing is counted, since `fpsim.Profiler` begins with other scales.
        stop_nonfinite: end the run after this many steps in a row without a finite loss; 0 never does.
        dtype: of weights and activations, the carrier of simulated values: ``float64`` for formats that reach beyond
            the exponents of float32.
        device: the device of the run.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    options: Options = field(default=None, hash=False)
    recipe: Mapping[str, Any] | Recipe | None = field(default=None, hash=False)
    steps: int = 100
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 15
    weight_decay: float = 0.1
    clip: float | None = 1.0
    loss_scale: float = 1.0
    z_loss: float = 0.0
    validate_every: int = 25
    validation_batches: int = 8
    seed: int = 1337
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[tuple[int, Options], ...] = field(default=(), hash=False)
    attention: str | None = None
    backend: str = "compiled"
    autocast: str | None = None
    schedule: str = "cosine"
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    accumulate: int = 1
    measure_every: int = 0
    attention_every: int = 0
    lbfgsb_every: int = 0
    hessian_every: int = 0
    ranges_every: int = 0
    stop_nonfinite: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((int(step), options) for step, options in self.stages))
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.recipe is not None:
            if self.options is not None or self.stages:
                raise ValueError("a recipe has its own policy and schedule: leave out options and stages")
            object.__setattr__(self, "recipe", recipe_fields(self.recipe))
        for name in ("steps", "batch", "validate_every", "validation_batches", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "measure_every",
            "attention_every",
            "lbfgsb_every",
            "hessian_every",
            "ranges_every",
            "stop_nonfinite",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}: 0 is never")
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale must be above 0 and finite, got {self.loss_scale}")
        for name in ("learning_rate", "weight_decay", "floor", "warmup", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above and finite, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None for no clipping, got {self.clip}")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.lbfgsb_every and (not self.measure_every or self.lbfgsb_every % self.measure_every):
            raise ValueError(
                f"lbfgsb_every must be a multiple of measure_every, got {self.lbfgsb_every} and {self.measure_every}"
            )
        starts = [step for step, _ in self.stages]
        if starts != sorted(set(starts)) or any(not 0 < step < self.steps for step in starts):
            raise ValueError(f"stages must begin at rising steps between 0 and steps={self.steps}, got {starts}")

    def options_at(self, index: int) -> Options:
        """The options of the step with ``index`` updates before it."""
        return [self.options, *(options for start, options in self.stages if start <= index)][-1]


def recipe_fields(recipe: Mapping[str, Any] | Recipe) -> dict[str, Any]:
    """The JSON object of a recipe, in the one form that its text has.

    Raises:
        ValueError: the object is no recipe, or it is one for models that are trained already, or that needs batches.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_json(json.dumps(recipe))
    part = type(recipe.preparation).__name__
    if part == "GatedBlocks":
        raise ValueError(
            f"recipe {recipe.name!r} looks at a batch before it changes the model ({part}), and its loss has a term of "
            "its own, which a run of the study does not add: call its method apply in a loop of yours, or use another "
            "recipe"
        )
    if recipe.preparation is not None and part not in _PREPARATIONS:
        raise ValueError(
            f"recipe {recipe.name!r} changes a trained model ({part}), and a run begins with random weights: call its "
            "method apply with your trained model, or use another recipe"
        )
    return dict(json.loads(recipe.to_json()))


def check_single_process(config: RunConfig) -> None:
    """Refuse a run of one process whose recipe says how several ones average gradients.

    Raises:
        ValueError: the recipe has such a part.
    """
    if config.recipe is not None and "gradients" in config.recipe:  # type: ignore[operator]
        raise ValueError(
            "the recipe says how processes average gradients, and one process averages none: start fpsim study train "
            "--parallel ddp by torchrun, or use a recipe that rounds gradients after each product, such as "
            "fp8_lm(processes=False)"
        )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """All fields as JSON types; policies in their shortest form, so that equal ones look equal.

    Raises:
        ValueError, TypeError: options that are no policy, or name no format.
    """
    plain = asdict(replace(config, options=None, recipe=None, stages=()))
    plain["recipe"] = config.recipe
    plain["options"] = _plain_options(config.options)
    plain["stages"] = [[start, _plain_options(options)] for start, options in config.stages]
    plain["betas"] = list(config.betas)
    return plain


def _plain_options(options: Options) -> dict[str, Any] | None:
    if options is None:
        return None
    policy = Policy.from_options(options)
    policy.check_names_format()
    return policy.to_dict()


def from_dict(plain: Mapping[str, Any]) -> RunConfig:
    """The configuration from which `to_dict` made ``plain``; missing fields have their defaults.

    Raises:
        ValueError: an unknown field, a value of a wrong type, or one that `RunConfig` refuses.
    """
    _check_fields(RunConfig, plain)
    given = dict(plain)
    for name, kind in (("model", ModelConfig), ("data", DataConfig)):
        if name in given:
            _check_fields(kind, given[name])
            given[name] = kind(**given[name])
    return RunConfig(**given)


def _check_fields(kind: type, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"the fields of {kind.__name__} are a JSON object, got {given!r}")
    valid = [entry.name for entry in fields(kind)]
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        if name not in valid:
            hint = did_you_mean(name, valid)
            raise ValueError(f"unknown field {name!r} of {kind.__name__}{hint}: it has {', '.join(valid)}")
        allowed = _json_types(hints[name])
        if type(value) not in allowed:
            wanted = " or ".join(each.__name__ for each in allowed)
            raise ValueError(f"{name} of {kind.__name__} is a value of type {wanted}, got {value!r}")


def _json_types(hint: Any) -> tuple[type, ...]:
    """The types of the values of JSON that stand for a field with this type hint."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(each for part in typing.get_args(hint) for each in _json_types(part))
    kind = typing.get_origin(hint) or hint
    if kind is tuple:
        return list, tuple
    if kind is float:
        return int, float
    return (kind,) if kind in (int, str, bool, type(None)) else (dict,)


def run_key(config: RunConfig) -> str:
    """A name for the run: a hash of the configuration and of the content of its text and script, 16 digits.

    Fields with their default values are left out of the hash, so that results stay valid when fields are added.

    Raises:
        FileNotFoundError: the text or the script is missing.
    """
    default = to_dict(RunConfig())
    facts = {name: value for name, value in to_dict(config).items() if value != default[name]}
    content = [CONFIG_VERSION, facts, fingerprint(config.data)]
    if config.model.script:
        content.append(hashlib.sha256(script_file(config.model.script).read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def compile_key(config: RunConfig) -> str:
    """A hash that is equal for runs that share compiled code: of all that shapes the graph, 16 digits.

    The seed, the learning rate and the text are not part of it.
    """
    plain = to_dict(config)
    names = ("model", "options", "recipe", "stages", "attention", "backend", "autocast", "batch", "dtype", "device")
    graph = [plain[name] for name in (*names, "z_loss")] + [config.measure_every > 0]
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]
