"""Finding the matrix products of a graph, with the role of each operand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fpsim.compile_backend.graph.nodes import module_path
from fpsim.compile_backend.graph.products import Axes, Multiplication
from fpsim.compile_backend.graph.recognition import (
    call_of,
    ends_of_products,
    multiplication_of,
    origin_of_product,
    sum_of,
)
from fpsim.compile_backend.graph.roles import backward_roles, roles_of
from fpsim.compile_backend.graph.sources import Source, is_backward, is_constant


@dataclass(frozen=True)
class Product:
    """A matrix product in a graph.

    Attributes:
        value: the node that holds the result of the multiplication; one of several results of a joint operator.
        result: the node that holds the result of the product. It differs from `value` if the product is decomposed
            into a multiplication and a sum: then it is the sum, or the mark at the end.
        operands: the positions of its two operands among the arguments of `node`.
        contracted: for each operand the axes along which the product sums (`Multiplication.contracted`).
        roles: ``activation``, ``weight`` or ``gradient``, for each operand.
        kind: ``fprop``, ``dgrad`` or ``wgrad``.
        operator: the name of the original operator, such as ``aten.mm``.
        path: the path of its module, ``""`` for the root; None if unknown.
        constant: whether it belongs to a table that the model computes from constants alone, such as one of rotary
            angles. Such a product belongs to the definition of the model.
    """

    value: fx.Node
    result: fx.Node
    operands: tuple[int, int]
    contracted: tuple[Axes, Axes]
    roles: tuple[str, str]
    kind: str
    operator: str
    path: str | None
    constant: bool

    @property
    def has_weight(self) -> bool:
        """Whether it is a forward product with a weight, or a gradient of such a product."""
        return self.kind == "wgrad" or "weight" in self.roles

    @property
    def node(self) -> fx.Node:
        """The multiplication."""
        return call_of(self.value)


def find_products(graph: fx.Graph, sources: Mapping[fx.Node, Source], input_sources: Sequence[Source]) -> list[Product]:
    """The floating-point matrix products of ``graph``, in the order of its nodes.

    Args:
        graph: a joint or inference graph of aten operators, as Inductor's joint-graph passes see it.
        sources: the sources of its nodes (`find_sources`).
        input_sources: the kinds of the inputs of the traced function, in order.
    """
    found = [(node, multiplication) for node in graph.nodes if (multiplication := multiplication_of(node))]
    forward: dict[int | None, tuple[fx.Node, Multiplication]] = {}
    for node, multiplication in found:
        if not is_backward(node, sources):  # later products that have no derivative have the same number
            forward.setdefault(node.meta.get("seq_nr"), (node, multiplication))
    ends = ends_of_products(graph)
    return [
        _classify(node, multiplication, sources, forward.get(node.meta.get("seq_nr")), input_sources, ends.get(node))
        for node, multiplication in found
    ]


def _classify(
    node: fx.Node,
    multiplication: Multiplication,
    sources: Mapping[fx.Node, Source],
    forward: tuple[fx.Node, Multiplication] | None,
    input_sources: Sequence[Source],
    end: fx.Node | None,
) -> Product:
    """The product whose value is ``node``.

    ``forward`` is the forward product of the same autograd node, if there is one. If ``node`` is part of a decomposed
    operator, ``end`` is the mark at which that operator ends.
    """
    roles = roles_of(node, multiplication, sources)
    kind = "fprop"
    if "gradient" in roles:
        roles, differentiated = backward_roles(node, multiplication, sources, forward, input_sources)
        kind = "wgrad" if differentiated == "weight" else "dgrad"
    path = module_path(node)
    if path is None and kind == "fprop":
        path = ""  # torch records every module but the root for forward nodes
    elif path is None and forward is not None:
        path = module_path(forward[0]) or ""
    return Product(
        value=node,
        result=end or sum_of(node) or node,
        operands=multiplication.operands,
        contracted=multiplication.contracted,
        roles=roles,
        kind=kind,
        operator=origin_of_product(call_of(node)) or "",
        path=path,
        constant=is_constant(node, multiplication, sources),
    )
