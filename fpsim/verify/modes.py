"""The combinations that ``fpsim verify --all`` verifies: formats, roundings, overflow modes, carriers and paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from fpsim.formats import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    FloatFormat,
    Overflow,
    full_rounding,
    parse_format,
    resolve_overflow,
)
from fpsim.rounding.carriers import CARRIERS
from fpsim.verify.codes import name_of

#: The ways to run `fpsim.round` that `verify` checks.
PATHS: tuple[str, ...] = ("eager", "compiled")
#: The stochastic roundings that `plan` lists by default, each with the usual overflow mode only.
STOCHASTIC_SAMPLES: tuple[str, ...] = ("stochastic:23", "stochastic:8", "stochastic_b:8", "stochastic_c:8")

#: The roundings that `plan` compiles with overflow modes that are not the format's usual one.
COMPILED_WITH_EVERY_OVERFLOW: tuple[str, ...] = ("nearest_even", "up")
#: The formats that `plan` compiles on carriers other than float32, if it has more formats than these.
COMPILED_ON_EVERY_CARRIER: tuple[str, ...] = ("e5m2", "e4m3fn", "e4m3fnuz", "e2m1fn")

# The most modes in a group of one of the other carriers. Smaller groups take longer to compile in all; with larger
# ones, one process is still busy when the others have nothing left to do.
_MODES_PER_GROUP = 16


class Mode(NamedTuple):
    """One way to round, in full. Each `Verdict` is about one mode.

    Attributes:
        format: the target format.
        rounding: a direction, or a stochastic rounding with its number of random bits.
        overflow: the mode in force, never None.
    """

    format: FloatFormat
    rounding: str
    overflow: Overflow

    def __str__(self) -> str:
        return f"{self.format.name} {self.rounding} {self.overflow}"


def mode_of(format: str | FloatFormat, rounding: str = "nearest_even", overflow: str | None = None) -> Mode:
    """The `Mode` of these arguments of `fpsim.round`.

    Raises:
        ValueError: an unknown format, rounding or overflow mode, or one that the format does not take.

    >>> str(mode_of("e5m2", "stochastic"))
    'e5m2 stochastic:23 ovf_inf'
    """
    fmt = parse_format(format)
    return Mode(fmt, full_rounding(rounding), resolve_overflow(fmt, overflow))


class Group(NamedTuple):
    """Modes of one carrier that are verified together: compiled as one function, and given the same inputs.

    Attributes:
        modes: one or more.
        dtype: the carrier.
        paths: which of `PATHS`: ``eager`` calls, ``compiled`` code as in training (it needs a C++ compiler), or both.
    """

    modes: tuple[Mode, ...]
    dtype: torch.dtype
    paths: tuple[str, ...] = PATHS

    def __str__(self) -> str:
        names = " ".join(dict.fromkeys(mode.format.name for mode in self.modes))
        return f"{names} on {name_of(self.dtype)}"


def plan(
    formats: Iterable[str | FloatFormat] = NAMED_FORMATS,
    *,
    roundings: Sequence[str] | None = None,
    overflows: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    paths: Sequence[str] = PATHS,
) -> tuple[Group, ...]:
    """The groups of modes that ``fpsim verify --all`` verifies.

    On float32 (float64 for formats that float32 cannot carry) they hold every rounding direction with every overflow
    mode that the format takes, and `STOCHASTIC_SAMPLES` with the usual overflow mode. All are called eagerly. A mode
    takes a fifth of a second to compile, so only some are compiled: those with the usual overflow mode, and the
    roundings in `COMPILED_WITH_EVERY_OVERFLOW` with the other overflow modes. If ``roundings`` or ``overflows`` are
    given, all are compiled.

    On the other carriers they hold every format that is narrower than the carrier, with nearest-even and
    ``stochastic:8`` rounding and the usual overflow mode. With many formats, only those in
    `COMPILED_ON_EVERY_CARRIER` are compiled.

    Args:
        formats: names or `FloatFormat` instances.
        roundings, overflows: if given, the only ones; they are combined with one another on every carrier.
        dtypes: if given, the only carriers.
        paths: which of `PATHS`.

    Raises:
        ValueError: an unknown format, mode or path, or no mode is left to verify.

    >>> [(len(group.modes), group.paths) for group in plan(["e4m3fn"], dtypes=[torch.float32])]
    [(14, ('eager', 'compiled')), (8, ('eager',))]
    """
    fmts = list(dict.fromkeys(parse_format(name) for name in formats))
    for overflow in overflows or ():
        if overflow not in OVERFLOWS:
            raise ValueError(f"unknown overflow mode {overflow!r}: use one of {', '.join(OVERFLOWS)}")
    wanted = tuple(dict.fromkeys(full_rounding(rounding) for rounding in roundings)) if roundings else None
    main = {fmt: torch.float32 if fmt.is_subset_of(CARRIERS[torch.float32]) else torch.float64 for fmt in fmts}
    paths, groups = check_paths(paths), []
    for fmt, dtype in main.items():
        modes = _modes(fmt, wanted, overflows)
        eager_only = [] if wanted or overflows or "eager" not in paths else [m for m in modes if not _is_compiled(m)]
        if "compiled" not in paths:
            eager_only = []
        groups.append(Group(tuple(mode for mode in modes if mode not in eager_only), dtype, paths))
        groups.append(Group(tuple(eager_only), dtype, ("eager",)))
    for dtype, carrier in CARRIERS.items():
        others = [fmt for fmt in fmts if dtype != main[fmt] and fmt != carrier and fmt.is_subset_of(carrier)]
        few = wanted or ("nearest_even", "stochastic:8")
        many = len(others) > len(COMPILED_ON_EVERY_CARRIER) and "eager" in paths
        for compiled in (True, False):
            fmts_of_path = [fmt for fmt in others if compiled is (not many or fmt.name in COMPILED_ON_EVERY_CARRIER)]
            rest = [mode for fmt in fmts_of_path for mode in _modes(fmt, few, overflows or _usual(fmt))]
            groups += [
                Group(tuple(rest[i : i + _MODES_PER_GROUP]), dtype, paths if compiled else ("eager",))
                for i in range(0, len(rest), _MODES_PER_GROUP)
            ]
    groups = [group for group in groups if group.modes and (dtypes is None or group.dtype in dtypes)]
    if not groups:
        raise ValueError(
            f"nothing to verify: none of {', '.join(fmt.name for fmt in fmts) or 'no formats'} takes these overflow "
            "modes and fits into these carriers"
        )
    return tuple(groups)


def _modes(fmt: FloatFormat, roundings: Sequence[str] | None, overflows: Sequence[str] | None) -> tuple[Mode, ...]:
    """All combinations that ``fmt`` takes.

    Without ``roundings`` they are all directions, and `STOCHASTIC_SAMPLES` with the usual overflow mode.
    """
    taken = [mode for mode in overflows or OVERFLOWS if mode == "sat_finite" or fmt.has_infinity or fmt.has_nan]
    if roundings is not None:
        return tuple(mode_of(fmt, rounding, overflow) for overflow in taken for rounding in roundings)
    usual = [mode for mode in taken if mode in (overflows or _usual(fmt))]
    return _modes(fmt, ROUNDINGS, taken) + _modes(fmt, STOCHASTIC_SAMPLES, usual) if taken else ()


def _is_compiled(mode: Mode) -> bool:
    return mode.overflow in _usual(mode.format) or mode.rounding in COMPILED_WITH_EVERY_OVERFLOW


def check_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths, each once.

    Raises:
        ValueError: an unknown path, or none.
    """
    unknown = [path for path in paths if path not in PATHS]
    if unknown or not paths:
        raise ValueError(f"unknown path {unknown[0]!r}: use {' or '.join(PATHS)}" if unknown else "no path to verify")
    return tuple(dict.fromkeys(paths))


def _usual(fmt: FloatFormat) -> tuple[str, ...]:
    return (resolve_overflow(fmt, None),)
