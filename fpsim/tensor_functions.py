"""Rounding tensors to a floating-point format, and converting them to and from the format's codes.

Values stay in the tensor's own dtype, the *carrier*. Every result is a value of the format, with the bits that
`fpsim.reference` computes. The derivative is that of a ``torch.where`` whose values are then overwritten. No
other form was found that gives exact values, also where subnormals are flushed to zero, and correct derivatives under
autograd, `torch.func` transforms, and `torch.compile` of both.
"""

from __future__ import annotations

import reprlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fpsim.casts import NONE, Arguments, Cast, apply_arguments, check_cast, parse_cast, refuse_timed
from fpsim.formats import (
    STOCHASTIC_ROUNDINGS,
    ElementFormat,
    FloatFormat,
    Overflow,
    format_name,
    full_rounding,
    parse_format,
    split_rounding,
)
from fpsim.rounding.carriers import CARRIERS, CODES_OF, check_tensor, grid_of, working_dtype
from fpsim.rounding.definitions import pieces
from fpsim.rounding.kernel import Grid, decode_code, encode_code
from fpsim.rounding.ops import random_key_op
from fpsim.rounding.tensors import TorchOps
from fpsim.scaling.scale import Scale, parse_scale

Gradient = Literal["straight_through", "clipped", "zero"]
GRADIENTS: tuple[str, ...] = ("straight_through", "clipped", "zero")

