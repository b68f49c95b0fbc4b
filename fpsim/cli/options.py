"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from fpsim.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_ROUNDINGS

#: All roundings, for help texts.
ROUNDINGS_HELP = ", ".join([*ROUNDINGS, *(f"{name}\\[:BITS]" for name in STOCHASTIC_ROUNDINGS)])

OverflowOption = Annotated[
    str | None,
    typer.Option(help=f"Overflow mode: {', '.join(OVERFLOWS)}.", show_default="the usual one of the format"),
]
