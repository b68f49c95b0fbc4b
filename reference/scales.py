"""The scales that the elements of a block share, each computed step by step as its definition reads.

An element is divided by its scale, rounded to the element format, and multiplied by the scale again. The magnitude
``amax`` is the largest of the elements that share a scale. It is NaN if one of them is NaN, and 0 if there are none.

A step that rounds to float32 is written as an operation with the format ``"fp32"``: ties go to even, and a result
beyond the largest float32 becomes infinite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, get_args

from fpsim.formats import FloatFormat, parse_format

from .arithmetic import div, mul
from .codebooks import Codebook
from .decoding import largest
from .elements import Element, largest_magnitude, mantissa_bits, parse_element, smallest_magnitude
from .encoding import encode
from .integers import Integers
from .rounding import round
from .values import (
    INFINITIES,
    INFINITY,
    NAN,
    Number,
    Value,
    as_value,
    floor_log2,
    is_negative,
    magnitude,
    rational,
    scale_b,
    with_sign,
)

PowerOfTwoRule = Literal["floor", "ceil", "rceil", "even"]
RatioRule = Literal["fp32", "bf16", "encode"]
NvRule = Literal["te", "torchao", "mae", "mse"]

POWER_OF_TWO_RULES: Final = get_args(PowerOfTwoRule)
RATIO_RULES: Final = get_args(RatioRule)
NV_RULES: Final = get_args(NvRule)
#: The rules of NVFP4 that choose between two scales of a block: Four Over Six.
FOUR_OVER_SIX_RULES: Final = ("mae", "mse")

#: The exponents of E8M0, the format of the scales of OCP MX.
E8M0_EXPONENTS: Final = range(-127, 128)
#: Scales that are no powers of two of E8M0 stay at or above this, so that no step of float32 becomes subnormal.
LEAST_RATIO: Final = scale_b(1, -100)
#: Below this, the smallest normal float32, a number counts as zero where a ratio scales it. A process that flushes
#: subnormals to zero then has the same results as one that does not.
SMALLEST_NORMAL: Final = scale_b(1, -126)
#: Formats that reach below this are refused with ratio scales: they need none, and steps would become subnormal.
LEAST_MAGNITUDE: Final = scale_b(1, -24)


# -- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale: which elements share one, and the rule that computes it.

    Attributes:
        shared_by: the elements that share a scale. ``"tensor"``: all; ``"row"``: those along the axis; ``"column"``:
            those along the other one of the last two axes; ``"channel"``: those with one index of the first axis;
            ``"block"``: ``size`` in a row along the axis, or tiles of
            ``size`` along the other one of the last two axes and along the axis; ``"group"``: ``size`` in a row of the
            flattened tensor. The last block of an axis may be short.
        rule: one of `POWER_OF_TWO_RULES`, `RATIO_RULES` and `NV_RULES`, ``"power_of_two"`` or ``"range"``.
        size: the length of a block or group, or the two lengths of a tile; empty for the others.
        asymmetric: whether the range from the least to the greatest element is used, with a zero point.
        double: whether the ratios are quantized again (`fpsim.reference.blocks.restored_ratios`).
    """

    shared_by: Literal["tensor", "row", "column", "channel", "block", "group"]
    rule: str
    size: tuple[int, ...] = ()
    asymmetric: bool = False
    double: bool = False


_RULE = "|".join((*RATIO_RULES, *POWER_OF_TWO_RULES, "power_of_two", "asymmetric"))
#: The pattern of each family of scales. `parse_scale` says what they mean.
_SCALES = {
    "power_of_two": "power_of_two",
    "mx": rf"mx(?::(?P<size>[0-9]+(?:x[0-9]+)?))?(?::(?P<rule>{'|'.join(POWER_OF_TWO_RULES)}))?",
    "nv": rf"nv(?::(?P<size>16|16x16))?(?::(?P<rule>{'|'.join(NV_RULES)}))?",
    "all": rf"(?P<shared_by>tensor|row|column|channel)(?::(?P<rule>{_RULE}|range))?",
    "block": rf"block:(?P<size>[0-9]+(?:x[0-9]+)?)(?::(?P<rule>{_RULE}))?",
    "group": rf"group:(?P<size>[0-9]+)(?::(?P<rule>{_RULE}|double))?",
}
_USUAL_RULES = {"power_of_two": "power_of_two", "mx": "rceil", "nv": "te"}
_USUAL_SIZES = {"mx": "32", "nv": "16"}


