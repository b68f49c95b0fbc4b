"""The products of narrow accumulators on the CPU: a C++ kernel, built when it is first called.

Inductor's own builder compiles `kernel.cpp` for the vectors of this processor and keeps the library in its cache.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsim.accumulators.specification import Specification


@lru_cache(maxsize=1)
def _library() -> Any:
    """The compiled kernel. IEEE arithmetic must not be reordered or contracted, whatever Inductor's flags are."""
    from torch._inductor.codecache import CppCodeCache

    flags = ("-ffp-contract=off", "-fno-unsafe-math-optimizations", "-fsigned-zeros", "-fno-finite-math-only")
    library = CppCodeCache.load(Path(__file__).with_name("kernel.cpp").read_text(), extra_flags=flags)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.fpsim_accumulate.argtypes = [ctypes.POINTER(Specification), *[pointer] * 7, *[count] * 5]
    library.fpsim_accumulate.restype = None
    return library


def accumulate_on_cpu(
    spec: Specification,
    a: Tensor,
    b: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    key: Tensor | None,
    counts: Tensor | None,
    wide: bool,
) -> Tensor:
    """The sums, float64 or float32, of ``a`` (batches, M, K) and ``b`` (batches, K, N), float32 and contiguous.

    The other arguments are those of `fpsim.accumulators.product.accumulate`.
    """
    batches, rows, depth = a.shape
    columns = b.shape[2]
    if key is not None:
        low, high = (int(half) & 0xFFFFFFFF for half in key)
        spec.key = _signed(low | high << 32)
    out = torch.empty(batches, rows, columns, dtype=torch.float64 if wide else torch.float32)
    if out.numel():
        pointers = (None, out.data_ptr()) if wide else (out.data_ptr(), None)
        _library().fpsim_accumulate(
            ctypes.byref(spec), a.data_ptr(), b.data_ptr(),
            *(None if scales is None else scales[i].data_ptr() for i in (0, 1)), *pointers,
            None if counts is None else counts.data_ptr(), batches, rows, columns, depth, torch.get_num_threads(),
        )  # fmt: skip
    return out


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
