"""The compiler backend: find the matrix products of a model, rewrite its graphs, and let Inductor fuse the rounding."""

from fpsim.compile_backend.backend import fpsim, fpsim_eager
from fpsim.compile_backend.observe.recorder import ProductStatistics, SiteStatistics
from fpsim.compile_backend.observe.statistics import Statistics
from fpsim.compile_backend.passes.rounding import UnroundedError
from fpsim.compile_backend.plan import Gap, Plan, Site
from fpsim.compile_backend.report.explain import Audit, Escape, audit, explain
from fpsim.compile_backend.report.profile import Profile, Profiler, profile

__all__ = [
    "Audit",
    "Escape",
    "Gap",
    "Plan",
    "ProductStatistics",
    "Profile",
    "Profiler",
    "Site",
    "SiteStatistics",
    "Statistics",
    "UnroundedError",
    "audit",
    "explain",
    "fpsim",
    "fpsim_eager",
    "profile",
]
