"""Rounding in Triton: device functions for users' kernels, and the kernels of eager calls on CUDA.

The algorithm of `fpsim.rounding.kernel` runs once for each format and mode, on names of variables instead of numbers.
The operations that it applies to them are recorded as the body of a ``@triton.jit`` function. So the Triton code does
the same integer operations as eager and compiled calls. Floating-point contraction and flush-to-zero cannot affect it.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpsim.formats import parse_format, resolve_overflow, split_rounding
from fpsim.rounding.carriers import grid_of, working_dtype
from fpsim.rounding.definitions import round_generally, round_stochastic
from fpsim.rounding.kernel import round_code
from fpsim.rounding.random_words import random_key, random_word
from fpsim.rounding.recording import Name, Text
from fpsim.source import source_hash

# -- recording the algorithm as source ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NameOps:
    """The kernel's executor on `Name` (`fpsim.rounding.kernel.Ops`). The integers have ``bits`` bits."""

    bits: int

    def clamp(self, a: Name, low: int | None, high: int | None) -> Name:
        if low is not None:
            a = a.text.name(f"tl.maximum({a}, {low})")
        return a if high is None else a.text.name(f"tl.minimum({a}, {high})")

    def larger(self, a: Name, b: Name) -> Name:
        return a.text.name(f"tl.maximum({a}, {b})")

    def less(self, a: Name, bound: Name | int) -> Name:
        return a.text.name(f"{a} < {bound}")

    def choose(self, mask: Name, a: Name | int, b: Name | int) -> Name:
        if isinstance(a, int) and isinstance(b, int):
            b = mask.text.name(f"tl.full([], {b}, tl.int{self.bits})")
        return mask.text.name(f"tl.where({mask}, {a}, {b})")

    def code_of_integer(self, a: Name) -> Name:
        return a.text.name(f"{a}.to(tl.float{self.bits}).to(tl.int{self.bits}, bitcast=True)")


def _function(name: str, arguments: str, text: Text, result: str) -> Any:
    """The ``@triton.jit`` function with this body. Triton reads its source from `linecache`, as tracebacks do."""
    source = "\n    ".join([f"def {name}({arguments}):", *text.lines, f"return {result}"]) + "\n"
    filename = f"<fpsim {source_hash()[:12]} {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, filename, "exec"), scope)
    return triton.jit(scope[name])


# -- device functions --------------------------------------------------------------------------------------------------

# For each dtype's name in Triton: the torch dtype, and the expressions that read and write the code of its working
# carrier. Converting 16-bit values to float32 and back is exact. bfloat16 is converted by moving its bits, so that no
# conversion handles a subnormal.
_CARRIERS: dict[str, tuple[torch.dtype, str, str]] = {
    "fp64": (torch.float64, "{}.to(tl.int64, bitcast=True)", "{}.to(tl.float64, bitcast=True)"),
    "fp32": (torch.float32, "{}.to(tl.int32, bitcast=True)", "{}.to(tl.float32, bitcast=True)"),
    "fp16": (
        torch.float16,
        "{}.to(tl.float32).to(tl.int32, bitcast=True)",
        "{}.to(tl.float32, bitcast=True).to(tl.float16)",
    ),
    "bf16": (
        torch.bfloat16,
        "{}.to(tl.int16, bitcast=True).to(tl.int32) << 16",
        "({} >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)",
    ),
}

# Torch converts a float32 NaN to the bfloat16 whose bits are all ones, on x86 in eager and in vectorized compiled code.
_NAN_OF_BFLOAT16 = -1 << 16


