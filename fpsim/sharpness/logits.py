"""Sharpness of the cross-entropy in logit space: the metric of *To FP8 and Back Again* (arXiv 2405.18710, section 3).

The paper takes Keskar's sharpness (arXiv 1609.04836, metric 2.1) with the logit vector ``z`` of one token in place of
the parameters. With the loss ``f(z) = log(sum(exp(z))) - z[t]`` and the box ``|y[i]| <= epsilon * (|z[i]| + 1)``, it is

    100 * (max over the box of f(z + y) - f(z)) / (1 + f(z))

and has a closed form. At every point, the derivative of ``f`` is ``p[i] > 0`` along every logit but the target's, and
``p[t] - 1 < 0`` along the target's. So the maximum lies at the corner where the target's logit is at its lower bound
and all others are at their upper bounds. With ``c[i] = epsilon * (|z[i]| + 1) + epsilon * (|z[t]| + 1)``, the increase
is

    log(1 + sum over i != t of p[i] * (exp(c[i]) - 1))

which is a sum of positive terms, so no digits cancel even if it is small. The paper searches the box by L-BFGS-B, which
finds lower bounds of the maximum.

All computations are in float64, for logits of every dtype, and process a few tokens at a time. So the workspace has
constant size. No derivatives are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpsim.curvature.losses import IGNORED
from fpsim.sharpness.box import EPSILON, ITERATIONS, check_search, lbfgsb
from fpsim.showing import Shown

Method = Literal["exact", "lbfgsb"]
Tokens = Literal["all", "last"]
METHODS: tuple[str, ...] = ("exact", "lbfgsb")
TOKENS: tuple[str, ...] = ("all", "last")

#: How many logits are processed at once, by device type; the workspace is about five times as many float64 numbers.
#: On a CPU they stay in its cache; on other devices there are enough to keep a GPU busy.
CHUNK = {"cpu": 1 << 17}
CHUNK_ELSEWHERE = 1 << 23


@dataclass(frozen=True, eq=False)
class LogitMetrics(Shown):
    """The measures of `logit_metrics`: one float64 number per token, NaN for tokens that do not count.

    Attributes:
        counted: bool: which tokens count.
        sharpness: the sharpness of `logit`, in percent of 1 + loss.
        loss: cross-entropy, nats.
        max_abs_logit: max |z| over the vocabulary.
        mean_logit: mean of z over the vocabulary.
        gradient_norm: Euclidean norm of the loss's gradient with respect to the logits, softmax(z) - onehot(target).
    """

    counted: Tensor
    sharpness: Tensor
    loss: Tensor
    max_abs_logit: Tensor
    mean_logit: Tensor
    gradient_norm: Tensor


def logit(
    logits: Tensor,
    targets: Tensor,
    *,
    epsilon: float = EPSILON,
    method: Method = "exact",
    tokens: Tokens = "all",
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Sharpness of each token's cross-entropy in the space of its logits, in percent of 1 + loss.

    It measures the given logits. If they are those of a rounded model, they are measured without change, and no
    derivative of the rounding is involved. Unlike the loss, it changes when a constant is added to all logits.

    Args:
        logits: float64, float32, bfloat16 or float16, shape (..., vocabulary), any strides and device. Entries of
            -inf (excluded words) are left out.
        targets: integers, shape (...): the index of each target word. Nothing is shifted: ``logits[..., i, :]`` is
            the prediction of ``targets[..., i]``.
        epsilon: half the width of the box, relative to |z| + 1. Keskar uses 5e-4 and 1e-3.
        method: ``exact``, the closed form; or ``lbfgsb``, the paper's search on the CPU, which gives a lower bound.
        tokens: ``all``; or ``last``: for every sequence (the last dimension of ``targets``), only the last token that
            counts, as in the paper.
        mask: bool or integers in the shape of ``targets``; tokens where it is zero do not count.
        ignore_index: tokens with this target do not count.
        iterations: the iterations of L-BFGS-B, which starts at zero and has no tolerances; Keskar takes 10.

    Returns:
        float64 on the device of ``logits``, shape (...), or for ``last`` without the last dimension. NaN where no
        token counts, and where the loss is not finite.

    Raises:
        ValueError: shapes do not fit, a target is not in the vocabulary, epsilon is not a positive number, or a choice
            is unknown.
        TypeError: the logits are not floating-point, or the targets are not integers.

    Source: arXiv 2405.18710 section 3, arXiv 1609.04836 equation 4; this module derives the closed form.

    >>> logit(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor([0.0285], dtype=torch.float64)
    """
    batch = CountedTokens(logits, targets, tokens, mask, ignore_index)
    return batch.fill(_sharpness(epsilon, method, iterations))[0]


