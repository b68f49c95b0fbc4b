"""How sharply a loss rises around a point, in the space of logits, as the paper measures it, and of parameters."""

from fpsim.sharpness.critical_rate import CriticalResult, critical
from fpsim.sharpness.logits import LogitMetrics, logit, logit_metrics
from fpsim.sharpness.parameters import KeskarResult, SamResult, adaptive, keskar, sam
from fpsim.sharpness.slices import Slice1D, Slice2D, slice_1d, slice_2d
from fpsim.sharpness.streaming import LogitSummary, gradient_norm, logit_stream, summarize, summarize_over_ranks

__all__ = [
    "CriticalResult",
    "KeskarResult",
    "LogitMetrics",
    "LogitSummary",
    "SamResult",
    "Slice1D",
    "Slice2D",
    "adaptive",
    "critical",
    "gradient_norm",
    "keskar",
    "logit",
    "logit_metrics",
    "logit_stream",
    "sam",
    "slice_1d",
    "slice_2d",
    "summarize",
    "summarize_over_ranks",
]


def __dir__() -> list[str]:
    return sorted(__all__)
