"""The compiler backend: find the matrix products of a model, rewrite its graphs, and let Inductor fuse the rounding."""

from fpsim.compile_backend.backend import fpsim, fpsim_eager
from fpsim.compile_backend.rewrite import UnroundedError

__all__ = ["UnroundedError", "fpsim", "fpsim_eager"]
