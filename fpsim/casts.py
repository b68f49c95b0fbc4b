"""Casts as frozen values (a format, modes, a scale and a transform), and the only code that applies them to tensors."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fpsim.formats import (
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_ROUNDINGS,
    WHOLE_FORMATS,
    CodebookFormat,
    ElementFormat,
    FloatFormat,
    IntegerFormat,
    Overflow,
    expand,
    format_name,
    full_rounding,
    parse_element,
    resolve_overflow,
    split_rounding,
)
from fpsim.rounding.carriers import CARRIERS, check_carrier, working_dtype
from fpsim.rounding.ops import SOURCE, random_words_op, round_op, round_stochastic_op
from fpsim.scaling.ops import SCALE_OPERATORS, check_scaled_carrier, outer_scale_op, round_scaled_op
from fpsim.scaling.scale import (
    AFFINE_RULES,
    MX_RULES,
    NV_RULES,
    SCALE_NAMES,
    SYMMETRIC_RULES,
    TIMING_NAMES,
    Scale,
    is_scale,
    is_timing,
    parse_scale,
    with_timing,
)
from fpsim.scaling.steps import scaled_groups
from fpsim.suggestions import did_you_mean, first_words, near_names
from fpsim.transforms.names import NAMES_OF_CASTS, is_transform, parse_transform
from fpsim.transforms.ops import round_transformed_op
from fpsim.transforms.transform import Transform

aten, prims = torch.ops.aten, torch.ops.prims

#: The name in place of a format that leaves the operand unrounded.
NONE: Literal["none"] = "none"
#: The name in an operand's cast that excludes a scale, even if the policy has one.
UNSCALED = "unscaled"

#: The operators that round; `apply_cast` ends with one of them.
ROUNDING_OPERATORS = (round_op, round_stochastic_op, round_scaled_op)

#: A cast in the form that operators and Dynamo accept: the format's name, the rounding, the overflow mode, and the
#: name of the scale (None without a scale), followed by ``/`` and the name of the transform if there is one.
Arguments = tuple[str, str, str, str | None]


@dataclass(frozen=True)
class Cast:
    """A way to round: a format, a rounding, an overflow mode, and optionally a scale and a transform.

    No default is left open. ``str(cast)`` is ``format/rounding/overflow[/scale][/transform]``, with the format's
    canonical name: equal casts have equal strings.

    Attributes:
        format: the format.
        rounding: the full name of a rounding, including its number of random bits (`fpsim.formats.full_rounding`).
        overflow: the overflow mode.
        scale: the scale, or None.
        transform: the change of the tensor before it is scaled and rounded, which is undone afterwards; or None.
        spelling: the text from which the cast was parsed. Equality ignores it.

    Raises:
        ValueError: the rounding or the overflow mode is unknown, or the mode needs an infinity or a NaN and the format
            has neither.
        TypeError: a field has another type.
    """

    format: ElementFormat
    rounding: str
    overflow: Overflow
    scale: Scale | None = None
    spelling: str = field(default="", compare=False, repr=False)
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, ElementFormat):
            raise TypeError(f"the format of a cast is a FloatFormat, got {reprlib.repr(self.format)}: use parse_cast")
        if self.overflow is None or not isinstance(self.scale, Scale | None):
            given = reprlib.repr((self.overflow, self.scale))
            raise TypeError(f"a cast has an overflow mode, and a Scale or None, got {given}: use parse_cast")
        object.__setattr__(self, "rounding", full_rounding(self.rounding))
        resolve_overflow(self.format, self.overflow)  # type: ignore[arg-type]
        _check_scale(self)
        _check_transform(self)

    def __str__(self) -> str:
        return self._joined(self.format.name)

    @property
    def written(self) -> str:
        """The text of `str`, but with the format's name as the user wrote it: ``bf16/nearest_even/ovf_inf``."""
        return self._joined(self._format_as_written)

    @property
    def leaves_scale_open(self) -> bool:
        """Whether the cast was parsed from text that names no scale, not even ``unscaled``."""
        name, *modes = self.spelling.split("/")
        return bool(name) and expand(name) == name and not any(mode == UNSCALED or is_scale(mode) for mode in modes)

    @property
    def has_axis(self) -> bool:
        """Whether the result depends on the axes along which a product sums, or on the axes that form matrices."""
        return any(part is not None and part.has_axis for part in (self.scale, self.transform))

    @property
    def label(self) -> str:
        """A short text for tables: the format, and every mode that is not its default."""
        name = self._format_as_written
        parts = [name]
        if self.rounding != "nearest_even":
            parts.append(self.rounding)
        if self.overflow != usual_overflow(self.format, self.scale):
            parts.append(self.overflow)
        if self.scale and expand(name) == name:
            parts.append("scaled" if str(self.scale) == "power_of_two" else str(self.scale))
        if self.transform:
            parts.append(str(self.transform))
        return " ".join(parts)

    @property
    def grid(self) -> FloatFormat | None:
        """The floating-point format that has the values of the format; None for a codebook."""
        if isinstance(self.format, IntegerFormat):
            return self.format.grid()
        return self.format if isinstance(self.format, FloatFormat) else None

    @property
    def is_stochastic(self) -> bool:
        """Whether rounding draws random numbers."""
        return split_rounding(self.rounding)[1] > 0

    @property
    def arguments(self) -> Arguments:
        """The cast in the form that `apply_arguments` takes."""
        format, rounding, overflow, scale = self._plain_arguments
        return format, rounding, overflow, scale if self.transform is None else f"{scale or ''}/{self.transform}"

    @property
    def _plain_arguments(self) -> Arguments:
        scale = None if self.scale is None else str(self.scale)
        if self.scale is None or self.scale.rule in SCALE_OPERATORS:
            if isinstance(self.format, IntegerFormat) and self.format.is_symmetric:
                return self.format.grid().name, self.rounding, self.overflow, scale
            if not isinstance(self.format, FloatFormat):
                return self.format.name, self.rounding, self.overflow, UNSCALED
        return self.format.name, self.rounding, self.overflow, scale

    @property
    def _format_as_written(self) -> str:
        return self.spelling.partition("/")[0] or self.format.name

    def _joined(self, format: str) -> str:
        return "/".join([format, self.rounding, self.overflow, *(str(p) for p in (self.scale, self.transform) if p)])


