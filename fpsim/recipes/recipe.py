"""Recipes: published ways to train or run a model in low precision, as frozen values.

A recipe is a policy, with further parts where its source does more than round operands. Each part is a frozen dataclass
of plain fields, whose method ``apply`` makes calls of fpsim's public functions and nothing else. So a recipe can be
printed, compared, written to JSON, and carried out by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from fpsim.json_text import parse_versioned
from fpsim.policy import Policy
from fpsim.recipes.description import lines_of_policy, wrapped
from fpsim.recipes.exclusions import Exclusions
from fpsim.showing import Shown
from fpsim.suggestions import did_you_mean
from fpsim.training.schedules import ScheduleState, check_backend

#: The classes of parts by name, and the module that holds each: what `Recipe.from_json` can read.
PARTS: dict[str, str] = {
    "RoundedState": "fpsim.recipes.rounded_state",
    "CalibratedLayers": "fpsim.recipes.post_training",
    "ClippedUpdates": "fpsim.recipes.clipped_updates",
    "ClippingValues": "fpsim.recipes.federated",
    "Cyclic": "fpsim.training.schedules",
    "GatedBlocks": "fpsim.recipes.dynamic_precision",
    "InputBounds": "fpsim.recipes.aqt",
    "HalfPrecisionAdam": "fpsim.recipes.low_precision_rl",
    "LearnedClipping": "fpsim.recipes.federated",
    "Linear": "fpsim.training.schedules",
    "NarrowGradients": "fpsim.recipes.fp8_lm",
    "NarrowLayerNorms": "fpsim.recipes.mosaic_layernorm",
    "Piecewise": "fpsim.training.schedules",
    "Progressive": "fpsim.training.schedules",
    "ProjectedAdam": "fpsim.recipes.galore",
    "RotaryTables": "fpsim.recipes.bf16_rope",
    "RoundedAttention": "fpsim.recipes.post_training",
    "RoundedWeights": "fpsim.recipes.post_training",
    "ScaledLoss": "fpsim.recipes.scaled_loss",
    "SmoothUnits": "fpsim.recipes.fp8_trillion",
    "SplitChannels": "fpsim.recipes.post_training",
    "TrainedGates": "fpsim.recipes.dynamic_precision",
}

#: The version of the JSON form. It increases when an older fpsim could misread a newer file.
JSON_VERSION = 1


class Preparation(Protocol):
    """A change of the model before it is compiled, such as the rounding of GPTQ."""

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change ``model`` in place, or return another one. ``batches`` is calibration data, for parts that need it."""


class OptimizerPart(Protocol):
    """A change of the optimizer: codecs of its state, or a wrapper."""

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """The optimizer to use, through ``step()``."""


class GradientsPart(Protocol):
    """A change of the exchange of gradients between processes."""

    def apply(self, model: torch.nn.Module, optimizer: Any) -> Any:
        """Register hooks on ``model``, a `DistributedDataParallel` or FSDP module."""


class Schedule(Protocol):
    """A precision that depends on the step or on the loss (`fpsim.training.schedules`)."""

    def start(self) -> ScheduleState:
        """The state before the first step."""

    def after(self, state: ScheduleState, loss: float | None = None) -> ScheduleState:
        """The state after a step with this loss."""

    def policy(self, state: ScheduleState, base: Policy | None = None) -> Policy:
        """The policy of the next step."""

    def apply(self, model: torch.nn.Module, policy: Policy | None, backend: str) -> torch.nn.Module:
        """The compiled model."""


