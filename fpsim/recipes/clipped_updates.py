"""A part of recipes: an optimizer whose updates are clipped, as in StableAdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fpsim.training.clipping import clip_updates


@dataclass(frozen=True)
class ClippedUpdates:
    """The optimizer with updates clipped by `fpsim.training.clipping.clip_updates`.

    Attributes:
        threshold: the root mean square above which an update is clipped.
    """

    threshold: float = 1.0

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """Clip the updates of ``optimizer`` from now on.

        Raises: the errors of `fpsim.training.clipping.clip_updates`.
        """
        return clip_updates(optimizer, self.threshold).optimizer

    def __str__(self) -> str:
        return f"AdamW with the learning rate of a tensor divided by its RMS where that is above {self.threshold:g}"
