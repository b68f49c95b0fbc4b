"""Rounding of blocks whose elements share a scale: one block, or all blocks of an array.

`quantize_block` writes a block as its scale and its elements, `Block.decoded` multiplies them again. The steps of the
scale itself are in `fpsim.reference.scales`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from fpsim.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_ROUNDINGS, FloatFormat, parse_format

from .arithmetic import add, div, mul, sub
from .elements import Element, parse_element, round_element
from .integers import Integers, round_integer
from .rounding import round
from .scales import (
    FOUR_OVER_SIX_RULES,
    LEAST_RATIO,
    NV_RULES,
    POWER_OF_TWO_RULES,
    SMALLEST_NORMAL,
    Scale,
    affine_scale,
    amax,
    encode_scale,
    flushed,
    four_over_six_scales,
    mean_ratio,
    nv_block_scale,
    nv_range,
    nv_reciprocal,
    nv_tensor_scale,
    parse_scale,
    power_of_two_scale,
    range_scale,
    ratio_scale,
    tensor_power_of_two,
)
from .sums import RandomNumbers
from .values import INFINITIES, INFINITY, NAN, Number, Special, Value, as_value, is_negative, rational, with_sign

# -- one block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A rounded block: its scale, and its elements as values of the element format.

    Attributes:
        elements: the values of the element format; in an asymmetric block the integer codes; NaN under a NaN scale.
        scale: the scale of the block: a power of two, a ratio, or a value of e4m3fn; NaN if the block is NaN.
        rule: the rule of the scale (`fpsim.reference.scales.Scale`).
        zero_point: the integer that stands for zero; None in a symmetric block.
        minimum: the number for which the integer 0 stands under the rule ``range``; None under others.
        tensor_scale: the float32 scale of the tensor in NVFP4, which all rules but ``torchao`` divide by; else 1.
    """

    elements: tuple[Value, ...]
    scale: Value
    rule: str
    zero_point: int | None = None
    minimum: Fraction | None = None
    tensor_scale: Fraction = Fraction(1)

    def decoded(self, working: str | FloatFormat = "fp32") -> tuple[Value, ...]:
        """The numbers that the block stands for.

        Under a power of two the products are exact. Under a ratio each product rounds to ``working``. In NVFP4 the
        product of the element and the block scale is exact, and its product or quotient with the tensor scale rounds.
        """
        if self.scale is NAN:
            return (NAN,) * len(self.elements)
        return tuple(self._decoded(element, working) for element in self.elements)

    def _decoded(self, element: Value, working: str | FloatFormat) -> Value:
        if self.rule in NV_RULES:
            product = mul(element, self.scale, working)
            return (mul if self.rule == "torchao" else div)(product, self.tensor_scale, working)
        if self.minimum is not None:
            return add(mul(element, self.scale, working), self.minimum, working)
        if self.zero_point is not None:
            return mul(rational(element) - self.zero_point, self.scale, working)
        if self.rule in (*POWER_OF_TWO_RULES, "power_of_two"):
            return element if isinstance(element, Special) else element * rational(self.scale)
        return mul(element, self.scale, working)


def round_block(
    values: Iterable[Number],
    element: str | Element,
    scale: str | Scale,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: RandomNumbers | None = None,
    tensor_amax: Number | None = None,
    working: str | FloatFormat = "fp32",
) -> tuple[Value, ...]:
    """The decoded values of one block whose elements share a scale: `quantize_block`, then `Block.decoded`.

    Arguments:
        values, element, scale, rounding, overflow, random, tensor_amax, working: as in `quantize_block`.

    Raises:
        ValueError, TypeError: as `quantize_block`.

    >>> round_block([957, 1], "e4m3fn", "mx:32:rceil")
    (Fraction(960, 1), Fraction(1, 1))
    """
    block = quantize_block(
        values, element, scale, rounding, overflow, random=random, tensor_amax=tensor_amax, working=working
    )
    return block.decoded(working)


