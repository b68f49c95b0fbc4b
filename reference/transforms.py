"""Transforms of numbers before they are rounded: rotations by Hadamard matrices, factors of channels, powers of groups.

Each step that rounds is written as an operation into a format. Powers and logarithms are enclosed to 2**-256 and count
as exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from fpsim.formats import FloatFormat, parse_format

from . import enclosures
from .arithmetic import add, mul, sub
from .decoding import largest
from .elementary import rsqrt
from .elements import Element, largest_magnitude, parse_element, round_element
from .rounding import round
from .sums import RandomNumbers
from .values import (
    INFINITIES,
    NAN,
    Number,
    Value,
    as_value,
    floor_log2,
    is_negative,
    magnitude,
    negate,
    rational,
    scale_b,
    with_sign,
)

#: The signs of Transformer Engine's recipe for NVFP4.
TE_SIGNS: Final = "+++-+------+-+--"
#: The bits of enclosures of powers and logarithms.
PRECISION: Final = 256
#: Below this, the smallest normal float32, a power map takes a number for zero.
SMALLEST_NORMAL: Final = scale_b(1, -126)


# -- rotations --------------------------------------------------------------------------------------------------------


def hadamard_signs(signs: str, size: int) -> tuple[int, ...]:
    """The factors of the elements of a block before a rotation: 1 and -1.

    Arguments:
        signs: ``""`` for ones, ``te`` for `TE_SIGNS`, ``seed=N`` for the top bits of the outputs of SplitMix64 (1 is
            negative), or one + or - for each element.
        size: the elements of the block.

    >>> hadamard_signs("seed=1234567", 5)
    (1, 1, -1, 1, -1)
    """
    if signs.startswith("seed="):
        return tuple(-1 if output >= 1 << 63 else 1 for output in split_mix_64(int(signs[5:]), size))
    text = TE_SIGNS if signs == "te" else signs or "+" * size
    if len(text) != size:
        raise ValueError(f"{len(text)} signs do not go with blocks of {size}")
    return tuple(-1 if sign == "-" else 1 for sign in text)


def split_mix_64(seed: int, count: int) -> list[int]:
    """The first outputs of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 17), as ints of 64 bits.

    >>> split_mix_64(1234567, 2)
    [6457827717110365317, 3203168211198807973]
    """
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ seed // 2**30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z // 2**27) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ z // 2**31)
    return outputs


def paley_matrix(size: int) -> list[list[int]]:
    """Paley's Hadamard matrix (1933): construction I if ``size - 1`` is a prime, else II; [[1]] for 1.

    >>> paley_matrix(4)
    [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    """
    if size == 1:
        return [[1]]
    first = _is_prime(size - 1)
    q = size - 1 if first else size // 2 - 1
    if not first and not (_is_prime(q) and q % 4 == 1):
        raise ValueError(f"Paley's constructions from primes have no matrix of {size} rows")

    def character(a: int) -> int:  # Euler's criterion
        residue = pow(a % q, (q - 1) // 2, q)
        return -1 if residue == q - 1 else residue

    n = q + 1
    s = [[0] * n for _ in range(n)]
    for i in range(1, n):
        s[0][i] = 1
        s[i][0] = -1 if first else 1
        for j in range(1, n):
            s[i][j] = character(i - j)
    if first:
        return [[s[i][j] + (1 if i == j else 0) for j in range(n)] for i in range(n)]
    result = [[0] * size for _ in range(size)]
    for i in range(n):
        for j in range(n):
            block = [[1, -1], [-1, -1]] if i == j else [[s[i][j], s[i][j]], [s[i][j], -s[i][j]]]
            for a in (0, 1):
                for b in (0, 1):
                    result[2 * i + a][2 * j + b] = block[a][b]
    return result


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def odd_part(size: int) -> tuple[int, int]:
    """m and 2**k of a Hadamard matrix of ``size`` = m 2**k rows: m is 1, or the least with a matrix of Paley.

    Raises:
        ValueError: there is none.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1, size
    for m in (4 * odd, 8 * odd, 16 * odd):
        if size % m == 0:
            try:
                paley_matrix(m)
            except ValueError:
                continue
            return m, size // m
    raise ValueError(f"no Hadamard matrix of {size} rows is known here")


def hadamard(
    values: Sequence[Number],
    size: int | None = None,
    signs: str = "",
    *,
    working: str | FloatFormat = "fp32",
    back: bool = False,
) -> tuple[Value, ...]:
    """Numbers rotated in blocks by normalised Hadamard matrices, each addition rounded to ``working``.

    A block of n = m 2**k elements is multiplied by its signs. For h = 1, 2, ... below 2**k, elements a and b whose
    indices differ by h become a + b and a - b. If m > 1, row i of Paley's matrix is summed over its m elements from the
    first to the last, for each index modulo 2**k. At last each element is multiplied by 1/sqrt(n), rounded to
    ``working``. If the numbers do not fill the last block, its elements are rotated in blocks of powers of two, the
    largest first; signs are those of the places in the block.

    Arguments:
        values: the numbers, each an int, Fraction, float (taken exactly) or `Special`.
        size: the elements of a block; None for all. With one number nothing is changed.
        signs: see `hadamard_signs`.
        working: ``fp32``, or ``fp64`` for tensors of float64.
        back: rotate back: with the transposed matrix, and with the signs at the end.

    >>> [str(x) for x in hadamard([1, 2, 3, 4])]
    ['5', '-1', '-2', '0']
    """
    exact = [as_value(value) for value in values]
    length = len(exact)
    n = length if size is None else size
    factors = hadamard_signs(signs, n) if length > 1 else (1,) * n
    start, result = 0, list[Value]()
    while start < length:
        count = n if length - start >= n else 2 ** ((length - start).bit_length() - 1)
        first = start % n
        block = exact[start : start + count]
        result += _rotated(block, factors[first : first + count], working, back)
        start += count
    return tuple(result)


def _rotated(block: list[Value], signs: Sequence[int], working: str | FloatFormat, back: bool) -> list[Value]:
    n = len(block)
    m, width = odd_part(n)
    if not back:
        block = [_signed(x, s) for x, s in zip(block, signs, strict=True)]
    h = 1
    while h < width:
        block = [
            sub(block[i - h], block[i], working) if i // h % 2 else add(block[i], block[i + h], working)
            for i in range(n)
        ]
        h *= 2
    if m > 1:
        matrix = paley_matrix(m)
        summed = []
        for i in range(n):
            row, place = divmod(i, width)
            factors = [matrix[j][row] if back else matrix[row][j] for j in range(m)]
            total = _signed(block[place], factors[0])
            for j in range(1, m):
                total = (add if factors[j] > 0 else sub)(total, block[j * width + place], working)
            summed.append(total)
        block = summed
    if n > 1:
        factor = rsqrt(n, working)
        block = [mul(x, factor, working) for x in block]
    return [_signed(x, s) for x, s in zip(block, signs, strict=True)] if back else block


def _signed(x: Value, sign: int) -> Value:
    return negate(x) if sign < 0 else x


# -- factors and orders of channels -----------------------------------------------------------------------------------


def smoothing_factor(
    first: Number, second: Number, alpha: Number, power_of_two: bool = False, *, working: str | FloatFormat = "fp32"
) -> Value:
    """The factor of a channel: ``first**alpha / second**(1 - alpha)``, rounded once to ``working``.

    It is 1 if a magnitude with a positive exponent is zero, infinite or NaN. It is limited to the powers of two whose
    inverses are normal numbers of ``working`` too.

    Arguments:
        first, second: the largest magnitudes of the channel in both operands.
        alpha: from 0 to 1.
        power_of_two: round the factor to the nearest power of two, halves up.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.

    >>> smoothing_factor(8, 2, 0.5), smoothing_factor(9, 2, 0.5, power_of_two=True)
    (Fraction(2, 1), Fraction(2, 1))
    """
    weight = rational(as_value(alpha))
    factor = Fraction(1)
    for given, exponent in ((first, weight), (second, weight - 1)):
        value = as_value(given)
        if exponent == 0:
            continue
        if value is NAN or value in INFINITIES or rational(value) <= 0:
            return Fraction(1)
        factor *= _power(rational(value), exponent)
    limit = 126 if working == "fp32" else 1022
    factor = min(max(factor, scale_b(1, -limit)), scale_b(1, limit))
    rounded = rational(round(factor, working))
    if not power_of_two:
        return rounded
    below = scale_b(1, floor_log2(rounded))
    return min(below if rounded < below * Fraction(3, 2) else 2 * below, scale_b(1, limit))


def sorted_channels(measures: Sequence[Number]) -> tuple[int, ...]:
    """The channels from the largest measure to the least; equal ones keep their order, and NaN comes first.

    >>> sorted_channels([1, 3, 2, 3])
    (1, 3, 2, 0)
    """
    values = [as_value(measure) for measure in measures]

    def key(i: int) -> tuple[int, Fraction]:
        value = values[i]
        rank = 2 if value is NAN else 1 if value in INFINITIES else 0
        return -rank, -rational(value) if rank == 0 else Fraction(0)

    return tuple(sorted(range(len(values)), key=key))


# -- powers of groups -------------------------------------------------------------------------------------------------


def power_of_group(
    values: Sequence[Number], element: str | Element, *, least: str = "nonzero", expands_only: bool = False
) -> Fraction:
    """The power to which COAT raises the magnitudes of a group: floor(16 log2(F**2 / 2) / log2(M / m)) / 16.

    F is the largest value of the element format, and M and m are the largest and the least magnitude (`extremes`). The
    power is at least 1/16, or 1 if ``expands_only``; 1 if M = m.

    Source: COAT (arXiv 2410.19313), section 4.1, and its kernel.

    >>> power_of_group([10, 1], "e4m3fn")
    Fraction(5, 1)
    """
    top, bottom = extremes(values, least)
    if top == bottom:
        return Fraction(1)
    f = largest_magnitude(parse_element(element))
    ratio = _middle(enclosures.log2(f * f / 2, PRECISION)) / _middle(enclosures.log2(top / bottom, PRECISION))
    steps = math.floor(16 * ratio * (1 + Fraction(1, 1 << 40)))
    return max(Fraction(steps, 16), Fraction(1) if expands_only else Fraction(1, 16))


def extremes(values: Sequence[Number], least: str = "nonzero") -> tuple[Fraction, Fraction]:
    """The largest and the least magnitude of a group of finite numbers.

    Arguments:
        least: ``nonzero`` for the least one that is not zero, or ``kernel`` for what COAT's kernel finds: it starts
            from the elements as lanes of warps of 32, folds each warp in halves, and then the warps. A zero of the
            second half is skipped with all that was folded into it. 1e-30 in float32 is added to both.
    """
    exact = [_normal_or_zero(magnitude(as_value(value))) for value in values]
    top = max(exact, default=Fraction(0))
    if least == "nonzero":
        return top, min((x for x in exact if x), default=top)
    missing = largest(parse_format("fp32"))
    lanes = [*exact, *[missing] * (128 - len(exact))]
    warps = [_fold(lanes[i : i + 32]) for i in range(0, 128, 32)]
    bottom = _fold([*warps, *[Fraction(10**9)] * 28])
    epsilon = round(1e-30, "fp32")
    return rational(add(top, epsilon, "fp32")), rational(add(bottom, epsilon, "fp32"))


def _fold(lanes: list[Fraction]) -> Fraction:
    half = len(lanes) // 2
    if half == 0:
        return lanes[0]
    return _fold([min(a, b) if b > 0 else a for a, b in zip(lanes[:half], lanes[half:], strict=True)])


def round_power_map(
    values: Sequence[Number],
    element: str | Element,
    rounding: str = "nearest_even",
    overflow: str = "sat_finite",
    *,
    least: str = "nonzero",
    expands_only: bool = False,
    random: RandomNumbers | None = None,
    working: str | FloatFormat = "fp32",
) -> tuple[Value, ...]:
    """A group rounded under COAT's power map: q = F (|x|/M)**k rounds to the element format; M (q/F)**(1/k) to working.

    F, M and k are those of `power_of_group`. Signs stay. Magnitudes below 2**-126 count as zero. A group with a NaN or
    an infinity is NaN.

    >>> [float(x) for x in round_power_map([10, 1, 0, -10], "e4m3fn")]
    [10.0, 0.9729631543159485, 0.0, -10.0]
    """
    exact, fmt = [as_value(value) for value in values], parse_element(element)
    if any(value is NAN or value in INFINITIES for value in exact):
        return (NAN,) * len(exact)
    k = power_of_group(exact, fmt, least=least, expands_only=expands_only)
    top, _ = extremes(exact, least)
    f = largest_magnitude(fmt)
    results = []
    for i, value in enumerate(exact):
        size = _normal_or_zero(magnitude(value))
        y = with_sign(f * _power(size / top, k) if size else Fraction(0), is_negative(value))
        number = None if random is None else random(i) if callable(random) else random[i]
        q = round_element(y, fmt, rounding, overflow, random=number)
        back = top * _power(rational(magnitude(q)) / f, 1 / k) if rational(magnitude(q)) else Fraction(0)
        results.append(round(with_sign(back, is_negative(q)), working))
    return tuple(results)


def _normal_or_zero(x: Value) -> Fraction:
    number = rational(x)
    return number if number >= SMALLEST_NORMAL else Fraction(0)


def _power(x: Fraction, y: Fraction) -> Fraction:
    """``x`` > 0 to the power of ``y``, as good as exact."""
    if x == 1 or y == 0:
        return Fraction(1)
    return x if y == 1 else _middle(enclosures.power(x, y, PRECISION))


def _middle(interval: enclosures.Enclosure) -> Fraction:
    return (interval.lower + interval.upper) / 2
