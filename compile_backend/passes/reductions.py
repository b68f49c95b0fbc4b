"""Replacing sums that are no products by sums with the accumulator that `Policy.reductions` names.

Tracing has decomposed softmax, norms and losses into elementwise operations, sums, means and variances. A sum becomes
``fpsim::accumulate_sum``. A mean is a sum and a quotient, and a variance is computed in two passes, with every other
step in float32: `fpsim.reference.reductions` defines both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.sums import accumulate_sum_op
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph import convolution
from fpsim.compile_backend.graph.families import adds_up
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.metadata import describe
from fpsim.compile_backend.graph.nodes import is_float, operator_name, original_operator
from fpsim.compile_backend.graph.opaque import is_opaque
from fpsim.compile_backend.graph.products import product_operator
from fpsim.compile_backend.graph.recognition import is_sum_of_product
from fpsim.compile_backend.graph.sources import VARIABLE, Source, forward_by_number, is_backward
from fpsim.compile_backend.observe.lost_sums import observe_reduction
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.places import path_of_operation, policy_at
from fpsim.compile_backend.plan import Gap, Sum
from fpsim.policy import Policy
from fpsim.rounding.ops import SOURCE

aten, prims = torch.ops.aten, torch.ops.prims

#: Inserts a call of an operator with arguments.
Call = Callable[..., fx.Node]
#: From a tensor, the axes of a sum, and whether they stay with size 1, to the node of the sums.
Add = Callable[[fx.Node, Sequence[int], bool], fx.Node]


def replace_sums(
    graph: fx.Graph,
    policy: Policy,
    sources: Mapping[fx.Node, Source],
    products: Sequence[Product],
    inserter: Inserter,
    strict: bool,
) -> tuple[list[Sum], list[Gap], list[fx.Node]]:
    """Replace the sums of ``graph`` that are no products where the policy has `Policy.reductions`.

    Returns:
        The sums for the plan; the operators that add up numbers in torch's way, which the policy lists as gaps; and the
        new gradients of the biases of convolutions.

    Raises:
        UnroundedError: with ``strict``, an operator whose sums cannot be simulated and which the policy does not list
            in `Policy.gaps`, or sums of numbers that do not fit into float32.
    """
    sums: list[Sum] = []
    gaps: list[Gap] = []
    biases: list[fx.Node] = []
    of_products = {node for product in products for node in (product.value, product.result, product.node)}
    bias_gradients = convolution.find_bias_gradients(graph) if policy.reduces else []
    forward = forward_by_number(graph, sources) if policy.reduces else {}
    for node in list(graph.nodes) if policy.reduces else []:
        if node.op != "call_function" or node in of_products or is_sum_of_product(node):
            continue
        is_bias = node in bias_gradients
        if not (is_bias or _adds(node)) or not sources[node] & VARIABLE:
            continue
        direction = "backward" if is_backward(node, sources) else "forward"
        path = path_of_operation(convolution.backward_of(node) if is_bias else node, sources, forward)
        name = "aten.convolution_backward" if is_bias else _name(node)
        local = policy_at(path, f"{direction} sum {node.name} ({name})", policy, strict)
        accumulator = None if local is None else local.reduction
        if local is None or accumulator is None:
            continue
        if not is_bias and node.target not in _SUMS:
            if any(each.allows_gap(own) for each in (local, policy) for own in (name, operator_name(node))):
                gaps.append(Gap(path or "", name, "adds numbers as torch does: allowed by the policy's gaps"))
                continue
            if strict:
                raise UnroundedError(
                    f"the sums of {name}{f' in module {path!r}' if path else ''} cannot be simulated: accept those of "
                    f"torch, gaps=[{name!r}], or give the module a rule without reductions"
                )
            gaps.append(Gap(path or "", name, "its sums cannot be simulated: an error unless listed in gaps"))
            continue
        sums.append(Sum(path or "", name, direction, str(accumulator)))
        result = _replace(node, accumulator, inserter, is_bias, sums[-1])
        if is_bias:
            biases.append(result)
    return sums, gaps, biases


def _name(node: fx.Node) -> str:
    """The operator as which the model or autograd called the one of ``node``: ``aten._softmax``."""
    packet = original_operator(node)
    return f"aten.{packet.__name__}" if isinstance(packet, torch._ops.OpOverloadPacket) else operator_name(node)


def _adds(node: fx.Node) -> bool:
    """Whether a result of ``node`` is a floating-point sum of many numbers, or may be one."""
    values = node.meta.get("val")
    if not any(map(is_float, values if isinstance(values, list | tuple) else [values])):
        return False
    if node.target is operator.getitem or product_operator(node.target) is not None or is_opaque(node):
        return False  # products and opaque operators have rules of their own
    return adds_up(node.target, node.args, node.kwargs)


def _replace(node: fx.Node, accumulator: Accumulator, inserter: Inserter, is_bias: bool, entry: Sum) -> fx.Node:
    meta = {name: value for name, value in node.meta.items() if name not in ("val", "tensor_meta", "eager_input_vals")}

    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        with inserter.graph.inserting_before(node):
            new = inserter.graph.call_function(target, arguments)
        new.meta = dict(meta)
        describe(new)
        inserter.sources[new] = inserter.sources[node]
        return new

    def add(x: fx.Node, axes: Sequence[int], keepdim: bool) -> fx.Node:
        key = inserter.random_key(node) if accumulator.is_stochastic else None
        result = call(accumulate_sum_op, x, list(axes), keepdim, key, str(accumulator), SOURCE)
        if inserter.recorder is None:
            return result
        number = inserter.recorder.add_reduction(entry)
        return call(observe_reduction, result, x, list(axes), key, str(accumulator), number)

    def like(value: fx.Node, old: fx.Node) -> fx.Node:
        dtype = old.meta["val"].dtype
        return value if value.meta["val"].dtype == dtype else call(prims.convert_element_type.default, value, dtype)

    if is_bias:
        gradient = cast(fx.Node, convolution.backward_of(node).args[0])
        axes = [axis for axis in range(gradient.meta["val"].dim()) if axis != 1]
        new = like(add(gradient, axes, False), node)
        node.replace_all_uses_with(new)
        return new
    x = cast(fx.Node, node.args[0])
    given = x.meta["val"].dtype
    if given in (torch.float64, torch.complex64, torch.complex128):
        raise UnroundedError(
            f"{_name(node)} adds {str(given).removeprefix('torch.')} numbers, and accumulators add numbers of float32: "
            "convert them, or give the module a rule without reductions"
        )
    if not given.is_floating_point:
        x = call(prims.convert_element_type.default, x, torch.float32)
    results = _SUMS[node.target](node, x, add, call)
    if len(results) == 1:
        node.replace_all_uses_with(like(results[0], node))
    else:
        for user in list(node.users):
            user.replace_all_uses_with(like(results[cast(int, user.args[1])], user))
    return results[0]


def _axes(node: fx.Node, x: fx.Node) -> list[int]:
    """The axes over which ``node`` adds, counted from the front: all if it names none."""
    dims = x.meta["val"].dim()
    given = cast(Sequence[int] | None, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    return sorted(axis % dims for axis in given) if given else list(range(dims))


def _keeps(node: fx.Node, position: int) -> bool:
    return bool(node.args[position] if len(node.args) > position else node.kwargs.get("keepdim", False))


def _count(x: fx.Node, axes: Sequence[int], call: Call) -> Any:
    """How many numbers are added: an int, or the node of a symbolic size."""
    count: Any = 1
    for axis in axes:
        size = x.meta["val"].shape[axis]
        own = size if isinstance(size, int) else call(aten.sym_size.int, x, axis)
        count = (
            own
            if count == 1
            else count * own
            if isinstance(own, int) and isinstance(count, int)
            else call(operator.mul, count, own)
        )
    return count


def _less(count: fx.Node, correction: int, call: Call) -> fx.Node:
    return call(torch.sym_max, call(operator.sub, count, correction), 0) if correction else count


def _sum(node: fx.Node, x: fx.Node, add: Add, call: Call) -> list[fx.Node]:
    return [add(x, _axes(node, x), _keeps(node, 2))]


def _mean(node: fx.Node, x: fx.Node, add: Add, call: Call) -> list[fx.Node]:
    axes = _axes(node, x)
    return [call(aten.div.Tensor, add(x, axes, _keeps(node, 2)), _count(x, axes, call))]


def _variance(node: fx.Node, x: fx.Node, add: Add, call: Call) -> list[fx.Node]:
    """The variance and the mean."""
    axes, keepdim = _axes(node, x), bool(node.kwargs.get("keepdim", False))
    given = cast(float | None, node.kwargs.get("correction"))
    correction = 1 if given is None else int(given)
    if given is not None and correction != given:
        raise UnroundedError(f"{_name(node)} has correction={given}: the sums of a variance need an integer")
    count = _count(x, axes, call)
    wide = x if x.meta["val"].dtype == torch.float32 else call(prims.convert_element_type.default, x, torch.float32)
    mean = call(aten.div.Tensor, add(x, axes, True), count)
    distance = call(aten.sub.Tensor, wide, mean)
    squares = add(call(aten.mul.Tensor, distance, distance), axes, keepdim)
    divisor = max(count - correction, 0) if isinstance(count, int) else _less(count, correction, call)
    variance = call(aten.div.Tensor, squares, divisor)
    return [variance, mean if keepdim or not axes else call(aten.squeeze.dims, mean, axes)]


def _only_variance(node: fx.Node, x: fx.Node, add: Add, call: Call) -> list[fx.Node]:
    return _variance(node, x, add, call)[:1]


#: The operators whose sums are known, and the nodes that compute them: the results of the operator, in float32.
_SUMS: dict[Any, Callable[[fx.Node, fx.Node, Add, Call], list[fx.Node]]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _only_variance,
    aten.var_mean.correction: _variance,
}
