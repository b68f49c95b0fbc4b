"""Codes: the bit patterns of a carrier's floats, as arrays of unsigned integers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim import reference
from fpsim.formats import FloatFormat
from fpsim.reference.values import Value, is_negative, magnitude

Codes = NDArray[np.unsignedinteger]  #: bit patterns of a carrier

_SIGNED: dict[int, torch.dtype] = {16: torch.int16, 32: torch.int32, 64: torch.int64}
_UNSIGNED: dict[int, type[np.unsignedinteger]] = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def unsigned_of(carrier: FloatFormat) -> type[np.unsignedinteger]:
    """The numpy type of the codes of ``carrier``: an unsigned integer of its width."""
    return _UNSIGNED[carrier.bits]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def codes_of(x: torch.Tensor) -> Codes:
    """The bit patterns of a CPU tensor of floats, as unsigned integers; a view where ``x`` is contiguous."""
    bits = x.dtype.itemsize * 8
    return x.detach().contiguous().view(_SIGNED[bits]).numpy().view(_UNSIGNED[bits])


def tensor_of(codes: Codes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The floats of type ``dtype`` with these bit patterns; shares the memory of ``codes``."""
    return torch.from_numpy(codes.view(name_of(_SIGNED[dtype.itemsize * 8]))).view(dtype)


def code_of(value: Value, carrier: FloatFormat) -> tuple[int, bool]:
    """The code in ``carrier`` (IEEE) of ``value`` rounded toward zero.

    Returns:
        The code, and whether it stands for ``value`` itself. (NaN has the carrier's canonical code.)
    """
    if value is reference.NAN:
        return carrier.nan_code, True  # type: ignore[return-value]  # IEEE carriers have a NaN
    sign = carrier.sign_code if is_negative(value) else 0
    if value in (reference.INFINITY, reference.NEGATIVE_INFINITY):
        return sign | (carrier.max_code + 1), True
    exact = magnitude(value)
    if exact == 0:
        return sign, True
    numerator, denominator = exact.numerator, exact.denominator
    exponent = numerator.bit_length() - denominator.bit_length()  # of the leading bit, or one more
    exponent -= numerator << max(-exponent, 0) < denominator << max(exponent, 0)
    exponent = max(exponent, carrier.emin)
    shift = carrier.mantissa_bits - exponent
    significand, rest = divmod(numerator << max(shift, 0), denominator << max(-shift, 0))
    code = ((exponent - carrier.emin) << carrier.mantissa_bits) + significand
    if code > carrier.max_code:
        return sign | carrier.max_code, False
    return sign | code, rest == 0


def exact_code_of(value: Value, carrier: FloatFormat) -> int:
    """The code of a value that ``carrier`` has.

    Raises:
        ValueError: ``carrier`` lacks the value.
    """
    code, exact = code_of(value, carrier)
    if not exact:
        raise ValueError(f"{carrier.name} lacks the value {value}")
    return code


def is_nan(codes: Codes, carrier: FloatFormat) -> NDArray[np.bool_]:
    """Which codes of ``carrier`` stand for NaN."""
    return (codes & codes.dtype.type(carrier.sign_code - 1)) > carrier.max_code + 1


def differences(got: Codes, want: Codes, carrier: FloatFormat) -> NDArray[np.intp]:
    """The positions where two flat arrays of codes differ bit for bit; all NaNs count as equal.

    >>> nan, other_nan, zero, negative_zero = np.array([0x7FC00000, 0xFFFFFFFF, 0, 1 << 31], np.uint32)
    >>> differences(np.array([nan, zero]), np.array([other_nan, negative_zero]), FloatFormat(8, 23))
    array([1])
    """
    positions = np.flatnonzero(got != want)
    return positions[~(is_nan(got[positions], carrier) & is_nan(want[positions], carrier))]
