"""The rules that compute a scale from the largest magnitude of a tensor, in integer arithmetic.

Like the functions of `fpsim.rounding.kernel`, they use only integers and an executor (`fpsim.rounding.kernel.Ops`). So
the same source runs on torch tensors, on values of Inductor's intermediate language, and on plain ints.
"""

from __future__ import annotations

from fpsim.formats import FloatFormat
from fpsim.rounding.kernel import Grid, Int, Ops, extend


def power_of_two_code(amax: Int, fmt: FloatFormat, carrier: FloatFormat, ops: Ops) -> Int:
    """The carrier's code of the power-of-two scale.

    Args:
        amax: the carrier's code of the largest magnitude.
        fmt: the format.
        carrier: float32 or float64.
        ops: the executor.
    """
    m, bias, grid = carrier.mantissa_bits, carrier.bias, Grid(fmt, carrier, scaled=True)
    largest, largest_mantissa = grid.max >> m, grid.max & (grid.implicit - 1)
    a = extend(amax, grid, ops)
    power = largest - (a >> m)
    power = power - ops.choose(ops.less(a & (grid.implicit - 1), largest_mantissa + 1), 0, 1)
    usable = ops.less(amax, carrier.max_code + 1) & ~ops.less(amax, 1)
    return (ops.choose(usable, ops.clamp(power, 1 - bias, bias - 1), 0) + bias) << m
