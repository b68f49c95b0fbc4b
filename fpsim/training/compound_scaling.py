"""Compound loss scaling: the optimizer works on scaled gradients, and its states change with the scale.

Source: Björck et al., Low-Precision Reinforcement Learning (arXiv 2102.13565), section 4.6, and their code,
nilsjohanbjorck/low-precision-rl, ``algs/gscale.py``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from fpsim.training.arithmetic import Rounding, format_of, rounding_to
from fpsim.training.hypot_adam import HypotAdam

#: The entries of an optimizer's groups that hold the scale and the number of good steps since it changed.
SCALE, GOOD_STEPS = "loss_scale", "good_steps"

#: The states of optimizers that follow the scale: each with the power of the scale that it follows.
_STATES = {
    HypotAdam: {"exp_avg": 1, "hypot": 1},
    Adam: {"exp_avg": 1, "exp_avg_sq": 2},
    AdamW: {"exp_avg": 1, "exp_avg_sq": 2},
}


@dataclass(frozen=True)
class CompoundScaling:
    """A loss scale that an optimizer takes into its state: the result of `scale_compound`.

    Attributes:
        optimizer: the optimizer. Its ``step()`` skips a step where a gradient would overflow.
        growth_interval, least_eps, margin: the arguments of `scale_compound`.
    """

    optimizer: Optimizer
    growth_interval: int
    least_eps: float
    margin: float

    @property
    def factor(self) -> float:
        """The factor of the loss in use."""
        return float(self.optimizer.param_groups[0][SCALE])

    @property
    def good_steps(self) -> int:
        """The number of steps taken since the factor last changed."""
        return int(self.optimizer.param_groups[0][GOOD_STEPS])

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times `factor`, whose gradients the optimizer expects."""
        return loss * self.factor

    @torch.no_grad()
    def before_step(self) -> bool:
        """Whether to take the step. If a gradient overflows, halve the factor, the states and eps instead."""
        if self._fits():
            return True
        self._set(self.factor * 0.5, 0)
        self._multiply_states(0.5)
        return False

    @torch.no_grad()
    def after_step(self) -> None:
        """Count a good step; after enough of them double the factor, the states and eps if no state overflows."""
        count = self.good_steps + 1
        if count <= self.growth_interval:
            self._set(self.factor, count)
            return
        grows = self._states_fit(2.0)
        self._set(self.factor * (2.0 if grows else 1.0), 0)
        if grows:
            self._multiply_states(2.0)

    def _set(self, factor: float, good_steps: int) -> None:
        for group in self.optimizer.param_groups:
            group[SCALE], group[GOOD_STEPS] = factor, good_steps

    def _fits(self) -> bool:
        """Whether each gradient, with a margin and as hAdam weighs it, is finite in the optimizer's arithmetic."""
        for group in self.optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                weighed = _rounding(group, p)(_wide(p.grad) * (self.margin * (beta1 / math.sqrt(beta2))))
                if not weighed.isfinite().all():
                    return False
        return True

    def _states_fit(self, factor: float) -> bool:
        return all(
            q(_wide(state) * (self.margin * factor**power)).isfinite().all() for q, state, power in self._states()
        )

    def _multiply_states(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["eps"] = max(factor * group["eps"], self.least_eps)
        for q, state, power in self._states():
            state.copy_(q(_wide(state) * factor**power))

    def _states(self) -> list[tuple[Rounding, Tensor, int]]:
        """The states of the parameters that have a gradient: each with its rounding and power of the scale."""
        return [
            (_rounding(group, p), state[name], power)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and (state := self.optimizer.state.get(p))
            for name, power in _STATES[type(self.optimizer)].items()
        ]


def scale_compound(
    optimizer: Optimizer,
    scale: float = 1e4,
    *,
    growth_interval: int = 10_000,
    least_eps: float = 1e-7,
    margin: float = 1.1,
) -> CompoundScaling:
    """Let an optimizer work on gradients of a scaled loss, without dividing them by the scale.

        scaling = scale_compound(optimizer)
        scaling.scale(loss).backward()
        optimizer.step()

    Adam's step does not depend on the scale of its gradients, apart from eps. If ``margin`` beta1 / sqrt(beta2) g
    overflows for an element of a gradient, ``step()`` skips the step and halves the scale, the states and eps (to
    ``least_eps`` at least; a second moment is divided by 4). After more than ``growth_interval`` steps without an
    overflow all of them double, unless a state times 2 ``margin`` overflows. Overflow is that of the optimizer's
    arithmetic (`HypotAdam`), or of the dtype. Other rules are in `fpsim.training.loss_scaling`.

    The scale and the count are entries ``loss_scale`` and ``good_steps`` of the optimizer's groups, so its state dict
    holds them. Choose eps for scaled gradients: the paper has 1e-4 with a scale of 1e4.

    Args:
        optimizer: a `HypotAdam`, or `torch.optim.Adam` or `AdamW` without ``amsgrad``, before its first step.
        scale: the first factor of the loss.
        growth_interval: the number of steps without an overflow after which the scale doubles at the next one.
        least_eps: eps is never less.
        margin: a factor above 1, for the sums of a step.

    Raises:
        ValueError: the optimizer is another one, has taken steps, has ``amsgrad``, or its loss is scaled already; a
            number is out of range. When it steps: ``step`` is given a closure.
    """
    if type(optimizer) not in _STATES:
        raise ValueError(f"compound scaling knows HypotAdam, Adam and AdamW, got {type(optimizer).__name__}")
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("compound scaling does not know the state of amsgrad: set amsgrad=False")
    if any(SCALE in group for group in optimizer.param_groups):
        raise ValueError(f"the loss of this {type(optimizer).__name__} is scaled already: scale it once")
    if optimizer.state:
        raise ValueError("the optimizer has states of gradients that were not scaled: call scale_compound before steps")
    for name, value in (("scale", scale), ("least_eps", least_eps), ("margin", margin)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} of compound scaling is a positive number, got {value}")
    if growth_interval < 1:
        raise ValueError(f"growth_interval is a number of steps, at least 1, got {growth_interval}")
    result = CompoundScaling(optimizer, growth_interval, least_eps, margin)
    for group in optimizer.param_groups:
        group[SCALE], group[GOOD_STEPS] = float(scale), 0
    own = optimizer.step

    @functools.wraps(getattr(own, "__func__", own))
    def step(self: Optimizer, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("a scaled loss goes with step() without a closure: compute the gradients before it")
        if result.before_step():
            own()
            result.after_step()

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return result


def _rounding(group: dict[str, Any], p: Tensor) -> Rounding:
    """The rounding of the arithmetic in which the optimizer computes the step of a parameter."""
    return rounding_to(format_of(p.dtype, group.get("arithmetic")), "scale_compound")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
