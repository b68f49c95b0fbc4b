"""Recognising matrix products among the nodes of a joint forward-and-backward aten graph.

Tracing decomposes small products into a multiplication and a sum before any pass sees them. These are recognised by
their original operator of aten: torch remembers it for operators that tracing decomposes, `composites` notes it for
those that torch composes of others, and the sequence number leads from a derivative to the operator that it is of.
"""

from __future__ import annotations

from operator import getitem
from typing import Any, cast

from torch import fx

from fpsim.compile_backend.graph.composites import composed_product, is_weight_mark, note_product
from fpsim.compile_backend.graph.nodes import (
    aten,
    is_float,
    is_tensor,
    operator_of,
    original_operator,
)
from fpsim.compile_backend.graph.operation_ends import find_marks, mark
from fpsim.compile_backend.graph.products import (
    Axes,
    Form,
    Multiplication,
    product_of_packet,
    product_operator,
)
from fpsim.compile_backend.graph.views import is_view, rearrangements

_SUMS = (aten.sum.dim_IntList, aten.sum.default)


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` is the value of a floating-point matrix product, or computes several such products."""
    entry = product_operator(node.target)
    return (entry is not None and entry.is_joint) or multiplication_of(node) is not None


def multiplication_of(node: fx.Node) -> Multiplication | None:
    """The positions of the operands and the contracted axes, if ``node`` is the value of a floating-point product.

    Returns:
        The positions are those among the arguments of `call_of`, and the axes are counted from the front. None if
        ``node`` is no such value.
    """
    if node.op != "call_function" or not is_float(node.meta.get("val")):
        return None
    call = call_of(node)
    entry = product_operator(call.target)
    if entry is not None and entry.is_joint != (call is not node):
        return None
    if entry is not None:
        result = cast(int, node.args[1]) if entry.is_joint else 0
        if result >= len(entry.multiplications) or operator_of(call) is not call.target:
            return None
        positions = entry.multiplications[result].operands
        return Multiplication(positions, _own_axes(call, positions, entry.contracted(result, call.args)))
    if node.target is not aten.mul.Tensor or not all(is_tensor(argument) for argument in node.args):
        return None
    return _decomposed(node) if is_of_product(node) else None


def _decomposed(node: fx.Node) -> Multiplication:
    """The product that is decomposed into the multiplication ``node`` and a sum. It contracts the axes of the sum.

    A product of matrices that sums over one element has no sum. It contracts the axes that its operator contracts:
    tiles and columns of its operands need them.
    """
    end, rank = sum_of(node), node.meta["val"].dim()
    origin = product_of_packet(original_operator(node))
    same_rank = all(x.meta["val"].dim() == rank for x in node.all_input_nodes)
    if end is None and same_rank and origin is not None and origin.form is Form.MATRICES and origin.multiplications:
        return Multiplication((0, 1), _own_axes(node, (0, 1), origin.multiplications[0].contracted))
    summed: Any = ()
    if end is not None:
        summed = end.args[1] if len(end.args) > 1 else range(rank)
    from_the_back = tuple(axis if axis < 0 else axis - rank for axis in summed)  # broadcasting aligns the last axes
    return Multiplication((0, 1), _own_axes(node, (0, 1), (from_the_back, from_the_back)))


def _own_axes(call: fx.Node, positions: tuple[int, int], axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """``axes`` of the operands of ``call``, counted from the front, without the axes that an operand lacks."""
    ranks = [call.args[i].meta["val"].dim() for i in positions]  # type: ignore[union-attr]
    first, second = (
        tuple(sorted(axis % rank for axis in own if -rank <= axis < rank))
        for own, rank in zip(axes, ranks, strict=True)
    )
    return first, second


def call_of(value: fx.Node) -> fx.Node:
    """The node that computes ``value``: itself, or the call that returns ``value`` as one of several results."""
    return cast(fx.Node, value.args[0]) if value.target is getitem else value


def operands_of(value: fx.Node, multiplication: Multiplication) -> list[fx.Node]:
    """The nodes of the operands of the product whose value is ``value``."""
    return [cast(fx.Node, call_of(value).args[i]) for i in multiplication.operands]


def has_weight(value: fx.Node, multiplication: Multiplication) -> bool:
    """Whether the operator says which operand of the product is a weight: in a linear layer or a convolution."""
    return any(is_weight(value, multiplication, i) for i in (0, 1))


def is_weight(value: fx.Node, multiplication: Multiplication, number: int) -> bool:
    """Whether operand ``number``, 0 or 1, of the product is the weight of a linear layer or a convolution.

    It is, whatever tensor it is: a parameter, a buffer, an argument, or the result of a computation. A product to which
    its operator adds a vector is a linear layer too (`ProductOperator.is_layer_with_bias`).
    """
    call = call_of(value)
    position = multiplication.operands[number]
    entry = product_operator(call.target)
    if entry is not None and entry.weight == position:
        return True
    if number == 1 and _adds_vector(value):
        return True
    return any(map(is_weight_mark, rearrangements(call.args[position])))  # type: ignore[arg-type]


def _adds_vector(value: fx.Node) -> bool:
    """Whether the operator of the product also adds a vector, its bias, to a result of more dimensions."""
    origin = product_of_packet(original_operator(value))
    if origin is None or origin.addend is None or not origin.is_layer_with_bias:
        return False
    if product_operator(value.target) is origin:
        result, added = value, value.args[origin.addend]
    else:  # decomposed: the addition follows
        last, result = value, value
        while result.target is not aten.add.Tensor:
            users = [user for user in result.users if original_operator(user) is origin.packet]
            if len(users) != 1:
                return False
            last, result = result, users[0]
        added = next(node for node in result.all_input_nodes if node is not last)
    return is_tensor(added) and added.meta["val"].dim() == 1 < result.meta["val"].dim()  # type: ignore[union-attr]


def is_of_product(node: fx.Node) -> bool:
    """Whether ``node`` comes from an operator that is a matrix product, or from its derivative."""
    return origin_of_product(node) is not None


def origin_of_product(node: fx.Node) -> str | None:
    """The name (``aten.outer``) of the matrix product that ``node`` comes from; None if it comes from none."""
    entry = product_of_packet(original_operator(node))
    if entry is not None:
        return entry.name
    name = composed_product(node)
    return None if name is None else f"aten.{name}"


def note_gradients(graph: fx.Graph) -> None:
    """Note which multiplications in the backward pass are derivatives of a matrix product.

    The derivative of a dot product is a multiplication. Nothing but its sequence number tells that it is of a product.
    The operator that autograd differentiates is the first in the graph with that number; later operators without
    derivatives have the number too.
    """
    operators: dict[int | None, str | None] = {}
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if node.op != "call_function" or number is None:
            continue
        if node.meta.get("partitioner_tag") != "is_backward":
            if number not in operators and not is_view(node):
                entry = product_of_packet(original_operator(node))
                operators[number] = entry.packet.__name__ if entry and "aten.mul" in entry.gradients else None
        elif (name := operators.get(number)) and node.target is aten.mul.Tensor and original_operator(node) is aten.mul:
            note_product(node, name)


def sum_of(node: fx.Node) -> fx.Node | None:
    """The sum that completes the decomposed product whose multiplication is ``node``, if there is one."""
    if node.target is not aten.mul.Tensor or len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target is mark and len(user.users) == 1:
        (user,) = user.users
    return user if is_sum_of_product(user) else None


def is_sum_of_product(node: fx.Node) -> bool:
    """Whether ``node`` is the sum that completes a decomposed product."""
    return node.target in _SUMS and is_of_product(node)


def ends_of_products(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """From the multiplications of decomposed products to the marks at the ends of the products."""
    ends = {}
    for end in find_marks(graph):
        waiting = [end.args[0]] if product_of_packet(original_operator(end)) else []
        while waiting:
            node: fx.Node = waiting.pop()  # type: ignore[assignment]
            if original_operator(node) is original_operator(end) and node.target is not mark:
                if multiplication_of(node):
                    ends[node] = end
                else:
                    waiting += node.all_input_nodes
    return ends
