"""The five flags: against MPFR, against the processor, and clause 7 of IEEE 754 case by case."""

import platform
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import ROUNDINGS, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    NEGATIVE_ZERO,
    Flags,
    add,
    convert,
    div,
    exp,
    exp2,
    fma,
    log,
    mul,
    pow,
    remainder,
    rsqrt,
    sin,
    sqrt,
    sub,
    sum,
    with_flags,
)
from tests.reference.raised_flags import flags
from tests.shared.formats import operand_count, values_near_the_ends
from tests.shared.peers import MPFR_ARITHMETIC, MPFR_FUNCTIONS, MPFR_MODES, mpfr_like, to_mpfr

NONE, INVALID, DIVIDE_BY_ZERO = Flags.NONE, Flags.INVALID, Flags.DIVIDE_BY_ZERO
OVERFLOW, UNDERFLOW = Flags.OVERFLOW | Flags.INEXACT, Flags.UNDERFLOW | Flags.INEXACT
INEXACT = Flags.INEXACT


# -- other implementations ---------------------------------------------------------------------------------------------

MPFR = MPFR_ARITHMETIC | {name: MPFR_FUNCTIONS[name] for name in ("exp", "log", "tanh", "sin")}


@settings(max_examples=500)
@given(st.data(), st.sampled_from(list(MPFR)), st.sampled_from(list(MPFR_MODES)))
def test_flags_are_those_of_mpfr(data, name, rounding):
    """All flags but underflow, which MPFR defines for its own exponent range, before it makes a result subnormal."""
    fmt = parse_format(f"e{data.draw(st.integers(2, 8))}m{data.draw(st.integers(1, 12))}")
    operands = [data.draw(values_near_the_ends(fmt)) for _ in range(operand_count(name))]
    numbers = list(map(to_mpfr, operands))
    with mpfr_like(fmt, rounding) as context:
        result = MPFR[name](*numbers)
        raised = [context.invalid, context.divzero, context.overflow, result.rc != 0]
    got = flags(getattr(reference, name), *operands, format=fmt, rounding=rounding)
    # A NaN operand is no invalid operation (it is quiet); gmpy2 raises its own flag for every NaN.
    if NAN in operands:
        assert got == NONE
        return
    if name == "log" and operands[0] in (0, NEGATIVE_ZERO):
        raised[1] = True  # MPFR raises it; gmpy2 does not look
    assert got & ~Flags.UNDERFLOW == sum_of(raised)


def sum_of(raised: list[bool]) -> Flags:
    total = NONE
    for flag, up in zip((INVALID, DIVIDE_BY_ZERO, Flags.OVERFLOW, Flags.INEXACT), raised, strict=True):
        total |= flag if up else NONE
    return total


@pytest.mark.parametrize(("name", "dtype"), [("fp32", np.float32), ("fp64", np.float64)])
@settings(max_examples=300)
@given(st.data())
def test_flags_are_those_of_the_processor(name, dtype, data):
    """All flags that numpy reports: all but inexact. x86 detects tininess after rounding, Arm before."""
    fmt = parse_format(name)
    values = values_near_the_ends(fmt).filter(lambda v: v is not NAN)
    operation = data.draw(st.sampled_from(("add", "sub", "mul", "div")))
    a, b = data.draw(values), data.draw(values)
    x, y = (dtype(reference.to_float(v)) for v in (a, b))
    raised: list[str] = []
    with np.errstate(all="call", call=lambda kind, _: raised.append(kind)):
        {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[operation](x, y)
    names = {"divide by zero": DIVIDE_BY_ZERO, "overflow": Flags.OVERFLOW, "underflow": Flags.UNDERFLOW}
    expected = NONE
    for kind in raised:
        expected |= names.get(kind, INVALID)
    tininess = "after" if platform.machine() in ("x86_64", "AMD64") else "before"
    got = flags(getattr(reference, operation), a, b, format=fmt, tininess=tininess)
    assert got & ~Flags.INEXACT == expected


# -- clause by clause --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "operands"),
    [
        (add, (INFINITY, NEGATIVE_INFINITY)),
        (sub, (INFINITY, INFINITY)),
        (mul, (0, NEGATIVE_INFINITY)),
        (div, (0, 0)),
        (div, (INFINITY, INFINITY)),
        (fma, (0, INFINITY, 1)),
        (fma, (1, INFINITY, NEGATIVE_INFINITY)),
        (sqrt, (-1,)),
        (rsqrt, (-1,)),
        (remainder, (INFINITY, 1)),
        (remainder, (1, 0)),
        (log, (-1,)),
        (sin, (INFINITY,)),
        (pow, (-2, 0.5)),
    ],
)
def test_invalid(operation, operands):
    """Clauses 7.2 and 9.2.1."""
    assert flags(operation, *operands) == INVALID


@pytest.mark.parametrize("operands", [(1, 0), (-1, NEGATIVE_ZERO)])
def test_divide_by_zero(operands):
    """Clauses 7.3 and 9.2.1. If infinity saturates, the result is out of range too."""
    assert flags(div, *operands) == DIVIDE_BY_ZERO
    assert flags(div, *operands, format="e4m3fn") == DIVIDE_BY_ZERO | OVERFLOW
    assert flags(div, INFINITY, 0) == NONE
    for operation, arguments in ((log, (0,)), (rsqrt, (-0.0,)), (pow, (0, -1)), (pow, (-0.0, -2.5))):
        assert flags(operation, *arguments) == DIVIDE_BY_ZERO
    assert flags(pow, 0, NEGATIVE_INFINITY) == NONE


