"""Curvature of any loss: matrix-free operators, and their eigenpairs, traces and spectral densities.

loss = functional_loss(model, batch=batch)
operator = hessian(loss, dict(model.named_parameters()))
eigenpairs(operator).eigenvalues; trace(operator).estimate; density(operator).plot()
"""

from fpsim.curvature.checks import Determinism, Symmetry, check_determinism, check_symmetry
from fpsim.curvature.distributed import averaged
from fpsim.curvature.eigen import eigenpairs
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import (
    CrossEntropy,
    cross_entropy,
    functional_loss,
    functional_outputs,
    label_count,
    shifted_labels,
)
from fpsim.curvature.operators import empirical_fisher, gauss_newton, hessian
from fpsim.curvature.results import DensityResult, EigenResult, TraceResult
from fpsim.curvature.second_derivatives import CurvatureError
from fpsim.curvature.spectral_density import density
from fpsim.curvature.traces import function_trace, log_determinant, trace
from fpsim.curvature.vectors import Layout, layers, layout

__all__ = [
    "CrossEntropy",
    "CurvatureError",
    "DensityResult",
    "Determinism",
    "EigenResult",
    "Layout",
    "Operator",
    "Symmetry",
    "TraceResult",
    "averaged",
    "check_determinism",
    "check_symmetry",
    "cross_entropy",
    "density",
    "eigenpairs",
    "empirical_fisher",
    "function_trace",
    "functional_loss",
    "functional_outputs",
    "gauss_newton",
    "hessian",
    "label_count",
    "layers",
    "layout",
    "log_determinant",
    "shifted_labels",
    "trace",
]
