"""Scaled rounding of tensors, bit for bit that of the exact reference: shapes, axes, strides, dtypes, special values.

Every example is a small tensor whose elements hypothesis draws by their bits, so that zeros of both signs, subnormal
numbers, infinities and NaN are as frequent as it likes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.reference import NAN, NEGATIVE_ZERO, Special, Value, as_value
from fpsim.rounding.definitions import random_words_at
from fpsim.rounding.ops import random_key_op

CARRIERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
WORKING = {torch.float32: "fp32", torch.bfloat16: "fp32", torch.float64: "fp64"}

WHOLE = (
    "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "msfp12", "msfp16", "bfp16", "int8",
    "int4", "int3", "int16", "uint8", "uint4", "nf4", "fp4_bnb",
)  # fmt: skip
POWERS_OF_TWO = tuple(
    f"{element}/{scale}"
    for element in ("e4m3fn", "e2m1fn", "e5m2", "e3m2fn", "e4m3fnuz", "e3m4")
    for scale in ("mx:4:floor", "mx:3:ceil", "mx:4:rceil", "mx:5:even", "block:2x3:power_of_two", "row:power_of_two")
)
#: Formats whose largest value is below 2: the scale of a subnormal block is not the smallest one.
SMALL_FORMATS = tuple(
    f"{element}/mx:4:{rule}"
    for element in ("mxint8", "e1m2finite:bias=1", "e4m3:bias=30", "int8:unit=-20", "e2m1fn:bias=40")
    for rule in ("floor", "ceil", "rceil", "even")
)
RATIOS = (
    "e4m3fn/tensor", "e4m3fn/tensor:bf16", "e4m3fn/row", "e5m2/row:bf16", "e2m1fn/block:4", "e3m4/block:3:bf16",
    "e4m3fn/block:2x3", "e4m3fn/block:3x3:bf16", "int8/column", "int8:full/row", "int4:full/block:4", "int4/group:3",
    "int8/channel",
    "int8/tensor:bf16", "e4m3fn/tensor:encode", "int8:full/row:encode", "e2m1fn/block:3:encode", "nf4/row",
    "fp4_bnb/block:4", "codebook:even:-1,-0.5,0,0.25,2/row",
    "codebook:away:-3,-0.5,0.25,2/block:4:bf16", "dynamic8/group:4", "dynamic8:unsigned/row", "dynamic4/block:3",
    "linear4:unsigned/group:4", "nf4/group:3:double", "int4:full/group:2:double", "e4m3fn/group:4:double",
    "linear4:unsigned/group:2:double",
)  # fmt: skip
ASYMMETRIC = (
    "uint8/tensor:asymmetric", "uint4/block:3:asymmetric", "int4/group:3:asymmetric", "uint2/row:asymmetric",
    "uint8/tensor:range", "uint4/row:range", "uint3/channel:range", "int3/column:range", "uint2/down/row:range",
)  # fmt: skip
NV = (
    "e2m1fn/nv", "e2m1fn/nv:torchao", "e2m1fn/nv:16x16", "e2m1fn/nv:16x16:torchao", "e2m1fn/nv:mae", "e2m1fn/nv:mse",
    "e2m1fn/nv:16x16:mae", "e2m1fn/nv:16x16:mse",
)  # fmt: skip
MODES = (
    "e4m3fn/toward_zero/mx:4", "e4m3fn/up/mx:4:floor", "e2m1fn/down/mx:3", "e5m2/to_odd/mx:4",
    "e5m2/ovf_inf/mx:4:floor", "e4m3fn/sat_propagate/row", "e4m3fn/nearest_away/block:4", "int8/up/row",
    "int8/toward_zero/tensor", "e4m3fn/to_odd/row", "e2m1fn/toward_zero/nv", "e2m1fn/up/nv", "int8/down/tensor:bf16",
    "uint4/down/row:asymmetric", "mxint8/nearest_away/mx:4:floor", "e4m3fn/power_of_two",
    "e5m2/ovf_inf/power_of_two", "e5m2/tensor:power_of_two",
)  # fmt: skip
ALL = (*WHOLE, *POWERS_OF_TWO, *SMALL_FORMATS, *RATIOS, *ASYMMETRIC, *NV, *MODES)

#: Shapes with their axes: blocks that fill an axis, ragged ones, the first and the middle axis, several axes.
PLACES: tuple[tuple[tuple[int, ...], int | tuple[int, ...]], ...] = (
    ((2, 8), -1), ((8, 2), 0), ((3, 5), 1), ((5, 3), -2), ((7,), 0), ((1,), -1), ((2, 3, 4), 1), ((2, 3, 4), 0),
    ((2, 2, 3), (0, 1)), ((2, 2, 3), (0, 2)), ((2, 33), -1), ((33, 2), 0), ((1, 1), 0), ((2, 2), ()),
    ((2, 3, 3), (1, 2)),
)  # fmt: skip


def exact(x: Tensor) -> list[Value]:
    """The elements in row-major order. float64 holds them all."""
    return [as_value(value) for value in x.double().reshape(-1).tolist()]


def held(value: Value, dtype: torch.dtype) -> Value:
    """``value`` as a tensor of ``dtype`` holds it."""
    return reference.round(value, CARRIERS[dtype])


def expected(x: Tensor, name: str, axis: int | Sequence[int], **random: object) -> list[Value]:
    results = reference.round_blocks(exact(x), name, tuple(x.shape), axis, working=WORKING[x.dtype], **random)
    return [held(value, x.dtype) for value in results]


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """The name of a cast without its rounding and overflow mode, and these as arguments of `fpsim.round`."""
    parts, modes = [], {}
    for part in name.split("/"):
        if part in fpsim.formats.ROUNDINGS:
            modes["rounding"] = part
        elif part in fpsim.formats.OVERFLOWS:
            modes["overflow"] = part
        else:
            parts.append(part)
    return "/".join(parts), modes


def check(x: Tensor, name: str, axis: int | Sequence[int], **arguments: object) -> None:
    """Assert that `fpsim.round` gives what the reference gives."""
    cast, modes = split_name(name)
    rounded = fpsim.round(x, cast, axis=axis, **modes, **arguments)
    assert rounded.shape == x.shape and rounded.dtype == x.dtype
    same(exact(rounded), expected(x, name, axis), exact(x))


def same(got: list[Value], want: list[Value], inputs: list[Value]) -> None:
    wrong = [(i, inputs[i], got[i], want[i]) for i in range(len(got)) if got[i] != want[i]]
    shown = [(i, *(v if isinstance(v, Special) else float(v) for v in values)) for i, *values in wrong[:4]]
    assert not wrong, f"index, input, fpsim, reference: {shown}"


# -- tensors ----------------------------------------------------------------------------------------------------------

BITS = {torch.float32: (torch.int32, 32), torch.bfloat16: (torch.int16, 16), torch.float64: (torch.int64, 64)}
#: The bits of float32 that matter most: both zeros, both infinities, NaN, subnormals, thresholds of the rules.
EDGES = (
    0x00000000, 0x80000000, 0x00000001, 0x00400000, 0x007FFFFF, 0x00800000, 0x047FFFFF, 0x04800000, 0x40FFFFFF,
    0x41000000, 0x43E00000, 0x43E00001, 0x43E80000, 0x43FF0000, 0x44000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
    0x7FC00000, 0xFFC00000, 0x3E800000, 0x3E800002, 0x40A00000, 0x3C400000, 0x35800000, 0x3FFFFFFF,
)  # fmt: skip


def tensor_of(numbers: Sequence[float], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(shape)


@st.composite
def tensors(draw, dtypes: Sequence[torch.dtype] = tuple(CARRIERS), special: bool = True):
    """A tensor and an axis. Its elements lie near one another, or anywhere, or on edges; its strides are any."""
    dtype = draw(st.sampled_from(list(dtypes)))
    shape, axis = draw(st.sampled_from(PLACES))
    middle = draw(st.integers(-149, 126) if special else st.integers(-90, 90))
    near = st.builds(
        lambda sign, n, e: sign * math.ldexp(n, max(middle + e, -149) - 23),
        st.sampled_from([1, -1]), st.integers(0, (1 << 24) - 1), st.integers(-12, 1),
    )  # fmt: skip
    edges = st.sampled_from(EDGES).map(lambda bits: torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32))
    numbers = near | edges.map(lambda bits: bits.view(torch.float32).item()) if special else near
    count = math.prod(shape)
    x = tensor_of(draw(st.lists(numbers, min_size=count, max_size=count)), dtype, shape)
    if draw(st.booleans()):  # the same tensor with other strides
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if draw(st.booleans()):
        x = torch.stack([x, torch.full_like(x, 3.0)], -1)[..., 0]
    return x, axis


# -- properties -------------------------------------------------------------------------------------------------------

many = settings(max_examples=40, deadline=None)


@many
@given(tensors(), st.sampled_from(WHOLE))
def test_whole_formats(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@many
@given(tensors(), st.sampled_from(POWERS_OF_TWO))
def test_powers_of_two(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@many
@given(tensors(), st.sampled_from(SMALL_FORMATS))
def test_formats_whose_largest_value_is_small(tensor, name):
    x, axis = tensor
    check(x, name, axis)


def test_tiles_and_columns_run_across_every_axis():
    """The largest magnitudes differ from row to row of each axis, so that a group along another axis shows."""
    for shape in ((3, 4), (2, 3, 4), (2, 3, 2, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x *= 2.0 ** torch.arange(x.numel()).reshape(shape).mul(7).remainder(11)
        for name in ("e4m3fn/block:2x3", "int4/block:2x2", "int4/column", "e2m1fn/block:3x1:power_of_two"):
            for axis in range(len(shape)):
                check(x, name, axis)


def test_a_tensor_of_one_block_with_the_largest_scale():
    """The multiplier is 2^-127, which is no normal number of float32."""
    for name in ("mxint8", *SMALL_FORMATS):
        check(torch.tensor([[3.4028234663852886e38, 1.0, -(2.0**127)]]), name, 1)


@many
@given(tensors(), st.sampled_from(RATIOS))
def test_ratios(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@many
@given(tensors(), st.sampled_from(ASYMMETRIC))
def test_zero_points(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@many
@given(tensors(), st.sampled_from(NV))
def test_two_levels_of_scales(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@many
@given(tensors(), st.sampled_from(MODES))
def test_rounding_and_overflow_modes(tensor, name):
    x, axis = tensor
    check(x, name, axis)


@pytest.mark.parametrize("dtype", CARRIERS)
@pytest.mark.parametrize("name", ALL)
def test_every_name_on_edges_and_on_ordinary_numbers(name, dtype):
    generator = torch.Generator().manual_seed(len(name))
    ordinary = torch.randn(3, 35, generator=generator, dtype=torch.float64)
    wide = ordinary * 2.0 ** torch.randint(-30, 30, (3, 35), generator=generator)
    edges = torch.tensor([bits - (bits >> 31 << 32) for bits in EDGES], dtype=torch.int32).view(torch.float32)
    check(ordinary.to(dtype), name, -1)
    check(wide.to(dtype), name, 0)
    for finite in (True, False):
        column = edges[edges.isfinite()] if finite else edges
        check(column.to(dtype).reshape(-1, 2), name, -1)
        check(column.to(dtype).reshape(-1, 1), name, -1)


@pytest.mark.parametrize("name", ["e2m1fn/up/nv", "e2m1fn/down/nv:torchao", "int8/up/row", "uint8/up/row:asymmetric"])
def test_quotients_below_the_normal_numbers_count_as_zero(name):
    """So a process that flushes them has the same results."""
    x = torch.tensor([2.0**127, 2.0**-20, -(2.0**-20), 2.0**-130, 1.0])
    check(x, name, -1)
    check(x.double(), name, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_that_flushes_subnormal_numbers_has_the_same_bits(dtype):
    """Of the blocks, whatever their scale: floating-point steps meet no subnormal number that counts."""
    edges = torch.tensor([bits - (bits >> 31 << 32) for bits in EDGES], dtype=torch.int32).view(torch.float32)
    tiny = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-138, -114, 4.0)
    for x in (
        edges[edges.isfinite()].to(dtype).reshape(-1, 1),
        edges[edges.isfinite()].to(dtype)[None],
        tiny.to(dtype),
    ):
        for name in ALL:
            cast, modes = split_name(name)
            plain = fpsim.round(x, cast, axis=-1, **modes)
            torch.set_flush_denormal(True)
            try:
                flushed = fpsim.round(x, cast, axis=-1, **modes)
            finally:
                torch.set_flush_denormal(False)
            same(exact(flushed), exact(plain), exact(x))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize(
    "name", ["mxfp8", "nvfp4", "int8", "uint8", "nf4", "e4m3fn/block:4x4", "e4m3fn/tensor", "e4m3fn/mx:floor"]
)
def test_empty_tensors_stay_empty(name, shape):
    x = torch.empty(shape)
    for axis in range(len(shape)):
        assert fpsim.round(x, name, axis=axis).shape == x.shape


@pytest.mark.parametrize("name", ["nf4/row", "codebook:down:-1,0.25,0.5,1/row", "codebook:up:-1,0.25,0.5,1/row"])
def test_float64_quotients_are_compared_with_exact_middles(name):
    """A number of float64 just above or below the middle of two values is no tie, though float32 cannot tell."""
    book = reference.parse_cast(name).element
    assert isinstance(book, reference.Codebook)
    middles = [float((low + high) / 2) for low, high in itertools.pairwise(book.values)]
    for ulps in (-1, 0, 1):
        numbers = [math.nextafter(middle, math.copysign(9, ulps)) if ulps else middle for middle in middles]
        check(torch.tensor([1.0, *numbers], dtype=torch.float64), name, -1)


# -- stochastic rounding ----------------------------------------------------------------------------------------------

STOCHASTIC = (
    ("e4m3fn/mx:4", "stochastic:8"), ("e2m1fn/nv", "stochastic:8"), ("e2m1fn/nv:16x16", "stochastic_b:4"),
    ("int8/row", "stochastic:4"), ("uint4/row:asymmetric", "stochastic:5"), ("int4/group:7", "stochastic_c:8"),
    ("e4m3fn/block:2x3", "stochastic_b:3"), ("mxint8/mx:5", "stochastic:8"), ("e5m2/column", "stochastic:3"),
)  # fmt: skip


def numbers_of(seed: int, count: int, bits: int) -> list[int]:
    """The random numbers of the elements of a tensor in row-major order: the first bits of their words."""
    words = random_words_at(random_key_op(torch.tensor(seed), 0), 0, count).tolist()
    return [(word % 2**32) >> (32 - bits) for word in words]


@many
@given(tensors(special=False), st.sampled_from(STOCHASTIC), st.integers(0, 1000))
def test_stochastic_rounding_takes_the_random_number_of_the_element(tensor, cast, seed):
    """That of its row-major index in the tensor, wherever its block lies."""
    (x, axis), (name, rounding) = tensor, cast
    element, scale = name.split("/")
    random = numbers_of(seed, x.numel(), int(rounding.split(":")[1]))
    got = exact(fpsim.round(x, name, axis=axis, rounding=rounding, seed=seed))
    same(got, expected(x, f"{element}/{rounding}/{scale}", axis, random=random), exact(x))


@pytest.mark.parametrize(
    "name", ["mxfp8", "nvfp4", "int8/row", "mxfp4", "e4m3fn/block:16", "uint4/row:asymmetric", "uint4/row:range"]
)
def test_stochastic_rounding_is_unbiased_in_every_block(name):
    """An element goes up, among 2,000 copies, as often as its place asks for, within 5 standard errors."""
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    low, high = (fpsim.round(x, name, rounding=direction).double() for direction in ("down", "up"))
    rounded = fpsim.round(x.repeat(2000, 1), name, rounding="stochastic", seed=3).reshape(2000, 2, 32)
    ups = (rounded == high).double().mean(0)
    between = (low < x) & (x < high)
    chance = ((x - low) / (high - low))[between]
    error = (ups[between] - chance).abs()
    assert between.sum() > 50 and (error <= 5 * (chance * (1 - chance) / 2000).sqrt() + 1e-3).all()


# -- codes ------------------------------------------------------------------------------------------------------------

ENCODED = (
    "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4", "e2m1fn/nv:torchao", "e2m1fn/nv:16x16", "int8",
    "e2m1fn/nv:mse", "int4",
    "uint8", "uint4/block:3:asymmetric", "nf4", "fp4_bnb", "e4m3fn/block:2x3", "e4m3fn/tensor", "e4m3fn/column",
    "int8:full/group:5", "e4m3fn/mx:4:floor", "e5m2/row:bf16", "e5m2/row:encode", "int8/column:encode",
    "dynamic8", "dynamic8:unsigned", "dynamic4",
    "linear4:unsigned", "nf4/group:4:double", "int4/group:3:double",
)  # fmt: skip


@many
@given(tensors(), st.sampled_from(ENCODED))
def test_decoded_codes_are_the_rounded_tensor(tensor, name):
    x, axis = tensor
    if name == "int8/column:encode" and fpsim.round(x, name, axis=axis).isnan().any():
        with pytest.raises(ValueError, match="has no code for NaN"):
            fpsim.encode_blocks(x, name, axis, packed=False)
        return
    codes, scales = fpsim.encode_blocks(x, name, axis, packed=False)
    decoded = fpsim.decode_blocks(codes, scales, name, axis, x.dtype, packed=False)
    rounded = fpsim.round(x, name, axis=axis)
    same(exact(decoded), exact(rounded), exact(x))


def code_of(value: Value, element: object) -> int:
    """The code of a value of an element format, as encode_blocks defines it; 0 for NaN."""
    if value is NAN:
        return 0
    if isinstance(element, reference.Integers):
        return int(Fraction(0 if value is NEGATIVE_ZERO else value) / element.unit) % (1 << 8)
    return reference.encode(value, element)


@many
@given(tensors(), st.sampled_from(["mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp4", "mxint8", "e4m3fn/mx:4:even"]))
def test_codes_and_scales_of_mx_are_those_of_the_reference(tensor, name):
    x, axis = tensor
    codes, scales = fpsim.encode_blocks(x, name, axis, packed=False)
    blocks = reference.quantize_blocks(exact(x), name, tuple(x.shape), axis, working=WORKING[x.dtype])
    element = reference.parse_cast(name).element
    expected_codes, expected_scales = [0] * x.numel(), []
    for indices, block in blocks:
        expected_scales.append(255 if block.scale is NAN else reference.encode(block.scale, "e8m0fnu"))
        for i, value in zip(indices, block.elements, strict=True):
            expected_codes[i] = code_of(value, element)
    assert codes.reshape(-1).tolist() == expected_codes
    assert sorted(scales.reshape(-1).tolist()) == sorted(expected_scales)


@many
@given(tensors(), st.sampled_from(["int8", "e4m3fn/block:3", "e4m3fn/tensor:bf16", "nf4", "uint8", "nvfp4"]))
def test_ratios_zero_points_and_scales_of_nvfp4_are_those_of_the_reference(tensor, name):
    x, axis = tensor
    _, scales = fpsim.encode_blocks(x, name, axis, packed=False)
    blocks = [
        block for _, block in reference.quantize_blocks(exact(x), name, tuple(x.shape), axis, working=WORKING[x.dtype])
    ]
    first = scales[0] if isinstance(scales, tuple) else scales
    if name == "nvfp4":
        first = fpsim.decode(first, "e4m3fn")
        assert exact(scales[1]) == [blocks[0].tensor_scale]
    order = lambda values: sorted(map(str, values))  # noqa: E731
    assert order(exact(first)) == order(block.scale for block in blocks)
    if name == "uint8":
        pairs = [pair for pair in zip(*map(exact, scales), strict=True) if pair[0] is not NAN]
        assert order(pairs) == order((b.scale, Fraction(b.zero_point or 0)) for b in blocks if b.scale is not NAN)


def test_the_scales_of_double_quantization_are_those_of_the_reference():
    """601 groups: two blocks of scales are full, the last one is short; some groups are zeros."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1201, generator=generator) * 2.0 ** torch.randint(-12, 12, (1201,), generator=generator)
    x[50:60] = 0
    _, (codes, of_scales, offset) = fpsim.encode_blocks(x, "nf4/group:2:double")
    blocks = [block for _, block in reference.quantize_blocks(exact(x), "nf4/group:2", (1201,))]
    groups = [exact(x)[i : i + 2] for i in range(0, 1201, 2)]
    ratios = [Fraction(0) if reference.blocks.amax(g) == 0 else b.scale for g, b in zip(groups, blocks, strict=True)]
    second, mean = reference.blocks.quantize_ratios(ratios)
    values = [value for block in second for value in block.elements]
    assert [reference.CODEBOOKS["dynamic8"].values[code] for code in codes.tolist()] == values
    assert exact(of_scales) == [block.scale for block in second] and exact(offset) == [mean]


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_special_value_makes_all_groups_nan_under_double_quantization(special):
    """The mean of the scales is NaN."""
    x = torch.tensor([1.0, 2.0, 3.0, special])
    assert fpsim.round(x, "nf4/group:2:double").isnan().all()
    assert fpsim.round(x, "nf4/group:2").isnan().tolist() == [False, False, True, True]


