"""The reference of matrix units against a model in numpy, recorded results of GPUs, and sums written out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fpsim.formats import parse_format
from fpsim.reference import INFINITY, NAN, NEGATIVE_INFINITY, Aligned, decode, dot, to_float
from tests.accumulators.numpy_model import UNITS, Unit

#: Recorded results of real GPUs: rows 2, 3, ... of ``model_validation`` in north-numerical-computing/MATLAB-tensor-core
#: (BSD-2-Clause, commit b12b5a70). Float32 bits of a, b, c and d = c + a . b.
RECORDED: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
    ("volta", "fp16"): [  # V100
        (
            "be87e000 3e40c000 bf244000 bc9f2000",
            "3f852000 3f36a000 3f702000 bd766000",
            "3e220678", "bf158a76",
        ),
        (
            "bf0c6000 bf976000 3ee2c000 3ff56000",
            "bee90000 bfa62000 3f710000 3f270000",
            "3eab6396", "407257b2",
        ),
        (
            "bdc52000 3fa08000 bf280000 3f572000",
            "3dd70000 bf9d0000 3f52a000 3f868000",
            "3d38ecdd", "bf9476e5",
        ),
    ],
    ("ampere", "bf16"): [  # A100
        (
            "be870000 3e400000 bf240000 bc9f0000 3e2d0000 bf3c0000 3f4f0000 beac0000",
            "3f850000 3f360000 3f700000 bd760000 3e8f0000 bf670000 be400000 3f950000",
            "3f1f7261", "3d4c8260",
        ),
        (
            "bf0c0000 bf970000 3ee20000 3ff50000 bf9b0000 bdbf0000 beed0000 3df90000",
            "bee90000 bfa60000 3f710000 3f270000 bece0000 bdad0000 beaf0000 bc1d0000",
            "3ee844b9", "40918f41",
        ),
    ],
    ("ada_fp8", "e5m2"): [  # L40S
        (
            "be800000 3e400000 bf200000 bc800000 3e200000 bf200000 3f400000 bea00000 3e800000 3da00000 3ea00000 "
            "bf400000 3fc00000 bea00000 bfc00000 3ee00000 3e800000 bf200000 bf000000 bf800000 3ea00000 bfa00000 "
            "3dc00000 3f800000 bea00000 40000000 bea00000 3f600000 bfa00000 bf000000 bea00000 3f200000",
            "3f800000 3f200000 3f600000 bd600000 3e800000 bf600000 be400000 3f800000 bf000000 bfa00000 3ee00000 "
            "3cc00000 40000000 3f800000 bf200000 c0000000 bf000000 bee00000 3fe00000 bf200000 3f600000 bf400000 "
            "bd000000 bf600000 3dc00000 bf600000 3fc00000 c0000000 3f800000 bee00000 3f200000 bee00000",
            "3cc34201", "c0492000",
        ),
    ],
    ("hopper", "fp16"): [  # H100
        (
            "be87e000 3e40c000 bf244000 bc9f2000 3e2d6000 bf3ce000 3f4fe000 beac6000 3e928000 3da3a000 3eace000 "
            "bf436000 3fc0e000 beafe000 bfd48000 3efc2000",
            "3f852000 3f36a000 3f702000 bd766000 3e8f2000 bf674000 be408000 3f958000 bf1ba000 bfa3c000 3ee2a000 "
            "3cdd6000 40016000 3f96c000 bf390000 c019e000",
            "3f70e1ee", "40381776",
        ),
        (
            "bf0c6000 bf976000 3ee2c000 3ff56000 bf9be000 bdbfa000 beed6000 3df9c000 3dccc000 3f752000 3c830000 "
            "bdbdc000 3f1ac000 3e354000 3f4dc000 3fcea000",
            "bee90000 bfa62000 3f710000 3f270000 becec000 bdadc000 beafe000 bc1d8000 3fb6a000 bf022000 bfa7a000 "
            "be81e000 bf2c8000 bf574000 3fd78000 be5a0000",
            "3f4d71f9", "40a0c43c",
        ),
    ],
    ("hopper_fp8", "e4m3fn"): [  # H100
        (
            "be800000 3e400000 bf200000 bc900000 3e200000 bf300000 3f400000 bea00000 3e900000 3da00000 3ea00000 "
            "bf400000 3fc00000 bea00000 bfd00000 3ef00000 3e800000 bf200000 bf100000 bf900000 3eb00000 bfa00000 "
            "3dc00000 3f800000 bea00000 40000000 bea00000 3f600000 bfa00000 bf000000 bea00000 3f300000",
            "3f800000 3f300000 3f700000 bd700000 3e800000 bf600000 be400000 3f900000 bf100000 bfa00000 3ee00000 "
            "3cd00000 40000000 3f900000 bf300000 c0100000 bf000000 bef00000 3ff00000 bf300000 3f600000 bf400000 "
            "bd000000 bf700000 3dc00000 bf700000 3fc00000 c0100000 3f800000 bee00000 3f300000 bef00000",
            "00000000", "c06d7800",
        ),
        (
            "bf000000 bf900000 3ee00000 3ff00000 bf900000 bdb00000 bee00000 3df00000 3dc00000 3f700000 3c800000 "
            "bdb00000 3f100000 3e300000 3f400000 3fc00000 bdc00000 bea00000 3f400000 bfb00000 bd800000 3fc00000 "
            "3f800000 40000000 3f900000 3e500000 3f900000 3dc00000 bf600000 00000000 3f300000 3ef00000",
            "bee00000 bfa00000 3f700000 3f200000 bec00000 bda00000 bea00000 bc000000 3fb00000 bf000000 bfa00000 "
            "be800000 bf200000 bf500000 3fd00000 be500000 3ff00000 3ef00000 bf800000 3fb00000 3e600000 3e100000 "
            "3fc00000 3f200000 bf400000 bf500000 bf400000 3e600000 3fa00000 3f900000 be500000 be700000",
            "00000000", "3f2a6000",
        ),
    ],
    ("blackwell", "bf16"): [  # B200
        (
            "be870000 3e400000 bf240000 bc9f0000 3e2d0000 bf3c0000 3f4f0000 beac0000 3e920000 3da30000 3eac0000 "
            "bf430000 3fc00000 beaf0000 bfd40000 3efc0000",
            "3f850000 3f360000 3f700000 bd760000 3e8f0000 bf670000 be400000 3f950000 bf1b0000 bfa30000 3ee20000 "
            "3cdd0000 40010000 3f960000 bf390000 c0190000",
            "3e963410", "400de8f5",
        ),
        (
            "bf0c0000 bf970000 3ee20000 3ff50000 bf9b0000 bdbf0000 beed0000 3df90000 3dcc0000 3f750000 3c830000 "
            "bdbd0000 3f1a0000 3e350000 3f4d0000 3fce0000",
            "bee90000 bfa60000 3f710000 3f270000 bece0000 bdad0000 beaf0000 bc1d0000 3fb60000 bf020000 bfa70000 "
            "be810000 bf2c0000 bf570000 3fd70000 be5a0000",
            "3f063783", "4097455e",
        ),
    ],
}  # fmt: skip


def reference_dot(unit: Unit, fmt: str | tuple[str, str], a, b, c: float = 0.0) -> float:
    """The inner product of two rows by the reference; ``c`` comes first, as the product of itself and 1."""
    order = Aligned(unit.length, unit.bits, None if unit.late else unit.floor, unit.late, unit.lanes)
    accumulator = f"e8m{unit.precision - 1}"
    rounding = "nearest_even" if unit.nearest else "toward_zero"
    assert c == 0, "the reference begins with +0"
    return to_float(dot(a, b, "fp32", rounding, accumulator=accumulator, order=order, operands=fmt))


def operands(fmt: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Numbers of a format, shape (rows, K): some rows of all codes, some near 1, some of subnormals, many zeros."""
    draw = np.random.default_rng(seed)
    f = parse_format(fmt)
    values = np.array([[to_float(decode(int(c), f)) for c in row] for row in draw.integers(0, 1 << f.bits, shape)])
    near_one = np.ldexp(np.rint(np.ldexp(draw.uniform(-2, 2, shape), f.mantissa_bits)), -f.mantissa_bits)
    tiny = np.ldexp(draw.integers(-(1 << f.mantissa_bits), (1 << f.mantissa_bits) + 1, shape), f.smallest_exponent)
    kind = draw.integers(0, 5, (shape[0], 1))
    finite = np.where(np.isfinite(values), values, 1.0)
    x = np.select([kind == 0, kind == 1, kind == 2, kind == 3], [values, near_one, tiny, finite], finite)
    return np.where(draw.uniform(size=shape) < 0.1, np.copysign(0.0, x) if f.has_negative_zero else 0.0, x)