@cache
def device_function(
    format: str, rounding: str, overflow: str | None, dtype: str, index: str | None = None, scaled: bool = False
) -> Any:
    """The ``@triton.jit`` function that rounds tensors of one dtype to one format in one mode.

    Args:
        format, rounding, overflow: the arguments of `fpsim.round`, as names.
        dtype: ``fp64``, ``fp32``, ``fp16`` or ``bf16``, the names in Triton.
        index: for stochastic rounding the dtype of the elements' indices, ``int32`` or ``int64``; None otherwise.
        scaled: whether numbers are multiplied by a scale before they are rounded, and divided by it afterwards.

    Returns:
        A function of ``x``, or for stochastic rounding of ``(x, low_key, high_key, index)``, followed by the scale.

    Raises:
        ValueError: the format, the mode or the dtype is unknown, the format has values that the dtype lacks, or there
            is an index without stochastic rounding or the reverse.
    """
    if dtype not in _CARRIERS:
        raise ValueError(f"cannot round Triton's {dtype}: convert it to one of {', '.join(_CARRIERS)} first")
    carrier, read, write = _CARRIERS[dtype]
    fmt = parse_format(format)
    grid, overflow = grid_of(fmt, carrier, scaled), resolve_overflow(fmt, overflow)
    if carrier == torch.bfloat16:
        grid = replace(grid, nan_code=_NAN_OF_BFLOAT16)
    mode, random_bits = split_rounding(rounding)
    if bool(random_bits) != (index is not None):
        other = "fpsim_round_stochastic" if random_bits else "fpsim_round"
        raise ValueError(f"rounding={rounding!r} is for {other}")
    bits = 8 * working_dtype(carrier).itemsize
    text = Text()
    code, word = text.name(read.format("x")), _word(text, index, bits) if index else 0
    scale = text.name(read.format("scale")) if scaled else None
    name = re.sub(r"\W", "_", f"fpsim_{fmt.name}_{mode}_{random_bits}_{overflow}_{dtype}_{index}_{scaled}")
    result = round_code(code, grid, rounding, overflow, NameOps(bits), word, scale)
    arguments = ["x", *(["low_key", "high_key", "index"] if index else []), *(["scale"] if scaled else [])]
    return _function(name, ", ".join(arguments), text, write.format(result))


def _word(text: Text, index: str, bits: int) -> Name:
    """The random word of each element, in the topmost bits of an integer of the carrier's width."""
    low_key, high_key, whole = (Name(name, text) for name in ("low_key", "high_key", "index"))
    if index == "int32":
        word = random_word(whole ^ low_key, high_key)
    elif index == "int64":
        low, high = text.name("index.to(tl.int32)"), text.name("(index >> 32).to(tl.int32)")
        word = random_word(low ^ low_key, high ^ high_key)
    else:
        raise ValueError(f"the index of an element is an int32 or int64, got {index}")
    return word if bits == 32 else text.name(f"{word}.to(tl.int64) << 32")


@cache
def key_function(salt: int) -> Any:
    """The ``@triton.jit`` function that computes the two halves of the key of a seed, a scalar int64."""
    if type(salt) is not int or not -(2**63) <= salt < 2**63:
        raise ValueError(f"salt must be an int of 64 bits, got {salt!r}")
    text = Text()
    key = random_key(text.name("tl.full([], seed, tl.int64)"), salt)
    name = f"fpsim_random_key_{salt}".replace("-", "minus_")
    return _function(name, "seed", text, f"{key}.to(tl.int32), ({key} >> 32).to(tl.int32)")


# The caches of Triton and Inductor identify compiled code by the source below, without the functions that are called
# during compilation. This constant identifies those functions.
FPSIM_SOURCE = tl.constexpr(source_hash())


@triton.constexpr_function
def fpsim_device_function(format, rounding, overflow, dtype, index, scaled, kernel):  # type: ignore[no-untyped-def]
    import fpsim.rounding.triton_functions as written  # a local import, which Triton does not inspect

    return written.device_function(
        format, rounding, overflow, str(dtype), None if index is None else str(index), scaled
    )


@triton.constexpr_function
def fpsim_key_function(salt, kernel):  # type: ignore[no-untyped-def]
    import fpsim.rounding.triton_functions as written

    return written.key_function(salt)


# Defaults are wrapped in `tl.constexpr`: Triton before 3.7 does not wrap strings itself.
@triton.jit
def fpsim_round(  # type: ignore[no-untyped-def]
    x,
    format: tl.constexpr,
    rounding: tl.constexpr = tl.constexpr("nearest_even"),  # noqa: B008
    overflow: tl.constexpr = None,
):
    """``x`` rounded to ``format`` inside a Triton kernel, with the bits that `fpsim.round` gives.

    Args:
        x: a float64, float32, bfloat16 or float16 tensor.
        format, rounding, overflow: the arguments of `fpsim.round`, as names and constant. For stochastic rounding use
            `fpsim_round_stochastic`.
    """
    return fpsim_device_function(format, rounding, overflow, x.dtype, None, False, FPSIM_SOURCE)(x)


