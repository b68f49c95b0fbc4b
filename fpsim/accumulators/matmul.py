"""Matrix products whose sums are those of a narrow accumulator or of a machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpsim.accumulators.accumulator import Accumulator, AccumulatorLike, Order, parse_accumulator
from fpsim.accumulators.ops import accumulate_op
from fpsim.accumulators.scaled import scaled_matmul, takes_scales
from fpsim.accumulators.shapes import matrices, result_shape
from fpsim.casts import UNSCALED, Cast, CastLike, check_cast, parse_cast
from fpsim.formats import FloatFormat, parse_format
from fpsim.rounding.carriers import CARRIERS, check_tensor
from fpsim.rounding.ops import SOURCE, random_key_op, round_op
from fpsim.scaling.ops import SCALE_OPERATORS
from fpsim.tensor_functions import asks_derivative, check_salt, round, seed_tensor, straight_through

#: The dtypes of operands that are no carriers, and their formats. They are multiplied in float32.
_NARROW_DTYPES = {
    getattr(torch, f"float8_{name}"): parse_format(name)
    for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")
    if hasattr(torch, f"float8_{name}")
}
_FLOAT32 = FloatFormat(8, 23)


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    accumulator: AccumulatorLike,
    chunk: int | None = None,
    order: Order | None = None,
    promote: int | None = None,
    format: CastLike | tuple[CastLike, CastLike] | None = None,
    seed: int | Tensor | None = None,
    salt: int = 0,
) -> Tensor:
    """``torch.matmul(a, b)`` with the sums of a narrow accumulator, bit for bit those of `fpsim.reference.dot`.

    Args:
        a, b: float32, bfloat16, float16, float64 or float8 on the CPU, of shapes that `torch.matmul` multiplies. Both
            have one dtype (float8 dtypes may differ).
        accumulator: a format (``"fp16"``, ``"e8m13/toward_zero"``, ``"e5m10/stochastic"``), an integer (``"int32"``,
            ``"int16/wrap"``, ``"int16/sat_finite"``) or a machine (``"hopper_fp8"``):
            `fpsim.accumulators.accumulator.parse_accumulator`.
        chunk, order, promote: how many products are added exactly before a rounding, the order of the additions, and
            the number of products after which a partial sum moves to float32. A machine has its own order.
        format: the format to which the operands are rounded first, or a pair of formats. Blocks and rows of a scaled
            format lie along the axis that is summed. A machine multiplies elements: the scales of blocks join its sums
            (``blackwell_mxfp8``), or multiply its partial sums, one for every block (``hopper_fp8`` with
            ``promote=128`` and ``format="e4m3fn/block:128"``). None leaves the operands as they are. Their format is
            then that of their dtype. For a machine, float32 and float64 operands have the first of its formats that has
            all of their values.
        seed, salt: of stochastic accumulators, as in `fpsim.round`. Each rounding of each element of the result draws
            its own random number: ``random[i]`` of the element's i-th rounding in `fpsim.reference.sum`.

    Returns:
        The product. Its dtype is that of the operands, float32 for float8. The sum is rounded to it, to nearest even,
        where the dtype does not have the value. The derivative is that of ``torch.matmul`` of the rounded operands.

    Raises:
        ValueError: an argument of the accumulator is wrong or does not go with the others; a machine does not multiply
            the operands' formats; an accumulator is narrower than an operand; stochastic rounding has no seed, or
            another rounding has one; the shapes do not fit together, or the devices differ.
        TypeError: an operand is no dense tensor of these dtypes, or their dtypes differ.

    >>> matmul(torch.tensor([[448.0, 1.0]]), torch.tensor([[1.0], [2.0**-6]]), accumulator="hopper_fp8")
    tensor([[448.]])
    """
    parsed = parse_accumulator(accumulator, chunk, order, promote)
    pair = format if isinstance(format, tuple) else (format, format)
    if len(pair) != 2:
        raise ValueError(f"format is one format or a pair, got {len(pair)}")
    casts = [None if given is None else _cast(given) for given in pair]
    _check_operands(a, b)
    if takes_scales(casts, parsed):
        if seed is not None:
            raise ValueError(f"a seed has no meaning with accumulator={str(parsed)!r}")
        wide = [x.to(torch.float32) if x.dtype in _NARROW_DTYPES else x for x in (a, b)]
        for x, cast in zip(wide, casts, strict=True):
            if cast is not None:
                check_cast(x.dtype, cast)
        return scaled_matmul(wide[0], wide[1], parsed, casts)
    operands, known = [], []
    for x, cast, axis in zip((a, b), casts, (-1, -2), strict=True):
        value, fmt = _operand(x, cast, axis, parsed)
        operands.append(value)
        known.append(fmt)
    left, right = operands
    if left.dtype != right.dtype:
        raise TypeError(f"operands have one dtype, got {a.dtype} and {b.dtype}: convert one of them")
    first, second = _formats_of(operands, known, parsed)
    parsed.check_operands(first, second)
    key = _key(parsed, seed, salt, left.device)
    factors = [
        SCALE_OPERATORS["power_of_two"](x.detach(), cast.grid.name, SOURCE)  # type: ignore[union-attr]
        if takes_factor(cast, parsed)
        else None
        for x, cast in zip((a, b), casts, strict=True)
    ]
    elements = [x.detach() if s is None else x.detach() * s for x, s in zip((left, right), factors, strict=True)]
    value = _product(elements[0], elements[1], key, parsed, (first, second))
    for factor in factors:
        value = value if factor is None else value / factor
    if asks_derivative(left, right):
        return straight_through(torch.matmul(left, right), value)
    return value


def _cast(given: CastLike) -> Cast | None:
    cast = parse_cast(given)
    if cast is not None and cast.is_stochastic:
        raise ValueError(f"operands are rounded without random numbers, got {str(cast)!r}: round them by fpsim.round")
    return cast


def _check_operands(a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        dtype = check_tensor(x, "matmul")
        if dtype not in CARRIERS and dtype not in _NARROW_DTYPES:
            raise TypeError(
                f"cannot matmul a tensor of {dtype}: convert it to float64, float32, bfloat16, float16 or "
                "float8 first, e.g. x.float()"
            )
    if a.device != b.device:
        raise ValueError(f"operands are on one device, got {a.device} and {b.device}: use b.to(a.device)")


def _operand(x: Tensor, cast: Cast | None, axis: int, accumulator: Accumulator) -> tuple[Tensor, FloatFormat | None]:
    """The operand rounded by ``cast``, and its format; None where only its values tell."""
    narrow = _NARROW_DTYPES.get(x.dtype)
    if narrow is not None:
        x = x.to(torch.float32)
    if cast is not None:
        modes = (cast.rounding, cast.overflow, cast.scale or UNSCALED, cast.transform)
        spelled = "/".join([cast.format.name, *(str(mode) for mode in modes if mode is not None)])
        x = round(x, spelled, axis=axis if x.dim() > 1 else 0)
        return x, operand_format(cast, accumulator)
    if narrow is not None:
        return x, narrow
    return x, None if x.dtype in (torch.float32, torch.float64) else CARRIERS[x.dtype]


def takes_factor(cast: Cast | None, accumulator: Accumulator) -> bool:
    """Whether a sum gets operands of ``cast`` times their scale, a power of two. Its result is divided by it.

    Machines do, and integers.
    """
    if cast is None or cast.scale is None or cast.transform is not None:
        return False
    is_current = cast.scale.rule in SCALE_OPERATORS and not cast.scale.is_timed
    return is_current and (accumulator.machine is not None or accumulator.integer_bits is not None)


def operand_format(cast: Cast, accumulator: Accumulator) -> FloatFormat:
    """The format of operands that ``cast`` has rounded: float32 where a scale or a transform changes elements back.

    Machines and integers multiply elements. Their operands with a power of two as the scale of the whole tensor are
    such elements once they are multiplied by it (`takes_factor`).

    Raises:
        ValueError: the accumulator is that of a machine or an integer, and the cast has another scale or a transform,
            or the cast's values do not fit into float32.
    """
    is_scaled = cast.scale is not None and not takes_factor(cast, accumulator)
    if is_scaled or cast.transform is not None or cast.grid is None:
        if accumulator.machine is not None or accumulator.integer_bits is not None:
            others = "that its transform changes back" if cast.transform else "times scales that are none of blocks"
            raise ValueError(
                f"{str(accumulator)!r} multiplies elements, and {str(cast)!r} gives elements {others}: use an unscaled "
                "format such as 'e4m3fn' or 'int8/unscaled', blocks such as 'e4m3fn/block:128', or an "
                "accumulator such as 'e8m13/toward_zero'"
            )
        return _FLOAT32
    if not cast.grid.is_subset_of(FloatFormat(8, 23)):
        raise ValueError(f"operands fit into float32, got {cast.grid.name}: use a narrower format")
    return cast.grid


def _formats_of(
    operands: Sequence[Tensor], known: Sequence[FloatFormat | None], accumulator: Accumulator
) -> tuple[FloatFormat, FloatFormat]:
    """The formats of both operands. Where only its values tell: the first of the machine's, of one group, that fits."""
    groups = (
        [[*map(_grid, names)] for names, _ in accumulator.machine.operands] if accumulator.machine else [[_FLOAT32]]
    )
    if accumulator.integer_bits is not None:
        groups = [[*map(_grid, ("int4", "int8", "int16"))]]
    if None not in known:
        return known[0], known[1]  # type: ignore[return-value]
    for group in groups:
        found = [fmt or _first_that_fits(x, group) for x, fmt in zip(operands, known, strict=True)]
        if found[0] is not None and found[1] is not None and (accumulator.machine is None or {*found} <= {*group}):
            return found[0], found[1]
    names = list(dict.fromkeys(fmt.name for group in groups for fmt in group))
    raise ValueError(
        f"an operand has values that none of {', '.join(names)} has, or the operands share none of these: give format="
        f"{names[0]!r}, which rounds them"
    )


