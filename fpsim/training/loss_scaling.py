"""Loss scaling: the loss is multiplied by a factor, so that its gradients stay in the range of a narrow format.

The optimizer divides the gradients by the factor again, and skips a step whose gradients have overflowed. The rules of
the factor are frozen values, and their state is explicit. Compound scaling, where the optimizer works on the scaled
gradients, is `fpsim.training.compound_scaling`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fpsim.training.shards import local

#: The entries of an optimizer's groups that hold the state: `ScaleState`.
_ENTRIES = {"factor": "loss_scale", "good_steps": "good_steps", "overflows_left": "overflows_left"}


@dataclass(frozen=True)
class ScaleState:
    """The state of a rule.

    Attributes:
        factor: the factor of the loss.
        good_steps: the number of steps without overflow since the factor grew, or since the last overflow.
        overflows_left: the number of overflows before the factor shrinks; at 0 or below every overflow shrinks it.
    """

    factor: float
    good_steps: int = 0
    overflows_left: int = 1


class ScaleRule(Protocol):
    """How the factor of the loss follows from the steps before."""

    def start(self) -> ScaleState:
        """The state before the first step."""

    def after(self, state: ScaleState, overflow: bool) -> ScaleState:
        """The state after a step, whose gradients have overflowed or not."""


@dataclass(frozen=True)
class StaticScale:
    """A fixed factor (Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.2).

    >>> StaticScale(1024.0).start().factor
    1024.0
    """

    factor: float = 1024.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def start(self) -> ScaleState:
        """The state before the first step."""
        return ScaleState(_float32(self.factor))

    def after(self, state: ScaleState, overflow: bool) -> ScaleState:
        """``state`` itself: an overflow skips a step and changes nothing."""
        return state


@dataclass(frozen=True)
class DynamicScale:
    """A factor that grows after ``interval`` steps without overflow, and shrinks at an overflow.

    With the default values this is `torch.amp.GradScaler`. Megatron-LM's ``DynamicGradScaler``, with which MS-AMP
    trains, is ``DynamicScale(initial=2.0**32, interval=1000, least=1.0, hysteresis=2)``. The factor is a float32
    number.

    Attributes:
        initial: the first factor.
        growth, backoff: the factor is multiplied by them when it grows and when it shrinks.
        interval: the number of steps in a row without overflow after which it grows. A factor of infinity is not
            taken.
        least: the factor does not shrink below it.
        hysteresis: the factor shrinks at this overflow after it has grown, and at all later ones.

    >>> rule = DynamicScale(initial=8.0, interval=2)
    >>> state = rule.start()
    >>> for overflow in (True, False, False, False):
    ...     state = rule.after(state, overflow)
    >>> state
    ScaleState(factor=8.0, good_steps=1, overflows_left=1)
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    least: float = 0.0
    hysteresis: int = 1

    def __post_init__(self) -> None:
        _check_positive(initial=self.initial)
        if not (1 < self.growth < math.inf and 0 < self.backoff < 1):
            raise ValueError(
                f"growth is above 1 and backoff is between 0 and 1, got growth={self.growth}, backoff={self.backoff}"
            )
        if self.interval < 1 or self.hysteresis < 1:
            raise ValueError(
                f"interval and hysteresis are counts from 1 on, got interval={self.interval}, "
                f"hysteresis={self.hysteresis}"
            )
        if not 0 <= self.least <= self.initial:
            raise ValueError(f"least is between 0 and initial={self.initial}, got {self.least}")

    def start(self) -> ScaleState:
        """The state before the first step."""
        return ScaleState(_float32(self.initial), 0, self.hysteresis)

    def after(self, state: ScaleState, overflow: bool) -> ScaleState:
        """The state after a step, whose gradients have overflowed or not."""
        if overflow:
            left = state.overflows_left - 1
            shrunk = max(_float32(state.factor * self.backoff), self.least)
            return ScaleState(shrunk if left <= 0 else state.factor, 0, left)
        if state.good_steps + 1 < self.interval:
            return ScaleState(state.factor, state.good_steps + 1, state.overflows_left)
        grown = _float32(state.factor * self.growth)
        return ScaleState(grown if grown < math.inf else state.factor, 0, self.hysteresis)


