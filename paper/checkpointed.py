"""The model of a run as its checkpoint holds it, to be measured: for ``fpsim study sensitivity`` and ``search``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpsim.policy import Policy
from fpsim.processors import check_device
from fpsim.showing import why_unreadable

from .compiled_loss import with_attention
from .config import RunConfig, from_dict
from .data import check_vocabulary, load, validation_batches
from .models import LanguageModel
from .trainer import Batch, Trainer


@dataclass(frozen=True, eq=False)
class Checkpointed:
    """The model of a run at one step.

    Attributes:
        config: the run.
        step: the updates made so far.
        model: from tokens and targets to the loss, in evaluation mode, uncompiled.
        batches: the first validation batches of the run.
        policy: the policy of the next step; None if nothing is rounded.
    """

    config: RunConfig
    step: int
    model: LanguageModel
    batches: list[Batch]
    policy: Policy | None


def checkpointed(path: Path, *, batches: int) -> Checkpointed:
    """The model of the run whose state `fpsim.paper.checkpoint.Checkpoint` wrote to ``path``.

    Another version of fpsim may have written the file, because nothing is trained further.

    Args:
        batches: the number of validation batches, each of ``config.batch`` windows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a run, or one of an fpsim that did not keep the configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: fpsim study train CONFIG OUT --checkpoint FILE writes one")
    try:
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        config, step, weights = from_dict(state["config"]), len(state["records"]), state["model"]
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises errors of many kinds for broken files
        raise ValueError(
            f"{path} is no checkpoint with the configuration of a run ({why_unreadable(error)}): write it again with "
            "fpsim study train CONFIG OUT --checkpoint FILE"
        ) from error
    check_device(config.device)
    data = load(config.data, context=config.model.context)
    check_vocabulary(data, config.model.vocabulary)
    trainer = Trainer(config, _uncompiled)
    trainer.model.load_state_dict(weights)
    options = config.options_at(step)
    policy = None if options is None else Policy.from_options(with_attention(options, config.attention))
    if trainer.recipe is not None:
        policy = trainer.recipe.policy_for(trainer.model)
    held_out = validation_batches(data.validation, count=batches, batch=config.batch, context=config.model.context)
    return Checkpointed(
        config,
        step,
        LanguageModel(trainer.model.network).eval(),
        [(inputs.to(config.device), targets.to(config.device)) for inputs, targets in held_out],
        policy,
    )


def _uncompiled(module: nn.Module, options: Mapping[str, object] | None) -> nn.Module:
    return module
