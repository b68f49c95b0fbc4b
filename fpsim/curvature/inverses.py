"""Products with the inverse of a damped operator, by conjugate gradients.

Hestenes and Stiefel 1952; in the form of Golub and Van Loan, *Matrix Computations*, algorithm 11.3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpsim.curvature.counting import Products, as_operator, doubts, products_of
from fpsim.curvature.linear import Operator
from fpsim.curvature.vectors import dot, norm
from fpsim.showing import Shown


@dataclass(frozen=True, eq=False)
class InverseResult(Shown):
    """Solutions x of ``(A + damping I) x = b``.

    Attributes:
        solution: x, with the shape of the right-hand sides, in the operator's dtype and on its device.
        residuals: float64, shape ``(k,)``: ``|b - (A + damping I) x| / |b|``, computed by one more product each.
        products: the number of products with the operator.
        converged: whether every residual met the tolerance, and the operator's loss and data stayed the same.
        reasons: why ``converged`` is False, in words; empty if it is True.
        cost: that of the products in gradients (`Operator.cost`).
    """

    solution: Tensor = field(repr=False)
    residuals: Tensor
    products: int
    converged: bool
    reasons: tuple[str, ...] = ()
    cost: float = math.nan


def inverse(
    operator: Operator | Tensor,
    vectors: Tensor,
    *,
    damping: float,
    tol: float = 1e-6,
    max_products: int | None = None,
    progress: bool = False,
) -> InverseResult:
    """``(A + damping I)^-1 b`` for a symmetric operator that is positive definite once it is damped.

    A Gauss-Newton or Fisher matrix needs a positive damping, because it is singular for most networks. A Hessian needs
    a damping larger than the magnitude of its most negative eigenvalue.

    Args:
        operator: A, an `Operator` or a dense symmetric matrix.
        vectors: one right-hand side, shape ``(size,)``, or several, shape ``(size, k)``, solved one after another.
        damping: the multiple of the identity that is added, in units of the eigenvalues.
        tol: the relative residual ``|b - (A + damping I) x| / |b|`` to reach. The error of x is at most the condition
            number of the damped operator times as large.
        max_products: the largest number of products for each right-hand side, at least 2; None is 1000.
        progress: whether to show a progress bar.

    Returns:
        An `InverseResult`. It costs one product for each step, and one that checks the residual.

    Raises:
        ValueError: a shape or a number is wrong, or a direction has no positive curvature; the message says by how
            much the damping is too small at least.
        FloatingPointError: a right-hand side or a product has infinities or NaN.

    >>> found = inverse(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([4.0, 8.0]), damping=1.0)
    >>> found.solution.round(decimals=4)
    tensor([2., 2.])
    """
    operator = as_operator(operator)
    most = 1000 if max_products is None else max_products
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or vectors.shape[0] != operator.size:
        got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"right-hand sides have shape ({operator.size},) or ({operator.size}, k), got {got}")
    if not (0 <= damping < math.inf and tol > 0 and most >= 2):
        raise ValueError(
            "damping must be finite and not negative, tol must be positive and max_products at least 2, got "
            f"{damping}, {tol} and {max_products}"
        )
    if not torch.isfinite(vectors).all():
        raise FloatingPointError("the right-hand sides have infinities or NaN: look at where they come from")
    columns = vectors.detach().to(dtype=operator.dtype, device=operator.device).reshape(operator.size, -1)
    with products_of(operator, f"inverse of the {operator.name}", most * columns.shape[1], progress) as products:
        solved = [_solve(products, column, damping, tol, most - 1) for column in columns.T]
    solutions = torch.stack([x for x, _, _ in solved], dim=1) if solved else columns
    residuals = torch.tensor([residual for _, residual, _ in solved], dtype=torch.float64)
    reasons = doubts(operator, float("nan"))
    late = ~(residuals <= tol)
    if late.any():
        cut = any(bool(exceeds) and ended for exceeds, (_, _, ended) in zip(late, solved, strict=True))
        why = (
            f"after {most} products each: raise max_products, or damping"
            if cut
            else "although the iteration has ended: the products carry rounding errors of this size. Raise tol "
            "(float32 reaches about 1e-6, bfloat16 1e-2), or take parameters of a wider dtype"
        )
        reasons = (f"the residuals of {int(late.sum())} of {len(late)} right-hand sides exceed {tol:g} {why}", *reasons)
    return InverseResult(
        solutions.reshape(vectors.shape), residuals, products.count, not reasons, reasons, products.cost
    )


def _solve(products: Products, b: Tensor, damping: float, tol: float, steps: int) -> tuple[Tensor, float, bool]:
    """The solution, its relative residual from one more product, and whether ``steps`` ended the iteration."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), norm(b)
    square = size**2
    for _ in range(steps):
        if square**0.5 <= tol / 2 * size:  # the recursive residual drifts from the true one by rounding errors
            break
        image = products(direction) + damping * direction
        curvature = dot(direction, image)
        _check_positive(curvature, dot(direction, direction), norm(image), damping, products.operator)
        length = square / curvature
        x = x + length * direction
        residual = residual - length * image
        square, before = norm(residual) ** 2, square
        direction = residual + (square / before) * direction
    ended = square**0.5 > tol / 2 * size
    if not size:
        return x, 0.0, False
    return x, norm(b - products(x) - damping * x) / size, ended


def _check_positive(curvature: float, square: float, image: float, damping: float, operator: Operator) -> None:
    """Refuse a direction d with ``d . (A + damping I) d <= 0``, up to rounding errors.

    Raises:
        ValueError: it has no positive curvature.
    """
    if curvature > 10 * torch.finfo(operator.dtype).eps * square**0.5 * image:
        return
    quotient = curvature / square - damping
    raise ValueError(
        f"the {operator.name} has curvature {quotient:.3g} along a direction, so that it is not positive definite with "
        f"damping {damping:g}: use a damping clearly above {max(-quotient, 0.0):.3g} (the magnitude of the smallest "
        "eigenvalue, see eigenpairs(which='smallest')), or the Gauss-Newton matrix with a positive damping"
    )
