"""Running a model for a report: the state of the model is restored, and Dynamo's recompile limit does not apply."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.utils import _pytree as pytree

from fpsim.policy import Policy

#: Options of `torch.compile` that keep compilations by `explain` apart from those of the user (since torch 2.13), so
#: that they do not count against the user's recompile limit.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def as_policy(policy: Policy | Mapping[str, Any] | str | None) -> Policy:
    """The policy described by the ``policy`` argument of `explain`, `audit` or `profile`."""
    return Policy.from_options(policy if policy is None else {"policy": policy})


def refuse_policy_fields(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs that are fields of a policy and no arguments of the model, as in ``explain(model, x, format=...)``.

    A model that takes any keyword argument, as those of Hugging Face do, would ignore them. There only those count
    whose value a policy takes.

    Raises:
        TypeError: with the call that was meant.
    """
    called = uncompiled(model)
    owner = getattr(called, "__self__", called)
    try:
        parameters = inspect.signature(owner.forward if isinstance(owner, nn.Module) else called).parameters
    except (TypeError, ValueError):  # a function that is not written in Python
        return
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    names = {"options", *(each.name for each in fields(Policy))}
    meant = {name: value for name, value in kwargs.items() if name in names and name not in parameters}
    if takes_any:
        meant = {name: value for name, value in meant.items() if _is_policy_field(name, value)}
    if meant:
        options = meant.pop("options", {})
        policy = {**(options if isinstance(options, Mapping) else {}), **meant}
        name = next(name for name in kwargs if name == "options" or name in meant)
        bound = f", and an input of the model in functools.partial(model, {name}=...)" if takes_any else ""
        raise TypeError(
            f"{getattr(called, '__name__', type(owner).__name__)} has no argument {name!r}: a policy is given as "
            f"policy={policy!r}{bound}"
        )


def _is_policy_field(name: str, value: Any) -> bool:
    """Whether a policy takes ``value`` for its field ``name``. Numbers, flags and None are rather inputs of a model."""
    if value is None or isinstance(value, bool | int | float):
        return False
    try:
        Policy.from_options(value if name == "options" else {"format": "bf16"} | {name: value})
    except (TypeError, ValueError):
        return False
    return True


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model or function that was given to `torch.compile`; ``model`` itself if it is not compiled."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


@contextlib.contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Lift the recompile limit, because every call of `explain` compiles again and must not fall back to eager mode."""
    with dynamo_config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20):
        yield


@contextlib.contextmanager
def state_kept(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Restore the state that a forward pass changes: buffers and random state.

    Parameters are not copied. If the model itself writes one in place, a warning names it.
    """
    modules = list(_modules(model, args, dict(kwargs)))
    buffers = [buffer for module in modules for buffer in module.buffers()]
    values = [buffer.clone() for buffer in buffers]
    parameters = [named for module in modules for named in module.named_parameters() if not named[1].is_inference()]
    versions = [parameter._version for _, parameter in parameters]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        pairs = zip(parameters, versions, strict=True)
        changed = sorted({name for (name, parameter), version in pairs if parameter._version != version})
        if changed:
            warnings.warn(
                f"the model's forward writes its own parameters {', '.join(changed)}, and this run has changed them "
                "too: give a copy of the model if that matters",
                stacklevel=4,
            )


def _modules(*values: Any) -> Iterator[nn.Module]:
    """The modules among ``values``, and the modules to which functions among them are bound or refer."""
    for value in pytree.tree_leaves(values):
        value = uncompiled(value)
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            yield from _modules(value.func, value.args, value.keywords)
        elif inspect.isfunction(value) or inspect.ismethod(value):
            variables = inspect.getclosurevars(value)
            held = (*variables.nonlocals.values(), *variables.globals.values(), getattr(value, "__self__", None))
            yield from (module for module in held if isinstance(module, nn.Module))


@contextlib.contextmanager
def gradients_kept(loss: Tensor) -> Iterator[None]:
    """Restore the gradients of parameters and inputs that a backward pass from ``loss`` accumulates."""
    leaves = [node.variable for node in _autograd_nodes(loss) if hasattr(node, "variable")]
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


def _autograd_nodes(loss: Tensor) -> set[Any]:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return seen
