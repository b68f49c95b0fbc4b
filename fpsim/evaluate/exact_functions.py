"""Exact elementwise functions, by mpmath, under the names of torch's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import torch

from fpsim.suggestions import did_you_mean

#: From a number of mpmath to the exact value, as exact as mpmath's working precision.
Exact = Callable[[Any], Any]


def _half(x: Any) -> Any:
    return mpmath.mpf(x) / 2


#: Names, and the functions for which they stand.
NAMED: dict[str, Exact] = {
    "exp": mpmath.exp,
    "exp2": lambda x: mpmath.power(2, x),
    "expm1": mpmath.expm1,
    "log": mpmath.log,
    "log2": lambda x: mpmath.log(x) / mpmath.ln2,
    "log10": lambda x: mpmath.log(x) / mpmath.ln10,
    "log1p": lambda x: mpmath.log1p(x) if x > -1 else mpmath.log(1 + x),
    "sqrt": mpmath.sqrt,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tan": mpmath.tan,
    "asin": mpmath.asin,
    "acos": mpmath.acos,
    "atan": mpmath.atan,
    "sinh": mpmath.sinh,
    "cosh": mpmath.cosh,
    "tanh": mpmath.tanh,
    "asinh": mpmath.asinh,
    "acosh": mpmath.acosh,
    "atanh": mpmath.atanh,
    "erf": mpmath.erf,
    "erfc": mpmath.erfc,
    "erfinv": mpmath.erfinv,
    "lgamma": lambda x: mpmath.log(abs(mpmath.gamma(x))),
    "digamma": mpmath.digamma,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "gelu": lambda x: _half(x) * mpmath.erfc(-x / mpmath.sqrt(2)),
    "gelu_tanh": lambda x: _half(x) * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + x**3 * 44715 / 10**6))),
    "i0": lambda x: mpmath.besseli(0, x),
    "i1": lambda x: mpmath.besseli(1, x),
    "i0e": lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(0, x),
    "i1e": lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(1, x),
    "bessel_j0": lambda x: mpmath.besselj(0, x),
    "bessel_j1": lambda x: mpmath.besselj(1, x),
}


def _torch_functions() -> dict[Any, str]:
    homes = (torch, torch.special, torch.nn.functional)
    return {function: name for name in NAMED for home in homes if callable(function := getattr(home, name, None))}


def exact_function(function: Callable[..., Any], given: Exact | str | None) -> Exact:
    """The exact function: ``given``, the one of that name, or the one of ``function`` if that is a function of torch.

    Raises:
        ValueError: the name is unknown, or ``function`` is none of torch's and nothing is given.
    """
    if callable(given):
        return given
    name = _torch_functions().get(function) if given is None else given
    if name is None:
        raise ValueError(
            f"the exact values of {getattr(function, '__name__', function)!s} are not known: pass exact=, a function "
            f"of an mpmath number, the name of one of mpmath's functions, or one of {', '.join(NAMED)}"
        )
    found = NAMED.get(name) or getattr(mpmath, name, None)
    if not callable(found):
        raise ValueError(f"unknown exact function {name!r}{did_you_mean(name, NAMED)}: use {', '.join(NAMED)}")
    return found
