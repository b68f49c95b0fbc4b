"""Tables on standard output, progress bars on standard error, and the names of formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fpsim.formats import NAMED_FORMATS, FloatFormat, parse_format


def print_table(table: Table) -> None:
    """Print ``table``, as wide as the terminal; 160 characters wide in a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A context in which ``progress(done, total)`` draws a bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def familiar_name(fmt: FloatFormat) -> str:
    """The familiar name of ``fmt`` and its systematic name, or only the latter if they agree.

    >>> familiar_name(parse_format("e8m7")), familiar_name(parse_format("e3m4fn"))
    ('bf16 = e8m7', 'e3m4fn')
    """
    name = next((name for name in NAMED_FORMATS if parse_format(name) == fmt), fmt.name)
    return name if name == fmt.name else f"{name} = {fmt.name}"
