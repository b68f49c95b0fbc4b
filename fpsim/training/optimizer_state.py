"""The names of the state that an optimizer keeps for its parameters."""

from __future__ import annotations

import copy
import typing
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def state_names(optimizer: Optimizer) -> list[str]:
    """The names of the state that an optimizer keeps for its parameters, which `round_optimizer` accepts.

    Optimizers create their state in their first step. So a copy of the optimizer with small parameters takes a step,
    with dense gradients or, if it takes only these, sparse ones. If both fail, the names are read from the optimizer's
    own state.

    Raises:
        ValueError: the step fails, and the optimizer has no state yet.
    """
    try:
        states = _states_after_a_step(optimizer, sparse=False)
    except Exception as error:
        try:
            states = _states_after_a_step(optimizer, sparse=True)
        except Exception:
            states = states_of_parameters(optimizer.state)
        if not states:
            raise ValueError(
                f"cannot tell what state {type(optimizer).__name__} keeps: a step on a small copy of it failed "
                f"({error}). Take a step before you call round_optimizer"
            ) from error
    return sorted({name for each in states for name, value in each.items() if _is_state(value)})


def states_of_parameters(state: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """The states of the parameters in the ``state`` of an optimizer, where some keep entries of their own too."""
    return [each for each in state.values() if isinstance(each, dict)]


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a state: the state itself, or those in its lists, tuples, deques and mappings."""
    if isinstance(value, Mapping):
        return tensors_in(list(value.values()))
    if isinstance(value, (list, tuple, deque)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def _is_state(value: Any) -> bool:
    """Whether ``value`` holds a floating-point tensor with dimensions. (Counters are scalars.)"""
    return any(tensor.ndim > 0 for tensor in tensors_in(value))


def _states_after_a_step(optimizer: Optimizer, *, sparse: bool) -> list[dict[str, Any]]:
    twin = copy.copy(optimizer)
    twin.__dict__ = {**vars(optimizer), **vars(twin)}
    own = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    twin.state = defaultdict(dict, copy.deepcopy(own))
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
            p.grad = gradient.to_sparse() if sparse else gradient
        return loss.detach()

    closure()
    type(twin).step(
        twin, typing.cast(Any, closure)
    )  # not twin.step, which a learning rate scheduler binds to the original
    return states_of_parameters(twin.state)


def _small_parameters(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """One small parameter for each number of dimensions, dtype and device, on which the state may depend."""
    for ndim, dtype, device in dict.fromkeys((max(p.ndim, 1), p.dtype, p.device) for p in parameters):
        yield torch.ones([2] * ndim, dtype=dtype, device=device, requires_grad=True)
