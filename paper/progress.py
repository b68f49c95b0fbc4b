"""Progress bars of runs, as the demo and sweeps show them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bars(console: Console, *, width: int | None = 40) -> Progress:
    """Bars of ``width`` characters (None: as wide as the console) with steps, time, and the tasks' field ``state``."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=width), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[state]}"), console=console)
