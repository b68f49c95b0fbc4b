"""A part of recipes: an optimizer whose state and weights are rounded by `fpsim.round_optimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fpsim.training.layers import linear_weights
from fpsim.training.optimizers import round_optimizer


@dataclass(frozen=True)
class RoundedState:
    """The optimizer, rounded after each step by `fpsim.round_optimizer`.

    Attributes:
        state: a cast for all state, or pairs of the name of a state and its cast; a mapping is stored as pairs.
        weights, master, kahan, least_size, rounding, overflow, seed: the arguments of `fpsim.round_optimizer`.
        linear_only: whether ``weights``, ``master`` and ``kahan`` apply to the weights of linear layers only.
    """

    state: str | tuple[tuple[str, str], ...] | Mapping[str, str] | None = None
    weights: str | None = None
    master: str | None = None
    kahan: bool = False
    linear_only: bool = False
    least_size: int = 0
    rounding: str = "nearest_even"
    overflow: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.state, Mapping):
            object.__setattr__(self, "state", tuple(sorted(self.state.items())))

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """Round ``optimizer`` from now on.

        Raises: the errors of `fpsim.round_optimizer`, for example if the optimizer has no state of such a name.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        state = given.pop("state")
        if given.pop("linear_only"):
            given["weights_of"] = linear_weights(model, optimizer)
        round_optimizer(optimizer, dict(state) if isinstance(state, tuple) else state, **given)
        return optimizer

    def __str__(self) -> str:
        texts = [f"{name} {cast}" for name, cast in self.state] if isinstance(self.state, tuple) else []
        texts += [f"state {self.state}"] if isinstance(self.state, str) else []
        if self.least_size:
            texts.append(f"states below {self.least_size} elements unrounded")
        of = " of linear layers" * self.linear_only
        texts += [f"{name}{of} {cast}" for name in ("weights", "master") if (cast := getattr(self, name)) is not None]
        return ", ".join(texts + ["weights compensated (Kahan)"] * self.kahan)
