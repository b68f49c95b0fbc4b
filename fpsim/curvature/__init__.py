"""Curvature of any loss: matrix-free operators, and their eigenpairs, traces and spectral densities.

loss = functional_loss(model, batch=batch)
operator = hessian(loss, dict(model.named_parameters()))
eigenpairs(operator).eigenvalues; trace(operator).estimate; density(operator).plot()
"""

from fpsim.curvature.checks import Determinism, Symmetry, check_determinism, check_symmetry
from fpsim.curvature.diagonals import DiagonalResult, diagonal
from fpsim.curvature.distributed import averaged
from fpsim.curvature.eigen import eigenpairs
from fpsim.curvature.histories import Alignment, CurvatureHistory, alignment
from fpsim.curvature.influences import InfluenceResult, influence
from fpsim.curvature.inverses import InverseResult, inverse
from fpsim.curvature.kronecker import KroneckerFactors, kronecker_factors
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import (
    CrossEntropy,
    cross_entropy,
    functional_loss,
    functional_outputs,
    label_count,
    shifted_labels,
)
from fpsim.curvature.monte_carlo import monte_carlo_fisher
from fpsim.curvature.operators import empirical_fisher, gauss_newton, hessian
from fpsim.curvature.per_layer import LayerCurvature, LayersResult, per_layer
from fpsim.curvature.results import DensityResult, EigenResult, TraceResult
from fpsim.curvature.second_derivatives import CurvatureError
from fpsim.curvature.spectral_density import density
from fpsim.curvature.traces import function_trace, log_determinant, trace
from fpsim.curvature.vectors import Layout, layers, layout

__all__ = [
    "Alignment",
    "CrossEntropy",
    "CurvatureError",
    "CurvatureHistory",
    "DensityResult",
    "Determinism",
    "DiagonalResult",
    "EigenResult",
    "InfluenceResult",
    "InverseResult",
    "KroneckerFactors",
    "LayerCurvature",
    "LayersResult",
    "Layout",
    "Operator",
    "Symmetry",
    "TraceResult",
    "alignment",
    "averaged",
    "check_determinism",
    "check_symmetry",
    "cross_entropy",
    "density",
    "diagonal",
    "eigenpairs",
    "empirical_fisher",
    "function_trace",
    "functional_loss",
    "functional_outputs",
    "gauss_newton",
    "hessian",
    "influence",
    "inverse",
    "kronecker_factors",
    "label_count",
    "layers",
    "layout",
    "log_determinant",
    "monte_carlo_fisher",
    "per_layer",
    "shifted_labels",
    "trace",
]


def __dir__() -> list[str]:
    return sorted(__all__)
