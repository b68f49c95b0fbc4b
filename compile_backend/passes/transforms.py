"""Transforms of the operands of a product, which leave the product as it is in exact arithmetic.

They change both operands along the axis over which the product sums; or the first operand along the axis that the
product keeps, and the result back.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.products import Form, product_operator
from fpsim.compile_backend.graph.recognition import sum_of
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.policy import Policy
from fpsim.rounding.ops import SOURCE
from fpsim.transforms.ops import transform_operand_op
from fpsim.transforms.transform import Transform

aten = torch.ops.aten

#: Operators that torch decomposes into a multiplication without a sum if there is one element to sum over.
_SUMS_OF_ONE = ("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.mv", "aten.addmv", "aten.dot")

#: The roles in the order in which transforms take operands.
_ORDER = ("gradient", "activation", "weight")


def transform_of(product: Product, policy: Policy) -> Transform | None:
    """The transform that ``policy`` applies to the operands of ``product``; None if it leaves them as they are.

    It does so where it rounds no operand, and where the product sums over one element.
    """
    if all(policy.cast(product.kind, role) is None for role in product.roles) or _sums_over_one(product):
        return None
    return policy.product_transform(product.kind)


def why_not(product: Product, transform: Transform) -> str | None:
    """Why ``transform`` would change the value of ``product``, and the remedy; None if it leaves the value as it is."""
    if transform.of_kept_axis:
        return _why_not_along_kept_axis(product, transform)
    lengths = []
    for operand, axes in zip(_operands(product), product.contracted, strict=True):
        shape = operand.meta["val"].shape
        lengths.append(shape[axes[-1]] if axes else None)
    first, second = lengths
    if first is None or second is None:
        problem = "it sums over no axis of both operands"
    elif _pairs_other_elements(product):
        problem = "its sum does not pair the elements of both operands one by one"
    elif not statically_known_true(first == second):
        problem = f"it pairs {first} elements of one operand with {second} of the other"
    else:
        return _wrong_length(product, transform, first)
    return (
        f"transform {str(transform)!r} would change the value of {product.operator} ({product.kind}) in "
        f"{product.path!r}, because {problem}: name the transform for other kinds of product (transform={{'fprop': "
        f"...}}), or give this module a policy without it (modules={{{product.path or '<module>'!r}: ...}})"
    )


def _why_not_along_kept_axis(product: Product, transform: Transform) -> str | None:
    if product.node.target is not aten.mm.default:
        return (
            f"transform {str(transform)!r} changes the rows or columns of the result of a product of two matrices, and "
            f"{product.operator} ({product.kind}) in {product.path!r} is none: name it for dgrad and wgrad of linear "
            f"layers, or give this module a policy without it (modules={{{product.path or '<module>'!r}: ...}})"
        )
    first, _ = _order(product)
    return _wrong_length(product, transform, _operands(product)[first].meta["val"].shape[kept_axis(product)])


def _wrong_length(product: Product, transform: Transform, length: int | torch.SymInt) -> str | None:
    """Why ``transform`` cannot change ``length`` elements; None if it can, or if the length is known only in a run."""
    if isinstance(length, int):
        try:
            transform.check_axis(length)
        except ValueError as error:
            return f"transform of {product.operator} ({product.kind}) in {product.path!r}: {error}"
    return None


def transform_operands(product: Product, transform: Transform, inserter: Inserter) -> list[fx.Node]:
    """The operands of ``product``, transformed, in the order in which the product takes them.

    The first operand of the transform is the gradient if there is one, else the activation; of two activations the one
    that the product takes first. A weight is the second operand.
    """
    order, operands = _order(product), _operands(product)
    if transform.of_kept_axis:
        [operands[order[0]]] = inserter.transformed([operands[order[0]]], [kept_axis(product)], transform, product.node)
        return operands
    axes = [product.contracted[i][-1] for i in order]
    transformed = [operands[i] for i in order]
    for stage in transform.stages:
        transformed = inserter.transformed(transformed, axes, stage, product.node)
    return [transformed[order.index(i)] for i in (0, 1)]


def transform_result(product: Product, transform: Transform, inserter: Inserter) -> fx.Node:
    """Change the result of ``product``, whose first operand is transformed along the axis that it keeps, back.

    Returns:
        The node that takes its place for all of its users.
    """
    result = product.result
    call = inserter.calls_after(result, product.node)
    axis = _order(product)[0]  # rows of the result are those of the first factor, columns those of the second one
    first = back = call(transform_operand_op, result, str(transform), 1, axis, SOURCE)
    if back.meta["val"].dtype != result.meta["val"].dtype:
        back = call(torch.ops.prims.convert_element_type.default, back, result.meta["val"].dtype)
    result.replace_all_uses_with(back, delete_user_cb=lambda user: user is not first)
    return back


def transforms_of(product: Product, transform: Transform | None) -> list[Transform | None]:
    """The transform of each operand of ``product``, in the order in which the product takes them."""
    is_of_first = transform is not None and transform.of_kept_axis
    return [None if is_of_first and i != _order(product)[0] else transform for i in (0, 1)]


def kept_axis(product: Product) -> int:
    """The axis of the transform's first operand over which a product of two matrices does not sum."""
    return 1 - product.contracted[_order(product)[0]][-1]


def _order(product: Product) -> list[int]:
    """The numbers of the operands of ``product`` in the order in which transforms take them."""
    return sorted((0, 1), key=lambda i: (_ORDER.index(product.roles[i]), i))


def _operands(product: Product) -> list[fx.Node]:
    return [product.node.args[i] for i in product.operands]  # type: ignore[misc]


def _sums_over_one(product: Product) -> bool:
    has_sum = product_operator(product.node.target) is not None or sum_of(product.node) is not None
    return not has_sum and product.operator in _SUMS_OF_ONE


def _pairs_other_elements(product: Product) -> bool:
    """Whether element i of one operand does not always meet element i of the other one."""
    entry = product_operator(product.node.target)
    form = None if entry is None else entry.form
    if form is Form.GROUPS:  # each group sums over its own part of the axis
        return all(operand.meta["val"].dim() == 2 for operand in _operands(product))
    return form is Form.CONVOLUTION_GRADIENT and len(product.contracted[0]) > 1
