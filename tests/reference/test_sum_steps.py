"""Sums step by step: every order written out in single operations, with random numbers and flags."""

import platform
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import permutations, product

import gmpy2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim import reference
from fpsim.formats import ROUNDINGS, STOCHASTIC_ROUNDINGS, parse_format
from fpsim.reference import (
    INFINITY,
    NAN,
    NEGATIVE_INFINITY,
    Flags,
    add,
    convert,
    decode,
    dot,
    fma,
    mul,
    round,
    sub,
    sum,
    with_flags,
)
from tests.reference.raised_flags import flags
from tests.shared.formats import values_near_the_ends
from tests.shared.peers import MPFR_MODES, mpfr_like, to_mpfr

VARIANTS = tuple(STOCHASTIC_ROUNDINGS)
ORDERS = ("sequential", "pairwise", "kahan", ("blocked", 3), ("interleaved", 2), ("chunked", 3))
NONE, INVALID, INEXACT = Flags.NONE, Flags.INVALID, Flags.INEXACT
OVERFLOW, UNDERFLOW = Flags.OVERFLOW | Flags.INEXACT, Flags.UNDERFLOW | Flags.INEXACT
QUANTUM = Fraction(1, 2**24)
few = settings(max_examples=100)


# -- the orders --------------------------------------------------------------------------------------------------------


def in_steps(terms: list, order, step: Callable) -> Fraction:
    """The sum in any order, written out in single operations: ``step(operation, *operands)`` rounds."""
    match order:
        case "sequential":
            total = step(convert, terms[0])
            for term in terms[1:]:
                total = step(add, total, term)
            return total
        case "pairwise":
            while len(terms) > 1:
                even = len(terms) // 2 * 2
                terms = [step(add, terms[i], terms[i + 1]) for i in range(0, even, 2)] + terms[even:]
            return step(convert, terms[0])
        case "kahan":
            total, compensation = step(convert, terms[0]), 0
            for term in terms[1:]:
                corrected = step(sub, term, compensation)
                longer = step(add, total, corrected)
                compensation = step(sub, step(sub, longer, total), corrected)
                total = longer
            return total
        case ("blocked", n):
            blocks = [terms[i : i + n] for i in range(0, len(terms), n)]
            return in_steps([in_steps(block, "sequential", step) for block in blocks], "sequential", step)
        case ("interleaved", n):
            lanes = [terms[i::n] for i in range(min(n, len(terms)))]
            return in_steps([in_steps(lane, "sequential", step) for lane in lanes], "sequential", step)
        case ("chunked", n):
            return in_steps([sum(terms[i : i + n], "fp64") for i in range(0, len(terms), n)], "sequential", step)


# -- stochastic rounding -----------------------------------------------------------------------------------------------

short = st.integers(-160, 160).map(lambda n: Fraction(n, 32) or Fraction(1, 64))
lists = st.lists(short, min_size=1, max_size=7)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@few
@given(st.data(), lists, st.sampled_from(VARIANTS))
def test_a_sum_is_its_single_operations_in_the_order_written(order, data, terms, variant):
    """Values and flags agree. Each step takes the next random number, from a sequence or a function of the index."""
    rounding, used, raised = f"{variant}:3", [], Flags.NONE

    def step(operation, *operands, format="e4m2"):
        nonlocal raised
        used.append(data.draw(st.integers(0, 7)))
        result = with_flags(operation, *operands, format=format, rounding=rounding, random=used[-1])
        raised |= result.flags
        return result.value

    expected = step(convert, in_steps(terms, order, step), format="e3m1")
    options = {"format": "e3m1", "rounding": rounding, "accumulator": "e4m2", "order": order}
    assert sum(terms, **options, random=used) == sum(terms, **options, random=used.__getitem__) == expected
    got = with_flags(sum, terms, random=tuple(used), **options)
    assert (got.value, got.flags) == (expected, raised)


