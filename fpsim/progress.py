"""Progress bars in terminals and notebooks, and lines of text where neither is there."""

from __future__ import annotations

import sys
import threading
import time
from importlib.util import find_spec

from rich.progress import Progress

#: Seconds until the first line of text, and the longest time between two lines.
_FIRST, _LONGEST = 1.0, 60.0


class ProgressBars(Progress):
    """Bars of rich. Where the console is neither a terminal nor a notebook with ipywidgets, lines take their place.

    The first line comes after a second, so that short work stays silent. The time to the next one doubles, up to a
    minute. A line holds the name of every task, its steps and its field ``state``: ``runs 3/8, worker 0 12/300 loss
    2.31 (0:02:08)``. A thread writes it: it comes, too, while a step compiles.
    """

    _ended: threading.Event | None = None

    def start(self) -> None:
        """Show the bars, or begin with the lines."""
        console = self.console
        if console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None):
            super().start()
            return
        self.disable = True
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, args=(self._ended, time.monotonic()), daemon=True)
        self._writer.start()

    def stop(self) -> None:
        """Take the bars away, or end the lines."""
        if self._ended is None:
            super().stop()
            return
        self._ended.set()
        self._writer.join()

    def line(self, seconds: float) -> str:
        """The line of text after ``seconds``."""
        tasks = []
        for task in self.tasks:
            total = "" if task.total is None else f"/{task.total:.0f}"
            steps = f"{task.completed:.0f}{total}" if task.total is not None or task.completed else ""
            tasks.append(" ".join(filter(None, (task.description, steps, task.fields.get("state")))))
        minutes, rest = divmod(int(seconds), 60)
        return f"{', '.join(tasks)} ({minutes // 60}:{minutes % 60:02}:{rest:02})"

    def _write(self, ended: threading.Event, start: float) -> None:
        pause = _FIRST
        while not ended.wait(pause):
            # A notebook gets text too: rich would make HTML of it.
            file = sys.stderr if self.console.is_jupyter else self.console.file
            print(self.line(time.monotonic() - start), file=file, flush=True)
            pause = min(2 * pause, _LONGEST)
