"""Low-rank compensation: a product of two thin matrices that makes up for a part of the rounding error of a weight.

Source: ZeroQuant-V2 (arXiv 2303.08302), section 4 (LoRC).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.casts import CastLike
from fpsim.posttraining.columns import check_matrix, columns_of, weight_cast


@torch.no_grad()
def low_rank_factors(error: Tensor, rank: int, cast: CastLike | None = None) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the best approximation of ``error`` by a matrix of this rank, if not rounded.

    With the singular value decomposition error = U S V^T, they are U_r S_r^(1/2) and S_r^(1/2) V_r^T.

    Args:
        error: the weight minus the rounded weight, of shape (outputs, inputs), finite.
        rank: from 1 to the smaller of the two.
        cast: the format to which both factors are rounded, such as ``int8``; rows and blocks that share a scale lie
            along the last axis of each factor. None leaves them.

    Returns:
        Factors of shape (outputs, rank) and (rank, inputs), in the dtype of ``error``. The decomposition is computed in
        float64.

    Raises:
        ValueError: the rank is out of range, or the cast cannot round a weight.
    """
    check_matrix(error, "error")
    most = min(error.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"the rank is from 1 to {most} for an error of shape {tuple(error.shape)}, got {rank!r}")
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    root = s[:rank].sqrt()
    factors = [(u[:, :rank] * root).to(error.dtype), (root[:, None] * v[:rank]).to(error.dtype)]
    if cast is not None:
        parsed = weight_cast(cast, "low_rank_factors")
        factors = [columns_of(factor, parsed).round_all(factor) for factor in factors]
    return factors[0], factors[1]


class CompensatedLinear(nn.Module):
    """A linear layer with a low-rank product beside its weight: y = x W^T + (x R^T) L^T + b.

    The weight W and the factors L and R are operands of three products, which a policy rounds as it says.

    Args:
        weight: W, of shape (outputs, inputs).
        left, right: L and R, of shapes (outputs, rank) and (rank, inputs).
        bias: b, of shape (outputs,), or None.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output of shape (..., outputs) for ``x`` of shape (..., inputs)."""
        return functional.linear(x, self.weight, self.bias) + functional.linear(
            functional.linear(x, self.right), self.left
        )

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, rank={len(self.right)}, bias={self.bias is not None}"
