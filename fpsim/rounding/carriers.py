"""Carriers: the dtypes whose tensors hold the values of simulated formats."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fpsim.formats import FloatFormat
from fpsim.rounding.kernel import FLOAT32, FLOAT64, Grid

#: The dtypes that carry simulated values, and the format of each.
CARRIERS: dict[torch.dtype, FloatFormat] = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.bfloat16: FloatFormat(8, 7),
    torch.float16: FloatFormat(5, 10),
}

#: The working carriers, and the integer dtype of the same width.
INTEGER_OF = {torch.float32: torch.int32, torch.float64: torch.int64}

#: The integer dtype that shows the codes of each carrier.
CODES_OF = {**INTEGER_OF, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def check_carrier(dtype: torch.dtype, fmt: FloatFormat) -> FloatFormat:
    """The format of ``dtype``, after checking that it can carry ``fmt``.

    Raises:
        TypeError: ``dtype`` is not a carrier (an integer, complex or 8-bit dtype).
        ValueError: ``fmt`` has values that ``dtype`` lacks (the message names a dtype that has them), or ``fmt`` has
            no finite value except zero (for example E1M0 with infinities).
    """
    if fmt.max_units == 0:
        raise ValueError(f"{fmt.name} has no finite value but zero: give it a mantissa bit, or specials='finite'")
    if dtype not in CARRIERS:
        names = ", ".join(str(d).removeprefix("torch.") for d in CARRIERS)
        raise TypeError(f"cannot round a tensor of {dtype}: convert it to one of {names} first, e.g. x.float()")
    if not fmt.is_subset_of(CARRIERS[dtype]):
        enough = [d for d in (torch.float32, torch.float64) if fmt.is_subset_of(CARRIERS[d])]
        raise ValueError(
            f"{fmt.name} has values that {dtype} lacks, so a {dtype} tensor cannot carry it: convert it to {enough[0]}"
        )
    return CARRIERS[dtype]


def check_tensor(x: object, verb: str = "round") -> torch.dtype:
    """The dtype of ``x``, after checking that it is a tensor whose elements are read and written as they stand.

    Such tensors are dense and of plain types: `torch.Tensor`, its subclasses that leave the operators alone
    (`torch.nn.Parameter`), and the tensors without data that compilers use.

    Raises:
        TypeError: ``x`` is none of these: no tensor, a sparse, nested or mkldnn tensor, or a subclass with operators of
            its own, such as DTensor. The message names a remedy.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}: use torch.tensor(x), or fpsim.reference")
    if x.is_nested:
        raise TypeError(f"cannot {verb} a nested tensor: {verb} its parts, x.unbind(), or its values, x.values()")
    if x.layout is not torch.strided:
        remedy = "x.to_dense()" if x.layout is torch._mkldnn else "x.values() or x.to_dense()"  # type: ignore[attr-defined]
        raise TypeError(f"cannot {verb} a tensor of layout {x.layout}: {verb} {remedy} in its place")
    if not _leaves_operators_alone(type(x)):
        raise TypeError(
            f"cannot {verb} a tensor of type {type(x).__name__}, whose operators are its own: {verb} the plain tensor "
            "that it holds (of a DTensor, x.to_local() or x.full_tensor())"
        )
    return x.dtype


@torch._dynamo.assume_constant_result
def _leaves_operators_alone(kind: type) -> bool:
    own = getattr(kind, "__torch_dispatch__", None)
    return own in (None, torch._C._disabled_torch_dispatch_impl, torch.Tensor.__torch_dispatch__) or issubclass(
        kind, FakeTensor | FunctionalTensor
    )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a carrier is rounded: float32 for the 16-bit carriers, the carrier itself otherwise."""
    return dtype if dtype in INTEGER_OF else torch.float32


@lru_cache(maxsize=1024)
def grid_of(fmt: FloatFormat, dtype: torch.dtype, scaled: bool = False) -> Grid:
    """The grid of ``fmt`` in the working carrier of ``dtype``; raises the errors of `check_carrier`."""
    check_carrier(dtype, fmt)
    return Grid(fmt, CARRIERS[working_dtype(dtype)], scaled)