@few
@given(st.data(), st.lists(st.tuples(short, short), min_size=1, max_size=6), st.sampled_from(VARIANTS))
def test_an_inner_product_rounds_its_products_first(data, pairs, variant):
    rounding, count = f"{variant}:3", 2 * len(pairs) + 1
    random = data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    draws = iter(random)
    products = [mul(x, y, "e5m3", rounding, random=next(draws)) for x, y in pairs]
    total = sum(products, "e3m1", rounding, accumulator="e4m2", random=list(draws))
    xs, ys = zip(*pairs, strict=True)
    assert dot(xs, ys, "e3m1", rounding, product="e5m3", accumulator="e4m2", random=random) == total
    chain = mul(xs[0], ys[0], "e4m2", rounding, random=random[0])
    for (x, y), number in zip(pairs[1:], random[1:], strict=False):
        chain = fma(x, y, chain, "e4m2", rounding, random=number)
    last = random[len(pairs)]
    fused = dot(xs, ys, "e3m1", rounding, accumulator="e4m2", random=random[: len(pairs) + 1])
    assert fused == convert(chain, "e3m1", rounding, random=last)


@few
@given(lists, st.sampled_from(VARIANTS), st.integers(0, 7))
def test_an_exact_sum_takes_one_random_number(terms, variant, random):
    exact = Fraction(0)
    for term in terms:
        exact += term
    for order in ORDERS:
        got = sum(terms, "e3m1", f"{variant}:3", order=order, random=[random])
        assert got == round(exact, "e3m1", f"{variant}:3", random=random)
    ones = [Fraction(1)] * len(terms)
    assert dot(terms, ones, "e3m1", f"{variant}:3", random=[random]) == got


@pytest.mark.parametrize("order", ["sequential", "pairwise", ("chunked", 2)], ids=str)
def test_the_mean_over_all_random_numbers_is_the_exact_sum(order):
    """Stochastic rounding is unbiased if it has enough bits, and so is a sum in any order without feedback.

    M. Croci et al., "Stochastic rounding: implementation, error analysis and applications" (2022), section 7.
    """
    terms = [Fraction(n, 16) for n in (16, 1, 5)]  # multiples of a quarter of e4m2's quantum at 1
    roundings = 3 if order == ("chunked", 2) else 4
    options = {"accumulator": "e4m2", "order": order}
    every = [sum(terms, "e4m2", "stochastic:2", random=r, **options) for r in product(range(4), repeat=roundings)]
    assert len(set(every)) > 1
    mean = Fraction(0)
    for total in every:
        mean += total / len(every)
    assert mean == Fraction(22, 16)


# -- the flags of all steps --------------------------------------------------------------------------------------------

ordinary = st.integers(-3000, 3000).map(lambda n: Fraction(n, 64))


@pytest.mark.parametrize("order", [*ORDERS[:-1], ("chunked", 1)], ids=str)
@settings(max_examples=60)
@given(st.data(), st.sampled_from(("e3m2", "e4m3fn", "e2m1fn", "e3m2:nosubnormals")), st.sampled_from(ROUNDINGS))
def test_a_sum_raises_what_its_single_operations_raise(order, data, name, rounding):
    """With special values, and in formats that saturate or have no NaN."""
    codes = st.integers(0, (1 << parse_format(name).bits) - 1)
    terms = [decode(code, name) for code in data.draw(st.lists(codes, min_size=1, max_size=7))]
    tininess = data.draw(st.sampled_from(reference.TININESS))
    raised = NONE

    def step(operation, *operands, format=name):
        nonlocal raised
        modes = {"format": format, "rounding": rounding, "tininess": tininess}
        result = with_flags(operation, *operands, **modes)
        raised |= result.flags
        return result.value

    expected = step(convert, in_steps(terms, order, step), format="e3m1")
    got = with_flags(sum, terms, format="e3m1", rounding=rounding, tininess=tininess, accumulator=name, order=order)
    assert (got.value, got.flags) == (expected, raised)


