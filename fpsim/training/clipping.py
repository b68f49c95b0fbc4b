"""Clipping of updates, as in StableAdamW: a tensor whose gradients outgrow its second moment gets a smaller step.

Source: Wortsman et al., Stable and low-precision training for large-scale vision-language models (arXiv 2304.13013),
section 3 and algorithm 2, after Adafactor (arXiv 1804.04235, section 5).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

#: The attribute of an optimizer that holds its `ClippedOptimizer`.
_CLIPPED = "fpsim_clipped"


@dataclass(frozen=True)
class ClippedOptimizer:
    """An optimizer whose updates are clipped: the result of `clip_updates`.

    Attributes:
        optimizer: the optimizer. It is used as before, through ``optimizer.step()``.
        threshold: the root mean square above which an update is clipped.
        rms: for each parameter RMS_t of the last step in which it had a gradient.
    """

    optimizer: Optimizer
    threshold: float
    rms: dict[Tensor, float] = field(default_factory=dict, repr=False, compare=False)
    _active: list[bool] = field(default_factory=lambda: [True], repr=False, compare=False)

    def remove(self) -> None:
        """Stop clipping."""
        self._active.clear()


def clip_updates(optimizer: Optimizer, threshold: float = 1.0) -> ClippedOptimizer:
    """Make AdamW the optimizer StableAdamW: divide the learning rate of a tensor by its RMS_t where that is above 1.

    With the gradient g of a tensor and its second moment v of this step (which contains g) after bias correction::

        RMS_t = sqrt(mean(g^2 / max(v, eps^2))),   lr_t = lr / max(1, RMS_t / threshold)

    The step is that of the optimizer with ``lr_t`` in place of ``lr``, for the update and for the weight decay. RMS_t
    is computed in float64. The step takes one tensor at a time, so that foreach and fused optimizers lose their speed.

    It goes together with `fpsim.round_optimizer`, in any order: v then begins from the rounded second moment. A
    `torch.amp.GradScaler` has to unscale the gradients before the step, unless the optimizer is fused. Nothing is kept
    between steps, so state dicts stay as they are.

    Args:
        optimizer: `torch.optim.AdamW`, or `torch.optim.Adam` without weight decay.
        threshold: a positive number, 1 in the paper.

    Raises:
        ValueError: the optimizer is another one, has ``amsgrad`` or ``differentiable``, or weight decay that belongs to
            the gradient; its updates are clipped already; or the threshold is not a positive number. In a step: a
            parameter is a `DTensor`, whose shards are elsewhere, or a gradient is sparse.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.AdamW([weight], lr=0.5, betas=(0.9, 0.75), weight_decay=0.0)
    >>> clipped = clip_updates(optimizer)
    >>> for gradient in (0.0625, 8.0):
    ...     weight.grad = torch.full((2,), gradient)
    ...     optimizer.step()
    >>> round(clipped.rms[weight], 4)  # sqrt(64 / v), with v = (0.25 * 64 + 0.75 * 0.25 / 256) / (1 - 0.75^2)
    1.3228
    """
    if type(optimizer) not in (Adam, AdamW):
        raise ValueError(f"updates of torch.optim.AdamW and Adam can be clipped, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["differentiable"]:
            raise ValueError("updates with amsgrad or differentiable cannot be clipped: set both to False")
        if group["weight_decay"] != 0 and not is_decoupled(optimizer, group):
            raise ValueError("the weight decay of Adam is a part of its gradients: use AdamW, or weight_decay=0")
    if not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
        raise ValueError(f"the threshold of clipped updates is a positive number, got {threshold!r}")
    before = getattr(optimizer, _CLIPPED, None)
    if before is not None and before._active:  # a second division would be by the RMS squared
        raise ValueError("updates of this optimizer are clipped already: call remove() of what clip_updates returned")
    result = ClippedOptimizer(optimizer, float(threshold))
    setattr(optimizer, _CLIPPED, result)
    own = optimizer.step

    @functools.wraps(getattr(own, "__func__", own))
    def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if not result._active:
            return own(closure, **kwargs) if closure is not None else own(**kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in _parts(self, group, result)]
        try:
            own(**kwargs)
        finally:
            self.param_groups = groups
        return loss

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return result


def is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether Adam or AdamW decays the weights of a group themselves, and not by way of their gradients."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))


def _parts(optimizer: Optimizer, group: dict[str, Any], result: ClippedOptimizer) -> list[dict[str, Any]]:
    """The parameters of a group, each as a group of its own with its learning rate."""
    parts = []
    for p in group["params"]:
        rate = group["lr"]
        if p.grad is not None:
            result.rms[p] = rms = _rms(optimizer, group, p)
            if rms > result.threshold:
                rate = rate / (rms / result.threshold)
        parts.append({**group, "params": [p], "lr": rate})
    return parts


@torch.no_grad()
def _rms(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> float:
    if p.grad is None or hasattr(p, "to_local") or p.grad.is_sparse:
        raise ValueError("updates of sharded parameters and of sparse gradients cannot be clipped: leave these out")
    g, scale = p.grad.double(), getattr(optimizer, "grad_scale", None)
    if scale is not None:
        g = g / scale.double()  # a fused optimizer divides by the scale in its kernel
    state, beta2 = optimizer.state.get(p, {}), group["betas"][1]
    steps = float(state["step"]) + 1 if state else 1
    before = state["exp_avg_sq"].double() if state else torch.zeros_like(g)
    v = (beta2 * before + (1 - beta2) * g * g) / (1 - beta2**steps)
    return float((g * g / v.clamp(min=group["eps"] ** 2)).mean().sqrt())
