"""Casts as frozen values (a format, modes and a scale), and the only code that applies them to tensors."""

from __future__ import annotations

import reprlib
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
from fpsim.scaling.ops import SCALE_OPERATORS, check_scaled_carrier
from fpsim.scaling.scale import SCALES, Scale, parse_scale

#: The name in place of a format that leaves the operand unrounded.
NONE: Literal["none"] = "none"
#: The name in an operand's cast that excludes a scale, even if the policy has one.
UNSCALED = "unscaled"

#: A cast in the form that operators and Dynamo accept: the format's name, the rounding, the overflow mode, and the
#: rule of the scale (None without a scale).
Arguments = tuple[str, str, str, str | None]


@dataclass(frozen=True)
class Cast:
    """A way to round: a format, a rounding, an overflow mode, and optionally a scale. No default is left open.

    ``str(cast)`` is ``format/rounding/overflow`` or ``format/rounding/overflow/scale``, with the format's canonical
    name: equal casts have equal strings.

    Attributes:
        format: the format.
        rounding: the full name of a rounding, including its number of random bits (`fpsim.formats.full_rounding`).
        overflow: the overflow mode.
        scale: the scale, or None.
        spelling: the text from which the cast was parsed. Equality ignores it.

    Raises:
        ValueError: the rounding or the overflow mode is unknown, or the mode needs an infinity or a NaN and the format
            has neither.
        TypeError: a field has another type.
    """

    format: FloatFormat
    rounding: str
    overflow: Overflow
    scale: Scale | None = None
    spelling: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.format, FloatFormat):
            raise TypeError(f"the format of a cast is a FloatFormat, got {reprlib.repr(self.format)}: use parse_cast")
        if self.overflow is None or not isinstance(self.scale, Scale | None):
            given = reprlib.repr((self.overflow, self.scale))
            raise TypeError(f"a cast has an overflow mode, and a Scale or None, got {given}: use parse_cast")
        object.__setattr__(self, "rounding", full_rounding(self.rounding))
        resolve_overflow(self.format, self.overflow)

    def __str__(self) -> str:
        return self._joined(self.format.name)

    @property
    def written(self) -> str:
        """The text of `str`, but with the format's name as the user wrote it: ``bf16/nearest_even/ovf_inf``."""
        return self._joined(self._format_as_written)

    @property
    def leaves_scale_open(self) -> bool:
        """Whether the cast was parsed from text that names no scale, not even ``unscaled``."""
        return bool(self.spelling) and not {*SCALES, UNSCALED} & set(self.spelling.split("/"))

    @property
    def label(self) -> str:
        """A short text for tables: the format, and every mode that is not its default."""
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
        """The cast in the form that `apply_arguments` takes."""
        rule = None if self.scale is None else self.scale.rule
        return self.format.name, self.rounding, self.overflow, rule

    @property
    def _format_as_written(self) -> str:
        return self.spelling.partition("/")[0] or self.format.name

    def _joined(self, format: str) -> str:
        return "/".join([format, self.rounding, self.overflow, *([str(self.scale)] if self.scale else [])])


#: The argument type of a cast: the name of a format or a cast, a `FloatFormat`, or a `Cast`.
CastLike = str | FloatFormat | Cast