@dataclass(frozen=True)
class Recipe(Shown):
    """A published way to train or run a model in low precision.

    Attributes:
        name: the name of the function that makes it.
        source: the paper and the code.
        policy: which operands and results are rounded, before `exclusions`; None if none is.
        preparation, optimizer, gradients, schedule: what the recipe does beside it, or None.
        notes: where the paper and the code differ and which of them this follows, and what is not simulated.
        exclusions: the modules that the source keeps in high precision, which are found in the model.

    Recipes with equal fields are equal. ``print(recipe)`` says which tensor has which format and scale, what stays
    high, and the notes.

    >>> import fpsim
    >>> recipe = fpsim.recipes.te_current()
    >>> fpsim.recipes.Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    name: str
    source: str
    policy: Policy | None
    preparation: Preparation | None = None
    optimizer: OptimizerPart | None = None
    gradients: GradientsPart | None = None
    schedule: Schedule | None = None
    notes: tuple[str, ...] = ()
    exclusions: Exclusions | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """The parts beside the policy, by the names of their fields; those that are None are left out."""
        names = ("preparation", "optimizer", "gradients", "schedule")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def is_policy(self) -> bool:
        """Whether the recipe is a policy only, the same for every model."""
        return self.policy is not None and not self.parts and self.exclusions is None

    def policy_for(self, model: torch.nn.Module) -> Policy | None:
        """The policy with the exclusions of the recipe, which are found in ``model``.

        Raises:
            ValueError: ``model`` has no module that an exclusion names. The message names the remedy.
        """
        if self.policy is None or self.exclusions is None:
            return self.policy
        # Graphs under DistributedDataParallel name modules as the model inside does.
        inside = model.module if isinstance(model, DistributedDataParallel) else model
        return self.exclusions.within(self.policy, inside)

    def apply(
        self,
        model: torch.nn.Module,
        optimizer: Any = None,
        *,
        batches: Iterable[Any] | None = None,
        backend: str = "fpsim",
    ) -> tuple[torch.nn.Module, Any]:
        """Apply the recipe to a model and its optimizer.

        In this order: ``preparation.apply(model, batches)``; ``gradients.apply(model, optimizer)``;
        ``torch.compile(model, backend=backend, options={"policy": self.policy_for(model)})``, or in its place
        ``schedule.apply(model, policy, backend)``; ``optimizer.apply(optimizer, model)``.

        Args:
            model: the model, with parameters in any dtype. Results that the recipe leaves alone have the model's
                dtypes.
            optimizer: its optimizer. Without one, such as for evaluation, the optimizer's part is left out.
            batches: calibration data, for recipes that need it.
            backend: ``"fpsim"``, or ``"fpsim_eager"``, which has the same bits and does not use Inductor.

        Returns:
            The compiled model, and the optimizer.

        Raises:
            ValueError: the model lacks a module that an exclusion names, a part cannot be applied, or the backend is
                another one. The last is found before anything is changed.
        """
        check_backend(backend)
        if self.preparation is not None:
            model = self._prepared(model, optimizer, batches)
        if self.gradients is not None:
            self.gradients.apply(model, optimizer)
        policy = self.policy_for(model)
        if self.schedule is not None:
            compiled = self.schedule.apply(model, policy, backend)
        elif policy is not None:
            options: dict[str, Any] = {"policy": policy}
            compiled = cast(torch.nn.Module, torch.compile(model, backend=backend, options=options))
        else:
            compiled = model
        if self.optimizer is not None and optimizer is not None:
            optimizer = self.optimizer.apply(optimizer, model)
        return compiled, optimizer

    def _prepared(self, model: torch.nn.Module, optimizer: Any, batches: Iterable[Any] | None) -> torch.nn.Module:
        """The model after `preparation`, which may not take parameters away from the optimizer."""
        assert self.preparation is not None
        before = set(model.parameters())
        model = self.preparation.apply(model, batches)
        lost = before - set(model.parameters())
        groups = [] if optimizer is None else optimizer.param_groups
        if any(p in lost for group in groups for p in group["params"]):
            raise ValueError(
                f"the preparation of {self.name} replaces parameters that the optimizer has: make the optimizer of "
                "recipe.preparation.apply(model, batches), and apply dataclasses.replace(recipe, preparation=None)"
            )
        return model

    # -- text ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [("source", self.source), *lines_of_policy(self.policy)]
        if self.exclusions is not None:
            lines.append(("kept high", str(self.exclusions)))
        lines += [(name, str(part)) for name, part in self.parts.items()]
        lines += [("note", note) for note in self.notes]
        return "\n".join([self.name, *(wrapped(heading, text) for heading, text in lines)])

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The recipe as JSON text; `from_json` gives an equal recipe.

        Raises:
            TypeError: a part is not of a class in `PARTS`.
        """
        fields: dict[str, Any] = {"version": JSON_VERSION, "name": self.name, "source": self.source}
        if self.policy is not None:
            fields["policy"] = self.policy.to_dict()
        if self.exclusions is not None:
            fields["exclusions"] = self.exclusions.to_dict()
        fields.update({name: _part_fields(part) for name, part in self.parts.items()})
        return json.dumps({**fields, "notes": self.notes}, indent=2)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON, is no recipe, has an unknown field or part, or was written by a newer
                fpsim.
        """
        given = parse_versioned(text, "recipe", JSON_VERSION)
        valid = [field.name for field in dataclasses.fields(Recipe)]
        for key in given:
            if key not in valid:
                raise ValueError(f"unknown field {key!r} of a recipe{did_you_mean(key, valid)}: use {', '.join(valid)}")
        if lacking := [key for key in ("name", "source") if not isinstance(given.get(key), str)]:
            raise ValueError(f"a recipe has a {lacking[0]}, a string: add it to the JSON object")
        notes = given.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"the notes of a recipe are a list of strings, got {notes!r}")
        policy, exclusions = given.pop("policy", None), given.pop("exclusions", None)
        parts = {
            key: _part(given.pop(key)) for key in ("preparation", "optimizer", "gradients", "schedule") if key in given
        }
        return Recipe(
            name=given["name"],
            source=given["source"],
            policy=None if policy is None else Policy.from_options(policy),
            notes=tuple(notes),
            exclusions=None if exclusions is None else Exclusions.from_dict(exclusions),
            **parts,
        )


def _part_fields(part: Any) -> dict[str, Any]:
    name = type(part).__name__
    if PARTS.get(name) != type(part).__module__:
        raise TypeError(f"{name} is no part that JSON can name: enter it in fpsim.recipes.recipe.PARTS")
    return {"part": name, **{field.name: getattr(part, field.name) for field in dataclasses.fields(part)}}


def _part(given: Any) -> Any:
    """The part with these fields, as `_part_fields` wrote them."""
    if not isinstance(given, Mapping) or given.get("part") not in PARTS:
        name = given.get("part") if isinstance(given, Mapping) else given
        raise ValueError(f"unknown part {name!r} of a recipe: use one of {', '.join(PARTS)}")
    kind = getattr(importlib.import_module(PARTS[given["part"]]), given["part"])
    own = {key: _with_tuples(value) for key, value in given.items() if key != "part"}
    try:
        return kind(**own)
    except TypeError as error:
        valid = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ValueError(f"wrong fields of part {given['part']!r} ({error}): it has {valid}") from None


def _with_tuples(value: Any) -> Any:
    """``value`` with tuples in place of lists, as the fields of parts have them."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
