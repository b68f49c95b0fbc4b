"""The backward pass of a convolution, taken apart: one operator computes two products and the sum of the bias.

Each product takes both operands of the forward product, one to multiply with and the other for its shape only, so
that one call serves both as long as they multiply the same gradient; where that is rounded for each in its own way,
each needs a call of its own. The gradient of the bias is a sum of the gradient as it comes, as in a linear layer.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

#: The results of `aten.convolution_backward`: the gradients of these.
INPUT, WEIGHT, BIAS = range(3)
#: The argument that each product needs for its shape only, and that is an operand of the other.
SHAPE_ONLY = {INPUT: 1, WEIGHT: 2}


def find_bias_gradients(graph: fx.Graph) -> list[fx.Node]:
    """The gradients of biases that convolutions of ``graph`` compute beside their products."""
    backward = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return [result for node in backward for result in node.users if result.args[1] == BIAS and result.users]


def backward_of(result: fx.Node) -> fx.Node:
    """The call of which ``result`` is one of the results."""
    call = result.args[0]
    assert isinstance(call, fx.Node)
    return call


def split(backward: fx.Node) -> dict[fx.Node, tuple[int, fx.Node | None]]:
    """Replace a call of `aten.convolution_backward`, in place, by one for each product and a sum for the bias.

    Returns: for each new call, the position of the argument that it takes for its shape only, and the call of which
        that argument is an operand, if there is one.
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
    """Let one call compute both products wherever two of ``calls``, as `split` returns them, have the same operands."""
    pairs = {tuple(sorted((call, other))) for call, (_, other) in calls.items() if other is not None}
    for first, second in pairs:
        if first.args[:-1] == second.args[:-1]:
            mask = [any(wanted) for wanted in zip(first.args[-1], second.args[-1], strict=True)]  # type: ignore[arg-type]
            values = zip(first.meta["val"], second.meta["val"], strict=True)
            first.update_arg(len(first.args) - 1, mask)
            first.meta["val"] = tuple(b if a is None else a for a, b in values)
            second.replace_all_uses_with(first)
            second.graph.erase_node(second)
