"""From the exact result of an operation to the public function that rounds it.

An operation is written once, as its mathematics: from exact operands to an `Outcome`. `rounded` makes the public
function of it, which takes the operands, then the format and the modes, and rounds the outcome once. The mathematics
stays in reach as ``exact``, for other operations, for sums and for `with_flags`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

from fpsim.formats import FloatFormat

from .outcomes import Exact, Outcome, Target, rounded_value, target
from .values import Number, Value


class Unary(Protocol):
    """A public function of one operand."""

    exact: Exact

    def __call__(
        self,
        a: Number,
        format: str | FloatFormat,
        rounding: str = "nearest_even",
        overflow: str | None = None,
        *,
        random: int | None = None,
    ) -> Value: ...


class Binary(Protocol):
    """A public function of two operands."""

    exact: Exact

    def __call__(
        self,
        a: Number,
        b: Number,
        format: str | FloatFormat,
        rounding: str = "nearest_even",
        overflow: str | None = None,
        *,
        random: int | None = None,
    ) -> Value: ...


class Ternary(Protocol):
    """A public function of three operands."""

    exact: Exact

    def __call__(
        self,
        a: Number,
        b: Number,
        c: Number,
        format: str | FloatFormat,
        rounding: str = "nearest_even",
        overflow: str | None = None,
        *,
        random: int | None = None,
    ) -> Value: ...


@overload
def rounded(exact: Callable[[Target, Value], Outcome]) -> Unary: ...
@overload
def rounded(exact: Callable[[Target, Value, Value], Outcome]) -> Binary: ...
@overload
def rounded(exact: Callable[[Target, Value, Value, Value], Outcome]) -> Ternary: ...


def rounded(exact: Exact) -> Any:
    """The public function that rounds the outcome of ``exact`` once.

    It has the name and the docstring of ``exact``, and the signature of `Unary`, `Binary` or `Ternary`.
    """

    def deliver(operands: Sequence[Number], *modes: Any, **named: Any) -> Value:
        return rounded_value(exact, operands, target(*modes, **named))

    operation: Any
    shape, operation = {
        1: (Unary, lambda a, *modes, **named: deliver((a,), *modes, **named)),
        2: (Binary, lambda a, b, *modes, **named: deliver((a, b), *modes, **named)),
        3: (Ternary, lambda a, b, c, *modes, **named: deliver((a, b, c), *modes, **named)),
    }[len(inspect.signature(exact).parameters) - 1]  # the target is no operand
    functools.update_wrapper(operation, exact)
    signature = inspect.signature(shape.__call__)
    operation.exact = exact
    operation.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
    operation.__annotations__ = inspect.get_annotations(shape.__call__, eval_str=True)
    return operation
