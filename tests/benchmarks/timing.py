"""Medians of interleaved calls: the cases take turns, so that a disturbance hits all alike."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Key = TypeVar("Key", bound=Hashable)


Clock = Callable[[], float]


def cpu_seconds() -> float:
    """The processor's seconds that this process and its finished children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    """Add an option that sets ``clock``, the function that tells the seconds."""
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=cpu_seconds,
        default=time.perf_counter,
        help="measure the processor's time, on a machine with other work",
    )


def seconds(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


def interleaved_medians(
    calls: Mapping[Key, Callable[[], Any]],
    repeats: int,
    *,
    warm_up: bool = False,
    console: Console | None = None,
    clock: Clock = time.perf_counter,
) -> dict[Key, float]:
    """Median seconds of each call over ``repeats`` rounds; a bar shows the rounds.

    Args:
        calls: by name.
        repeats: how often each is timed.
        warm_up: run each call once untimed before it is timed, so that the previous case's contents of
            caches and allocator do not count.
        console: where the bar is shown; None is rich's own.
        clock: tells the seconds.
    """
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in track(range(repeats), "measuring", transient=True, console=console):
        for name, call in calls.items():
            if warm_up:
                call()
            times[name].append(seconds(call, clock))
    return {name: statistics.median(values) for name, values in times.items()}
