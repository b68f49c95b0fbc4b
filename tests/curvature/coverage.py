"""How often the intervals of random estimates contain the true value.

    python -m tests.curvature.coverage [--seeds 4000]

For operators with known spectra it computes an estimate for each seed, and counts how often the interval of 95 %, and
the estimate with 1.96 standard errors on either side, contain the true value. With 4,000 seeds, the count of a right
interval lies within 0.7 % of 95 % nineteen times in twenty. That takes half an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpsim.curvature import TraceResult, density, function_trace, trace
from tests.curvature.small_models import network_spectrum, spectrum_matrix

SIZE = 60

#: Spectra for which the samples differ: nearly normal, skewed (one dominates), and symmetric with heavy tails.
SPECTRA: dict[str, Tensor] = {
    "network": network_spectrum(SIZE),
    "one dominates": torch.cat([torch.full((SIZE - 1,), 0.01), torch.tensor([5.0])]).double(),
    "flat": torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64),
    "two signs": torch.cat([torch.full((SIZE - 2,), 0.05), torch.tensor([10.0, -7.0])]).double(),
}

#: Estimates of the trace of a matrix, or of its square, with a generator.
ESTIMATES: dict[str, Callable[[Tensor, torch.Generator], TraceResult]] = {
    "hutchinson": lambda a, g: trace(a, method="hutchinson", generator=g),
    "hutchinson, loose": lambda a, g: trace(a, method="hutchinson", tol=0.2, generator=g),
    "hutchinson, normal probes": lambda a, g: trace(a, method="hutchinson", tol=0.2, probe="gaussian", generator=g),
    "hutch++": lambda a, g: trace(a, generator=g),
    "hutch++, small sketch": lambda a, g: trace(a, sketch=3, tol=0.2, generator=g),
    "function": lambda a, g: function_trace(a, lambda x: x, steps=6, tol=0.2, generator=g),
    "density": lambda a, g: density(a, steps=6, probes=20, generator=g).integrate(lambda x: x),
    "density, more probes": lambda a, g: density(a, steps=6, probes=20, max_probes=90, tol=0.2, generator=g).integrate(
        lambda x: x
    ),
}


def coverage(spectrum: str, estimate: str, seeds: int) -> tuple[float, float, float, float]:
    """The part of seeds whose interval contains the trace; the same of 1.96 errors; mean products; part converged."""
    matrix = spectrum_matrix(SPECTRA[spectrum])
    true = float(matrix.trace())
    inside = near = products = converged = 0
    for seed in range(seeds):
        found = ESTIMATES[estimate](matrix, torch.Generator().manual_seed(seed))
        low, high = found.interval(0.95)
        inside += low - 1e-9 <= true <= high + 1e-9
        near += abs(found.estimate - true) <= 1.96 * found.stderr + 1e-9
        products += found.products
        converged += found.converged
    return inside / seeds, near / seeds, products / seeds, converged / seeds


def main() -> None:
    """Prints a line for each spectrum and estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4000)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'spectrum':15} {'estimate':27} interval  1.96 errors  products  converged")
    for spectrum in SPECTRA:
        for estimate in ESTIMATES:
            inside, near, products, converged = coverage(spectrum, estimate, options.seeds)
            print(
                f"{spectrum:15} {estimate:27} {inside:8.3f} {near:12.3f} {products:9.0f} {converged:10.2f}", flush=True
            )


if __name__ == "__main__":
    main()
