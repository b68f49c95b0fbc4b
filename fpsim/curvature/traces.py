"""Traces of an operator and of functions of it, by random probes, each with its standard error.

Plain trace: Hutchinson 1990, or Hutch++ (Meyer, Musco, Musco, Woodruff 2021, algorithm 1), which computes the trace of
a low-rank part exactly and probes only the remainder. Functions: stochastic Lanczos quadrature (Ubaru, Chen, Saad
2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fpsim.curvature.counting import Asymmetry, Products, as_operator, doubts, products_of
from fpsim.curvature.lanczos import Tridiagonal, lanczos
from fpsim.curvature.linear import Operator
from fpsim.curvature.results import TraceResult, standard_error
from fpsim.curvature.vectors import dot, gaussian, rademacher, seeded

Probe = Literal["rademacher", "gaussian"]
PROBES = {"rademacher": rademacher, "gaussian": gaussian}

#: The probes of the first stage, and the least number of the second for a plain trace, whose probes cost one product.
PILOT, LEAST = 10, 30

#: The variance of ten normal samples, times this, is at least the true variance in 90 % of cases: 9 / 4.168, where
#: 4.168 is the 10 % quantile of chi-squared with 9 degrees of freedom.
CAUTION = 2.16

_Probe = TypeVar("_Probe")


def trace(
    operator: Operator | Tensor,
    *,
    method: Literal["hutchinson", "hutch++"] = "hutch++",
    tol: float = 0.05,
    max_products: int = 150,
    sketch: int | None = None,
    probe: Probe = "rademacher",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceResult:
    """The trace of a symmetric operator.

    The number of probes is chosen in two stages (as by Stein 1945). Ten probes estimate how many reach ``tol``; so many
    new probes are drawn, at least thirty, and they alone make the estimate. So their number does not depend on their
    values, and the error is that of a fixed number. A rule that stops when the error looks small prefers probes that
    happen to agree: its intervals of 95 % contained the trace in 88 % of cases. ``tol=0`` uses all products in one
    stage, as does a ``max_products`` that leaves fewer than forty probes.

    Args:
        operator: an `Operator`, or a dense symmetric matrix.
        method: ``hutch++`` is better if few eigenvalues dominate, as in networks (two to four times less error at the
            same cost, measured); it takes memory for ``sketch`` vectors. ``hutchinson`` takes memory for four.
        tol: the relative standard error to reach.
        max_products: the largest number of products.
        sketch: the rank of the exact part of ``hutch++``, at two products per rank; None is a sixth of
            ``max_products``, at most 20, or a third of ``max_products`` if ``tol`` is 0.
        probe: the distribution of the probes' entries: signs (least variance) or normal.
        generator: the source of the probes; None is a fresh one with seed 0.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a choice is unknown, or ``max_products`` is too small for it.
    """
    operator = as_operator(operator)
    if method not in ("hutchinson", "hutch++"):
        raise ValueError(f"unknown method {method!r}: use 'hutchinson' or 'hutch++'")
    check_probes(probe, tol)
    if sketch is None:
        sketch = max(1, max_products // 3 if tol == 0 else min(20, max_products // 6))
    sketch = 0 if method == "hutchinson" else min(sketch, operator.size)
    needed = 2 * sketch + (0 if sketch == operator.size else 2)
    if max_products < needed:
        raise ValueError(f"{method} with sketch={sketch} takes at least {needed} products, got {max_products}")
    generator = seeded(generator)
    draw = PROBES[probe]
    asymmetry = Asymmetry()
    with products_of(operator, f"trace of the {operator.name}", max_products, progress) as products:

        def product(vector: Tensor) -> Tensor:
            image = products(vector)
            asymmetry.add(vector, image)
            return image

        def sample() -> float:
            z = draw(*_vectors_of(operator), generator)
            if basis is not None:
                z = z - basis @ (basis.T @ z)
            return known + dot(z, product(z))

        known, basis = _sketched(product, operator, sketch, lambda: draw(*_vectors_of(operator), generator))
        exact = sketch == operator.size
        samples = [] if exact else _in_two_stages(sample, float, tol, LEAST, max_products - products.count)
    values = torch.tensor(samples or [known], dtype=torch.float64)
    error = 0.0 if exact else standard_error(values)
    reasons = (*_too_large(error, "standard error", values, tol), *doubts(operator, asymmetry.error))
    return TraceResult(
        float(values.mean()),
        error,
        products.count,
        not reasons,
        values,
        method=method,
        reasons=reasons,
        cost=products.cost,
    )


def function_trace(
    operator: Operator | Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    steps: int = 30,
    tol: float = 0.05,
    max_probes: int = 50,
    probe: Probe = "rademacher",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceResult:
    """The trace of ``function(A)``: the sum of ``function`` over all eigenvalues of a symmetric operator.

    Args:
        operator: an `Operator`, or a dense symmetric matrix.
        function: an elementwise function of eigenvalues, from a float64 tensor to one of the same shape.
        steps: the Lanczos steps per probe, one product each.
        tol: the relative standard error to reach, and the bound on the relative quadrature error.
        max_probes: the largest number of probes. They are chosen in two stages as by `trace`, with at least ten in the
            second.
        probe: the distribution of the probes' entries.
        generator: the source of the probes; None is a fresh one with seed 0.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a choice is unknown, a number is out of range, or ``function`` is not finite at a Ritz value.

    >>> abs(function_trace(torch.diag(torch.tensor([1.0, 2.0])), torch.exp).estimate - 10.1073) < 1e-4
    True
    """
    operator = as_operator(operator)
    check_probes(probe, tol)
    if steps < 1 or max_probes < 1:
        raise ValueError(f"steps and max_probes must be at least 1, got {steps} and {max_probes}")
    generator = seeded(generator)
    with products_of(operator, f"quadrature of the {operator.name}", steps * max_probes, progress) as products:

        def sample() -> tuple[float, float, float]:
            """The quadratures with all steps and with three quarters of them, and the asymmetry."""
            found, square = probe_spectrum(products, steps, probe, generator)
            whole = square * _quadrature(found, function, None)
            if len(found.diagonal) < steps:  # an invariant subspace: the quadrature is exact for this probe
                return whole, whole, found.asymmetry
            part = square * _quadrature(found, function, len(found.diagonal) - (steps + 3) // 4)
            return whole, part, found.asymmetry

        rows = _in_two_stages(sample, lambda row: row[0], tol, PILOT, max_probes)
    values, short, asymmetry = torch.tensor(rows, dtype=torch.float64).T
    estimate, error = float(values.mean()), standard_error(values)
    rough = abs(estimate - float(short.mean()))
    reasons = (
        *_too_large(error, "standard error", values, tol),
        *_too_large(rough, "quadrature error", values, tol),
        *doubts(operator, float(asymmetry.max())),
    )
    return TraceResult(
        estimate, error, products.count, not reasons, values, rough, "quadrature", reasons, products.cost
    )


def log_determinant(
    operator: Operator | Tensor,
    *,
    shift: float = 0.0,
    steps: int = 30,
    tol: float = 0.05,
    max_probes: int = 50,
    probe: Probe = "rademacher",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceResult:
    """The natural logarithm of the determinant of ``A + shift * I``, which must be positive definite.

    Arguments and results are those of `function_trace`.

    Raises:
        ValueError: a Ritz value of the shifted operator is not positive; the message names a sufficient shift.
    """

    def logarithm(values: Tensor) -> Tensor:
        lowest = float(values.min())
        if lowest + shift <= 0:
            raise ValueError(
                f"the logarithm needs positive eigenvalues, but there is one near {lowest:.6g} and shift is {shift:g}: "
                f"use a shift above {-lowest:.3g}"
            )
        return (values + shift).log()

    return function_trace(
        operator,
        logarithm,
        steps=steps,
        tol=tol,
        max_probes=max_probes,
        probe=probe,
        generator=generator,
        progress=progress,
    )


def probe_spectrum(
    products: Products, steps: int, probe: str, generator: torch.Generator, *, reorthogonalise: bool = True
) -> tuple[Tridiagonal, float]:
    """The Lanczos matrix of one random probe, and the probe's squared norm."""
    start = PROBES[probe](*_vectors_of(products.operator), generator)
    return lanczos(products, start, steps, reorthogonalise=reorthogonalise), dot(start, start)


