"""Progress bars of runs, as the demo and sweeps show them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from fpsim.progress import ProgressBars


def progress_bars(console: Console, *, width: int | None = 40) -> ProgressBars:
    """Bars of ``width`` characters (None: as wide as the console) with steps, time, and the tasks' field ``state``."""
    name, state = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[state]}"))
    columns = (name, BarColumn(bar_width=width), MofNCompleteColumn(), TimeElapsedColumn(), state)
    return ProgressBars(*columns, console=console)


def say(console: Console, text: str, *, style: str = "") -> None:
    """Print ``text`` as one line, whatever its length, with brackets that stand for themselves."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