class LossScaling:
    """An optimizer that takes gradients of a scaled loss: the result of `scale_loss`.

    Attributes:
        optimizer: the optimizer. Its ``step()`` divides the gradients by the factor, skips the step if one of them is
            infinite or NaN, and updates the factor.
        rule: how the factor changes.
    """

    def __init__(self, optimizer: Optimizer, rule: ScaleRule) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self._overflow: bool | None = None  # of the gradients that are unscaled; None before

    @property
    def state(self) -> ScaleState:
        """The state of the rule. It stands in the optimizer's groups, and so in its state dict."""
        group = self.optimizer.param_groups[0]
        return ScaleState(**{name: group[entry] for name, entry in _ENTRIES.items()})

    @property
    def factor(self) -> float:
        """The factor of the loss in use."""
        return self.state.factor

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the factor in use; call ``backward()`` of it."""
        return loss * self.factor

    @torch.no_grad()
    def unscale(self) -> bool:
        """Divide the gradients by the factor before ``step()``, for clipping; ``step()`` does it otherwise.

        As in `torch.amp.GradScaler`, a gradient is multiplied by the reciprocal of the factor, which is rounded to
        float32. With several processes of `torch.distributed` all skip a step if one has an overflow.

        Returns:
            Whether all gradients are finite.

        Raises:
            RuntimeError: it has been called since the last ``step()``.
        """
        if self._overflow is not None:
            raise RuntimeError("the gradients are unscaled already: call unscale() once before each step()")
        inverse = _float32(1 / self.factor)
        gradients = [_values(p) for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._overflow = _any_rank(not all(bool(g.isfinite().all()) for g in gradients), gradients)
        for gradient in gradients:
            wide = gradient if gradient.dtype.itemsize >= 4 else gradient.float()
            gradient.copy_(wide * inverse)
        return not self._overflow

    def _begin(self) -> bool:
        """Whether to take the step."""
        if self._overflow is None:
            self.unscale()
        overflow, self._overflow = self._overflow, None
        self._set(self.rule.after(self.state, bool(overflow)))
        return not overflow

    def _set(self, state: ScaleState) -> None:
        for group in self.optimizer.param_groups:
            group.update({entry: getattr(state, name) for name, entry in _ENTRIES.items()})


def scale_loss(optimizer: Optimizer, rule: ScaleRule | None = None) -> LossScaling:
    """Let an optimizer take gradients of a scaled loss.

        scaling = scale_loss(optimizer)
        scaling.scale(loss).backward()
        optimizer.step()

    The state of the rule is in the entries ``loss_scale``, ``good_steps`` and ``overflows_left`` of the optimizer's
    groups, so that its state dict holds them, and a run resumes where it was saved.

    Args:
        optimizer: any optimizer of `torch.optim`, or one with the same interface. What `fpsim.round_optimizer` does at
            a step is left out with the step.
        rule: a `StaticScale` or `DynamicScale`. Default: ``DynamicScale()``, as `torch.amp.GradScaler`.

    Raises:
        ValueError: the loss of the optimizer is scaled already; when it steps: ``step`` is given a closure, whose
            several gradients have no one factor.
    """
    if any(_ENTRIES["factor"] in group for group in optimizer.param_groups):
        raise ValueError(f"the loss of this {type(optimizer).__name__} is scaled already: scale it once")
    result = LossScaling(optimizer, DynamicScale() if rule is None else rule)
    result._set(result.rule.start())
    own = optimizer.step

    @functools.wraps(getattr(own, "__func__", own))
    def step(self: Optimizer, closure: Any = None) -> Any:
        if closure is not None:
            raise ValueError("a scaled loss goes with step() without a closure: compute the gradients before it")
        return own() if result._begin() else None

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return result


def _values(p: Tensor) -> Tensor:
    """The numbers of the gradient of ``p`` on this rank, sharing its memory. A sparse gradient is coalesced."""
    assert p.grad is not None
    if p.grad.is_sparse:
        p.grad = p.grad.coalesce()
        return p.grad._values()
    return local(p.grad)


def _any_rank(overflow: bool, gradients: list[Tensor]) -> bool:
    """Whether any process has an overflow."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return overflow
    device = gradients[0].device if gradients else torch.device("cpu")
    found = torch.tensor(float(overflow), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} of a loss scale is a positive number, got {number}")


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()
