"""GaLore: AdamW in a subspace of each gradient, which is found anew from time to time.

Source: Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507), and the
code, jiaweizzhao/GaLore 2cc66f8, ``galore_torch/adamw8bit.py`` and ``galore_projector.py`` (projection type ``std``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fpsim.training.per_parameter import PerParameterOptimizer


class GaLore(PerParameterOptimizer):
    """AdamW whose moments are those of projected gradients, in the order of operations of GaLore's 8-bit AdamW.

    A group with ``rank`` r has matrices of shape (m, n). Every ``update_gap`` steps, from the first one on, the
    gradient G of the step is decomposed in float32, G = U S V^T, and P is V_r^T if m >= n, else U_r, in the dtype of
    the parameter. A step computes, in float32 unless the dtype is named::

        R = G P^T or P^T G                              in the dtype of the parameter
        m = beta1 m + (1 - beta1) R,   v = beta2 v + (1 - beta2) R^2
        d = -lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t))      rounded to this dtype
        p = p + scale (d P or P d)                      in this dtype
        p = p - lr weight_decay p                       in this dtype

    The moments are not projected again when P changes. The decay comes after the update and takes the new p; in
    `torch.optim.AdamW` it comes first. Groups without ``rank`` have R = G and p = p + d.

    The states ``exp_avg`` and ``exp_avg_sq`` are float32 tensors of the shape of R; `fpsim.round_optimizer` rounds
    them. 8-bit GaLore is::

        optimizer = GaLore([{"params": matrices, "rank": 128}, {"params": others}], lr=0.01)
        fpsim.round_optimizer(
            optimizer, {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8:unsigned"}, least_size=4096
        )

    Args:
        params: parameters, or groups of them with options of their own.
        lr, betas, eps, weight_decay: as in AdamW.
        rank: the number of rows or columns of R, or None for no projection.
        update_gap: the number of steps for which a projection is kept.
        scale: the factor of the update.

    States: ``exp_avg``, ``exp_avg_sq``, ``projection`` (P) where there is a rank, and the count ``step``.

    Raises:
        ValueError: an option is out of range, or a group with ``rank`` has a parameter that is no matrix. In a step: a
            gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the options of the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay", "scale"):
            if not group[name] >= 0:
                raise ValueError(f"{name} of GaLore is at least 0, got {group[name]}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas of GaLore are at least 0 and below 1, got {group['betas']}")
        if group["update_gap"] < 1:
            raise ValueError(f"update_gap of GaLore is a number of steps, at least 1, got {group['update_gap']}")
        if group["rank"] is None:
            return
        if group["rank"] < 1:
            raise ValueError(f"the rank of a projection is at least 1, got {group['rank']}: None means no projection")
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(f"GaLore projects matrices, got shape {tuple(p.shape)}: use a group without rank")

    def update(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> None:
        """Take the step of one parameter, as the class describes it."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        is_tall = p.dim() == 2 and p.shape[0] >= p.shape[1]
        projects = group["rank"] is not None and p.dim() == 2
        if projects and state.get("step", 0) % group["update_gap"] == 0:
            state["projection"] = projection(gradient, group["rank"])
        projected = gradient
        if projects:
            P = state["projection"]
            projected = gradient @ P.T if is_tall else P.T @ gradient
        r = projected.to(torch.float64 if p.dtype == torch.float64 else torch.float32)
        if "step" not in state:
            state.update({"step": 0, "exp_avg": torch.zeros_like(r), "exp_avg_sq": torch.zeros_like(r)})
        state["step"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.mul_(beta1).add_(r * (1 - beta1))
        v.mul_(beta2).add_(r * r * (1 - beta2))
        correction = math.sqrt(1 - beta2 ** state["step"])
        rate = -group["lr"] * correction / (1 - beta1 ** state["step"])
        update = (rate * (m / (v.sqrt() + group["eps"] * correction))).to(p.dtype)
        if projects:
            update = (update @ P if is_tall else P @ update) * group["scale"]
        p.add_(update)
        if group["weight_decay"]:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def projection(gradient: Tensor, rank: int) -> Tensor:
    """The projection P of a gradient of shape (m, n) on its first singular vectors, in its dtype.

    Returns:
        V_r^T of shape (rank, n) if m >= n, else U_r of shape (m, rank); fewer rows or columns if the gradient has
        fewer singular values.
    """
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    u, _, vh = torch.linalg.svd(wide, full_matrices=False)
    kept = vh[:rank] if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]
    return kept.to(gradient.dtype).contiguous()
