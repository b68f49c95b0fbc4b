"""Composed operators in a traced graph.

torch composes some operators of others (CompositeImplicitAutograd) before tracing records anything: an outer product
becomes a view and a multiplication. While `recorded` is in force, such a node notes the product that made it, and the
weight of a linear layer passes through an identity that says so. torch copies notes to the nodes of backward that have
the same sequence number.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import traceback

from fpsim.compile_backend.graph.products import COMPOSED, LINEAR, SPLIT_IF_COMPLEX

aten = torch.ops.aten
#: Where torch registers the composition of an operator: in general, for `torch.vmap`, and for all of `torch.func`.
_KEYS = (
    DispatchKey.CompositeImplicitAutograd,
    DispatchKey.FuncTorchBatchedDecomposition,
    DispatchKey.FuncTorchDynamicLayerFrontMode,
)
_PRODUCT = "fpsim product"
_WEIGHT = "fpsim weight"
_COMPLEX = "fpsim complex"

#: Whether the bias of a linear layer is a part of its product whatever the strides of the input are.
_with_bias: ContextVar[bool] = ContextVar("linear layers with their biases", default=False)

#: Tensors that have an identity under autograd. Subclasses of the user may lack it.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


class _Recording:
    """The kernels of torch that `recorded` has replaced, and how many of its contexts are open, in all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contexts = 0
        self.replaced: list[tuple[OpOverload, DispatchKey, Callable[..., Any] | None]] = []

    def begin(self) -> None:
        for names, wrap in ((COMPOSED, _noting), (LINEAR, _marking), (SPLIT_IF_COMPLEX, _noting_complex)):
            for op, key in (pair for name in names for pair in _compositions(name)):
                self.replaced.append((op, key, op.py_kernels.get(key)))
                op.py_kernels[key] = wrap(op, op.py_kernels.get(key) or partial(op._op_dk, key))
                op._dispatch_cache.clear()

    def end(self) -> None:
        for op, key, kernel in self.replaced:
            if kernel is None:
                del op.py_kernels[key]
            else:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()
        self.replaced.clear()


_recording = _Recording()


@contextlib.contextmanager
def recorded(with_bias: bool = False) -> Iterator[None]:
    """A context for tracing. It notes on every node which operator of `COMPOSED` made it, and marks weights.

    torch composes a linear layer of a product and an addition if its input has three axes or more and is not
    contiguous. ``with_bias`` makes it the operator `aten.addmm`, as for other inputs: its result includes the bias.

    torch's Python dispatcher calls the kernels that this context puts in place of torch's own, and they call those. The
    first of several contexts, in any threads, puts them there, and the last one takes them out.
    """
    with _recording.lock:
        if _recording.contexts == 0:
            _recording.begin()
        _recording.contexts += 1
    token = _with_bias.set(with_bias)
    try:
        yield
    finally:
        _with_bias.reset(token)
        with _recording.lock:
            _recording.contexts -= 1
            if _recording.contexts == 0:
                _recording.end()


def _compositions(name: str) -> Iterator[tuple[OpOverload, DispatchKey]]:
    """The overloads of the composed operator ``name``, and the keys under which each is composed."""
    registered = torch._C._dispatch_get_all_op_names()
    packet = getattr(torch.ops.aten, name)
    for op in (getattr(packet, overload) for overload in packet.overloads()):
        if op.name() in registered and op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            yield from ((op, key) for key in _KEYS if op.has_kernel_for_dispatch_key(key))


def _noting(op: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` of ``op`` with a note on all nodes that it makes."""

    @wraps(op)
    def noting(*args: Any, **kwargs: Any) -> Any:
        with traceback.annotate({_PRODUCT: op._opname}):
            return kernel(*args, **kwargs)

    return noting


def _noting_complex(op: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` of ``op`` with a note on all nodes that it makes of complex numbers."""

    @wraps(op)
    def noting(x: Tensor, *others: Any, **kwargs: Any) -> Any:
        if not x.is_complex():
            return kernel(x, *others, **kwargs)
        with traceback.annotate({_COMPLEX: (f"aten.{op._opname}", str(x.dtype))}):
            return kernel(x, *others, **kwargs)

    return noting


def _marking(op: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` of ``op``, an operator of `LINEAR`, with its second argument marked as a weight."""

    @wraps(op)
    def marking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if type(weight) in _PLAIN:
            with traceback.annotate({_WEIGHT: op._opname}):
                weight = torch.ops.aten.alias(weight)
        if bias is None or x.dim() < 3 or not _with_bias.get():
            return kernel(x, weight, bias)
        rows = kernel(x.flatten(0, -2), weight, bias)
        return rows.reshape(*x.shape[:-1], *rows.shape[1:])

    return marking


def composed_product(node: fx.Node) -> str | None:
    """The name of the operator of `COMPOSED` that made ``node``, or whose derivative it helps compute; else None."""
    return _notes(node).get(_PRODUCT)


def complex_product(node: fx.Node) -> tuple[str, str] | None:
    """The operator and the dtype of the product of complex numbers of which ``node`` is a part; else None."""
    return _notes(node).get(_COMPLEX)


def note_product(node: fx.Node, name: str) -> None:
    """Note that ``node`` was made by the product ``name``."""
    node.meta["custom"] = {**_notes(node), _PRODUCT: name}


def find_weight_marks(graph: fx.Graph) -> list[fx.Node]:
    """The identities through which the weights of linear layers pass."""
    return [node for node in graph.find_nodes(op="call_function", target=aten.alias.default) if is_weight_mark(node)]


def is_weight_mark(node: fx.Node) -> bool:
    """Whether ``node`` is the identity through which the weight of a linear layer passes."""
    return _WEIGHT in _notes(node) and node.target is aten.alias.default


def _notes(node: fx.Node) -> dict[str, Any]:
    return node.meta.get("custom") or {}
