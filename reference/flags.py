"""The flags of an operation beside its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fpsim.formats import FloatFormat

from . import arithmetic, elementary
from .outcomes import Exact, Result, finish, target
from .values import Number, Value

#: Every operation, and the function that finds its exact result.
_EXACT: Final[dict[Callable[..., Value], Exact]] = {
    arithmetic.convert: arithmetic.exact_convert,
    arithmetic.add: arithmetic.exact_add,
    arithmetic.sub: arithmetic.exact_sub,
    arithmetic.mul: arithmetic.exact_mul,
    arithmetic.div: arithmetic.exact_div,
    arithmetic.fma: arithmetic.exact_fma,
    arithmetic.sqrt: arithmetic.exact_sqrt,
    arithmetic.remainder: arithmetic.exact_remainder,
    elementary.exp: elementary.exact_exp,
    elementary.exp2: elementary.exact_exp2,
    elementary.log: elementary.exact_log,
    elementary.log2: elementary.exact_log2,
    elementary.sin: elementary.exact_sin,
    elementary.cos: elementary.exact_cos,
    elementary.tanh: elementary.exact_tanh,
    elementary.erf: elementary.exact_erf,
    elementary.gelu: elementary.exact_gelu,
    elementary.sigmoid: elementary.exact_sigmoid,
    elementary.rsqrt: elementary.exact_rsqrt,
    elementary.pow: elementary.exact_pow,
}


def with_flags(
    operation: Callable[..., Value],
    *operands: Number,
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    tininess: str = "after",
) -> Result:
    """``operation(*operands, format, rounding, overflow)``, with the flags it raises.

    - invalid and divide-by-zero: as the operation says. Also invalid: a NaN result in a format without NaN.
    - overflow: the result, rounded as if exponents had no upper bound, is beyond the largest finite value. Formats
      that saturate raise it all the same. So does an infinity that the format or the overflow mode replaces, a
      result below zero in an unsigned format, and a zero in a format without zero.
    - underflow: the result is tiny (see below) and inexact; an exact subnormal does not raise it (default handling).
      A format without subnormals raises it whenever it flushes a number.
    - inexact: the delivered value is not the exact one.

    Arguments:
        operation: a function of `fpsim.reference.arithmetic` or `fpsim.reference.elementary`.
        operands: as many as it takes.
        format, rounding, overflow: as there.
        tininess: when a nonzero result below the smallest normal number counts as tiny. IEEE 754 leaves it open:
            ``"after"``: rounded to the format's precision, with an unbounded exponent, it is still below;
            ``"before"``: the exact result is below.

    Raises:
        ValueError, TypeError: as ``operation``, or if that is none of the operations, or takes more or fewer operands.

    Source: IEEE 754-2019 clause 7.

    >>> from fpsim.reference import div, mul
    >>> with_flags(div, 1, 3, format="fp16")
    Result(value=Fraction(1365, 4096), flags=<Flags.INEXACT: 16>)
    >>> with_flags(mul, 300, 300, format="fp16").flags
    <Flags.OVERFLOW|INEXACT: 20>
    """
    exact = _EXACT.get(operation)
    if exact is None:
        raise ValueError(f"no operation {operation!r}: use one of {', '.join(f.__name__ for f in _EXACT)}")
    return finish(exact, operands, target(format, rounding, overflow, tininess))
