"""The compiler backend: find the matrix products of a model, rewrite its graphs, and let Inductor fuse the rounding."""

from fpsim.compile_backend.backend import fpsim, fpsim_eager
from fpsim.compile_backend.inspect import Audit, Escape, audit, explain
from fpsim.compile_backend.plan import Gap, Plan, Site
from fpsim.compile_backend.rewrite import UnroundedError

__all__ = ["Audit", "Escape", "Gap", "Plan", "Site", "UnroundedError", "audit", "explain", "fpsim", "fpsim_eager"]