def parse_scale(name: str | Scale) -> Scale:
    """The scale that ``name`` denotes; a `Scale` is returned unchanged.

    - ``mx[:n][:rule]``: blocks of n (32) along the axis, or tiles AxB, with the rule ``rceil``, ``floor``, ``ceil`` or
      ``even``.
    - ``nv[:16|:16x16][:te|:torchao|:mae|:mse]``: blocks or tiles under one more scale for the tensor, as in NVFP4; with
      the last two rules as in Four Over Six.
    - ``tensor``, ``row``, ``column``, ``channel``, ``block:n``, ``block:AxB`` and ``group:n``, which is of the
      flattened tensor: the ratio of amax and the largest value, in float32 or, with ``:bf16``, in bfloat16. With
      ``:encode`` the float32 ratio of the largest value and amax, which multiplies. With ``:asymmetric`` the ratio of
      the range and the number of integers, and a zero point. With ``:range``, not for blocks and groups, that ratio and
      the least element, from which integers count. With a rule of ``mx``, or ``:power_of_two`` for ``rceil``, a power
      of two. ``group:n:double`` is a ratio that is quantized again.
    - ``power_of_two`` or ``tensor:power_of_two``: one scale for the tensor, see `fpsim.power_of_two_scale`.

    Raises:
        ValueError: there is no such scale.

    >>> parse_scale("mx:16:even")
    Scale(shared_by='block', rule='even', size=(16,), asymmetric=False, double=False)
    """
    if isinstance(name, Scale):
        return name
    for family, pattern in _SCALES.items():
        if match := re.fullmatch(pattern, name):
            named = match.groupdict()
            size = tuple(int(n) for n in (named.get("size") or _USUAL_SIZES.get(family) or "").split("x") if n)
            if 0 in size:
                raise ValueError(f"scale {name!r} has a block without elements: use 1 or more")
            rule = named.get("rule") or _USUAL_RULES.get(family) or "fp32"
            shared_by = named.get("shared_by") or {"power_of_two": "tensor", "group": "group"}.get(family, "block")
            if rule == "power_of_two" and shared_by != "tensor":
                rule = "rceil"
            asymmetric, double = rule == "asymmetric", rule == "double"
            rule = "fp32" if asymmetric or double else rule
            return Scale(shared_by, rule, size, asymmetric, double)  # type: ignore[arg-type]
    raise ValueError(f"unknown scale {name!r}: see parse_scale")


# -- the largest magnitude --------------------------------------------------------------------------------------------


def amax(values: Iterable[Number]) -> Value:
    """The largest magnitude of ``values``: NaN if one is NaN, infinity if one is infinite, 0 if there are none.

    >>> amax([1, -3]), amax([1, float("-inf")]), amax([float("inf"), float("nan")])
    (Fraction(3, 1), INFINITY, NAN)
    """
    exact = [as_value(value) for value in values]
    if NAN in exact:
        return NAN
    if any(value in INFINITIES for value in exact):
        return INFINITY
    return max((magnitude(value) for value in exact), default=Fraction(0))


# -- powers of two ----------------------------------------------------------------------------------------------------


