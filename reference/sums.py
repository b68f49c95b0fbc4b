"""Sums and inner products: exact with one rounding, or every step rounded, in any order.

IEEE 754-2019 clause 9.4 leaves the order and the intermediate precision of reductions to the implementation. Here both
are arguments, so that the sum of a processor, a loop or a matrix unit can be written down.

`fpsim.reference.orders` yields the steps of a sum one by one. `_run` takes them: it rounds, draws random numbers and
collects flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import count, repeat
from operator import or_
from typing import Any, TypeAlias

from fpsim.formats import FloatFormat, parse_format, split_rounding

from .aligned import Aligned, exponent_of
from .arithmetic import convert, exact_sum, fma, mul
from .orders import Exponents, Order, Step, Steps, adder, is_aligned
from .outcomes import Flags, Result, Target, check_tininess, rounded_result, target
from .values import Number, Value, as_value

#: The random numbers of stochastic rounding, one for each rounding, or a function of its index: see `sum`.
RandomNumbers: TypeAlias = Sequence[int] | Callable[[int], int]
#: The scales of the elements of both vectors of an inner product.
Scales: TypeAlias = tuple[Sequence[Number], Sequence[Number]] | None
#: The format of both vectors of an inner product, or a pair of formats.
Operands: TypeAlias = str | FloatFormat | tuple[str | FloatFormat, str | FloatFormat] | None


def sum(
    values: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
    random: RandomNumbers | None = None,
) -> Value:
    """The sum of ``values``, in ``format``.

    Without an accumulator the exact sum is rounded once, and the order does not matter. With one, every addition
    rounds to it, by the rules of `add`, and the final sum is then rounded to ``format``. The orders, with ``+`` for an
    addition that rounds to the accumulator and x1 to xn for the values:

    - ``"sequential"``: ``(((x1 + x2) + x3) + ...) + xn``, beginning with x1 rounded to the accumulator.
    - ``"pairwise"``: neighbours are added, ``x1 + x2``, ``x3 + x4``, ...; a value without a neighbour stays as it is.
      The sums are added in the same way, until one is left; it is rounded to the accumulator.
    - ``("blocked", n)``: every n values in a row (the last block may have fewer) are summed sequentially. Then their
      sums are summed sequentially.
    - ``("interleaved", n)``: n lanes as in a vector unit: lane i sums x_i, x_(i+n), x_(i+2n), ... sequentially; then
      the lanes' sums are summed sequentially.
    - ``("chunked", n)``: the exact sum of every n values in a row is one addition: ``(c1 + c2) + ...``, where each c is
      exact and c1 is rounded first. Matrix units that add n products at once do this. ``("chunked", 1)`` is sequential.
    - ``("aligned", L, F)``, or an `Aligned`, which says more: the steps of a matrix unit. L values and the sum of the
      steps before are shifted to the largest exponent among them, cut to F fractional bits, added exactly and rounded.
    - ``"kahan"``: W. Kahan's compensated summation ("Further remarks on reducing truncation errors", Communications of
      the ACM 8 (1965)), every operation rounded to the accumulator. It begins with s = x1 rounded and c = 0, and takes
      for every further x in order: y = x - c, t = s + y, c = (t - s) - y, s = t. The sum is s.

    An exact sum of zero has its sign as in `add`: it is -0 if all values are -0, or if ``rounding`` is ``down`` and not
    all values are +0. The sum of no values is +0. (Hardware that begins with +0 instead of x1 differs in one case: it
    gives -0 only if it rounds ``down``.)

    In stochastic rounding every rounding has its own random number. The roundings are counted from 0 in the order
    written above: pairwise sums level by level; blocks and lanes one after the other and then their sums; y, t, t - s
    and c of Kahan's method; the rounding to ``format`` last. An exact rounding counts too, so that the count does not
    depend on the values.

    Arguments:
        values: numbers, each an int, Fraction, float (taken exactly) or `Special`.
        format: the format of the result, a name or a `FloatFormat`.
        rounding, overflow: as in `round`; for the additions too.
        accumulator: the format to which every addition rounds; None for an exact sum.
        order: one of the above.
        random: the random numbers of stochastic rounding, each as in `round`: a sequence with one number for each
            rounding, or a function from the index of a rounding to its number. Other roundings take none.

    Raises:
        ValueError: no such format, rounding, overflow mode or order, or an overflow mode that ``format`` or
            ``accumulator`` cannot take; ``random`` missing, too short or too long, with a number out of range, or
            given without stochastic rounding.
        TypeError: a value, format or ``random`` is none of the above.

    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn")
    Fraction(9, 8)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn")
    Fraction(1, 1)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", accumulator="e4m3fn", order=("chunked", 3))
    Fraction(9, 8)
    >>> sum([1, Fraction(1, 16), Fraction(1, 16)], "e4m3fn", "stochastic:1", accumulator="e4m3fn", random=[0, 1, 0, 0])
    Fraction(9, 8)
    """
    modes = Modes(rounding, overflow, random)
    return sum_with_flags(values, format, modes, accumulator=accumulator, order=order).value


def dot(
    xs: Iterable[Number],
    ys: Iterable[Number],
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    product: str | FloatFormat | None = None,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
    operands: Operands = None,
    scales: Scales = None,
    scale_format: str | FloatFormat = "e8m0fnu",
    promote: int | None = None,
    part_scales: Scales = None,
    random: RandomNumbers | None = None,
) -> Value:
    """The inner product of ``xs`` and ``ys``, in ``format``: the `sum` of their products.

    Products are exact, or rounded to the format ``product``. Exact products summed sequentially are a chain of fused
    multiply-adds, each of which rounds once: ``fma(x2, y2, x1 * y1 rounded)`` and so on. Without an accumulator and
    with exact products, the inner product is rounded once in all.

    In stochastic rounding, the roundings of products come first, in order; those of the sum follow.

    Arguments:
        xs, ys: numbers as in `sum`, of equal length.
        format, rounding, overflow, accumulator, order, random: as in `sum`.
        product: the format to which every product is rounded; None for exact products.
        operands: the format of ``xs`` and ``ys``, or a pair of formats. A matrix unit (``order`` is aligned) gives its
            least exponent to subnormal numbers. None: numbers have their own exponents, however small. Other orders
            do not depend on it.
        scales: a pair of vectors, the scales by which every element of ``xs`` and ``ys`` is multiplied. Their exponents
            join those of the elements in a matrix unit. A group of products (`Aligned`) has one pair of scales.
        scale_format: the format of the scales, whose least exponent subnormal scales have.
        promote: after this many products the partial sum is added to a total in float32, to nearest even, and the
            accumulator begins again. The first partial sum is the first total. These additions draw no random numbers.
        part_scales: a pair of vectors, the scales of every partial sum, such as those of blocks of ``promote``
            elements. Their product s is rounded to float32. Then ``total = fma(part, s, total)`` in float32, to nearest
            even, from a total of +0 (DeepSeek-V3's products of blocks of 128, arXiv 2412.19437, section 3.3).

    Raises:
        ValueError: as `sum`; or ``xs`` and ``ys`` differ in length, products are rounded and then aligned, or there is
            not one pair of scales for every partial sum.
        TypeError: as `sum`.

    >>> dot([1.125, 1], [1.125, -1.25], "e4m3fn"), dot([1.125, 1], [1.125, -1.25], "e4m3fn", product="e4m3fn")
    (Fraction(1, 64), Fraction(0, 1))
    >>> dot([448, 1], [1, 1 / 64], "fp32", "toward_zero", accumulator="e8m13", order=("aligned", 32, 13))
    Fraction(448, 1)
    >>> dot([1, 2, 3], [1, 1, 1], "fp32", accumulator="fp16", promote=2, part_scales=([1, 0.5], [1, 4]))
    Fraction(9, 1)
    """
    modes = Modes(rounding, overflow, random)
    options: dict[str, Any] = {"product": product, "accumulator": accumulator, "order": order, "operands": operands}
    options |= {"scales": scales, "scale_format": scale_format, "promote": promote, "part_scales": part_scales}
    return dot_with_flags(xs, ys, format, modes, **options).value


# -- with flags -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes that all roundings of a sum share, whatever their format: see `sum` and `with_flags`."""

    rounding: str
    overflow: str | None
    random: RandomNumbers | None
    tininess: str = "after"

    def target(self, format: str | FloatFormat) -> Target:
        """The target of a rounding to ``format``, still without a random number."""
        return replace(target(format, self.rounding, self.overflow), tininess=check_tininess(self.tininess))


def sum_with_flags(
    values: Iterable[Number],
    format: str | FloatFormat,
    modes: Modes,
    *,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
) -> Result:
    """`sum`, and the flags of all its roundings together: see `with_flags`."""
    total = _total(format, modes, accumulator, order)
    terms = [as_value(value) for value in values]
    return _run(lambda: total(terms), modes)


def dot_with_flags(
    xs: Iterable[Number],
    ys: Iterable[Number],
    format: str | FloatFormat,
    modes: Modes,
    *,
    product: str | FloatFormat | None = None,
    accumulator: str | FloatFormat | None = None,
    order: Order = "sequential",
    operands: Operands = None,
    scales: Scales = None,
    scale_format: str | FloatFormat = "e8m0fnu",
    promote: int | None = None,
    part_scales: Scales = None,
) -> Result:
    """`dot`, and the flags of all its products and roundings together: see `with_flags`."""
    left, right = [as_value(x) for x in xs], [as_value(y) for y in ys]
    if len(left) != len(right):
        raise ValueError(f"an inner product takes two vectors of one length, got {len(left)} and {len(right)} numbers")
    exponents = _exponents_of_products(left, right, operands)
    if scales is not None:
        first, second = ([as_value(scale) for scale in vector] for vector in scales)
        if len(first) != len(left) or len(second) != len(right):
            raise ValueError(f"scales are two vectors of {len(left)} numbers, got {len(first)} and {len(second)}")
        of_scales = _exponents_of_products(first, second, scale_format)
        exponents = _with_scales(exponents, of_scales, isinstance(order, Aligned) and order.group > 1)
        left, right = (
            [mul.exact(None, element, scale).value for element, scale in zip(*vectors, strict=True)]
            for vectors in ((left, first), (right, second))
        )
    if product is not None and is_aligned(order):
        raise ValueError(f"products of a matrix unit are exact, got product={product!r} and order={order!r}")
    promotion = None if promote is None else _promotion(promote, part_scales, len(left))
    if part_scales is not None and promotion is None:
        raise ValueError("part_scales are those of partial sums: give their length too, such as promote=128")
    total = _total(format, modes, accumulator, order, exponents, promotion)
    multiply = None if product is None else modes.target(product)

    def steps() -> Steps:
        terms = []
        for pair in zip(left, right, strict=True):
            terms.append((yield Step(mul.exact, pair, multiply)))
        return (yield from total(terms))

    return _run(steps, modes)


def _exponents_of_products(left: Sequence[Value], right: Sequence[Value], operands: Operands) -> list[int | None]:
    """The exponents of products before they are normalised: the sums of their factors' exponents, None for zeros."""
    formats = operands if isinstance(operands, tuple) else (operands, operands)
    least = [-(1 << 20) if format is None else parse_format(format).emin for format in formats]
    exponents = [(exponent_of(x, least[0]), exponent_of(y, least[1])) for x, y in zip(left, right, strict=True)]
    return [None if x is None or y is None else x + y for x, y in exponents]


def _with_scales(
    exponents: Sequence[int | None], of_scales: Sequence[int | None], only_scales: bool
) -> list[int | None]:
    """The exponents of scaled products: of the elements and scales, or of the scales alone; None for zeros."""
    pairs = zip(exponents, of_scales, strict=True)
    return [None if e is None or s is None else s if only_scales else e + s for e, s in pairs]


def _total(
    format: str | FloatFormat,
    modes: Modes,
    accumulator: str | FloatFormat | None,
    order: Order,
    exponents: Exponents = None,
    promotion: _Promotion | None = None,
) -> Callable[[Sequence[Value]], Steps]:
    """The function from terms to the steps that add them up and round the sum to ``format``."""
    into = modes.target(format)
    within = None if accumulator is None else modes.target(accumulator)
    if within is None and is_aligned(order):
        raise ValueError(f"order={order!r} needs an accumulator, such as accumulator='e8m13'")
    if within is None and promotion is not None:
        raise ValueError("exact sums are not promoted: give an accumulator, such as 'e8m13', or leave out promote")
    add_up = adder(order, exponents)

    def promoted(terms: Sequence[Value], where: Target, by: _Promotion) -> Steps:
        sum_: Value = Fraction(0)
        for number, first in enumerate(range(0, len(terms), by.length)):
            part = slice(first, first + by.length)
            own = None if exponents is None else exponents[part]
            value = yield from adder(order, own)(terms[part], where)
            if by.scales is not None:
                pair = by.scales[0][number], by.scales[1][number]
                scale = yield Step(mul.exact, pair, _FLOAT32)
                sum_ = yield Step(fma.exact, (value, scale, sum_), _FLOAT32)
            else:
                sum_ = value if number == 0 else (yield Step(exact_sum, (sum_, value), _FLOAT32))
        return sum_

    def total(terms: Sequence[Value]) -> Steps:
        if within is None:
            return (yield Step(exact_sum, tuple(terms), into))
        accumulated = yield from (add_up(terms, within) if promotion is None else promoted(terms, within, promotion))
        return (yield Step(convert.exact, (accumulated,), into))

    return total


@dataclass(frozen=True, slots=True)
class _Promotion:
    """The number of products in a partial sum, and for both vectors the scales of all partial sums, or None."""

    length: int
    scales: tuple[Sequence[Value], Sequence[Value]] | None


#: The rounding of totals of partial sums.
_FLOAT32 = target("fp32")


def _promotion(length: int, scales: Scales, count: int) -> _Promotion:
    if type(length) is not int or length < 1:
        raise ValueError(f"promote is a number of products from 1, got {length!r}")
    if scales is None:
        return _Promotion(length, None)
    first, second = ([as_value(scale) for scale in vector] for vector in scales)
    parts = -(-count // length)
    if len(first) != parts or len(second) != parts:
        raise ValueError(f"part_scales are two vectors of {parts} numbers, got {len(first)} and {len(second)}")
    return _Promotion(length, (first, second))


# -- taking the steps -------------------------------------------------------------------------------------------------


def _run(steps: Callable[[], Steps], modes: Modes) -> Result:
    """The last value of the steps, and the flags of all: flags are sticky (IEEE 754-2019 clause 7.1)."""
    numbers = _numbers(modes.random, modes.rounding, steps)
    raised: list[Flags] = []

    def take(step: Step) -> Value:
        operation, operands, where = step
        if where is None:
            value, flags = operation(None, *operands)
        else:
            draws = split_rounding(where.rounding)[1] > 0
            result = rounded_result(operation, operands, replace(where, random=next(numbers) if draws else None))
            value, flags = result.value, result.flags
        raised.append(flags)
        return value

    return Result(_drive(steps(), take), reduce(or_, raised))


def _drive(steps: Steps, take: Callable[[Step], Value]) -> Value:
    """The value that ``steps`` return if ``take`` gives the value of each step."""
    step = next(steps)
    while True:
        value = take(step)
        try:
            step = steps.send(value)
        except StopIteration as end:
            return end.value


def _numbers(random: RandomNumbers | None, rounding: str, steps: Callable[[], Steps]) -> Iterator[int | None]:
    """The random numbers of the roundings in order; None for each if rounding is deterministic."""
    if not split_rounding(rounding)[1]:
        if random is not None:
            raise ValueError(f"random={random!r} has no meaning with rounding={rounding!r}: use 'stochastic:BITS'")
        return repeat(None)
    if callable(random):
        return map(random, count())
    roundings = _roundings(steps())
    needs = f"rounding={rounding!r} needs {roundings} random numbers, one for each rounding, or a function of the index"
    if random is not None and not isinstance(random, Sequence):
        raise TypeError(f"{needs}: got {random!r} of type {type(random)}")
    if random is None or len(random) != roundings:
        raise ValueError(f"{needs}: got {random if random is None else len(random)}")
    return iter(random)


def _roundings(steps: Steps) -> int:
    """How many of the steps draw a random number. This does not depend on the values."""
    taken: list[Step] = []

    def take(step: Step) -> Value:
        taken.append(step)
        return Fraction(0)

    _drive(steps, take)
    return len([step for step in taken if step.where is not None and split_rounding(step.where.rounding)[1]])