def quantize_block(
    values: Iterable[Number],
    element: str | Element,
    scale: str | Scale,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    random: RandomNumbers | None = None,
    tensor_amax: Number | None = None,
    working: str | FloatFormat = "fp32",
    columns: int | None = None,
) -> Block:
    """One block whose elements share a scale, rounded.

    - Under a power of two (``mx``, ``power_of_two``), an element is the exact quotient by the scale, rounded once.
    - Under a ratio, the quotient rounds to ``working``, and then to the element format. An element or a quotient below
      2**-126 counts as zero, here and in the next two cases. (To nearest the result is zero anyway.)
    - Under ``encode`` the product with the scale's inverse takes the place of the quotient. The scale is the float32
      reciprocal of that inverse.
    - Under ``range`` the difference of an element and the least one, and its quotient by the scale, round to
      ``working``. The quotient rounds to an integer. Integers from 0 to 2**N - 1 are kept, and others are clamped. The
      product of the integer and the scale, and its sum with the least element, round to ``working``.
    - An asymmetric element rounds its quotient to an integer and then adds the zero point (ONNX's order). Integers
      without sign are asymmetric under every ratio.
    - Under ``double`` a block alone has the same scale as under a ratio: it equals the mean.
    - In NVFP4 the product with the float32 reciprocal of the scales rounds to ``working``, is limited to -6 to 6, and
      then rounds to e2m1fn. The rules ``mae`` and ``mse`` take the scale `four_over_six`.

    A block with a NaN is NaN. So is a block with an infinity, except in NVFP4, where the infinity counts as the largest
    value, and under ``power_of_two``, where the scale is 1. Under ``encode`` the scale is 1 in both cases.

    Arguments:
        values: the elements of the block, each an int, Fraction, float (taken exactly) or `Special`.
        element: a name, a `FloatFormat`, an `Integers` or a `Codebook`.
        scale: a name (`fpsim.reference.scales.parse_scale`) or a `Scale`. Its size is not used.
        rounding: of the elements, as in `round`. Codebooks take none but ``nearest_even``, and have ties of their own.
        overflow: of the elements. None means ``sat_finite``, and with ``power_of_two`` the usual mode of the format.
        random: the random numbers of stochastic rounding, one for each element, or a function of its index.
        tensor_amax: the largest magnitude of the tensor, which ``nv`` needs; None takes that of the block.
        working: the format of the quotients and products: ``fp32`` for tensors of bfloat16 and float32, else ``fp64``.
        columns: the number of elements in a row of a tile; None means that the block is one row.

    Raises:
        ValueError: no such format, scale, rounding or overflow mode, or two that do not go together; ``random`` as in
            `round`.
        TypeError: a value, format or ``random`` is none of the above.

    Source: OCP Microscaling Formats (MX) 1.0 section 6.3; the reference quantizer for NVFP4 of Transformer Engine
    (``te``); torchao's ``nvfp4_quantize`` (``torchao``); ONNX's QuantizeLinear (asymmetric).
    """
    exact, fmt, how = [as_value(value) for value in values], parse_element(element), parse_scale(scale)
    if overflow is None and how.rule != "power_of_two":
        overflow = "sat_finite"
    a = amax(exact)

    def rounded(index: int, value: Value) -> Value:
        return round_element(value, fmt, rounding, overflow, random=_number(random, index))

    if how.rule == "range":
        return _ranged(exact, fmt, rounding, random, working)
    if how.asymmetric or (isinstance(fmt, Integers) and fmt.least == 0):
        return _affine(exact, fmt, how, rounding, random, working)
    if how.rule in NV_RULES:
        whole = as_value(a if tensor_amax is None else tensor_amax)
        return _nv(exact, fmt, how.rule, rounded, whole, working, len(exact) if columns is None else columns)
    if how.rule == "encode":
        factor = encode_scale(a, fmt)
        products = [flushed(mul(flushed(x), factor, working)) for x in exact]
        return Block(tuple(rounded(i, y) for i, y in enumerate(products)), div(1, factor, "fp32"), how.rule)
    if how.rule == "power_of_two":
        shared: Value = tensor_power_of_two(a, fmt, working)
    elif how.rule in POWER_OF_TWO_RULES:
        shared = power_of_two_scale(a, fmt, how.rule)
    else:
        shared = ratio_scale(a, fmt, how.rule)
    if shared is NAN:
        return Block((NAN,) * len(exact), NAN, how.rule)
    divide = _exact_quotient if how.rule in (*POWER_OF_TWO_RULES, "power_of_two") else _quotient_in(working)
    return Block(tuple(rounded(i, divide(x, shared)) for i, x in enumerate(exact)), shared, how.rule)


def _exact_quotient(value: Value, scale: Value) -> Value:
    return value if isinstance(value, Special) else value / rational(scale)


def _quotient_in(working: str | FloatFormat) -> Callable[[Value, Value], Value]:
    return lambda value, scale: flushed(div(flushed(value), scale, working))


