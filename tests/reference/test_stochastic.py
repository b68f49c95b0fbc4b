"""Stochastic rounding of every operation: which random numbers round away from zero, counted from the definitions.

`fpsim.formats.split_rounding` defines three variants by d, the fraction of the way from the neighbour nearer to zero to
the other one. The judge below finds the neighbours among all values of a small format, and counts the multiples of
2**-N, or the middles between two, that d reaches. It compares numbers only: exact ones, squares, or MPFR's.
"""

from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import product

import gmpy2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import STOCHASTIC_ROUNDINGS, FloatFormat, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_ZERO,
    Flags,
    add,
    convert,
    cos,
    decode,
    div,
    encode,
    exp,
    exp2,
    fma,
    log,
    mul,
    pow,
    remainder,
    round,
    rsqrt,
    scaleb,
    sqrt,
    sub,
    tanh,
    with_flags,
)
from tests.shared.formats import operand_count
from tests.shared.peers import MPFR_FUNCTIONS

VARIANTS = tuple(STOCHASTIC_ROUNDINGS)
FORMATS = ("e3m2", "e4m3fn", "e2m1fn", "e3m0", "e4m1:nosubnormals", "e5m2fnuz")
few = settings(max_examples=100)


# -- the judge ---------------------------------------------------------------------------------------------------------


@cache
def grid(fmt: FloatFormat) -> list[Fraction]:
    """The magnitudes among which a format rounds. A format without subnormals has smaller ones, which are flushed."""
    with_subnormals = [decode(code, fmt) for code in range(fmt.max_code + 1)]
    return [v for v in with_subnormals if isinstance(v, Fraction) and (v or fmt.subnormals)]


def count_away(reaches: Callable[[Fraction], bool], variant: str, bits: int, below: Fraction, gap: Fraction) -> int:
    """How many of the 2**bits random numbers round to ``below + gap``; ``reaches(x)`` says if the number is >= x."""
    full = 1 << bits
    if variant == "stochastic":
        return len([k for k in range(1, full + 1) if reaches(below + gap * Fraction(k, full))])
    halves = [below + gap * Fraction(2 * k - 1, 2 * full) for k in range(1, full + 1)]
    count = len([half for half in halves if reaches(half)])
    if variant == "stochastic_c" and count % 2 == 1 and is_tie(reaches, halves[count - 1]):
        return count - 1  # ties go to the even multiple
    return count


def is_tie(reaches: Callable[[Fraction], bool], number: Fraction) -> bool:
    """Whether the number that ``reaches`` compares is ``number``. The judges have far fewer than 400 bits."""
    return reaches(number) and not reaches(number * (1 + Fraction(1, 2**400)))


def in_range(reaches: Callable[[Fraction], bool], fmt: str) -> bool:
    """Whether the number that ``reaches`` compares is between two of the grid."""
    magnitudes = grid(parse_format(fmt))
    return (magnitudes[0] == 0 or reaches(magnitudes[0])) and not reaches(magnitudes[-1])


def check(run, reaches, fmt: str, variant: str, bits: int, negative: bool = False) -> None:
    """Assert that ``run`` rounds the number that ``reaches`` compares by the definition, with every random number."""
    magnitudes = grid(parse_format(fmt))
    below = max(v for v in magnitudes if v == 0 or reaches(v))
    above = magnitudes[bisect_right(magnitudes, below)]
    away = count_away(reaches, variant, bits, below, above - below)
    sign = -1 if negative else 1
    results = [run(fmt, f"{variant}:{bits}", random=random) for random in range(1 << bits)]
    results = [Fraction(0) if value is NEGATIVE_ZERO else value for value in results]
    assert results == [sign * below] * ((1 << bits) - away) + [sign * above] * away


# -- rational results --------------------------------------------------------------------------------------------------

RATIONAL = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
    "remainder": lambda a, b: a - b * (a / b).__round__(),
    "convert": lambda a: a,
}
numbers = st.fractions(-20, 20, max_denominator=97) | st.integers(-640, 640).map(lambda n: Fraction(n, 64))


