"""Precision as a function of the step, or of the loss: schedules of policies.

A schedule is a frozen value, and its state is explicit. A model that a schedule compiles (`Scheduled`) is told of every
step, and runs under the policy of that step. Each policy is compiled once, when it is first used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.policy import Policy
from fpsim.policy.policy import is_preset

#: The backends that round; others would leave a policy out, some of them without an error.
BACKENDS = ("fpsim", "fpsim_eager")

#: A policy of a schedule. A format, or a preset whose name is no format, stands for itself, as in rules for modules,
#: and so does ``{"policy": "nvfp4"}``. Other fields replace those of the policy that the schedule is applied with; no
#: field is that policy. Fields are a mapping, or its items as nested tuples.
PolicyText = str | Mapping[str, Any] | Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class ScheduleState:
    """The state of a schedule.

    Attributes:
        step: the number of steps done.
        stage: the number of switches done, for schedules that follow the loss.
        total: the sum of the losses since the last whole interval.
        losses: the mean losses of the last intervals since the last switch.
        first_losses: the mean losses of the first intervals, which give the scale of the loss.
    """

    step: int = 0
    stage: int = 0
    total: float = 0.0
    losses: tuple[float, ...] = ()
    first_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("losses", "first_losses"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


class _Schedule:
    """What all schedules have in common."""

    def start(self) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState()

    def after(self, state: ScheduleState, loss: float | None = None) -> ScheduleState:
        """The state after a step with this loss."""
        return replace(state, step=state.step + 1)

    def text(self, state: ScheduleState) -> PolicyText:
        """The policy of the next step, as the schedule states it."""
        raise NotImplementedError

    def policy(self, state: ScheduleState, base: Policy | None = None) -> Policy:
        """The policy of the next step. Fields that the schedule states replace those of ``base``.

        Raises: the errors of `Policy`.
        """
        return _policy_of(self.text(state), base)

    def apply(self, model: nn.Module, policy: Policy | None = None, backend: str = "fpsim") -> Scheduled:
        """``model``, compiled under the policies of this schedule.

        Args:
            model: an uncompiled module.
            policy: the policy whose fields those of the schedule replace.
            backend: ``"fpsim"`` or ``"fpsim_eager"``.

        Raises: the errors of `Policy`, for the policy of the first step, and of `check_backend`.
        """
        return Scheduled(model, self, policy, backend)


@dataclass(frozen=True)
class Piecewise(_Schedule):
    """Policies by step.

    Attributes:
        stages: pairs of a first step, counted from 0, and the policy from that step on.

    >>> schedule = Piecewise(((0, {"policy": "nvfp4"}), (820, "bf16")))
    >>> schedule.policy(ScheduleState(step=819)).cast("fprop", "activation").format.name
    'e2m1fn'
    >>> schedule.policy(ScheduleState(step=820)) == Policy(format="bf16")
    True
    """

    stages: tuple[tuple[int, PolicyText], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((int(first), _frozen(text)) for first, text in self.stages))
        firsts = [first for first, _ in self.stages]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError(f"stages begin at step 0 and at rising steps, got {firsts}")
        _check_policies(text for _, text in self.stages)

    def text(self, state: ScheduleState) -> PolicyText:
        """The policy of the last stage that has begun."""
        return [text for first, text in self.stages if first <= state.step][-1]

    def __str__(self) -> str:
        return ", ".join(f"from step {first}: {_shown(text)}" for first, text in self.stages)


@dataclass(frozen=True)
class _Widths(_Schedule):
    """Policies that differ in one number, ``{bits}`` in the text of their fields."""

    fields: PolicyText
    low: int
    high: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _frozen(self.fields))
        if min(self.low, self.high, self.steps) < 1:
            raise ValueError(
                f"bits and steps are counts from 1 on, got low={self.low}, high={self.high}, steps={self.steps}"
            )
        if not any("{bits}" in text for text in _leaves(self.fields)):
            raise ValueError(f"no field depends on the step: write {{bits}} in place of a width, got {self.fields}")
        _check_policies(_with_bits(self.fields, bits) for bits in sorted({self.low, self.high}))

    def bits(self, step: int) -> int:
        """The width at ``step``, counted from 0."""
        raise NotImplementedError

    def text(self, state: ScheduleState) -> PolicyText:
        """The fields with the width of the next step."""
        return _with_bits(self.fields, self.bits(state.step))


@dataclass(frozen=True)
class Linear(_Widths):
    """A width that goes from ``low`` to ``high`` linearly in ``steps`` steps, rounded to nearest, and then stays.

    Attributes:
        fields: fields of a policy in which ``{bits}`` stands for the width.
        low, high: the widths at step 0 and at step ``steps``.
        steps: the number of steps.

    >>> schedule = Linear({"format": "int{bits}/row"}, low=4, high=8, steps=100)
    >>> [schedule.bits(step) for step in (0, 12, 13, 99, 100, 1000)]
    [4, 4, 5, 8, 8, 8]
    """

    def bits(self, step: int) -> int:
        """The width at ``step``, counted from 0."""
        return round(self.low + (self.high - self.low) * min(step / self.steps, 1))

    def __str__(self) -> str:
        return f"{_shown(self.fields)}: bits from {self.low} to {self.high} in {self.steps} steps, linearly"


@dataclass(frozen=True)
class Cyclic(_Widths):
    """A width that rises as a cosine within each cycle, and falls to ``low`` at the next one.

    Cyclic precision training (CPT): Fu et al., ICLR 2021, equation 1. With n cycles of ``steps`` steps, B(t) =
    round(low + (high - low) / 2 * (1 - cos(pi * (t mod steps) / steps))).

    Attributes:
        fields: fields of a policy in which ``{bits}`` stands for the width.
        low, high: the least and the greatest width.
        steps: the length of a cycle.

    >>> schedule = Cyclic({"activation": "int{bits}/row", "weight": "int{bits}/row"}, low=3, high=8, steps=8)
    >>> [schedule.bits(step) for step in range(10)]
    [3, 3, 4, 5, 6, 6, 7, 8, 3, 3]
    """

    def bits(self, step: int) -> int:
        """The width at ``step``, counted from 0."""
        turn = math.cos(math.pi * (step % self.steps) / self.steps)
        return round(self.low + (self.high - self.low) / 2 * (1 - turn))

    def __str__(self) -> str:
        return f"{_shown(self.fields)}: bits from {self.low} to {self.high} in cycles of {self.steps} steps"


@dataclass(frozen=True)
class Progressive(_Schedule):
    """Policies that follow each other when the loss stands still: progressive fractional quantization (PFQ).

    Fu et al., FracTrain, NeurIPS 2020; GATECH-EIC/FracTrain, ``train_pfq.py``. The mean loss of every ``interval``
    steps is kept, for the last ``keep`` intervals since a switch. When there are ``keep`` of them, and none differs
    from the last by more than a threshold times the scale of the loss, the next policy comes and they are forgotten.
    The scale is the mean over the first ``scale_intervals`` intervals, or those so far. The threshold is multiplied by
    ``decay`` at the first and at the second switch. Nothing forces a switch: the last policy may never come.

    Attributes:
        stages: the policies, in their order.
        threshold, decay: as above. The defaults are those of the code; its README has 0.05 and 0.3.
        interval: the number of steps of an interval.
        keep: the number of losses that are compared.
        scale_intervals: the number of intervals that determine the scale.

    >>> schedule = Progressive(("e2m1fn", "e4m3fn"), interval=1, keep=2, threshold=0.1)
    >>> state = schedule.start()
    >>> for loss in (2.0, 1.0, 0.9):
    ...     state = schedule.after(state, loss)
    >>> state.stage
    1
    """

    stages: tuple[PolicyText, ...]
    threshold: float = 0.15
    decay: float = 0.4
    interval: int = 400
    keep: int = 5
    scale_intervals: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(map(_frozen, self.stages)))
        if not self.stages or self.interval < 1 or self.keep < 2 or self.scale_intervals < 1:
            raise ValueError(
                "a progressive schedule has one stage or more, keeps two losses or more, and its intervals count from "
                f"1 on, got {len(self.stages)} stages, keep={self.keep}, interval={self.interval}, "
                f"scale_intervals={self.scale_intervals}"
            )
        if not (self.threshold > 0 and self.decay > 0):
            raise ValueError(f"threshold and decay are positive, got {self.threshold} and {self.decay}")
        _check_policies(self.stages)

    def after(self, state: ScheduleState, loss: float | None = None) -> ScheduleState:
        """The state after a step with this loss.

        Raises:
            ValueError: there is no loss.
        """
        if loss is None:
            raise ValueError("a progressive schedule follows the loss: call step(loss)")
        state = replace(state, step=state.step + 1, total=state.total + loss)
        if state.step % self.interval:
            return state
        mean = state.total / self.interval
        first = (*state.first_losses, mean)[: self.scale_intervals]
        state = replace(state, total=0.0, first_losses=first)
        if state.stage == len(self.stages) - 1:
            return state
        losses = (*state.losses, mean)[-self.keep :]
        if len(losses) == self.keep and self._stands_still(losses, sum(first) / len(first), state.stage):
            return replace(state, stage=state.stage + 1, losses=())
        return replace(state, losses=losses)

    def _stands_still(self, losses: Sequence[float], scale: float, stage: int) -> bool:
        threshold = self.threshold * self.decay ** min(stage, 2)
        return all(abs(loss - losses[-1]) / scale <= threshold for loss in losses[:-1])

    def text(self, state: ScheduleState) -> PolicyText:
        """The policy of the stage."""
        return self.stages[state.stage]

    def __str__(self) -> str:
        stages = "; then ".join(map(_shown, self.stages))
        return f"{stages}; next when {self.keep} losses of {self.interval} steps differ by {self.threshold} at most"


class Scheduled(nn.Module):
    """A model that runs under the policy of each step: the result of `apply` of a schedule.

    Its parameters are those of the model, and so are its other attributes. Call `step` once after every step. To
    resume, keep `state` (``dataclasses.asdict`` makes a dict of it) and assign it.

    Attributes:
        schedule: the schedule.
        base: the policy whose fields those of the schedule replace, or None.
        state: the state of the schedule.
        backend: the backend of `torch.compile`.
    """

    def __init__(self, model: nn.Module, schedule: _Schedule, base: Policy | None, backend: str) -> None:
        super().__init__()
        check_backend(backend)
        self._orig_mod = model
        self.schedule = schedule
        self.base = base
        self.backend = backend
        self.state = schedule.start()
        self._compiled: dict[Policy, Any] = {}
        self.policy.check_names_format()

    @property
    def policy(self) -> Policy:
        """The policy of the next step."""
        return self.schedule.policy(self.state, self.base)

    @property
    def compiled(self) -> Any:
        """The model, compiled under the policy of the next step: what `torch.compile` returned for it.

        Scales that other steps determine have their states in it (`fpsim.scale_state`), for each policy of its own.
        """
        policy = self.policy
        if policy not in self._compiled:
            options: dict[str, Any] = {"policy": policy}
            self._compiled[policy] = torch.compile(self._orig_mod, backend=self.backend, options=options)
        return self._compiled[policy]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The results of the model under the policy of the next step."""
        return self.compiled(*args, **kwargs)

    def step(self, loss: float | Tensor | None = None) -> None:
        """Go on to the next step.

        Args:
            loss: the loss of the step, without the factor of loss scaling; for schedules that follow it.

        Raises:
            ValueError: the schedule follows the loss, and there is none.
        """
        given = loss.detach() if isinstance(loss, Tensor) else loss
        self.state = self.schedule.after(self.state, None if given is None else float(given))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":
                raise
            return getattr(self.compiled, name)


