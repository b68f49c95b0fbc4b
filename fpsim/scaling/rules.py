"""The rules that compute a scale from the largest magnitude of a tensor, in integer arithmetic.

Like the functions of `fpsim.rounding.kernel`, they use only integers and an executor (`fpsim.rounding.kernel.Ops`). So
the same source runs on torch tensors, on values of Inductor's intermediate language, and on plain ints.
"""

from __future__ import annotations

import math

from fpsim.formats import FloatFormat
from fpsim.rounding.kernel import Int, Ops


def factor_codes(amax: Int, maximum: float, carrier: FloatFormat, ops: Ops) -> tuple[Int, Int]:
    """The carrier's codes of the power-of-two scale and of its reciprocal.

    Args:
        amax: the carrier's code of the largest magnitude.
        maximum: the largest finite value of the format.
        carrier: float32 or float64.
        ops: the executor.
    """
    width, bias = carrier.mantissa_bits, carrier.bias
    fraction, exponent = math.frexp(maximum)
    mantissa = int((2 * fraction - 1) * (1 << width))
    # A subnormal number is a multiple of the smallest one, and its code is the factor, which is normal as a number.
    subnormal = ops.less(amax, 1 << width)
    normal = ops.choose(subnormal, ops.code_of_integer(amax), amax)
    power = exponent - 1 + bias - (normal >> width) - ops.choose(subnormal, carrier.emin - width, 0)
    power = power - ops.choose(ops.less((normal & ((1 << width) - 1)), mantissa + 1), 0, 1)
    usable = ops.less(amax, ((1 << carrier.exponent_bits) - 1) << width) & ~ops.less(amax, 1)
    power = ops.choose(usable, ops.clamp(power, 1 - bias, bias - 1), 0)
    return (bias + power) << width, (bias - power) << width