def same(got: list[float], wanted: np.ndarray) -> bool:
    """Whether the numbers have the same bits; one NaN is like another."""
    pairs = [np.where(np.isnan(x), np.nan, x).view(np.int64) for x in (np.array(got), wanted)]
    return np.array_equal(*pairs)


@pytest.mark.parametrize(("machine", "fmt"), UNITS)
def test_the_reference_is_the_model_in_numpy(machine: str, fmt: str) -> None:
    """On all codes, cancellation, subnormals, zeros, infinities and NaN, and lengths that are no multiple of a step."""
    unit = UNITS[machine, fmt]
    code_format = "e8m10" if fmt == "tf32" else fmt
    least = parse_format(code_format).emin
    for length in (0, 1, 2, unit.length + 3, 2 * unit.length):
        a, b = (operands(code_format, (10, length), seed) for seed in (length, length + 1000))
        if length > 2:  # pairs of products that cancel
            half = length // 2
            a[6:, half : 2 * half], b[6:, half : 2 * half] = -a[6:, :half], b[6:, :half]
        got = [reference_dot(unit, code_format, x, y) for x, y in zip(a, b, strict=True)]
        assert same(got, unit.dot(a, b, least)), (machine, fmt, length)


@pytest.mark.parametrize(("machine", "fmt"), RECORDED)
def test_the_model_in_numpy_gives_the_recorded_results_of_gpus(machine: str, fmt: str) -> None:
    for a, b, c, d in RECORDED[machine, fmt]:
        x, y, z, result = (
            np.array([int(word, 16) for word in words.split()], np.uint32).view(np.float32) for words in (a, b, c, d)
        )
        got = UNITS[machine, fmt].dot(
            x[None].astype(float), y[None].astype(float), parse_format(fmt).emin, z.astype(float)
        )
        assert got.astype(np.float32).view(np.uint32) == result.view(np.uint32)
        if z == 0:
            assert reference_dot(UNITS[machine, fmt], fmt, x.tolist(), y.tolist()) == float(result[0])


