"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from fpsim.formats import NAMED_FORMATS, OVERFLOWS, ROUNDINGS, STOCHASTIC_ROUNDINGS, WHOLE_FORMATS

#: All roundings, for help texts.
ROUNDINGS_HELP = ", ".join([*ROUNDINGS, *(f"{name}\\[:BITS]" for name in STOCHASTIC_ROUNDINGS)])

OverflowOption = Annotated[
    str | None,
    typer.Option(help=f"Overflow mode: {', '.join(OVERFLOWS)}.", show_default="the usual one of the format"),
]


def complete_format(incomplete: str) -> list[str]:
    """The names of formats that begin with ``incomplete``, for the completion of shells."""
    return [name for name in (*NAMED_FORMATS, *WHOLE_FORMATS) if name.startswith(incomplete)]
