"""Lanczos: an orthonormal basis in which a symmetric operator is a small tridiagonal matrix.

C. Lanczos 1950. Classical Gram-Schmidt, done twice (Giraud et al. 2005), reorthogonalises each vector against the whole
basis. So the basis stays orthogonal to working precision, and no eigenvalue appears too often (as a "ghost"). Thick
restarts (Wu and Simon 2000, "Thick-restart Lanczos method", section 2) bound the memory. This file knows only a product
and vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpsim.curvature.vectors import dot, norm

Matvec = Callable[[Tensor], Tensor]

#: How many products in a row must meet the tolerance. While a combination of two close eigenvectors turns into the
#: leading one, its residual is small for a few products. On spectra like a network's, with 4 % between the first two
#: eigenvalues, a stop after one such product returns the second eigenvalue in 6 % of 300 random starts, after two in
#: 3 %, after three in 1.3 %. Each further one costs one product.
CONFIRMATIONS = 2

#: The smallest number of products: a random start says little about the top of the spectrum.
MIN_PRODUCTS = 5

#: The number of vectors by which the basis grows.
_BLOCK_ROWS = 8


class Basis:
    """Orthonormal vectors as rows of blocks, so that memory grows with the number of vectors."""

    def __init__(self, like: Tensor) -> None:
        self.size, self.empty = like.numel(), like.new_empty(0)  # a reference to the vector would keep it alive
        self.blocks: list[Tensor] = []
        self.count = 0

    def append(self, vector: Tensor) -> None:
        if self.count == _BLOCK_ROWS * len(self.blocks):
            self.blocks.append(self.empty.new_zeros(_BLOCK_ROWS, self.size))
        self.blocks[-1][self.count % _BLOCK_ROWS] = vector
        self.count += 1

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index // _BLOCK_ROWS][index % _BLOCK_ROWS]

    def orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """``vector`` minus its projection on the basis, and the projection's coefficients, float64 ``(count,)``."""
        total = torch.zeros(self.count, dtype=torch.float64)
        vector = vector.clone()
        for _ in range(2):
            for index, block in enumerate(self.blocks):  # unused rows are zero
                coefficients = block @ vector
                vector.addmv_(block.T, coefficients, alpha=-1)
                rows = slice(index * _BLOCK_ROWS, min(self.count, (index + 1) * _BLOCK_ROWS))
                total[rows] += coefficients[: rows.stop - rows.start].to("cpu", torch.float64)
        return vector, total

    def combine(self, coefficients: Tensor) -> Tensor:
        """``coefficients`` (float64, shape ``(count, k)``) times the basis: shape ``(k, size)``."""
        padded = torch.zeros(_BLOCK_ROWS * len(self.blocks), coefficients.shape[1], dtype=torch.float64)
        padded[: self.count] = coefficients
        result = self.empty.new_zeros(coefficients.shape[1], self.size)
        for block, part in zip(self.blocks, padded.split(_BLOCK_ROWS), strict=True):
            result.addmm_(part.T.to(result), block)
        return result


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """``Q^T A Q`` after some Lanczos steps, where the columns of Q are the basis.

    Attributes:
        diagonal: float64, shape ``(steps,)``.
        off_diagonal: float64, shape ``(steps,)``; the last entry couples the last vector to the next one.
        asymmetry: the largest difference between ``q_i . A q_(i+1)`` and ``q_(i+1) . A q_i``, relative to the largest
            entry.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    asymmetry: float = 0.0

    def ritz(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Nodes and weights of Gauss quadrature (Golub and Welsch 1969) from the first ``steps`` steps.

        The nodes are the Ritz values in ascending order; a weight is the square of the first component of a Ritz
        vector. Both are float64, shape ``(steps,)``.
        """
        m = len(self.diagonal) if steps is None else min(steps, len(self.diagonal))
        off = self.off_diagonal[: m - 1]
        matrix = torch.diag(self.diagonal[:m]) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors[0] ** 2