def block_scale(values: Iterable[Number], format: str | Element, rule: PowerOfTwoRule = "rceil") -> Value:
    """The scale of one block in OCP MX: a power of two from 2**-127 to 2**127, or NaN.

    The scale is NaN if an element is NaN or infinite. It is 2**-127 if all are zero. Otherwise it is 2**k, where

    - ``floor``: k is floor(log2(amax)) - emax, with emax the exponent of the largest value of ``format``;
    - ``ceil``: the same, plus 1 if amax is no power of two;
    - ``rceil``: k is the least integer with amax <= max * 2**k;
    - ``even``: k is as in ``floor``, of amax rounded to the mantissa bits of ``format``, ties away from zero, with an
      exponent that has no bounds;

    and then the nearest integer to it from -127 to 127.

    Arguments:
        values: the elements of the block, each an int, Fraction, float (taken exactly) or `Special`.
        format: the element format: a name, a `FloatFormat`, an `Integers` or a `Codebook`.
        rule: one of the above.

    Raises:
        ValueError: no such format or rule, or a codebook with the rule ``even``.

    Source: OCP Microscaling Formats (MX) 1.0 section 6.3 (``floor``); NVIDIA PTX and cuBLAS (``rceil``); the four rules
    of torchao's ``ScaleCalculationMode``.

    >>> block_scale([957], "e4m3fn", "floor"), block_scale([957], "e4m3fn", "rceil")
    (Fraction(2, 1), Fraction(4, 1))
    """
    element = parse_element(format)
    if rule not in POWER_OF_TWO_RULES:
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(POWER_OF_TWO_RULES)}")
    return power_of_two_scale(amax(values), element, rule)


def power_of_two_scale(a: Value, element: Element, rule: str) -> Value:
    """As `block_scale`, from the largest magnitude ``a`` of the block."""
    if a is NAN or a in INFINITIES:
        return NAN
    k = exponent(rational(a), element, rule) if a else E8M0_EXPONENTS[0]
    return scale_b(1, min(max(k, E8M0_EXPONENTS[0]), E8M0_EXPONENTS[-1]))


def exponent(a: Fraction, element: Element, rule: str) -> int:
    """The exponent k of the scale for ``a`` > 0 by each rule of `block_scale`, without bounds."""
    emax = floor_log2(largest_magnitude(element))
    match rule:
        case "floor":
            return floor_log2(a) - emax
        case "ceil":
            return floor_log2(a) - emax + (a != scale_b(1, floor_log2(a)))
        case "rceil":
            k = floor_log2(a) - emax
            return k if a <= largest_magnitude(element) * scale_b(1, k) else k + 1
        case "even":
            step = scale_b(1, floor_log2(a) - mantissa_bits(element))
            return floor_log2(math.floor(a / step + Fraction(1, 2)) * step) - emax
    raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(POWER_OF_TWO_RULES)}")


def tensor_power_of_two(a: Value, element: Element, working: str | FloatFormat) -> Fraction:
    """The scale ``power_of_two`` of a tensor, by which its elements are divided.

    It is the reciprocal of `fpsim.power_of_two_scale`: that of the rule ``rceil``, within the powers of two that are
    normal numbers of the working format and have a normal reciprocal; 1 if ``a`` is 0, infinite or NaN.
    """
    if a is NAN or a in INFINITIES or a == 0:
        return Fraction(1)
    limit = parse_format(working).bias - 1
    return scale_b(1, min(max(exponent(rational(a), element, "rceil"), -limit), limit))


