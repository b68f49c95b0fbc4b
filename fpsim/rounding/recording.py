"""Names of variables in place of numbers: `fpsim.rounding.kernel` computes with them, and the operations are recorded.

The record is the body of a function in another language, Triton or C++.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Text:
    """The lines of a function. Each line assigns one result to a variable."""

    lines: list[str] = field(default_factory=list)

    def name(self, expression: str) -> Name:
        """A new variable with the value of ``expression``."""
        name = f"v{len(self.lines)}"
        self.lines.append(self.assignment(name, expression))
        return Name(name, self)

    def assignment(self, name: str, expression: str) -> str:
        """The line that assigns ``expression`` to ``name``."""
        return f"{name} = {expression}"

    def operation(self, a: Name | int, symbol: str, b: Name | int) -> Name:
        """The result of a binary operator."""
        return self.name(f"{a} {symbol} {b}")


@dataclass(frozen=True)
class Name:
    """A variable of a function, with the operators that `fpsim.rounding.kernel` uses. Masks are variables too."""

    name: str
    text: Text

    def __str__(self) -> str:
        return self.name

    def __add__(self, other: Name | int) -> Name:
        return self.text.operation(self, "+", other)

    __radd__ = __add__

    def __sub__(self, other: Name | int) -> Name:
        return self.text.operation(self, "-", other)

    def __rsub__(self, other: int) -> Name:
        return self.text.operation(other, "-", self)

    def __mul__(self, other: Name | int) -> Name:
        return self.text.operation(self, "*", other)

    def __and__(self, other: Name | int) -> Name:
        return self.text.operation(self, "&", other)

    def __or__(self, other: Name | int) -> Name:
        return self.text.operation(self, "|", other)

    def __xor__(self, other: Name | int) -> Name:
        return self.text.operation(self, "^", other)

    def __lshift__(self, other: Name | int) -> Name:
        return self.text.operation(self, "<<", other)

    def __rlshift__(self, other: int) -> Name:
        return self.text.operation(other, "<<", self)

    def __rshift__(self, other: Name | int) -> Name:
        return self.text.operation(self, ">>", other)

    def __invert__(self) -> Name:
        return self.text.name(f"~{self}")

    def __neg__(self) -> Name:
        return self.text.operation(0, "-", self)