#: The argument type of a cast: the name of a format or a cast, a `FloatFormat`, a floating-point dtype, or a `Cast`.
CastLike = str | ElementFormat | torch.dtype | Cast


def usual_overflow(fmt: ElementFormat, scale: Scale | None) -> Overflow:
    """The overflow mode if a cast names none.

    Hardware saturates the elements of scaled formats. Without a scale, and with the current scale ``power_of_two``,
    it is the format's usual mode (`fpsim.formats.resolve_overflow`).
    """
    if not isinstance(fmt, FloatFormat) or (scale is not None and str(scale) != "power_of_two"):
        return "sat_finite"
    return resolve_overflow(fmt, None)


def _check_scale(cast: Cast) -> None:
    """Raise ValueError if the format of ``cast`` does not go with its rounding or its scale."""
    fmt, scale = cast.format, cast.scale
    rule = None if scale is None else scale.rule
    if isinstance(fmt, CodebookFormat):
        if cast.rounding != "nearest_even":
            raise ValueError(f"codebooks are rounded to nearest, got rounding {cast.rounding!r}: leave it out")
        if rule == "encode" or rule not in (None, *SYMMETRIC_RULES):
            raise ValueError(f"codebook {fmt.name} takes ratios, got scale {str(scale)!r}: use group:64 or row")
    if isinstance(fmt, IntegerFormat) and rule is not None:
        if not fmt.signed and rule not in AFFINE_RULES:
            raise ValueError(f"{fmt.name} is unsigned and takes no scale {str(scale)!r}: use row:asymmetric")
        if fmt.full and rule not in (*SYMMETRIC_RULES, *AFFINE_RULES):
            raise ValueError(f"{fmt.name} takes ratios, got scale {str(scale)!r}: use row, or leave out ':full'")
    elif rule in AFFINE_RULES:
        raise ValueError(f"{fmt.name} has no zero point: scale {str(scale)!r} is for integers, such as 'uint8'")
    if isinstance(fmt, FloatFormat):
        if rule in NV_RULES and fmt.name != "e2m1fn":
            raise ValueError(f"scale {str(scale)!r} is for e2m1fn, got {fmt.name}: use mx, or block:16")
        if rule in SYMMETRIC_RULES and fmt.smallest_exponent < -24:
            raise ValueError(
                f"{fmt.name} has values below 2**-24, and its range needs no ratio: use scale mx or power_of_two"
            )
        if rule in MX_RULES and not fmt.signed:
            raise ValueError(f"{fmt.name} is unsigned and takes no scale {str(scale)!r}")
    if rule in NV_RULES and not isinstance(fmt, FloatFormat):
        raise ValueError(f"scale {str(scale)!r} is for e2m1fn, got {fmt.name}: use row or group:64")