def scale_steps(
    format: str | Element, rule: PowerOfTwoRule = "rceil", carrier: str | FloatFormat = "fp32"
) -> tuple[tuple[int, int], ...]:
    """`block_scale` as a function of the bits of amax: the first magnitude of each step, and its code of E8M0.

    The code never falls as the magnitude rises. So the steps are all there is to know: bits from the first ones of a
    step up to those of the next step have its code. The code is k + 127 for the scale 2**k, and 255 for NaN, the code
    of infinity and of every NaN. `block_scale` computes a scale from a magnitude; here a magnitude is computed from
    each scale: the least number of ``carrier`` that needs it.

    Arguments:
        format, rule: as in `block_scale`.
        carrier: the format with infinities that holds the elements.

    Returns:
        Pairs of the bits of the first magnitude and the code, both increasing. The first pair is ``(0, 0)``.

    Raises:
        ValueError: as `block_scale`; or ``carrier`` has no infinity.

    >>> [(hex(bits), code) for bits, code in scale_steps("e4m3fn", "floor") if code in (0, 1, 254, 255)]
    [('0x0', 0), ('0x4800000', 1), ('0x7f800000', 255)]
    """
    element, into = parse_element(format), parse_format(carrier)
    if into.infinity_code is None or not into.signed:
        raise ValueError(f"a carrier is signed and has infinities, and {into.name} is not: use fp32, bf16 or fp64")
    steps = [(0, 0)]
    for k in E8M0_EXPONENTS[1:]:
        boundary, included = least_magnitude(element, rule, k)
        bits = encode(boundary, into, "up", "ovf_inf")
        if not included and round(boundary, into, "up", "ovf_inf") == boundary:
            bits += 1
        if bits < into.infinity_code:
            if bits == steps[-1][0]:
                steps.pop()  # no magnitude of the carrier has the scale before this one
            steps.append((bits, k - E8M0_EXPONENTS[0]))
    return (*steps, (into.infinity_code, 255))


def least_magnitude(element: Element, rule: str, k: int) -> tuple[Fraction, bool]:
    """The number from which on amax needs the scale 2**k or a larger one, and whether the number itself does."""
    emax = floor_log2(largest_magnitude(element))
    match rule:
        case "floor":
            return scale_b(1, k + emax), True
        case "ceil":
            return scale_b(1, k + emax - 1), False
        case "rceil":
            return largest_magnitude(element) * scale_b(1, k - 1), False
        case "even":
            return (2 - scale_b(1, -mantissa_bits(element) - 1)) * scale_b(1, k + emax - 1), True
    raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(POWER_OF_TWO_RULES)}")


# -- ratios -----------------------------------------------------------------------------------------------------------


def check_ratio(element: Element) -> None:
    """Refuse formats whose range needs no ratio scale.

    Raises:
        ValueError: the smallest value of ``element`` is below 2**-24.
    """
    if smallest_magnitude(element) < LEAST_MAGNITUDE:
        raise ValueError("the format has values below 2**-24: its range needs no ratio scale, use a power of two")


def ratio_scale(a: Value, element: Element, rule: str) -> Value:
    """The ratio d of the largest magnitude ``a`` and the largest value of the format.

    1. ``a`` is rounded to float32. If it is NaN or infinite, the scale is NaN.
    2. If it is below 2**-126, d is 1. For a codebook without zero it is 2**-100, so that the results are tiny.
    3. d is the quotient rounded to float32; then rounded to bfloat16 if ``rule`` is ``"bf16"``.
    4. d is raised to 2**-100, and lowered to the largest finite number of its format.

    The largest value of ``int8:full``, whose range is not symmetric, counts as 127.5, half of the range.
    """
    check_ratio(element)
    rounded = round(a, "fp32")
    if rounded is NAN or rounded in INFINITIES:
        return NAN
    if rational(rounded) < SMALLEST_NORMAL:
        return Fraction(1) if not isinstance(element, Codebook) or 0 in element.values else LEAST_RATIO
    full = element.half_range if isinstance(element, Integers) else largest_magnitude(element)
    return _bounded(div(rounded, full, "fp32"), rule)


def encode_scale(a: Value, element: Element) -> Fraction:
    """The ratio s of the largest value of the format and the largest magnitude ``a``, which multiplies the elements.

    1. ``a`` is rounded to float32. If it is NaN, infinite, or below 2**-126, s is 1.
    2. s is the quotient rounded to float32, lowered to 2**100, and raised to 2**-126.

    Source: Transformer Engine's current scaling, whose bound is the largest float32.
    """
    check_ratio(element)
    if isinstance(element, Codebook):
        raise ValueError("a codebook takes the ratio fp32 or bf16")
    rounded = round(a, "fp32")
    if not isinstance(rounded, Fraction) or rounded < SMALLEST_NORMAL:
        return Fraction(1)
    full = element.half_range if isinstance(element, Integers) else largest_magnitude(element)
    quotient = rational(round(div(full, rounded, "fp32"), "fp32", overflow="sat_finite"))
    return max(min(quotient, 1 / LEAST_RATIO), SMALLEST_NORMAL)


