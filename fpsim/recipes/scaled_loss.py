"""A part of recipes: an optimizer that takes gradients of a scaled loss (`fpsim.training.loss_scaling`)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from fpsim.training.loss_scaling import DynamicScale, StaticScale, scale_loss


@dataclass(frozen=True)
class ScaledLoss:
    """The loss is multiplied by a factor, by which the optimizer divides the gradients.

    Multiply the loss by ``optimizer.param_groups[0]["loss_scale"]`` before ``backward()``.

    Attributes:
        static: a fixed factor; None has a factor that adapts to overflows.
        initial, growth, backoff, interval, least, hysteresis: the fields of `DynamicScale`.
    """

    static: float | None = None
    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    least: float = 0.0
    hysteresis: int = 1

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """Scale the loss of ``optimizer`` from now on.

        Raises: the errors of `fpsim.training.loss_scaling.scale_loss`.
        """
        if self.static is not None:
            scale_loss(optimizer, StaticScale(self.static))
        else:
            given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "static"}
            scale_loss(optimizer, DynamicScale(**given))
        return optimizer

    def __str__(self) -> str:
        if self.static is not None:
            return f"the loss times {self.static:g}"
        return f"the loss times a factor from {self.initial:g}, which grows after {self.interval} steps"