def lanczos(matvec: Matvec, start: Tensor, steps: int, *, reorthogonalise: bool = True) -> Tridiagonal:
    """``steps`` steps of Lanczos from ``start``; fewer if the vectors span an invariant subspace.

    Args:
        matvec: a symmetric linear map on vectors like ``start``.
        start: shape ``(size,)``, float32 or float64, not zero.
        steps: the number of steps, one product each.
        reorthogonalise: False takes memory for three vectors instead of ``steps``, and gives ghosts. They are harmless
            for smoothed densities and wrong for eigenvalues.

    Raises:
        ValueError: ``start`` is zero.
    """
    length = norm(start)
    if length == 0:
        raise ValueError("the start vector is zero: draw it at random")
    current, previous = start / length, torch.zeros_like(start)
    basis = Basis(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    beta = coupling = difference = scale = 0.0
    for _ in range(min(steps, start.numel())):
        image = matvec(current)
        difference = max(difference, abs(dot(previous, image) - coupling))
        alpha = dot(current, image)
        if reorthogonalise:
            basis.append(current)
            remainder, _ = basis.orthogonalise(image)
        else:
            remainder = image - alpha * current - beta * previous
        beta = norm(remainder)
        diagonal.append(alpha)
        off_diagonal.append(beta)
        scale = max(scale, abs(alpha), beta)
        if beta <= rounding_noise(start.dtype) * scale:
            break  # the vectors so far span an invariant subspace
        previous, current = current, remainder / beta
        coupling = dot(current, image)
    return Tridiagonal(
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(off_diagonal, dtype=torch.float64),
        difference / scale if scale else 0.0,
    )


def rounding_noise(dtype: torch.dtype) -> float:
    """The bound, relative to the operator's scale, below which a residual may be rounding error only."""
    return 200 * torch.finfo(dtype).eps


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs.

    Attributes:
        values: float64, shape ``(k,)``: Ritz values.
        residuals: float64, shape ``(k,)``: ``|A x - theta x|``.
        vectors: shape ``(k, size)``: orthonormal rows.
        converged: whether all wanted pairs met the tolerance.
        asymmetry: as in `fpsim.curvature.EigenResult`.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor
    converged: bool
    asymmetry: float


def lanczos_eigenpairs(
    matvec: Matvec,
    start: Callable[[], Tensor],
    wanted: Callable[[Tensor], Tensor],
    *,
    count: int,
    tol: float,
    max_products: int,
    max_basis: int,
) -> RitzPairs:
    """Eigenpairs by Lanczos with full reorthogonalisation and thick restarts.

    The coefficients of the orthogonalisation make the projected matrix, so it is valid after restarts as well. Its
    difference from its transpose measures the operator's asymmetry.

    Args:
        matvec: a symmetric linear map.
        start: draws a random vector: the first one, and another whenever the basis spans an invariant subspace.
        wanted: from ascending Ritz values to the indices of the wanted ones, best first.
        count: the number of wanted pairs.
        tol: a residual is small enough at ``tol * |theta|``.
        max_products: the largest number of products.
        max_basis: the largest number of vectors to keep.
    """
    first = start()
    size, dtype = first.numel(), first.dtype
    capacity = min(size, max_basis)
    basis = Basis(first)
    basis.append(first / norm(first))
    del first
    matrix = torch.zeros(capacity + 1, capacity + 1, dtype=torch.float64)
    asymmetry, scale, products, settled = 0.0, 0.0, 0, torch.empty(0, dtype=torch.float64)
    in_a_row, since_stuck = 0, 0
    while True:
        last = basis.count - 1
        remainder, column = basis.orthogonalise(matvec(basis[last]))
        products += 1
        asymmetry = max(asymmetry, float((column[:last] - matrix[last, :last]).abs().max()) if last else 0.0)
        matrix[: last + 1, last] = column
        beta = norm(remainder)
        scale = max(scale, float(column.abs().max()), beta)
        complete = basis.count == size
        stuck = complete or beta <= rounding_noise(dtype) * scale
        projected = matrix[: last + 1, : last + 1]
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        chosen = wanted(values)
        residuals = beta * vectors[-1, chosen].abs()
        limit = (tol * values[chosen].abs()).clamp(min=rounding_noise(dtype) * scale)
        enough = len(chosen) == count and bool((residuals <= limit).all())
        in_a_row, since_stuck = in_a_row + 1 if enough else 0, since_stuck + 1
        stop = in_a_row >= CONFIRMATIONS and since_stuck >= max(MIN_PRODUCTS, count + 1)
        if stuck and not complete:
            # The basis spans an invariant subspace, which shows a repeated eigenvalue only once. Continue in other
            # subspaces until one adds no new eigenvalue.
            found = values[chosen]
            close = max(1e-3 * tol, rounding_noise(dtype)) * scale
            same = len(found) == len(settled) and bool(((found - settled).abs() <= close).all())
            stop, settled, since_stuck = enough and (same or count == 1), found, 0
        if complete or stop or products >= max_products:
            break
        coupling = 0.0 if stuck else beta
        if basis.count == capacity:
            basis, matrix = _restart(basis, matrix, values, vectors, coupling, wanted, capacity)
        else:
            matrix[last + 1, last] = coupling
        if stuck:
            remainder, _ = basis.orthogonalise(start())
        basis.append(remainder / norm(remainder))
        del remainder  # frees its memory for the next product
    return RitzPairs(
        values[chosen],
        residuals,
        basis.combine(vectors[:, chosen]),
        enough,
        asymmetry / scale if scale else 0.0,
    )


def _restart(
    basis: Basis,
    matrix: Tensor,
    values: Tensor,
    vectors: Tensor,
    beta: float,
    wanted: Callable[[Tensor], Tensor],
    capacity: int,
) -> tuple[Basis, Tensor]:
    """A basis of the best Ritz vectors, and its projected matrix.

    The next vector couples to each Ritz vector by ``beta`` times the last entry of its coefficients.
    """
    keep = _nearby(wanted(values), len(values), capacity)
    smaller = Basis(basis[0])
    for vector in basis.combine(vectors[:, keep]):
        smaller.append(vector)
    projected = torch.zeros_like(matrix)
    projected[: len(keep), : len(keep)] = torch.diag(values[keep])
    projected[len(keep), : len(keep)] = beta * vectors[-1, keep]
    return smaller, projected


def _nearby(chosen: Tensor, total: int, capacity: int) -> Tensor:
    """Indices of the wanted Ritz values and their neighbours, about half as many as the basis may hold."""
    room = max(len(chosen) + 1, capacity // 2) if capacity > len(chosen) + 2 else len(chosen)
    distance = (torch.arange(total).unsqueeze(1) - chosen.unsqueeze(0)).abs().amin(1)
    return distance.argsort(stable=True)[: min(room, capacity - 1)].sort().values
