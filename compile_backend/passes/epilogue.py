"""Scales that multiply the result of a product, as the epilogue of a hardware product does.

The product multiplies elements. Its result ``c`` is multiplied by the scales ``a`` and ``b`` of the operands: if both
are single numbers, it becomes ``c * (a * b)``, as in cuBLAS, else ``(c * a) * b``, as in CUTLASS. Then the addend is
added, for example a bias. Every step rounds to float32 (to float64 for float64 tensors). For bfloat16 tensors the
product has float32 results too, and the last result is rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import lowering

from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.products import Form, ProductOperator, product_operator
from fpsim.compile_backend.graph.recognition import sum_of
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.rounding.carriers import working_dtype

aten, prims = torch.ops.aten, torch.ops.prims

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("times_scale(Tensor x, Tensor scale) -> Tensor")
_library.impl("times_scale", torch.mul, "CompositeExplicitAutograd")
_library._register_fake("times_scale", torch.mul)
#: ``x * scale``. Where a softmax follows a multiplication of aten, Inductor subtracts the largest number first and then
#: multiplies, which rounds otherwise.
times_scale_op: Callable[..., Tensor] = torch.ops.fpsim.times_scale.default
lowering.register_lowering(times_scale_op, type_promotion_kind=None)(
    lambda x, scale: lowering.lowerings[aten.mul.Tensor](x, scale)
)

#: Products of matrices, and their overloads on GPUs whose results are wider than the operands.
_WIDE = {aten.mm.default: aten.mm.dtype, aten.bmm.default: aten.bmm.dtype}


@dataclass(frozen=True)
class Scaled:
    """A product whose operands are rounded.

    Attributes:
        product: the product.
        value: the node that holds its value times the scales, without an addend; None if it has no scales outside.
        operands: the nodes of its operands, times their scales outside.
    """

    product: Product
    value: fx.Node | None
    operands: tuple[fx.Node, ...]


def scale_result(product: Product, scales: Sequence[fx.Node | None], inserter: Inserter) -> Scaled:
    """Multiply the result of ``product`` by the scales of its operands, before its addend is added.

    Args:
        product: a product whose operands are rounded.
        scales: for each operand the node of the scale that its rounding leaves out, or None.
        inserter: inserts nodes. If it records, the operands times their scales have nodes too.
    """
    operands: list[fx.Node] = [product.node.args[i] for i in product.operands]  # type: ignore[misc]
    if not any(scales):
        return Scaled(product, None, tuple(operands))
    entry = product_operator(product.node.target)
    end = product.value if entry is not None else sum_of(product.node) or product.node
    inserted: list[fx.Node] = []
    insert = inserter.calls_after(end, product.node)

    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        inserted.append(insert(target, *arguments))
        return inserted[-1]

    own = _of_result(product, end, scales, call)
    if inserter.recorder is not None:
        operands = [_times(x, scale, call) for x, scale in zip(operands, scales, strict=True)]
    dtype = end.meta["val"].dtype
    value, addend = (end, None) if entry is None else _without_addend(product.node, end, entry, call)
    scaled = _multiplied(_converted(value, working_dtype(dtype), call), own, call)
    result = scaled
    if value is not end and entry is not None:
        result = _with_addend(scaled, product.node, addend, entry, call)
    result = _converted(result, dtype, call)
    end.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inserted)
    if product.result is end:
        product = replace(product, result=result)
    if value is not end:
        product = replace(product, value=value, operands=(0, 1))
        end.graph.erase_node(end)
    return Scaled(product, scaled, tuple(operands))


Call = Callable[..., fx.Node]


def _of_result(product: Product, end: fx.Node, scales: Sequence[fx.Node | None], call: Call) -> list[fx.Node]:
    """The scales in shapes that broadcast to the result of the product, ``end``."""
    entry = product_operator(product.node.target)
    shaped = []
    for scale, contracted in zip(scales, product.contracted, strict=True):
        if scale is None:
            continue
        if scale.meta["val"].dim():
            if entry is None:  # a multiplication and a sum
                for _ in range(product.node.meta["val"].dim() - scale.meta["val"].dim()):
                    scale = call(aten.unsqueeze.default, scale, 0)
                if end is not product.node:  # else a product over one element, which has no sum
                    summed = end.args[1] if len(end.args) > 1 else list(range(scale.meta["val"].dim()))
                    scale = scale if end.args[2:3] == (True,) else call(aten.squeeze.dims, scale, summed)
            elif entry.form is Form.VECTORS:
                scale = call(aten.squeeze.dims, scale, list(contracted))
        shaped.append(scale)
    return shaped


def _times(x: fx.Node, scale: fx.Node | None, call: Call) -> fx.Node:
    return x if scale is None else call(aten.mul.Tensor, _converted(x, scale.meta["val"].dtype, call), scale)


def _multiplied(value: fx.Node, scales: Sequence[fx.Node], call: Call) -> fx.Node:
    if len(scales) == 2 and not any(scale.meta["val"].dim() for scale in scales):
        scales = [call(aten.mul.Tensor, *scales)]
    for scale in scales:
        value = call(times_scale_op, value, scale)
    return value


def _converted(x: fx.Node, dtype: torch.dtype, call: Call) -> fx.Node:
    return x if x.meta["val"].dtype == dtype else call(prims.convert_element_type.default, x, dtype)


def _without_addend(node: fx.Node, end: fx.Node, entry: ProductOperator, call: Call) -> tuple[fx.Node, fx.Node | None]:
    """The product without its addend, in float32 where it is wider than its operands, and the addend.

    It is ``end`` if that is such a product already, or one of the results of a joint operator. Convolutions have the
    dtype of their operands.
    """
    addend: Any = None if entry.addend is None else node.args[entry.addend]
    if entry.form is Form.CONVOLUTION and addend is not None:
        return call(entry.plain, *node.args[:2], None, *node.args[3:]), addend
    a, b = (node.args[i] for i in entry.multiplications[0].operands)
    working = working_dtype(end.meta["val"].dtype)
    is_narrow = a.meta["val"].dtype != working  # type: ignore[union-attr]
    if entry.is_joint or entry.form is Form.CONVOLUTION or (addend is None and not is_narrow):
        return end, None
    target: Any = entry.plain or node.target
    if is_narrow and a.meta["val"].device.type == "cuda" and target in _WIDE:  # type: ignore[union-attr]
        return call(_WIDE[target], a, b, working), addend
    if node.target is aten._grouped_mm.default:
        return end, None  # it has kernels for bfloat16 alone
    return call(target, _converted(a, working, call), _converted(b, working, call)), addend  # type: ignore[arg-type]


def _with_addend(scaled: fx.Node, node: fx.Node, addend: fx.Node | None, entry: ProductOperator, call: Call) -> fx.Node:
    """``scaled``, times ``alpha``, plus the addend times ``beta``, as ``node`` says."""
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    result = scaled if alpha == 1 else call(aten.mul.Scalar, scaled, alpha)
    if addend is None or beta == 0:
        return result
    added = _converted(addend, scaled.meta["val"].dtype, call)
    if entry.form is Form.CONVOLUTION:
        added = call(aten.view.default, added, [-1, *[1] * (scaled.meta["val"].dim() - 2)])
    added = added if beta == 1 else call(aten.mul.Scalar, added, beta)
    return call(aten.add.Tensor, added, result)
