"""The roundings of tiled attention as a frozen value, and those of well-known kernels by name."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeAlias

from fpsim.accumulators.accumulator import Accumulator, parse_accumulator
from fpsim.accumulators.sums import parse_reduction
from fpsim.casts import NONE, Cast, CastLike, parse_cast, parse_unscaled
from fpsim.formats import FloatFormat
from fpsim.suggestions import did_you_mean, named_arguments

#: The fields that round the result of a step, after `FlashAttention.arithmetic` has.
STEPS = (
    "scores", "exponentials", "probabilities", "sums", "accumulator", "output", "delta", "score_gradients",
)  # fmt: skip
#: The steps whose results are never negative.
_UNSIGNED = ("exponentials", "probabilities")
_MOST_ROWS = 1 << 20


@named_arguments
@dataclass(frozen=True)
class FlashAttention:
    """How tiled attention rounds: the argument ``attention`` of `Policy`, and ``steps`` of `flash_attention`.

    The algorithm is FlashAttention-2 (T. Dao, arXiv 2307.08691), forward and backward; docs/attention.md defines every
    step. The result of every operation is rounded to `arithmetic`, and at some steps to another format after that. A
    field takes a format or an unscaled cast: ``"bf16"``, ``"bf16/toward_zero"``, ``"bf16/stochastic"``.

    Attributes:
        inputs: Q, K and V, and in backward dO, before they are multiplied. The cast may have a scale. Rows and blocks
            that share one lie along the head dimension: ``e4m3fn/block:128x256`` has a scale for every 128 rows of
            up to 256 elements. None leaves them as they are.
        arithmetic: the result of every operation of a step: of a sum of products, of a difference, of an exponential.
            It has infinities, since that is what a masked score is.
        scores: Q K^T, times the scale, plus an additive mask; in backward dO V^T too. Default: `arithmetic`, as for
            all fields that follow.
        exponentials: exp(S - m). The row sums add these.
        probabilities: the exponentials as operands of P V and of P^T dO.
        sums: the row sums, and L, the logarithm of the sum of a row.
        accumulator: the sums over blocks that give O, dQ, dK and dV, and what each block adds.
        output: O, dQ, dK and dV as they are stored.
        delta: the row sums of dO * O.
        score_gradients: dS as operand of dS K and dS^T Q.
        products: the accumulator of the sums inside matrix products, as `fpsim.matmul` takes it: ``"hopper_fp8"``,
            ``"fp32 chunk=16"``. None means those of torch, in float32 (float64 for float64 tensors).
        reductions: the accumulator of the sums of rows, of P in every tile and of dO * O, as `Policy.reductions` takes
            it: ``"bf16"``, ``"fp16 order=pairwise"``. For tensors that are not float64. None means sums in float64 that
            are rounded once.
        block_q, block_k: how many rows of Q, and of K and V, a tile has. The last tile may have fewer.
        late_scale: whether dQ and dK are multiplied by the scale once, at the end, as kernels do; or P, in every tile,
            as plain code does.
        offset: the exponentials are multiplied by 2**offset, so that a narrow format of `probabilities` is used up to
            its end. The division by the row sum takes the factor out.
        cure: in a row of a tile where several scores lie within 0.001 of the largest, m, this factor times m takes its
            place if m is positive, and 0 if m is negative. The exponentials are then below 1, and their sums do not
            err to one side (arXiv 2510.04212, there from 2 to 8). None means never.
        backward: the roundings of the backward pass, if they are others. Its own fields decide there; `offset` and
            `cure` have no meaning in it.

    Raises:
        ValueError: a field is unknown or out of range, or contradicts another one. The message names the remedy.
        TypeError: a field has another type.
    """

    # The annotations are the types that a caller may pass. `__post_init__` stores casts and other values instead.
    inputs: CastLike | None = None
    arithmetic: CastLike = "fp32"
    scores: CastLike | None = None
    exponentials: CastLike | None = None
    probabilities: CastLike | None = None
    sums: CastLike | None = None
    accumulator: CastLike | None = None
    output: CastLike | None = None
    delta: CastLike | None = None
    score_gradients: CastLike | None = None
    products: str | Accumulator | None = None
    reductions: str | Accumulator | None = None
    block_q: int = 128
    block_k: int = 128
    late_scale: bool = True
    offset: int = 0
    cure: float | None = None
    backward: FlashAttention | str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "inputs", _inputs(self.inputs))
        for name in ("arithmetic", *STEPS):
            set_(self, name, _step(name, getattr(self, name)))
        set_(self, "products", _sums("products", self.products))
        set_(self, "reductions", _sums("reductions", self.reductions))
        for name in ("block_q", "block_k"):
            _check_int(name, getattr(self, name), 1, _MOST_ROWS)
        _check_int("offset", self.offset, 0, 127)
        if not isinstance(self.late_scale, bool):
            raise TypeError(f"late_scale is True or False, got {reprlib.repr(self.late_scale)}")
        if self.cure is not None:
            set_(self, "cure", _cure(self.cure))
        if self.backward is not None:
            set_(self, "backward", parse_flash(self.backward))
        self._check_arithmetic()
        self._check_steps()
        self._check_tiles()
        self._check_backward()

    def _check_arithmetic(self) -> None:
        cast = self.arithmetic
        if not isinstance(cast, Cast) or not isinstance(cast.format, FloatFormat):
            raise ValueError(f"arithmetic={self.arithmetic!r} is no format: use 'fp32'")
        if not cast.format.has_infinity or cast.overflow == "sat_finite":
            raise ValueError(
                f"arithmetic={cast.written!r} has no infinity, and a masked score is -infinity: use 'fp32' or 'bf16', "
                "and name the narrow format at single steps"
            )

    def _check_steps(self) -> None:
        """Refuse a step that another one leaves without effect, or that lacks the numbers it has to hold."""
        before = {**dict.fromkeys(STEPS, "arithmetic"), "probabilities": "exponentials"}
        for name, earlier in before.items():
            own, given = getattr(self, name), self.cast(earlier)
            if own is None:
                continue
            assert own.grid is not None and given.grid is not None, "steps have floating-point formats"
            if own.grid != given.grid and given.grid.is_subset_of(own.grid):
                raise ValueError(
                    f"{name}={own.written!r} would change nothing, because {earlier}={given.written!r} has rounded "
                    f"these numbers before: leave {name} out, or make {earlier} wider"
                )
        for name in ("exponentials", "probabilities", "sums"):
            grid = self.cast(name).grid
            if self.offset and grid is not None and 2.0**self.offset > grid.max:
                raise ValueError(
                    f"offset={self.offset} makes exponentials as large as {2.0**self.offset:g}, and "
                    f"{name}={self.cast(name).written!r} ends at {grid.max:g}: use a smaller offset"
                )

    def _check_tiles(self) -> None:
        """Refuse scales of tiles that blocks would cut."""
        scale = self.inputs.scale if isinstance(self.inputs, Cast) else None
        if scale is None or scale.kind != "tile":
            return
        rows = scale.sizes[0]
        for name in ("block_q", "block_k"):
            block = getattr(self, name)
            if block % rows and rows % block:
                raise ValueError(
                    f"inputs has a scale for every {rows} rows, and {name}={block} would cut these: use a multiple or "
                    "a divisor"
                )

    def _check_backward(self) -> None:
        if not isinstance(self.backward, FlashAttention):
            return
        if self.backward.backward is not None:
            raise ValueError("backward has a backward of its own: leave that out")
        for name in ("offset", "cure"):
            if getattr(self.backward, name):
                raise ValueError(f"{name} has no meaning in backward, which takes the maxima of forward: leave it out")

    # -- queries -----------------------------------------------------------------------------------------------------

    def cast(self, step: str) -> Cast:
        """The cast of ``step``, one of `STEPS` or ``arithmetic``."""
        own = getattr(self, step)
        if own is None and step == "probabilities":
            own = self.exponentials
        return own if own is not None else self.arithmetic  # type: ignore[return-value]

    @property
    def in_backward(self) -> FlashAttention:
        """The roundings of the backward pass."""
        return self.backward if isinstance(self.backward, FlashAttention) else self

    @property
    def is_stochastic(self) -> bool:
        """Whether any rounding draws random numbers, forward or backward."""
        casts = [cast for cast in (self.inputs, *map(self.cast, ("arithmetic", *STEPS))) if isinstance(cast, Cast)]
        own = any(cast.is_stochastic for cast in casts)
        return own or (self.backward is not None and self.in_backward.is_stochastic)

    # -- conversions -------------------------------------------------------------------------------------------------

    def to_dict(self, spelled: bool = True) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types.

        Args:
            spelled: whether formats are spelled as the caller spelled them; otherwise equal values give equal results.
        """
        result: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Cast):
                value = value.written if spelled else str(value)
            elif isinstance(value, FlashAttention):
                value = value.to_dict(spelled)
            elif isinstance(value, Accumulator):
                value = str(value)
            is_usual = field.name == "arithmetic" and parse_cast(value) == parse_cast("fp32")
            if value != field.default and not is_usual:
                result[field.name] = value
        return result

    def written(self) -> str | dict[str, Any]:
        """The name of an equal preset, or else `to_dict`: `parse_flash` reads both."""
        return next((name for name in PRESETS if preset(name) == self), None) or self.to_dict()

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