def check_backend(backend: str) -> None:
    """Raise an error unless ``backend`` rounds as a policy says.

    Raises:
        ValueError: it is none of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} knows no policy: use one of {', '.join(BACKENDS)}")


def _policy_of(text: PolicyText, base: Policy | None) -> Policy:
    """The policy that ``text`` states; fields replace those of ``base``."""
    if isinstance(text, str):
        return Policy.preset(text) if is_preset(text) else Policy(format=text)
    fields = dict(_thawed(text))
    given = {} if base is None or "policy" in fields else base.to_dict()
    return Policy.from_options({**given, **fields})


def _check_policies(texts: Iterator[PolicyText] | Sequence[PolicyText]) -> None:
    """Raise the errors of the policies that ``texts`` state, as far as no other policy completes them."""
    for text in texts:
        _policy_of(text, None)


def _frozen(text: Any) -> Any:
    """``text`` with mappings as tuples of their items, and lists as tuples."""
    if isinstance(text, Policy):
        text = text.to_dict()
    if isinstance(text, Mapping):
        return tuple((str(key), _frozen(value)) for key, value in text.items())
    return tuple(map(_frozen, text)) if isinstance(text, list | tuple) else text


def _thawed(text: Any) -> Any:
    """``text`` with tuples of pairs, as `_frozen` made them, as mappings."""
    if not isinstance(text, tuple) or not text:
        return text
    is_mapping = all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in text)
    return {key: _thawed(value) for key, value in text} if is_mapping else tuple(map(_thawed, text))


def _leaves(text: Any) -> Iterator[str]:
    """The strings in ``text``."""
    if isinstance(text, str):
        yield text
    elif isinstance(text, tuple):
        for part in text:
            yield from _leaves(part)


def _with_bits(text: Any, bits: int) -> Any:
    """``text`` with the number in place of ``{bits}``."""
    if isinstance(text, str):
        return text.replace("{bits}", str(bits))
    return tuple(_with_bits(part, bits) for part in text) if isinstance(text, tuple) else text


def _shown(text: Any) -> str:
    """A policy in a few words: its name, or its fields with each different value once."""
    if isinstance(text, str):
        return text
    values = {value if isinstance(value, str) else _values(value) for _, value in text}
    if len(text) == 1 or (len(values) == len(text) and all(isinstance(v, str) for _, v in text)):
        return ", ".join(f"{key} {_values(value)}" for key, value in text)
    return _values(text)


def _values(value: Any) -> str:
    """The different values in ``value``, without the names of fields."""
    thawed = _thawed(value)
    if isinstance(thawed, Mapping):
        return ", ".join(dict.fromkeys(_values(_frozen(inner)) for inner in thawed.values()))
    return ", ".join(map(str, thawed)) if isinstance(thawed, tuple) else str(thawed)
