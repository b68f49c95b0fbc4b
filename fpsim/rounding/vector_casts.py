"""Casts between floating-point numbers and their bits, in the vectors of Inductor's C++ code.

Inductor writes such a cast of a vector through an array, element by element. Compilers turn that into scalar loads and
shuffles, which take longer than the rounding between two casts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.virtualized import V


@lru_cache(maxsize=1)
def cast_whole_vectors_in_cpp() -> None:
    """Let Inductor's C++ code cast a whole vector to another type of the same width. The bits stay the same."""
    element_by_element = CppVecOverrides.to_dtype_bitcast

    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
        if dtype.itemsize != src_dtype.itemsize or getattr(x, "dtype", None) != src_dtype:
            return element_by_element(x, dtype, src_dtype)
        return f"c10::bit_cast<{V.kernel._get_vec_type(dtype)}>({x})"

    CppVecOverrides.to_dtype_bitcast = staticmethod(to_dtype_bitcast)  # type: ignore[method-assign]
