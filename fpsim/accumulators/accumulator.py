"""Accumulators as frozen values: the format of a sum, its order, and where partial sums move to float32."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch

from fpsim.accumulators.machines import MACHINES, Machine, unknown_machine
from fpsim.casts import Cast, parse_cast
from fpsim.formats import FloatFormat, format_name, parse_format, split_rounding
from fpsim.suggestions import near_names

#: The order of the additions of a product: see `parse_accumulator`.
Order: TypeAlias = str | tuple[str, int] | tuple[str, int, int]
ORDERS = ("sequential", "multiply_add", "pairwise", "chunked", "aligned")

_INTEGER = re.compile(r"int([0-9]{1,2})")
_WRAP, _SATURATE = "wrap", "sat_finite"
_FLOAT32 = FloatFormat(8, 23)
#: Sums are computed with 53 bits, of which stochastic rounding looks at those of the format and at the random ones.
_MOST_STOCHASTIC_BITS = 49


@dataclass(frozen=True)
class Accumulator:
    """How a matrix product adds up its products. `parse_accumulator` makes one, and ``str`` gives its text.

    Attributes:
        format: the format of the sum after every rounding; None for an integer.
        rounding, overflow: its modes; for an integer ``overflow`` is ``wrap`` or ``sat_finite``.
        order: one of `ORDERS`.
        length: the products of a chunk or of an aligned step, 1 for other orders.
        fraction_bits: the bits that alignment keeps.
        promote: after how many products a partial sum moves to float32; None for never.
        integer_bits: the width of an integer accumulator; None for other accumulators.
        machine: the machine whose order this is; None if the order was named.
    """

    format: FloatFormat | None
    rounding: str = "nearest_even"
    overflow: str = "ovf_inf"
    order: str = "sequential"
    length: int = 1
    fraction_bits: int = 0
    promote: int | None = None
    integer_bits: int | None = None
    machine: Machine | None = None

    @property
    def is_stochastic(self) -> bool:
        """Whether its roundings draw random numbers."""
        return split_rounding(self.rounding)[1] > 0

    def __str__(self) -> str:
        if self.machine is not None:
            name = self.machine.name + ("/fp16" if self.format == parse_format("fp16") else "")
            parts = [name]
        elif self.integer_bits is not None:
            parts = [f"int{self.integer_bits}/{self.overflow}"]
        else:
            assert self.format is not None, "an accumulator has a format or is an integer"
            parts = [f"{self.format.name}/{self.rounding}/{self.overflow}"]
            if self.order == "chunked":
                parts.append(f"chunk={self.length}")
            elif self.order == "aligned":
                parts.append(f"order=aligned:{self.length}:{self.fraction_bits}")
            elif self.order != "sequential":
                parts.append(f"order={self.order}")
        if self.promote is not None:
            parts.append(f"promote={self.promote}")
        return " ".join(parts)

    def step_length(self, first: FloatFormat, second: FloatFormat) -> int:
        """The products that are added between two roundings, for operands in these formats.

        Raises:
            ValueError: the machine multiplies other formats.
        """
        return self.length if self.machine is None else self.machine.length(first, second)

    def check_operands(self, first: FloatFormat, second: FloatFormat) -> None:
        """Check that products of these formats can be added up.

        Raises:
            ValueError: the machine multiplies other formats, the accumulator has less precision than an operand, or the
                width of an integer does not hold one product.
        """
        if self.machine is not None:
            self.machine.length(first, second)
            return
        if self.integer_bits is not None:
            if any(fmt.smallest_exponent < 0 or fmt.has_infinity for fmt in (first, second)):
                raise ValueError(
                    f"accumulator 'int{self.integer_bits}' adds products of integers, got {first.name} and "
                    f"{second.name}: use format='int8', or a floating-point accumulator"
                )
            if first.max * second.max >= 2.0 ** (self.integer_bits - 1):
                raise ValueError(
                    f"accumulator 'int{self.integer_bits}' is narrower than a single product of {first.name} and "
                    f"{second.name}, which reaches {first.max * second.max:.0f}: use 'int32'"
                )
            return
        assert self.format is not None, "an accumulator has a format or is an integer"
        for fmt in (first, second):
            if fmt != _FLOAT32 and self.format.precision < fmt.precision:
                raise ValueError(
                    f"accumulator {self.format.name!r} has {self.format.precision} significant bits, fewer than the "
                    f"operands in {fmt.name} ({fmt.precision}): it would round a single product by 1. Use an "
                    f"accumulator with {fmt.precision - 1} mantissa bits or more, such as 'fp32'"
                )


#: The argument type of an accumulator.
AccumulatorLike = str | FloatFormat | torch.dtype | Accumulator


def parse_accumulator(
    accumulator: AccumulatorLike,
    chunk: int | None = None,
    order: Order | None = None,
    promote: int | None = None,
) -> Accumulator:
    """The accumulator that these arguments describe.

    Args:
        accumulator: a format with optional modes (``"fp16"``, ``"e8m13/toward_zero"``, ``"e5m10/stochastic"``), an
            integer (``"int32"``, which wraps around, or ``"int16/sat_finite"``, which saturates in every step), or a
            machine (``"hopper_fp8"``, ``"mi300"``: `fpsim.accumulators.machines.MACHINES`). Machines of NVIDIA also
            take ``"/fp16"``: they then round every step to fp16. Text with the other arguments in it, as ``str``
            writes it, is read too.
        chunk: how many products are added exactly, together with the sum so far, before one rounding. 1 is the same
            as ``order="sequential"``.
        order: ``"sequential"``: every product is added and the sum is rounded, as fused multiply-adds do;
            ``"multiply_add"``: the product is rounded first, and then the sum; ``"pairwise"``: neighbours are added,
            then their sums; ``("chunked", n)``: the meaning of ``chunk=n``; ``("aligned", L, F)``: the steps of a
            matrix unit of L products and F bits. Default: ``sequential``.
        promote: after this many products the partial sum is added to one in float32, and the accumulator begins again
            at zero.

    Raises:
        ValueError: a name is unknown, the arguments do not go together, a number is out of range, or the format is not
            one that fits into float32. The message names the remedy.
        TypeError: an argument has another type.

    >>> str(parse_accumulator("e8m13/toward_zero", chunk=32)), str(parse_accumulator("hopper_fp8", promote=128))
    ('e8m13/toward_zero/ovf_inf chunk=32', 'hopper_fp8 promote=128')
    """
    if isinstance(accumulator, Accumulator):
        if (chunk, order, promote) != (None, None, None):
            raise ValueError(
                f"the accumulator {str(accumulator)!r} has its own order: leave out chunk, order and promote"
            )
        return accumulator
    accumulator = accumulator.name if isinstance(accumulator, FloatFormat) else format_name(accumulator)
    if not isinstance(accumulator, str):
        raise TypeError(f"an accumulator is a name such as 'fp16' or 'hopper_fp8', got {reprlib.repr(accumulator)}")
    name, *written = accumulator.split(" ")
    if written:
        if (chunk, order, promote) != (None, None, None):
            raise ValueError(f"{accumulator!r} has its own order: leave out chunk, order and promote")
        chunk, order, promote = _written(accumulator, written)
    _check_count("chunk", chunk)
    _check_count("promote", promote)
    order = tuple(order) if isinstance(order, list) else order
    _check_order(order)
    return _parse(name, chunk, order, promote)


@cache
def _parse(name: str, chunk: int | None, order: Any, promote: int | None) -> Accumulator:
    machine_name, _, result = name.partition("/")
    if machine_name in MACHINES:
        return _of_machine(MACHINES[machine_name], result, chunk, order, promote)
    integer = _INTEGER.fullmatch(machine_name)
    if integer is not None:
        return _of_integer(name, int(integer[1]), result or _WRAP, chunk, order, promote)
    cast = _cast(name)
    kind, length, fraction_bits = _order(chunk, order)
    if promote is not None and promote % length:
        raise ValueError(f"promote={promote} is no multiple of the {length} products of a step: use {length * 4}")
    fmt = cast.grid
    assert fmt is not None, "a cast to a floating-point format has a grid"
    random_bits = split_rounding(cast.rounding)[1]
    if random_bits and kind == "aligned":
        raise ValueError(f"an aligned sum is rounded without random numbers, got {name!r}: use 'toward_zero'")
    if random_bits and fmt.mantissa_bits + random_bits > _MOST_STOCHASTIC_BITS:
        most = _MOST_STOCHASTIC_BITS - fmt.mantissa_bits
        raise ValueError(f"an accumulator in {fmt.name} takes up to {most} random bits, got {name!r}: use ':{most}'")
    if kind == "aligned" and not fmt.subnormals:
        raise ValueError(f"an aligned sum has subnormal numbers, got {fmt.name}: leave out ':nosubnormals'")
    return Accumulator(fmt, cast.rounding, cast.overflow, kind, length, fraction_bits, promote)


def _of_machine(machine: Machine, result: str, chunk: int | None, order: Any, promote: int | None) -> Accumulator:
    if chunk is not None or order is not None:
        given = f"chunk={chunk}" if chunk is not None else f"order={order!r}"
        raise ValueError(f"{machine.name} has its own order: leave out {given}, or name a format as the accumulator")
    if promote is not None and promote % machine.longest:
        raise ValueError(
            f"promote={promote} is no multiple of the {machine.longest} products that {machine.name} adds in a step: "
            f"use {4 * machine.longest}"
        )
    fmt, rounding = parse_format(machine.format), machine.rounding
    if result not in ("", "fp32"):
        if result != "fp16" or not machine.has_half:
            halves = "fp16 or fp32" if machine.has_half else "fp32 only"
            raise ValueError(f"{machine.name} accumulates in {halves}, got {result!r}")
        fmt, rounding = parse_format("fp16"), "nearest_even"
    order_ = machine.order if machine.order != "late" else "aligned"
    return Accumulator(fmt, rounding, "ovf_inf", order_, promote=promote, machine=machine)


def _of_integer(name: str, bits: int, overflow: str, chunk: int | None, order: Any, promote: int | None) -> Accumulator:
    if not 2 <= bits <= 32:
        raise ValueError(f"an integer accumulator has 2 to 32 bits, got {name!r}")
    if overflow not in (_WRAP, _SATURATE):
        raise ValueError(f"unknown mode {overflow!r} of an integer accumulator: use {_WRAP} or {_SATURATE}")
    if chunk is not None or order not in (None, "sequential") or promote is not None:
        raise ValueError(f"the sums of {name!r} are exact: leave out chunk, order and promote")
    return Accumulator(None, "nearest_even", overflow, integer_bits=bits)


def _cast(name: str) -> Cast:
    """The cast of an accumulator: a signed format that fits into float32, without a scale or transform."""
    try:
        cast = parse_cast(name)
    except ValueError as error:
        message = str(error)
        if not message.startswith("unknown format"):
            raise
        first = name.partition("/")[0]
        near = near_names(first, MACHINES)
        if near:
            raise ValueError(f"unknown accumulator {first!r}{unknown_machine(first)}") from None
        raise ValueError(f"{message}{unknown_machine('')}") from None
    if cast is None:
        raise ValueError("accumulator='none' is no accumulator: leave it out")
    if cast.scale is not None:
        raise ValueError(f"an accumulator has no scale: leave {str(cast.scale)!r} out of {name!r}")
    if cast.transform is not None:
        raise ValueError(f"an accumulator has no transform: leave {str(cast.transform)!r} out of {name!r}")
    fmt = cast.format
    if not isinstance(fmt, FloatFormat):
        raise ValueError(f"the accumulator {name!r} is neither a floating-point format nor intN: use 'fp16' or 'int32'")
    if not (fmt.signed and fmt.has_negative_zero and fmt.has_nan and fmt.mantissa_bits >= 1):
        raise ValueError(f"an accumulator has a sign, -0, NaN and mantissa bits, and {fmt.name} lacks one of these")
    if not fmt.is_subset_of(_FLOAT32):
        raise ValueError(f"an accumulator fits into float32, got {fmt.name}: use 'fp32' or a narrower format")
    return cast


def _order(chunk: int | None, order: Any) -> tuple[str, int, int]:
    """The name of an order, the products of a step, and the bits that it keeps."""
    match order:
        case None if chunk is None or chunk == 1:
            return "sequential", 1, 0
        case None | "chunked" if chunk is not None:
            return "chunked", chunk, 0
        case _ if chunk is not None:
            raise ValueError(f"chunk={chunk} is an order of its own: leave out order={order!r}")
        case "sequential" | "multiply_add" | "pairwise":
            return order, 1, 0
        case ("chunked", int(length)) if length >= 1:
            return _order(length, None)
        case ("aligned", int(length), int(bits)) if (
            length >= 1 and 0 <= bits <= 40 and length.bit_length() + bits <= 50
        ):
            return "aligned", length, bits
    raise ValueError(
        f"unknown order {order!r}: use sequential, multiply_add, pairwise, ('chunked', n) with n from 1, or "
        "('aligned', L, F) with L from 1 and F from 0 to 40"
    )


def _check_order(order: Any) -> None:
    parts = order if isinstance(order, tuple) else () if order is None else (order,)
    if not all(type(part) is (int if number else str) for number, part in enumerate(parts)):
        raise TypeError(
            f"order is a name, or a name with numbers such as ('aligned', 32, 13), got {reprlib.repr(order)}"
        )


def _check_count(name: str, given: Any) -> None:
    if given is not None and (type(given) is not int or given < 1):
        error = ValueError if type(given) is int else TypeError
        raise error(f"{name} is a number of products from 1, got {given!r}: leave it out for none")


def _written(text: str, parts: list[str]) -> tuple[int | None, Order | None, int | None]:
    """The arguments that `Accumulator.__str__` wrote behind the name."""
    chunk: int | None = None
    order: Order | None = None
    promote: int | None = None
    keys = [part.partition("=")[0] for part in parts]
    for part in parts:
        key, _, value = part.partition("=")
        if keys.count(key) > 1:
            raise ValueError(f"accumulator {text!r} names {key} more than once: leave out all but one")
        words = value.split(":")
        if key == "chunk" and value.isdecimal():
            chunk = int(value)
        elif key == "promote" and value.isdecimal():
            promote = int(value)
        elif key == "order" and len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
            order = (words[0], int(words[1]), int(words[2]))
        elif key == "order" and len(words) == 1:
            order = value
        else:
            raise ValueError(f"cannot read {part!r} in accumulator {text!r}: use chunk=n, order=name or promote=n")
    return chunk, order, promote
