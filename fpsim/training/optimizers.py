"""Optimizers in simulated precision: their state, the weights, and the master copies of the weights.

The hooks of `torch.optim.Optimizer` do everything. The optimizer's own arithmetic is unchanged. A tensor is rounded
after the step that changes it, so between steps it holds values of its format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fpsim.casts import Cast, CastLike, check_cast, parse_cast, refuse_timed
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import check_tensor
from fpsim.rounding.kernel import FLOAT32
from fpsim.scaling.scale import POWERS_OF_TWO
from fpsim.training.fused import FUSED, OPTIMIZERS, intercept, step_and_round
from fpsim.training.in_place import Job, check_seed, draw_of_step, keys_of, round_in_place
from fpsim.training.optimizer_state import state_names, states_of_parameters, tensors_in
from fpsim.training.shards import local, shard_number, sharded_like

#: The keys of a state dict for what is saved with the optimizer's own state: tensors, the count of steps, and a
#: description of how the states were rounded.
MASTER, COMPENSATION, WEIGHTS, STEPS = "fpsim_master", "fpsim_compensation", "fpsim_weights", "fpsim_steps"
STATE = "fpsim_state"


_HOOKS = ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


# -- optimizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundedOptimizer:
    """An optimizer whose state and weights are rounded after each step: the result of `round_optimizer`.

    Attributes:
        optimizer: the optimizer. It is used as before, through ``optimizer.step()``.
        state: pairs of the name and the cast of each kind of state that is rounded.
        weights, master: the casts of the parameters and of their master copies, or None.
        kahan: whether the rounding errors of the weights are kept as compensations.
        state_of, weights_of: the parameters whose state and which themselves are rounded; None stands for all.
        least_size: states with fewer elements are not rounded.
        seed: the seed of stochastic rounding, or None.
    """

    optimizer: Optimizer
    state: tuple[tuple[str, Cast], ...]
    weights: Cast | None
    master: Cast | None
    kahan: bool
    state_of: tuple[Tensor, ...] | None = field(repr=False)
    weights_of: tuple[Tensor, ...] | None = field(repr=False)
    least_size: int
    seed: int | None
    _hooks: StepHooks = field(repr=False, compare=False)
    _handles: tuple[Any, ...] = field(repr=False, compare=False)

    @property
    def steps(self) -> int:
        """The number of steps since rounding began. It selects the draws of stochastic rounding."""
        return self._hooks.steps

    @property
    def masters(self) -> dict[Tensor, Tensor]:
        """The master copies of the parameters after the last step, if there are any. The next step changes them."""
        return dict(self._hooks.masters)

    @property
    def compensations(self) -> dict[Tensor, Tensor]:
        """The rounding errors of the parameters in the last step, if ``kahan``. The next step changes them."""
        return dict(self._hooks.compensations)

    @torch.no_grad()
    def remove(self) -> None:
        """Stop rounding. Parameters take the values of their master copies; with ``kahan`` compensations are added.

        Elements that were written since the last step stay as they are, and so do parameters that have another shape,
        dtype or device since then.
        """
        for handle in self._handles:
            handle.remove()
        self._hooks.end()


@torch.no_grad()
def round_optimizer(
    optimizer: Optimizer,
    state: CastLike | Mapping[str, CastLike] | None = None,
    *,
    weights: CastLike | None = None,
    master: CastLike | None = None,
    kahan: bool = False,
    state_of: Iterable[Tensor] | None = None,
    weights_of: Iterable[Tensor] | None = None,
    least_size: int = 0,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    seed: int | None = None,
    compiled: bool | None = None,
) -> RoundedOptimizer:
    """Simulate an optimizer whose state, weights and master weights are kept in reduced precision.

    The optimizer computes in its own dtype (for example float32). Its results are rounded in place: once by this call,
    and after every step. Every argument that takes a format also takes a cast: ``"e4m3fn/stochastic"``, or
    ``"e4m3fn/power_of_two"``, which computes a scale for every tensor (and shard) after every step.

    Args:
        optimizer: any optimizer of `torch.optim`, for-loop, foreach or fused, before or after its first step. Other
            optimizers work too if they call the hooks of `torch.optim.Optimizer`.
        state: the format of all state of the optimizer, or a mapping from the names of its state to formats:
            ``{"exp_avg": "e4m3fn", "exp_avg_sq": "bf16"}``. Counters and other scalars (``step``) are not rounded.
        weights: the format of the parameters. Without ``master`` and ``kahan`` the update is applied to rounded
            weights: ``w = round(w + update)``.
        master: the format of a master copy of the parameters. The weights are the rounded master copy: ``m = round(m +
            update, master)``, ``w = round(m, weights)`` (Micikevicius et al., Mixed Precision Training, ICLR 2018).
        kahan: whether to compensate the rounding errors of the weights. Each error is rounded (nearest-even) to the
            weights' format, and added to the weights before the next step: ``s = (w + c) + update``, ``w = round(s)``,
            ``c = round(s - w)`` (Kahan 1965; for training: Zamirai et al., Revisiting BFloat16 Training, 2020).
        state_of: the parameters of the optimizer whose state is rounded. None means all.
        weights_of: the parameters of the optimizer to which ``weights``, ``master`` and ``kahan`` apply. None means
            all.
        least_size: states with fewer elements are not rounded. The optimizers of bitsandbytes and torchao have 4096. A
            shard counts the elements on its rank.
        rounding, overflow: the modes of a cast that names none.
        seed: for stochastic rounding, and only for it. Every tensor has its own draw in every step. A parameter has
            ``n`` casts: those of its states, in alphabetical order, then the master copy, then the weights. After step
            ``t`` (0 for this call) tensor ``i`` of parameter ``j`` is rounded by ``fpsim.round(..., seed=s + n * j +
            i)``, where ``s`` is `draw_of_step(seed, t)`. Each shard of a sharded tensor has its own draw.
        compiled: whether Inductor compiles the rounding, which changes no bit. None means that it does if over a
            million numbers are rounded per step on the CPU.

    Returns:
        A frozen value that describes the rounding. Its ``remove()`` ends the rounding.

    After this call ``optimizer.state_dict()`` also holds the number of steps and, with ``master`` or ``kahan``, the
    master copies or compensations and the weights that belong to them; ``load_state_dict`` requires them. Closures
    given to ``step`` see rounded weights. A step that `torch.amp.GradScaler` skips changes nothing, also where a fused
    optimizer skips it itself: by its attribute ``found_inf``, or the scaler that its ``step`` is given.

    Parameters that are written between steps (``model.load_state_dict``, an average of weights, clipping) keep the
    values written. With ``master`` or ``kahan`` the next step compares each element with the weight that the last step
    left. Where they differ, the master copy starts anew from the value written, and the compensation from zero.

    A sparse state, such as the momentum of SGD with sparse gradients, is coalesced and its values are rounded.

    Raises:
        ValueError: a format or mode is unknown; the optimizer has no state of this name; the format of the master
            copies lacks values of the weights' format; ``master`` or ``kahan`` is given without ``weights``, or both
            are given; a format has values that a tensor's dtype lacks; a seed is missing, or has no stochastic rounding
            to seed; ``state_of`` or ``weights_of`` holds a tensor that is no parameter of the optimizer, or is given
            without ``state`` or ``weights``; the optimizer is rounded already, or lacks the hooks of
            `torch.optim.Optimizer`. Nothing is changed in these cases.
        TypeError: a tensor to round does not have a floating-point dtype.
        RuntimeError: in a step, parameters were added, or have another shape, dtype or device than their kept copies.
    """
    _check_optimizer(optimizer)
    casts = {"weights": _cast(weights, rounding, overflow), "master": _cast(master, rounding, overflow)}
    state_casts = _state_casts(optimizer, state, rounding, overflow)
    _check_weights(casts["weights"], casts["master"], kahan)
    if not state_casts and casts["weights"] is None:
        raise ValueError("nothing to round: give a format for state, weights, or both")
    check_seed(seed, [cast for cast in (*state_casts.values(), *casts.values()) if cast])

    state_items = tuple(sorted(state_casts.items()))
    chosen = {
        "state": _chosen("state", state_of, bool(state_casts), optimizer),
        "weights": _chosen("weights", weights_of, casts["weights"] is not None, optimizer),
    }
    sets = {name: None if given is None else frozenset(given) for name, given in chosen.items()}
    hooks = StepHooks(
        optimizer, state_items, casts["weights"], casts["master"], kahan, seed, sets, least_size, compiled
    )
    hooks.check_carriers()
    hooks.start()
    handles = (
        optimizer.register_step_pre_hook(hooks.before_step),
        optimizer.register_step_post_hook(hooks.after_step),
        optimizer.register_state_dict_post_hook(hooks.add_to_state_dict),
        optimizer.register_load_state_dict_pre_hook(hooks.take_from_state_dict),
        optimizer.register_load_state_dict_post_hook(hooks.finish_loading),
        *([intercept(optimizer, hooks.step_fused)] if type(optimizer) in OPTIMIZERS and compiled is not False else []),
    )
    return RoundedOptimizer(
        optimizer,
        hooks.state,
        hooks.weights,
        hooks.master,
        kahan,
        chosen["state"],
        chosen["weights"],
        least_size,
        seed,
        _hooks=hooks,
        _handles=handles,
    )


def _cast(text: CastLike | None, rounding: str, overflow: str | None) -> Cast | None:
    cast = None if text is None else parse_cast(text, rounding, overflow)
    refuse_timed(cast, "fpsim.round_optimizer")
    return cast


def _state_casts(
    optimizer: Optimizer, state: CastLike | Mapping[str, CastLike] | None, rounding: str, overflow: str | None
) -> dict[str, Cast]:
    if state is None:
        return {}
    has = state_names(optimizer)
    if not has:
        raise ValueError(f"{type(optimizer).__name__} keeps no state as it is configured: leave state out")
    if not isinstance(state, Mapping):
        state = dict.fromkeys(has, state)
    for name in state:
        if name not in has:
            known = ", ".join(has)
            raise ValueError(f"{type(optimizer).__name__} has no state {name!r}: the states it has are {known}")
    casts = {name: _cast(text, rounding, overflow) for name, text in state.items()}
    return {name: cast for name, cast in casts.items() if cast is not None}


def _chosen(
    name: str, given: Iterable[Tensor] | None, is_rounded: bool, optimizer: Optimizer
) -> tuple[Tensor, ...] | None:
    """The parameters that ``state_of`` or ``weights_of`` gives, each once and in the order of the optimizer."""
    if given is None:
        return None
    if not is_rounded:
        raise ValueError(f"{name}_of chooses among the parameters whose {name} is rounded: give {name} a format too")
    wanted = dict.fromkeys([given] if isinstance(given, Tensor) else given)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in wanted:
        if not any(tensor is p for p in parameters):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name}_of holds {shape}, which is no parameter of the optimizer: give parameters of it")
    return tuple(p for p in parameters if p in wanted)


def _check_weights(weights: Cast | None, master: Cast | None, kahan: bool) -> None:
    if weights is None and (master is not None or kahan):
        raise ValueError(f"{'kahan' if kahan else 'master'} is about rounded weights: give weights=... a format too")
    if master is not None and kahan:
        raise ValueError("kahan keeps what the weights lose, and so does a master copy: give one of the two")
    if weights is None or master is None:
        return
    if not isinstance(master.format, FloatFormat) or master.transform is not None:
        raise ValueError(f"master weights are floating-point numbers without a transform, got {master}: use fp32")
    if master.scale is not None:
        if not _is_scaled_alike(weights, master):
            raise ValueError(
                f"master weights {master} have a scale, and cannot hold weights {weights}: give the master copy no "
                "scale, or give both the scale power_of_two, and the master copy as many bits in its exponent and "
                "mantissa"
            )
        return
    inexact = weights.transform or weights.scale
    if weights.transform is not None or (weights.scale is not None and weights.scale.rule not in POWERS_OF_TWO):
        if not FLOAT32.is_subset_of(master.format):
            raise ValueError(
                f"master weights in {master.format.name} cannot hold weights with {str(inexact)!r}, which are float32 "
                "numbers: use fp32"
            )
    elif not (weights.grid or FLOAT32).is_subset_of(master.format):
        raise ValueError(
            f"master weights in {master.format.name} cannot hold weights in {weights.format.name}, which has values "
            f"that {master.format.name} lacks: give master a format with at least as many exponent and mantissa bits, "
            "such as fp32"
        )
    if weights.scale is not None and master.format.exponent_bits < 8:
        raise ValueError(
            f"master weights in {master.format.name} cannot hold scaled weights, which have the exponents of float32: "
            "give master a format with 8 exponent bits, such as bf16 or fp32"
        )


def _is_scaled_alike(weights: Cast, master: Cast) -> bool:
    """Whether master copies with a power of two for each tensor hold all weights with another one for each tensor."""
    fine, coarse = master.format, weights.grid
    if coarse is None or not isinstance(fine, FloatFormat) or weights.transform is not None:
        return False
    if any(cast.scale is None or str(cast.scale) != "power_of_two" for cast in (weights, master)):
        return False
    # both largest magnitudes lie within a factor of two below those of the formats
    reach = [math.log2(fmt.max) - fmt.smallest_exponent for fmt in (fine, coarse)]
    return fine.mantissa_bits >= coarse.mantissa_bits and reach[0] >= reach[1] + 1


def _check_optimizer(optimizer: Optimizer) -> None:
    if any(not hasattr(optimizer, f"_optimizer_{name}_hooks") for name in _HOOKS):
        raise ValueError(
            f"{type(optimizer).__name__} lacks the hooks of torch.optim.Optimizer, by which its steps are rounded: "
            "if it wraps another optimizer, round that one"
        )
    others = optimizer._optimizer_step_post_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), StepHooks) for hook in others):
        raise ValueError("this optimizer is rounded already: call remove() of what round_optimizer returned first")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("an optimizer with differentiable=True cannot be rounded in place: set it to False")


# -- hooks around a step -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class StepHooks:
    """The hooks of a rounded optimizer, and the tensors that they keep between steps."""

    optimizer: Optimizer
    state: tuple[tuple[str, Cast], ...]
    weights: Cast | None
    master: Cast | None
    kahan: bool
    seed: int | None
    #: The parameters whose ``state`` and whose ``weights`` are rounded; None stands for all.
    chosen: Mapping[str, frozenset[Tensor] | None] = field(default_factory=lambda: {"state": None, "weights": None})
    least_size: int = 0
    compiled: bool | None = None
    steps: int = 0
    masters: dict[Tensor, Tensor] = field(default_factory=dict)
    compensations: dict[Tensor, Tensor] = field(default_factory=dict)
    #: The weights as the last step left them, for the parameters that have a master copy or a compensation.
    written: dict[Tensor, Tensor] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)
    skipping: bool = False
    #: The states that the step in progress has written rounded.
    written_rounded: set[Tensor] = field(default_factory=set)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def numbered(self, kind: str) -> list[tuple[int, Tensor]]:
        """The parameters whose ``state`` or ``weights`` are rounded, each with its number in the optimizer."""
        chosen = self.chosen[kind]
        return [(j, p) for j, p in enumerate(self.parameters) if chosen is None or p in chosen]

    @property
    def weighted(self) -> list[Tensor]:
        return [p for _, p in self.numbered("weights")]

    @property
    def casts_per_parameter(self) -> int:
        return len(self.state) + 2

    def check_carriers(self) -> None:
        for p in self.weighted:
            for cast in (self.weights, self.master):
                if cast is not None:
                    check_cast(check_tensor(local(p)), cast)
        for _, p in self.numbered("state"):
            for name, cast in self.state:
                for tensor in tensors_in(self.optimizer.state.get(p, {}).get(name)) or [p]:
                    check_cast(check_tensor(local(tensor)), cast)

    def start(self) -> None:
        if self.master is not None:
            self.masters = {p: local(p).clone() for p in self.weighted}
        if self.kahan:
            self.compensations = {p: torch.zeros_like(local(p)) for p in self.weighted}
        self.written = {p: local(p).clone() for p in self.masters or self.compensations}
        self.round_state()
        self.round_weights()

    # The arithmetic below is in the carrier's dtype. Hooks run outside any compiled step.

    @torch._dynamo.disable
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._drop_loaded_entries()
        self._refuse_other_parameters()
        self.written_rounded.clear()
        self.skipping = _skips_step(optimizer, kwargs)
        if self.skipping:
            return None
        self._start_anew_where_written()
        self._widen()
        if self.weights is None:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None
        wrapped = self._with_rounded_weights(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    @torch._dynamo.disable
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.skipping:
            return
        self.steps += 1
        self.round_state()
        self.round_weights()

    def end(self) -> None:
        """Give the parameters the values from which the next step would have started, and forget what was kept."""
        self._drop_loaded_entries()
        for kept in (self.masters, self.compensations, self.written):
            for p in [p for p in kept if not _is_like(local(p), kept[p])]:
                del kept[p]
        self._start_anew_where_written()
        self._widen()
        for kept in (self.masters, self.compensations, self.written):
            kept.clear()

    def _start_anew_where_written(self) -> None:
        """Start master copies and compensations anew at the elements that were written since the last step."""
        jobs = []
        for j, p in enumerate(self.parameters):
            if p not in self.written or torch.equal(now := local(p), left := self.written[p]):
                continue
            changed = (now != left) & ~(now.isnan() & left.isnan())
            if p in self.compensations:
                self.compensations[p].masked_fill_(changed, 0)
            elif self.master is not None and changed.any():
                self.masters[p].copy_(torch.where(changed, now, self.masters[p]))
                jobs.append(Job(self.masters[p], self.master, self._draw_index(j, p, len(self.state))))
        self._round(jobs)

    def _widen(self) -> None:
        """Set the parameters to the values from which the step starts."""
        if self.masters:
            torch._foreach_copy_([local(p) for p in self.masters], list(self.masters.values()))
        if self.compensations:
            torch._foreach_add_([local(p) for p in self.compensations], list(self.compensations.values()))

    def round_state(self) -> None:
        """Round the existing state in place."""
        jobs = [
            Job(_values(tensor), cast, self._draw_index(j, p, i))
            for j, p in self.numbered("state")
            for i, (name, cast) in enumerate(self.state)
            for tensor in tensors_in(self.optimizer.state.get(p, {}).get(name))
            if tensor not in self.written_rounded and local(tensor).numel() >= self.least_size
        ]
        self.written_rounded.clear()
        self._round(jobs)

    def step_fused(self, kernel: str, lists: Sequence[Sequence[Tensor]], options: Mapping[str, Any]) -> list[int]:
        """Take the step of a fused kernel of torch and round the states as they are written: see `step_and_round`."""
        hooks = self.optimizer._optimizer_step_post_hooks.values()
        if self.skipping or next(iter(hooks)) != self.after_step:  # an earlier hook sees states that are not rounded
            return []
        numbers = {p: j for j, p in self.numbered("state") if p.numel() >= self.least_size}
        order = {name: i for i, (name, _) in enumerate(self.state)}
        casts = dict(self.state)
        draw = None if self.seed is None else draw_of_step(self.seed, self.steps + 1)

        def key_of(p: Tensor, name: str) -> Tensor | None:
            return keys_of([Job(p, casts[name], self._draw_index(numbers[p], p, order[name]))], draw)[0]

        own = [i for i, p in enumerate(lists[0]) if p in numbers]
        chosen = [[each[i] for i in own] if each else [] for each in lists]
        taken = [own[i] for i in step_and_round(kernel, chosen, options, casts, key_of, self.compiled)]
        for i in taken:
            self.written_rounded.update(
                self.optimizer.state[lists[0][i]][name] for name in FUSED[kernel].states if name in casts
            )
        return taken

    def round_weights(self) -> None:
        """Compute the master copies, the weights and the compensations from the parameters after a step."""
        if self.weights is None:
            return
        parameters = [local(p) for p in self.weighted]
        masters = list(self.masters.values())
        if self.master is not None:
            torch._foreach_copy_(masters, parameters)
            self._round(self._jobs(masters, self.master, len(self.state)))
            torch._foreach_copy_(parameters, masters)
        lost = list(self.compensations.values())
        if self.kahan:
            torch._foreach_copy_(lost, parameters)
        self._round(self._jobs(parameters, self.weights, len(self.state) + 1))
        if self.kahan:
            torch._foreach_sub_(lost, parameters)
            nearest = replace(self.weights, rounding="nearest_even")
            self._round(self._jobs(lost, nearest, 0))
        for p, left in self.written.items():
            left.copy_(local(p))

    def _jobs(self, tensors: Sequence[Tensor], cast: Cast, i: int) -> list[Job]:
        return [
            Job(tensor, cast, self._draw_index(j, p, i))
            for (j, p), tensor in zip(self.numbered("weights"), tensors, strict=True)
        ]

    def _draw_index(self, j: int, parameter: Tensor, i: int) -> int:
        shard = shard_number(parameter)
        before = len(self.parameters) * shard if shard else 0  # `parameters` is costly: this runs for each of them
        return i + self.casts_per_parameter * (j + before)

    def _round(self, jobs: list[Job]) -> None:
        draw = None if self.seed is None else draw_of_step(self.seed, self.steps)
        round_in_place(jobs, draw, compiled=self.compiled)

    def _with_rounded_weights(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that rounds the parameters, evaluates ``closure``, and restores the parameters.

        If ``closure`` raises, the parameters have the values from before the step.
        """

        def evaluate() -> Any:
            with torch.no_grad():
                parameters = [local(p) for p in self.weighted]
                exact = [p.clone() for p in parameters]
                assert self.weights is not None
                self._round(self._jobs(parameters, self.weights, len(self.state) + 1))
            after = list(self.written.values()) or exact
            try:
                with torch.enable_grad():
                    result = closure()
                after = exact
                return result
            finally:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, after)

        return evaluate

    def _refuse_other_parameters(self) -> None:
        remedy = "call remove() of what round_optimizer returned before, and round_optimizer after"
        if self.written and len(self.weighted) != len(self.written):
            raise RuntimeError(
                "parameters were added to the optimizer after round_optimizer, and have no master copies or "
                f"compensations: {remedy}"
            )
        for p, left in self.written.items():
            if not _is_like(now := local(p), left):
                raise RuntimeError(
                    f"a parameter was changed from {left.dtype} of shape {tuple(left.shape)} on {left.device} to "
                    f"{now.dtype} of shape {tuple(now.shape)} on {now.device} after round_optimizer: {remedy}"
                )

    def _drop_loaded_entries(self) -> None:
        """Drop the entries of fpsim that `finish_loading` left in the optimizer's state."""
        for state in states_of_parameters(self.optimizer.state):
            for name in (MASTER, COMPENSATION, WEIGHTS):
                state.pop(name, None)

    # State dicts hold the kept tensors and the number of steps too, under keys that begin with `fpsim_`.

    def add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = dict(state_dict["state"])
        for name, kept in self._kept():
            for j, p in self.numbered("weights") if kept else []:
                states[j] = {**states.get(j, {}), name: sharded_like(p, kept[p])}
        groups = [
            {**group, STEPS: self.steps, STATE: self._rounding_of_state()} for group in state_dict["param_groups"]
        ]
        return {**state_dict, "state": states, "param_groups": groups}

    def take_from_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict without the entries of fpsim, which are kept until the optimizer has loaded the rest.

        Raises:
            ValueError: the state dict comes from an optimizer that was not rounded in the same way.
        """
        self._check_state_dict(state_dict)
        states, groups = state_dict["state"], state_dict["param_groups"]
        indices = [index for group in groups for index in group["params"]]
        weighted = [indices[j] for j, _ in self.numbered("weights")]
        self.loading = {name: [states[index][name] for index in weighted] for name, kept in self._kept() if kept} | {
            STEPS: max(group[STEPS] for group in groups),
            STATE: groups[0].get(STATE),
        }
        names = (MASTER, COMPENSATION, WEIGHTS, STEPS, STATE)

        def own(state: Any) -> Any:
            return {k: v for k, v in state.items() if k not in names} if isinstance(state, dict) else state

        return {
            **state_dict,
            # an optimizer expects all its state, or none
            "state": {i: rest for i, state in states.items() if (rest := own(state)) or not isinstance(state, dict)},
            "param_groups": [{key: value for key, value in group.items() if key not in names} for group in groups],
        }

    def _rounding_of_state(self) -> list[str]:
        numbers = "all" if self.chosen["state"] is None else [j for j, _ in self.numbered("state")]
        return [*(f"{name} {cast}" for name, cast in self.state), f"of {numbers}, {self.least_size} elements or more"]

    def _kept(self) -> list[tuple[str, dict[Tensor, Tensor]]]:
        return [(MASTER, self.masters), (COMPENSATION, self.compensations), (WEIGHTS, self.written)]

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(STEPS not in group for group in state_dict["param_groups"]):
            raise ValueError(
                "the state dict is of an optimizer that was not rounded: load it before you call round_optimizer"
            )
        states = state_dict["state"]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [indices[j] for j, _ in self.numbered("weights") if j < len(indices)]
        for (name, kept), option in zip(self._kept(), ("master", "kahan", "master and kahan"), strict=True):
            held = [index for index in indices if name in states.get(index, {})]
            if held != (own if kept else []):
                raise ValueError(
                    f"the state dict holds {name!r} of {len(held)} parameters, and this optimizer of {len(kept)}: call "
                    f"round_optimizer with {option} as it was when the state dict was saved, and weights_of too"
                )

    @torch.no_grad()
    def finish_loading(self, optimizer: Optimizer) -> None:
        for name, kept in self._kept():
            for p, value in zip(list(kept), self.loading.get(name, []), strict=False):
                kept[p] = local(value).to(kept[p], copy=True)
                # Some optimizers then walk over what they were given, and expect all of it in their state.
                optimizer.state[p][name] = kept[p]
        self.steps = self.loading[STEPS]
        if self.loading[STATE] != self._rounding_of_state():  # some casts change numbers that they have rounded before
            self.round_state()
        self.loading = {}


def _skips_step(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Whether ``optimizer`` itself will skip the step that begins, since a `GradScaler` found a gradient not finite.

    Optimizers that declare this, and fused ones, read ``found_inf`` in their kernels, which skip at 1, or take the
    scaler in ``step``. (A group may be fused without a declaration, after the state dict of a fused optimizer.)
    """
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    if not is_fused and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    scaler = kwargs.get("grad_scaler")
    if scaler is not None:
        return any(float(found) for found in scaler._check_inf_per_device(optimizer).values())
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) == 1


def _is_like(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)


def _values(tensor: Tensor) -> Tensor:
    """The numbers of a state, in its own memory; a sparse state is coalesced first, in place."""
    if tensor.layout is torch.strided:
        return local(tensor)
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(f"a state of layout {tensor.layout} cannot be rounded: leave it out of state")
    if not tensor.is_coalesced():
        tensor.copy_(tensor.coalesce())
    return tensor.values()
