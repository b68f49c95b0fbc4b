"""GPTQ: a weight rounded column by column, where the columns that are still to come make up for the error.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1. The step is that of the Optimal Brain Surgeon (Frantar and
Alistarh, arXiv 2208.11580, equation 3).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fpsim.casts import CastLike
from fpsim.posttraining.columns import Constraint, check_matrix, columns_of, weight_cast

Order = Literal["given", "activation"]
ORDERS: tuple[str, ...] = get_args(Order)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    cast: CastLike,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: Order = "given",
    constraint: Constraint | None = None,
) -> Tensor:
    """``weight`` rounded to ``cast`` so that the error of the layer's outputs is small, for inputs with this Hessian.

    The columns are rounded one after the other. The rounding error of column j, divided by the diagonal element of j in
    the inverse Hessian of j and the columns to come, is subtracted from these columns, times their elements of that
    inverse. The scales of a group of columns are computed when its first column is reached, from the values that its
    columns have then. Scales of rows and tensors, the tensor's scale of NVFP4, and scales that are quantized together
    (``double``) are computed once, from ``weight``.

    Args:
        weight: a matrix of shape (outputs, inputs), float64, float32, bfloat16 or float16, finite.
        hessian: the symmetric matrix 2 X^T X of the inputs X, shape (inputs, inputs), float64 or float32
            (`fpsim.posttraining.input_hessians`). A constant factor changes nothing. A column whose input is always 0
            is rounded as it is. (The code of the paper makes it 0.)
        cast: a format with or without a scale: ``int4/block:128``, ``nf4``, ``mxfp4``, ``e2m1fn/row``, ``nvfp4``.
        damping: this part of the mean of the Hessian's diagonal is added to the diagonal.
        block: how many columns pass before the columns behind them are updated. It changes the time, and no more than
            the last bits of the float64 sums.
        order: ``given``: from the first column to the last; ``activation``: by descending diagonal of the Hessian.
            Groups are those of the weight in both orders.
        constraint: a function of the ratios of a group of columns, such as `fpsim.posttraining.power_of_two_ratios`.

    Returns:
        A tensor of the shape and dtype of ``weight``; each element is rounded in that dtype. All other arithmetic is
        float64. With a diagonal Hessian it has the bits of ``fpsim.round(weight, cast)``.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, the Hessian is not positive definite after damping,
            the cast cannot round one column after the other, or an argument is out of range.
        TypeError: a tensor has another dtype.
    """
    parsed = weight_cast(cast, "gptq")
    check_matrix(weight)
    count = weight.shape[1]
    check_hessian(hessian, count)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is a part of the mean diagonal, 0 or more, got {damping!r}: use 0.01")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block is a number of columns, 1 or more, got {block!r}: use 128")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: use one of {', '.join(ORDERS)}")
    if not weight.numel():
        return weight.clone()
    columns = columns_of(weight, parsed, constraint)
    diagonal = hessian.diagonal()
    sequence = (
        torch.sort(diagonal, descending=True, stable=True).indices
        if order == "activation"
        else torch.arange(count, device=weight.device)
    )
    position, numbers = torch.argsort(sequence), sequence.tolist()
    factor = _factor(hessian[sequence][:, sequence].double(), damping)
    work = weight.double()[:, sequence]  # in the order of rounding
    result = torch.empty_like(weight)
    errors = torch.empty_like(work)
    scales: dict[int, tuple[Tensor, ...]] = {}
    for start in range(0, count, block):
        end, since = min(start + block, count), start
        for i in range(start, end):
            j = numbers[i]
            group = j // columns.width
            if group not in scales:
                # The columns of the group that lie behind the block have not seen its errors yet.
                work[:, end:] -= errors[:, since:i] @ factor[since:i, end:]
                since = i
                first = group * columns.width
                places = position[first : first + columns.width]
                scales[group] = columns.scales(work[:, places].to(weight.dtype), first)
            rounded = columns.round(work[:, i : i + 1].to(weight.dtype), scales[group])
            result[:, j] = rounded[:, 0]
            errors[:, i] = (work[:, i] - rounded[:, 0].double()) / factor[i, i]
            work[:, i + 1 : end] -= errors[:, i, None] * factor[i, i + 1 : end]
        work[:, end:] -= errors[:, since:end] @ factor[since:end, end:]
    return result


def check_hessian(hessian: Tensor, count: int) -> None:
    """Raise an error unless ``hessian`` is a finite symmetric matrix for ``count`` inputs."""
    if not isinstance(hessian, Tensor) or hessian.dtype not in (torch.float64, torch.float32):
        given = getattr(hessian, "dtype", type(hessian).__name__)
        raise TypeError(f"a Hessian is a float64 or float32 tensor, got {given}")
    if hessian.shape != (count, count):
        raise ValueError(
            f"the Hessian of a weight with {count} inputs has shape ({count}, {count}), got {tuple(hessian.shape)}"
        )
    if not hessian.isfinite().all():
        raise ValueError("the Hessian has an infinity or a NaN: look for one in the inputs of the layer")
    root = hessian.diagonal().clamp_min(0).sqrt()
    if (hessian.diagonal() < 0).any() or ((hessian - hessian.T).abs() > 1e-3 * root * root[:, None]).any():
        raise ValueError("a Hessian 2 X^T X is symmetric, with a diagonal of 0 or more: use input_hessians")


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = inverse of the damped Hessian.

    U[j, j:] / U[j, j] are the elements of row j in the inverse Hessian of the columns j, j + 1, ..., divided by the
    diagonal one. U is the inverse of an upper triangular C with H = C C^T.
    """
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    damped = hessian + torch.diag(torch.where(unused, 1.0, damping * diagonal.mean()))
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if info:
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}: use more batches, or a larger damping such "
            f"as {max(10 * damping, 0.01):g}"
        )
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )
