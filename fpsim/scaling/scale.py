"""Scales as frozen values: how a scale is computed, which elements share it, and which magnitudes determine it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Literal, get_args

Rule = Literal["power_of_two"]
Granularity = Literal["tensor"]
Timing = Literal["current"]

#: The rules that compute a scale from the largest magnitude of the elements that share it (`fpsim.scaling.rules`).
RULES: tuple[str, ...] = get_args(Rule)
#: The sets of elements that share a scale: all elements of a ``tensor``.
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
#: The tensor whose magnitudes determine the scale: the ``current`` one.
TIMINGS: tuple[str, ...] = get_args(Timing)


@dataclass(frozen=True)
class Scale:
    """A factor by which a tensor is multiplied before it is rounded, and divided afterwards.

    Attributes:
        rule: how the factor is computed. ``power_of_two`` is the largest power of two that keeps the largest magnitude
            in the format's range (`fpsim.power_of_two_scale`).
        granularity: which elements share a factor. ``tensor`` is one factor for all elements of a tensor.
        timing: which magnitudes determine the factor. ``current`` means those of the tensor itself, when it is rounded.

    ``str(scale)`` is the name that `parse_scale` reads.

    Raises:
        ValueError: the rule, the granularity or the timing is unknown.
    """

    rule: Rule
    granularity: Granularity = "tensor"
    timing: Timing = "current"

    def __post_init__(self) -> None:
        for name, valid in (("rule", RULES), ("granularity", GRANULARITIES), ("timing", TIMINGS)):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in valid:
                raise ValueError(f"unknown {name} {reprlib.repr(given)} of a scale: use one of {', '.join(valid)}")

    def __str__(self) -> str:
        return self.rule


#: The scales that have names.
SCALES: dict[str, Scale] = {rule: Scale(rule) for rule in get_args(Rule)}


def parse_scale(name: str | Scale | None) -> Scale | None:
    """The scale that ``name`` denotes; None for None.

    Raises:
        ValueError: there is no such scale. The message lists the valid names.

    >>> parse_scale("power_of_two")
    Scale(rule='power_of_two', granularity='tensor', timing='current')
    """
    if name is None or isinstance(name, Scale):
        return name
    if not isinstance(name, str) or name not in SCALES:
        raise ValueError(f"unknown scale {reprlib.repr(name)}: use one of {', '.join(SCALES)}, or None")
    return SCALES[name]
