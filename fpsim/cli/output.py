"""Tables on standard output, progress bars on standard error, files to write, and the names of formats."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fpsim.formats import NAMED_FORMATS, FloatFormat, parse_format
from fpsim.progress import ProgressBars


def print_table(value: Table | ConsoleRenderable) -> None:
    """Print a table or a result that consists of tables, as wide as the terminal; in a pipe 160 characters wide."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(value)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """A context in which ``progress(done, total)`` moves a bar on standard error; lines if that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with ProgressBars(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load_torch(*modules: str) -> None:
    """Import PyTorch under a progress bar, and then ``modules``, which may import its compiler: that takes long."""
    missing = [name for name in ("torch", *modules) if name not in sys.modules]
    if missing:
        with progress_bar("loading PyTorch"):
            for name in missing:
                importlib.import_module(name)


def print_measured(
    measure: Callable[..., Any], description: str, total: int | None = None, csv: Path | None = None
) -> Any:
    """Print the result of ``measure``, write its numbers to the file ``csv``, and return it.

    Args:
        measure: is called with ``progress``, a function of the number of things that are done, and returns a result
            with `print_table` and ``to_pandas``.
        description: what the numbers count.
        total: how many there are; None if that is not known.
    """
    with progress_bar(description) as progress:
        result = measure(progress=lambda done: progress(done, total))
    print_table(result)
    if csv is not None:
        result.to_pandas().to_csv(csv, index=False)
    return result


def check_writable(path: Path | None) -> None:
    """Check that a file can be written at ``path``, before the work whose results it will hold; None is no file.

    Raises:
        OSError: ``path`` is a folder, its folder is missing, or it may not be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.parent}, to which {path.name} is to be written: make it first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "this may not be written", str(path))


def familiar_name(fmt: FloatFormat) -> str:
    """The familiar name of ``fmt`` and its systematic name, or only the latter if they agree.

    >>> familiar_name(parse_format("e8m7")), familiar_name(parse_format("e3m4fn"))
    ('bf16 = e8m7', 'e3m4fn')
    """
    name = next((name for name in NAMED_FORMATS if parse_format(name) == fmt), fmt.name)
    return name if name == fmt.name else f"{name} = {fmt.name}"