def _bounded(ratio: Value, rule: str) -> Fraction:
    fmt = parse_format(rule)
    return max(rational(round(ratio, fmt, overflow="sat_finite")), LEAST_RATIO)


def mean_ratio(ratios: Iterable[Value]) -> Value:
    """The mean of the ratios of a tensor, in float32; NaN if one is NaN.

    With the power of two 2**e at or below the largest ratio, and at least 2**-100, each ratio is rounded to a multiple
    of 2**(e - 28), ties to even. The exact sum is divided by the number of ratios; the quotient is rounded to float64,
    and then to float32.
    """
    given = list(ratios)
    if NAN in given:
        return NAN
    unit = scale_b(1, floor_log2(max(*map(rational, given), LEAST_RATIO)) - 28)
    total = sum(_nearest_integer(rational(ratio) / unit) for ratio in given)
    return round(rational(div(total, len(given), "fp64")) * unit, "fp32")


def flushed(value: Value) -> Value:
    """``value``, or the zero of its sign in place of a number below 2**-126."""
    if isinstance(value, Fraction) and abs(value) < SMALLEST_NORMAL:
        return with_sign(Fraction(0), is_negative(value))
    return value


def affine_scale(values: Iterable[Number], levels: int) -> tuple[Value, int]:
    """The scale d and the zero point z of codes from 0 to ``levels``.

    The range is widened to contain 0. Its ends lo and hi, their distance and the quotient of the distance and
    ``levels`` are rounded to float32. d is that quotient, raised to 2**-100 and lowered to the largest float32. It is 1
    if the magnitudes of lo and hi are below 2**-126, and NaN if an end is infinite or an element is NaN. z is -lo / d,
    rounded to float32, then to the nearest integer, ties to even, then to the nearest one from 0 to ``levels``.

    Source: the order of ONNX's DynamicQuantizeLinear.
    """
    exact = [as_value(value) for value in values]
    if NAN in exact or any(round(value, "fp32") in INFINITIES for value in exact):
        return NAN, 0
    finite = [Fraction(0), *map(rational, exact)]
    low, high = rational(round(min(finite), "fp32")), rational(round(max(finite), "fp32"))
    if max(high, -low) < SMALLEST_NORMAL:
        return Fraction(1), 0
    d = _bounded(div(round(high - low, "fp32"), levels, "fp32"), "fp32")
    zero_point = rational(round(div(-low, d, "fp32"), "fp32"))
    return d, min(max(_nearest_integer(zero_point), 0), levels)


def range_scale(values: Iterable[Number], levels: int) -> tuple[Value, Fraction]:
    """The distance d of neighbours and the least value, for codes from 0 to ``levels`` under the rule ``range``.

    The least and the greatest element, their distance, and the quotient of the distance and ``levels`` are rounded to
    float32. A least element below 2**-126 in magnitude is 0. d is that quotient, raised to the float32 number 1e-8 and
    lowered to the largest float32; NaN if an element is infinite (in float32) or NaN.

    Source: FracTrain (Fu et al., NeurIPS 2020).
    """
    exact = [as_value(value) for value in values]
    if NAN in exact or any(round(value, "fp32") in INFINITIES for value in exact):
        return NAN, Fraction(0)
    low, high = (rational(round(end(map(rational, exact)), "fp32")) for end in (min, max))
    low = low if abs(low) >= SMALLEST_NORMAL else Fraction(0)
    d = _bounded(div(round(high - low, "fp32"), levels, "fp32"), "fp32")
    return max(d, rational(round(Fraction(1, 10**8), "fp32"))), low