def _check_transform(cast: Cast) -> None:
    """Raise an error if ``cast`` cannot contain its transform."""
    if cast.transform is None:
        return
    if not isinstance(cast.transform, Transform):
        raise TypeError(f"a cast has a Transform or None, got {reprlib.repr(cast.transform)}: use parse_cast")
    if not cast.transform.is_of_casts:
        raise ValueError(
            f"transform {str(cast.transform)!r} changes both operands of a product, and a cast has one tensor: name it "
            f"in a policy, transform={str(cast.transform)!r}. A cast takes {', '.join(NAMES_OF_CASTS)}"
        )
    if cast.scale is not None and cast.scale.is_timed:
        raise ValueError(
            f"scale {str(cast.scale)!r} is for operands of products, and transform {str(cast.transform)!r} is not: "
            "name a transform of products in the policy"
        )
    cast.transform.check_cast(cast.format, cast.scale)


def parse_cast(
    text: CastLike, rounding: str = "nearest_even", overflow: str | None = None, scale: str | Scale | None = None
) -> Cast | None:
    """The cast that ``text`` denotes: ``format[/rounding][/overflow][/scale][/transform]``, or ``none`` for None.

    Args:
        text: a format (a name, a `FloatFormat` or a dtype of torch: `fpsim.formats.format_name`); behind a name may
            stand modes that override the next three arguments. A `Cast` is returned unchanged.
        rounding: the rounding if ``text`` names none.
        overflow: the overflow mode if ``text`` names none; None means the format's usual mode.
        scale: the scale if ``text`` names none; ``unscaled`` in ``text`` means None.

    Raises:
        ValueError: the format or a mode is unknown. The message names the remedy.
        TypeError: ``text`` is neither a string nor a format nor a dtype nor a cast.

    >>> str(parse_cast("e8m3/toward_zero")), str(parse_cast("e4m3fn/power_of_two"))
    ('e8m3/toward_zero/ovf_inf', 'e4m3fn/nearest_even/sat_finite/power_of_two')
    """
    parsed_scale = parse_scale(scale)
    if isinstance(text, Cast):
        return text
    if isinstance(text, ElementFormat):
        return _cast(text, rounding, overflow, parsed_scale, text.name)
    text = format_name(text)
    if not isinstance(text, str):
        raise TypeError(f"a cast is a string such as 'e4m3fn' or 'e8m3/toward_zero', got {reprlib.repr(text)}")
    if text == NONE:
        return None
    name, *modes = text.split("/")
    name, *own = expand(name).split("/")
    parsed_scale = parse_scale(own[0]) if own else parsed_scale
    named: dict[str, str] = {}
    timing = "current"
    transform = None
    for mode in modes:
        if mode in ROUNDINGS or mode.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            kind, rounding = "roundings", mode
        elif mode in OVERFLOWS:
            kind, overflow = "overflow modes", mode
        elif mode == UNSCALED or is_scale(mode):
            kind, parsed_scale = "scales", None if mode == UNSCALED else parse_scale(mode)
        elif is_timing(mode):
            kind, timing = "timings", mode
        elif is_transform(mode):
            kind, transform = "transforms", parse_transform(mode)
        else:
            known = (*ROUNDINGS, *STOCHASTIC_ROUNDINGS, *OVERFLOWS, UNSCALED)
            known += (*SCALE_NAMES, *TIMING_NAMES, *NAMES_OF_CASTS)
            hint = did_you_mean(mode.partition(":")[0], first_words(known))
            raise ValueError(
                f"unknown mode {mode!r} in cast {text!r}{hint}: after the format may come a rounding "
                f"({', '.join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])}), an overflow mode ({', '.join(OVERFLOWS)}), a "
                f"scale ({', '.join([*SCALE_NAMES, UNSCALED])}), its timing ({', '.join(TIMING_NAMES)}) and a "
                f"transform ({', '.join(NAMES_OF_CASTS)})"
            )
        if kind in named:
            raise ValueError(f"cast {text!r} has two {kind}, {named[kind]} and {mode}: leave one of them out")
        named[kind] = mode
    if "timings" in named:
        parsed_scale = with_timing(parsed_scale, timing)
    fmt = _parse_element(name)
    return _cast(fmt, rounding, overflow, parsed_scale, text, transform)