# -- compiled ---------------------------------------------------------------------------------------------------------

COMPILED = (
    ("mxfp8", -1), ("e2m1fn/mx:16:even", 0), ("nvfp4", 0), ("int8", -1), ("uint4", -1), ("nf4", -1),
    ("e4m3fn/block:8x8", -1), ("e4m3fn/row:encode", 0), ("mxint8", 0), ("dynamic8", -1), ("linear4:unsigned/row", -1),
    ("nf4/group:1:double", -1), ("e2m1fn/nv:mse", -1), ("e2m1fn/nv:16x16:mae", 0),
)  # fmt: skip


def test_compiled_blocks_are_those_of_the_reference():
    """By Inductor, with ragged last blocks, on numbers with edges among them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 40, generator=generator) * 2.0 ** torch.randint(-20, 20, (9, 1), generator=generator)
    x[0, :4] = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-127)])
    x[3, 5], x[5, 6], x[7] = math.nan, math.inf, -0.0
    rounded = torch.compile(lambda x: [fpsim.round(x, name, axis=axis) for name, axis in COMPILED])(x)
    for (name, axis), got in zip(COMPILED, rounded, strict=True):
        same(exact(got), expected(x, name, axis), exact(x))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_compiled_code_rounds_a_last_block_that_is_not_full(name):
    """Rounding into given memory: one loop goes over blocks, and writes rows."""
    x = torch.linspace(-3, 3, 360).view(9, 40)
    torch._dynamo.reset()
    into = torch.compile(lambda x, target: target.copy_(fpsim.round(x, name)), fullgraph=True)
    same(exact(into(x, torch.full_like(x, 7.0))), expected(x, name, -1), exact(x))


@pytest.mark.parametrize("cast", ["mxint8", "e2m1fn/mx:ceil", "mxfp8"])
def test_compiled_code_has_the_largest_and_the_smallest_scales(cast: str) -> None:
    """2^127 is the scale of MXINT8 for the largest numbers; its inverse is no normal number of float32."""
    largest = torch.tensor([torch.finfo(torch.float32).max, -(2.0**127), 2.0**121, -(2.0**120), 1.0, -0.0, 2.0**-149])
    tiny = torch.tensor([2.0**-126, -(2.0**-127), 2.0**-140, 2.0**-149, 0.0, -0.0, -(2.0**-130)])
    x = torch.stack([largest, tiny, largest * 2.0**-6, tiny * 16])
    torch._dynamo.reset()
    got = torch.compile(lambda x: fpsim.round(x, cast), fullgraph=True)(x)
    want = reference.round_blocks(x.flatten().tolist(), cast, tuple(x.shape), -1)
    want = torch.tensor([reference.to_float(value) for value in want], dtype=torch.float64).float().view(x.shape)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))
