"""The compiler backend: find the matrix products of a model, rewrite its graphs, and let Inductor fuse the rounding.

Each public name is imported when it is first used, because importing the backends changes settings of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpsim.compile_backend.backend import fpsim, fpsim_eager
    from fpsim.compile_backend.errors import UnroundedError, UnroundedWarning
    from fpsim.compile_backend.exporting import export, package
    from fpsim.compile_backend.observe.recorder import ProductStatistics, SiteStatistics
    from fpsim.compile_backend.observe.rounding_statistics import Statistics
    from fpsim.compile_backend.plan import Gap, Plan, Site
    from fpsim.compile_backend.report.audit import Audit, Escape, audit
    from fpsim.compile_backend.report.explain import explain
    from fpsim.compile_backend.report.profiler import Profiler, profile
    from fpsim.compile_backend.report.profiles import Profile
    from fpsim.compile_backend.timed_scales import calibrate, load_scale_state, scale_state

#: The module that holds each public name.
_HOMES = {
    "Audit": "report.audit",
    "Escape": "report.audit",
    "Gap": "plan",
    "Plan": "plan",
    "ProductStatistics": "observe.recorder",
    "Profile": "report.profiles",
    "Profiler": "report.profiler",
    "Site": "plan",
    "SiteStatistics": "observe.recorder",
    "Statistics": "observe.rounding_statistics",
    "UnroundedError": "errors",
    "UnroundedWarning": "errors",
    "audit": "report.audit",
    "calibrate": "timed_scales",
    "explain": "report.explain",
    "export": "exporting",
    "fpsim": "backend",
    "fpsim_eager": "backend",
    "load_scale_state": "timed_scales",
    "package": "exporting",
    "profile": "report.profiler",
    "scale_state": "timed_scales",
}

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
    "UnroundedWarning",
    "audit",
    "calibrate",
    "explain",
    "export",
    "fpsim",
    "fpsim_eager",
    "load_scale_state",
    "package",
    "profile",
    "scale_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fpsim.compile_backend' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fpsim.compile_backend.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
