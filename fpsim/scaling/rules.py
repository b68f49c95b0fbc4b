"""The rules that compute a scale from the largest magnitude of a tensor, in integer arithmetic.

Like the functions of `fpsim.rounding.kernel`, they use only integers and an executor (`fpsim.rounding.kernel.Ops`). So
the same source runs on torch tensors, on values of Inductor's intermediate language, and on plain ints.
"""

from __future__ import annotations

from fpsim.formats import FloatFormat, IntegerFormat
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


#: The multiplier that stands for a NaN scale. No power of two has these bits.
NAN_MARK = 2.0**-126 * (1 + 2.0**-7)
#: The bias of E8M0, and the largest exponent of its scales (OCP MX 1.0, section 5.4.1).
E8M0_BIAS = 127


def mx_multiplier_code(
    amax: Int, element: FloatFormat | IntegerFormat, rule: str, carrier: FloatFormat, ops: Ops
) -> Int:
    """The carrier's code of ``2**-k``, where ``2**k`` is the scale of a block: the numbers that it multiplies.

    With ``e = floor(log2(amax))`` and the exponent ``emax`` of the largest value of the element format, the exponent k
    is

    - ``floor``: e - emax (OCP MX 1.0, section 6.3);
    - ``ceil``: the same, plus 1 unless amax is a power of two;
    - ``rceil``: the least k for which amax is at most the largest value times 2^k;
    - ``even``: e' - emax, where e' is the exponent of amax rounded to the element's mantissa, ties away from zero.

    It is limited to -127 to 127, the range of E8M0. It is -127 if amax is zero.

    Args:
        amax: the carrier's code of the largest magnitude.
        element: the format of the elements.
        rule: one of `fpsim.scaling.scale.MX_RULES`.
        carrier: float32 or float64.
        ops: the executor.

    Returns:
        A code; that of 0 stands for 2^-127, which is no normal number of float32, and that of `NAN_MARK` for a NaN
        scale. The scale is NaN if the largest magnitude is infinite or NaN.
    """
    m, infinity = carrier.mantissa_bits, carrier.max_code + 1
    grid = Grid(carrier, carrier, scaled=True)
    a = extend(ops.clamp(amax, None, infinity), grid, ops)  # limited, so that no sum overflows
    if rule == "ceil":
        a = a + (grid.implicit - 1)
    elif rule == "rceil":
        a = a + (grid.implicit - 1 - (grid.code_of(element.max_units) & (grid.implicit - 1)))
    elif rule == "even" and m > element.mantissa_bits:
        a = a + (1 << (m - element.mantissa_bits - 1))
    power = ops.clamp((a >> m) - (carrier.bias + element.max_exponent), -E8M0_BIAS, E8M0_BIAS)
    multiplier = (carrier.bias - power) << m
    return ops.choose(ops.less(amax, infinity), multiplier, nan_mark_code(grid))


def nan_mark_code(grid: Grid) -> int:
    """The code of `NAN_MARK` in the grid's carrier."""
    return grid.plain_code_of(round(NAN_MARK * 2.0**133) << 941)
