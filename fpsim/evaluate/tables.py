"""Results as text, as HTML, and as data frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult

from fpsim.showing import Shown, render

if TYPE_CHECKING:
    import pandas


def data_frame(rows: Sequence[dict[str, Any]]) -> pandas.DataFrame:
    """``rows`` as a data frame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas, or use to_dict") from error
    return pandas.DataFrame(rows)


class Printed(Shown, ABC):
    """A result that rich prints; it is the same as text, and as HTML in notebooks."""

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts that rich prints."""

    def __str__(self) -> str:
        return render(self)
