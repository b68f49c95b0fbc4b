"""Casts: one way to round as a value, and the one place where it meets a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fpsim.formats import (
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_ROUNDINGS,
    FloatFormat,
    Overflow,
    full_rounding,
    parse_format,
    resolve_overflow,
    split_rounding,
)
from fpsim.rounding.carriers import check_carrier
from fpsim.rounding.ops import SOURCE, round_op, round_stochastic_op
from fpsim.scaling.ops import check_scaled_carrier, scale_op
from fpsim.scaling.scale import SCALES, Scale, parse_scale

aten = torch.ops.aten

#: In place of a format: leave the operand as it is.
NONE: Literal["none"] = "none"
#: In an operand's cast: no scale, whatever scale the policy has.
UNSCALED = "unscaled"

#: A cast as operators and Dynamo take it: the format's name, the rounding, the overflow mode, and for a scaled cast the
#: format's largest finite value, to which the scale brings numbers.
Arguments = tuple[str, str, str, float | None]


@dataclass(frozen=True)
class Cast:
    """One way to round: a format with its rounding and overflow mode, all resolved, and for operands a scale.

    ``str(cast)`` is ``format/rounding/overflow`` or ``format/rounding/overflow/scale``, with the format's canonical
    name: equal casts have equal strings.

    Attributes:
        format: the format.
        rounding: any that `fpsim.formats.split_rounding` takes, with its number of random bits.
        overflow: the mode in force.
        scale: the scale, or None.
        spelling: the text from which the cast was parsed; it is not part of equality.
    """

    format: FloatFormat
    rounding: str
    overflow: Overflow
    scale: Scale | None = None
    spelling: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self._joined(self.format.name)

    @property
    def written(self) -> str:
        """`str` with the format's name as the user wrote it: ``bf16/nearest_even/ovf_inf``."""
        return self._joined(self._format_as_written)

    @property
    def leaves_scale_open(self) -> bool:
        """Whether the cast was parsed from text that names no scale, not even ``unscaled``."""
        return bool(self.spelling) and not {*SCALES, UNSCALED} & set(self.spelling.split("/"))

    @property
    def label(self) -> str:
        """A short text for tables: the format, and each mode that is not the usual one."""
        parts = [self._format_as_written]
        if self.rounding != "nearest_even":
            parts.append(self.rounding)
        if self.overflow != resolve_overflow(self.format, None):
            parts.append(self.overflow)
        if self.scale:
            parts.append("scaled")
        return " ".join(parts)

    @property
    def is_stochastic(self) -> bool:
        """Whether rounding draws random numbers."""
        return split_rounding(self.rounding)[1] > 0

    @property
    def arguments(self) -> Arguments:
        """The cast in the terms of `apply_arguments`."""
        return self.format.name, self.rounding, self.overflow, self.format.max if self.scale else None

    @property
    def _format_as_written(self) -> str:
        return self.spelling.partition("/")[0] or self.format.name

    def _joined(self, format: str) -> str:
        return "/".join([format, self.rounding, self.overflow, *([str(self.scale)] if self.scale else [])])


#: What a caller gives for a cast: a format or a cast by name, or either as a value.
CastLike = str | FloatFormat | Cast


def parse_cast(
    text: CastLike, rounding: str = "nearest_even", overflow: str | None = None, scale: str | Scale | None = None
) -> Cast | None:
    """The cast that ``text`` denotes: ``format[/rounding][/overflow][/scale]``, or ``none`` for None.

    Args:
        text: a format (name or `FloatFormat`), optionally followed by modes that override the next three. A `Cast` is
            returned as it is.
        rounding: the rounding where ``text`` names none.
        overflow: the overflow mode where ``text`` names none; None is the format's usual one.
        scale: the scale where ``text`` names none; ``unscaled`` in ``text`` means None.

    Raises:
        ValueError: an unknown format or mode; the message names the remedy.
        TypeError: ``text`` is neither text nor a format nor a cast.

    >>> str(parse_cast("e8m3/toward_zero")), str(parse_cast("e4m3fn/power_of_two"))
    ('e8m3/toward_zero/ovf_inf', 'e4m3fn/nearest_even/sat_finite/power_of_two')
    """
    parsed_scale = parse_scale(scale)
    if isinstance(text, Cast):
        return text
    if isinstance(text, FloatFormat):
        return Cast(text, full_rounding(rounding), resolve_overflow(text, overflow), parsed_scale, spelling=text.name)
    if not isinstance(text, str):
        raise TypeError(f"a cast is a string such as 'e4m3fn' or 'e8m3/toward_zero', got {text!r}")
    if text == NONE:
        return None
    name, *modes = text.split("/")
    for mode in modes:
        if mode in ROUNDINGS or mode.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            rounding = mode
        elif mode in OVERFLOWS:
            overflow = mode
        elif mode in (*SCALES, UNSCALED):
            parsed_scale = SCALES.get(mode)
        else:
            raise ValueError(
                f"unknown mode {mode!r} in cast {text!r}: after the format may come a rounding "
                f"({', '.join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])}), an overflow mode ({', '.join(OVERFLOWS)}) and a "
                f"scale ({', '.join([*SCALES, UNSCALED])})"
            )
    fmt = parse_format(name)
    return Cast(fmt, full_rounding(rounding), resolve_overflow(fmt, overflow), parsed_scale, spelling=text)


