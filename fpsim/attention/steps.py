"""Tiled attention in tensor operations: the online softmax forward, and the backward pass that computes it again.

The functions loop over blocks of keys, and in backward over blocks of queries too. Rows of Q do not depend on each
other, so that forward takes all of them at once. docs/attention.md defines every step and its order;
`fpsim.reference.flash_forward` and `flash_backward` are that definition in exact numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.matmul import operand_format
from fpsim.accumulators.ops import accumulate_op
from fpsim.accumulators.sums import accumulate_sum_op
from fpsim.attention.flash import STEPS, FlashAttention
from fpsim.casts import Cast, apply_cast, check_cast
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS, working_dtype
from fpsim.rounding.ops import SOURCE, random_key_op

#: How near to the largest score of a row another one counts as a repeated maximum, as float32 has it.
CLOSE = 0.0010000000474974513

#: The parts of a call that draw random numbers of their own. Forward and backward share the draws of the scores.
_PARTS = ("scores", "forward", "backward")
#: What is rounded: every step, and each of Q, K, V and dO, draws its own random numbers.
_ROUNDED = ("arithmetic", *STEPS, "q", "k", "v", "gradient")
#: The salts of a site, of a part, and of one thing that is rounded, whose calls are counted.
_SITE, _PART, _KIND = 1 << 32, 1 << 24, 1 << 16

#: A function that is told of every rounding: the step (or ``q``, ``k``, ``v``, ``gradient``), and the numbers before
#: and after.
Watch = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Call:
    """A call of attention: everything but the tensors that it multiplies.

    Attributes:
        steps: how it rounds.
        scale: the factor of the scores.
        causal: whether query i sees keys 0 to i only.
        mask: booleans (True: seen) or numbers to add, of shape (..., Lq, Lk), or one that broadcasts to it; or None.
        leading: the axes before the last two of Q, K and V.
        seed: one int64, if any rounding is stochastic.
        salt: tells sites with the same seed apart.
        watch: is told of every rounding.
    """

    steps: FlashAttention
    scale: float
    causal: bool
    mask: Tensor | None
    leading: tuple[int, ...]
    seed: Tensor | None = None
    salt: int = 0
    watch: Watch | None = None


class Rounder:
    """Rounds the results of steps, in the dtype in which they are computed: float32, or float64 for float64 tensors."""

    def __init__(self, call: Call, steps: FlashAttention, dtype: torch.dtype, part: str) -> None:
        self.call, self.steps, self.dtype, self.part = call, steps, dtype, _PARTS.index(part)
        self.draws: Counter[str] = Counter()
        for name in ("arithmetic", *STEPS):
            check_cast(dtype, steps.cast(name))

    def arithmetic(self, x: Tensor) -> Tensor:
        """``x``, the result of an operation, rounded to the format of arithmetic."""
        return self._watched("arithmetic", x, self._round("arithmetic", x))

    def __call__(self, step: str, x: Tensor) -> Tensor:
        """``x``, the result of an operation, rounded to the format of arithmetic and then to that of ``step``."""
        rounded = self._round("arithmetic", x)
        if self.steps.cast(step) != self.steps.cast("arithmetic"):
            rounded = self._round(step, rounded)
        return self._watched(step, x, rounded)

    def operand(self, step: str, x: Tensor) -> Tensor:
        """``x``, rounded by the cast of ``step`` alone: an operand of a product."""
        return self._watched(step, x, self._round(step, x))

    def inputs(self, name: str, x: Tensor) -> Tensor:
        """``x``, one of Q, K, V and dO, in the dtype of the steps and rounded as an input."""
        x, cast = x.to(self.dtype), self.steps.inputs
        if not isinstance(cast, Cast):
            return x
        check_cast(self.dtype, cast)
        return self._watched(name, x, self._cast(name, x, cast))

    def _round(self, step: str, x: Tensor) -> Tensor:
        return self._cast(step, x, self.steps.cast(step))

    def _cast(self, name: str, x: Tensor, cast: Cast) -> Tensor:
        if _is_exact(self.dtype, cast):
            return x
        key = None
        if cast.is_stochastic:
            assert self.call.seed is not None, "a stochastic call has a seed"
            salt = self.call.salt * _SITE + self.part * _PART + _ROUNDED.index(name) * _KIND + self.draws[name]
            self.draws[name] += 1
            key = random_key_op(self.call.seed, salt)
        return apply_cast(x, cast, axes=(x.dim() - 1,), key=key)

    def _watched(self, name: str, x: Tensor, rounded: Tensor) -> Tensor:
        if self.call.watch is not None:
            self.call.watch(name, x, rounded)
        return rounded

    def product(self, a: Tensor, b: Tensor, first: str, second: str) -> Tensor:
        """The product of batches of matrices, whose values the steps ``first`` and ``second`` have rounded."""
        accumulator = self.steps.products
        if not isinstance(accumulator, Accumulator):
            return torch.bmm(a, b)
        casts = [self.steps.inputs if step == "inputs" else self.steps.cast(step) for step in (first, second)]
        formats = [
            operand_format(cast, accumulator) if isinstance(cast, Cast) else CARRIERS[self.dtype] for cast in casts
        ]
        accumulator.check_operands(formats[0], formats[1])
        names = [fmt.name for fmt in formats]
        return accumulate_op(a.contiguous(), b.contiguous(), None, str(accumulator), *names, SOURCE)

    def row_sums(self, x: Tensor) -> Tensor:
        """The sums of rows: added in float64 and rounded once to the dtype of ``x``, or those of an accumulator."""
        accumulator = self.steps.reductions
        if accumulator is None:
            return x.double().sum(-1, keepdim=True).to(x.dtype)
        if x.dtype == torch.float64:
            raise ValueError(
                f"reductions={str(accumulator)!r} adds numbers of float32, and the tensors are float64: leave it out, "
                "or use float32 tensors"
            )
        return accumulate_sum_op(x, [-1], True, None, str(accumulator), SOURCE)


def _is_exact(dtype: torch.dtype, cast: Cast) -> bool:
    """Whether ``cast`` changes no number of ``dtype``, infinities included."""
    if cast.scale is not None or not isinstance(cast.format, FloatFormat) or cast.overflow == "sat_finite":
        return False
    return CARRIERS[dtype].is_subset_of(cast.format)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The output of attention, in the dtype of ``q``, and L, in the dtype of the steps.

    Args:
        q: shape (B, Lq, E); k: (B, Lk, E); v: (B, Lk, Ev).
        call: the rest; B is the product of ``call.leading``.

    Returns:
        O, shape (B, Lq, Ev), and L, shape (B, Lq): the logarithms of the row sums of exp(S), +infinity in rows without
        a key.
    """
    dtype, steps = working_dtype(q.dtype), call.steps
    shared, rounded = Rounder(call, steps, dtype, "scores"), Rounder(call, steps, dtype, "forward")
    queries, keys, values = shared.inputs("q", q), shared.inputs("k", k), shared.inputs("v", v)
    shape = q.shape[:2]
    maxima = queries.new_full((*shape, 1), -torch.inf)
    sums = queries.new_zeros((*shape, 1))
    output = queries.new_zeros((*shape, v.shape[-1]))
    for start, stop in _blocks(k.shape[1], steps.block_k):
        scores = _scores(queries, keys[:, start:stop], call, shared, start)
        new = torch.maximum(maxima, _maxima(scores, steps, rounded))
        finite = torch.where(new == -torch.inf, 0.0, new)  # a row in which no key has been seen yet
        factor = _exponentials(maxima - finite, rounded)
        exponentials = _exponentials(scores - finite, rounded, 2.0**steps.offset)
        sums = rounded("sums", rounded.arithmetic(factor * sums) + rounded("sums", rounded.row_sums(exponentials)))
        probabilities = _probabilities(exponentials, rounded)
        added = rounded.product(probabilities, values[:, start:stop], "probabilities", "inputs")
        output = rounded("accumulator", rounded.arithmetic(factor * output) + rounded("accumulator", added))
        maxima = new
    is_empty = sums == 0
    output = rounded("output", output / torch.where(is_empty, 1.0, sums))
    logarithms = rounded.arithmetic(torch.log(sums.double() * 2.0**-steps.offset).to(dtype))
    logsumexp = torch.where(is_empty, torch.inf, rounded("sums", logarithms + maxima))
    return output.to(q.dtype), logsumexp.squeeze(-1)


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Q, K and V, in the dtype of ``q``.

    Args:
        gradient: that of O, of its shape.
        q, k, v, call: as for `forward`.
        output, logsumexp: its results.
    """
    dtype, steps = working_dtype(q.dtype), call.steps.in_backward
    shared, rounded = Rounder(call, steps, dtype, "scores"), Rounder(call, steps, dtype, "backward")
    queries, keys, values = shared.inputs("q", q), shared.inputs("k", k), shared.inputs("v", v)
    gradients = rounded.inputs("gradient", gradient)
    delta = rounded("delta", rounded.row_sums(rounded.arithmetic(gradients * output.to(dtype))))
    total = logsumexp.unsqueeze(-1)
    of_queries = torch.zeros_like(queries)
    all_probabilities, all_score_gradients = [], []
    for start, stop in _blocks(k.shape[1], steps.block_k):
        scores = _scores(queries, keys[:, start:stop], call, shared, start)
        exponentials = _exponentials(scores - total, rounded)
        of_scores = rounded(
            "scores", rounded.product(gradients, values[:, start:stop].transpose(1, 2), "inputs", "inputs")
        )
        weights = exponentials if steps.late_scale else rounded.arithmetic(exponentials * call.scale)
        score_gradients = rounded("score_gradients", weights * rounded.arithmetic(of_scores - delta))
        added = rounded.product(score_gradients, keys[:, start:stop], "score_gradients", "inputs")
        of_queries = rounded("accumulator", of_queries + rounded("accumulator", added))
        all_probabilities.append(_probabilities(exponentials, rounded))
        all_score_gradients.append(score_gradients)
    of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
    if all_probabilities:
        probabilities, score_gradients = torch.cat(all_probabilities, -1), torch.cat(all_score_gradients, -1)
        for start, stop in _blocks(q.shape[1], steps.block_q):
            rows = slice(start, stop)
            added = rounded.product(
                probabilities[:, rows].transpose(1, 2), gradients[:, rows], "probabilities", "inputs"
            )
            of_values = rounded("accumulator", of_values + rounded("accumulator", added))
            added = rounded.product(
                score_gradients[:, rows].transpose(1, 2), queries[:, rows], "score_gradients", "inputs"
            )
            of_keys = rounded("accumulator", of_keys + rounded("accumulator", added))
    if steps.late_scale:
        of_queries, of_keys = of_queries * call.scale, of_keys * call.scale
    results = [rounded("output", x).to(q.dtype) for x in (of_queries, of_keys, of_values)]
    return results[0], results[1], results[2]


def _blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _scores(queries: Tensor, keys: Tensor, call: Call, rounded: Rounder, start: int) -> Tensor:
    """The scores of a block of keys that begins at ``start``: -infinity where a query does not see the key."""
    scores = rounded("scores", rounded.product(queries, keys.transpose(1, 2), "inputs", "inputs"))
    scores = rounded("scores", scores * call.scale)
    stop = start + keys.shape[1]
    if call.mask is not None:
        mask = call.mask.expand(*call.mask.shape[:-2], queries.shape[1], call.mask.shape[-1])
        mask = mask[..., start:stop] if mask.shape[-1] != 1 else mask
        shaped = scores.reshape(*call.leading, *scores.shape[1:])
        if mask.dtype == torch.bool:
            is_seen = mask
        else:
            added = mask.to(scores.dtype)
            is_seen = added != -torch.inf
            shaped = rounded("scores", shaped + added)
        scores = torch.where(is_seen, shaped, -torch.inf).reshape(scores.shape)
    if call.causal:
        rows = torch.arange(queries.shape[1], device=queries.device).unsqueeze(-1)
        scores = torch.where(rows >= torch.arange(start, stop, device=queries.device), scores, -torch.inf)
    return scores


def _maxima(scores: Tensor, steps: FlashAttention, rounded: Rounder) -> Tensor:
    """The largest score of each row, or what takes its place where several are near it."""
    largest = scores.amax(-1, keepdim=True)
    if steps.cure is None:
        return largest
    is_near = scores >= rounded.arithmetic(largest - CLOSE)
    repeated = is_near.to(torch.int64).sum(-1, keepdim=True) > 1
    other = torch.where(largest > 0, rounded.arithmetic(largest * steps.cure), torch.where(largest < 0, 0.0, largest))
    return torch.where(repeated & (largest > -torch.inf), other, largest)


def _exponentials(differences: Tensor, rounded: Rounder, factor: float = 1.0) -> Tensor:
    """exp of ``differences``, which are rounded first, times a power of two.

    It is computed in float64, and is then the nearest number of the dtype of the steps, whatever compiles it.
    """
    exact = torch.exp(rounded.arithmetic(differences).double())
    return rounded("exponentials", (exact * factor if factor != 1.0 else exact).to(differences.dtype))


def _probabilities(exponentials: Tensor, rounded: Rounder) -> Tensor:
    if rounded.steps.cast("probabilities") == rounded.steps.cast("exponentials"):
        return exponentials
    return rounded.operand("probabilities", exponentials)
