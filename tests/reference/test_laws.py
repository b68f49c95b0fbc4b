"""Laws that rounding obeys in every format: formats of all conventions and biases, and all directions, at random."""

from fractions import Fraction

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fpsim.formats import OVERFLOWS, ROUNDINGS, SPECIALS, FloatFormat
from fpsim.reference import (
    NAN,
    NEGATIVE_ZERO,
    Special,
    as_value,
    decode,
    encode,
    is_finite,
    round,
)
from fpsim.reference.values import INFINITIES, magnitude, negate, order, rational
from tests.shared.formats import overflows

few = settings(max_examples=150)


@st.composite
def formats(draw, signed=None, subnormals=None) -> FloatFormat:
    specials = draw(st.sampled_from(SPECIALS))
    signed = draw(st.booleans()) if signed is None and specials != "fnuz" else signed is not False
    subnormals = draw(st.booleans()) if subnormals is None else subnormals
    assume(signed or specials != "fnuz")
    exponent_bits, mantissa_bits = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    assume(specials != "p3109" or exponent_bits + mantissa_bits > 1)
    return FloatFormat(
        exponent_bits,
        mantissa_bits,
        draw(st.none() | st.integers(-20, 40)),
        specials,
        subnormals,
        signed,
        zero=signed or subnormals or draw(st.booleans()),
    )


@st.composite
def numbers_near(draw, fmt: FloatFormat) -> Fraction:
    """Numbers at and next to values and middles, below and above the range, and anywhere."""
    value = decode(draw(st.integers(0, fmt.max_code)), fmt)
    quantum = Fraction(2) ** (fmt.emin - fmt.mantissa_bits)
    near_value = value + draw(st.sampled_from((-1, 0, 1))) * quantum / 2**90
    ulp = max(quantum, value / 2**fmt.mantissa_bits)
    near_middle = near_value + ulp * draw(st.sampled_from((Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), 1)))
    anywhere = draw(st.fractions(0, 3)) * draw(st.sampled_from((quantum, 1, Fraction(fmt.max))))
    return draw(st.sampled_from((1, -1))) * draw(st.sampled_from((near_value, near_middle, anywhere)))


@st.composite
def cases(draw, **facts):
    """A format, a finite number, a rounding and an overflow mode that the format can take."""
    fmt = draw(formats(**facts))
    return fmt, draw(numbers_near(fmt)), draw(st.sampled_from(ROUNDINGS)), draw(st.sampled_from(overflows(fmt)))


@few
@given(cases())
def test_a_result_is_a_value_of_the_format(case):
    fmt, x, rounding, overflow = case
    result = round(x, fmt, rounding, overflow)
    code = encode(x, fmt, rounding, overflow)
    assert 0 <= code < 1 << fmt.bits
    assert decode(code, fmt) == result


@few
@given(cases(), st.sampled_from(ROUNDINGS), st.sampled_from(OVERFLOWS))
def test_values_of_the_format_stay_in_every_direction(case, other_rounding, other_overflow):
    fmt, x, rounding, overflow = case
    result = round(x, fmt, rounding, overflow)
    assert round(result, fmt, other_rounding, overflow) == result
    if is_finite(result) and (fmt.has_infinity or fmt.has_nan):
        assert round(result, fmt, other_rounding, other_overflow) == result


@few
@given(cases(), st.data())
def test_rounding_is_monotone(case, data):
    fmt, x, rounding, overflow = case
    y = data.draw(numbers_near(fmt) | st.sampled_from((*INFINITIES, NEGATIVE_ZERO)))
    # eXm0:unsigned has no NaN for what is below zero: the largest value stands there, and no order is left
    assume(fmt.signed or fmt.has_nan or overflow == "sat_finite")
    low, high = sorted((x, y), key=order)
    below, above = round(low, fmt, rounding, overflow), round(high, fmt, rounding, overflow)
    if NAN not in (below, above):
        assert order(below) <= order(above)


@few
@given(cases(signed=True), st.sampled_from((None, *INFINITIES, NEGATIVE_ZERO)))
def test_up_mirrors_down_and_the_other_directions_mirror_themselves(case, special):
    fmt, x, rounding, overflow = case
    x = x if special is None else special
    mirrored = {"up": "down", "down": "up"}.get(rounding, rounding)
    left, right = round(negate(x), fmt, mirrored, overflow), negate(round(x, fmt, rounding, overflow))
    assert left == right or (left == 0 and right is NEGATIVE_ZERO and not fmt.has_negative_zero)


@few
@given(cases(subnormals=True))
def test_a_result_is_one_of_the_two_neighbours(case):
    fmt, x, rounding, overflow = case
    assume(abs(x) <= fmt.max and (fmt.signed or x >= 0))
    below, above = rational(round(x, fmt, "down", overflow)), rational(round(x, fmt, "up", overflow))
    assert below <= x <= above and (below == above) == (below == x)
    result = rational(round(x, fmt, rounding, overflow))
    assert result in (below, above)
    if rounding.startswith("nearest"):
        assert abs(x - result) == min(x - below, above - x)
    if below != above:
        codes = {encode(v, fmt) & ~fmt.sign_code for v in (below, above)}
        assert max(codes) - min(codes) == 1, "the neighbours are not adjacent"
    if rounding == "to_odd" and result != x:
        assert encode(result, fmt) % 2 == 1


@few
@given(cases())
@example((FloatFormat(1, 3, subnormals=False), Fraction(31, 16), "nearest_even", "ovf_inf"))
def test_rounding_is_rounding_to_precision_then_flushing_then_the_range_check(case):
    """The first step rounds to a format with a far larger exponent range, and the same parity of the exponent field."""
    fmt, x, rounding, overflow = case
    assume(x > 0 or (fmt.signed and x < 0))
    assume(not fmt.subnormals or abs(x) >= fmt.smallest_normal)
    unbounded = FloatFormat(10, fmt.mantissa_bits, 512 + fmt.bias % 2, "finite")
    expected = magnitude(round(x, unbounded, rounding))
    if expected < fmt.smallest_normal:
        expected = Fraction(0 if fmt.zero else fmt.smallest_normal)
    result = round(x, fmt, rounding, overflow)
    if expected <= fmt.max:
        assert magnitude(result) == expected
    elif overflow != "ovf_inf":
        assert magnitude(result) == fmt.max
    else:
        assert result in (*INFINITIES, NAN) or magnitude(result) == fmt.max


@few
@given(cases())
def test_rounding_to_odd_first_is_innocuous(case):
    """Boldo and Melquiond 2008, theorem 1, in a format with two more bits and a larger range."""
    fmt, x, rounding, overflow = case
    wide = FloatFormat(10, fmt.mantissa_bits + 2, 512, "finite")
    assert round(round(x, wide, "to_odd"), fmt, rounding, overflow) == round(x, fmt, rounding, overflow)


@few
@given(cases(signed=True))
def test_an_unsigned_format_has_the_positive_half_of_its_signed_twin(case):
    fmt, x, rounding, overflow = case
    assume(fmt.specials not in ("fnuz", "p3109") and x >= 0)  # whose NaN stands elsewhere in the unsigned twin
    unsigned = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.specials, fmt.subnormals, signed=False)
    assert round(x, unsigned, rounding, overflow) == round(x, fmt, rounding, overflow)


@few
@given(st.floats(allow_nan=False), st.sampled_from(ROUNDINGS), st.sampled_from(("sat_propagate", "ovf_inf")))
def test_every_float_is_a_value_of_fp64(number, rounding, overflow):
    assert round(number, "fp64", rounding, overflow) == as_value(number)
    assert isinstance(as_value(number), Special | Fraction)