def _nearest_integer(number: Fraction) -> int:
    whole, rest = divmod(number, 1)
    return whole + (2 * rest > 1 or (2 * rest == 1 and whole % 2 == 1))


# -- two levels, as in NVFP4 ------------------------------------------------------------------------------------------

_E4M3: Final = parse_format("e4m3fn")
_FLOAT32_MAX: Final = largest(parse_format("fp32"))


def nv_range(rule: str) -> int:
    """What the largest magnitude of a tensor becomes: the largest element of e2m1fn times the largest scale of a block.

    The largest scale is 448, or 256 under Four Over Six: 1.5 times as much is a scale of e4m3fn too.
    """
    return 6 * (256 if rule in FOUR_OVER_SIX_RULES else 448)


def nv_tensor_scale(a: Value, rule: str) -> Fraction:
    """The scale of a whole tensor whose largest magnitude is ``a``: one float32.

    ``torchao``: p = a / 2688, by which elements are divided. Other rules: g = `nv_range` / a, by which they are
    multiplied. It is 1 if ``a`` is below 2**-126, infinite or NaN in float32. Any other magnitude below 2**-100 counts
    as 2**-100.
    """
    rounded = round(a, "fp32")
    if rounded is NAN or rounded in INFINITIES or rational(rounded) < SMALLEST_NORMAL:
        return Fraction(1)
    bounded = max(rational(rounded), LEAST_RATIO)
    largest = nv_range(rule)
    scale = div(bounded, largest, "fp32") if rule == "torchao" else div(largest, bounded, "fp32")
    return min(rational(scale), _FLOAT32_MAX)


def nv_block_scale(a: Value, tensor_scale: Fraction, rule: str) -> Value:
    """The e4m3fn scale of a block whose largest magnitude is ``a``; NaN if ``a`` is NaN. Every step rounds to float32.

    ``te``: a * (g * (1/6)), where 1/6 is rounded first. ``torchao``: (a/6) / p, raised to 2**-6. Both are then rounded
    to e4m3fn; beyond 448 they become 448.
    """
    rounded = round(a, "fp32")
    if rounded is NAN:
        return NAN
    if rule == "te":
        per_unit = mul(tensor_scale, div(1, 6, "fp32"), "fp32")
        return round(mul(rounded, per_unit, "fp32"), _E4M3, overflow="sat_finite")
    wanted = div(div(rounded, 6, "fp32"), tensor_scale, "fp32")
    if wanted is INFINITY:
        return Fraction(448)
    return round(min(max(rational(wanted), scale_b(1, -6)), Fraction(448)), _E4M3)


def four_over_six_scales(a: Value, tensor_scale: Fraction) -> tuple[Value, Value]:
    """The two e4m3fn scales of a block with which its largest magnitude ``a`` becomes 4 or 6; NaN if ``a`` is NaN.

    (a / 6) * g, and 1.5 times that for the first one. Every step rounds to float32, and the results to e4m3fn; beyond
    448 they become 448.
    """
    base = mul(div(round(a, "fp32"), 6, "fp32"), tensor_scale, "fp32")
    four, six = (round(s, _E4M3, overflow="sat_finite") for s in (mul(base, Fraction(3, 2), "fp32"), base))
    return four, six


def nv_reciprocal(scale: Value, tensor_scale: Fraction, rule: str) -> Fraction:
    """The float32 by which the elements of a block are multiplied before they are rounded.

    ``torchao``: (1/p) / s. Other rules: 1 / (s * (1/g)), at most the largest float32, and this one if s is 0. Every
    step rounds to float32.
    """
    if rule == "torchao":
        return rational(div(div(1, tensor_scale, "fp32"), scale, "fp32"))
    if scale == 0:
        return _FLOAT32_MAX
    inverse = div(1, mul(scale, div(1, tensor_scale, "fp32"), "fp32"), "fp32")
    return _FLOAT32_MAX if inverse is INFINITY else min(rational(inverse), _FLOAT32_MAX)
