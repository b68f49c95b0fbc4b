"""The names of the rounding and overflow modes, and their meaning for a format."""

from __future__ import annotations

import re
import reprlib
from typing import Literal, get_args

from fpsim.formats.float import FloatFormat

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd"]
Overflow = Literal["ovf_inf", "sat_finite", "sat_propagate"]

#: Rounding directions, as defined by IEEE 754-2019 section 4.3 and IEEE P3109; ``to_odd`` is Boldo and
#: Melquiond's rounding to odd: an inexact result goes to the neighbour whose code is odd.
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
#: Stochastic roundings, each with the largest number of random bits that it takes: see `split_rounding`.
STOCHASTIC_ROUNDINGS: dict[str, int] = {"stochastic": 32, "stochastic_b": 31, "stochastic_c": 30}
#: The number of random bits if a name states none: as many as the mantissa of a float32 has.
USUAL_RANDOM_BITS = 23
#: Overflow modes, for results beyond the largest finite value (IEEE P3109's names): see `resolve_overflow`.
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


def check_rounding(rounding: str) -> Rounding:
    """Return ``rounding`` if it is one of the deterministic `ROUNDINGS`.

    Raises:
        ValueError: it is not one of them.
    """
    if not isinstance(rounding, str) or rounding not in ROUNDINGS:
        hint = ""
        if isinstance(rounding, str) and rounding.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            hint = " (stochastic rounding depends on a random number, which is not taken here)"
        raise ValueError(f"unknown rounding {reprlib.repr(rounding)}: use one of {', '.join(ROUNDINGS)}{hint}")
    return rounding  # type: ignore[return-value]


def split_rounding(rounding: str) -> tuple[str, int]:
    """The name of any rounding, and its number of random bits (0 for a deterministic rounding).

    Stochastic rounding takes N random bits as an integer R, 0 <= R < 2**N. An inexact x lies between two neighbours, at
    the fraction d (0 < d < 1) of the way from the neighbour toward zero to the neighbour away from zero. The result is
    the neighbour away from zero if

    - ``stochastic``: floor(d * 2**N) + R >= 2**N, with probability floor(d * 2**N) / 2**N;
    - ``stochastic_b``: d * 2**N + R + 1/2 >= 2**N, with probability floor(d * 2**N + 1/2) / 2**N;
    - ``stochastic_c``: D + R >= 2**N, where D is d * 2**N rounded to an integer, ties to even.

    These are StochasticA, B and C of IEEE P3109 (draft); gfloat calls them StochasticFastest, StochasticFast and
    Stochastic. The number of random bits may follow the name, as in ``stochastic:8``. It is at least 1, and at most
    32, 31 and 30 respectively. If the name states none, it is 23, as many bits as the mantissa of a float32 has.

    Raises:
        ValueError: the rounding is unknown, or it does not take this number of random bits.

    >>> split_rounding("stochastic:8"), split_rounding("up")
    (('stochastic', 8), ('up', 0))
    """
    name, colon, bits = rounding.partition(":") if isinstance(rounding, str) else ("", "", "")
    if name not in STOCHASTIC_ROUNDINGS:
        if name not in ROUNDINGS or colon:
            known = ", ".join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])
            raise ValueError(
                f"unknown rounding {reprlib.repr(rounding)}: use one of {known} (the last three also with :BITS)"
            )
        return rounding, 0
    if not colon:
        return name, USUAL_RANDOM_BITS
    if not re.fullmatch(r"[0-9]{1,2}", bits) or not 1 <= int(bits) <= STOCHASTIC_ROUNDINGS[name]:
        raise ValueError(f"rounding {rounding!r}: random bits are 1 to {STOCHASTIC_ROUNDINGS[name]}, got {bits!r}")
    return name, int(bits)


def full_rounding(rounding: str) -> str:
    """The full name of any rounding: a stochastic rounding with its number of random bits, others unchanged.

    Raises:
        ValueError: in the same cases as `split_rounding`.
    """
    name, bits = split_rounding(rounding)
    return f"{name}:{bits}" if bits else name


def resolve_overflow(fmt: FloatFormat, overflow: str | None) -> Overflow:
    """The overflow mode that applies to ``fmt``: ``overflow``, or the format's usual mode if ``overflow`` is None.

    A result overflows if its magnitude, rounded to the format's precision as if the exponent had no upper bound, is
    above the largest finite value. The modes then give (the names are those of IEEE P3109):

    - ``ovf_inf``: the result that the rounding direction requires (IEEE 754-2019 section 7.4). The nearest and the
      stochastic modes give infinity. ``toward_zero`` and ``to_odd`` give the largest finite value. ``up`` and ``down``
      give one or the other, depending on the sign. If the format has no infinity, NaN takes its place.
    - ``sat_finite``: the largest finite value, also for infinities.
    - ``sat_propagate``: the largest finite value for finite inputs. Infinities stay infinities (NaN if the format has
      none).

    None means ``ovf_inf`` for formats with infinities, else ``sat_finite``. In an unsigned format a result below zero
    overflows too. It becomes NaN under ``ovf_inf``, and the smallest value under the other modes, except that -inf
    becomes NaN under ``sat_propagate``. If the format has no NaN, the smallest value takes its place. In a format
    without zero the same holds for an input of zero.

    Raises:
        ValueError: the mode is unknown, or it needs an infinity or a NaN and ``fmt`` has neither.
    """
    if overflow is None:
        return "ovf_inf" if fmt.has_infinity else "sat_finite"
    if not isinstance(overflow, str) or overflow not in OVERFLOWS:
        raise ValueError(f"unknown overflow mode {reprlib.repr(overflow)}: use one of {', '.join(OVERFLOWS)}, or None")
    if overflow != "sat_finite" and not (fmt.has_infinity or fmt.has_nan):
        raise ValueError(
            f"overflow={overflow!r} needs an infinity or a NaN and {fmt.name} has neither: use overflow='sat_finite'"
        )
    return overflow  # type: ignore[return-value]
