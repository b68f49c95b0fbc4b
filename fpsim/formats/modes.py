"""The words for rounding and overflow, and their meaning for a format."""

from __future__ import annotations

import re
from typing import Literal, get_args

from fpsim.formats.float import FloatFormat

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd"]
Overflow = Literal["ovf_inf", "sat_finite", "sat_propagate"]

#: Rounding directions, in the senses of IEEE 754-2019 section 4.3 and IEEE P3109; ``to_odd`` is Boldo and
#: Melquiond's rounding to odd: an inexact result goes to the neighbour whose code is odd.
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
#: Stochastic roundings, and the most random bits that each takes: see `split_rounding`.
STOCHASTIC_ROUNDINGS: dict[str, int] = {"stochastic": 32, "stochastic_b": 31, "stochastic_c": 30}
#: Random bits where none are named: as many as a float32 can drop.
USUAL_RANDOM_BITS = 23
#: What happens to results beyond the largest finite value (IEEE P3109's names): see `resolve_overflow`.
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


def check_rounding(rounding: str) -> Rounding:
    """``rounding`` itself if it is one of `ROUNDINGS`, the deterministic ones.

    Raises:
        ValueError: it is not.
    """
    if rounding not in ROUNDINGS:
        hint = ""
        if str(rounding).partition(":")[0] in STOCHASTIC_ROUNDINGS:
            hint = " (stochastic rounding depends on a random number, which is not taken here)"
        raise ValueError(f"unknown rounding {rounding!r}: use one of {', '.join(ROUNDINGS)}{hint}")
    return rounding  # type: ignore[return-value]


def split_rounding(rounding: str) -> tuple[str, int]:
    """The name of any rounding, and its number of random bits: 0 for the deterministic ones.

    Stochastic rounding of an inexact x, at the fraction d (0 < d < 1) of the way from its neighbour toward zero to the
    one away from zero, with N random bits R (an integer, 0 <= R < 2**N), goes away from zero where

    - ``stochastic``: floor(d * 2**N) + R >= 2**N, with probability floor(d * 2**N) / 2**N;
    - ``stochastic_b``: d * 2**N + R + 1/2 >= 2**N, with probability floor(d * 2**N + 1/2) / 2**N;
    - ``stochastic_c``: D + R >= 2**N, D being d * 2**N rounded to an integer, ties to even.

    These are StochasticA, B and C of IEEE P3109 (draft); gfloat calls them StochasticFastest, StochasticFast and
    Stochastic. Their names may be followed by the number of random bits, ``stochastic:8``: 1 to 32, 31 and 30.
    Without it there are 23, as many as a float32 can drop.

    Raises:
        ValueError: an unknown rounding, or a number of random bits that it does not take.

    >>> split_rounding("stochastic:8"), split_rounding("up")
    (('stochastic', 8), ('up', 0))
    """
    name, colon, bits = str(rounding).partition(":")
    if name not in STOCHASTIC_ROUNDINGS:
        if rounding not in ROUNDINGS:
            known = ", ".join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])
            raise ValueError(f"unknown rounding {rounding!r}: use one of {known} (the last three also with :BITS)")
        return rounding, 0
    if not colon:
        return name, USUAL_RANDOM_BITS
    if not re.fullmatch(r"[0-9]+", bits) or not 1 <= int(bits) <= STOCHASTIC_ROUNDINGS[name]:
        raise ValueError(f"rounding {rounding!r}: random bits are 1 to {STOCHASTIC_ROUNDINGS[name]}, got {bits!r}")
    return name, int(bits)


def full_rounding(rounding: str) -> str:
    """Any rounding spelled out: ``stochastic`` with its number of random bits, the deterministic ones as they are.

    Raises:
        ValueError: as `split_rounding`.
    """
    name, bits = split_rounding(rounding)
    return f"{name}:{bits}" if bits else name


def resolve_overflow(fmt: FloatFormat, overflow: str | None) -> Overflow:
    """The overflow mode in force for ``fmt``: ``overflow``, or where it is None the format's usual one.

    A result overflows when, rounded to the format's precision as if the exponent had no upper bound, it is
    beyond the largest finite value. Then, in the names of IEEE P3109:

    - ``ovf_inf``: as the rounding direction says (IEEE 754-2019 section 7.4): the nearest and the stochastic modes
      give infinity,
      ``toward_zero`` and ``to_odd`` the largest finite value, ``up`` and ``down`` one or the other by sign.
      Where the format has no infinity, NaN stands for it.
    - ``sat_finite``: the largest finite value, for infinities too.
    - ``sat_propagate``: the largest finite value for finite inputs; infinities stay (NaN where there are none).

    None means ``ovf_inf`` for formats with infinities, else ``sat_finite``. In an unsigned format a result
    below zero is an overflow as well: NaN under ``ovf_inf``, else the smallest value (but -inf under
    ``sat_propagate`` is NaN); in a format without zero the same holds for an input of zero.

    Raises:
        ValueError: an unknown mode, or one that needs an infinity or a NaN where ``fmt`` has neither.
    """
    if overflow is None:
        return "ovf_inf" if fmt.has_infinity else "sat_finite"
    if overflow not in OVERFLOWS:
        raise ValueError(f"unknown overflow mode {overflow!r}: use one of {', '.join(OVERFLOWS)}, or None")
    if overflow != "sat_finite" and not (fmt.has_infinity or fmt.has_nan):
        raise ValueError(
            f"overflow={overflow!r} needs an infinity or a NaN and {fmt.name} has neither: use overflow='sat_finite'"
        )
    return overflow  # type: ignore[return-value]
