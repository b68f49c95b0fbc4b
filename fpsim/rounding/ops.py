"""The operators of ``torch.ops.fpsim``: what graphs contain and what eager calls run.

``round`` is deterministic rounding. Stochastic rounding is ``round_stochastic``, a function of a key that
``random_key`` makes of a seed and a salt: it holds no state, so that no compiler may merge, repeat or move it wrongly.

Each has a kernel, a fake and a vmap rule, and on purpose no autograd rule: `fpsim.round` builds its derivative
from arithmetic, because `torch.compile` of `torch.func` transforms silently ignores registered derivatives. On
their own the operators are value functions: use them on detached tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fpsim.formats import FloatFormat, check_rounding, parse_format, resolve_overflow, split_rounding
from fpsim.rounding.kernel import FLOAT32, FLOAT64, Grid, Int, round_code
from fpsim.rounding.random_words import random_key, random_word
from fpsim.source import source_hash

#: The dtypes that carry simulated values, and the format that each is.
CARRIERS: dict[torch.dtype, FloatFormat] = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.bfloat16: FloatFormat(8, 7),
    torch.float16: FloatFormat(5, 10),
}

_MAGNITUDE = (1 << 31) - 1  # the bits of a float32 but the sign

# Elements per thread that the CPU kernel handles at a time: its temporaries then stay in the cache.
_CHUNK = 1 << 17


def check_carrier(dtype: torch.dtype, fmt: FloatFormat) -> FloatFormat:
    """The format of ``dtype``, if it can carry ``fmt``.

    Raises:
        TypeError: ``dtype`` is not a carrier (an integer, complex or 8-bit dtype).
        ValueError: ``fmt`` has values that ``dtype`` lacks; the message names a dtype that suffices. Or it has no
            finite value but zero (E1M0 with infinities, say).
    """
    if fmt.max == 0:
        raise ValueError(f"{fmt.name} has no finite value but zero: give it a mantissa bit, or specials='finite'")
    if dtype not in CARRIERS:
        names = ", ".join(str(d).removeprefix("torch.") for d in CARRIERS)
        raise TypeError(f"cannot round a tensor of {dtype}: convert it to one of {names} first, e.g. x.float()")
    if not fmt.is_subset_of(CARRIERS[dtype]):
        enough = [d for d in (torch.float32, torch.float64) if fmt.is_subset_of(CARRIERS[d])]
        raise ValueError(
            f"{fmt.name} has values that {dtype} lacks, so a {dtype} tensor cannot carry it: convert it to {enough[0]}"
        )
    return CARRIERS[dtype]


class TorchOps:
    """The kernel's executor on torch tensors (`fpsim.rounding.kernel.Ops`)."""

    def __init__(self, floating: torch.dtype) -> None:
        self.floating, self.integer = floating, INTEGER_OF[floating]

    @staticmethod
    def clamp(a: Tensor, low: int | None, high: int | None) -> Tensor:
        return a.clamp(low, high)

    @staticmethod
    def larger(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    # Masks are integers, -1 or 0: a comparison and a select of tensors cost several times these integer operations.
    @staticmethod
    def less(a: Tensor, bound: Int) -> Tensor:
        if isinstance(bound, Tensor):
            return -(a < bound).to(a.dtype)
        return a.clamp(bound - 1, bound) - bound  # clamped first, the difference cannot overflow

    @staticmethod
    def choose(mask: Tensor, a: Int, b: Int) -> Tensor:
        if isinstance(a, int) and a == 0:
            return b & ~mask
        if isinstance(b, int) and b == 0:
            return a & mask
        return b ^ ((a ^ b) & mask)

    def code_of_integer(self, a: Tensor) -> Tensor:
        return a.to(self.floating).view(self.integer)


INTEGER_OF = {torch.float32: torch.int32, torch.float64: torch.int64}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in whose bits a carrier is rounded: its own, float32 for the 16-bit carriers."""
    return dtype if dtype in INTEGER_OF else torch.float32


@lru_cache(maxsize=1024)
def grid_of(fmt: FloatFormat, dtype: torch.dtype) -> Grid:
    """The format on the working carrier of ``dtype``; raises as `check_carrier`."""
    check_carrier(dtype, fmt)
    return Grid(fmt, CARRIERS[working_dtype(dtype)])


def round_with_torch_ops(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, word: Int = 0) -> Tensor:
    """``x`` rounded, by plain torch operations only: what the operators mean.

    ``word``: for stochastic rounding, 32-bit random words (int32) of the shape of ``x``.
    """
    working = working_dtype(x.dtype)
    ops = TorchOps(working)
    code = x.to(working).view(ops.integer)
    if isinstance(word, Tensor) and ops.integer == torch.int64:
        word = word.to(torch.int64) << 32
    return round_code(code, grid_of(fmt, x.dtype), rounding, overflow, ops, word).view(working).to(x.dtype)


_library = torch.library.Library("fpsim", "DEF")
_library.define(
    'round(Tensor x, str format, str rounding, str overflow, str source="") -> Tensor', tags=(torch.Tag.pointwise,)
)


_library.define("random_key(Tensor seed, int salt) -> Tensor")
_library.define(
    "round_stochastic(Tensor x, Tensor key, str format, str rounding, str overflow, str source) -> Tensor",
    tags=(torch.Tag.pointwise,),
)


def _checked(x: Tensor, format: str, rounding: str, overflow: str) -> FloatFormat:
    fmt = parse_format(format)
    check_carrier(x.dtype, fmt)
    check_rounding(rounding)
    resolve_overflow(fmt, overflow)
    return fmt


@torch.library.impl(_library, "round", "CompositeExplicitAutograd")
def _round_any(x: Tensor, format: str, rounding: str, overflow: str, source: str = "") -> Tensor:
    fmt = _checked(x, format, rounding, overflow)
    out = torch.empty_like(x)
    return out.copy_(round_with_torch_ops(x, fmt, rounding, overflow))


@torch.library.impl(_library, "round", "CPU")
def _round_cpu(x: Tensor, format: str, rounding: str, overflow: str, source: str = "") -> Tensor:
    fmt = _checked(x, format, rounding, overflow)
    out = torch.empty_like(x)
    if out.stride() != x.stride():
        x = torch.empty_like(x).copy_(x)  # dense, in the order of `out`, and not `out` itself, which is written first
    source, result = _flat(x), _flat(out)
    chunk = _CHUNK * torch.get_num_threads()
    by_scaling = x.dtype == torch.float32 and _can_round_by_scaling(fmt, overflow)
    at_one_unit = x.dtype == torch.float32 and _has_one_unit(fmt, overflow)
    for piece, target in zip(source.split(chunk), result.split(chunk), strict=True):
        if by_scaling and not (rounding in ("up", "down", "to_odd") and _has_subnormal(piece)):
            _round_by_scaling(piece, fmt, rounding, overflow, target)
        elif at_one_unit:
            _round_at_one_unit(piece, fmt, rounding, target)
        else:
            target.copy_(round_with_torch_ops(piece, fmt, rounding, overflow))
    return out


def _has_one_unit(fmt: FloatFormat, overflow: str) -> bool:
    """Whether `_round_at_one_unit` gives the same bits as the kernel: float32 with fewer mantissa bits."""
    return overflow == "ovf_inf" and fmt == FloatFormat(8, fmt.mantissa_bits) and 1 <= fmt.mantissa_bits <= 22


def _round_at_one_unit(x: Tensor, fmt: FloatFormat, rounding: str, out: Tensor) -> None:
    """Round float32 ``x`` into ``out`` where the format's unit is the same among all codes: add, then mask.

    A third of the kernel's operations. The sign bit stays out of the sums, and a carry out of the largest value gives
    infinity; the only NaN left is the canonical one, whose sums do not carry into the sign.
    """
    torch.nan_to_num(x, nan=math.nan, posinf=math.inf, neginf=-math.inf, out=out)
    code = out.view(torch.int32)
    shift = FLOAT32.mantissa_bits - fmt.mantissa_bits
    dropped_bits = (1 << shift) - 1
    if rounding == "nearest_even":
        code.add_((code >> shift).bitwise_and_(1)).add_(dropped_bits >> 1)
    elif rounding == "nearest_away":
        code.add_((dropped_bits >> 1) + 1)
    elif rounding == "up":
        code.add_((code >> 31).bitwise_not_().bitwise_and_(dropped_bits))
    elif rounding == "down":
        code.add_((code >> 31).bitwise_and_(dropped_bits))
    elif rounding == "to_odd":
        code.bitwise_or_((code & dropped_bits).add_(dropped_bits))  # has the unit's bit where the sum is inexact
    code.bitwise_and_(~dropped_bits)


def _can_round_by_scaling(fmt: FloatFormat, overflow: str) -> bool:
    """Whether `_round_by_scaling` gives the same bits as the kernel."""
    overflows_to_next_binade = fmt.has_infinity and fmt.specials != "p3109" and 1 <= fmt.max_exponent < 127
    return (
        (overflow == "sat_finite" or fmt.has_infinity)
        and (overflow != "ovf_inf" or overflows_to_next_binade)
        and fmt.subnormals
        and fmt.signed
        and fmt.exponent_bits > 1
        and 1 <= fmt.mantissa_bits <= 22  # 0: ties go to the even code, not to the even multiple
        and FLOAT32.emin < fmt.emin - fmt.mantissa_bits <= 0  # no step meets a float32 subnormal but the input
    )


def _round_by_scaling(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str, out: Tensor) -> None:
    """Round float32 ``x`` into ``out`` by dividing by the unit of its binade and rounding to an integer.

    A third of the kernel's operations, for eager CPU calls only: torch divides and multiplies in IEEE arithmetic
    there, and by a power of two that is exact. Right under flush-to-zero too, except that `up`, `down` and `to_odd`
    must not be given float32 subnormals (`_has_subnormal`).
    """
    nearest = rounding in ("nearest_even", "nearest_away")
    overflows = [overflow == "ovf_inf" and (nearest or rounding == side) for side in ("down", "up")]
    lowest, highest = (2.0 ** (fmt.max_exponent + 1) if beyond else fmt.max for beyond in overflows)
    of_magnitude = rounding in ("nearest_away", "toward_zero", "to_odd")
    if of_magnitude:
        torch.abs(x, out=out).clamp_(max=highest)
    else:
        torch.clamp(x, -lowest, highest, out=out)

    exponent = (out.view(torch.int32) & (FLOAT32.max_code + 1)).clamp_(min=(fmt.emin + FLOAT32.bias) << 23)
    unit = exponent.sub_((fmt.mantissa_bits - (rounding == "to_odd")) << 23).view(torch.float32)
    out.div_(unit)
    if rounding == "nearest_even":
        out.round_()
    elif rounding == "nearest_away":
        out.add_(0.5 - 2.0**-25).floor_()  # 0.5 would take the number before 0.5 to 1
    elif rounding == "up":
        out.ceil_()
    elif rounding in ("down", "toward_zero"):
        out.floor_()
    else:  # the unit is doubled: an even multiple stays, all between it and the next becomes the half between them
        even = out.floor()
        torch.add(even, out.sub_(even).ceil_(), alpha=0.5, out=out)
    out.mul_(unit)

    if any(overflows):
        scale = 2.0 ** (FLOAT32.max_exponent - fmt.max_exponent)
        out.mul_(scale).mul_(1 / scale)
    keeps_infinities = overflow != "sat_finite" and not all(overflows)
    if keeps_infinities:
        out.add_(torch.nn.functional.hardshrink(x, FLOAT32.max))  # 0 but for infinities and NaN
    if of_magnitude or keeps_infinities:
        out.copysign_(x)
    if not fmt.has_negative_zero:
        out.add_(0.0)
    out.nan_to_num_(nan=math.nan if fmt.has_nan else fmt.max, posinf=math.inf, neginf=-math.inf)


def _has_subnormal(x: Tensor) -> bool:
    """Whether any float32 number is subnormal, by its bits."""
    before = (x.view(torch.int32) & _MAGNITUDE).sub_(1).bitwise_and_(_MAGNITUDE)
    return x.numel() > 0 and int(before.amin()) < (1 << FLOAT32.mantissa_bits) - 1


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    return x.as_strided((x.numel(),), (1,))


@torch.library.register_fake("fpsim::round", lib=_library)
def _round_fake(x: Tensor, format: str, rounding: str, overflow: str, source: str = "") -> Tensor:
    _checked(x, format, rounding, overflow)
    _register_lowerings()
    return torch.empty_like(x)


def _register_lowerings() -> None:
    """Where something is being compiled, let Inductor know the operators before it asks for them."""
    if "torch._inductor.lowering" in sys.modules:
        import fpsim.rounding.inductor  # noqa: F401


@torch.library.register_vmap("fpsim::round", lib=_library)
def _round_vmap(
    info: object,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    format: str,
    rounding: str,
    overflow: str,
    source: str = "",
) -> tuple[Tensor, int | None]:
    return round_op(x, format, rounding, overflow, source), in_dims[0]


round_op: Callable[[Tensor, str, str, str, str], Tensor] = torch.ops.fpsim.round.default


# -- stochastic rounding -----------------------------------------------------------------------------------------


@torch.library.impl(_library, "random_key", "CompositeExplicitAutograd")
def _random_key(seed: Tensor, salt: int) -> Tensor:
    key = random_key(seed.reshape(()), salt)
    return torch.stack([key, key >> 32]).to(torch.int32)  # the low half and the high half; the cast keeps 32 bits


@torch.library.register_fake("fpsim::random_key", lib=_library)
def _random_key_fake(seed: Tensor, salt: int) -> Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"a seed is one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    _register_lowerings()
    return seed.new_empty(2, dtype=torch.int32)


@torch.library.impl(_library, "round_stochastic", "CompositeExplicitAutograd")
def _round_stochastic(x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str) -> Tensor:
    fmt = _checked_stochastic(x, format, rounding, overflow)
    source = x.contiguous().view(-1)
    rounded = torch.empty_like(source)
    chunk = _CHUNK * torch.get_num_threads() if x.device.type == "cpu" else max(x.numel(), 1)
    for first, (piece, target) in enumerate(zip(source.split(chunk), rounded.split(chunk), strict=True)):
        word = _words(key, first * chunk, piece.numel())
        target.copy_(round_with_torch_ops(piece, fmt, rounding, overflow, word))
    return torch.empty_like(x).copy_(rounded.view(x.shape))


def _words(key: Tensor, first: int, count: int) -> Tensor:
    """The random words of elements ``first``, ``first + 1``, ..., ``first + count - 1``."""
    index = torch.arange(first, first + count, device=key.device)
    return random_word(key[0], key[1], index.to(torch.int32), (index >> 32).to(torch.int32))


def _checked_stochastic(x: Tensor, format: str, rounding: str, overflow: str) -> FloatFormat:
    fmt = parse_format(format)
    check_carrier(x.dtype, fmt)
    if not split_rounding(rounding)[1]:
        raise ValueError(f"rounding {rounding!r} is not stochastic: use fpsim::round")
    resolve_overflow(fmt, overflow)
    return fmt


@torch.library.register_fake("fpsim::round_stochastic", lib=_library)
def _round_stochastic_fake(x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str) -> Tensor:
    _checked_stochastic(x, format, rounding, overflow)
    _register_lowerings()
    return torch.empty_like(x)


@torch.library.register_vmap("fpsim::random_key", lib=_library)
def _random_key_vmap(info: Any, in_dims: tuple[int | None, ...], seed: Tensor, salt: int) -> tuple[Tensor, int]:
    return torch.stack([random_key_op(each, salt) for each in seed.movedim(in_dims[0] or 0, 0)]), 0


@torch.library.register_vmap("fpsim::round_stochastic", lib=_library)
def _round_stochastic_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    key: Tensor,
    format: str,
    rounding: str,
    overflow: str,
    source: str,
) -> tuple[Tensor, int]:
    xs = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None:  # one key: every element of the batch draws for itself
        return round_stochastic_op(xs, key, format, rounding, overflow, source), 0
    keys = key.movedim(in_dims[1], 0)
    return torch.stack(
        [round_stochastic_op(a, k, format, rounding, overflow, source) for a, k in zip(xs, keys, strict=True)]
    ), 0


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's random state, as one int64."""
    return torch.randint(-(2**63), 2**63 - 1, [1], device=device)


random_key_op: Callable[[Tensor, int], Tensor] = torch.ops.fpsim.random_key.default
round_stochastic_op: Callable[[Tensor, Tensor, str, str, str, str], Tensor] = torch.ops.fpsim.round_stochastic.default


#: What callers pass as ``source``. Torch knows an operator in its caches by name and arguments only: without this,
#: code that another version of fpsim compiled would go on being used.
SOURCE = source_hash()
