"""The calls of operators that may multiply matrices, as torch's profiler sees them run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fpsim.compile_backend.compiling import GRAPH_EVENT
from fpsim.compile_backend.witness import may_multiply

#: The profiler's names for the autograd function of a compiled graph, and for the backward of any autograd function.
#: The two events of one call have the same sequence number.
_COMPILED_EVENT = "CompiledFunction"
_BACKWARD_EVENT = "autograd::engine::evaluate_function: "

#: The operators of fpsim that multiply: products with accumulators, and attention in tiles.
MULTIPLYING = frozenset(
    f"fpsim.{name}"
    for name in (
        "accumulate_mm", "accumulate_scaled_mm", "accumulate_grouped_mm", "flash_attention", "flash_attention_backward",
    )
)  # fmt: skip

#: Backward functions of products that call no product themselves, but a multiplication for each operand.
_MULTIPLYING = tuple(f"{_BACKWARD_EVENT}{name}Backward0" for name in ("Dot", "Vdot"))


@dataclass(frozen=True)
class Call:
    """A call of an operator that may multiply matrices.

    Attributes:
        operator: the operator, such as ``aten.mm``.
        shapes: the shapes of its tensor arguments.
        is_inside: whether it ran in a graph that fpsim rewrote, forward or backward.
        is_backward: whether autograd called it.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    is_inside: bool
    is_backward: bool


def seen(step: Callable[[], None]) -> tuple[list[Call], bool]:
    """Run ``step`` under the profiler.

    Returns:
        The calls of operators that may multiply matrices, without those inside another such call; and whether a graph
        ran that fpsim rewrote.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    events = profiler.events()
    ours = {event.sequence_nr for event in events if event.name == _COMPILED_EVENT and _within_graph(event)}
    calls = [_call(event, ours) for event in events if _is_suspect(event) and not any(map(_is_suspect, _above(event)))]
    return calls, any(event.name == GRAPH_EVENT for event in events)


def _is_suspect(event: Any) -> bool:
    if event.name == "aten::mul":
        return any(each.name in _MULTIPLYING for each in _above(event))
    return event.name.replace("::", ".") in MULTIPLYING or may_multiply(event.name, event.input_shapes or ())


def _call(event: Any, ours: set[int]) -> Call:
    shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape)
    backward = [each for each in _above(event) if each.name.startswith(_BACKWARD_EVENT)]
    is_inside = _within_graph(event) or any(each.sequence_nr in ours for each in backward)
    return Call(event.name.replace("::", "."), shapes, is_inside, bool(backward))


def _within_graph(event: Any) -> bool:
    return any(each.name == GRAPH_EVENT for each in _above(event))


def _above(event: Any) -> Iterator[Any]:
    """The events within which ``event`` lies, from the innermost."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event
