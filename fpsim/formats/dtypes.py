"""Dtypes of torch as formats. This package does not import torch: the exact reference uses it too."""

from __future__ import annotations

from typing import Any, Protocol

from fpsim.formats.float import FloatFormat
from fpsim.formats.names import parse_format as parse_name


class Dtype(Protocol):
    """A dtype of torch, by its attributes: this package names no type of torch either."""

    @property
    def is_floating_point(self) -> bool: ...

    @property
    def itemsize(self) -> int: ...


def format_name(given: Any) -> Any:
    """The name of the format that a dtype of torch stands for; any other value is returned unchanged.

    A dtype stands for the set of its values, and for nothing else: ``torch.float8_e4m3fn`` is ``"float8_e4m3fn"``, with
    the rounding and the overflow mode that fpsim uses for this name. They need not be those of ``Tensor.to``.
    ``torch.float4_e2m1fn_x2`` stands for the values that it packs in pairs.

    Raises:
        ValueError: the dtype is that of integers, Booleans or complex numbers.

    >>> format_name("e5m2")
    'e5m2'
    """
    kind = type(given)
    if kind.__name__ != "dtype" or kind.__module__ != "torch":
        return given
    name = str(given).removeprefix("torch.")
    if not name.startswith(("float", "bfloat")):
        raise ValueError(
            f"{given} is no floating-point dtype: name a format, such as torch.bfloat16 or 'e4m3fn'. Integers with a "
            "scale for each row are 'int8'"
        )
    return name


def parse_format(name: str | FloatFormat | Dtype) -> FloatFormat:
    """The format that ``name`` denotes; a `FloatFormat` is returned unchanged.

    The names of ml_dtypes and torch are accepted with or without their prefix: ``e4m3fn``, ``float8_e4m3fn``,
    ``torch.bfloat16``, ``fp16``, ``tf32``. So are the floating-point dtypes of torch themselves (`format_name`). So is
    ``eXmY`` with an optional suffix ``fn``, ``fnuz`` or ``finite``
    (`FloatFormat.specials`; no suffix means ``ieee``), followed by any of the options ``:bias=N``, ``:nosubnormals``,
    ``:unsigned``, ``:nozero``. No option may repeat or contradict the name. As in ml_dtypes and OCP MX, ``e2m1fn``,
    ``e2m3fn`` and ``e3m2fn`` have neither infinity nor NaN: they are ``finite``. Names such as ``binary8p3se`` denote
    the formats of IEEE P3109 (draft): the width (3 to 15 bits), the precision, ``s``igned or ``u``nsigned,
    ``e``xtended (with infinities) or ``f``inite. Those with more than 11 exponent bits, such as ``binary15p2se``, are
    refused: no carrier has their values.

    Raises:
        ValueError: there is no such format, or ``name`` is the dtype of integers. The message lists similar names.
        TypeError: ``name`` is neither a string nor a `FloatFormat` nor a dtype of torch.

    >>> parse_format("float8_e4m3fn") == FloatFormat(4, 3, specials="fn")
    True
    >>> parse_format("e5m2:bias=16:nosubnormals").smallest_normal
    3.0517578125e-05
    """
    return parse_name(name if isinstance(name, str | FloatFormat) else format_name(name))
