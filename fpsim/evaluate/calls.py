"""One call of a model, with its loss: a text to predict, or the inputs that the user's script makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.evaluate.load import errors_of_script, is_script, load_script, script_function
from fpsim.evaluate.texts import Task, task_of_checkpoint, task_of_script, token_loss


@dataclass(frozen=True, eq=False)
class ModelCall:
    """A call of a model.

    Attributes:
        network: the model, in evaluation mode.
        args, kwargs: its inputs.
        loss: from its outputs to a scalar; None where the script names no loss.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor] | None


def language_task(model: str, text: Path, *, windows: int, context: int | None, weights: Path | None) -> Task:
    """The language model of a script or of a checkpoint, with a text to predict.

    Raises: the errors of `task_of_script` and `task_of_checkpoint`.
        ValueError: weights for a checkpoint.
    """
    if is_script(model):
        return task_of_script(model, text, windows=windows, context=context, weights=weights)
    if weights is not None:
        raise ValueError(f"weights are for a script, and {model} holds its own: leave --weights out")
    return task_of_checkpoint(Path(model), text, windows=windows, context=context)


def model_call(
    model: str, text: Path | None, *, windows: int = 1, context: int | None = None, weights: Path | None = None
) -> ModelCall:
    """The call of a script's model with the script's own inputs, or of a language model with windows of a text.

    Args:
        model: ``path/to/script.py:function`` or the folder of a checkpoint, as `fpsim.evaluate.load` describes them.
            A script may have a function ``inputs``, which takes no argument. It returns the inputs of the model: a
            tuple, a mapping of keyword arguments, or one value. It may also have a function ``loss`` of the outputs.
        text: a UTF-8 file that a language model is to predict; None where the script has ``inputs``.
        windows: the number of windows of the text, which are one batch.
        context: tokens per window; None is the model's own number.
        weights: a file with the state dict of the script's module.

    Raises:
        ValueError: neither a text nor a function ``inputs``, or both; the script's functions or its model fail.
        FileNotFoundError, ModuleNotFoundError: those of `language_task`.
    """
    inputs = getattr(script_function(model)[0], "inputs", None) if is_script(model) else None
    if text is None and inputs is None:
        raise ValueError(
            f"{model} needs inputs: name a text file behind it, or give the script a function inputs, which returns "
            "the arguments of the model"
        )
    if text is not None and inputs is not None:
        raise ValueError(f"{model} has a function inputs of its own: leave out {text}")
    if text is not None:
        task = language_task(model, text, windows=windows, context=context, weights=weights)
        tokens, targets = (torch.cat(parts) for parts in zip(*task.batches(), strict=True))
        return ModelCall(task.network, (tokens,), {}, functools.partial(token_loss, targets=targets))
    script = load_script(model, context=context, weights=weights)
    assert inputs is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with errors_of_script(model, "when it makes its inputs"):
            given = inputs()
    args = given if isinstance(given, tuple) else () if isinstance(given, Mapping) else (given,)
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    with torch.no_grad(), errors_of_script(model, "when its model runs on its inputs"):
        script.network(*args, **kwargs)
    return ModelCall(script.network, args, kwargs, getattr(script_function(model)[0], "loss", None))
