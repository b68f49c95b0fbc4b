"""Results as data frames and as HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

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


def html(value: RenderableType, width: int = 140) -> str:
    """What rich prints for ``value``, as HTML for notebooks."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(value)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