def _cast(
    fmt: ElementFormat,
    rounding: str,
    overflow: str | None,
    scale: Scale | None,
    spelling: str,
    transform: Transform | None = None,
) -> Cast:
    """The cast with these modes; the overflow mode None stands for the usual one."""
    mode = usual_overflow(fmt, scale) if overflow is None else cast(Overflow, overflow)
    return Cast(fmt, full_rounding(rounding), mode, scale, spelling, transform)


#: Names of a width, which several formats have.
_OF_A_WIDTH = {
    f"{prefix}{bits}": formats
    for prefix in ("fp", "float", "f")
    for bits, formats in {8: "e4m3fn or e5m2", 6: "e2m3fn or e3m2fn", 4: "e2m1fn, mxfp4 or nvfp4"}.items()
}


def _parse_element(name: str) -> ElementFormat:
    """`parse_element`; the error names whole formats that are near."""
    try:
        return parse_element(name)
    except ValueError as error:
        message = str(error)
        if not message.startswith("unknown format"):
            raise
        spelling = name.strip().lower()
        if spelling in _OF_A_WIDTH:
            message = re.sub(
                r": (did you mean [^?]*\? )?", f": did you mean {_OF_A_WIDTH[spelling]}? ", message, count=1
            )
        near = near_names(spelling, dict.fromkeys(WHOLE_FORMATS), cutoff=0.6)
        if near and "did you mean" not in message:
            message = message.replace(": ", f": did you mean {' or '.join(near)}? ", 1)
        whole = f"Formats with scales are {', '.join(WHOLE_FORMATS)}, intN and uintN. A format is one of"
        raise ValueError(message.replace("A format is one of", whole, 1)) from None


def parse_unscaled(text: CastLike, rounding: str, overflow: str | None, values: str) -> Cast | None:
    """`parse_cast` for values that cannot be scaled; ``values`` names them in the message.

    Raises:
        ValueError: in the same cases as `parse_cast`, or if ``text`` names a scale or a transform.
    """
    parsed = parse_cast(text, rounding, overflow)
    if parsed is not None and parsed.transform is not None:
        raise ValueError(f"{values} takes no transform: leave {str(parsed.transform)!r} out of {str(text)!r}")
    if parsed is not None and parsed.scale is not None:
        raise ValueError(f"{values} cannot be scaled: leave {str(parsed.scale)!r} out of {str(text)!r}")
    return parsed


