"""`torch.cov` for tracing.

The kernel of torch looks at values: whether weights are negative, and whether the divisor is positive. Dynamo cannot
trace that, and leaves the code out, with the product in it. `torch.corrcoef` calls the same operator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(
    x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """The covariance matrix of the rows of ``x``, as `torch.cov` defines it, without a look at values.

    What torch refuses by its value is an assertion of the graph. A divisor below zero counts as zero, as in torch, but
    without a warning.

    Args:
        x: shape (variables, observations), or (observations,).
        correction: subtracted from the number of observations in the divisor.
        fweights: how often each observation counts, integers, shape (observations,).
        aweights: the weight of each observation, floating-point, shape (observations,).

    Raises:
        RuntimeError: wrong shapes or dtypes.
    """
    torch._check(x.dim() <= 2, lambda: f"cov(): expected input to have two or fewer dimensions, got {x.dim()}")
    torch._check(x.dtype != torch.bool, lambda: "cov(): bool dtype is not supported for input")
    rows = x.view(1, -1) if x.dim() < 2 else x
    for weights, name in ((fweights, "fweights"), (aweights, "aweights")):
        if weights is not None:
            _check(weights, name, rows.shape[1])
    given = [weights for weights in (fweights, aweights) if weights is not None]
    weights = given[0] * given[1] if len(given) == 2 else given[0] if given else None
    weighted = rows if weights is None else rows * weights
    if weights is None:
        total = torch.scalar_tensor(rows.shape[1], dtype=torch.int64, device=x.device)
    else:
        total = weights.sum()
        torch.ops.aten._assert_async.msg(total != 0, "cov(): weights sum to zero, can't be normalized")
    divisor = total - correction
    if weights is not None and aweights is not None and correction != 0:
        divisor = total - correction * (weights * aweights).sum() / total
    centred = rows - (weighted.sum(1) / total).unsqueeze(1)
    other = centred if weights is None else centred * weights
    return torch.true_divide(torch.mm(centred, other.t().conj()), divisor.clamp(min=0)).squeeze()


def _check(weights: Tensor, name: str, observations: int) -> None:
    torch._check(weights.dim() <= 1, lambda: f"cov(): expected {name} to have one or fewer dimensions")
    torch._check(
        weights.is_floating_point() == (name == "aweights"),
        lambda: f"cov(): expected {name} to be {'floating point' if name == 'aweights' else 'integral'}",
    )
    torch._check(weights.numel() == observations, lambda: f"cov(): expected {name} to have one element per observation")
    torch.ops.aten._assert_async.msg((weights >= 0).all(), f"cov(): {name} cannot be negative")
