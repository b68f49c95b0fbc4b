"""Which layers of a run saturate or underflow at its end, and the cheapest remedy that a second pass confirms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from fpsim.compile_backend.observe.rounding_statistics import Statistics, merge, severity
from fpsim.compile_backend.report.profiler import Profiler
from fpsim.compile_backend.report.profiles import Profile
from fpsim.evaluate.batches import plain_errors
from fpsim.policy import Policy

from .measurements import profiled

#: The counts of `fpsim.compile_backend.observe.rounding_statistics.Statistics` that are looked at, and their verbs.
_VERBS = {"underflows": "underflow", "saturations": "saturate", "overflows": "overflow"}
#: The exponents of the powers of two by which the loss is multiplied, the smallest first.
LOSS_SCALES = (4, 8, 12, 16)
#: The share that is bad: severity 2 by `fpsim.compile_backend.observe.rounding_statistics.LIMITS`.
_BAD = 2


@dataclass(frozen=True)
class Misfit:
    """The operands in one role in one module, too many of which do not fit the format.

    Attributes:
        path: the module.
        role: ``activation``, ``weight`` or ``gradient``.
        count: ``underflows``, ``saturations`` or ``overflows``.
        share: of the operands.
    """

    path: str
    role: str
    count: str
    share: float

    def __str__(self) -> str:
        return f"{self.role}s of {self.path or 'the model'} {_VERBS[self.count]} ({100 * self.share:.3g} %)"


@dataclass(frozen=True)
class Tried:
    """A remedy, and what is left under it on the same batch.

    Attributes:
        name: the remedy in words.
        loss_scale: the factor by which it multiplies the loss scale; 1 for other remedies.
        left: the misfits that are left, the worst first; None if the model cannot be rounded so.
    """

    name: str
    left: tuple[Misfit, ...] | None
    loss_scale: float = 1.0


@dataclass(frozen=True)
class Examination:
    """The misfits of a model, the worst first, and the remedies that were tried, the cheapest first."""

    misfits: tuple[Misfit, ...] = ()
    tried: tuple[Tried, ...] = ()

    @property
    def fix(self) -> Tried | None:
        """The cheapest remedy under which no misfit is left; None if there is none."""
        return next((each for each in self.tried if each.left == ()), None)

    def sentences(self, most: int = 3) -> tuple[str, str, str]:
        """The layers that misfit, the cheapest fix that was found, and the evidence for it."""
        layers = "; ".join(map(str, self.misfits[:most]))
        more = len(self.misfits) - most
        told = layers + (f"; and {more} more" if more > 0 else "")
        evidence = "; ".join(f"{each.name}: {_left(each)}" for each in self.tried)
        return told, "none of those tried" if self.fix is None else self.fix.name, evidence

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Examination:
        """The examination from which `to_dict` made ``plain``."""
        return Examination(
            _misfits(plain["misfits"]),
            tuple(
                replace(Tried(**each), left=None if each["left"] is None else _misfits(each["left"]))
                for each in plain["tried"]
            ),
        )


def _misfits(plain: Sequence[Mapping[str, Any]]) -> tuple[Misfit, ...]:
    return tuple(Misfit(**each) for each in plain)


def _left(tried: Tried) -> str:
    if tried.left is None:
        return "cannot be simulated in this model"
    return f"{len(tried.left)} left, the worst: {tried.left[0]}" if tried.left else "none left"


def examine(model: nn.Module, policy: Policy, batch: tuple[Tensor, Tensor], *, loss_scale: float = 1.0) -> Examination:
    """The misfits of ``model`` on ``batch``, and remedies, until one leaves no misfit.

    The remedies, the cheapest first: a greater loss scale, if gradients underflow (it costs nothing); a power-of-two
    scale for every operand whose cast has none (an exponent per tensor); the head unrounded, if it misfits (bits of one
    layer); both of the latter.

    Args:
        model: from inputs and targets to the loss, or to a tuple that begins with it.
        policy: its policy.
        batch: inputs and targets.
        loss_scale: the gradient with which the backward pass begins.
    """
    profiler = Profiler(model, policy=policy)
    profile = profiled(model, profiler, batch, loss_scale=loss_scale)
    misfits = misfits_of(profile)
    tried = []
    for name, other, factor in _remedies(policy, profile, misfits) if misfits else ():
        try:
            with plain_errors(name):
                used = profiler if other is policy else Profiler(model, policy=other)
                left = misfits_of(profiled(model, used, batch, loss_scale=loss_scale * factor))
        except ValueError:
            tried.append(Tried(name, None, factor))
            continue
        tried.append(Tried(name, left, factor))
        if not left:
            break
    return Examination(misfits, tuple(tried))


def misfits_of(profile: Profile) -> tuple[Misfit, ...]:
    """The misfits in a profile, the worst first."""
    by_place: dict[tuple[str, str], list[Statistics]] = {}
    for site in profile.sites:
        if site.cast is not None and site.role in ("activation", "weight", "gradient"):
            by_place.setdefault((site.path, site.role), []).append(site.statistics)
    found = [
        Misfit(*place, count, share)
        for place, statistics in by_place.items()
        for count in _VERBS
        if severity(count, share := merge(statistics).share(count)) == _BAD
    ]
    return tuple(sorted(found, key=lambda misfit: -misfit.share))


def _remedies(policy: Policy, profile: Profile, misfits: Sequence[Misfit]) -> Iterator[tuple[str, Policy, float]]:
    """Names of remedies with a policy and a factor of the loss, the cheapest first."""
    if any((misfit.role, misfit.count) == ("gradient", "underflows") for misfit in misfits):
        for exponent in LOSS_SCALES:
            yield f"loss scale times 2^{exponent}", policy, 2.0**exponent
    scaled = policy if policy.scale is not None else replace(policy, scale="power_of_two")
    if scaled is not policy:
        yield "power-of-two scales", scaled, 1.0
    head = [site.path for site in profile.sites if site.kind == "fprop"][-1:]
    if head and any(misfit.path == head[0] for misfit in misfits) and head[0]:
        yield f"{head[0]} unrounded", policy.with_modules({head[0]: None}), 1.0
        if scaled is not policy:
            yield f"power-of-two scales, {head[0]} unrounded", scaled.with_modules({head[0]: None}), 1.0


#: The columns of `table_rows`.
COLUMNS = ("condition", "what does not fit", "cheapest fix found", "evidence")


def table_rows(examined: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    """For each condition the run with the worst misfit.

    Args:
        examined: the condition of each run, and what `Examination.to_dict` gave for it.
    """
    worst: dict[str, Examination] = {}
    for condition, plain in examined:
        found = Examination.from_dict(plain)
        if found.misfits and found.misfits[0].share > _worst(worst.get(condition)):
            worst[condition] = found
    return [[condition, *found.sentences()] for condition, found in worst.items()]


def _worst(examination: Examination | None) -> float:
    return 0.0 if examination is None else examination.misfits[0].share