#: An argument that names a `FlashAttention`: a preset, or fields, which may stand beside the name of a ``preset``.
FlashLike: TypeAlias = str | FlashAttention | Mapping[str, Any]

_KERNEL = {"probabilities": "{0}", "score_gradients": "{0}", "output": "{0}", "inputs": "{0}"}
#: The fields of each preset.
PRESETS: dict[str, dict[str, Any]] = {
    # FlashAttention-2 on a GPU: float32 in registers, 16-bit operands and results.
    "flash2_bf16": {name: text.format("bf16") for name, text in _KERNEL.items()},
    "flash2_fp16": {name: text.format("fp16") for name, text in _KERNEL.items()},
    # Plain torch code on bf16 tensors, as published with arXiv 2510.04212.
    "all_bf16": {"inputs": "bf16", "arithmetic": "bf16", "block_q": 512, "block_k": 512, "late_scale": False},
    # FlashAttention-3 in FP8 (arXiv 2407.08608): a scale for every block of Q, K and V. Its backward pass is in bf16.
    "flash3_fp8": {
        "inputs": "e4m3fn/block:128x256",
        "probabilities": "e4m3fn",
        "output": "bf16",
        "offset": 8,
        "backward": "flash2_bf16",
    },
}
#: The preset that ``attention="flash"`` means.
USUAL = "flash2_bf16"


