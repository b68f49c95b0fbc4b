"""Values that show themselves: as text in terminals and files, as HTML in notebooks."""

from __future__ import annotations

import html
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

#: Lines keep their spaces, and the page scrolls beside them. Colours of text are rich's; others are those of the page.
_PAGE = '<pre style="font-family: monospace; line-height: 1.25; white-space: pre; overflow-x: auto">{code}</pre>'
#: Characters in a line: wide enough for the table of a profile, whose first column a narrower page would lose.
_WIDE = 240
#: Characters in a line of a table of fields, whose sentences are folded.
_NARROW = 120
#: The longest text of a value in a table of fields.
_LONGEST = 2000


class Shown:
    """A result that a notebook shows as HTML: its own table if it has one, or else a table of its fields."""

    def _repr_html_(self) -> str:
        if hasattr(type(self), "__rich_console__"):
            return to_html(self)
        if hasattr(self, "table"):
            return to_html(self.table())
        if type(self).__str__ is not object.__str__:
            return _PAGE.format(code=html.escape(str(self)))
        return to_html(_table(self), _NARROW)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: ``many``, or ``one`` with an s, unless the number is 1.

    >>> counted(1, "batch", "batches"), counted(3, "window")
    ('1 batch', '3 windows')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def why_unreadable(error: BaseException) -> str:
    """Why ``torch.load(..., weights_only=True)`` failed, in one line without torch's advice to trust the file."""
    if isinstance(error, pickle.UnpicklingError):
        return "torch did not write it, or it holds more than tensors, numbers and texts"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


def render(value: object, width: int = 140) -> str:
    """A rich renderable as plain text."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(value)
    return capture.get().rstrip()


def to_html(value: object, width: int = _WIDE) -> str:
    """A rich renderable as HTML that needs no style sheet."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(value)
    return console.export_html(inline_styles=True, code_format=_PAGE)


def _table(value: Any) -> object:
    """The fields of a data class as a table; those of `Policy.to_dict` and its like if it has one."""
    from rich.table import Table
    from rich.text import Text

    own = {each.name: getattr(value, each.name) for each in fields(value)}
    facts = value.to_dict() if hasattr(value, "to_dict") else own
    table = Table(title=type(value).__name__, title_justify="left", show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(_written(fact)))
    return table


def _written(fact: Any) -> str:
    """A value of a field in a few words."""
    if hasattr(fact, "dtype") and hasattr(fact, "shape"):  # a tensor
        shape = " x ".join(map(str, fact.shape)) or "scalar"
        values = f": {fact.tolist()}" if fact.numel() <= 8 else ""
        return f"{str(fact.dtype).removeprefix('torch.')}, {shape}{values}"
    if isinstance(fact, Mapping) and any(hasattr(each, "dtype") for each in fact.values()):
        return f"{len(fact)} tensors"
    if isinstance(fact, Mapping | Sequence) and not isinstance(fact, str):
        fact = json.dumps(fact, default=str, indent=1) if len(fact) else "none"
    text = str(fact)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