def refuse_timed(cast: Cast | None, function: str) -> None:
    """Refuse a cast whose scale depends on other steps, in a function that keeps no state.

    Raises:
        ValueError: the scale has a timing.
    """
    if cast is not None and cast.scale is not None and cast.scale.is_timed:
        raise ValueError(
            f"{function} keeps no state, and scale {str(cast.scale)!r} depends on other steps: leave out "
            f"{cast.scale.timing!r}, or use the cast in the policy of a compiled model"
        )


def check_cast(dtype: torch.dtype, cast: Cast) -> None:
    """Raise an error if tensors of ``dtype`` cannot hold the results of ``cast``.

    Raises:
        TypeError, ValueError: in the same cases as `fpsim.rounding.carriers.check_carrier`, or if ``dtype`` is float16
            and the cast has a scale.
    """
    fmt, scale = cast.format, cast.scale
    grid = (
        fmt.grid() if isinstance(fmt, IntegerFormat) else FloatFormat(8, 23) if isinstance(fmt, CodebookFormat) else fmt
    )
    if scale is None:
        check_carrier(dtype, grid)
    elif scale.rule in (*SCALE_OPERATORS, *MX_RULES):
        check_scaled_carrier(dtype, grid)
    else:  # rounded in the working dtype
        check_scaled_carrier(working_dtype(dtype) if dtype in CARRIERS and dtype != torch.float16 else dtype, grid)


# -- applying casts to tensors -----------------------------------------------------------------------------------------


