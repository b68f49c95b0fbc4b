"""Tiled attention in plain torch: loops over tiles of one head, written from docs/attention.md alone.

It shares no code with `fpsim.attention`; `fpsim.round` rounds values. Products and sums are those of torch in the dtype
of its arguments, exponentials and sums of rows are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.reference import to_float

Round = Callable[[Tensor], Tensor]


def to(cast: str | None, otherwise: Round | None = None) -> Round:
    """The rounding by ``format/rounding``; ``otherwise``, or none, if ``cast`` is None."""
    if cast is None:
        return otherwise or (lambda x: x)
    name, _, rounding = cast.partition("/")
    return lambda x: fpsim.round(x, name, rounding=rounding or "nearest_even")


def after(first: Round, second: Round) -> Round:
    return lambda x: second(first(x))


def roundings(fields: dict[str, object]) -> SimpleNamespace:
    """R, and one function for each step, that rounds what R has rounded."""
    text = {name: value if isinstance(value, str) else None for name, value in fields.items()}
    R = to(text.get("arithmetic") or "fp32")
    names = ("scores", "exponentials", "sums", "accumulator", "output", "delta", "score_gradients")
    steps = {name: after(R, to(text.get(name))) for name in names}
    own = fields.get("products")
    multiply = torch.matmul if own is None else (lambda a, b: fpsim.matmul(a, b, accumulator=own))
    operands = {name: to(text.get(name)) for name in ("inputs", "probabilities")}
    return SimpleNamespace(R=R, multiply=multiply, sum=row_sums(fields.get("reductions")), **operands, **steps)


def row_sums(accumulator: object) -> Round:
    """The sums of rows: in float64 and rounded once, or one addition after the other in the format ``accumulator``."""
    if accumulator is None:
        return lambda x: x.double().sum(1, keepdim=True).to(x.dtype)
    add = lambda row: to_float(reference.sum(row, "fp32", accumulator=str(accumulator)))  # noqa: E731
    return lambda x: torch.tensor([[add(row)] for row in x.tolist()], dtype=x.dtype)


def tile_scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, f: SimpleNamespace) -> Tensor:
    scores = f.scores(f.scores(f.multiply(q, k.T)) * scale)
    if mask is not None:
        scores = f.scores(scores + mask)
        scores[mask == -torch.inf] = -torch.inf
    return scores


def exponential(x: Tensor) -> Tensor:
    return torch.exp(x.double()).to(x.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, fields: dict[str, object]
) -> tuple[Tensor, Tensor]:
    """O and L of one head; ``mask`` is added, and is -infinity where a query does not see a key."""
    f, block_q, block_k = roundings(fields), int(fields["block_q"]), int(fields["block_k"])  # type: ignore[call-overload]
    offset, cure = fields.get("offset", 0), fields.get("cure")
    q, k, v = f.inputs(q), f.inputs(k), f.inputs(v)
    outputs, logarithms = [], []
    for i in range(0, len(q), block_q):
        rows = slice(i, i + block_q)
        m = torch.full((len(q[rows]), 1), -torch.inf, dtype=q.dtype)
        total, o = torch.zeros_like(m), torch.zeros(len(m), v.shape[1], dtype=q.dtype)
        for j in range(0, len(k), block_k):
            columns = slice(j, j + block_k)
            s = tile_scores(q[rows], k[columns], scale, None if mask is None else mask[rows, columns], f)
            largest = s.max(1, keepdim=True).values
            if cure is not None:
                repeated = (s >= f.R(largest - torch.tensor(0.001).item())).sum(1, keepdim=True) > 1
                largest[repeated & (largest > 0)] = f.R(largest * cure)[repeated & (largest > 0)]
                largest[repeated & (largest < 0) & (largest > -torch.inf)] = 0.0
            new = torch.maximum(m, largest)
            base = new.masked_fill(new == -torch.inf, 0.0)
            a = f.exponentials(exponential(f.R(m - base)))
            p = f.exponentials(torch.exp(f.R(s - base).double()).mul(2.0**offset).to(q.dtype))  # type: ignore[operator]
            total = f.sums(f.R(a * total) + f.sums(f.sum(p)))
            o = f.accumulator(f.R(a * o) + f.accumulator(f.multiply(f.probabilities(p), v[columns])))
            m = new
        empty = total == 0
        outputs.append(f.output(o / total.masked_fill(empty, 1.0)))
        log = torch.log(total.double() / 2.0**offset).to(q.dtype)  # type: ignore[operator]
        logarithms.append(f.sums(f.R(log) + m).masked_fill(empty, torch.inf))
    return torch.cat(outputs), torch.cat(logarithms)[:, 0]


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logarithms: Tensor,
    scale: float,
    mask: Tensor | None,
    fields: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV of one head."""
    f, block_q, block_k = roundings(fields), int(fields["block_q"]), int(fields["block_k"])  # type: ignore[call-overload]
    late = fields.get("late_scale", True)
    q, k, v, gradient = f.inputs(q), f.inputs(k), f.inputs(v), f.inputs(gradient)
    delta = f.delta(f.sum(f.R(gradient * o)))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(0, len(k), block_k):  # the order of the kernel: keys outside, queries inside
        columns = slice(j, j + block_k)
        for i in range(0, len(q), block_q):
            rows = slice(i, i + block_q)
            s = tile_scores(q[rows], k[columns], scale, None if mask is None else mask[rows, columns], f)
            p = f.exponentials(exponential(f.R(s - logarithms[rows, None])))
            dp = f.scores(f.multiply(gradient[rows], v[columns].T))
            weight = p if late else f.R(p * scale)
            ds = f.score_gradients(weight * f.R(dp - delta[rows]))
            dv[columns] = f.accumulator(dv[columns] + f.accumulator(f.multiply(f.probabilities(p).T, gradient[rows])))
            dk[columns] = f.accumulator(dk[columns] + f.accumulator(f.multiply(ds.T, q[rows])))
            dq[rows] = f.accumulator(dq[rows] + f.accumulator(f.multiply(ds, k[columns])))
    last = scale if late else 1.0
    return f.output(dq * last), f.output(dk * last), f.output(dv)
