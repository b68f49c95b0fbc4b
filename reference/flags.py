"""The flags of an operation, or of all steps of a sum, beside the value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

from fpsim.formats import FloatFormat

from . import arithmetic, elementary, sums
from .outcomes import Exact, Result, check_tininess, rounded_result, target
from .values import Number, Value

#: Every operation of one rounding, and the function that finds its exact outcome.
_EXACT: Final[dict[Callable[..., Value], Exact]] = {
    function: function.exact
    for module in (arithmetic, elementary)
    for function in vars(module).values()
    if hasattr(function, "exact")
}
#: Every operation of many roundings, and the function that gives its flags too.
_SUMS: Final[dict[Callable[..., Value], Callable[..., Result]]] = {
    sums.sum: sums.sum_with_flags,
    sums.dot: sums.dot_with_flags,
}


def with_flags(
    operation: Callable[..., Value],
    *operands: Number | Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    tininess: str = "after",
    random: int | sums.RandomNumbers | None = None,
    **options: Any,
) -> Result:
    """``operation(*operands, format, rounding, overflow, random=random, **options)``, with the flags it raises.

    - invalid and divide-by-zero: as the operation says. Also invalid: a NaN result in a format without NaN.
    - overflow: the result, rounded as if exponents had no upper bound, is beyond the largest finite value. Formats
      that saturate raise it too. So do an infinity that the format or the overflow mode replaces, a
      result below zero in an unsigned format, and a zero in a format without zero.
    - underflow: the result is tiny (see below) and inexact; an exact subnormal does not raise it (default handling).
      A format without subnormals raises it whenever it flushes a number.
    - inexact: the delivered value is not the exact one.

    `sum` and `dot` raise the flags of all their roundings together, since flags stay raised until they are lowered
    (clause 7.1). Each rounding raises flags for its own format. The exact products of `dot` raise flags too: zero times
    infinity is invalid. So the value may be exact although inexact is raised, or finite after an overflow. A sum
    without an accumulator raises the flags of its only rounding. Infinities of opposite sign in one exact sum are
    invalid, unless one of the terms is NaN.

    Arguments:
        operation: a function of `fpsim.reference.arithmetic` or `fpsim.reference.elementary`, or `sum` or `dot`.
        operands: as many as it takes.
        format, rounding, overflow, random: as there.
        tininess: when a nonzero result below the smallest normal number counts as tiny. IEEE 754 leaves it open:
            ``"after"``: rounded to the format's precision, with an unbounded exponent, it is still below;
            ``"before"``: the exact result is below.
            In stochastic rounding, the roundings with bounded and unbounded exponent use the same random number.
        options: the other arguments of `sum` and `dot`: ``accumulator``, ``order``, ``product`` and ``operands``.

    Raises:
        ValueError, TypeError: as ``operation``, or if that is none of the operations, or takes more or fewer operands
            or other options.

    Source: IEEE 754-2019 clause 7.

    >>> from fpsim.reference import div, mul
    >>> with_flags(div, 1, 3, format="fp16")
    Result(value=Fraction(1365, 4096), flags=<Flags.INEXACT: 16>)
    >>> with_flags(mul, 300, 300, format="fp16").flags
    <Flags.OVERFLOW|INEXACT: 20>
    >>> with_flags(sums.sum, [65504, 65504, -65504], format="fp32", accumulator="fp16", overflow="sat_finite")
    Result(value=Fraction(0, 1), flags=<Flags.OVERFLOW|INEXACT: 20>)
    """
    if operation in _SUMS:
        modes = sums.Modes(rounding, overflow, random, tininess)  # type: ignore[arg-type]  # `sum` checks random
        return _SUMS[operation](*operands, format=format, modes=modes, **options)
    exact = _EXACT.get(operation)
    if exact is None:
        names = ", ".join(f.__name__ for f in (*_EXACT, *_SUMS))
        raise ValueError(f"no operation {operation!r}: use one of {names}")
    if options:
        raise TypeError(f"{operation.__name__} has no option {', '.join(options)}: only sum and dot have some")
    where = target(format, rounding, overflow, random=random)  # type: ignore[arg-type]  # `round` checks random
    where = replace(where, tininess=check_tininess(tininess))
    return rounded_result(exact, operands, where)  # type: ignore[arg-type]  # and as_value checks the operands