#: The dtypes of codes that `decode` takes.
_INTEGERS = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def round(
    x: Tensor,
    format: str | ElementFormat | torch.dtype,
    *,
    rounding: str = "nearest_even",
    overflow: Overflow | None = None,
    seed: int | Tensor | None = None,
    salt: int = 0,
    random_bits: int | None = None,
    scale: str | Scale | None = None,
    axis: int | tuple[int, ...] = -1,
    gradient: Gradient = "straight_through",
) -> Tensor:
    """``x`` with every element rounded to ``format``.

    Args:
        x: float64, float32, bfloat16 or float16, any shape, strides and device. Its dtype must have all values of
            ``format``.
        format: a name (`fpsim.parse_format`), a `FloatFormat`, a floating-point dtype of torch, which stands for its
            values (`fpsim.formats.format_name`), the name of elements with their scales (``mxfp8``, ``nvfp4``,
            ``int8``, ``nf4``: `fpsim.formats.WHOLE_FORMATS`), or a pair such as ``e4m3fn/block:128``. A transform may
            follow, which is undone after rounding: ``nvfp4/hadamard:16`` rotates blocks along ``axis``
            (`fpsim.transforms.hadamard.Hadamard`), ``e4m3fn/group:128/expand`` raises magnitudes to a power per group
            (`fpsim.transforms.power_map.PowerMap`).
        rounding: ``nearest_even`` (ties to the even code), ``nearest_away``, ``toward_zero``, ``up``, ``down``
            (IEEE 754-2019 section 4.3), ``to_odd``, or a stochastic rounding: ``stochastic``,
            ``stochastic_b``, ``stochastic_c`` (`fpsim.formats.split_rounding` defines them).
        overflow: ``ovf_inf``, ``sat_finite``, ``sat_propagate`` (IEEE P3109; see
            `fpsim.formats.resolve_overflow`), or None for the format's usual mode.
        seed: for stochastic rounding, and only for it: an int, or a tensor with one int64, on the device of ``x``. Pass
            a tensor to a compiled function: for a new int it compiles again.
        salt: distinguishes roundings with the same seed. Use a different salt at every call site.
        random_bits: the number of random bits in stochastic rounding: 1 to 32 (31 for ``stochastic_b``, 30 for
            ``stochastic_c``). None means 23, as many bits as the mantissa of a float32 has. Hardware uses fewer.
        scale: ``power_of_two`` multiplies by `fpsim.power_of_two_scale` before rounding and divides by it afterwards.
            The product is exact, even where it is below the smallest number of the dtype. The quotient is rounded to
            the dtype, to nearest, where the dtype does not have it. Other scales are those of blocks, rows and groups
            (`fpsim.scaling.scale.Scale`): ``mx``, ``nv``, ``row``, ``block:128``. None means the scale that ``format``
            names, or none.
        axis: for scales of rows and blocks the axis along which these lie: the one that a matrix product sums over. Of
            several axes the elements are taken in row-major order. Other casts ignore it.
        gradient: the derivative. ``straight_through``: 1 everywhere. ``clipped``: 1 within the format's finite range, 0
            outside it (with a scale no number is outside). ``zero``: 0 everywhere.

    Returns:
        A tensor of the shape, dtype and device of ``x``. NaN stays NaN if the format has a NaN, and otherwise becomes
        the largest finite value (as in NVIDIA's PTX conversions to e2m1, e2m3 and e3m2). If the format has -0, it stays
        -0, and negative numbers that round to zero become -0.

        Stochastic rounding is a pure function: the random number of an element is a hash of the seed, the salt and the
        element's index (in row-major order, whatever the strides; under `torch.vmap` in the whole batch). It never
        changes values of the format. Eager, compiled and recomputed results are the same, on every device.

    Raises:
        ValueError: the format, a mode or the scale is unknown, they do not go together, ``axis`` is no axis of ``x``
            although the cast needs one, the format has values that the dtype of ``x`` lacks,
            ``x`` is float16 and a scale is given, stochastic rounding has no seed, another rounding has a seed, or
            ``random_bits`` is out of range.
        TypeError: ``x`` is not a dense tensor of one of the four dtypes (`fpsim.rounding.carriers.check_tensor`),
            ``seed`` is neither an int nor one int64, or ``salt`` is not an int.

    >>> round(torch.tensor([0.3, -3.3]), "e4m3fn")
    tensor([ 0.3125, -3.2500])
    >>> round(torch.full((6,), 1.25), "e2m1fn", rounding="stochastic", seed=0)
    tensor([1.0000, 1.0000, 1.0000, 1.5000, 1.5000, 1.0000])
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient {reprlib.repr(gradient)}: use one of {', '.join(GRADIENTS)}")
    dtype = check_tensor(x)
    arguments, limit, negative, has_axis = _resolve(
        _name_of(format), rounding, overflow, dtype, random_bits, _name_of(scale), gradient == "clipped"
    )
    axes = counted_axes(axis, x.dim(), str(arguments[3]).strip("/")) if has_axis else ()
    key = None
    check_salt(salt)
    if ":" in arguments[1]:
        key = random_key_op(seed_tensor(seed, rounding, x.device), salt)
    elif seed is not None:
        raise ValueError(f"a seed has no meaning with rounding={rounding!r}: use rounding='stochastic'")
    value = apply_arguments(x.detach(), arguments, axes=axes, key=key)
    if gradient == "zero":
        return value
    return straight_through(x, value, limit, negative)


def straight_through(x: Tensor, value: Tensor, limit: int | None = None, negative: bool = True) -> Tensor:
    """``value``, with the derivative 1 with respect to ``x`` at some numbers, and 0 at the others.

    Args:
        x: a tensor of a carrier dtype.
        value: a tensor like ``x`` without a derivative.
        limit: the code of the largest magnitude at which the derivative is 1; None means the largest finite one.
        negative: whether the derivative is 1 below zero too.
    """
    if not asks_derivative(x):
        return value
    has_derivative = _has_derivative(x.detach(), CARRIERS[x.dtype].max_code if limit is None else limit, negative)
    if _is_recorded():
        carrier = torch.where(has_derivative, x, 0.0)
        return value - (carrier.detach() - carrier)
    # Replace the numbers of `x` by the values, through an alias that autograd does not see. Arithmetic would flush
    # subnormal values to zero where the process does so.
    out = torch.where(has_derivative, x, value)
    out.detach().copy_(value)
    return out


def asks_derivative(*tensors: Tensor) -> bool:
    """Whether the derivative with respect to one of ``tensors`` may be asked for, by autograd or by `torch.func`."""
    return (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or _transforms_active()


def _has_derivative(x: Tensor, limit: int, negative: bool) -> Tensor:
    """Where the magnitude's code is at most ``limit`` and, unless ``negative`` is set, the number is not below 0."""
    bits = x.resolve_neg().view(CODES_OF[x.dtype])
    magnitude = bits & ((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return (magnitude <= limit) if negative else (magnitude <= limit) & ((bits >= 0) | (magnitude == 0))


def encode(
    x: Tensor,
    format: str | FloatFormat | torch.dtype,
    *,
    rounding: str = "nearest_even",
    overflow: Overflow | None = None,
    seed: int | Tensor | None = None,
    salt: int = 0,
    random_bits: int | None = None,
) -> Tensor:
    """The integer codes of ``x`` rounded to ``format``: sign, exponent and mantissa fields from the top bit down.

    The arguments and errors are those of `round`.

    Returns:
        A tensor of the shape and device of ``x``: uint8 for formats of up to 8 bits, int32 for up to 31 bits, else
        int64 (for 64-bit formats the two's complement of the code). NaN has the code `FloatFormat.nan_code`.

    >>> encode(torch.tensor([1.0, -448.0, float("nan")]), "e4m3fn")
    tensor([ 56, 254, 127], dtype=torch.uint8)
    """
    dtype = check_tensor(x, "encode")
    draw: dict[str, Any] = {"seed": seed, "salt": salt, "random_bits": random_bits}
    format = parse_format(format)
    values = round(x.detach(), format, rounding=rounding, overflow=overflow, gradient="zero", **draw)
    return _encode_values(values, _resolve(_name_of(format), "nearest_even", None, dtype)[0][0])


@torch.compiler.allow_in_graph  # Dynamo cannot trace it, but the tracer after Dynamo can
def _encode_values(values: Tensor, name: str) -> Tensor:
    fmt, working = parse_format(name), working_dtype(values.dtype)
    ops, grid = TorchOps(working), grid_of(fmt, values.dtype)
    out = torch.empty_like(values, dtype=code_dtype(fmt))
    for part, target in pieces(values, out):
        code = encode_code(part.to(working).view(ops.integer), grid, ops)
        if fmt.bits == 32:
            code = code.to(torch.int64) & 0xFFFFFFFF
        target.copy_(code)
    return out


def decode(codes: Tensor, format: str | FloatFormat | torch.dtype, dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact values of ``codes`` of ``format``.

    Args:
        codes: integers from 0 to ``2**bits - 1`` (64-bit formats: two's complement), any integer dtype and shape.
        format: a name (`fpsim.parse_format`) or a `FloatFormat`.
        dtype: the dtype of the result, a carrier that has all values of ``format``.

    Raises:
        ValueError: a code is out of range (not checked inside `torch.compile`), or ``dtype`` lacks values of the
            format.
        TypeError: ``codes`` is not an integer tensor, or ``dtype`` is not a carrier.

    >>> decode(torch.tensor([0x38, 0x7E, 0x80]), "e4m3fn")
    tensor([  1., 448.,  -0.])
    """
    name = _resolve(_name_of(format), "nearest_even", None, dtype)[0][0]
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be an integer tensor, got {type(codes).__name__}: use torch.tensor(codes)")
    if codes.dtype not in _INTEGERS:
        raise TypeError(f"codes must be an integer tensor, got {codes.dtype}: did you mean fpsim.encode?")
    check_tensor(codes, "decode")
    if not torch.compiler.is_compiling():
        for (part,) in pieces(codes):
            _check_codes(part.to(torch.int64), parse_format(name))
    return _decode_codes(codes, name, dtype)


@torch.compiler.allow_in_graph
def _decode_codes(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    fmt, working = parse_format(name), working_dtype(dtype)
    ops, grid = TorchOps(working), grid_of(fmt, dtype)
    out = torch.empty_like(codes, dtype=dtype)
    for part, target in pieces(codes, out):
        wide = part.to(torch.int64)
        if fmt.bits == 32:  # the top bit becomes the sign of the working integer
            wide = (wide ^ 0x80000000) - 0x80000000
        target.copy_(decode_code(wide.to(ops.integer), grid, ops).view(working))
    return out


def code_dtype(format: str | FloatFormat | torch.dtype) -> torch.dtype:
    """The dtype in which `encode` returns codes of ``format``: uint8, int32 or int64."""
    bits = parse_format(format).bits
    return torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64


def _check_codes(codes: Tensor, fmt: FloatFormat) -> None:
    wrong = codes[(codes < 0) | (codes > (1 << fmt.bits) - 1)] if fmt.bits < 64 else codes[:0]
    if wrong.numel():
        raise ValueError(f"code {int(wrong[0])} is not one of {fmt.name}: codes are 0 to {(1 << fmt.bits) - 1}")


def _name_of(value: Any) -> Any:
    """The name of a format or scale: Dynamo of torch 2.11 passes no frozen dataclass to a function that it skips."""
    if isinstance(value, ElementFormat):
        return value.name
    if isinstance(value, torch.dtype):
        return format_name(value)
    return str(value) if isinstance(value, Scale) else value


@torch._dynamo.assume_constant_result
def _resolve(
    format: str,
    rounding: str,
    overflow: str | None,
    dtype: torch.dtype,
    random_bits: int | None = None,
    scale: str | None = None,
    clipped: bool = False,
) -> tuple[Arguments, int | None, bool, bool]:
    """The cast as `Arguments`, the last two arguments of `straight_through`, and whether the cast has an axis."""
    name, bits = split_rounding(rounding)
    if random_bits is not None:
        if not bits:
            raise ValueError(
                f"random_bits={reprlib.repr(random_bits)} has no meaning with rounding={rounding!r}: use 'stochastic'"
            )
        if type(random_bits) is not int:
            raise TypeError(
                f"random_bits must be an int from 1 to {STOCHASTIC_ROUNDINGS[name]}, got {reprlib.repr(random_bits)}"
            )
        if ":" in rounding:
            raise ValueError(
                f"rounding={rounding!r} has its own number of random bits: leave out random_bits={random_bits}"
            )
        rounding = f"{name}:{random_bits}"
    cast = parse_cast(format, rounding, overflow, scale)
    if cast is None:
        raise ValueError(f"the format {NONE!r} rounds nothing: use a format such as 'e4m3fn'")
    _refuse_ignored(format, cast, rounding=rounding, overflow=overflow, scale=parse_scale(scale))
    refuse_timed(cast, "fpsim.round")
    check_cast(dtype, cast)
    if cast.scale is not None or cast.transform is not None or not clipped:
        return cast.arguments, None, True, cast.has_axis
    fmt = parse_format(cast.arguments[0])
    return cast.arguments, Grid(fmt, CARRIERS[dtype]).plain_max, fmt.signed, cast.has_axis


def _refuse_ignored(format: str, cast: Cast, **given: object) -> None:
    """Raise ValueError if an argument is given beside a format that names something else in its place."""
    usual = {"rounding": "nearest_even", "overflow": None, "scale": None}
    for name, value in given.items():
        named = getattr(cast, name)
        if value != usual[name] and named != value and (name != "rounding" or named != full_rounding(str(value))):
            raise ValueError(f"format {format!r} names {name} {str(named)!r}: leave out {name}={str(value)!r}")


def counted_axes(axis: int | tuple[int, ...], dims: int, scale: str) -> tuple[int, ...]:
    """The axes of a tensor with ``dims`` axes that ``axis`` denotes, counted from the front, in ascending order.

    Raises:
        ValueError: there is no such axis, or it is named twice. The message names ``scale``, which needs it.
        TypeError: ``axis`` is neither an int nor a tuple of ints.
    """
    axes = axis if isinstance(axis, tuple) else (axis,)
    for each in axes:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"axis must be an int or a tuple of ints, got {reprlib.repr(axis)}")
        if not -dims <= each < dims:
            has = f"has axes {-dims} to {dims - 1}" if dims else "has no axis"
            raise ValueError(
                f"axis {each} does not exist: scale {scale!r} lies along an axis, and a tensor of {dims} "
                f"dimensions {has}"
            )
    counted = tuple(sorted(each % dims for each in axes))
    if len(set(counted)) < len(counted):
        raise ValueError(f"axis {reprlib.repr(axis)} names an axis twice")
    return counted


def check_salt(salt: int) -> None:
    """Check that ``salt`` is an int of 64 bits; the errors are those of `round`."""
    if isinstance(salt, bool) or not isinstance(salt, int | torch.SymInt):
        raise TypeError(f"salt must be an int, got {reprlib.repr(salt)} of type {type(salt).__name__}")
    if not -(2**63) <= salt < 2**63:
        raise ValueError(f"salt {salt} is no 64-bit integer: use one from -2**63 to 2**63 - 1")


def seed_tensor(seed: int | Tensor | None, rounding: str, device: torch.device) -> Tensor:
    """A seed of stochastic rounding as one int64 on ``device``; the errors are those of `round`."""
    if seed is None:
        raise ValueError(f"rounding={rounding!r} needs a seed: an int, or a tensor with one int64")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"a seed is an int or one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(
            f"a seed is an int or a tensor with one int64, got {reprlib.repr(seed)} of type {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed {seed} is no 64-bit integer: use one from -2**63 to 2**63 - 1")
    return torch.full((), seed, dtype=torch.int64, device=device)


@torch._dynamo.assume_constant_result
def _is_recorded() -> bool:
    """Whether `torch.func.linearize` or ``make_fx`` records the operations: they lose writes to an alias."""
    return get_proxy_mode() is not None


@torch._dynamo.assume_constant_result  # Dynamo enters the transforms while it traces, and guards on them
def _transforms_active() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
