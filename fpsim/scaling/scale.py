"""Scales as frozen values: how a scale is computed, which elements share it, and which magnitudes determine it."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fpsim.suggestions import first_words, near_names, suggest

#: Rules whose scales are powers of two, by OCP MX's E8M0 codes (`fpsim.scaling.rules.mx_multiplier_code`).
MxRule = Literal["rceil", "floor", "ceil", "even"]
#: Rules whose scales are ratios of magnitudes, in float32 or rounded to bfloat16; ``encode`` multiplies by the inverse
#: ratio, ``asymmetric`` adds a zero point, ``range`` begins at the least element, and ``double`` quantizes the ratios
#: again.
RatioRule = Literal["fp32", "bf16", "encode", "asymmetric", "range", "double"]
#: Rules of NVFP4: Transformer Engine's and torchao's orders of operations, and Four Over Six by the sum of errors or of
#: their squares.
NvRule = Literal["te", "torchao", "mae", "mse"]

MX_RULES: tuple[str, ...] = get_args(MxRule)
RATIO_RULES: tuple[str, ...] = get_args(RatioRule)
#: Rules whose scales are ratios without a zero point.
SYMMETRIC_RULES: tuple[str, ...] = ("fp32", "bf16", "encode", "double")
NV_RULES: tuple[str, ...] = get_args(NvRule)
#: Rules of NVFP4 that choose between two scales of a block.
FOUR_OVER_SIX_RULES: tuple[str, ...] = ("mae", "mse")
#: Rules whose scales are a ratio of the range from the least to the greatest element, and another number.
AFFINE_RULES: tuple[str, ...] = ("asymmetric", "range")
#: Rules whose scales are powers of two. They keep the number of significant bits.
POWERS_OF_TWO: tuple[str, ...] = ("power_of_two", *MX_RULES)
#: The rules that compute a scale from the magnitudes of the elements that share it.
RULES: tuple[str, ...] = ("power_of_two", *MX_RULES, *RATIO_RULES, *NV_RULES)
#: The forms of the sets of elements that share a scale: `Scale.granularity`.
GRANULARITIES: tuple[str, ...] = ("tensor", "row", "column", "channel", "block:N", "tile:AxB", "group:N")
#: The forms of the times at which a scale is computed: `Scale.timing`.
TIMINGS: tuple[str, ...] = ("current", "history:N[:most_recent|:ms_amp]", "every:N", "calibrated")
#: How the magnitudes of earlier steps give a scale: as in Transformer Engine, or as in MS-AMP.
HISTORY_ORDERS: tuple[str, ...] = ("max", "most_recent", "ms_amp")

#: The granularities without a size.
_WHOLE = ("tensor", "row", "column", "channel")
_SIZE = re.compile(r"(?P<rows>[0-9]{1,9}x)?(?P<n>[0-9]{1,9})")
_TIMING = re.compile(
    r"(?P<kind>current|calibrated)|(?P<every>every):(?P<n>[0-9]{1,9})"
    r"|(?P<history>history):(?P<length>[0-9]{1,9})(?::(?P<order>max|most_recent|ms_amp))?"
)
_GRANULARITY = re.compile(r"tensor|row|column|channel|(?:block|group):[0-9]{1,9}|tile:[0-9]{1,9}x[0-9]{1,9}")


@dataclass(frozen=True)
class Scale:
    """A factor by which elements are divided before they are rounded, and multiplied afterwards.

    Attributes:
        rule: how the factor is computed. ``power_of_two`` is the inverse of the largest power of two that keeps the
            largest magnitude in the format's range (`fpsim.power_of_two_scale`). ``rceil``, ``floor``, ``ceil`` and
            ``even`` are the rules in use for OCP MX. ``fp32`` and ``bf16`` are the ratio of the largest magnitudes of
            the elements and of the format. ``encode`` is its inverse, max / amax in float32: elements are multiplied by
            it, and by its reciprocal afterwards. ``asymmetric`` is a ratio with a zero point. ``range`` is a
            ratio and the least element, from which integers count, so that zero may be no value. ``double`` is a ratio
            whose difference from the mean of all ratios is quantized to 8 bits, as in QLoRA. ``te`` and ``torchao`` are
            NVFP4's scales, in these libraries' orders of operations. ``mae`` and ``mse`` are NVFP4's with Four Over Six
            (arXiv 2512.02010): the largest magnitude of a block becomes 6 or 4, by the smaller error.
        granularity: which elements share a factor: those of the ``tensor``; of a ``row``, which runs along the axis; of
            a ``column``, which runs across it; of a ``block:N``, N elements in a row along the axis; of a ``tile:AxB``,
            B along the axis and A along the other one of the last two axes; of a ``group:N``, N elements in a row of
            the flattened tensor; of a ``channel``, those with one index of the first axis. The last two are of the
            tensor itself, not of a view of it: a channel of a weight is an output channel in fprop and in dgrad.
        timing: which magnitudes determine the factor. ``current`` means those of the tensor itself, when it is rounded.
            ``history:N`` means the largest of the last N steps (delayed scaling) as in Transformer Engine, with
            ``:most_recent`` the last one, with ``:ms_amp`` as in MS-AMP (`fpsim.scaling.history`). ``every:N`` computes
            the factor anew in every Nth step. ``calibrated`` means a fixed factor (`fpsim.calibrate`).

    ``str(scale)`` is a name that `parse_scale` reads.

    Raises:
        ValueError: the rule, the granularity or the timing is unknown, or the rule does not go with the granularity.
    """

    rule: str
    granularity: str = "tensor"
    timing: str = "current"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise ValueError(f"unknown rule {reprlib.repr(self.rule)} of a scale: use one of {', '.join(RULES)}")
        if not isinstance(self.granularity, str) or not _GRANULARITY.fullmatch(self.granularity):
            raise ValueError(
                f"unknown granularity {reprlib.repr(self.granularity)} of a scale: use one of "
                f"{', '.join(GRANULARITIES)}"
            )
        if 0 in self.sizes:
            raise ValueError(f"a block has at least one element, got {self.granularity!r}")
        if self.rule == "power_of_two" and self.granularity != "tensor":
            raise ValueError(f"rule 'power_of_two' is of whole tensors, got {self.granularity!r}: use rule 'rceil'")
        if self.rule in MX_RULES and self.kind not in ("block", "tile", "row", "tensor"):
            raise ValueError(f"rule {self.rule!r} takes blocks, tiles, rows or tensors, got {self.granularity!r}")
        if self.rule == "range" and self.kind not in ("tensor", "row", "column", "channel"):
            raise ValueError(f"rule 'range' takes tensors, rows, columns or channels, got {self.granularity!r}")
        if self.rule == "double" and self.kind != "group":
            raise ValueError(f"rule 'double' takes groups, got {self.granularity!r}: use group:64:double")
        if self.rule in NV_RULES and self.granularity not in ("block:16", "tile:16x16"):
            raise ValueError(f"rule {self.rule!r} takes block:16 or tile:16x16, got {self.granularity!r}")
        self._check_timing()

    def _check_timing(self) -> None:
        timing = _TIMING.fullmatch(self.timing) if isinstance(self.timing, str) else None
        if timing is None:
            raise ValueError(f"unknown timing {reprlib.repr(self.timing)} of a scale: use one of {', '.join(TIMINGS)}")
        if (timing["n"] or timing["length"]) is not None:
            object.__setattr__(self, "timing", _canonical_timing(timing))
        if self.is_timed and self.steps < 1:
            raise ValueError(f"timing {self.timing!r} counts steps: use 1 or more")
        if self.is_timed and self.granularity != "tensor":
            raise ValueError(
                f"timing {self.timing!r} is for scales of whole tensors, got {self.granularity!r}: use tensor or "
                "power_of_two"
            )
        valid = ("power_of_two", "fp32") if self.order else ("power_of_two", "fp32", "bf16")
        if self.is_timed and self.rule not in valid:
            raise ValueError(f"timing {self.timing!r} takes the rules {' and '.join(valid)}, got {self.rule!r}")

    @property
    def is_timed(self) -> bool:
        """Whether the factor depends on other steps than the current one, so that it needs a state."""
        return self.timing != "current"

    @property
    def steps(self) -> int:
        """The number of steps in ``history:N`` and ``every:N``; 1 for other timings."""
        timing = _TIMING.fullmatch(self.timing)
        return int(timing["n"] or timing["length"] or 1) if timing else 1

    @property
    def order(self) -> str | None:
        """How a history gives a scale, one of `HISTORY_ORDERS`; None without a history."""
        timing = _TIMING.fullmatch(self.timing)
        return (timing["order"] or "max") if timing and timing["history"] else None

    @property
    def kind(self) -> str:
        """The granularity without its sizes: ``block``."""
        return self.granularity.partition(":")[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a block, tile or group: for a tile first the one across the axis."""
        return tuple(map(int, self.granularity.partition(":")[2].split("x"))) if ":" in self.granularity else ()

    @property
    def has_axis(self) -> bool:
        """Whether the elements that share a factor depend on the axis, or on the axes that form matrices."""
        return self.kind in ("row", "column", "block", "tile")

    @property
    def is_square(self) -> bool:
        """Whether the elements that share a factor are those of square tiles."""
        return self.kind == "tile" and self.sizes[0] == self.sizes[1]

    def __str__(self) -> str:
        return f"{self._factor}/{self.timing}" if self.is_timed else self._factor

    @property
    def _factor(self) -> str:
        """The name of the scale without its timing."""
        if self.rule == "power_of_two":
            return self.rule
        sizes = "x".join(map(str, self.sizes))
        if self.rule in MX_RULES and self.kind == "block":
            return f"mx:{sizes}:{self.rule}"
        if self.rule in NV_RULES:
            return f"nv:{sizes}:{self.rule}"
        kind = "block" if self.kind == "tile" else self.kind
        return ":".join(part for part in (kind, sizes, self.rule) if part)