@pytest.mark.parametrize("order", ORDERS[:-1], ids=str)
@settings(max_examples=60)
@given(st.data(), st.sampled_from(list(MPFR_MODES)))
def test_flags_of_a_sum_are_those_left_in_mpfr(order, data, rounding):
    """The flags of MPFR stay raised, as in IEEE 754. No sum underflows, because a subnormal sum is exact."""
    fmt = parse_format(f"e{data.draw(st.integers(3, 6))}m{data.draw(st.integers(1, 6))}")
    terms = data.draw(st.lists(values_near_the_ends(fmt).filter(lambda v: v is not NAN), min_size=1, max_size=8))
    numbers = list(map(to_mpfr, terms))
    with mpfr_like(fmt, rounding) as context:
        steps = {add: gmpy2.add, sub: gmpy2.sub, convert: lambda number: +number}
        context.clear_flags()
        inexact = False

        def step(operation, *operands):
            nonlocal inexact
            result = steps[operation](*operands)
            inexact |= result.rc != 0
            return result

        in_steps(numbers, order, step)
        raised = ((context.invalid, INVALID), (context.overflow, Flags.OVERFLOW), (inexact, INEXACT))
    got = flags(sum, terms, format=fmt, rounding=rounding, accumulator=fmt, order=order)
    # A NaN arises on the way only, and gmpy2, which raises its flag for every NaN, has it up by then.
    assert [flag in got for _, flag in raised] == [up for up, _ in raised]
    assert Flags.UNDERFLOW not in got and Flags.DIVIDE_BY_ZERO not in got


@pytest.mark.parametrize(("name", "dtype"), [("fp32", np.float32), ("fp64", np.float64)])
@settings(max_examples=150)
@given(st.data())
def test_flags_of_an_inner_product_are_those_of_the_processor(name, dtype, data):
    """Products are rounded and added in a loop. All flags but inexact, which numpy does not report."""
    values = values_near_the_ends(parse_format(name)).filter(lambda v: v is not NAN)
    pairs = data.draw(st.lists(st.tuples(values, values), min_size=1, max_size=5))
    xs, ys = (list(column) for column in zip(*pairs, strict=True))
    raised: list[str] = []
    with np.errstate(all="call", call=lambda kind, _: raised.append(kind)):
        products = [np.multiply(dtype(reference.to_float(x)), dtype(reference.to_float(y))) for x, y in pairs]
        total = products[0]
        for term in products[1:]:
            total = np.add(total, term)
    names = {"overflow": Flags.OVERFLOW, "underflow": Flags.UNDERFLOW}
    expected = NONE
    for kind in raised:
        expected |= names.get(kind, INVALID)
    tininess = "after" if platform.machine() in ("x86_64", "AMD64") else "before"
    got = with_flags(dot, xs, ys, format=name, product=name, accumulator=name, tininess=tininess)
    assert (got.value, got.flags & ~Flags.INEXACT) == (reference.as_value(float(total)), expected)


@settings(max_examples=150)
@given(st.lists(ordinary, max_size=6), st.sampled_from(ROUNDINGS), st.sampled_from(("e3m2", "e4m3fn", "e3m1:unsigned")))
def test_an_exact_sum_raises_the_flags_of_one_rounding(terms, rounding, name):
    """In every order, and without the flags of single steps. The same holds for an exact inner product."""
    total = Fraction(0)
    for term in terms:
        total += term
    expected = flags(convert, total, format=name, rounding=rounding)
    for order in ORDERS:
        assert flags(sum, terms, format=name, rounding=rounding, order=order) == expected
    halves, twos = [term / 2 for term in terms], [2] * len(terms)
    assert flags(dot, halves, twos, format=name, rounding=rounding) == expected


