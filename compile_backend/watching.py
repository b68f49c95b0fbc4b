"""Watching the operators that run beside the graphs of fpsim, in a call of a compiled model and in its backward pass.

A call runs forward code, and a `Witness` watches it. Autograd runs the backward pass later: the nodes that belong to
the call carry its `Gradients` in their metadata, and the witness of that pass counts the products in these nodes. The
nodes run the derivatives of graphs and of code that was left out, and hooks of tensors.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch._guards import TracingContext
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from fpsim.compile_backend.errors import UnroundedWarning
from fpsim.compile_backend.witness import CAN_WATCH, Witness

#: The key of `Gradients` in the metadata of autograd nodes.
_KEY = "fpsim"

#: The module of torch that calls the backward code of compiled graphs.
_COMPILED_BACKWARD = "torch._functorch._aot_autograd.runtime_wrappers"

#: The autograd nodes of gradients that compiled code has computed. torch cannot differentiate them.
_DERIVED_BACKWARD = "CompiledFunctionBackwardBackward"
_SECOND_DERIVATIVES = (
    "A model compiled by torch has no second derivatives. Take them of the uncompiled model, by "
    "fpsim.curvature.functional_loss or functional_outputs, which round as the policy says"
)


class _Thread(threading.local):
    """What runs in this thread.

    Attributes:
        graphs: how many runs of rewritten graphs have begun.
        running: how many of these, and how many compilations, are under way.
        calls: how many calls of compiled models are under way.
        is_quiet: whether a report runs the model, which names escapes itself.
        is_watched: whether a `Witness` watches what is under way.
        gradients: those of the call under way; None if no call is watched.
    """

    graphs = 0
    running = 0
    calls = 0
    is_quiet = False
    is_watched = False
    gradients: Gradients | None = None


thread = _Thread()


@dataclass
class Calls:
    """What the calls of one compiled model have shown.

    Attributes:
        name: the name of the model.
        settled: whether the last call ran a rewritten graph and compiled nothing.
        differentiated: whether autograd has run a backward pass of a call.
        escaped: the products that ran beside the graphs, of which a warning has told.
        escaped_backward: those in the backward pass.
    """

    name: str
    settled: bool = False
    differentiated: bool = False
    escaped: Counter[str] = field(default_factory=Counter)
    escaped_backward: Counter[str] = field(default_factory=Counter)


class Gradients:
    """The backward pass of one call of a compiled model.

    Attributes:
        calls: all calls of the model.
        products: how often each operator ran in it, outside of rewritten graphs, that may hold a matrix product.
        has_run: whether autograd has begun to run it.

    Args:
        arguments: the arguments of the call. What computed them does not belong to it.
    """

    def __init__(self, calls: Calls, arguments: Any) -> None:
        self.calls = calls
        self.products: Counter[str] = Counter()
        self.has_run = False
        self._outside = set(_nodes(arguments))

    @torch.compiler.disable  # Dynamo is on where a compiled function computes gradients itself
    def cover(self, results: Any) -> None:
        """Let the autograd nodes between the arguments and ``results`` carry this object."""
        waiting, seen = [node for node in _nodes(results) if node not in self._outside], set(self._outside)
        for node in waiting:
            node.register_prehook(self._note_run)
            _pending.add(self)
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                node.metadata[_KEY] = self
                waiting += [before for before, _ in node.next_functions if before is not None]

    @torch.compiler.disable
    def _note_run(self, _: Any) -> None:
        self.has_run = self.calls.differentiated = True


#: Backward passes that have not run yet. Those of results that are no longer used disappear.
_pending: weakref.WeakSet[Gradients] = weakref.WeakSet()


def _nodes(values: Any) -> list[Any]:
    """The autograd nodes of the tensors, and those of the gradient edges, in ``values``."""
    found = []
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            found += [leaf.grad_fn] if leaf.grad_fn is not None else []
        elif isinstance(leaf, Node):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _nodes([getattr(leaf, each.name, None) for each in fields(leaf)])
    return found


@contextlib.contextmanager
def own_work() -> Iterator[None]:
    """Work of fpsim, such as compiling: no `Witness` judges the operators in it."""
    thread.running += 1
    try:
        yield
    finally:
        thread.running -= 1


@contextlib.contextmanager
def graph_runs() -> Iterator[None]:
    """The run of a graph that fpsim rewrote."""
    thread.graphs += 1
    with own_work():
        yield


@contextlib.contextmanager
def call_runs() -> Iterator[None]:
    """The call of a compiled model."""
    thread.calls += 1
    try:
        yield
    finally:
        thread.calls -= 1


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Calls without errors and warnings of escapes, for reports that name escapes themselves."""
    before, thread.is_quiet = thread.is_quiet, True
    try:
        yield
    finally:
        thread.is_quiet = before