@triton.jit
def fpsim_round_stochastic(  # type: ignore[no-untyped-def]
    x,
    seed,
    index,
    format: tl.constexpr,
    rounding: tl.constexpr = tl.constexpr("stochastic"),  # noqa: B008
    overflow: tl.constexpr = None,
    salt: tl.constexpr = 0,
):
    """``x`` rounded stochastically to ``format`` inside a Triton kernel, with the bits that `fpsim.round` gives.

    Args:
        x: a float64, float32, bfloat16 or float16 tensor.
        seed: a scalar integer of up to 64 bits.
        index: the index of each element of ``x`` in the whole tensor, in row-major order: int32 or int64.
        format, rounding, overflow, salt: the arguments of `fpsim.round`, as names and constant. The number of random
            bits is part of the rounding: ``"stochastic:8"``.
    """
    low_key, high_key = fpsim_key_function(salt, FPSIM_SOURCE)(seed)
    function: tl.constexpr = fpsim_device_function(
        format, rounding, overflow, x.dtype, index.dtype, False, FPSIM_SOURCE
    )
    return function(x, low_key, high_key, index)


# -- eager calls on CUDA -----------------------------------------------------------------------------------------------

_BLOCK = 1024


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    x, scale, out, count, FORMAT: tl.constexpr, ROUNDING: tl.constexpr, OVERFLOW: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    values = tl.load(x + index, mask=inside, other=0.0)
    scaled: tl.constexpr = scale is not None
    function: tl.constexpr = fpsim_device_function(FORMAT, ROUNDING, OVERFLOW, values.dtype, None, scaled, FPSIM_SOURCE)
    if scaled:  # noqa: SIM108  (Triton compiles only the branch that a constant chooses)
        rounded = function(values, tl.load(scale))
    else:
        rounded = function(values)
    tl.store(out + index, rounded, mask=inside)


@triton.jit
def _round_stochastic_kernel(  # type: ignore[no-untyped-def]
    x,
    key,
    scale,
    out,
    count,
    FORMAT: tl.constexpr,
    ROUNDING: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    values = tl.load(x + index, mask=inside, other=0.0)
    scaled: tl.constexpr = scale is not None
    function: tl.constexpr = fpsim_device_function(
        FORMAT, ROUNDING, OVERFLOW, values.dtype, index.dtype, scaled, FPSIM_SOURCE
    )
    low_key, high_key = tl.load(key), tl.load(key + 1)
    if scaled:
        rounded = function(values, low_key, high_key, index, tl.load(scale))
    else:
        rounded = function(values, low_key, high_key, index)
    tl.store(out + index, rounded, mask=inside)


def round_dense(
    x: Tensor, format: str, rounding: str, overflow: str, scale: Tensor | None = None, *, block: int = _BLOCK
) -> Tensor:
    """The operator ``fpsim::round`` as one Triton kernel; each program rounds ``block`` elements."""
    if scale is not None and scale.numel() > 1:
        return round_generally(x, format, rounding, overflow, scale=scale)
    out = torch.empty_like(x)
    source = x if x.stride() == out.stride() else torch.empty_like(x).copy_(x)  # dense, in the order of `out`
    if x.numel():
        grid = (triton.cdiv(x.numel(), block),)
        _round_kernel[grid](source, scale, out, x.numel(), format, rounding, overflow, block)
    return out


def round_stochastic_dense(
    x: Tensor,
    key: Tensor,
    format: str,
    rounding: str,
    overflow: str,
    scale: Tensor | None = None,
    *,
    block: int = _BLOCK,
) -> Tensor:
    """The operator ``fpsim::round_stochastic`` as one Triton kernel; each program rounds ``block`` elements."""
    if scale is not None and scale.numel() > 1:
        return round_stochastic(x, key, format, rounding, overflow, "", scale)
    source = x.contiguous()  # the index of an element is its index in row-major order
    rounded = torch.empty_like(source)
    if x.numel():
        grid = (triton.cdiv(x.numel(), block),)
        _round_stochastic_kernel[grid](source, key, scale, rounded, x.numel(), format, rounding, overflow, block)
    return torch.empty_like(x).copy_(rounded) if source is not x else rounded