@cache
def preset(name: str) -> FlashAttention:
    """The `FlashAttention` of this name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown attention {name!r}{did_you_mean(name, PRESETS)}: use one of {', '.join(PRESETS)}")
    return FlashAttention(**PRESETS[name])


def parse_flash(given: FlashLike) -> FlashAttention:
    """The `FlashAttention` that ``given`` describes: the name of a preset, or fields (with a ``preset`` to start from).

    Raises: the errors of `FlashAttention`.

    >>> parse_flash({"preset": "flash2_bf16", "block_k": 64}).block_k
    64
    """
    if isinstance(given, FlashAttention):
        return given
    if isinstance(given, str):
        return preset(USUAL if given == "flash" else given)
    if not isinstance(given, Mapping):
        raise TypeError(f"attention is a name, a FlashAttention or its fields, got {reprlib.repr(given)}")
    own = dict(given)
    start = own.pop("preset", None)
    valid = [field.name for field in fields(FlashAttention)]
    for key in own:
        if key not in valid:
            raise ValueError(
                f"unknown field {key!r} of attention{did_you_mean(key, valid)}: use {', '.join(valid)}, or preset"
            )
    if start is not None:
        preset(start)
        own = {**PRESETS[start], **own}
    return FlashAttention(**own)


@cache
def parsed(text: str) -> FlashAttention:
    """The `FlashAttention` whose ``str`` is ``text``."""
    return parse_flash(json.loads(text))


def _inputs(given: CastLike | None) -> Cast | None:
    if given is None or given == NONE:
        return None
    cast = parse_cast(given)
    assert cast is not None, "the name is not 'none'"
    if cast.transform is not None or (cast.scale is not None and cast.scale.is_timed):
        raise ValueError(
            f"inputs={cast.written!r} has a transform or a timing, which tiles do not take: use a format with a scale "
            "such as 'e4m3fn/block:128x256'"
        )
    return cast


def _step(name: str, given: CastLike | None) -> Cast | None:
    if given is None:
        return None
    cast = parse_unscaled(given, "nearest_even", None, f"{name} of attention")
    if cast is None or not isinstance(cast.format, FloatFormat):
        raise ValueError(f"{name}={given!r} is no floating-point format: use 'fp32', or leave it out")
    if not cast.format.signed and name not in _UNSIGNED:
        raise ValueError(f"{name}={given!r} has no sign, and holds numbers below zero: use a signed format")
    return cast


def _sums(name: str, given: str | Accumulator | None) -> Accumulator | None:
    if given is None:
        return None
    accumulator = parse_accumulator(given) if name == "products" else parse_reduction(given)
    if accumulator.is_stochastic or (accumulator.machine is not None and accumulator.machine.blocks):
        raise ValueError(
            f"{name}={str(accumulator)!r} draws random numbers or takes scales into its sums, which attention does not "
            "simulate: use an accumulator such as 'fp32 chunk=16'"
        )
    return accumulator


def _cure(given: float) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"cure is a factor, such as 2.0, or None, got {reprlib.repr(given)}")
    if not 1 < given < math.inf:
        raise ValueError(f"cure={given!r} would leave the largest score as it is, or below: use a factor from 2 to 8")
    return float(given)


def _check_int(name: str, given: object, least: int, most: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} is an int, got {reprlib.repr(given)}")
    if not least <= given <= most:
        raise ValueError(f"{name}={given} is out of range: use {least} to {most}")