def _in_two_stages(
    sample: Callable[[], _Probe], value: Callable[[_Probe], float], tol: float, least: int, most: int
) -> list[_Probe]:
    """Independent samples, of a number that does not depend on their values: at most ``most``, with the first stage.

    Args:
        sample: draws a sample.
        value: the number whose mean is to be found with a relative standard error of ``tol``.
        tol: the tolerance; zero draws ``most`` samples.
        least: the least number of samples in the second stage.
        most: the largest number of samples.
    """
    if tol == 0 or most < PILOT + least:
        return [sample() for _ in range(most)]
    pilot = torch.tensor([value(sample()) for _ in range(PILOT)], dtype=torch.float64)
    allowed, left = tol * abs(float(pilot.mean())), most - PILOT
    variance = CAUTION * float(pilot.var())
    enough = variance <= left * allowed**2
    count = max(least, math.ceil(variance / allowed**2) if variance else 0) if enough else left
    return [sample() for _ in range(count)]


def _too_large(error: float, name: str, values: Tensor, tol: float) -> tuple[str, ...]:
    """The reason why a result has not converged, if ``error`` is above the tolerance."""
    estimate = abs(float(values.mean()))
    if error <= tol * estimate:
        return ()
    return (f"the {name} is {error:.3g}, above {tol:g} of the estimate {estimate:.3g}: allow more products, or steps",)


def _sketched(
    product: Callable[[Tensor], Tensor], operator: Operator, rank: int, draw: Callable[[], Tensor]
) -> tuple[float, Tensor | None]:
    """The trace of A on the range of ``A S``, for a random S of ``rank`` columns, and a basis of that range.

    The basis has orthonormal columns; it is None for rank 0.
    """
    if rank == 0:
        return 0.0, None
    if rank == operator.size:
        basis = torch.eye(rank, dtype=operator.dtype, device=operator.device)
    else:
        basis, _ = torch.linalg.qr(torch.stack([product(draw()) for _ in range(rank)], dim=1))
    return sum(dot(column, product(column)) for column in basis.T), basis


def _quadrature(found: Tridiagonal, function: Callable[[Tensor], Tensor], steps: int | None) -> float:
    nodes, weights = found.ritz(None if steps is None else max(1, steps))
    values = function(nodes)
    if not torch.isfinite(values).all():
        where = float(nodes[~torch.isfinite(values)][0])
        raise ValueError(f"the function is not finite at {where:.6g}, which is near an eigenvalue: shift the operator")
    return float((weights * values).sum())


def _vectors_of(operator: Operator) -> tuple[int, torch.dtype, torch.device]:
    """Size, dtype and device of the operator's vectors."""
    return operator.size, operator.dtype, operator.device


def check_probes(probe: str, tol: float) -> None:
    """Raise a ValueError if the distribution of the probes is unknown, or the tolerance is negative."""
    if probe not in PROBES:
        raise ValueError(f"unknown probe {probe!r}: use one of {', '.join(PROBES)}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
