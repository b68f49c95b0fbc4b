"""A scale as a frozen value: the rule that computes it, the numbers that share it, and the moment it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Rule = Literal["power_of_two"]
Granularity = Literal["tensor"]
Timing = Literal["current"]

#: How a scale follows from the largest magnitude of the numbers that share it (`fpsim.scaling.rules`).
RULES: tuple[str, ...] = get_args(Rule)
#: Which numbers share a scale: all of a ``tensor``.
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
#: Which magnitudes decide: those of the ``current`` tensor.
TIMINGS: tuple[str, ...] = get_args(Timing)


@dataclass(frozen=True)
class Scale:
    """The factor by which numbers are multiplied before they are rounded, and divided after.

    Attributes:
        rule: ``power_of_two``: the largest power of two that keeps the largest magnitude in the format's range
            (`fpsim.power_of_two_scale`).
        granularity: ``tensor``: one scale for all numbers of a tensor.
        timing: ``current``: the scale of the tensor itself, computed when it is rounded.

    ``str(scale)`` is the name that `parse_scale` reads.

    Raises:
        ValueError: an unknown rule, granularity or timing.
    """

    rule: Rule
    granularity: Granularity = "tensor"
    timing: Timing = "current"

    def __post_init__(self) -> None:
        for name, valid in (("rule", RULES), ("granularity", GRANULARITIES), ("timing", TIMINGS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"unknown {name} {getattr(self, name)!r} of a scale: use one of {', '.join(valid)}")

    def __str__(self) -> str:
        return self.rule


#: The scales that have a name.
SCALES: dict[str, Scale] = {rule: Scale(rule) for rule in get_args(Rule)}


def parse_scale(name: str | Scale | None) -> Scale | None:
    """The scale that ``name`` denotes; None for None.

    Raises:
        ValueError: no such scale; the message lists the valid names.

    >>> parse_scale("power_of_two")
    Scale(rule='power_of_two', granularity='tensor', timing='current')
    """
    if name is None or isinstance(name, Scale):
        return name
    if not isinstance(name, str) or name not in SCALES:
        raise ValueError(f"unknown scale {name!r}: use one of {', '.join(SCALES)}, or None")
    return SCALES[name]
