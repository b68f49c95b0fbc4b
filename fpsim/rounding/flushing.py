"""Arithmetic that a thread's flush-to-zero mode (`torch.set_flush_denormal`) does not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def keeping_subnormals(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, which computes in floating point, with the same results where subnormals are flushed to zero.

    Flushing is off in this thread while the function runs, and on again afterwards. Code that torch compiles does not
    switch it off.
    """

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling() or not _flushes():
            return function(*args, **kwargs)
        torch.set_flush_denormal(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_flush_denormal(True)

    return run


def _flushes() -> bool:
    """Whether this thread flushes subnormals to zero: half of the least normal number is zero then."""
    return math.ldexp(1.0, -1022) * 0.5 == 0.0
