"""The neighbours of a number in a format, and the outcomes of its rounding with their probabilities."""

import bisect
import itertools
from fractions import Fraction

import pytest

from fpsim import reference
from fpsim.cli import explain_number
from fpsim.formats import parse_format


@pytest.mark.parametrize(
    "name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "e3m2:nosubnormals", "e3m2:unsigned", "e8m0fnu", "e1m0"]
)
def test_neighbours_are_next_to_each_other_in_the_order_of_values(name):
    fmt = parse_format(name)
    decoded = {reference.decode(code, fmt) for code in range(1 << fmt.bits)}
    values = sorted(decoded - {reference.NAN, reference.NEGATIVE_ZERO}, key=reference.values.order)
    for below, above in zip([None, *values], [*values, None], strict=True):
        for start, step, end in ((below, 1, above), (above, -1, below)):
            if start is not None:
                code = explain_number.neighbour(start, fmt, step)
                reached = None if code is None else reference.decode(code, fmt)
                assert reached == end or (reached, end) == (reference.NEGATIVE_ZERO, 0), (start, step)


@pytest.mark.parametrize("rounding", ["stochastic:4", "stochastic_b:4", "stochastic_c:4"])
@pytest.mark.parametrize("sixty_fourths", [0, 1, 2, 3, 31, 32, 33, 61, 62, 63])
def test_probabilities_are_the_share_of_all_random_numbers(rounding, sixty_fourths):
    number, fmt = 1 + Fraction(sixty_fourths, 64) / 8, parse_format("e4m3fn")
    every = [reference.round(number, fmt, rounding, random=random) for random in range(16)]
    shares = {outcome.result: outcome.probability for outcome in explain_number.outcomes(number, fmt, rounding)}
    assert shares == {value: Fraction(every.count(value), 16) for value in every}


@pytest.mark.parametrize(
    "name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "e3m2:nosubnormals", "e3m2:unsigned", "e8m0fnu"]
)
def test_a_number_lies_between_the_values_that_bracket_it(name):
    fmt = parse_format(name)
    decoded = {reference.decode(code, fmt) for code in range(1 << fmt.bits)}
    values = sorted(decoded - {reference.NAN, reference.NEGATIVE_ZERO}, key=reference.values.order)

    def value_of(code):
        value = None if code is None else reference.decode(code, fmt)
        return Fraction(0) if value is reference.NEGATIVE_ZERO else value

    finite = [value for value in values if isinstance(value, Fraction)]
    middles = [(below + above) / 3 for below, above in itertools.pairwise(finite) if below + above]
    ends = [finite[0] - 10**6, finite[-1] * 100, Fraction(1, 10**50), reference.INFINITY, reference.NEGATIVE_INFINITY]
    order = reference.values.order
    keys = [order(value) for value in values]
    for number in [*middles, *ends, *values]:
        left, right = bisect.bisect_left(keys, order(number)), bisect.bisect_right(keys, order(number))
        below, above = [None, *values][left], [*values, None][right]
        assert tuple(map(value_of, explain_number.bracket(number, fmt))) == (below, above), number
