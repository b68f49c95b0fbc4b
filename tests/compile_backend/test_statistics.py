"""The counts of `measure` equal those of exact arithmetic, element by element."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fpsim
from fpsim.compile_backend.observe.rounding_statistics import (
    COUNTS,
    Statistics,
    measure,
    merge,
    norm,
    relative_error,
    severity,
)
from fpsim.formats import OVERFLOWS, FloatFormat, parse_format

INF, NAN = math.inf, math.nan
CARRIERS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Operands for e4m3fn: largest value 448, smallest normal 2^-6, smallest subnormal 2^-9.
E4M3FN = [
    0.0, -0.0,  # zeros
    2.0**-11, -(2.0**-10), 1e-7,  # to zero: the second is a tie
    2.0**-9, -3 * 2.0**-9, 2.0**-7, 1.1 * 2.0**-8,  # to subnormals
    2.0**-6 * 0.99,  # to the smallest normal number
    1.0, -1.0625, 3.14, 447.0,
    448.5, -464.0, 1000.0, -65000.0,  # beyond the largest
    INF, -INF, NAN,
]  # fmt: skip


def counted(x: Tensor, rounded: Tensor, format: FloatFormat) -> Statistics:
    """`measure`, by exact arithmetic on one element after the other."""
    counts, exponents, rounded_exponents = Counter(), Counter(), Counter()
    signal, noise, amax = Fraction(0), Fraction(0), 0.0
    smallest_normal = Fraction(2) ** format.emin
    for a, b in zip(x.double().flatten().tolist(), rounded.double().flatten().tolist(), strict=True):
        counts["zeros"] += a == 0
        counts["underflows"] += a != 0 and b == 0
        counts["infinities"] += math.isinf(a)
        counts["nans"] += math.isnan(a)
        if math.isfinite(b) and b != 0:
            rounded_exponents[math.frexp(b)[1] - 1] += 1
            counts["subnormals"] += abs(Fraction(b)) < smallest_normal
        if not math.isfinite(a):
            continue
        beyond = abs(a) > format.max or (a < 0 and not format.signed)
        counts["overflows"] += not math.isfinite(b)
        counts["saturations"] += beyond and math.isfinite(b)
        amax = max(amax, abs(a))
        signal += Fraction(a) ** 2
        noise += (Fraction(a) - Fraction(b)) ** 2 if math.isfinite(b) else 0
        if a != 0:
            exponents[math.frexp(a)[1] - 1] += 1
    return Statistics(
        elements=x.numel(),
        **{name: counts[name] for name in COUNTS},
        amax=amax,
        signal=root(signal),
        noise=INF if counts["overflows"] else root(noise),
        exponents=tuple(sorted(exponents.items())),
        rounded_exponents=tuple(sorted(rounded_exponents.items())),
    )


def root(square: Fraction) -> float:
    """The square root, far beyond the range of the square as a float."""
    if square == 0:
        return 0.0
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(square / Fraction(4) ** shift), shift)


def assert_same(got: Statistics, expected: Statistics) -> None:
    names = ["elements", *COUNTS, "amax", "exponents", "rounded_exponents"]
    assert {name: getattr(got, name) for name in names} == {name: getattr(expected, name) for name in names}
    assert got.signal == pytest.approx(expected.signal, rel=1e-13)
    assert got.noise == pytest.approx(expected.noise, rel=1e-13)


def check(x: Tensor, name: str, **modes: str) -> Statistics:
    """Measure ``x`` rounded, and compare with exact arithmetic."""
    format, rounded = parse_format(name), fpsim.round(x, name, **modes)
    got = measure(x, rounded, format)
    assert_same(got, counted(x, rounded, format))
    return got


def test_every_count_of_operands_written_by_hand() -> None:
    x = torch.tensor(E4M3FN)
    got = measure(x, fpsim.round(x, "e4m3fn"), parse_format("e4m3fn"))
    assert got.elements == 21
    assert (got.zeros, got.underflows, got.subnormals) == (2, 3, 4)
    assert (got.saturations, got.overflows, got.infinities, got.nans) == (4, 0, 2, 1)
    assert got.amax == 65000.0
    assert dict(got.exponents) == {
        -24: 1, -11: 1, -10: 1, -9: 1, -8: 2, -7: 2, 0: 2, 1: 1, 8: 3, 9: 1, 15: 1,
    }  # fmt: skip
    assert dict(got.rounded_exponents) == {-9: 1, -8: 2, -7: 1, -6: 1, 0: 2, 1: 1, 8: 5 + 2}  # infinities too


def test_what_overflow_means_depends_on_the_mode() -> None:
    x, format = torch.tensor(E4M3FN), parse_format("e4m3fn")
    got = measure(x, fpsim.round(x, "e4m3fn", overflow="ovf_inf"), format)
    assert (got.saturations, got.overflows) == (2, 2)  # 448.5 and the tie -464 round down, 1000 and -65000 become NaN
    assert got.noise == INF and got.sqnr == -INF


@pytest.mark.parametrize("dtype", CARRIERS)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "to_odd"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e4m3fnuz", "e4m3fn:nosubnormals", "e5m2:unsigned"])
def test_counts_are_those_of_exact_arithmetic(name: str, rounding: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(500, generator=generator) * 10 ** (5 * torch.randn(500, generator=generator))
    format = parse_format(name)
    for overflow in OVERFLOWS if format.has_nan or format.has_infinity else ["sat_finite"]:
        check(torch.cat([torch.tensor(E4M3FN), wide]).to(dtype), name, rounding=rounding, overflow=overflow)


def test_a_scale_format_has_no_zero() -> None:
    """OCP E8M0 rounds zero to its smallest value: nothing underflows, and the change of zeros is noise."""
    got = check(torch.tensor([0.0, 3.0, 2.0**-140]), "e8m0fnu")
    assert (got.zeros, got.underflows) == (1, 0)
    assert measure(torch.zeros(2), torch.full((2,), 2.0**-127), parse_format("e8m0fnu")).sqnr == -INF


@pytest.mark.parametrize("dtype", CARRIERS)
def test_subnormal_numbers_of_the_carrier_have_their_own_exponents(dtype: torch.dtype) -> None:
    carrier = FloatFormat(
        *{torch.float64: (11, 52), torch.float32: (8, 23), torch.bfloat16: (8, 7)}.get(dtype, (5, 10))
    )
    least = math.ldexp(1.0, carrier.emin - carrier.mantissa_bits)
    x = torch.tensor([0.0, least, -3 * least, 2.0**carrier.emin - least, 2.0**carrier.emin], dtype=torch.float64)
    got = measure(x.to(dtype), x.to(dtype))
    low = carrier.emin - carrier.mantissa_bits
    assert dict(got.exponents) == {low: 1, low + 1: 1, carrier.emin - 1: 1, carrier.emin: 1}
    assert (got.zeros, got.subnormals, got.underflows) == (1, 3, 0)
    assert_same(got, counted(x.to(dtype), x.to(dtype), carrier))


def test_subnormals_count_while_the_processor_flushes_them() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        x = torch.tensor([1, 5, 0x7FFFFF, 0], dtype=torch.int32).view(torch.float32)
        got = measure(x, x)
    finally:
        torch.set_flush_denormal(False)
    assert (got.zeros, got.subnormals) == (1, 3)
    assert dict(got.exponents) == {-149: 1, -147: 1, -127: 1}


@pytest.mark.parametrize("x", [[], [0.0] * 5, [0.3], [NAN], [INF], [NAN, INF, -INF], [1e-30], [1e30]])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_degenerate_tensors(name: str, x: list[float]) -> None:
    check(torch.tensor(x), name)
    check(torch.tensor(x).reshape(1, -1, 1), name)


def test_a_number_alone_is_a_tensor_too() -> None:
    assert check(torch.tensor(0.3), "e5m2").elements == 1


def test_the_ratio_is_ten_logarithms_of_the_energies() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    q = fpsim.round(x, "e4m3fn")
    a, b = x.numpy().astype(np.float64), q.numpy().astype(np.float64)
    expected = 10 * np.log10(np.square(a).sum() / np.square(a - b).sum())
    assert measure(x, q, parse_format("e4m3fn")).sqnr == pytest.approx(expected, rel=1e-12)


def test_the_ratio_is_infinite_where_nothing_changed() -> None:
    for x in (torch.zeros(3), torch.empty(0), torch.tensor([1.0, -2.0, INF, NAN])):
        assert measure(x, fpsim.round(x, "e5m2"), parse_format("e5m2")).sqnr == INF


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_energies_beyond_the_range_of_float64(scale: float) -> None:
    x = scale * torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = check(x, "e11m3")
    assert got.sqnr == pytest.approx(31.9, abs=2)


def test_strides_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0], x[5, 6, 4], x[3] = NAN, INF, 0
    expected = check(x, "e4m3fn")
    for view in (x.permute(2, 0, 1), x.mT, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert_same(check(view, "e4m3fn"), expected)
    monkeypatch.setattr("fpsim.compile_backend.observe.rounding_statistics._CHUNK", 16)
    assert_same(check(x, "e4m3fn"), expected)


def test_expanded_elements_count_as_often_as_they_occur() -> None:
    x = torch.tensor([[0.3], [1e-9], [0.0]])
    format, q = parse_format("e4m3fn"), fpsim.round(x, "e4m3fn")
    assert_same(measure(x.expand(3, 4), q.expand(3, 4), format), counted(x.repeat(1, 4), q.repeat(1, 4), format))
    assert_same(measure(x.expand(3, 4), q.repeat(1, 4), format), counted(x.repeat(1, 4), q.repeat(1, 4), format))


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    x = torch.cat([torch.tensor(E4M3FN), torch.randn(50, generator=torch.Generator().manual_seed(4))])
    q, format = fpsim.round(x, "e4m3fn"), parse_format("e4m3fn")
    parts = [measure(a, b, format) for a, b in zip(x.split(9), q.split(9), strict=True)]
    assert_same(merge(parts), measure(x, q, format))
    assert_same(parts[0] + parts[1], measure(x[:18], q[:18], format))
    assert_same(parts[0].repeated(3), merge([parts[0]] * 3))
    assert merge([]) == Statistics()


def test_shares() -> None:
    got = Statistics(elements=8, zeros=2, nans=1)
    assert (got.share("zeros"), got.share("nans"), got.share("overflows")) == (0.25, 0.125, 0)
    assert Statistics().share("zeros") == 0
    with pytest.raises(ValueError, match="unknown count 'nan': use one of zeros, underflows"):
        got.share("nan")


def test_the_norm_of_what_is_no_number() -> None:
    assert norm(torch.tensor([3.0, 4.0])) == 5
    assert norm(torch.tensor([1.0, -INF])) == INF
    assert math.isnan(norm(torch.tensor([1.0, NAN, INF])))
    assert norm(torch.empty(0)) == 0
    assert norm(torch.full((4,), 5e-324, dtype=torch.float64)) == 1e-323
    assert relative_error(0, 0) == 0 and relative_error(1, 0) == INF and relative_error(1, 4) == 0.25


def test_what_is_doubtful_and_what_is_bad() -> None:
    assert [severity("sqnr", value) for value in (INF, 20, 19, 10, 9, -INF, NAN)] == [0, 0, 1, 1, 2, 2, 2]
    assert [severity("underflows", value) for value in (0, 0.01, 0.02, 0.2)] == [0, 0, 1, 2]
    assert [severity("nans", value) for value in (0, 1e-9)] == [0, 2]
    assert severity("elements", 1e9) == 0


@pytest.mark.parametrize(
    ("x", "rounded", "format", "error", "words"),
    [
        (torch.zeros(2), torch.zeros(3), "e4m3fn", ValueError, r"differ in shape: \(2,\) and \(3,\)"),
        (torch.zeros(2), torch.zeros(2).double(), "e4m3fn", TypeError, "differ in dtype: torch.float32 and"),
        (torch.zeros(2).half(), torch.zeros(2).half(), "e8m7", ValueError, "e8m7 has values that torch.float16 lacks"),
        (torch.zeros(2).int(), torch.zeros(2).int(), "e4m3fn", TypeError, "cannot round a tensor of torch.int32"),
    ],
)
def test_what_cannot_be_measured(x: Tensor, rounded: Tensor, format: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        measure(x, rounded, parse_format(format))