def _affine(
    exact: Sequence[Value],
    fmt: Element,
    how: Scale,
    rounding: str,
    random: RandomNumbers | None,
    working: str | FloatFormat,
) -> Block:
    """An asymmetric block: integers from 0 to 2**N - 1 and a zero point among them."""
    if not isinstance(fmt, Integers) or fmt.unit != 1 or how.rule != "fp32":
        raise ValueError("an asymmetric block has integers as elements, and a ratio scale in fp32")
    levels = 2 ** (fmt.greatest - fmt.least).bit_length() - 1
    d, zero_point = affine_scale(exact, levels)
    if d is NAN:
        return Block((NAN,) * len(exact), NAN, how.rule, 0)
    unbounded = Integers(-(2**40), 2**40)  # the quotient is bounded only after the zero point is added
    codes = []
    for i, x in enumerate(exact):
        whole = round_integer(flushed(div(flushed(x), d, working)), unbounded, rounding, random=_number(random, i))
        codes.append(min(max(rational(whole) + zero_point, Fraction(0)), Fraction(levels)))
    return Block(tuple(codes), d, how.rule, zero_point)


def _ranged(
    exact: Sequence[Value], fmt: Element, rounding: str, random: RandomNumbers | None, working: str | FloatFormat
) -> Block:
    """A block of integers from 0 to 2**N - 1 that count from the least element."""
    if not isinstance(fmt, Integers) or fmt.unit != 1:
        raise ValueError("the scale range has integers as elements")
    levels = 2 ** (fmt.greatest - fmt.least).bit_length() - 1
    d, least = range_scale(exact, levels)
    if d is NAN:
        return Block((NAN,) * len(exact), NAN, "range", minimum=least)
    unbounded = Integers(-(2**40), 2**40)
    codes = []
    for i, x in enumerate(exact):
        above = sub(flushed(x), least, working)
        quotient = flushed(div(above, d, working))
        whole = round_integer(quotient, unbounded, rounding, random=_number(random, i))
        codes.append(min(max(rational(whole), Fraction(0)), Fraction(levels)))
    return Block(tuple(codes), d, "range", minimum=least)


def _nv(
    exact: Sequence[Value],
    fmt: Element,
    rule: str,
    rounded: Callable[[int, Value], Value],
    tensor_amax: Value,
    working: str | FloatFormat,
    columns: int,
) -> Block:
    """A block of NVFP4: elements of e2m1fn under a scale of e4m3fn, under the scale of the tensor."""
    if fmt != parse_format("e2m1fn"):
        raise ValueError("the scale nv has elements of e2m1fn")
    tensor_scale = nv_tensor_scale(tensor_amax, rule)
    if rule in FOUR_OVER_SIX_RULES:
        scale = four_over_six(exact, rule, tensor_amax, columns)
    else:
        scale = nv_block_scale(amax(exact), tensor_scale, rule)
    if scale is NAN:
        return Block((NAN,) * len(exact), NAN, rule, tensor_scale=tensor_scale)
    r = nv_reciprocal(scale, tensor_scale, rule)
    elements = tuple(
        rounded(i, _clamped(flushed(mul(flushed(x), r, working)), Fraction(6))) for i, x in enumerate(exact)
    )
    return Block(elements, scale, rule, tensor_scale=tensor_scale)


def four_over_six(exact: Sequence[Value], rule: str, tensor_amax: Value, columns: int) -> Value:
    """The scale of a block by Four Over Six: of `four_over_six_scales` the one with the smaller error.

    Of equal errors the second scale is taken, and in a tensor with an infinity or NaN. The error of a scale s:

    1. The elements are rounded to float32, and then, times the reciprocal of the scales, to e2m1fn, to nearest.
    2. A value q of these stands for q s a / (6 * 256), with a the largest magnitude of the tensor, at least 2**-100.
    3. The differences from the elements, and under ``mse`` their squares, count as zero below 2**-126.
    4. Along a row of ``columns`` elements their magnitudes (``mae``) or squares are added from the first one on.
    5. Of 16 rows, missing ones being 0, the sums i and i + 8 are added, then i and i + 4, and so on.

    Each operation rounds to float32, those in a row from the left. An error may be infinite.

    Source: Cook et al., Four Over Six (arXiv 2512.02010); the order is that of Transformer Engine.
    """
    tensor_scale = nv_tensor_scale(tensor_amax, rule)
    four, six = four_over_six_scales(amax(exact), tensor_scale)
    largest = round(tensor_amax, "fp32")
    if not isinstance(largest, Fraction):
        return six
    bounded = max(largest, LEAST_RATIO)
    of_four, of_six = (
        _error(exact, scale, nv_reciprocal(scale, tensor_scale, rule), rule, bounded, columns) for scale in (four, six)
    )
    is_less = of_four is not INFINITY and (of_six is INFINITY or rational(of_four) < rational(of_six))
    return four if is_less else six


