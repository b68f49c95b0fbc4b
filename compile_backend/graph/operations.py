"""Marking the ends of operations in the traced graph, for `Policy.elementwise` and `Policy.output`.

An operation is one operator of aten as the model or autograd calls it, before decomposition. A softmax, a layer norm or
a GELU is rounded once, forward and backward, whatever elementary steps this version of torch decomposes it into. The
decompositions that tracing applies are wrapped, so that each marks its results. The matrix products that Inductor
decomposes into a multiplication and a sum are marked in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fpsim.compile_backend.graph.families import Work, family_of
from fpsim.compile_backend.graph.operation_ends import mark
from fpsim.compile_backend.graph.products import product_of_packet

aten = torch.ops.aten

#: Operators of which only the first result is an operation's. The other results are statistics for backward, which stay
#: within the unit that computes them.
ONE_RESULT = frozenset(
    {
        "_batch_norm_no_update", "_batch_norm_with_update_functional", "_fused_rms_norm", "_native_batch_norm_legit",
        "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
        "miopen_batch_norm", "native_batch_norm", "native_group_norm", "native_layer_norm", "nll_loss2d_forward",
        "nll_loss_forward", "log_sigmoid_forward", "multilabel_margin_loss_forward", "rrelu_with_noise_functional",
    }
)  # fmt: skip

_within: ContextVar[bool] = ContextVar("within an operation", default=False)


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Inductor's decompositions, extended to all operations, with marks at their results.

    Operators that are neither operations nor matrix products are wrapped too, so that no step of their decompositions
    counts as an operation.
    """
    table: dict[OpOverload, Callable[..., Any]] = dict(select_decomp_table())
    return {op: _wrapped(op, table.get(op), op in operations()) for op in operations() | table.keys()}


@lru_cache(maxsize=1)
def operations() -> frozenset[OpOverload]:
    """The operators of aten that are operations: the functions of tensors that compute new numbers, but no products."""
    registered = sorted(
        name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if "aten::" in name
    )
    found = []
    for name, _, overload in (name.partition(".") for name in registered):
        family = family_of(name)
        if family is not None and family.work is Work.ARITHMETIC:
            op = getattr(getattr(aten, name), overload or "default")
            if _is_function(op):
                found.append(op)
    return frozenset(found)


def _is_function(op: OpOverload) -> bool:
    """Whether ``op`` returns new tensors, changes no argument, and is not composed of other operators."""
    schema = op._schema
    return (
        not schema.is_mutable
        and all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))
        and any("Tensor" in str(result.type) for result in schema.returns)
        and not _is_composed(op)
    )


def _is_composed(op: OpOverload) -> bool:
    """Whether torch always decomposes ``op``: it has a kernel made of other operators, and none for the CPU."""
    return op.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    ) and not op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)


def _wrapped(op: OpOverload, decomposition: Callable[..., Any] | None, is_operation: bool) -> Callable[..., Any]:
    """``decomposition`` of ``op`` (None if it has none) with marks, or without marks inside another decomposition."""

    @wraps(decomposition or op)
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        if _within.get():
            return decomposition(*args, **kwargs) if decomposition is not None else NotImplemented
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with _one_operation():
            result = decomposition(*args, **kwargs) if decomposition is not None else NotImplemented
            is_whole = result is NotImplemented
            if is_whole:
                result = op(*args, **kwargs)
        ends_here = is_operation or (_is_single_product(op) and not is_whole)
        computes = ends_here and any(tensor.is_floating_point() for tensor in given)
        return _with_marks(result, op, given) if computes else result

    return decomposed


def _is_single_product(op: OpOverload) -> bool:
    entry = product_of_packet(op.overloadpacket)
    return entry is not None and not entry.is_joint


@contextlib.contextmanager
def _one_operation() -> Iterator[None]:
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def _with_marks(result: Any, op: OpOverload, given: list[Tensor]) -> Any:
    """``result`` with its new floating-point tensors marked; for operators of `ONE_RESULT` only the first."""

    def marked(value: Any) -> Any:
        new = isinstance(value, Tensor) and value.is_floating_point() and not any(value is tensor for tensor in given)
        return mark(value, f"aten.{op._opname}") if new else value

    values, structure = pytree.tree_flatten(result)
    results = 1 if op._opname in ONE_RESULT else len(values)
    return pytree.tree_unflatten([*map(marked, values[:results]), *values[results:]], structure)
