"""Simulate any reduced-precision floating-point format in any PyTorch model, exactly."""

from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding import decode, encode, round

__all__ = ["FloatFormat", "decode", "encode", "parse_format", "round"]
