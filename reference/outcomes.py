"""From the exact result of an operation to what a format delivers, and the five flags of IEEE 754-2019 clause 7.

Every operation of the reference has two halves. The first finds an `Outcome`: the result with unbounded precision and
range, and whether the operation is invalid or divides by zero. The second is the same for all operations:
`rounded_value` rounds once, and `rounded_result` adds the flags that this rounding raises.

An irrational result is no fraction. Another number stands for it, from which no rounding can tell it apart: see
`fpsim.reference.irrational`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

from fpsim.formats import FloatFormat, Overflow, parse_format, resolve_overflow, split_rounding

from .decoding import largest
from .rounding import drawn, flush, round, to_precision
from .values import INFINITIES, NAN, ZEROS, Number, Value, as_value, is_negative, magnitude, scale_b

Tininess = Literal["after", "before"]
#: When a result counts as tiny (IEEE 754-2019 clause 7.5): see `Target`.
TININESS: tuple[str, ...] = get_args(Tininess)


class Flags(enum.Flag):
    """The exceptions of IEEE 754-2019 clause 7, each of which raises one flag; ``Flags.NONE`` is none of them."""

    NONE = 0
    INVALID = enum.auto()
    DIVIDE_BY_ZERO = enum.auto()
    OVERFLOW = enum.auto()
    UNDERFLOW = enum.auto()
    INEXACT = enum.auto()


@dataclass(frozen=True, slots=True)
class Result:
    """The ``value`` that an operation delivers, which is one of the format, and the ``flags`` that it raises."""

    value: Value
    flags: Flags


@dataclass(frozen=True, slots=True)
class Target:
    """The format that a result is rounded to, and the modes of that rounding.

    Attributes:
        format: the format of the result.
        rounding, overflow: as in `round`; ``overflow`` is the mode in force, never None.
        tininess: a result is tiny if its magnitude is not zero and below the smallest normal number.
            ``"after"``: when rounded to the format's precision as if exponents had no lower bound;
            ``"before"``: exactly, before any rounding.
        random: the random number, where the rounding is stochastic.
    """

    format: FloatFormat
    rounding: str
    overflow: Overflow
    tininess: Tininess = "after"
    random: int | None = None

    @property
    def boundary_bits(self) -> int:
        """The most significant bits that a rounding boundary has: a number at which the result changes or is exact.

        With precision p the boundaries are the values of the format and the middles between two: p + 1 bits. With N
        random bits, stochastic rounding also changes at multiples of 2**-N of the way between two values, or half-way
        between these (`fpsim.formats.split_rounding`): p + N + 1 bits.
        """
        return self.format.precision + split_rounding(self.rounding)[1] + 1

    @property
    def negligible(self) -> int:
        """An exponent e: all numbers of one sign other than zero and of magnitude below ``2**(e + 1)`` round alike."""
        return self.format.emin - self.boundary_bits - 1


class Outcome(NamedTuple):
    """The result of an operation before rounding, and the flags that do not come from rounding."""

    value: Value
    flags: Flags = Flags.NONE


#: The first half of an operation: from the target and exact operands to an outcome. It needs the target for the sign of
#: an exact zero, which depends on the rounding direction, and for a number that stands for an irrational result.
Exact: TypeAlias = Callable[..., Outcome]

INVALID = Outcome(NAN, Flags.INVALID)


def target(
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: int | None = None,
) -> Target:
    """The `Target` that the arguments of an operation name. `round` checks ``random``.

    Raises:
        ValueError: no such format, rounding or overflow mode, or an overflow mode that the format cannot take.
        TypeError: ``format`` is neither a name nor a `FloatFormat`.
    """
    fmt = parse_format(format)
    split_rounding(rounding)
    return Target(fmt, rounding, resolve_overflow(fmt, overflow), random=random)


def check_tininess(name: str) -> Tininess:
    """``name``, if it is one of `TININESS`.

    Raises:
        ValueError: it is not.
    """
    if name not in TININESS:
        raise ValueError(f"unknown tininess {name!r}: use one of {', '.join(TININESS)}")
    return cast(Tininess, name)


def rounded_value(exact: Exact, operands: Sequence[Number], where: Target) -> Value:
    """The value of an operation: the outcome of ``exact`` for ``operands``, rounded once."""
    return _rounded(exact(where, *map(as_value, operands)).value, where)


def rounded_result(exact: Exact, operands: Sequence[Number], where: Target) -> Result:
    """As `rounded_value`, with the flags."""
    outcome = exact(where, *map(as_value, operands))
    value = _rounded(outcome.value, where)
    return Result(value, outcome.flags | _raised_by_rounding(outcome.value, value, where))


def _rounded(exact: Value, where: Target) -> Value:
    return round(exact, where.format, where.rounding, where.overflow, random=where.random)


def _raised_by_rounding(exact: Value, delivered: Value, where: Target) -> Flags:
    """The flags of clauses 7.4 to 7.6, and those for a result that the format cannot represent.

    A saturated result raises the same flags as an unsaturated one: overflow and inexact. So do three results that do
    not occur in formats of IEEE 754: an infinity that is replaced, a number below zero in an unsigned format, and a
    zero in a format without zero. A NaN that has no code is invalid, as in a conversion to integer (clause 7.2 i).
    """
    fmt = where.format
    if exact is NAN:
        return Flags.NONE if fmt.has_nan else Flags.INVALID
    if exact in INFINITIES:
        return Flags.NONE if delivered == exact else Flags.OVERFLOW | Flags.INEXACT
    if exact in ZEROS:
        return Flags.NONE if fmt.zero else Flags.OVERFLOW | Flags.INEXACT
    negative, size = is_negative(exact), magnitude(exact)
    rounding, draw = drawn(where.rounding, where.random)
    rounded = flush(to_precision(size, fmt, rounding, negative, draw), fmt)
    if rounded > largest(fmt) or (negative and not fmt.signed and rounded != 0):
        return Flags.OVERFLOW | Flags.INEXACT
    if delivered == exact:
        return Flags.NONE  # an exact subnormal does not underflow (clause 7.5, default handling)
    if where.tininess == "after":
        size = to_precision(size, _without_lower_bound(fmt), rounding, negative, draw)
    return Flags.UNDERFLOW | Flags.INEXACT if size < scale_b(1, fmt.emin) else Flags.INEXACT


@cache
def _without_lower_bound(fmt: FloatFormat) -> FloatFormat:
    """The format without subnormals, to which `to_precision` keeps full precision for numbers of any size."""
    return replace(fmt, subnormals=False)