def test_exact_results_raise_nothing():
    for case in ((add, 1, 2), (mul, 0, 5), (sub, 1, 1), (sqrt, 4), (sqrt, NEGATIVE_ZERO), (pow, 4, 1.5), (exp2, -20)):
        assert flags(*case) == NONE
    for special in (NAN, INFINITY, NEGATIVE_INFINITY, NEGATIVE_ZERO):
        assert flags(convert, special) == NONE


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_overflow_in_every_direction(rounding):
    """Clause 7.4: the flag depends on the result rounded with unbounded exponent, not on the delivered value."""
    for beyond in (65536, 10**9, -(10**9)):
        assert flags(convert, beyond, rounding=rounding) == OVERFLOW
        assert flags(convert, beyond, rounding=rounding, overflow="sat_finite") == OVERFLOW
    above_largest = 65504 + Fraction(1, 2)
    assert flags(convert, above_largest, rounding=rounding) == (OVERFLOW if rounding == "up" else INEXACT)
    assert flags(exp, 1e300, rounding=rounding) == OVERFLOW


def test_what_has_no_code():
    """In formats that are not in IEEE 754."""
    assert flags(convert, NAN, format="e2m1fn") == INVALID
    assert flags(convert, INFINITY, format="e4m3fn") == OVERFLOW
    assert flags(convert, INFINITY, format="e4m3fn", overflow="sat_propagate") == OVERFLOW, "it becomes NaN"
    assert flags(convert, -1, format="e4m3fn:unsigned") == OVERFLOW
    assert flags(convert, Fraction(-1, 2**99), format="e4m3fn:unsigned") == UNDERFLOW
    assert flags(convert, 0, format="e8m0fnu") == OVERFLOW
    assert flags(convert, NEGATIVE_ZERO, format="e4m3fnuz") == NONE


SMALLEST_NORMAL, QUANTUM = Fraction(1, 2**14), Fraction(1, 2**24)


def test_exact_subnormals_do_not_underflow():
    """Clause 7.5, default handling."""
    assert flags(div, SMALLEST_NORMAL, 2) == flags(convert, QUANTUM) == NONE
    assert flags(convert, QUANTUM * Fraction(3, 2)) == flags(convert, QUANTUM / 2**90, rounding="up") == UNDERFLOW
    assert flags(exp, -1e300) == UNDERFLOW


def test_underflow_by_tininess_after_and_before_rounding():
    """The two definitions differ only within a quarter of a quantum below the smallest normal number."""
    just_below = SMALLEST_NORMAL - QUANTUM / 8  # half a quantum with 11 bits is QUANTUM / 4
    for tininess, expected in (("after", INEXACT), ("before", UNDERFLOW)):
        result = with_flags(convert, just_below, format="fp16", tininess=tininess)
        assert (result.value, result.flags) == (SMALLEST_NORMAL, expected)
    between = SMALLEST_NORMAL - QUANTUM * Fraction(3, 8)  # rounds to the smallest normal number, with 11 bits not
    for tininess in ("after", "before"):
        result = with_flags(convert, between, format="fp16", tininess=tininess)
        assert (result.value, result.flags) == (SMALLEST_NORMAL, UNDERFLOW)


def test_a_format_without_subnormals_underflows_when_it_flushes():
    half = SMALLEST_NORMAL / 2
    assert with_flags(convert, half, format="fp16:nosubnormals").value == 0
    assert flags(convert, half, format="fp16:nosubnormals") == UNDERFLOW
    assert flags(convert, SMALLEST_NORMAL - QUANTUM / 8, format="fp16:nosubnormals") == INEXACT


@settings(max_examples=300)
@given(st.fractions(), st.integers(-40, 40), st.sampled_from(ROUNDINGS), st.sampled_from(("e4m3", "e4m3fn", "e5m2")))
def test_inexact_says_whether_the_value_is_exact(x, exponent, rounding, name):
    x *= Fraction(2) ** exponent
    result = with_flags(convert, x, format=name, rounding=rounding)
    exact = result.value == x or (x == 0 and result.value is NEGATIVE_ZERO)
    assert (Flags.INEXACT in result.flags) == (not exact)
    assert result.value == reference.round(x, name, rounding)


def test_errors():
    with pytest.raises(ValueError, match="no operation"):
        with_flags(max, 1, 2, format="fp16")
    with pytest.raises(ValueError, match="unknown tininess 'never': use one of after, before"):
        with_flags(add, 1, 2, format="fp16", tininess="never")
    with pytest.raises(TypeError, match=r"add\(\) missing 1 required positional argument: 'b'"):
        with_flags(add, 1, format="fp16")
    with pytest.raises(TypeError, match="add has no option accumulator, order: only sum and dot have some"):
        with_flags(add, 1, 2, format="fp16", accumulator="fp16", order="kahan")
    with pytest.raises(TypeError, match="unexpected keyword argument 'product'"):
        with_flags(sum, [1], format="fp16", product="fp16")
    with pytest.raises(TypeError, match="a number is"):
        with_flags(add, [1], [2], format="fp16")
    with pytest.raises(TypeError, match="random is an int, got"):
        with_flags(add, 1, 2, format="fp16", rounding="stochastic:3", random=[1])
    with pytest.raises(ValueError, match="unknown tininess 'never'"):
        with_flags(sum, [1], format="fp16", tininess="never")
    with pytest.raises(ValueError, match="unknown order 'random'"):
        with_flags(sum, [1], format="fp16", order="random")
