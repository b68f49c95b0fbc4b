"""Rounding the results of operations that are no products, at the marks where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fpsim.compile_backend.graph import convolution
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.operation_ends import find_marks, replace_mark
from fpsim.compile_backend.graph.sources import VARIABLE, Source, forward_by_number, is_backward
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.places import path_of_operation, policy_at, site_of_operation
from fpsim.compile_backend.plan import Site
from fpsim.policy import Policy
from fpsim.policy.policy import DIRECTIONS


def round_operations(
    graph: fx.Graph,
    policy: Policy,
    sources: Mapping[fx.Node, Source],
    products: Sequence[Product],
    inserter: Inserter,
    strict: bool,
    bias_gradients: Sequence[fx.Node] = (),
) -> list[Site]:
    """Replace the marks at the ends of operations by roundings, or by nothing where the policy has no cast.

    The marks at the ends of matrix products stay. The gradient of a convolution's bias counts as an operation: it is a
    sum, as in a linear layer. ``bias_gradients`` are those that are sums already.
    """
    sites = []
    rounded = {direction for direction in DIRECTIONS if policy.rounds_elementwise(direction)}
    forward = forward_by_number(graph, sources) if rounded else {}
    sums = (*convolution.find_bias_gradients(graph), *bias_gradients)
    for node in sums if "backward" in rounded else ():
        own = node if node in bias_gradients else convolution.backward_of(node)
        path = path_of_operation(own, sources, forward)
        local = policy_at(path, f"gradient of a bias {node.name}", policy, strict)
        cast = None if local is None else local.elementwise_cast("backward")
        if cast is not None:
            sites.append(site_of_operation(path, "aten.sum", "backward", node, cast))
            inserter.round_result(node, sites[-1])
    of_products = {node for product in products for node in (product.value, product.result)}
    for node in find_marks(graph):
        value, operator = node.args
        assert isinstance(value, fx.Node)
        if node in of_products:
            continue
        cast = None
        direction = "backward" if is_backward(node, sources) else "forward"
        if direction in rounded and sources[node] & VARIABLE and value not in of_products:
            path = path_of_operation(node, sources, forward)
            local = policy_at(path, f"{direction} operation {node.name} ({operator})", policy, strict)
            cast = None if local is None else local.elementwise_cast(direction)
        if cast is not None:
            sites.append(site_of_operation(path, str(operator), direction, value, cast))
            value = inserter.rounded_result(value, node, sites[-1])
        replace_mark(node, value)
    return sites
