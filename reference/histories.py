"""Delayed scaling: the factors that the magnitudes of earlier steps give, as in Transformer Engine and MS-AMP.

The two procedures follow the arrays of their sources slot by slot. Source: ``delayed_scaling.cu`` of Transformer
Engine; ``common/tensor/meta.py`` and ``optim/optimizer.py`` of MS-AMP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from .rounding import round
from .values import INFINITY, NAN, Number, Value, as_value

_SMALLEST_NORMAL = Fraction(1, 2**126)
_LARGEST_FACTOR = Fraction(2**126)


def delayed_scales(
    amaxes: Sequence[Number], largest: int | Fraction, length: int, order: str = "max", rule: str = "fp32"
) -> list[Fraction]:
    """The factor that multiplies the tensor in each step, before it is rounded.

    Args:
        amaxes: the largest magnitude of the tensor in each step: a number that is not negative, an infinity or NaN.
            Numbers below 2^-126 count as 0.
        largest: the largest finite value of the element format.
        length: the number of steps in the history.
        order: ``max`` or ``most_recent`` of Transformer Engine, or ``ms_amp``.
        rule: ``fp32``, the quotient of ``largest`` and the magnitude in float32, at most 2^126; or ``power_of_two``,
            the largest power of two that is not above the exact quotient, from 2^-126 to 2^126.

    Raises:
        ValueError: the order or the rule is unknown, or the length is below 1.

    >>> [int(s) for s in delayed_scales([1, 7, 1, 1, 1], 448, 2)]
    [1, 448, 64, 64, 448]
    """
    if order not in ("max", "most_recent", "ms_amp"):
        raise ValueError(f"unknown order {order!r}: use max, most_recent or ms_amp")
    if rule not in ("fp32", "power_of_two"):
        raise ValueError(f"unknown rule {rule!r}: use fp32 or power_of_two")
    if length < 1:
        raise ValueError(f"a history has at least one step, got length {length}")
    values = [_flushed(as_value(amax)) for amax in amaxes]
    steps = _ms_amp if order == "ms_amp" else _transformer_engine
    return list(steps(values, Fraction(largest), length, order, rule))


def _transformer_engine(
    amaxes: list[Value], largest: Fraction, length: int, order: str, rule: str
) -> Iterator[Fraction]:
    history: list[Value] = [Fraction(0)] * length  # slot 0 is of the step under way; the oldest follows it
    factor = Fraction(1)
    for amax in amaxes:
        yield factor
        history[0] = amax
        if amax == 0:
            continue
        rolled = history[1:] + history[:1]
        deciding: Value = amax
        if order == "max":
            deciding = Fraction(0)
            for each in rolled:  # fmaxf returns the other argument if one is NaN
                if each is INFINITY or (each is not NAN and deciding is not INFINITY and each > deciding):  # type: ignore[operator]
                    deciding = each
        history = [Fraction(0), *rolled[1:]]
        if isinstance(deciding, Fraction) and deciding > 0:
            factor = _factor(deciding, largest, rule)


def _ms_amp(amaxes: list[Value], largest: Fraction, length: int, order: str, rule: str) -> Iterator[Fraction]:
    window: list[Value] = [Fraction(0)] * length  # slot 0 is of the step under way; the youngest follows it
    factor, counter = Fraction(1), 0
    for amax in amaxes:
        usable = isinstance(amax, Fraction) and amax > 0
        if counter < length:
            yield _factor(amax, largest, rule) if usable else factor  # type: ignore[arg-type]
        else:
            yield factor
        window[0] = amax
        counter += 1
        if not isinstance(amax, Fraction):
            counter = 0
        elif all(isinstance(each, Fraction) for each in window) and max(window) > 0:  # type: ignore[type-var, operator]
            factor = _factor(max(window), largest, rule)  # type: ignore[type-var, arg-type]
        window = [Fraction(0), *window[:-1]]


def _factor(amax: Fraction, largest: Fraction, rule: str) -> Fraction:
    quotient = largest / amax
    if rule == "fp32":
        rounded = round(quotient, "fp32", overflow="sat_finite")
        assert isinstance(rounded, Fraction), "a quotient of positive numbers that saturates is a number"
        return min(rounded, _LARGEST_FACTOR)
    exponent = quotient.numerator.bit_length() - quotient.denominator.bit_length()
    if Fraction(2) ** exponent > quotient:
        exponent -= 1
    return Fraction(2) ** max(-126, min(126, exponent))


def _flushed(amax: Value) -> Value:
    return Fraction(0) if isinstance(amax, Fraction) and amax < _SMALLEST_NORMAL else amax