@settings(max_examples=500)
@given(st.data(), st.sampled_from(list(RATIONAL)), st.sampled_from(VARIANTS), st.integers(1, 6))
def test_exactly_as_many_random_numbers_round_away_as_the_fraction_says(data, name, variant, bits):
    """In formats of all widths and kinds. Another test covers overflow."""
    kind = data.draw(st.sampled_from(("", "fn", "fnuz", "finite")))
    random_format = f"e{data.draw(st.integers(2, 5))}m{data.draw(st.integers(1, 4))}{kind}"
    fmt = data.draw(st.sampled_from((*FORMATS, random_format)))
    operands = [data.draw(numbers) for _ in range(operand_count(name))]
    assume(name not in ("div", "remainder") or operands[1])
    exact = RATIONAL[name](*operands)
    assume(in_range(lambda bound: abs(exact) >= bound, fmt))
    run = getattr(reference, name)
    check(
        lambda *modes, random: run(*operands, *modes, random=random),
        lambda bound: abs(exact) >= bound,
        fmt,
        variant,
        bits,
        exact < 0,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fmt", ["e3m2", "e2m1fn", "e4m1:nosubnormals"])
def test_every_quotient_of_two_values(fmt, variant):
    values = [v for v in grid(parse_format(fmt)) if v]
    for a, b in product(values[::3], values):
        if values[0] <= a / b < values[-1]:
            check(lambda *modes, random, a=a, b=b: div(-a, b, *modes, random=random),
                  lambda bound, a=a, b=b: a / b >= bound, fmt, variant, 3, True)  # fmt: skip


@few
@given(numbers, st.integers(-12, 6), st.sampled_from(VARIANTS), st.integers(1, 8), st.data())
def test_encode_scaleb_and_convert_are_round(x, exponent, variant, bits, data):
    rounding, random = f"{variant}:{bits}", data.draw(st.integers(0, 2**bits - 1))
    for fmt in FORMATS:
        scaled = round(x * Fraction(2) ** exponent, fmt, rounding, random=random)
        assert convert(x * Fraction(2) ** exponent, fmt, rounding, random=random) == scaled
        assert decode(encode(x * Fraction(2) ** exponent, fmt, rounding, random=random), fmt) == scaled
        assert scaleb(x, exponent, fmt, rounding, random=random) == scaled


def test_the_smallest_numbers_of_scaleb():
    """2**-9 is the quantum of e4m3fn; with 8 bits, variant B rounds up from half of 2**-8 of it on."""
    for exponent, count in ((-17, 1), (-18, 1), (-19, 0), (-(10**9), 0)):
        results = [scaleb(1, exponent, "e4m3fn", "stochastic_b:8", random=random) for random in range(256)]
        assert results == [0] * (256 - count) + [Fraction(1, 2**9)] * count


# -- irrational results ------------------------------------------------------------------------------------------------


@few
@given(
    st.fractions(Fraction(1, 1000), 900),
    st.sampled_from(FORMATS),
    st.sampled_from(VARIANTS),
    st.integers(1, 6),
)
def test_square_roots_by_comparing_squares(x, fmt, variant, bits):
    for operation, square in ((sqrt, x), (rsqrt, 1 / x)):
        assume(in_range(lambda bound, square=square: square >= bound**2, fmt))
        check(lambda *modes, random, operation=operation: operation(x, *modes, random=random),
              lambda bound, square=square: square >= bound**2, fmt, variant, bits)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_square_roots_on_and_beside_every_boundary(variant):
    """Squares of the numbers at which the result changes, and their nearest neighbours on a grid of 2**-200."""
    for k, shift in product(range(16, 33), (-1, 0, 1)):
        x = Fraction(k, 16) ** 2 + Fraction(shift, 2**200)
        check(lambda *modes, random, x=x: sqrt(x, *modes, random=random),
              lambda bound, x=x: x >= bound**2, "e3m1", variant, 2)  # fmt: skip


MPFR = MPFR_FUNCTIONS | {
    "gelu": lambda x: x / 2 * gmpy2.erfc(-x / gmpy2.sqrt(gmpy2.mpfr(2))),
    "sigmoid": lambda x: 1 / (1 + gmpy2.exp(-x)),
    "pow": lambda x: gmpy2.mpfr(3) ** x,
}


def by_mpfr(name: str, x: Fraction, precision: int = 600) -> Fraction:
    with gmpy2.context(precision=precision):
        ratio = gmpy2.mpq(MPFR[name](gmpy2.mpfr(gmpy2.mpq(x.numerator, x.denominator))))
    return Fraction(int(ratio.numerator), int(ratio.denominator))


def check_elementary(name: str, x: Fraction, fmt: str, variant: str, bits: int) -> None:
    exact = by_mpfr(name, x)
    run = (lambda *a, **k: pow(3, *a, **k)) if name == "pow" else getattr(reference, name)
    check(
        lambda *modes, random: run(x, *modes, random=random),
        lambda bound: abs(exact) >= bound,
        fmt,
        variant,
        bits,
        exact < 0,
    )


@settings(max_examples=500)
@given(
    st.sampled_from(list(MPFR)),
    st.fractions(-9, 9, max_denominator=1000) | st.integers(-300, 300).map(lambda n: Fraction(n, 32)),
    st.sampled_from(FORMATS),
    st.sampled_from(VARIANTS),
    st.integers(1, 6),
)
def test_elementary_functions_by_mpfr(name, x, fmt, variant, bits):
    if name.startswith("log"):
        x = abs(x)
        assume(x > 0)
    assume(in_range(lambda bound: abs(by_mpfr(name, x)) >= bound, fmt))
    check_elementary(name, x, fmt, variant, bits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "inverse"),
    [("exp", gmpy2.log), ("exp2", gmpy2.log2), ("log", gmpy2.exp), ("sin", gmpy2.asin), ("tanh", gmpy2.atanh)],
)
def test_elementary_functions_beside_every_boundary(name, inverse, variant):
    """Between 1/2 and 1 in e3m1 with three bits, and their middles: results 2**-150 or so off each, on both sides."""
    for k in range(33, 64, 2):
        with gmpy2.context(precision=150):
            ratio = gmpy2.mpq(inverse(gmpy2.mpfr(gmpy2.mpq(k, 64))))
        x = Fraction(int(ratio.numerator), int(ratio.denominator))
        for shift in (-1, 1):
            check_elementary(name, x * (1 + Fraction(shift, 2**140)), "e3m1", variant, 3)