#: What scales may be called, for messages.
SCALE_NAMES = (
    "power_of_two", "tensor[:fp32|:bf16|:encode|:range]", "row", "column", "channel",
    "mx[:32][:rceil|:floor|:ceil|:even]", "nv[:16x16][:torchao|:mae|:mse]", "block:128[:fp32|:power_of_two]",
    "block:128x128", "group:64[:asymmetric|:double]",
)  # fmt: skip
#: The form of a timing behind a scale, for messages.
TIMING_NAMES = ("history:16[:most_recent|:ms_amp]", "every:16", "calibrated")


def parse_scale(name: str | Scale | None) -> Scale | None:
    """The scale that ``name`` denotes; None for None.

    Raises:
        ValueError: there is no such scale. The message lists the valid names.

    >>> parse_scale("mx")
    Scale(rule='rceil', granularity='block:32', timing='current')
    >>> str(parse_scale("block:128x128"))
    'block:128x128:fp32'
    >>> str(parse_scale("tensor/history:1024"))
    'tensor:fp32/history:1024'
    """
    if name is None or isinstance(name, Scale):
        return name
    factor, slash, timing = name.partition("/") if isinstance(name, str) else ("", "", "")
    scale = _parse(factor)
    if scale is None or (slash and not is_timing(timing.strip().lower())):
        first = factor.partition(":")[0]
        others = (word for word in first_words(SCALE_NAMES) if word != first)
        hint = suggest(near_names(first, others, most=1, cutoff=0.7))
        raise ValueError(
            f"unknown scale {reprlib.repr(name)}{hint}: use one of {', '.join(SCALE_NAMES)}, or None. Behind it may "
            f"stand / and one of {', '.join(TIMING_NAMES)}"
        )
    return with_timing(scale, timing.strip().lower()) if slash else scale