def parse_cast(
    text: CastLike, rounding: str = "nearest_even", overflow: str | None = None, scale: str | Scale | None = None
) -> Cast | None:
    """The cast that ``text`` denotes: ``format[/rounding][/overflow][/scale]``, or ``none`` for None.

    Args:
        text: a format (name or `FloatFormat`), optionally followed by modes that override the next three arguments. A
            `Cast` is returned unchanged.
        rounding: the rounding if ``text`` names none.
        overflow: the overflow mode if ``text`` names none; None means the format's usual mode.
        scale: the scale if ``text`` names none; ``unscaled`` in ``text`` means None.

    Raises:
        ValueError: the format or a mode is unknown. The message names the remedy.
        TypeError: ``text`` is neither a string nor a format nor a cast.

    >>> str(parse_cast("e8m3/toward_zero")), str(parse_cast("e4m3fn/power_of_two"))
    ('e8m3/toward_zero/ovf_inf', 'e4m3fn/nearest_even/sat_finite/power_of_two')
    """
    parsed_scale = parse_scale(scale)
    if isinstance(text, Cast):
        return text
    if isinstance(text, FloatFormat):
        return Cast(text, full_rounding(rounding), resolve_overflow(text, overflow), parsed_scale, spelling=text.name)
    if not isinstance(text, str):
        raise TypeError(f"a cast is a string such as 'e4m3fn' or 'e8m3/toward_zero', got {reprlib.repr(text)}")
    if text == NONE:
        return None
    name, *modes = text.split("/")
    named: dict[str, str] = {}
    for mode in modes:
        if mode in ROUNDINGS or mode.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            kind, rounding = "roundings", mode
        elif mode in OVERFLOWS:
            kind, overflow = "overflow modes", mode
        elif mode in (*SCALES, UNSCALED):
            kind, parsed_scale = "scales", SCALES.get(mode)
        else:
            raise ValueError(
                f"unknown mode {mode!r} in cast {text!r}: after the format may come a rounding "
                f"({', '.join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])}), an overflow mode ({', '.join(OVERFLOWS)}) and a "
                f"scale ({', '.join([*SCALES, UNSCALED])})"
            )
        if kind in named:
            raise ValueError(f"cast {text!r} has two {kind}, {named[kind]} and {mode}: leave one of them out")
        named[kind] = mode
    fmt = parse_format(name)
    return Cast(fmt, full_rounding(rounding), resolve_overflow(fmt, overflow), parsed_scale, spelling=text)


def parse_unscaled(text: CastLike, rounding: str, overflow: str | None, values: str) -> Cast | None:
    """`parse_cast` for values that cannot be scaled; ``values`` names them in the message.

    Raises:
        ValueError: in the same cases as `parse_cast`, or if ``text`` names a scale.
    """
    parsed = parse_cast(text, rounding, overflow)
    if parsed is not None and parsed.scale is not None:
        raise ValueError(f"{values} cannot be scaled: leave {str(parsed.scale)!r} out of {str(text)!r}")
    return parsed


def check_cast(dtype: torch.dtype, cast: Cast) -> None:
    """Raise an error if tensors of ``dtype`` cannot hold the results of ``cast``.

    Raises:
        TypeError, ValueError: in the same cases as `fpsim.rounding.carriers.check_carrier`, or if ``dtype`` is float16
            and the cast has a scale.
    """
    (check_scaled_carrier if cast.scale else check_carrier)(dtype, cast.format)


# -- applying casts to tensors -----------------------------------------------------------------------------------------


def run(operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``: the ``call`` of the functions below for tensors."""
    return operator(*arguments)


def apply_cast(x: Any, cast: Cast, *, key: Any = None, call: Callable[..., Any] = run) -> Any:
    """Apply ``cast`` to ``x``: compute its scale, multiply by it, round, and divide by it.

    This and `apply_arguments` are the only code that turns a cast into operations. For tensors the operations run. The
    compiler backend passes nodes of a graph, and a ``call`` that inserts nodes.

    Args:
        x: a tensor of a dtype that `check_cast` accepts, or a node that stands for one. It must be detached from
            autograd.
        cast: how to round.
        key: for a stochastic cast, and only for it, the key that ``torch.ops.fpsim.random_key`` returns.
        call: calls an operator with arguments.

    Returns:
        A tensor like ``x``, or a node that stands for it.
    """
    return apply_arguments(x, cast.arguments, key=key, call=call)


def apply_arguments(x: Any, arguments: Arguments, *, key: Any = None, call: Callable[..., Any] = run) -> Any:
    """`apply_cast` in a form that Dynamo can trace, with `Cast.arguments` in place of the cast."""
    format, rounding, overflow, rule = arguments
    scale = () if rule is None else (call(SCALE_OPERATORS[rule], x, format, SOURCE),)
    if key is None:
        return call(round_op, x, format, rounding, overflow, SOURCE, *scale)
    return call(round_stochastic_op, x, key, format, rounding, overflow, SOURCE, *scale)


def in_range_of_format(exact: Tensor, rounded: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Tensors before and after ``cast``, both multiplied by the scale of ``exact`` if the cast has a scale."""
    format, _, _, rule = cast.arguments
    if rule is None:
        return exact, rounded
    scale = SCALE_OPERATORS[rule](exact, format, SOURCE)
    return exact * scale, rounded * scale
