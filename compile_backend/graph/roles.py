"""The roles of operands: activation, weight or gradient. They follow from the sources and the uses of a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fpsim.compile_backend.graph.products import Multiplication
from fpsim.compile_backend.graph.recognition import has_weight, is_product, is_weight, operands_of
from fpsim.compile_backend.graph.sources import Source
from fpsim.compile_backend.graph.views import base, whole


def roles_of(value: fx.Node, multiplication: Multiplication, sources: Mapping[fx.Node, Source]) -> tuple[str, str]:
    """The roles of the operands of the product whose value is ``value``.

    An operand that depends on an incoming gradient is a gradient. The operator of a linear layer or a convolution says
    which operand is the weight, unless the model has computed that from its input by other products. The other operand
    is an activation, unless it is a part of a parameter or buffer itself. In other products an operand is a weight if
    it is computed from parameters and buffers only, and by no layer: ``x @ (w + a @ b)``. If a product of parameters
    comes first, it is an activation: ``(queries @ w) @ x.mT``.
    """
    operands = operands_of(value, multiplication)
    is_layer = has_weight(value, multiplication)

    def role(number: int) -> str:
        source = sources[operands[number]]
        if source & Source.TANGENT:
            return "gradient"
        if is_weight(value, multiplication, number):
            is_computed = bool(source & Source.INPUT) and bool(source & _OF_PRODUCTS)
        elif is_layer:
            is_computed = bool(source & ~_OF_MODEL) or whole(operands[number]).op not in ("placeholder", "get_attr")
        else:
            allowed = _OF_MODEL | (Source.PRODUCT if number == 1 else Source.NONE)
            is_computed = bool(source & ~allowed) or not source & _OF_MODEL
        return "activation" if is_computed else "weight"

    return role(0), role(1)


_OF_MODEL = Source.PARAMETER | Source.BUFFER
_OF_PRODUCTS = Source.PRODUCT | Source.LAYER


def backward_roles(
    value: fx.Node,
    multiplication: Multiplication,
    sources: Mapping[fx.Node, Source],
    forward: tuple[fx.Node, Multiplication] | None,
    input_sources: Sequence[Source],
) -> tuple[tuple[str, str], str]:
    """The roles of the operands of a product of backward, and that of the operand which it is the derivative of.

    The operand that is no gradient has the role that it has in the forward product.

    Args:
        value, multiplication: the product.
        sources: the sources of the graph's nodes (`find_sources`).
        forward: the forward product of the same autograd node, if there is one.
        input_sources: the kinds of the inputs of the traced function, in order.
    """
    own = roles_of(value, multiplication, sources)
    number = 1 - own.index("gradient")
    role, other = own[number], operands_of(value, multiplication)[number]
    if role == "gradient":  # a derivative of a derivative
        return own, "activation"
    if forward is None:  # a hand-written backward
        return own, "activation" if role == "weight" else _role_by_use(value, input_sources)
    roles = roles_of(*forward, sources)
    same = [i for i, operand in enumerate(operands_of(*forward)) if base(operand) is base(other)]
    of_role = [i for i, each in enumerate(roles) if each == role]  # decides if the operand was recomputed or copied
    kept = [*same, *of_role, 0][0]
    return ("gradient", roles[kept]) if number == 1 else (roles[kept], "gradient"), roles[1 - kept]


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