def with_timing(scale: Scale | None, timing: str) -> Scale:
    """``scale`` with another timing.

    Raises:
        ValueError: there is no scale, or the timing is unknown or does not go with it.
    """
    if scale is None:
        raise ValueError(f"timing {timing!r} belongs to a scale: write tensor/{timing} or power_of_two/{timing}")
    return replace(scale, timing=timing)


def is_timing(name: str) -> bool:
    """Whether ``name`` begins like a timing, so that `with_timing` either reads it or says why it cannot."""
    return name.partition(":")[0] in ("current", "history", "every", "calibrated")


def _canonical_timing(timing: re.Match[str]) -> str:
    if timing["every"]:
        return f"every:{int(timing['n'])}"
    order = timing["order"] or "max"
    return f"history:{int(timing['length'])}" + ("" if order == "max" else f":{order}")


def is_scale(name: str) -> bool:
    """Whether ``name`` begins like a scale, so that `parse_scale` either reads it or says why it cannot."""
    return name.partition(":")[0] in (
        "power_of_two",
        "tensor",
        "row",
        "column",
        "channel",
        "mx",
        "nv",
        "block",
        "group",
    )


def _parse(name: str) -> Scale | None:
    kind, *options = name.strip().lower().split(":")
    if kind == "power_of_two":
        return None if options else Scale("power_of_two")
    size = _SIZE.fullmatch(options[0]) if options else None
    if size is not None:
        options = options[1:]
    if len(options) > 1 or not is_scale(kind):
        return None
    rule = options[0] if options else {"mx": "rceil", "nv": "te"}.get(kind, "fp32")
    if rule == "power_of_two":
        rule = "power_of_two" if kind == "tensor" else "rceil"
    valid = {"mx": MX_RULES, "nv": NV_RULES}.get(kind, (*RATIO_RULES, *MX_RULES, "power_of_two"))
    if rule not in valid or (kind in _WHOLE and size is not None):
        return None
    if kind in _WHOLE:
        return Scale(rule, kind)
    if size is None:
        if kind not in ("mx", "nv"):
            return None
        return Scale(rule, "block:32" if kind == "mx" else "block:16")
    if size["rows"]:
        return None if kind == "group" else Scale(rule, f"tile:{int(size['rows'][:-1])}x{int(size['n'])}")
    return Scale(rule, f"{'group' if kind == 'group' else 'block'}:{int(size['n'])}")
