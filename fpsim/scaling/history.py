"""Scales that other steps determine: delayed scaling, scales that are renewed every few steps, calibrated scales.

The state is a value, `History`; the functions take one and return another. `fpsim.compile_backend.scale_states` keeps
the histories of a compiled model.

Source: ``delayed_scaling.cu`` and ``fp8.py`` of Transformer Engine, ``meta.py`` and ``optimizer.py`` of MS-AMP (the
code of FP8-LM, arXiv 2310.18313).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpsim.formats import CodebookFormat, ElementFormat, IntegerFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.tensors import TorchOps
from fpsim.scaling.groups import OnTensors
from fpsim.scaling.rules import power_of_two_code
from fpsim.scaling.scale import Scale
from fpsim.scaling.steps import range_of, ratio_scale

_SMALLEST_NORMAL = 2.0**-126
#: The largest factor of a history: its reciprocal is a normal number too.
LARGEST_FACTOR = 2.0**126


@dataclass(frozen=True)
class History:
    """The states of scales, one in each row.

    Attributes:
        factors: float32 of shape (rows,). For rule ``power_of_two`` and for histories the number that multiplies
            elements before they are rounded, else the one that divides them. It is 1 at first.
        amaxes: float32 of shape (rows, steps): the largest magnitudes of the last steps, the latest one last, and 0 for
            steps that have not been. For timings without a history ``steps`` is 0.
        updates: int64 of shape (rows,): the number of counted steps.
    """

    factors: Tensor
    amaxes: Tensor
    updates: Tensor


def start(rows: int, scale: Scale, device: torch.device) -> History:
    """The states before the first step."""
    steps = scale.steps if scale.order else 0
    return History(
        torch.ones(rows, device=device),
        torch.zeros(rows, steps, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )


def factors_of(amaxes: Tensor, element: ElementFormat, scale: Scale) -> Tensor:
    """The factor that each of the magnitudes ``amaxes``, float32 of shape (rows,), gives.

    Those of rule ``power_of_two`` are `fpsim.power_of_two_scale`; those of a history with rule ``fp32`` are the
    quotient max / amax in float32, at most 2^126; other ones are the ratios of current scaling.
    """
    if scale.rule == "power_of_two":
        assert not isinstance(element, CodebookFormat), "codebooks take ratios"
        grid = element.grid() if isinstance(element, IntegerFormat) else element
        ops = TorchOps(torch.float32)
        return power_of_two_code(amaxes.view(ops.integer), grid, CARRIERS[torch.float32], ops).view(torch.float32)
    if scale.order:
        largest = torch.full_like(amaxes, range_of(element))  # torch divides a number by a tensor in two steps
        return (largest / amaxes.clamp(min=_SMALLEST_NORMAL)).clamp(max=LARGEST_FACTOR)
    return ratio_scale(amaxes, element, scale.rule, OnTensors())


def in_use(history: History, amaxes: Tensor, element: ElementFormat, scale: Scale) -> Tensor:
    """The factors of the current step, whose magnitudes are ``amaxes``, float32 of shape (rows,).

    Transformer Engine uses the factors that earlier steps gave. MS-AMP uses those of the current step until ``steps``
    steps in a row were finite. ``every:N`` uses those of the current step in every Nth step.
    """
    if scale.order in ("max", "most_recent") or scale.timing == "calibrated":
        return history.factors
    amaxes = _flushed(amaxes)
    current = factors_of(amaxes, element, scale)
    if scale.order:
        current = torch.where(_is_usable(amaxes), current, history.factors)
        return torch.where(history.updates < scale.steps, current, history.factors)
    return torch.where(history.updates % scale.steps == 0, current, history.factors)


def advanced(history: History, latest: Tensor, ran: Tensor, element: ElementFormat, scale: Scale) -> History:
    """The states after a step.

    Args:
        history: the states before it.
        latest: the largest magnitudes in the step, float32 of shape (rows,). NaN if there was a NaN.
        ran: which rows took part in the step; bool of shape (rows,). The others stay as they are.
        element, scale: those of all rows.

    The rules:

    - Transformer Engine (``max``, ``most_recent``): rows whose latest magnitude is 0 stay as they are. The factor is
      that of the largest of the last ``steps`` magnitudes, or of the latest. NaN is ignored by ``max``. The factor
      stays if that magnitude is not finite.
    - MS-AMP: the factor is that of the largest of the last ``steps`` magnitudes. It stays if one of these is not finite
      or if all are 0. If the latest is not finite, counting of steps begins again.
    - ``every:N``: the factor becomes that of the latest magnitude in every Nth step. Steps that are due and not finite
      are not counted.
    - ``calibrated``: as ``every:1``. `fpsim.calibrate` takes one step, with the largest magnitudes of all batches.
    """
    latest = _flushed(latest)
    updates = history.updates + 1
    if scale.order:
        ran = ran & (latest != 0) if scale.order != "ms_amp" else ran
        amaxes = torch.cat([history.amaxes[:, 1:], latest[:, None]], 1)
        if scale.order == "max":
            deciding = torch.nan_to_num(amaxes, nan=0.0, posinf=float("inf")).amax(1)
        else:
            deciding = latest if scale.order == "most_recent" else amaxes.amax(1)
        renewed = _is_usable(deciding)
        if scale.order == "ms_amp":
            updates = torch.where(latest.isfinite(), updates, 0)
    else:
        amaxes, deciding = history.amaxes, latest
        due = history.updates % scale.steps == 0
        renewed = due & latest.isfinite()
        updates = torch.where(due & ~latest.isfinite(), history.updates, updates)
    factors = torch.where(renewed, factors_of(deciding, element, scale), history.factors)
    return History(
        torch.where(ran, factors, history.factors),
        torch.where(ran[:, None], amaxes, history.amaxes),
        torch.where(ran, updates, history.updates),
    )


def _flushed(amaxes: Tensor) -> Tensor:
    """Magnitudes with 0 in place of subnormal ones, so that flushing of subnormals changes no factor."""
    return torch.where(amaxes < _SMALLEST_NORMAL, 0.0, amaxes)


def _is_usable(amaxes: Tensor) -> Tensor:
    return amaxes.isfinite() & (amaxes > 0)
