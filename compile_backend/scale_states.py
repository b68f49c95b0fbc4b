"""The states of scales that other steps determine: delayed scaling, renewed scales, calibrated scales.

Every compiled model has a `ScaleStates`. A graph with such scales has one more input, the *handle*, which tells the
operator `timed_factor` where the states are. The operator notes the largest magnitude of a tensor, and returns the
factor in use. Noting is idempotent, and a factor does not change while a step runs.

A step ends for forward sites when a call of the compiled model that may be differentiated ends, and for backward sites
when a backward pass ends (Transformer Engine). With ``ms_amp`` it ends for both when an optimizer has stepped.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fpsim.compile_backend.errors import UnroundedError
from fpsim.formats import parse_element
from fpsim.scaling.history import History, advanced, in_use, start
from fpsim.scaling.scale import Scale, parse_scale
from fpsim.suggestions import near_names, suggest

Phase = Literal["forward", "backward"]

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "timed_factor(Tensor amax, Tensor handle, str site, str phase, str element, str scale, str source) -> Tensor"
)
#: Returns the factor in use, float32 without axes. Arguments: the largest magnitude of a tensor, the handle, the name
#: of the site, its phase, the element format, the scale, and `fpsim.rounding.ops.SOURCE`.
timed_factor_op: Callable[..., Tensor] = torch.ops.fpsim.timed_factor.default

#: An example of a handle.
HANDLE = torch.zeros(3, dtype=torch.int64)


@torch.library.impl(_library, "timed_factor", "CompositeExplicitAutograd")
def _timed_factor(
    amax: Tensor, handle: Tensor, site: str, phase: Phase, element: str, scale: str, source: str
) -> Tensor:
    number, position, records = handle.tolist()
    name = f"graph {position}: {site}" if position else site
    states = _live.get(number)
    if states is None:
        raise RuntimeError("a backward pass runs after its compiled model is gone: keep the model until then")
    # Compiled code uses the memory of its intermediate results again.
    return states.factor(_Kind(element, scale, phase), name, amax.to(torch.float32, copy=True), bool(records))


@torch.library.register_fake("fpsim::timed_factor", lib=_library)
def _timed_factor_fake(
    amax: Tensor, handle: Tensor, site: str, phase: str, element: str, scale: str, source: str
) -> Tensor:
    return amax.new_empty((), dtype=torch.float32)


@dataclass(frozen=True)
class _Kind:
    """The facts that sites share if their states lie in one table."""

    element: str
    scale: str
    phase: Phase

    @property
    def parsed(self) -> Scale:
        scale = parse_scale(self.scale)
        assert scale is not None, "a timed site has a scale"
        return scale


@dataclass
class _Table:
    """The states of the sites of one kind, one in each row.

    Attributes:
        names: the names of the sites.
        history: their states.
        seen: for each row the largest magnitude in the step under way, if the row took part.
    """

    names: list[str]
    history: History
    seen: dict[int, Tensor] = field(default_factory=dict)


class ScaleStates:
    """The states of all timed scales of one compiled model.

    Args:
        model: the function or bound method that was compiled.
    """

    def __init__(self, model: Any = None) -> None:
        self.number = next(_numbers)
        self.tables: dict[_Kind, _Table] = {}
        self.is_calibrating = False
        self._loaded: dict[str, Mapping[str, Any]] = {}
        self._module = getattr(model, "__self__", None)
        self._parameters: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._position = 0
        self._backward: int | None = None
        self._copy: ScaleStates | None = None
        _live[self.number] = self

    # -- while a model runs ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A call of the compiled model."""
        if torch.is_grad_enabled() and any(table.seen for table in self.tables.values()):
            self.advance("backward")  # sites of backward that ran in forward, without a backward pass
        position, self._position = self._position, 0
        _thread.stack.append(self)
        try:
            yield
        finally:
            _thread.stack.pop()
            self._position = position
        if torch.is_grad_enabled():
            self.advance("forward")

    def handle(self, inputs: Iterable[Any]) -> Tensor:
        """The handle for a run of a graph.

        Args:
            inputs: those of the graph. Parameters among them tell which optimizer belongs to the model.
        """
        if torch._C._current_graph_task_id() != -1:
            raise UnroundedError(
                "a backward pass runs the forward pass of a model with delayed scales again, when these have changed: "
                "put torch.utils.checkpoint inside the compiled model, so that it keeps the scales"
            )
        self._parameters.update((id(x), x) for x in inputs if isinstance(x, nn.Parameter))
        self._position += 1
        return torch.tensor([self.number, self._position - 1, int(torch.is_grad_enabled() or self.is_calibrating)])

    def factor(self, kind: _Kind, name: str, amax: Tensor, records: bool) -> Tensor:
        """The factor in use at a site of which the tensor has the largest magnitude ``amax``.

        Args:
            records: whether the site takes part in the step.
        """
        task = torch._C._current_graph_task_id()
        if task != -1 and kind.phase == "forward":
            raise UnroundedError(f"backward computes a forward scale again ({name}), when it has changed")
        row, table = self._row(kind, name, amax.device)
        scale = kind.parsed
        if scale.timing == "calibrated" and not self.is_calibrating and not table.history.updates[row]:
            raise RuntimeError(
                f"site {_full_name(kind, name)!r} has no calibrated scale"
                f"{suggest(near_names(_full_name(kind, name), self._loaded))}: call fpsim.calibrate with batches that "
                "reach it, and give the result to fpsim.load_scale_state"
            )
        own = History(*(getattr(table.history, each)[row : row + 1] for each in ("factors", "amaxes", "updates")))
        if self.is_calibrating:
            own = replace(own, updates=torch.zeros_like(own.updates))
            scale = replace(scale, timing="every:1")
        result = in_use(own, amax[None], parse_element(kind.element), scale)[0].clone()
        if records:
            before = table.seen.get(row)
            table.seen[row] = amax if before is None else torch.maximum(before, amax)
            if task not in (-1, self._backward):
                self._backward = task
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        return result

    def settled_factor(self, name: str, phase: Phase, element: str, scale: str) -> Tensor:
        """The factor of a forward site that a run without gradients uses, whatever the tensor there.

        Raises:
            ValueError: the site has no state yet, or its factor depends on the tensor in this step.
        """
        kind = _Kind(element, scale, phase)
        row, table = self._row(kind, name, torch.device("cpu"))
        own = History(*(getattr(table.history, each)[row : row + 1] for each in ("factors", "amaxes", "updates")))
        if not own.updates[0]:
            raise ValueError(
                f"scale {scale!r} at {name!r} has no state: give scales=fpsim.scale_state(compiled) after steps of the "
                "compiled model, or scales=fpsim.calibrate(model, batches, policy)"
            )
        factors = [in_use(own, torch.tensor([amax]), parse_element(element), kind.parsed) for amax in (1.0, 1000.0)]
        if factors[0] != factors[1]:
            raise ValueError(
                f"scale {scale!r} at {name!r} is computed from the tensor itself in the step that is due, and is no "
                "constant: take the state after one more step"
            )
        return factors[0][0].clone()

    def _row(self, kind: _Kind, name: str, device: torch.device) -> tuple[int, _Table]:
        if kind not in self.tables:
            self.tables[kind] = _Table([], start(0, kind.parsed, device))
        table = self.tables[kind]
        if name not in table.names:
            loaded = self._loaded.get(_full_name(kind, name))
            new = start(1, kind.parsed, device) if loaded is None else _history_of(loaded, kind, name, device)
            if loaded is not None and loaded["seen"] is not None:
                table.seen[len(table.names)] = loaded["seen"].to(device)
            table.names.append(name)
            table.history = History(
                *(torch.cat([getattr(table.history, each), getattr(new, each)]) for each in vars(new))
            )
        return table.names.index(name), table

    def _end_backward(self) -> None:
        self._backward = None
        self.advance("backward")

    def advance(self, phase: Phase, order: str | None = None) -> None:
        """End a step for the sites of ``phase`` whose scales do not wait for an optimizer.

        Args:
            order: ``ms_amp`` for those that do.
        """
        for kind in sorted(self.tables, key=str):
            scale, table = kind.parsed, self.tables[kind]
            waits = "ms_amp" if scale.order == "ms_amp" else None
            if kind.phase != phase or waits != order or scale.timing == "calibrated":
                continue
            self._advance(kind, table)

    def _advance(self, kind: _Kind, table: _Table) -> None:
        ranks = kind.parsed.order is not None and dist.is_initialized() and dist.get_world_size() > 1
        if not table.seen and not ranks:
            return
        device = table.history.factors.device
        zero = torch.zeros((), device=device)
        rows = range(len(table.names))
        latest = torch.stack([table.seen.get(row, zero) for row in rows])
        ran = torch.tensor([row in table.seen for row in rows], device=device)
        if ranks:
            latest, ran = _over_ranks(latest, ran, table.names, kind)
        table.seen = {}
        table.history = advanced(table.history, latest, ran, parse_element(kind.element), kind.parsed)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """End a step of MS-AMP if ``optimizer`` trains a parameter of the model."""
        if not any(kind.parsed.order == "ms_amp" for kind in self.tables):
            return
        own = set(self._parameters)
        if isinstance(self._module, nn.Module):
            own |= {id(parameter) for parameter in self._module.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            for phase in ("forward", "backward"):
                self.advance(phase, "ms_amp")

    def finish_calibration(self) -> None:
        """Let the calibrated factors be those of the largest magnitudes so far."""
        for kind, table in self.tables.items():
            if kind.parsed.timing == "calibrated":
                self._advance(kind, table)
        self.is_calibrating = False

    # -- as a value --------------------------------------------------------------------------------------------

    def copied(self) -> ScaleStates:
        """States that change without these. They are alive until the next copy, so that a backward pass finds them."""
        self._copy = ScaleStates()
        self._copy.load(self.to_dict())
        return self._copy

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The states by the names of the sites: tensors on the CPU."""
        result = {name: dict(state) for name, state in self._loaded.items()}
        for kind, table in self.tables.items():
            for row, name in enumerate(table.names):
                seen = table.seen.get(row)
                result[_full_name(kind, name)] = {
                    **{each: getattr(table.history, each)[row].cpu().clone() for each in vars(table.history)},
                    "seen": None if seen is None else seen.cpu().clone(),
                }
        return result

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the states of `to_dict`, and forget all others."""
        for name, each in state.items():
            if not isinstance(each, Mapping) or set(each) != {*History.__dataclass_fields__, "seen"}:
                raise ValueError(f"{name!r} is no state of a scale: give what fpsim.scale_state returned")
        self.tables = {}
        self._loaded = {name: copy.copy(each) for name, each in state.items()}


def _full_name(kind: _Kind, name: str) -> str:
    return f"{name} {kind.phase} [{kind.element}/{kind.scale}]"


def _history_of(state: Mapping[str, Any], kind: _Kind, name: str, device: torch.device) -> History:
    expected = start(1, kind.parsed, device)
    history = History(*(state[each][None].to(device) for each in vars(expected)))
    for each, tensor in vars(history).items():
        right = getattr(expected, each)
        if tensor.shape != right.shape or tensor.dtype != right.dtype:
            raise ValueError(
                f"the state of site {name!r} has {each} of shape {(*tensor.shape,)}, and its scale {kind.scale} needs "
                f"{(*right.shape,)}: give what fpsim.scale_state returned for the same policy"
            )
    return history


def _over_ranks(latest: Tensor, ran: Tensor, names: list[str], kind: _Kind) -> tuple[Tensor, Tensor]:
    """The largest magnitudes over all ranks, and the rows that took part on any of them.

    Raises:
        RuntimeError: the ranks have different sites.
    """
    digest = int.from_bytes(hashlib.sha256(repr((kind, names)).encode()).digest()[:6], "big")
    same = torch.tensor([digest, -digest], device=latest.device)
    dist.all_reduce(same, dist.ReduceOp.MAX)
    if int(same[0]) != -int(same[1]):
        raise RuntimeError(f"the ranks have other sites with scale {kind.scale}: run the same code on all of them")
    parts = torch.stack([torch.nan_to_num(latest, nan=0.0, posinf=torch.inf), latest.isnan().float(), ran.float()])
    dist.all_reduce(parts, dist.ReduceOp.MAX)
    return torch.where(parts[1] > 0, torch.nan, parts[0]), parts[2] > 0


class _Thread(threading.local):
    """The states of the calls under way in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[ScaleStates] = []


_thread = _Thread()
_numbers = itertools.count()
#: All states that are in use, by number.
_live: weakref.WeakValueDictionary[int, ScaleStates] = weakref.WeakValueDictionary()


def current() -> ScaleStates | None:
    """The states of the compiled model whose call is under way."""
    return _thread.stack[-1] if _thread.stack else None


def after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """End the steps that wait for ``optimizer``: a hook that torch calls after every step of an optimizer."""
    for states in list(_live.values()):
        states.after_step(optimizer)
