"""Rounding in Inductor's C++ code: each rounding is one function of whole vectors, or of scalars where there are none.

Inductor's own operations write each step as a call on its vector class. Compilers then see neither shifts by constants
nor comparisons that only select, and keep every constant in a register. The functions below are plain expressions of
the compilers' own vector types (g++ and clang), and one operation of Inductor's intermediate language, which also
shortens its work. They are recorded from the same algorithms as all other code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
from torch._inductor.virtualized import ops

from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS, grid_of, working_dtype
from fpsim.rounding.float_forms import round_with_floats, scale_suits, suits
from fpsim.rounding.kernel import Grid, Int, round_code
from fpsim.rounding.random_words import random_word
from fpsim.rounding.recording import Name, Text

#: Whether Inductor's C++ compiler knows the vector types: not the one of Windows.
AVAILABLE = sys.platform != "win32"

# For each width: the types of floating-point numbers, signed and unsigned integers.
_TYPES = {32: ("float", "int32_t", "uint32_t"), 64: ("double", "int64_t", "uint64_t")}

# The value of the operation's argument ``constraints`` that tells C++ functions from assembly.
_MARK = "C++ of fpsim"

_VECTORS = """
typedef {floating} F __attribute__((vector_size(sizeof(x0))));
typedef {signed} I __attribute__((vector_size(sizeof(x0))));
typedef {unsigned} U __attribute__((vector_size(sizeof(x0))));
const auto converted = [](I a) {{ return __builtin_convertvector(a, F); }};
const auto truncated = [](F a) {{ return __builtin_convertvector(a, I); }};
const auto none = [](I mask) {{
    constexpr int count = sizeof(x0) / sizeof(at::vec::Vectorized<{signed}>);
    return at::vec::VecMask<{signed}, count>(c10::bit_cast<at::vec::VectorizedN<{signed}, count>>(mask)).all_zero();
}};
"""
_SCALARS = """
using F = {floating}; using I = {signed}; using U = {unsigned};
const auto converted = [](I a) {{ return F(a); }};
const auto truncated = [](F a) {{ return I(a); }};
const auto none = [](bool mask) {{ return !mask; }};
"""


@dataclass
class CppText(Text):
    """Lines of C++. Variables are unsigned: their sums and products wrap around, and signed ones are undefined then."""

    bits: int = 32
    shifts: dict[str, tuple[Name, int]] = field(default_factory=dict)

    def assignment(self, name: str, expression: str) -> str:
        return f"const auto {name} = {expression};"

    def give(self, result: Name) -> None:
        """Return a result from the function."""
        self.lines.append(f"return c10::bit_cast<decltype(x0)>({result});")

    def constant(self, number: int) -> str:
        """The vector whose elements are ``number``."""
        return f"(U{{}} + {number % (1 << self.bits):#x}u{'ll' * (self.bits > 32)})"

    def lift(self, a: Name | int) -> str:
        return self.constant(a) if isinstance(a, int) else str(a)

    def operation(self, a: Name | int, symbol: str, b: Name | int) -> Name:
        if symbol == ">>":
            shifted = self.name(f"(U)((I){self.lift(a)} >> {b if isinstance(b, int) else f'(I){b}'})")
            if isinstance(a, Name) and isinstance(b, int):
                self.shifts[shifted.name] = a, b
            return shifted
        if symbol == "<<":
            return self.name(f"{self.lift(a)} << {b}")
        if symbol == "&" and isinstance(a, Name) and isinstance(b, int) and a.name in self.shifts:
            source, count = self.shifts[a.name]
            if b == (1 << (self.bits - count)) - 1:  # compilers do not find this unsigned shift in vectors
                return self.name(f"{source} >> {count}")
        return self.name(f"{self.lift(a)} {symbol} {self.lift(b)}")


@dataclass(frozen=True)
class CppMask:
    """A truth value: ``value``, or its negation.

    The negation is left to the operation that uses it. Under AVX2 on processors with AVX-512, g++ 12 swaps the operands
    of a blend by a negated comparison.
    """

    value: Name
    negated: bool = False

    def __and__(self, other: CppMask) -> CppMask:
        return ~(~self | ~other)

    def __or__(self, other: CppMask) -> CppMask:
        a, b, name = self.value, other.value, self.value.text.name
        if self.negated and other.negated:
            return CppMask(name(f"{a} & {b}"), negated=True)
        if self.negated:
            return CppMask(name(f"{a} & ({b} == 0)"), negated=True)
        return other | self if other.negated else CppMask(name(f"{a} | {b}"))

    def __invert__(self) -> CppMask:
        return CppMask(self.value, not self.negated)


class CppOps:
    """The executor on C++ variables, of the integer kernel and of the forms with floats."""

    def __init__(self, text: CppText) -> None:
        self.text = text

    def _chosen(self, a: Name, comparison: str, b: Name | int) -> Name:
        first, second = f"(I){a}", f"(I){self.text.lift(b)}"
        return self.text.name(f"(U)({first} {comparison} {second} ? {first} : {second})")

    def clamp(self, a: Name, low: int | None, high: int | None) -> Name:
        if low is not None:
            a = self._chosen(a, ">", low)
        return a if high is None else self._chosen(a, "<=", high)  # of `<`, g++ makes no minimum

    def larger(self, a: Name, b: Name) -> Name:
        return self._chosen(a, ">", b)

    def less(self, a: Name, bound: Name | int) -> CppMask:
        if isinstance(bound, int):  # `bound - 1` is oftener a constant that the function has anyway, such as infinity
            return CppMask(self.text.name(f"(I){a} > (I){self.text.constant(bound - 1)}"), negated=True)
        return CppMask(self.text.name(f"(I){a} < (I){self.text.lift(bound)}"))

    def choose(self, mask: CppMask, a: Name | int, b: Name | int) -> Name:
        if mask.negated:
            a, b = b, a
        return self.text.name(f"{mask.value} ? {self.text.lift(a)} : {self.text.lift(b)}")

    def code_of_integer(self, a: Name) -> Name:
        return self.text.name(f"c10::bit_cast<U>(converted((I){a}))")

    def _computed(self, a: Name, symbol: str, b: Name) -> Name:
        return self.text.name(f"c10::bit_cast<U>(c10::bit_cast<F>({a}) {symbol} c10::bit_cast<F>({b}))")

    def sum(self, a: Name, b: Name) -> Name:
        return self._computed(a, "+", b)

    def difference(self, a: Name, b: Name) -> Name:
        return self._computed(a, "-", b)

    def product(self, a: Name, b: Name) -> Name:
        return self._computed(a, "*", b)

    def truncated(self, a: Name) -> Name:
        return self.text.name(f"(U)truncated(c10::bit_cast<F>({a}))")


@lru_cache(maxsize=1024)
def rounding_function(
    fmt: FloatFormat, rounding: str, overflow: str, dtype: torch.dtype, stochastic: bool, scaled: bool, floats: bool
) -> str:
    """The body of a C++ function of a number, of its random word if ``stochastic``, and of its scale if ``scaled``.

    Args:
        fmt, rounding, overflow: the arguments of `fpsim.rounding.kernel.round_code`.
        dtype: the carrier. All arguments of the function, and its result, have the type of the working carrier.
        stochastic, scaled: whether there are words and scales.
        floats: whether the compiler keeps the order of sums.
    """
    working = working_dtype(dtype)
    carrier, grid = CARRIERS[working], grid_of(fmt, dtype, scaled)
    text = CppText(bits=carrier.bits)
    cpp_ops = CppOps(text)
    code, *others = (text.name(f"c10::bit_cast<U>(x{i})") for i in range(1 + stochastic + scaled))
    word: Int = others[0] if stochastic else 0
    scale = others[-1] if scaled else None
    if working != dtype:
        # Inductor keeps 16-bit intermediates in float32, unrounded: round them to their own dtype first.
        code = round_code(code, Grid(CARRIERS[dtype], carrier), "nearest_even", "ovf_inf", cpp_ops)
    if floats and suits(grid, rounding):
        if scale is not None:
            unsuitable = ~scale_suits(scale, grid, rounding, cpp_ops)
            text.lines.append(f"if (none({unsuitable.value}{' == 0' if unsuitable.negated else ''})) {{")
        text.give(round_with_floats(code, grid, rounding, overflow, cpp_ops, word, scale))
        if scale is None:
            return "\n".join(text.lines)
        text.lines.append("}")
    text.give(round_code(code, grid, rounding, overflow, cpp_ops, word, scale))
    return "\n".join(text.lines)


@lru_cache(maxsize=1)
def word_function() -> str:
    """The body of a C++ function with the arguments and the result of `fpsim.rounding.random_words.random_word`."""
    text = CppText()
    text.give(random_word(*(text.name(f"c10::bit_cast<U>(x{i})") for i in range(2))))
    return "\n".join(text.lines)


def inline(function: str, dtype: torch.dtype, *values: Any) -> Any:
    """The result of a C++ function in Inductor's intermediate language. ``dtype`` is that of the result.

    Args:
        function: from `rounding_function` or `word_function`.
        dtype: of the result and of all values, or their width at least.
        values: the arguments.
    """
    return ops.inline_asm_elementwise(*values, asm=function, constraints=_MARK, dtype=dtype)


@lru_cache(maxsize=1)
def inline_functions_in_cpp() -> None:
    """Let Inductor's C++ code generator write `inline`: it has this operation for Triton only."""
    for kind, prelude in ((CppOverrides, _SCALARS), (CppVecOverrides, _VECTORS)):
        kind.inline_asm_elementwise = staticmethod(_writer(prelude))  # type: ignore[method-assign]


def _writer(prelude: str) -> Callable[..., str]:
    def inline_asm_elementwise(
        *values: Any, asm: str, constraints: str | None = None, dtype: torch.dtype = torch.float32, **others: Any
    ) -> str:
        if constraints != _MARK:
            raise NotImplementedError("inline_asm_elementwise is only implemented for Triton")
        floating, signed, unsigned = _TYPES[8 * dtype.itemsize]
        parameters = ", ".join(f"decltype({value}) x{i}" for i, value in enumerate(values))
        body = prelude.format(floating=floating, signed=signed, unsigned=unsigned) + asm
        return f"[]({parameters}) {{{body}\n}}({', '.join(map(str, values))})"

    return inline_asm_elementwise