def _error(exact: Sequence[Value], scale: Value, r: Fraction, rule: str, largest: Fraction, columns: int) -> Value:
    """The error of a scale with the reciprocal ``r``: see `four_over_six`."""
    sums: list[Value] = [Fraction(0)] * 16
    for i, value in enumerate(exact):
        x = flushed(round(value, "fp32"))
        q = round(mul(x, r, "fp32"), "e2m1fn", overflow="sat_finite")
        decoded = div(mul(mul(q, scale, "fp32"), largest, "fp32"), nv_range(rule), "fp32")
        term = amax([flushed(sub(decoded, x, "fp32"))])
        term = flushed(mul(term, term, "fp32")) if rule == "mse" else term
        sums[i // columns] = add(sums[i // columns], term, "fp32")
    for half in (8, 4, 2, 1):
        sums = [add(sums[i], sums[i + half], "fp32") for i in range(half)]
    return sums[0]


def _clamped(value: Value, limit: Fraction) -> Value:
    if isinstance(value, Fraction):
        return min(max(value, -limit), limit)
    return value if value not in INFINITIES else with_sign(limit, is_negative(value))


def _number(random: RandomNumbers | None, index: int) -> int | None:
    """The random number of the element ``index``, None where there are none."""
    if random is None:
        return None
    return random(index) if callable(random) else random[index]


# -- arrays -----------------------------------------------------------------------------------------------------------

#: The names of whole formats: their element, and their usual scale.
WHOLE_FORMATS: dict[str, tuple[str, str]] = {
    "mxfp8": ("e4m3fn", "mx"),
    "mxfp8_e5m2": ("e5m2", "mx"),
    "mxfp6_e3m2": ("e3m2fn", "mx"),
    "mxfp6_e2m3": ("e2m3fn", "mx"),
    "mxfp4": ("e2m1fn", "mx"),
    "mxint8": ("mxint8", "mx:32:floor"),
    "nvfp4": ("e2m1fn", "nv"),
    "msfp12": ("e1m2finite:bias=1", "mx:16:floor"),
    "msfp16": ("e1m6finite:bias=1", "mx:16:floor"),
    "bfp16": ("mxint8", "mx:8:floor"),
    "nf4": ("nf4", "group:64"),
    "fp4_bnb": ("fp4_bnb", "group:64"),
    "dynamic8": ("dynamic8", "group:256"),
    "dynamic8:unsigned": ("dynamic8:unsigned", "group:256"),
    "dynamic4": ("dynamic4", "group:128"),
    "linear4:unsigned": ("linear4:unsigned", "group:128"),
}


@dataclass(frozen=True, slots=True)
class Cast:
    """A scaled format with its modes, as a name such as ``e4m3fn/stochastic:8/mx:32:floor`` states them."""

    element: Element
    scale: Scale
    rounding: str = "nearest_even"
    overflow: str | None = None


def parse_cast(name: str) -> Cast:
    """The cast that ``element[/rounding][/overflow][/scale]`` denotes.

    The element may be a whole format, such as ``mxfp8`` or ``nvfp4``, which has a scale of its own. Integers have the
    scale ``row`` if the name states none.

    Raises:
        ValueError: a part of the name is unknown, or there is no scale.
    """
    first, *parts = name.split("/")
    name_of_element, scale = WHOLE_FORMATS.get(first, (first, "row" if first.startswith(("int", "uint")) else None))
    element, modes = parse_element(name_of_element), {}
    for part in parts:
        if part in OVERFLOWS:
            modes["overflow"] = part
        elif part in ROUNDINGS or part.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            modes["rounding"] = part
        elif part.partition(":")[0] in ("hadamard", "expand"):
            raise ValueError(
                f"transform {part!r} of {name!r} is not part of a block: leave it out; fpsim.round takes it, and here "
                "it is fpsim.reference.hadamard or round_power_map"
            )
        else:
            scale = part
    if scale is None:
        raise ValueError(f"{name!r} has no scale: use round, or add a scale, such as {name}/mx")
    return Cast(element, parse_scale(scale), **modes)


Indices: TypeAlias = tuple[int, ...]


def block_indices(shape: Sequence[int], axis: int | Sequence[int], scale: str | Scale) -> list[Indices]:
    """The blocks of an array, each as the row-major flat indices of its elements.

    Arguments:
        shape: the lengths of the axes.
        axis: the axis along which blocks lie; negative numbers count from the end. Of several axes the elements are
            taken in row-major order, as if these were one axis behind all others. Without any, each element is a block.
        scale: which elements share a scale. ``column`` and tiles also use the other one of the last two axes; if the
            axis is none of them the one before it, or the second one if it is the first. In an array of one axis, a
            tile is a block, and a column is one element.

    Raises:
        ValueError: no such axis.
    """
    how, rank, count = parse_scale(scale), len(shape), math.prod(shape)
    if how.shared_by == "tensor" or (how.shared_by != "group" and rank == 0):
        return [tuple(range(count))]
    if how.shared_by == "group":
        return [tuple(range(i, min(i + how.size[0], count))) for i in range(0, count, how.size[0])]
    if how.shared_by == "channel":
        return [tuple(range(i, i + math.prod(shape[1:]))) for i in range(0, count, math.prod(shape[1:]) or 1)]
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= each < rank for each in axes):
        raise ValueError(f"axis {axis} is out of range: an array of {rank} axes has axes {-rank} to {rank - 1}")
    axes = tuple(sorted({each % rank for each in axes}))
    if not axes:
        return [(i,) for i in range(count)]
    if len(axes) > 1:
        return _along_joined_axes(shape, axes, how)
    lengths = [1] * rank  # how far a block reaches along each axis
    if rank > 1 and (how.shared_by == "column" or len(how.size) == 2):
        across = _across(axes[0], rank)
        lengths[across] = how.size[0] if how.size else shape[across]
    if how.shared_by != "column":
        lengths[axes[0]] = how.size[-1] if how.size else shape[axes[0]]
    blocks: dict[Indices, list[int]] = {}
    for flat, index in enumerate(itertools.product(*map(range, shape))):
        blocks.setdefault(tuple(i // length for i, length in zip(index, lengths, strict=True)), []).append(flat)
    return [tuple(block) for block in blocks.values()]


def _across(axis: int, rank: int) -> int:
    """The axis that forms matrices with ``axis``."""
    return 2 * rank - 3 - axis if axis >= rank - 2 else axis - 1 if axis else 1


def _columns(indices: Indices, shape: Sequence[int], axis: int | Sequence[int], how: Scale) -> int | None:
    """The number of elements in the first row of a tile, which has the first one's place along its first axis."""
    rank = len(shape)
    axes = sorted({each % rank for each in ((axis,) if isinstance(axis, int) else axis)}) if rank else []
    others = [each for each in range(rank) if each not in axes]
    if len(how.size) != 2 or not axes or not others:
        return None
    first = others[-1] if len(axes) > 1 else min(axes[0], _across(axes[0], rank))
    stride = math.prod(shape[first + 1 :])
    places = [i // stride % shape[first] for i in indices]
    return places.count(places[0])


def _along_joined_axes(shape: Sequence[int], axes: Sequence[int], how: Scale) -> list[Indices]:
    """`block_indices` of an array in which ``axes`` became one axis behind all others."""
    others = [axis for axis in range(len(shape)) if axis not in axes]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    order = [*others, *axes]
    places = [
        sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
        for index in itertools.product(*(range(shape[axis]) for axis in order))
    ]
    joined = [*(shape[axis] for axis in others), math.prod(shape[axis] for axis in axes)]
    return [tuple(places[i] for i in block) for block in block_indices(joined, -1, how)]


def quantize_blocks(
    values: Sequence[Number],
    name: str | Cast,
    shape: Sequence[int],
    axis: int | Sequence[int] = -1,
    *,
    random: RandomNumbers | None = None,
    working: str | FloatFormat = "fp32",
) -> list[tuple[Indices, Block]]:
    """The blocks of an array, each with the row-major flat indices of its elements: see `round_blocks`."""
    cast = parse_cast(name) if isinstance(name, str) else name
    if len(values) != math.prod(shape):
        raise ValueError(f"shape {tuple(shape)} has {math.prod(shape)} elements, got {len(values)}")
    largest_of_all = amax(values)

    def rounded(indices: Indices) -> Block:
        return quantize_block(
            [values[i] for i in indices],
            cast.element,
            cast.scale,
            cast.rounding,
            cast.overflow,
            random=None if random is None else [_number(random, i) for i in indices],  # type: ignore[misc]
            tensor_amax=largest_of_all,
            working=working,
            columns=_columns(indices, shape, axis, cast.scale),
        )

    blocks = [(indices, rounded(indices)) for indices in block_indices(shape, axis, cast.scale)]
    if not cast.scale.double:
        return blocks
    ratios = [_quantized_ratio(block.scale, [values[i] for i in indices]) for indices, block in blocks]
    restored = restored_ratios(*quantize_ratios(ratios))
    return [(indices, replace(block, scale=d)) for (indices, block), d in zip(blocks, restored, strict=True)]


def _quantized_ratio(ratio: Value, values: Sequence[Number]) -> Value:
    """The number that is quantized for the ratio of a block: itself, or 0 if the block counts as zeros."""
    largest_of_block = round(amax(values), "fp32")
    is_zero = isinstance(largest_of_block, Fraction) and largest_of_block < SMALLEST_NORMAL
    return Fraction(0) if is_zero else ratio


def quantize_ratios(ratios: Sequence[Value]) -> tuple[list[Block], Value]:
    """The ratios of the groups of a tensor, quantized again, as in QLoRA: the second level of ``nf4/group:64:double``.

    1. The mean m of the ratios is computed by `fpsim.reference.scales.mean_ratio`. A group of zeros counts as 0.
    2. The differences of the ratios and m are rounded to float32.
    3. Every 256 of them are a block with the elements ``dynamic8`` under a ratio of their own.

    A ratio that is NaN makes m NaN, and so all ratios.

    Returns:
        The blocks, and m.

    Source: bitsandbytes, ``quantize_4bit(compress_statistics=True)``, which leaves the order of the sum open.
    """
    mean = mean_ratio(ratios)
    centred = [sub(ratio, mean, "fp32") for ratio in ratios]
    starts = range(0, len(centred), 256)
    return [quantize_block(centred[i : i + 256], "dynamic8", "group:256") for i in starts], mean


def restored_ratios(blocks: Sequence[Block], mean: Value) -> list[Value]:
    """The ratios for which the results of `quantize_ratios` stand.

    Each is the product of the element and the ratio of its block, plus the mean: two steps of float32. A magnitude
    below 2**-100 becomes zero. A ratio of a group that is much smaller than the largest may be restored as a small
    negative number, as in bitsandbytes.
    """
    restored = [add(value, mean, "fp32") for block in blocks for value in block.decoded()]
    return [Fraction(0) if isinstance(d, Fraction) and abs(d) < LEAST_RATIO else d for d in restored]


def round_blocks(
    values: Sequence[Number],
    name: str | Cast,
    shape: Sequence[int],
    axis: int | Sequence[int] = -1,
    *,
    random: RandomNumbers | None = None,
    working: str | FloatFormat = "fp32",
) -> tuple[Value, ...]:
    """An array whose blocks are rounded, each under its own scale.

    Under a power of two the results are exact: they may lie beyond the numbers of the dtype of a tensor (2**128), or
    between them (2**-136 in bfloat16). A tensor holds them rounded once, to nearest even. Under other scales they are
    numbers of ``working``, which a bfloat16 tensor holds rounded once more.

    Arguments:
        values: the elements in row-major order, each an int, Fraction, float (taken exactly) or `Special`.
        name: ``element[/rounding][/overflow][/scale]``, such as ``mxfp8``, ``nvfp4`` or ``e4m3fn/up/block:128x128``.
        shape: the lengths of the axes.
        axis: the axis along which blocks lie, or several: see `block_indices`.
        random: the random numbers of stochastic rounding, one for each element in row-major order, or a function of the
            flat index.
        working: ``fp32`` for tensors of bfloat16 and float32, ``fp64`` for those of float64.

    Returns:
        The results in row-major order.

    Raises:
        ValueError, TypeError: as `quantize_block`; or no such name or axis; or ``shape`` does not fit ``values``.

    >>> round_blocks([957, 1, 448, 449], "e4m3fn/mx:2", (1, 4))
    (Fraction(960, 1), Fraction(1, 1), Fraction(448, 1), Fraction(448, 1))
    """
    results: list[Value] = [NAN] * len(values)
    for indices, block in quantize_blocks(values, name, shape, axis, random=random, working=working):
        for index, value in zip(indices, block.decoded(working), strict=True):
            results[index] = value
    return tuple(results)
