"""Eigenvalues and eigenvectors of an operator, at either end of its spectrum.

The stop rule is a residual relative to the eigenvalue, ``|A x - theta x| <= tol |theta|``, at two products in a row and
after at least five products. On networks, rules on the change of the estimate or on absolute residuals stop at values
that are wrong by up to a factor of ten thousand (measured on three public tools).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fpsim.curvature.counting import Products, as_operator, doubts, products_of
from fpsim.curvature.lanczos import CONFIRMATIONS, MIN_PRODUCTS, RitzPairs, lanczos_eigenpairs, rounding_noise
from fpsim.curvature.linear import Operator
from fpsim.curvature.lobpcg import lobpcg
from fpsim.curvature.results import EigenResult
from fpsim.curvature.vectors import dot, gaussian, norm, seeded

Which = Literal["largest", "smallest", "both", "magnitude"]
Method = Literal["lanczos", "lobpcg", "power"]


def eigenpairs(
    operator: Operator | Tensor,
    k: int = 1,
    *,
    which: Which = "largest",
    method: Method = "lanczos",
    tol: float = 1e-2,
    max_products: int | None = None,
    max_basis: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> EigenResult:
    """``k`` eigenpairs of a symmetric operator.

    Args:
        operator: an `Operator`, or a dense symmetric matrix.
        k: the number of pairs; for ``both``, the number at each end.
        which: ``largest`` or ``smallest`` (algebraically), ``both`` ends, or largest in ``magnitude``.
        method: ``lanczos`` (any ``which``): fewest products, memory of ``max_basis`` vectors. ``lobpcg`` (``largest``
            or ``smallest``): memory of six vectors per pair; it finds repeated eigenvalues. ``power``
            (``magnitude``): slow and simple, memory of three vectors.
        tol: the relative residual at which a pair counts as converged. The eigenvalue is usually much more accurate:
            its error is of the order of the squared residual over the gap to the next eigenvalue. But a small residual
            only proves that *some* eigenvalue is near. If the first two are within a few ``tol`` of each other, the
            second may be returned as the first (at a gap of 4 %, in 3 of 100 random starts; with ``tol=3e-3`` in 1).
        max_products: the largest number of products; None is 300.
        max_basis: the number of vectors that Lanczos keeps before it restarts; None is the larger of 40 and three
            times the pairs plus 20.
        start: a first vector, shape ``(size,)``, such as an eigenvector from an earlier training step (``lanczos``,
            ``power``).
        generator: the source of random starts; None is a fresh one with seed 0.
        progress: whether to show a progress bar.

    Returns:
        An `EigenResult`. If ``converged`` is False, its ``reasons`` say why. If the operator is symmetric, some
        eigenvalue still lies within each residual.

    Raises:
        ValueError: a choice is unknown or impossible.
        FloatingPointError: a product has infinities or NaN.

    Lanczos from one vector finds only one eigenvector of a repeated eigenvalue, until rounding errors add others.

    >>> matrix = torch.diag(torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
    >>> eigenpairs(matrix, which="both").eigenvalues
    tensor([ 3., -2.], dtype=torch.float64)
    """
    operator = as_operator(operator)
    pairs = 2 * k if which == "both" else k
    _check(operator, k, pairs, which, method, tol, max_products, max_basis, start)
    max_products = 300 if max_products is None else max_products
    generator = seeded(generator)

    def draw() -> Tensor:
        return gaussian(operator.size, operator.dtype, operator.device, generator)

    starts = [] if start is None else [start.to(dtype=operator.dtype, device=operator.device)]

    def next_start() -> Tensor:
        return starts.pop() if starts else draw()

    with products_of(operator, f"eigenpairs of the {operator.name}", max_products, progress) as products:
        if method == "lanczos":
            found = lanczos_eigenpairs(
                products,
                next_start,
                _chooser(which, k),
                count=pairs,
                tol=tol,
                max_products=max_products,
                max_basis=max(40, 3 * pairs + 20) if max_basis is None else max_basis,
            )
        elif method == "lobpcg":
            found = _lobpcg(products, draw, k, which, tol, max_products)
        else:
            found = power_iteration(products, next_start, count=k, tol=tol, max_products=max_products)
    reasons = doubts(operator, found.asymmetry)
    if not found.converged:
        reasons = (
            f"after {products.count} products the residuals of {len(found.values)} of {pairs} pairs exceed "
            f"{tol:g} of the eigenvalues: raise max_products",
            *reasons,
        )
    return EigenResult(
        found.values,
        found.vectors.T,
        found.residuals,
        products.count,
        not reasons,
        found.asymmetry,
        method,
        reasons,
        products.cost,
        which,
        operator.name,
    )


def power_iteration(
    matvec: Callable[[Tensor], Tensor],
    start: Callable[[], Tensor],
    *,
    count: int,
    tol: float,
    max_products: int,
) -> RitzPairs:
    """The ``count`` eigenpairs of largest magnitude, one after another, each orthogonal to the earlier ones.

    Args:
        matvec: a symmetric linear map.
        start: draws a random vector.
        count: how many pairs to find.
        tol: a residual is small enough at ``tol * |theta|``.
        max_products: the largest number of products for all pairs together. Pairs that get no product are missing from
            the result.
    """
    inner = tol if count == 1 else tol / 2  # errors of earlier pairs add to the residuals of later ones
    vectors: list[Tensor] = []
    images: list[Tensor] = []
    products, scale, difference = 0, 0.0, 0.0
    while len(vectors) < count and products < max_products:
        x = _project(start(), vectors)
        x /= norm(x)
        previous, coupling = torch.zeros_like(x), 0.0
        own, in_a_row, done = 0, 0, False
        while not done:
            image = matvec(x)
            products, own = products + 1, own + 1
            difference = max(difference, abs(dot(previous, image) - coupling))
            inside = _project(image, vectors)
            theta, length = dot(x, inside), norm(inside)
            scale = max(scale, length)
            residual = norm(inside - theta * x)
            floor = rounding_noise(x.dtype) * scale
            in_a_row = in_a_row + 1 if residual <= inner * abs(theta) else 0
            done = residual <= floor or (in_a_row >= CONFIRMATIONS and own >= MIN_PRODUCTS)
            if products >= max_products or done:
                break
            previous, x = x, inside / length
            coupling = dot(x, image)
        vectors.append(x)
        images.append(image)
    basis, mapped = torch.stack(vectors), torch.stack(images)
    projected = (basis @ mapped.T).to("cpu", torch.float64)
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True, stable=True)
    values, rotation = values[order], rotation[:, order].T.to(basis)
    basis, mapped = rotation @ basis, rotation @ mapped
    residuals = torch.tensor([norm(row) for row in mapped - values.to(basis).unsqueeze(1) * basis], dtype=torch.float64)
    floor = rounding_noise(basis.dtype) * scale
    converged = len(values) == count and bool((residuals <= (tol * values.abs()).clamp(min=floor)).all())
    return RitzPairs(values, residuals, basis, converged, difference / scale if scale else 0.0)


def _lobpcg(
    products: Products, draw: Callable[[], Tensor], k: int, which: str, tol: float, max_products: int
) -> RitzPairs:
    sign = 1.0 if which == "largest" else -1.0
    block = k + (min(k, 2) if k > 1 and 3 * (k + 2) <= products.operator.size else 0)
    found = lobpcg(
        lambda v: sign * products(v),
        lambda: torch.stack([draw() for _ in range(block)]),
        count=k,
        tol=tol,
        max_products=max_products,
    )
    return RitzPairs(sign * found.values, found.residuals, found.vectors, found.converged, found.asymmetry)


def _chooser(which: str, k: int) -> Callable[[Tensor], Tensor]:
    """A function from ascending values to the indices of the wanted ones, best first."""

    def choose(values: Tensor) -> Tensor:
        index = torch.arange(len(values))
        if which == "largest":
            return index.flip(0)[:k]
        if which == "smallest":
            return index[:k]
        if which == "magnitude":
            return values.abs().argsort(descending=True, stable=True)[:k]
        top = index.flip(0)[: min(k, (len(values) + 1) // 2)]
        return torch.cat([top, index[: min(k, len(values) - len(top))]])

    return choose


def _project(vector: Tensor, others: list[Tensor]) -> Tensor:
    """``vector`` orthogonalised twice against the orthonormal ``others``."""
    for _ in range(2 if others else 0):
        for other in others:
            vector = vector - dot(other, vector) * other
    return vector


def _check(
    operator: Operator,
    k: int,
    pairs: int,
    which: str,
    method: str,
    tol: float,
    max_products: int | None,
    max_basis: int | None,
    start: Tensor | None,
) -> None:
    allowed = {
        "lanczos": ("largest", "smallest", "both", "magnitude"),
        "lobpcg": ("largest", "smallest"),
        "power": ("magnitude",),
    }
    if method not in allowed:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(allowed)}")
    if which not in allowed["lanczos"]:
        raise ValueError(f"unknown which {which!r}: use one of {', '.join(allowed['lanczos'])}")
    if which not in allowed[method]:
        raise ValueError(f"method={method!r} finds {' or '.join(allowed[method])}, got {which!r}: use method='lanczos'")
    if not 1 <= k <= operator.size or pairs > operator.size:
        raise ValueError(f"cannot find {pairs} eigenpairs of an operator of size {operator.size}")
    if method == "lobpcg" and 3 * k > operator.size:
        raise ValueError(f"lobpcg needs a size of at least 3 k = {3 * k}, got {operator.size}: use method='lanczos'")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if max_products is not None and max_products < max(1, k if method != "lanczos" else 1):
        raise ValueError(f"max_products must be at least {k if method != 'lanczos' else 1}, got {max_products}")
    if max_basis is not None and (method != "lanczos" or max_basis < min(operator.size, pairs + 3)):
        raise ValueError(f"max_basis is for lanczos, at least the pairs plus 3 = {pairs + 3}, got {max_basis}")
    if start is not None and (method == "lobpcg" or start.shape != (operator.size,)):
        raise ValueError(f"start is one vector of shape ({operator.size},), for lanczos and power")
