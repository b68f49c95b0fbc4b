"""The roles of operands: activation, weight or gradient. They follow from the sources and the uses of a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fpsim.compile_backend.graph.products import Multiplication
from fpsim.compile_backend.graph.recognition import is_product, operands_of
from fpsim.compile_backend.graph.sources import Source
from fpsim.compile_backend.graph.views import base


def role_of(source: Source) -> str:
    """The role of a value with the sources ``source``."""
    if source & Source.TANGENT:
        return "gradient"
    if source & (Source.PARAMETER | Source.BUFFER) and not source & (Source.INPUT | Source.INTEGER_INPUT):
        return "weight"
    return "activation"


def differentiated_role(
    other: fx.Node,
    node: fx.Node,
    sources: Mapping[fx.Node, Source],
    forward: tuple[fx.Node, Multiplication] | None,
    input_sources: Sequence[Source],
) -> str:
    """The role of the forward operand with respect to which the backward product ``node`` differentiates.

    Args:
        other: the operand of ``node`` that is no gradient.
        node: the value of the product.
        sources: the sources of the graph's nodes (`find_sources`).
        forward: the forward product of the same autograd node, if there is one.
        input_sources: the kinds of the inputs of the traced function, in order.
    """
    if forward is None:  # a hand-written backward
        return "activation" if role_of(sources[other]) == "weight" else _role_by_use(node, input_sources)
    operands = operands_of(*forward)
    bases = [base(value) for value in operands]
    kept = bases.index(base(other)) if base(other) in bases else None
    if kept is None:  # it was recomputed or copied: the roles decide
        roles = [role_of(sources[value]) for value in operands]
        other_role = role_of(sources[other])
        kept = roles.index(other_role) if other_role in roles else 0
    return role_of(sources[operands[1 - kept]])


def _role_by_use(node: fx.Node, input_sources: Sequence[Source]) -> str:
    """``weight`` if ``node`` reaches an output that is the gradient of a parameter, else ``activation``."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user.op == "output":
                if any(_is_parameter_gradient(user, i, input_sources) for i in _output_positions(user, current)):
                    return "weight"
            elif user not in seen and not is_product(user):
                seen.add(user)
                waiting.append(user)
    return "activation"


def _output_positions(output: fx.Node, value: fx.Node) -> list[int]:
    return [i for i, result in enumerate(output.args[0]) if result is value]  # type: ignore[arg-type]


def _is_parameter_gradient(output: fx.Node, position: int, input_sources: Sequence[Source]) -> bool:
    description: Any = output.meta["desc"][position]
    index = getattr(getattr(description, "grad_of", None), "idx", None)
    return index is not None and bool(input_sources[index] & Source.PARAMETER)
