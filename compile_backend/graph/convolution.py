"""Splitting the backward pass of a convolution, in which one operator computes two products and a sum for the bias.

Both products take both operands of the forward product: they multiply by one, and use only the shape of the other. One
call can compute both products while they multiply the same gradient. If the gradient is rounded differently for the
two, each product needs its own call. The gradient of the bias is the sum of the unrounded gradient, as in a linear
layer.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

#: The positions of the results of `aten.convolution_backward`: the gradients of input, weight and bias.
INPUT, WEIGHT, BIAS = range(3)
#: For each product the position of the argument of which it uses only the shape; it is an operand of the other product.
SHAPE_ONLY = {INPUT: 1, WEIGHT: 2}


def find_bias_gradients(graph: fx.Graph) -> list[fx.Node]:
    """The gradients of biases that convolutions in ``graph`` compute besides their products."""
    backward = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return [result for node in backward for result in node.users if result.args[1] == BIAS and result.users]


def backward_of(result: fx.Node) -> fx.Node:
    """The call of which ``result`` is one of the results."""
    call = result.args[0]
    assert isinstance(call, fx.Node)
    return call


def split(backward: fx.Node) -> dict[fx.Node, tuple[int, fx.Node | None]]:
    """Replace a call of `aten.convolution_backward`, in place, by one call for each product and a sum for the bias.

    Returns:
        For each new call the position of the argument of which it uses only the shape, and the call that multiplies by
        that argument, if there is one.
    """
    graph, calls = backward.graph, dict[int, fx.Node]()
    for result in list(backward.users):
        index: int = result.args[1]  # type: ignore[assignment]
        with graph.inserting_before(result):
            if index == BIAS:
                gradient: fx.Node = backward.args[0]  # type: ignore[assignment]
                axes = [0, *range(2, gradient.meta["val"].dim())]
                bias = graph.call_function(aten.sum.dim_IntList, (gradient, axes))
                bias.meta = {**result.meta, "original_aten": bias.target}
                result.replace_all_uses_with(bias)
                graph.erase_node(result)
            else:
                mask = [i == index for i in (INPUT, WEIGHT, BIAS)]
                call = graph.call_function(aten.convolution_backward.default, (*backward.args[:-1], mask))
                values = zip(backward.meta["val"], mask, strict=True)
                call.meta = {**backward.meta, "val": tuple(value if wanted else None for value, wanted in values)}
                result.replace_input_with(backward, call)
                calls[index] = call
    graph.erase_node(backward)
    return {call: (SHAPE_ONLY[index], calls.get(1 - index)) for index, call in calls.items()}


def join(calls: dict[fx.Node, tuple[int, fx.Node | None]]) -> None:
    """Merge pairs of ``calls``, a result of `split`, that have the same operands: one call computes both products."""
    pairs = {tuple(sorted((call, other))) for call, (_, other) in calls.items() if other is not None}
    for first, second in pairs:
        if first.args[:-1] == second.args[:-1]:
            mask = [any(wanted) for wanted in zip(first.args[-1], second.args[-1], strict=True)]  # type: ignore[arg-type]
            values = zip(first.meta["val"], second.meta["val"], strict=True)
            first.update_arg(len(first.args) - 1, mask)
            first.meta["val"] = tuple(b if a is None else a for a, b in values)
            second.replace_all_uses_with(first)
            second.graph.erase_node(second)