def logit_metrics(
    logits: Tensor,
    targets: Tensor,
    *,
    epsilon: float = EPSILON,
    method: Method = "exact",
    tokens: Tokens = "all",
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    iterations: int = ITERATIONS,
) -> LogitMetrics:
    """`logit` and simpler measures to compare it with; arguments and errors are those of `logit`."""
    batch = CountedTokens(logits, targets, tokens, mask, ignore_index)
    return LogitMetrics(batch.counted, *batch.fill(_sharpness(epsilon, method, iterations), _baselines))


#: From float64 logits (rows, vocabulary) and targets (rows, 1) to vectors of shape (rows,).
_Measure = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class CountedTokens:
    """The tokens that count; `fill` computes measures of their logits, in the shape of the targets."""

    def __init__(self, logits: Tensor, targets: Tensor, tokens: str, mask: Tensor | None, ignore_index: int) -> None:
        _check(logits, targets, mask)
        if tokens not in TOKENS:
            raise ValueError(f"unknown tokens {tokens!r}: use one of {', '.join(TOKENS)}")
        if tokens == "last" and not targets.dim():
            raise ValueError("tokens='last' needs a dimension of tokens in targets, got a single target: use 'all'")
        self._logits, self._targets = logits.detach(), targets.to(logits.device, torch.int64)
        self._counted = self._targets != ignore_index
        if mask is not None:
            self._counted &= mask.to(logits.device) != 0
        if tokens == "last":
            self._counted &= last_of(self._counted)
        self._last = tokens == "last"
        wrong = self._targets[self._counted & ((self._targets < 0) | (self._targets >= logits.shape[-1]))]
        if wrong.numel():
            raise ValueError(
                f"target {int(wrong[0])} is not in the vocabulary: targets are 0 to {logits.shape[-1] - 1}, "
                f"or {ignore_index} (ignore_index) for a token that does not count"
            )

    @property
    def counted(self) -> Tensor:
        """Which tokens count, in the shape of the results."""
        return self._counted.any(-1) if self._last else self._counted

    def rows(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
        """The tokens that count, in chunks: indices into the targets, logits, and targets.

        The logits are float64, shape (rows, vocabulary), and the targets have shape (rows, 1). Rows are selected by
        index, not by a view, so that logits that were sliced for the shift are not copied as a whole.
        """
        places = self._counted.nonzero(as_tuple=True) if self._counted.dim() else ()
        count = len(places[0]) if places else int(self._counted)
        step = max(1, CHUNK.get(self._logits.device.type, CHUNK_ELSEWHERE) // self._logits.shape[-1])
        for start in range(0, count, step):
            chunk = tuple(place[start : start + step] for place in places)
            z, target = (self._logits[chunk], self._targets[chunk]) if chunk else (self._logits, self._targets)
            yield chunk, z.to(torch.float64).view(-1, self._logits.shape[-1]), target.view(-1, 1)

    @torch.no_grad()
    def fill(self, *measures: _Measure) -> list[Tensor]:
        """The results of ``measures`` in the shape of `counted`; NaN for tokens that do not count."""
        results: list[Tensor] = []
        for chunk, z, target in self.rows():
            found = [values for measure in measures for values in measure(z, target)]
            if not results:
                results = [self._blank() for _ in found]
            for result, values in zip(results, found, strict=True):
                result[chunk] = values if chunk else values[0]
        if not results:
            one_row = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
            results = [self._blank() for measure in measures for _ in measure(*one_row)]
        return [self._squeeze(result) for result in results] if self._last else results

    def _blank(self) -> Tensor:
        return torch.full(self._targets.shape, math.nan, dtype=torch.float64, device=self._logits.device)

    def _squeeze(self, result: Tensor) -> Tensor:
        place = self._counted.to(torch.uint8).argmax(-1, keepdim=True)  # of the counted token, or of a NaN
        return result.gather(-1, place).squeeze(-1)


def last_of(counted: Tensor) -> Tensor:
    """Only the last true entry along the last dimension: bool, in the shape of ``counted``.

    >>> last_of(torch.tensor([[True, True, False], [False, False, False]]))
    tensor([[False,  True, False],
            [False, False, False]])
    """
    following = counted.flip(-1).cumsum(-1).flip(-1)  # the number of true entries from here on
    return counted & (following == 1)


def _check(logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {kind}")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an integer tensor of word indices, got {kind}")
    if not logits.dim() or not logits.shape[-1] or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits of shape (..., vocabulary) need targets of shape (...), got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must have the shape of targets, got {tuple(mask.shape)} and {tuple(targets.shape)}")


def _sharpness(epsilon: float, method: str, iterations: int) -> _Measure:
    check_search(epsilon, iterations, method, METHODS)

    def measure(z: Tensor, target: Tensor) -> tuple[Tensor]:
        rise = exact_rise(z, target, epsilon) if method == "exact" else _lbfgsb_rises(z, target, epsilon, iterations)
        return (100 * rise / (1 + _cross_entropy(z, target)),)

    return measure


def _cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    return z.logsumexp(-1) - z.gather(-1, target).squeeze(-1)


def exact_rise(z: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """The maximum over the box of f(z + y) - f(z), nats: ``z`` float64 (rows, vocabulary), ``target`` (rows, 1).

    It is log(1 + exp(a)), where a = log(sum over i != t of exp(z[i] + c[i]) * (1 - exp(-c[i]))) - logsumexp(z). The sum
    is scaled by the largest exponent, so that it does not overflow.
    """
    barred = (z == -math.inf).scatter_(-1, target, True)
    reach = z.abs().mul_(epsilon).add_(epsilon)
    reach += reach.gather(-1, target)
    weight = torch.expm1(-reach).neg_()
    exponent = reach.add_(z).masked_fill_(barred, -math.inf)
    top = exponent.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0)  # no other word is possible
    total = exponent.sub_(top).exp_().mul_(weight).sum(-1)
    rise = total.log() + top.squeeze(-1) - z.logsumexp(-1)
    return torch.logaddexp(rise, 0 * z.gather(-1, target).squeeze(-1))  # 0, or NaN where the loss is not finite


def _lbfgsb_rises(z: Tensor, target: Tensor, epsilon: float, iterations: int) -> Tensor:
    rises = [
        _lbfgsb_rise(row, int(t), epsilon, iterations)
        for row, t in zip(z.cpu().numpy(), target.flatten().tolist(), strict=True)
    ]
    return torch.tensor(rises, dtype=torch.float64, device=z.device)


def _lbfgsb_rise(z: np.ndarray, target: int, epsilon: float, iterations: int) -> float:
    """The largest f(z + y) - f(z) among the points that L-BFGS-B evaluates from y = 0 on."""
    possible = z != -math.inf
    if not possible[target] or not np.isfinite(z[possible]).all():
        return math.nan
    t = int(possible[:target].sum())
    z = z[possible]
    log_p = z - z.max()
    log_p -= math.log(np.exp(log_p).sum())
    p = np.exp(log_p)
    best = 0.0

    def negative_rise(y: np.ndarray) -> tuple[float, np.ndarray]:
        """-(f(z + y) - f(z)) and its gradient; the rise is log(1 + sum of p[i] (exp(y[i] - y[t]) - 1))."""
        nonlocal best
        relative = y - y[t]
        exponent = log_p + relative
        if relative.max() < 600:
            rise = math.log1p(p @ np.expm1(relative))
        else:  # exp would overflow; here no digits cancel
            rise = exponent.max() + math.log(np.exp(exponent - exponent.max()).sum())
        best = max(best, rise)
        gradient = np.exp(exponent - rise)
        gradient[t] -= 1
        return -rise, -gradient

    lbfgsb(negative_rise, np.zeros_like(z), epsilon * (np.abs(z) + 1), iterations)
    return best


def _baselines(z: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = _cross_entropy(z, target)
    possible = z != -math.inf
    finite = z.masked_fill(~possible, 0)
    mean = finite.sum(-1) / possible.sum(-1)
    largest = finite.abs_().amax(-1)
    return loss, largest, mean, torch.linalg.vector_norm(cross_entropy_gradient(z, target), dim=-1)


def cross_entropy_gradient(z: Tensor, target: Tensor) -> Tensor:
    """softmax(z) - onehot(target): ``z`` (rows, vocabulary), ``target`` (rows, 1)."""
    gradient = z.softmax(-1).scatter_(-1, target, 0)
    return gradient.scatter_(-1, target, -gradient.sum(-1, keepdim=True))  # 1 - p[t] as a sum, so that no digits cancel
