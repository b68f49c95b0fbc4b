"""Medians of interleaved calls: the cases take turns, so that a disturbance hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Key = TypeVar("Key", bound=Hashable)


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved_medians(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, *, warm_up: bool = False, console: Console | None = None
) -> dict[Key, float]:
    """Median seconds of each call over ``repeats`` rounds; a bar shows the rounds.

    Args:
        calls: by name.
        repeats: how often each is timed.
        warm_up: run each call once untimed before it is timed, so that the previous case's contents of
            caches and allocator do not count.
        console: where the bar is shown; None is rich's own.
    """
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in track(range(repeats), "measuring", transient=True, console=console):
        for name, call in calls.items():
            if warm_up:
                call()
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}