def _first_that_fits(x: Tensor, formats: Sequence[FloatFormat]) -> FloatFormat | None:
    """The first of ``formats`` that has all values of ``x``; None if none does. Float32 numbers fit into float32."""
    for fmt in formats:
        if fmt == _FLOAT32 and x.dtype == torch.float32:
            return fmt
        rounded = round_op(x.detach(), fmt.name, "nearest_even", "sat_propagate" if fmt.has_infinity else "sat_finite")
        is_same = ((rounded == x) | (x.isnan() & rounded.isnan())).all()
        try:
            fits = bool(is_same)
        except RuntimeError as error:
            raise ValueError(
                f"an operand is {x.dtype} without numbers to look at (under torch.vmap, or on device meta), so only "
                f"format tells what it holds: give format={formats[0].name!r}"
            ) from error
        if fits:
            return fmt
    return None


def _grid(name: str) -> FloatFormat:
    cast = parse_cast(f"{name}/unscaled" if name.startswith("int") else name)
    assert cast is not None and cast.grid is not None, "a machine multiplies floating-point numbers or integers"
    return cast.grid


def _key(accumulator: Accumulator, seed: int | Tensor | None, salt: int, device: torch.device) -> Tensor | None:
    if accumulator.is_stochastic:
        check_salt(salt)
        return random_key_op(seed_tensor(seed, accumulator.rounding, device), salt)
    if seed is not None:
        raise ValueError(f"a seed has no meaning with accumulator={str(accumulator)!r}: use 'e5m10/stochastic'")
    return None


def _product(
    a: Tensor, b: Tensor, key: Tensor | None, accumulator: Accumulator, formats: tuple[FloatFormat, FloatFormat]
) -> Tensor:
    """The product of operands of any shapes that `torch.matmul` takes."""
    shape = result_shape(a, b)
    left, right = matrices(a, b)
    product = accumulate_op(left, right, key, str(accumulator), formats[0].name, formats[1].name, SOURCE)
    return product.reshape(shape)
