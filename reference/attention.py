"""Attention as tiled kernels compute it: the definition of every step, in exact numbers.

The algorithm is FlashAttention-2 (T. Dao, arXiv 2307.08691). `flash_forward` and `flash_backward` take one head. Every
step of them is an exact operation that is rounded three times:

1. to the *carrier*, the format in which the step is computed (nearest, ties to even);
2. to ``arithmetic``;
3. at some steps, to a format of their own (`Steps`).

Sums within a product of matrices, and sums of the elements of a row, are exact before they are rounded. Sums over
blocks are not: each block adds to the rounded sum of those before it, beginning with 0, in the order of keys (for O and
dQ) or of queries (for dK and dV). A masked score is -infinity.

No rounding is stochastic here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from fpsim.formats import OVERFLOWS, ROUNDINGS, WHOLE_FORMATS

from .arithmetic import add, convert, div, mul, sub
from .blocks import round_blocks
from .comparison import greater, greater_equal, maximum
from .elementary import exp, log
from .rounding import round
from .sums import dot, sum
from .values import INFINITY, NEGATIVE_INFINITY, Number, Value, as_value

#: A matrix: the rows, of equal length.
Matrix: TypeAlias = Sequence[Sequence[Number]]

#: How near to the largest score of a row another one counts as a repeated maximum: the float32 nearest to 0.001.
CLOSE = Fraction(8589935, 2**33)

_ZERO, _ONE = Fraction(0), Fraction(1)
#: The format of exponentials and logarithms before they are rounded to the carrier.
_WIDE = "fp64"


@dataclass(frozen=True)
class Steps:
    """The roundings of attention: the fields that `fpsim.FlashAttention` also has, with the same meaning.

    A format is a cast as text: ``bf16``, ``bf16/toward_zero``. None stands for ``arithmetic`` (for ``probabilities``:
    for ``exponentials``; for ``inputs``: for no rounding).
    """

    inputs: str | None = None
    arithmetic: str = "fp32"
    scores: str | None = None
    exponentials: str | None = None
    probabilities: str | None = None
    sums: str | None = None
    accumulator: str | None = None
    output: str | None = None
    delta: str | None = None
    score_gradients: str | None = None
    block_q: int = 128
    block_k: int = 128
    late_scale: bool = True
    offset: int = 0
    cure: Number | None = None


def flash_forward(
    q: Matrix,
    k: Matrix,
    v: Matrix,
    steps: Steps,
    *,
    scale: Number,
    mask: Matrix | None = None,
    carrier: str = "fp64",
) -> tuple[list[list[Value]], list[Value]]:
    """The output O of attention, and L, the logarithms of the row sums of exp(S).

    For a row of Q, with m = -infinity, l = 0 and O = 0 at first, every block of keys takes these steps. R is the
    rounding to the carrier and to ``arithmetic``, which every operation has; the rounding of a field follows by name.

    - S = scores(R(scale * scores(R(Q K^T)))), plus the mask as scores(R(S + mask)); -infinity where the mask is.
    - m' = the larger of m and of the largest S in the block. With a ``cure``, where more than one S is at least
      R(largest - 0.001), R(cure * largest) takes the place of a positive largest S, and 0 that of a negative one.
    - a = exponentials(R(exp(R(m - m')))) and P = exponentials(R(2**offset * exp(R(S - m')))). Where m' is -infinity, 0
      takes its place in these differences. Exponentials, and the logarithm below, are rounded to fp64 first.
    - l = sums(R(R(a l) + sums(R(the sum of P)))).
    - O = accumulator(R(R(a O) + accumulator(R(probabilities(P) V)))).

    In the end O = output(R(O / l)) and L = sums(R(R(log(l / 2**offset)) + m)). Where l is 0, O is divided by 1, and L
    is +infinity.

    Arguments:
        q, k, v: one head, shapes (Lq, E), (Lk, E) and (Lk, Ev). They are rounded to ``inputs`` first.
        steps: the roundings.
        scale: a number of the carrier.
        mask: numbers that are added to the scores, shape (Lq, Lk): 0 where a query sees a key, -infinity where it does
            not. For a causal mask see `causal`.
        carrier: ``fp32`` or ``fp64``.
    """
    rounded = _Rounder(steps, carrier)
    queries, keys, values = (rounded.inputs(x) for x in (q, k, v))
    outputs: list[list[Value]] = []
    logarithms: list[Value] = []
    for i, query in enumerate(queries):
        largest: Value = NEGATIVE_INFINITY
        total: Value = _ZERO
        output: list[Value] = [_ZERO] * len(values[0])
        for block in _blocks(len(keys), steps.block_k):
            scores = [rounded.score(query, keys[j], scale, None if mask is None else mask[i][j]) for j in block]
            new = maximum(largest, rounded.maximum(scores))
            subtrahend = _ZERO if new is NEGATIVE_INFINITY else new
            factor = rounded.exponential(largest, subtrahend, 0)
            exponentials = [rounded.exponential(score, subtrahend, steps.offset) for score in scores]
            added = rounded("sums", sum(exponentials, carrier))
            total = rounded("sums", add(rounded.arithmetic(mul(factor, total, carrier)), added, carrier))
            probabilities = [rounded.probability(x) for x in exponentials]
            for d, before in enumerate(output):
                added = rounded("accumulator", dot(probabilities, [values[j][d] for j in block], carrier))
                output[d] = rounded(
                    "accumulator", add(rounded.arithmetic(mul(factor, before, carrier)), added, carrier)
                )
            largest = new
        is_empty = total == 0
        outputs.append([rounded("output", div(x, _ONE if is_empty else total, carrier)) for x in output])
        if is_empty:
            logarithms.append(INFINITY)
            continue
        logarithm = log(mul(total, Fraction(1, 2**steps.offset), _WIDE), _WIDE)
        logarithm = rounded.arithmetic(convert(logarithm, carrier))
        logarithms.append(rounded("sums", add(logarithm, largest, carrier)))
    return outputs, logarithms


def flash_backward(
    gradient: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    output: Matrix,
    logarithms: Sequence[Number],
    steps: Steps,
    *,
    scale: Number,
    mask: Matrix | None = None,
    carrier: str = "fp64",
) -> tuple[list[list[Value]], list[list[Value]], list[list[Value]]]:
    """The gradients dQ, dK and dV, from ``gradient``, that of O, and from O and L of `flash_forward`.

    With R as there, and with ``steps`` of the backward pass:

    - delta = delta(R(the sum of R(dO * O) over a row)).
    - S as in forward; P = exponentials(R(exp(R(S - L)))); dP = scores(R(dO V^T)).
    - dS = score_gradients(R(P * R(dP - delta))); without ``late_scale``, R(P * scale) takes the place of P.
    - dQ = accumulator(R(dQ + accumulator(R(dS K)))) for every block of keys, in order.
    - dV = accumulator(R(dV + accumulator(R(P^T dO)))) with probabilities(P), and
      dK = accumulator(R(dK + accumulator(R(dS^T Q)))), for every block of queries, in order.

    In the end dQ, dK and dV are output(R(...)) of these sums; with ``late_scale``, of the scale times dQ and dK.
    """
    rounded = _Rounder(steps, carrier)
    queries, keys, values, gradients = (rounded.inputs(x) for x in (q, k, v, gradient))
    probabilities: list[list[Value]] = []
    score_gradients: list[list[Value]] = []
    for i, query in enumerate(queries):
        products = [rounded.arithmetic(mul(x, y, carrier)) for x, y in zip(gradients[i], output[i], strict=True)]
        delta = rounded("delta", sum(products, carrier))
        probabilities.append([])
        score_gradients.append([])
        for j, key in enumerate(keys):
            score = rounded.score(query, key, scale, None if mask is None else mask[i][j])
            exponential = rounded.exponential(score, as_value(logarithms[i]), 0)
            of_score = rounded("scores", dot(gradients[i], values[j], carrier))
            weight = exponential if steps.late_scale else rounded.arithmetic(mul(exponential, scale, carrier))
            difference = rounded.arithmetic(sub(of_score, delta, carrier))
            probabilities[i].append(rounded.probability(exponential))
            score_gradients[i].append(rounded("score_gradients", mul(weight, difference, carrier)))
    of_queries = rounded.accumulated(score_gradients, keys, steps.block_k)
    of_keys = rounded.accumulated(_transposed(score_gradients), queries, steps.block_q)
    of_values = rounded.accumulated(_transposed(probabilities), gradients, steps.block_q)
    late = scale if steps.late_scale else 1
    return (
        [[rounded("output", mul(x, late, carrier)) for x in row] for row in of_queries],
        [[rounded("output", mul(x, late, carrier)) for x in row] for row in of_keys],
        [[rounded("output", x) for x in row] for row in of_values],
    )


def causal(queries: int, keys: int) -> list[list[Value]]:
    """The mask with which query i sees keys 0 to i only.

    >>> causal(2, 2)
    [[Fraction(0, 1), NEGATIVE_INFINITY], [Fraction(0, 1), Fraction(0, 1)]]
    """
    return [[_ZERO if j <= i else NEGATIVE_INFINITY for j in range(keys)] for i in range(queries)]


@dataclass(frozen=True)
class _Rounder:
    """The roundings of the results of steps."""

    steps: Steps
    carrier: str

    def arithmetic(self, x: Value) -> Value:
        """``x``, a number of the carrier, rounded to ``arithmetic``."""
        return _cast(x, self.steps.arithmetic)

    def __call__(self, step: str, x: Value) -> Value:
        """``x``, a number of the carrier, rounded to ``arithmetic`` and then to the format of ``step``."""
        x = self.arithmetic(x)
        own = getattr(self.steps, step)
        return x if own is None else _cast(x, own)

    def inputs(self, x: Matrix) -> list[list[Value]]:
        """The rows of ``x``, rounded to ``inputs`` and then to the carrier."""
        rows = [[as_value(each) for each in row] for row in x]
        cast = self.steps.inputs
        if cast is None:
            return rows
        if _is_scaled(cast):
            width = len(rows[0])
            flat = round_blocks([x for row in rows for x in row], cast, (len(rows), width), working=self.carrier)
            rows = [list(flat[i : i + width]) for i in range(0, len(flat), width)]
        else:
            rows = [[_cast(x, cast) for x in row] for row in rows]
        return [[convert(x, self.carrier) for x in row] for row in rows]

    def score(self, query: Sequence[Value], key: Sequence[Value], scale: Number, mask: Number | None) -> Value:
        score = self("scores", dot(query, key, self.carrier))
        score = self("scores", mul(score, scale, self.carrier))
        if mask is None:
            return score
        added = as_value(mask)
        if added is NEGATIVE_INFINITY:
            return added
        return self("scores", add(score, added, self.carrier))

    def maximum(self, scores: Sequence[Value]) -> Value:
        """The largest of ``scores``, or the number that takes its place where several are near it."""
        largest: Value = NEGATIVE_INFINITY
        for score in scores:
            largest = maximum(largest, score)
        if self.steps.cure is None or largest is NEGATIVE_INFINITY:
            return largest
        bound = self.arithmetic(sub(largest, CLOSE, self.carrier))
        if len([score for score in scores if greater_equal(score, bound)]) < 2:
            return largest
        if greater(largest, 0):
            return self.arithmetic(mul(largest, self.steps.cure, self.carrier))
        return _ZERO

    def exponential(self, x: Value, y: Value, offset: int) -> Value:
        """exp of the difference of ``x`` and ``y``, times 2**offset, as the step ``exponentials``."""
        difference = self.arithmetic(sub(x, y, self.carrier))
        power = mul(exp(difference, _WIDE), Fraction(2**offset), self.carrier)
        return self("exponentials", power)

    def probability(self, exponential: Value) -> Value:
        own = self.steps.probabilities
        return exponential if own is None else _cast(exponential, own)

    def accumulated(
        self, left: Sequence[Sequence[Value]], right: Sequence[Sequence[Value]], size: int
    ) -> list[list[Value]]:
        """The product of two matrices, added up over blocks of ``size`` products."""
        results = []
        for row in left:
            totals: list[Value] = [_ZERO] * len(right[0])
            for block in _blocks(len(right), size):
                for d, before in enumerate(totals):
                    product = dot([row[j] for j in block], [right[j][d] for j in block], self.carrier)
                    added = self("accumulator", product)
                    totals[d] = self("accumulator", add(before, added, self.carrier))
            results.append(totals)
        return results


def _cast(x: Value, cast: str) -> Value:
    """``x`` rounded by ``format[/rounding][/overflow]``."""
    name, *modes = cast.split("/")
    overflow = [mode for mode in modes if mode in OVERFLOWS]
    rounding = [mode for mode in modes if mode not in OVERFLOWS]
    return round(x, name, *(rounding or ["nearest_even"]), *overflow)


def _is_scaled(cast: str) -> bool:
    """Whether ``cast`` has a part that is neither a format nor a mode."""
    name, *modes = cast.split("/")
    return name in WHOLE_FORMATS or any(mode not in OVERFLOWS and mode not in ROUNDINGS for mode in modes)


def _blocks(length: int, size: int) -> list[range]:
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _transposed(x: Sequence[Sequence[Value]]) -> list[list[Value]]:
    return [list(column) for column in zip(*x, strict=True)]
