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

from fpsim.accumulators.specification import ORDERS, ROUNDINGS, Specification

#: From how many products in a chunk of the whole result on torch's products are faster, with vectors of 512 bits.
_LEAST_PRODUCTS = 1 << 18
#: From which length of chunks on they are.
_LEAST_LENGTH = 64
#: How many sums are computed at once.
_PART = 1 << 17


@lru_cache(maxsize=1)
def _library() -> Any:
    """The compiled kernel. IEEE arithmetic must not be reordered or contracted, whatever Inductor's flags are."""
    from torch._inductor.codecache import CppCodeCache

    flags = ("-ffp-contract=off", "-fno-unsafe-math-optimizations", "-fsigned-zeros", "-fno-finite-math-only")
    library = CppCodeCache.load(Path(__file__).with_name("kernel.cpp").read_text(), extra_flags=flags)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.fpsim_accumulate.argtypes = [ctypes.POINTER(Specification), *[pointer] * 7, *[count] * 5]
    library.fpsim_accumulate.restype = None
    library.fpsim_add_chunk.argtypes = [ctypes.POINTER(Specification), *[pointer] * 4, *[count] * 6]
    library.fpsim_add_chunk.restype = None
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
    large = rows * columns * min(spec.length, depth) >= _LEAST_PRODUCTS
    if counts is None and large and _has_exact_chunks(spec) and _has_wide_vectors():
        _add_chunks(spec, a, b, out)
    elif out.numel():
        pointers = (None, out.data_ptr()) if wide else (out.data_ptr(), None)
        _library().fpsim_accumulate(
            ctypes.byref(spec), a.data_ptr(), b.data_ptr(),
            *(None if scales is None else scales[i].data_ptr() for i in (0, 1)), *pointers,
            None if counts is None else counts.data_ptr(), batches, rows, columns, depth, torch.get_num_threads(),
        )  # fmt: skip
    return out


def _has_wide_vectors() -> bool:
    """Whether torch computes with vectors of 512 bits."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


def _has_exact_chunks(spec: Specification) -> bool:
    """Whether the sums of whole chunks, in any order and in float64, are exact: then torch's products give them."""
    plain = not (spec.promote or spec.scale_block or spec.flush)
    chunks = spec.order == ORDERS["chunked"] and spec.length >= _LEAST_LENGTH
    return bool(plain and chunks and spec.exact and spec.rounding != ROUNDINGS["down"])


def _add_chunks(spec: Specification, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the sums of `accumulate_on_cpu` to ``out``: torch multiplies the chunks, in parts that fit the cache."""
    batches, rows, depth = a.shape
    columns = b.shape[2]
    height = min(rows, max(1, _PART // columns))
    group = max(1, _PART // (height * columns)) if height == rows else 1
    for batch in range(0, batches, group):
        right = b[batch : batch + group]
        wide_right = right.double()
        for row in range(0, rows, height):
            left = a[batch : batch + group, row : row + height]
            wide_left = left.double()
            part = Specification.from_buffer_copy(spec)
            part.first_element += (batch * rows + row) * columns
            sums = torch.full((*left.shape[:2], columns), spec.start, dtype=torch.float64)
            products = torch.empty_like(sums)
            for first in range(0, depth, spec.length):
                chunk = slice(first, first + spec.length)
                torch.bmm(wide_left[:, :, chunk], wide_right[:, chunk], out=products)
                _library().fpsim_add_chunk(
                    ctypes.byref(part), products.data_ptr(), sums.data_ptr(), left.data_ptr(), right.data_ptr(),
                    left.shape[0] * left.shape[1], left.shape[1], columns, depth, first, torch.get_num_threads(),
                )  # fmt: skip
            out[batch : batch + group, row : row + height] = sums


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