def parse_unscaled(text: CastLike, rounding: str, overflow: str | None, what: str) -> Cast | None:
    """`parse_cast` for values that cannot be scaled; ``what`` names them in the message.

    Raises:
        ValueError: as `parse_cast`, or ``text`` names a scale.
    """
    parsed = parse_cast(text, rounding, overflow)
    if parsed is not None and parsed.scale is not None:
        raise ValueError(f"{what} cannot be scaled: leave {str(parsed.scale)!r} out of {str(text)!r}")
    return parsed


def check_cast(dtype: torch.dtype, cast: Cast) -> None:
    """Refuse a dtype whose tensors cannot hold the values that ``cast`` gives.

    Raises:
        TypeError, ValueError: as `fpsim.rounding.carriers.check_carrier`; or a scale for float16.
    """
    (check_scaled_carrier if cast.scale else check_carrier)(dtype, cast.format)


# -- casts meet tensors ------------------------------------------------------------------------------------------------


def run(operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``: the way to carry out a cast on tensors."""
    return operator(*arguments)


def apply_cast(x: Any, cast: Cast, *, key: Any = None, call: Callable[..., Any] = run) -> Any:
    """``x`` cast: scaled, rounded, and scaled back.

    This is the only code that turns a cast into operations. A tensor is cast by running them. The compiler backend
    passes nodes of a graph and a ``call`` that inserts nodes.

    Args:
        x: a tensor of a dtype that `check_cast` accepts, or a node that stands for one. It has no part in autograd.
        cast: how to round.
        key: for a stochastic cast, and only for it: the key that ``torch.ops.fpsim.random_key`` makes.
        call: carries out an operator on arguments.

    Returns:
        A tensor like ``x``, or a node that stands for it.
    """
    return apply_arguments(x, cast.arguments, key=key, call=call)


def apply_arguments(x: Any, arguments: Arguments, *, key: Any = None, call: Callable[..., Any] = run) -> Any:
    """`apply_cast` in terms that Dynamo can trace: `Cast.arguments` in place of the cast."""
    format, rounding, overflow, maximum = arguments
    inverse = None
    if maximum is not None:
        factor, inverse = scale_factors(x, maximum, call=call)
        x = call(aten.mul.Tensor, x, factor)
    if key is None:
        rounded = call(round_op, x, format, rounding, overflow, SOURCE)
    else:
        rounded = call(round_stochastic_op, x, key, format, rounding, overflow, SOURCE)
    return rounded if inverse is None else call(aten.mul.Tensor, rounded, inverse)


def scale_factors(x: Any, maximum: float, *, call: Callable[..., Any] = run) -> tuple[Any, Any]:
    """The scale of ``x`` for a format whose largest finite value is ``maximum``, and the reciprocal of the scale."""
    factors = call(scale_op, x, maximum, SOURCE)
    return call(aten.select.int, factors, 0, 0), call(aten.select.int, factors, 0, 1)


def in_range_of_format(exact: Tensor, rounded: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Numbers before and after ``cast``, as the rounding itself saw them: multiplied by the scale, if there is one."""
    _, _, _, maximum = cast.arguments
    if maximum is None:
        return exact, rounded
    factor, _ = scale_factors(exact, maximum)
    return exact * factor, rounded * factor