def hopper_fp8(a: list[float], b: list[float]) -> Fraction:
    return dot(a, b, "fp32", "toward_zero", accumulator="e8m13", order=("aligned", 32, 13), operands="e4m3fn")


def test_vectors_that_tell_machines_apart() -> None:
    blackwell = {"accumulator": "fp32", "order": ("aligned", 32, 25), "operands": "e4m3fn"}
    assert hopper_fp8([448, 2**-6], [1, 1]) == 448
    assert dot([448, 2**-6], [1, 1], "fp32", "toward_zero", **blackwell) == Fraction(448015625, 10**6)
    long = [256.0] + [0.0] * 31 + [2.0**-6] * 1000
    assert hopper_fp8(long, [1.0] * len(long)) == 256
    assert dot(long, [1.0] * len(long), "fp32") == Fraction(271625, 1000)
    # The sum grows to 16 and no further: there 2**-10 is below the 13 bits that are kept.
    steps = [2.0**-5] * 32768
    assert hopper_fp8(steps, steps) == 16


def test_the_rules_for_infinity_nan_and_zero() -> None:
    modes = {"rounding": "toward_zero", "accumulator": "fp32", "order": ("aligned", 4, 24)}
    inf, largest = float("inf"), 2.0**127
    assert dot([inf, 1], [1, 1], "fp32", **modes) is INFINITY
    assert dot([-inf, 1], [1, 1], "fp32", **modes) is NEGATIVE_INFINITY
    assert dot([inf, -inf], [1, 1], "fp32", **modes) is NAN and dot([inf], [0], "fp32", **modes) is NAN
    # A sum beyond the range is infinite although the sum is cut toward zero.
    assert dot([largest, largest], [1, 1], "fp32", **modes) is INFINITY
    assert dot([-0.0, -0.0], [1, 1], "fp32", **modes) == dot([1, -1], [1, 1], "fp32", **modes) == 0
    # The least exponent of a sum, -132, cuts at 2**-156: a term below it is lost before it is added.
    tiny = {**modes, "order": Aligned(4, 24, floor=-132), "accumulator": "e11m52"}
    assert dot([2.0**-80] * 2, [2.0**-76, 2.0**-77], "fp64", **tiny) == Fraction(1, 2**156)


def test_mi300_rounds_down_where_others_cut() -> None:
    modes = {"accumulator": "fp32", "order": Aligned(8, 24, late_bits=31)}
    # The second step finds -2**-33 below the 2**-32 that are kept beside an accumulator of 1: it becomes -2**-32.
    x = [1.0] + [0.0] * 7 + [-(2.0**-33)]
    assert dot(x, [1.0] * 9, "fp64", accumulator="e11m52", order=Aligned(8, 24, late_bits=31)) == 1 - Fraction(1, 2**32)
    assert dot(x, [1.0] * 9, "fp32", **modes) == 1
    # 2**-24 beside a sum of products of 2 is half of the last bit of an accumulator below 2: it is kept, then cut off.
    assert dot([-(2.0**-25)] + [0.0] * 7 + [1.0], [1.0] * 9, "fp32", **modes) == 1 - Fraction(1, 2**24)


def test_bad_orders_of_matrix_units_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="needs an accumulator, such as"):
        dot([1], [1], "fp32", order=("aligned", 8, 24))
    with pytest.raises(ValueError, match="positive length and fraction bits from 0, got 0 and 13"):
        dot([1], [1], "fp32", accumulator="fp32", order=("aligned", 0, 13))
    with pytest.raises(ValueError, match="products of a matrix unit are exact"):
        dot([1], [1], "fp32", accumulator="fp32", product="fp16", order=("aligned", 8, 24))
    with pytest.raises(ValueError, match=r"or \('aligned', length, fraction_bits\)"):
        dot([1], [1], "fp32", accumulator="fp32", order=("aligned", 8))
    with pytest.raises(ValueError, match="with late_bits 2"):
        Aligned(8, 24, lanes=2)
