"""LOBPCG: eigenpairs at one end of the spectrum, with memory for six vectors per pair.

Knyazev 2001, "Toward the optimal preconditioned eigensolver", without a preconditioner: each step optimises over the
span of the current vectors, their residuals and the previous directions. It takes as many products as Lanczos
(measured), and its memory does not grow. As a block method it finds repeated eigenvalues. During a product, when memory
is short, only five of the six vectors per pair exist; no other variable holds one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpsim.curvature.lanczos import CONFIRMATIONS, MIN_PRODUCTS, Matvec, RitzPairs, rounding_noise
from fpsim.curvature.vectors import norm

#: A direction is dropped if less than this part of it is orthogonal to the other vectors. A division by such a small
#: norm would amplify the rounding errors of its image at every step.
NEARLY_DEPENDENT = 0.05


def lobpcg(matvec: Matvec, start: Callable[[], Tensor], *, count: int, tol: float, max_products: int) -> RitzPairs:
    """The ``count`` largest eigenpairs, best first.

    Args:
        matvec: a symmetric linear map.
        start: draws random vectors as rows, shape ``(block, size)`` with ``count <= block <= size / 3``.
        tol: a residual is small enough at ``tol * |theta|``.
        max_products: the largest number of products.
    """
    x = _orthonormal(start())
    ax = torch.stack([matvec(row) for row in x])
    products, scale, in_a_row = len(x), _longest(ax), 0
    p, ap = x[:0], x[:0]
    fresh, asymmetry = True, 0.0  # images that are products, not combinations of products, show asymmetry
    while True:
        values, rotation = _ritz(_gram(x, ax), _gram(x, x))
        rotation = rotation.T.to(x)
        x, ax = rotation @ x, rotation @ ax
        r = ax - values.to(x).unsqueeze(1) * x
        residuals = torch.tensor([norm(row) for row in r], dtype=torch.float64)
        small = residuals <= (tol * values.abs()).clamp(min=rounding_noise(x.dtype) * scale)
        converged = bool(small[:count].all())
        in_a_row = in_a_row + 1 if converged else 0
        done = in_a_row >= CONFIRMATIONS and products >= MIN_PRODUCTS
        if done or products >= max_products or bool((residuals <= rounding_noise(x.dtype) * scale).all()):
            break
        active = (~small).nonzero().flatten()
        if converged:  # confirm with all vectors, as a wanted one may still turn to another eigenvector
            active = torch.arange(len(x))
        w = _orthonormal(r[active[: max_products - products]], x)
        del r
        if len(w) == 0:
            break
        aw = torch.stack([matvec(row) for row in w])
        products += len(w)
        scale = max(scale, _longest(aw))
        if not fresh and _gap(x, ax, w, aw) > 10 * rounding_noise(x.dtype) * scale:
            # The images are combined from step to step and have drifted from the vectors; the error would grow.
            if products + len(x) > max_products:
                break
            ax, p, ap = torch.stack([matvec(row) for row in x]), p[:0], ap[:0]
            products += len(x)
            fresh = True
        if fresh:
            asymmetry = max(asymmetry, _gap(x, ax, w, aw) / scale)
        x, ax, p, ap = _step(x, ax, w, aw, p, ap)
        fresh = False
        del w, aw
    return RitzPairs(values[:count], residuals[:count], x[:count], converged, asymmetry)


def _gap(x: Tensor, ax: Tensor, w: Tensor, aw: Tensor) -> float:
    """The largest difference between ``w . A x`` and ``x . A w`` of all pairs of rows."""
    return float((_gram(w, ax) - _gram(aw, x)).abs().max())


def _step(x: Tensor, ax: Tensor, w: Tensor, aw: Tensor, p: Tensor, ap: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best vectors in the span of x, w and p with their images; then their parts outside x, with their images."""
    p, ap = _directions(p, ap, torch.cat([x, w]), torch.cat([ax, aw]))
    s, a = torch.cat([x, w, p]), torch.cat([ax, aw, ap])
    _, vectors = _ritz(_gram(s, a), _gram(s, s))
    best = vectors[:, : len(x)].to(x)
    directions = best.clone()
    directions[: len(x)] = 0
    return best.T @ s, best.T @ a, directions.T @ s, directions.T @ a


def _ritz(projected: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values in descending order, and the coefficients of their vectors, for rows that are nearly orthonormal.

    If the overlap were replaced by the identity, small errors would grow from step to step.
    """
    inverse = torch.linalg.inv(torch.linalg.cholesky((overlap + overlap.T) / 2))
    values, vectors = torch.linalg.eigh(inverse @ ((projected + projected.T) / 2) @ inverse.T)
    return values.flip(0), (inverse.T @ vectors).flip(1)


def _longest(rows: Tensor) -> float:
    """The largest norm of the rows. For images of unit vectors it is a lower bound of the operator's norm."""
    return max(norm(row) for row in rows)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T).to("cpu", torch.float64)


def _orthonormal(rows: Tensor, against: Tensor | None = None) -> Tensor:
    """The rows made orthonormal, and orthogonal to the rows of ``against``; dependent rows are dropped."""
    kept: list[Tensor] = []
    for row in rows:
        first = norm(row)
        if first == 0:
            continue
        row, left = row / first, 1.0
        for _ in range(3):  # normalised each time, so that even a small remainder becomes orthogonal
            if against is not None:
                row = row - against.T @ (against @ row)
            for other in kept:
                row = row - (other @ row) * other
            length = norm(row)
            left *= length
            if left <= rounding_noise(row.dtype):
                break
            row = row / length
        else:
            kept.append(row)
    return torch.stack(kept) if kept else rows[:0]


def _directions(p: Tensor, ap: Tensor, basis: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """``p`` made orthonormal, and orthogonal to ``basis``; its image ``ap`` undergoes the same combinations."""
    kept: list[Tensor] = []
    images: list[Tensor] = []
    for row, map_of_row in zip(p, ap, strict=True):
        length = norm(row)
        if length == 0:
            continue
        row, map_of_row, left = row / length, map_of_row / length, 1.0
        for _ in range(2):
            pairs = [(basis, image)] + ([(torch.stack(kept), torch.stack(images))] if kept else [])
            for rows, maps in pairs:
                coefficients = rows @ row
                row, map_of_row = row - rows.T @ coefficients, map_of_row - maps.T @ coefficients
            length = norm(row)
            left *= length
            if left <= NEARLY_DEPENDENT:
                break
            row, map_of_row = row / length, map_of_row / length
        else:
            kept.append(row)
            images.append(map_of_row)
    return (torch.stack(kept), torch.stack(images)) if kept else (p[:0], ap[:0])
