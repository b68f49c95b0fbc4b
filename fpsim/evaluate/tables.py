"""Results as text, as HTML, and as data frames."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult

from fpsim.compile_backend.plan import render

if TYPE_CHECKING:
    import pandas

#: The width of text and of HTML, in characters.
_WIDTH = 140


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


class Shown(ABC):
    """A result that rich prints; it is the same as text, and as HTML in notebooks."""

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts that rich prints."""

    def __str__(self) -> str:
        return render(self, _WIDTH)

    def _repr_html_(self) -> str:
        console = Console(record=True, width=_WIDTH, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