def test_flags_of_sums_with_infinities_and_nan():
    """Clauses 7.2 b and d. In an exact sum, a NaN precedes every addition, in any order of the terms."""
    for terms in permutations((INFINITY, NEGATIVE_INFINITY, Fraction(1))):
        assert flags(sum, terms) == flags(sum, terms, accumulator="fp16") == INVALID
    for terms in permutations((INFINITY, NEGATIVE_INFINITY, NAN)):
        assert flags(sum, terms) == NONE
        assert flags(sum, terms, accumulator="fp16") == (INVALID if terms[2] is NAN else NONE)
    for into in (None, "fp16"):
        assert flags(dot, [0, 1], [INFINITY, 1], product=into) == INVALID
        assert flags(dot, [NAN, 1], [INFINITY, 1], product=into) == NONE
        assert flags(dot, [2, 2], [INFINITY, NEGATIVE_INFINITY], product=into) == INVALID


def test_flags_stay_up_whatever_comes_after():
    """The result is exact after an overflow that saturated, or after an underflow. The flags stay raised."""
    got = with_flags(sum, [65504, 65504, -65504], format="fp32", overflow="sat_finite", accumulator="fp16")
    assert (got.value, got.flags) == (0, OVERFLOW)
    tiny = Fraction(1, 2**13)
    got = with_flags(dot, [1, tiny], [1, tiny], format="fp16", product="fp16", accumulator="fp16")
    assert (got.value, got.flags) == (1, UNDERFLOW)
    assert flags(dot, [1, tiny], [1, tiny], accumulator="fp16") == INEXACT
    assert flags(sum, [1, QUANTUM], format="e5m2", accumulator="fp32") == INEXACT
    assert flags(sum, [1, 2], accumulator="fp16") == flags(sum, []) == flags(dot, [], []) == NONE


# -- bad random numbers ------------------------------------------------------------------------------------------------


def sums() -> Iterator:
    yield "sum", lambda *modes, **options: sum([1, 2, 3], *modes, accumulator="fp16", **options), 4
    yield "kahan", lambda *modes, **options: sum([1, 2], *modes, accumulator="fp16", order="kahan", **options), 6
    yield "exact", lambda *modes, **options: sum([1, 2, 3], *modes, **options), 1
    yield "nothing", lambda *modes, **options: sum([], *modes, accumulator="fp16", **options), 1
    yield "dot", lambda *modes, **options: dot([1, 2], [3, 4], *modes, product="bf16", **options), 3


@pytest.mark.parametrize(("run", "roundings"), [pytest.param(*case[1:], id=case[0]) for case in sums()])
def test_bad_random_numbers_of_a_sum(run, roundings):
    needs = f"rounding='stochastic:3' needs {roundings} random numbers, one for each rounding, or a function"
    assert run("fp16", "stochastic:3", random=[7] * roundings) == run("fp16", "stochastic:3", random=lambda _: 7)
    for random in (None, [], [0] * (roundings - 1), [0] * (roundings + 1)):
        with pytest.raises(ValueError, match=f"{needs} of the index: got {None if random is None else len(random)}"):
            run("fp16", "stochastic:3", random=random)
    for bad in (3, iter([0] * roundings)):
        with pytest.raises(TypeError, match=f"{needs} .* of type"):
            run("fp16", "stochastic:3", random=bad)
    with pytest.raises(ValueError, match="needs a random number from 0 to 7, got 8"):
        run("fp16", "stochastic:3", random=[0] * (roundings - 1) + [8])
    with pytest.raises(ValueError, match="needs a random number from 0 to 7, got None"):
        run("fp16", "stochastic:3", random=lambda index: None)
    with pytest.raises(TypeError, match=r"random is an int, got 0\.5"):
        run("fp16", "stochastic:3", random=[0.5] * roundings)
    with pytest.raises(ValueError, match=r"random=\[1\] has no meaning with rounding='down': use 'stochastic:BITS'"):
        run("fp16", "down", random=[1])