def results(operation, x, fmt: str, rounding: str, bits: int) -> list:
    return [operation(x, fmt, f"{rounding}:{bits}", random=random) for random in range(1 << bits)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_arguments(variant):
    """Next to a value, all random numbers agree but the least of variant A. Far below all values, all give zero."""
    tiny, one, below = Fraction(1, 2**1000), Fraction(1), Fraction(2047, 2048)
    for operation in (exp, exp2):
        assert results(operation, tiny, "fp16", variant, 4) == [one] * 16
        assert results(operation, -(10**30), "fp16", variant, 4) == [Fraction(0)] * 16
        assert results(operation, 10**30, "fp16", variant, 4) == [INFINITY] * 16
        assert results(operation, 10**30, "e4m3fn", variant, 4) == [Fraction(448)] * 16
    for operation, x in ((exp, -tiny), (cos, tiny), (tanh, 10**30)):
        least = below if variant == "stochastic" else one
        assert results(operation, x, "fp16", variant, 4) == [least] + [one] * 15


@pytest.mark.parametrize(("variant", "counts"), list(zip(VARIANTS, ((1, 0, 0), (1, 1, 0), (1, 1, 0)), strict=True)))
def test_the_least_results_that_are_not_always_zero(variant, counts):
    """2**-31.5, 2**-32.5 and 2**-33.5 for a quantum of 2**-24 and 8 bits: 1.4, 0.7 and 0.35 of its 256th part."""
    for x, count in zip((-31.5, -32.5, -33.5), counts, strict=True):
        assert results(exp2, x, "fp16", variant, 8) == [0] * (256 - count) + [Fraction(1, 2**24)] * count


def test_32_bits_are_looked_at():
    """A root whose fraction is 2**-32 times an integer that it misses by 2**-20 of one."""
    for miss, expected in ((-1, 1), (1, 1 + Fraction(1, 4))):
        root = 1 + Fraction(1, 4) * (Fraction(5, 2**32) + Fraction(miss, 2**52))
        assert sqrt(root**2 + Fraction(1, 2**300), "e4m2", "stochastic:32", random=2**32 - 5) == expected
        assert sqrt(root**2, "e4m2", "stochastic:32", random=2**32 - 5) == expected


def test_exact_results_and_specials_do_not_depend_on_the_random_number():
    for variant, random in product(VARIANTS, range(8)):
        modes = {"rounding": f"{variant}:3", "random": random}
        assert add(1, 2, "fp16", **modes) == 3 and sqrt(9, "fp16", **modes) == 3 and log(1, "fp16", **modes) == 0
        assert sub(1, 1, "fp16", **modes) == 0 and mul(-1, 0, "fp16", **modes) is NEGATIVE_ZERO
        assert div(1, 0, "fp16", **modes) is INFINITY and sqrt(-1, "fp16", **modes) is NAN
        assert fma(0, INFINITY, 1, "fp16", **modes) is NAN and remainder(7, 4, "fp16", **modes) == -1


def test_overflow_is_a_matter_of_chance_too():
    """Three quarters of the way from 65504 to 65536, which would be the next value."""
    got = [mul(65528, 1, "fp16", "stochastic:2", random=random) for random in range(4)]
    assert got == [65504, INFINITY, INFINITY, INFINITY]
    assert with_flags(mul, 65528, 1, format="fp16", rounding="stochastic:2", random=0).flags == Flags.INEXACT
    over = with_flags(mul, 65528, 1, format="fp16", rounding="stochastic:2", random=1)
    assert over.flags == Flags.OVERFLOW | Flags.INEXACT


@settings(max_examples=300)
@given(
    st.data(),
    numbers,
    numbers.filter(bool),
    st.integers(-6, 6),
    st.sampled_from(VARIANTS),
    st.integers(1, 6),
)
def test_flags_are_read_off_a_format_of_larger_range(data, a, b, exponent, variant, bits):
    """Of the same precision, with the same random number: beyond the largest, below the smallest normal, or changed."""
    fmt = parse_format(data.draw(st.sampled_from(("e3m2", "e2m3", "e3m1fn", "e3m0"))))
    modes = {"rounding": f"{variant}:{bits}", "random": data.draw(st.integers(0, 2**bits - 1))}
    a *= Fraction(2) ** exponent
    wide = abs(Fraction(round(abs(a / b), FloatFormat(11, fmt.mantissa_bits), **modes)))
    got = with_flags(div, a, b, format=fmt, **modes)
    expected = Flags.NONE
    if wide > fmt.max:
        expected = Flags.OVERFLOW | Flags.INEXACT
    elif (0 if got.value is NEGATIVE_ZERO else got.value) != a / b:
        expected = Flags.INEXACT | (Flags.UNDERFLOW if wide < fmt.smallest_normal else Flags.NONE)
    assert got.flags == expected


# -- bad arguments -----------------------------------------------------------------------------------------------------

SINGLE = [(add, 1, 2), (sub, 1, 2), (mul, 1, 2), (div, 1, 3), (fma, 1, 2, 3), (sqrt, 2), (remainder, 5, 3),
          (convert, 1), (exp, 1), (log, 2), (pow, 2, 3), (encode, 1), (scaleb, 1, 2)]  # fmt: skip


@pytest.mark.parametrize(("operation", "operands"), [(case[0], case[1:]) for case in SINGLE])
def test_bad_random_numbers_of_an_operation(operation, operands):
    with pytest.raises(ValueError, match="rounding='stochastic:3' needs a random number from 0 to 7, got None"):
        operation(*operands, "fp16", "stochastic:3")
    for bad in (-1, 8):
        with pytest.raises(ValueError, match=f"rounding='stochastic_b:3' needs .* from 0 to 7, got {bad}"):
            operation(*operands, "fp16", "stochastic_b:3", random=bad)
    with pytest.raises(ValueError, match="random=1 has no meaning with rounding='up': use 'stochastic:BITS'"):
        operation(*operands, "fp16", "up", random=1)
    for bad in (1.0, "1", [1]):
        with pytest.raises(TypeError, match=r"random is an int, got .*: use int"):
            operation(*operands, "fp16", "stochastic_c:3", random=bad)
    with pytest.raises(ValueError, match="random bits are 1 to 32, got '33'"):
        operation(*operands, "fp16", "stochastic:33", random=1)
