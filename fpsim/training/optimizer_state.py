"""The names of the state that an optimizer keeps for its parameters."""

from __future__ import annotations

import copy
import typing
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def state_names(optimizer: Optimizer) -> list[str]:
    """The names of the state that an optimizer keeps for its parameters, which `round_optimizer` accepts.

    Optimizers create their state in their first step. So a copy of the optimizer with small parameters takes a step. If
    that fails, the names are read from the optimizer's own state.

    Raises:
        ValueError: the step fails, and the optimizer has no state yet.
    """
    try:
        states = _states_after_a_step(optimizer)
    except Exception as error:
        states = list(optimizer.state.values())
        if not states:
            raise ValueError(
                f"cannot tell what state {type(optimizer).__name__} keeps: a step on a small copy of it failed "
                f"({error}). Take a step before you call round_optimizer"
            ) from error
    return sorted({name for each in states for name, value in each.items() if _is_state(value)})


def _is_state(value: Any) -> bool:
    """Whether ``value`` is a floating-point tensor with dimensions, or a list that holds one: not a counter."""
    if isinstance(value, list):
        return any(_is_state(item) for item in value)
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _states_after_a_step(optimizer: Optimizer) -> list[dict[str, Any]]:
    twin = copy.copy(optimizer)
    twin.__dict__ = {**vars(optimizer), **vars(twin)}
    twin.state = defaultdict(dict)
    for name in [name for name in vars(twin) if name.startswith("_optimizer_") and name.endswith("_hooks")]:
        setattr(twin, name, OrderedDict())
    twin.param_groups = [
        {**group, "params": list(_small_parameters(group["params"]))} for group in optimizer.param_groups
    ]
    parameters = [p for group in twin.param_groups for p in group["params"]]
    if isinstance(twin, torch.optim.LBFGS):  # it keeps its own list of the parameters, and their number
        twin._params, twin._numel_cache = parameters, None

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = sum(((p - 3) ** 4).sum() for p in parameters)
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        return loss.detach()

    closure()
    type(twin).step(
        twin, typing.cast(Any, closure)
    )  # not twin.step, which a learning rate scheduler binds to the original
    return list(twin.state.values())


def _small_parameters(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """One small parameter for each number of dimensions, dtype and device, on which the state may depend."""
    for ndim, dtype, device in dict.fromkeys((max(p.ndim, 1), p.dtype, p.device) for p in parameters):
        yield torch.ones([2] * ndim, dtype=dtype, device=device, requires_grad=True)
