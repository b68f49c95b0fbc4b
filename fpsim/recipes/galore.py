"""GaLore with 8-bit moments: AdamW in a subspace of each gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam, AdamW

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe
from fpsim.training.clipping import is_decoupled
from fpsim.training.galore import GaLore
from fpsim.training.layers import linear_weights
from fpsim.training.optimizers import round_optimizer


@dataclass(frozen=True)
class ProjectedAdam:
    """`fpsim.training.galore.GaLore` in place of AdamW, with rounded moments.

    Attributes:
        rank: the rank of projections; a float below 1 is a share of the shorter side of each matrix.
        update_gap, scale: the arguments of GaLore.
        state: pairs of the name and the cast of each moment.
        least_size: moments with fewer elements are not rounded.
    """

    rank: float = 0.25
    update_gap: int = 200
    scale: float = 0.25
    state: tuple[tuple[str, str], ...] = (("exp_avg", "dynamic8"), ("exp_avg_sq", "dynamic8:unsigned"))
    least_size: int = 4096

    def __post_init__(self) -> None:
        if self.rank <= 0 or (self.rank > 1 and self.rank != int(self.rank)):
            raise ValueError(f"the rank of projections is a whole number or a share up to 1, got {self.rank}")

    def apply(self, optimizer: Any, model: torch.nn.Module) -> GaLore:
        """A GaLore with the parameters and options of ``optimizer``, which no longer serves.

        Weights of linear layers are projected, other parameters are not.

        Raises:
            ValueError: ``optimizer`` is neither AdamW nor Adam, has taken steps, or has an option that GaLore lacks, or
                weight decay that belongs to the gradient.
        """
        if type(optimizer) not in (Adam, AdamW):
            raise ValueError(f"GaLore takes the place of torch.optim.AdamW, got {type(optimizer).__name__}")
        if optimizer.state:
            raise ValueError("the optimizer has taken steps: apply the recipe before training")
        matrices = set(linear_weights(model, optimizer))
        groups = []
        for group in optimizer.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("GaLore has neither amsgrad nor maximize: leave them out")
            if group["weight_decay"] and not is_decoupled(optimizer, group):
                raise ValueError("GaLore decays weights, and Adam adds the decay to gradients: use AdamW")
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            others = [p for p in group["params"] if p not in matrices]
            groups += [{**options, "params": others}] if others else []
            groups += [self._projected(p, options) for p in group["params"] if p in matrices]
        galore = GaLore(groups)
        if self.state:
            round_optimizer(galore, dict(self.state), least_size=self.least_size)
        return galore

    def _projected(self, p: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        rank = max(1, round(self.rank * min(p.shape))) if self.rank < 1 else int(self.rank)
        return {**options, "params": [p], "rank": rank, "update_gap": self.update_gap, "scale": self.scale}

    def __str__(self) -> str:
        rank = f"{self.rank:g} of the shorter side" if self.rank < 1 else f"{self.rank:.0f}"
        state = ", ".join(f"{name} {cast}" for name, cast in self.state)
        text = f"GaLore, rank {rank}, a new projection every {self.update_gap} steps, update times {self.scale:g}"
        return f"{text}; {state}, states below {self.least_size} elements unrounded" if state else text


def galore8bit(
    *, rank: float = 0.25, update_gap: int = 200, scale: float = 0.25, state: bool = True, high: str | None = "bf16"
) -> Recipe:
    """GaLore: AdamW's moments in 8 bits, of gradients that are projected to a low rank.

    The moments have the dynamic maps of bitsandbytes, with a scale for every 256 elements. Apply the recipe to
    `torch.optim.AdamW` and go on with the optimizer that it returns; make learning rate schedulers of that one.

    Args:
        rank: the rank, or a share of the shorter side of each matrix.
        update_gap: how many steps a projection is kept.
        scale: the factor of updates.
        state: False leaves the moments in float32.
        high: the format of operands and results of products; None leaves them in the model's dtype.

    Raises:
        ValueError: ``rank`` is out of range. From `Recipe.apply`: see `ProjectedAdam.apply`.
    """
    part = ProjectedAdam(rank, update_gap, scale) if state else ProjectedAdam(rank, update_gap, scale, ())
    return Recipe(
        name="galore8bit",
        source="Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507; "
        "jiaweizzhao/GaLore 2cc66f8; bitsandbytes",
        policy=None if high is None else Policy(format=high, output=high),
        optimizer=part,
        notes=(
            "The code decays a weight after its update, and by the new weight; AdamW decays it before.",
            "Moments are not projected again when the projection changes, as in the code.",
            "The code's script projects the matrices of attention and MLP. This projects all linear layers, the head "
            "too.",
        ),
    )
