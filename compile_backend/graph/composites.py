"""Composed operators in a traced graph.

torch composes some operators of others (CompositeImplicitAutograd) before tracing records anything: an outer product
becomes a view and a multiplication. While `recorded` is in force, every node notes the composed operator that made it.
torch copies the note to the nodes of backward that have the same sequence number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import fx
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx import traceback

from fpsim.compile_backend.graph.products import COMPOSED, LINEAR

_KEY = DispatchKey.CompositeImplicitAutograd
_PRODUCT = "fpsim product"
_WEIGHTED = "fpsim product with a weight"


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """A context for tracing. It notes on every node which operator of `COMPOSED` or `LINEAR` made it.

    torch's Python dispatcher calls the kernels that this context puts in place of torch's own, and they call those.
    """
    replaced = {}
    for names, note in ((COMPOSED, _PRODUCT), (LINEAR, _WEIGHTED)):
        for op in (op for name in names for op in _composed_overloads(name)):
            replaced[op] = op.py_kernels.get(_KEY)
            op.py_kernels[_KEY] = _noting(op, replaced[op], note)
            op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernel in replaced.items():
            if kernel is None:
                del op.py_kernels[_KEY]
            else:
                op.py_kernels[_KEY] = kernel
            op._dispatch_cache.clear()


def _composed_overloads(name: str) -> Iterator[OpOverload]:
    registered = torch._C._dispatch_get_all_op_names()
    packet = getattr(torch.ops.aten, name)
    for overload in packet.overloads():
        op = getattr(packet, overload)
        if op.name() in registered and op.has_kernel_for_dispatch_key(_KEY):
            yield op


def _noting(op: OpOverload, kernel: Callable[..., Any] | None, note: str) -> Callable[..., Any]:
    """The kernel of ``op`` (``kernel``, or torch's in C++) with a note on all nodes that it makes."""

    @wraps(op)
    def noting(*args: Any, **kwargs: Any) -> Any:
        with traceback.annotate({note: op._opname}):
            return kernel(*args, **kwargs) if kernel is not None else op._op_dk(_KEY, *args, **kwargs)

    return noting


def composed_product(node: fx.Node) -> str | None:
    """The name of the operator of `COMPOSED` that made ``node``, or whose derivative it helps compute; else None."""
    return _notes(node).get(_PRODUCT)


def note_product(node: fx.Node, name: str) -> None:
    """Note that ``node`` was made by the product ``name``."""
    node.meta["custom"] = {**_notes(node), _PRODUCT: name}


def is_of_linear_layer(node: fx.Node) -> bool:
    """Whether an operator of `LINEAR` made ``node``, or its derivative did."""
    return _WEIGHTED in _notes(node)


def _notes(node: fx.Node) -> dict[str, Any]:
    return node.meta.get("custom") or {}
