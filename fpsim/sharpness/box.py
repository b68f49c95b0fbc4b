"""Keskar's box around a point x, ``|y[i]| <= epsilon * (|x[i]| + 1)``, and his search for the largest loss in it.

Source: arXiv 1609.04836, metric 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, OptimizeResult, minimize

#: Keskar's two epsilons; *To FP8 and Back Again* (arXiv 2405.18710) does not state its own.
EPSILONS = (5e-4, 1e-3)
#: The smaller of them.
EPSILON = EPSILONS[0]
#: Iterations of Keskar's L-BFGS-B.
ITERATIONS = 10


def check_search(epsilon: float, iterations: int, method: str, methods: tuple[str, ...]) -> None:
    """Raise a ValueError if epsilon or the number of iterations is not positive, or ``methods`` lacks ``method``."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive number, got {epsilon}: Keskar uses 5e-4 and 1e-3")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}: Keskar takes 10")
    if method not in methods:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(methods)}")


def lbfgsb(
    negative_rise: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    bound: np.ndarray,
    iterations: int,
) -> OptimizeResult:
    """Minimise ``negative_rise`` over ``|y[i]| <= bound[i]`` by scipy's L-BFGS-B without tolerances.

    A confident token has a small loss and small slopes, and a tolerance would end the search there.

    Args:
        negative_rise: from y to a value and its gradient, float64.
        start: the first y, float64 of shape (n,).
        bound: half the width of the box, float64 of shape (n,).
        iterations: the most iterations.
    """
    options = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
    return minimize(negative_rise, start, jac=True, method="L-BFGS-B", bounds=Bounds(-bound, bound), options=options)