@contextlib.contextmanager
def witness(gradients: Gradients | None = None) -> Iterator[Witness | None]:
    """A witness of what runs in this context; None if there is one already, or if this version of torch has none.

    Args:
        gradients: those of the call that runs in this context, for backward passes inside the call.
    """
    if not CAN_WATCH or thread.is_watched:
        yield None
        return
    thread.is_watched, thread.gradients = True, gradients
    try:
        with Witness(is_covered=lambda: thread.running > 0, in_backward=_count) as watching:
            yield watching
    finally:
        thread.is_watched, thread.gradients = False, None


def _count(node: Any, operator: str) -> None:
    """Count a product that ran while autograd evaluates ``node``, unless it belongs to a compiled graph."""
    gradients = node.metadata.get(_KEY)
    if gradients is not None and not _in_compiled_backward():
        gradients.products[operator] += 1


def _in_compiled_backward() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _COMPILED_BACKWARD:
            return True
    return False


def watched_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which lets autograd compute gradients, with a warning of the products beside the graphs of fpsim."""

    @functools.wraps(run)
    def and_watch(outputs: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        if TracingContext.try_get() is not None or thread.running or thread.is_quiet:
            return run(outputs, *args, **kwargs)
        if thread.gradients is not None:  # a call that is watched computes gradients itself
            thread.gradients.cover(outputs)
        if not _pending or thread.is_watched:
            return run(outputs, *args, **kwargs)
        with witness():
            result = run(outputs, *args, **kwargs)
        for gradients in [each for each in _pending if each.has_run]:
            _pending.discard(gradients)
            warn_of_backward(gradients)
        return result

    return torch.compiler.disable(and_watch, recursive=False)  # Dynamo compiles what autograd calls


def whole_second_derivatives(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which lets autograd compute gradients, with an error for second derivatives of compiled code.

    Compiled code has none in torch. Where a gradient depends on an input only through what forward kept, torch does not
    see that it does: the derivative would be None, and zeros in `torch.autograd.functional`.
    """

    @functools.wraps(run)
    def or_refuse(outputs: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        inputs = args[3] if len(args) > 3 else ()
        try:
            result = run(outputs, *args, **kwargs)
        except RuntimeError as error:
            if _derives_gradients(outputs):
                raise RuntimeError(f"{str(error).rstrip('.')}. {_SECOND_DERIVATIVES}") from error
            raise
        is_lost = bool(inputs) and (not result or any(gradient is None for gradient in result))
        if is_lost and TracingContext.try_get() is None and _derives_gradients(outputs):
            raise RuntimeError(f"the second derivatives of a compiled model are lost. {_SECOND_DERIVATIVES}")
        return result

    return torch.compiler.disable(or_refuse, recursive=False)


def _derives_gradients(outputs: Iterable[Any]) -> bool:
    """Whether ``outputs`` depend on gradients that compiled code has computed with ``create_graph``."""
    waiting, seen = _nodes(tuple(outputs)), set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if type(node).__name__ == _DERIVED_BACKWARD:
                return True
            waiting += [before for before, _ in node.next_functions if before is not None]
    return False


@torch.compiler.disable
def warn_of_backward(gradients: Gradients) -> None:
    """Warn of the products that ran unrounded in a backward pass, unless the last warning told of the same."""
    calls = gradients.calls
    if gradients.products not in (Counter(), calls.escaped_backward):
        calls.escaped_backward = gradients.products
        warn(
            f"{listed(gradients.products)} ran unrounded in the backward pass of {calls.name}, outside of the graphs "
            "that fpsim rewrote: in hooks of tensors, or in derivatives of code that Dynamo left out. fpsim.audit "
            "lists what ran unrounded"
        )


def warn(message: str) -> None:
    """Warn at the line of the first caller outside of torch and fpsim."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "contextlib",
        "copy",
        "fpsim",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fpsim: {message}", UnroundedWarning, stacklevel=level + 1)


def listed(products: Counter[str]) -> str:
    """The operators and how often each ran: ``2 aten.mm, 1 aten.bmm``."""
    return ", ".join(f"{count} {operator}" for operator, count in sorted(products.items()))