def run(operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``: the ``call`` of the functions below for tensors."""
    return operator(*arguments)


def apply_cast(
    x: Any,
    cast: Cast,
    *,
    axes: Sequence[int] = (-1,),
    key: Any = None,
    factor: Callable[[Any], Any] | None = None,
    call: Callable[..., Any] = run,
    outside: bool = False,
) -> Any:
    """Apply ``cast`` to ``x``: transform, compute the scales, scale, round, scale back, and transform back.

    This and `apply_arguments` are the only code that turns a cast into operations. For tensors the operations run. The
    compiler backend passes nodes of a graph, and a ``call`` that inserts nodes.

    Args:
        x: a tensor of a dtype that `check_cast` accepts, or a node that stands for one. It must be detached from
            autograd.
        cast: how to round.
        axes: the axes of ``x`` along which a product sums: rows and blocks of elements that share a scale lie along
            them. Casts without such a scale ignore them.
        key: for a stochastic cast, and only for it, the key that ``torch.ops.fpsim.random_key`` returns.
        factor: for a cast whose scale is timed, and only for it, a function from the largest magnitude of ``x`` to the
            factor in use (`fpsim.scaling.history.in_use`), float32 without axes.
        call: calls an operator with arguments.
        outside: whether to leave out the factor that `outer_scale` gives, a ratio or the scale of NVFP4's tensor.

    Returns:
        A tensor like ``x``, or a node that stands for it.

    Raises:
        ValueError: the scale is timed and there is no ``factor``.
    """
    if cast.scale is not None and cast.scale.is_timed:
        if factor is None:
            refuse_timed(cast, "this function")
        return _apply_timed(x, cast, key, factor, call, outside)  # type: ignore[arg-type]
    return apply_arguments(x, cast.arguments, axes=axes, key=key, call=call, outside=outside)


def outer_scale(x: Any, cast: Cast, *, axes: Sequence[int], factor: Any = None, call: Callable[..., Any] = run) -> Any:
    """The factor that `apply_cast` leaves out, in the working dtype (`fpsim.scaling.steps.outer_scale`).

    ``factor`` is the one in use if the scale is timed. That of a history multiplies before rounding, and its inverse
    is left out.
    """
    if factor is not None:
        assert cast.scale is not None, "a timed scale is a scale"
        left_out = call(aten.reciprocal.default, factor) if cast.scale.order else factor
        like = x.meta["val"] if hasattr(x, "meta") else x
        return call(prims.convert_element_type.default, left_out, working_dtype(like.dtype))
    return call(outer_scale_op, x, cast.format.name, str(cast.scale), list(axes), SOURCE)


def _apply_timed(
    x: Any, cast: Cast, key: Any, factor: Callable[[Any], Any], call: Callable[..., Any], outside: bool
) -> Any:
    """`apply_cast` with a scale that other steps determine."""
    format, rounding, overflow, rule = cast.arguments
    like = x.meta["val"] if hasattr(x, "meta") else x
    if 0 in [length for length in like.shape if isinstance(length, int)]:
        return x  # it has no magnitude
    in_use = factor(call(aten.amax.default, call(aten.abs.default, x)))
    if cast.scale.rule in SCALE_OPERATORS:  # type: ignore[union-attr]
        in_use = call(prims.convert_element_type.default, in_use, like.dtype)
        if key is None:
            return call(round_op, x, format, rounding, overflow, SOURCE, in_use)
        return call(round_stochastic_op, x, key, format, rounding, overflow, SOURCE, in_use)
    words = None if key is None else call(random_words_op, x, key)
    return call(round_scaled_op, x, format, rounding, overflow, rule, [-1], SOURCE, words, in_use, outside)


def apply_arguments(
    x: Any,
    arguments: Arguments,
    *,
    axes: Sequence[int] = (-1,),
    key: Any = None,
    call: Callable[..., Any] = run,
    outside: bool = False,
) -> Any:
    """`apply_cast` in a form that Dynamo can trace, with `Cast.arguments` in place of the cast."""
    format, rounding, overflow, rule = arguments
    if rule is not None and "/" in rule:
        name, _, transform = rule.partition("/")
        if is_timing(transform):
            raise ValueError(f"scale {rule!r} depends on other steps, and this function keeps no state")
        drawn = () if key is None else (call(random_words_op, x, key),)
        return call(round_transformed_op, x, format, rounding, overflow, name, transform, list(axes), SOURCE, *drawn)
    if rule is not None and rule not in SCALE_OPERATORS:
        name = "" if rule == UNSCALED else rule
        drawn = () if key is None else (call(random_words_op, x, key),)
        if outside:
            drawn = (*(drawn or (None,)), None, True)
        return call(round_scaled_op, x, format, rounding, overflow, name, list(axes), SOURCE, *drawn)
    scale = () if rule is None else (call(SCALE_OPERATORS[rule], x, format, SOURCE),)
    if key is None:
        return call(round_op, x, format, rounding, overflow, SOURCE, *scale)
    return call(round_stochastic_op, x, key, format, rounding, overflow, SOURCE, *scale)


def in_range_of_format(
    exact: Tensor, rounded: Tensor, cast: Cast, axes: Sequence[int] = (-1,), factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tensors before and after ``cast``, both multiplied by the scales of ``exact`` if the cast has a scale.

    Args:
        axes: as for `apply_cast`.
        factor: the one in use if the scale is timed.
    """
    format, _, _, rule = cast.arguments
    if rule in (None, UNSCALED) or cast.transform is not None:
        return exact, rounded
    if factor is not None:
        assert cast.scale is not None, "a timed scale is a scale"
        multiplies = cast.scale.order or cast.scale.rule in SCALE_OPERATORS
        wide = factor.double() if multiplies else 1 / factor.double()
        return exact.double() * wide, rounded.double() * wide
    if rule in SCALE_OPERATORS:
        factor = SCALE_OPERATORS[rule](exact, format, SOURCE)
    else:
        assert cast.scale is not None, "a rule belongs to a scale"
        if exact.numel() == 0:
            return exact, rounded
        scaled = scaled_groups(exact, cast.format, cast.scale, list(axes))
        exact, rounded = exact.double(), rounded.double()
        factor = scaled.groups.restore(scaled.factors.expand_as(scaled.groups.values))
    return exact * factor, rounded * factor
