"""Strategies of hypothesis: formats, values where rounding is likely to be wrong, and tensors of arbitrary bits.

The public names of this file are handed on by `fpsim.testing`. Each imports hypothesis when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fpsim import reference
from fpsim.formats import NAMED_FORMATS, SPECIALS, FloatFormat, parse_format
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.verify.codes import code_of, name_of, tensor_of, unsigned_of
from fpsim.verify.judges import judge

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def formats(
    *, max_bits: int = 16, dtype: torch.dtype = torch.float32, named: bool = True
) -> SearchStrategy[FloatFormat]:
    """A strategy of hypothesis: formats that ``dtype`` can carry, with every convention of special values.

    Args:
        max_bits: the greatest width of a format's codes, 3 or more.
        dtype: the carrier.
        named: whether half of the formats are from `fpsim.formats.NAMED_FORMATS`.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: ``max_bits`` is less than 3.
        TypeError: ``dtype`` is not a carrier.
    """
    st = _strategies()
    if max_bits < 3:
        raise ValueError(f"max_bits={max_bits}: the narrowest formats drawn have 3 bits, use 3 or more")
    if dtype not in CARRIERS:
        raise TypeError(f"{dtype} is not a carrier: use one of {', '.join(map(name_of, CARRIERS))}")

    def acceptable(fmt: FloatFormat | None) -> bool:
        return fmt is not None and fmt.bits <= max_bits and fmt.max > 0 and fmt.is_subset_of(CARRIERS[dtype])

    def build(e: int, m: int, specials: str, shift: int, subnormals: bool, signed: bool) -> FloatFormat | None:
        try:
            usual = FloatFormat(e, m, specials=specials, subnormals=subnormals, signed=signed)  # type: ignore[arg-type]
            return replace(usual, bias=usual.bias + shift) if shift else usual
        except ValueError:  # no such format: an unsigned fnuz, or values that float64 lacks
            return None

    drawn = st.builds(
        build,
        st.integers(1, min(max_bits - 1, CARRIERS[dtype].exponent_bits)),
        st.integers(0, min(max_bits - 2, CARRIERS[dtype].mantissa_bits)),
        st.sampled_from(SPECIALS),
        st.just(0) | st.integers(-4, 4),
        st.booleans(),
        st.booleans(),
    ).filter(acceptable)
    known = [fmt for fmt in map(parse_format, NAMED_FORMATS) if acceptable(fmt)]
    return st.one_of(st.sampled_from(known), drawn) if named and known else drawn


def values_near_boundaries(
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    radius: int = 2,
    allow_nan: bool = True,
    allow_infinity: bool = True,
) -> SearchStrategy[float]:
    """A strategy of hypothesis: Python floats that ``dtype`` has, near the points where results change.

    They are at most ``radius`` codes away from a boundary between two results, from a result itself, or from zero,
    infinity, NaN or an extreme of ``dtype``: `fpsim.verify.Judge.probes`. Examples shrink toward the positive numbers
    nearest to zero.

    Args:
        format: a name or a `FloatFormat`, of at most 18 exponent and mantissa bits.
        rounding: one of `fpsim.formats.ROUNDINGS`.
        overflow: as in `fpsim.round`.
        dtype: float64, float32, bfloat16 or float16.
        radius: the greatest distance, in codes.
        allow_nan, allow_infinity: whether these are drawn.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: an unknown format or mode, a format too wide for a table, or one that ``dtype`` cannot carry.
        TypeError: ``dtype`` is not a carrier.
    """
    st = _strategies()
    if radius < 0:
        raise ValueError(f"radius={radius}: use 0 or more")
    numbers = tensor_of(judge(format, rounding, overflow, dtype).probes(radius), dtype).double().numpy()
    if not allow_nan:
        numbers = numbers[~np.isnan(numbers)]
    if not allow_infinity:
        numbers = numbers[~np.isinf(numbers)]
    return st.integers(0, len(numbers) - 1).map(lambda i: float(numbers[i]))


def tensors(
    format: str | FloatFormat | torch.dtype = torch.float32,
    shapes: Any = None,
    *,
    dtype: torch.dtype | None = None,
    allow_nan: bool = True,
    allow_infinity: bool = True,
) -> SearchStrategy[torch.Tensor]:
    """A strategy of hypothesis: contiguous CPU tensors of arbitrary bit patterns.

    Args:
        format: a format, to draw its values only, or a dtype, to draw all of its bit patterns.
        shapes: a shape (a tuple of ints), a strategy of shapes, or None for shapes of up to 3 dimensions of 0 to 5.
        dtype: of the tensor, if ``format`` is a format. None means float32, or float64 if float32 cannot carry it.
        allow_nan, allow_infinity: whether these are drawn.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
        ValueError: an unknown format, or one that ``dtype`` cannot carry.
        TypeError: a dtype that is not a carrier, or two different dtypes.
    """
    st = _strategies()
    if isinstance(format, torch.dtype):
        if dtype is not None and dtype != format:
            raise TypeError(f"two dtypes, {format} and {dtype}: give one of them")
        if format not in CARRIERS:
            raise TypeError(f"{format} is not a carrier: use one of {', '.join(map(name_of, CARRIERS))}")
        fmt, dtype = CARRIERS[format], format
    else:
        fmt = parse_format(format)
        if dtype is None:
            dtype = torch.float32 if fmt.is_subset_of(CARRIERS[torch.float32]) else torch.float64
        check_carrier(dtype, fmt)
    carrier = CARRIERS[dtype]
    chosen: SearchStrategy[Any] = st.lists(st.integers(0, 5), max_size=3).map(tuple) if shapes is None else shapes
    if isinstance(chosen, Sequence):
        chosen = st.just(tuple(chosen))

    def code(number: int) -> int | None:
        return number if fmt == carrier else code_of(reference.decode(number, fmt), carrier)[0]

    def wanted(number: int | None) -> bool:
        if number is None:
            return False
        size = number & (carrier.sign_code - 1)
        return (allow_nan or size <= carrier.max_code + 1) and (allow_infinity or size != carrier.max_code + 1)

    if fmt.bits <= 8:  # few enough to list, which saves drawing again
        elements = st.sampled_from([each for each in map(code, range(1 << fmt.bits)) if wanted(each)])
    else:
        elements = st.integers(0, (1 << fmt.bits) - 1).map(code).filter(wanted)

    def fill(shape: tuple[int, ...]) -> SearchStrategy[torch.Tensor]:
        size = int(np.prod(shape, dtype=np.int64))
        listed = st.lists(elements, min_size=size, max_size=size)
        return listed.map(lambda codes: tensor_of(np.array(codes, unsigned_of(carrier)), dtype).reshape(shape))

    return chosen.flatmap(fill)


def _strategies() -> Any:
    try:
        return importlib.import_module("hypothesis.strategies")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "hypothesis is not installed; the strategies of fpsim.testing need it: pip install hypothesis, "
            "or pip install 'fpsim-torch[dev]'"
        ) from error
