"""The states of timed scales as values that a user reads, saves and loads; calibration from sample batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fpsim.compile_backend.calls import scale_states
from fpsim.policy import Policy

#: For each site the state of its scale: ``factors`` and ``amaxes`` (float32), ``updates`` (int64), and ``seen``, the
#: largest magnitude in a step that has not ended (float32), or None.
ScaleState = dict[str, dict[str, Any]]


def scale_state(compiled: Any) -> ScaleState:
    """The states of the scales of a compiled model that depend on other steps (``history``, ``every``, ``calibrated``).

    Save it beside the parameters and the state of the optimizer. A run that is resumed from all three has the same bits
    as one that was not interrupted.

    Args:
        compiled: a model or function that `torch.compile` returned for backend ``"fpsim"`` or ``"fpsim_eager"``, or a
            module whose ``compile`` method was called.

    Returns:
        For each site, by name, a dictionary of CPU tensors: `ScaleState`. It is empty before the first call, and if no
        scale of the policy is timed. It can be saved by `torch.save` and loaded with ``weights_only=True``.

    Raises:
        TypeError: ``compiled`` is not compiled by fpsim.
    """
    return scale_states(compiled).to_dict()


def load_scale_state(compiled: Any, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the scales of a compiled model go on from ``state``, which `scale_state` or `calibrate` returned.

    The model must have the same policy. Its states are forgotten. Sites that ``state`` lacks start anew.

    Raises:
        TypeError: ``compiled`` is not compiled by fpsim.
        ValueError: ``state`` is none, or, when the model runs, the state of a site does not fit its scale.
    """
    scale_states(compiled).load(state)


def calibrate(model: nn.Module, batches: Iterable[Any], policy: Policy | Mapping[str, Any] | str) -> ScaleState:
    """Fixed scales for inference, from the largest magnitudes in sample batches.

    Every batch runs once, without gradients, with the scales that the batch itself gives. The result is for
    `load_scale_state` of the model compiled under the same policy.

    Args:
        model: an uncompiled module, in the mode (`torch.nn.Module.eval`) in which it will be used.
        batches: dictionaries, which become keyword arguments; tuples and lists, which become positional arguments;
            other values, which become the only argument.
        policy: a `Policy`, its options, or the name of a preset. Some operand has a scale with timing ``calibrated``,
            such as ``int8/tensor/calibrated``.

    Raises:
        ValueError: no scale of the policy is calibrated, or there is no batch.

    >>> model = torch.nn.Linear(4, 2)
    >>> policy = Policy(format="int8/tensor/calibrated")
    >>> compiled = torch.compile(model, backend="fpsim_eager", options={"policy": policy})
    >>> load_scale_state(compiled, calibrate(model, [torch.ones(3, 4), 2 * torch.ones(3, 4)], policy))
    """
    parsed = Policy.from_options(policy if isinstance(policy, Mapping) else {"policy": policy})
    if not any(
        cast is not None and cast.scale is not None and cast.scale.timing == "calibrated"
        for cast in parsed.operand_casts()
    ):
        raise ValueError("no scale of the policy is calibrated: use a format such as 'int8/tensor/calibrated'")
    compiled = torch.compile(model, backend="fpsim_eager", options={"policy": parsed})  # type: ignore[dict-item]
    states = scale_states(compiled)
    states.is_calibrating = True
    with torch.no_grad():
        for batch in batches:
            if isinstance(batch, Mapping):
                compiled(**batch)
            elif isinstance(batch, tuple | list):
                compiled(*batch)
            else:
                compiled(batch)
    if not states.tables:
        raise ValueError("there is no batch to calibrate with: give at least one")
    states.finish_calibration()
    return states.to_dict()
