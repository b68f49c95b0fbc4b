"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpsim.formats import NAMED_FORMATS, OVERFLOWS, ROUNDINGS, STOCHASTIC_ROUNDINGS, WHOLE_FORMATS

#: All roundings, for help texts.
ROUNDINGS_HELP = ", ".join([*ROUNDINGS, *(f"{name}\\[:BITS]" for name in STOCHASTIC_ROUNDINGS)])

OverflowOption = Annotated[
    str | None,
    typer.Option(help=f"Overflow mode: {', '.join(OVERFLOWS)}.", show_default="the usual one of the format"),
]

#: How a policy is written, for help texts.
POLICY_HELP = (
    "A preset (bf16, mxfp8, nvfp4), a cast of all operands (e4m3fn, int8/row), two casts (e4m3fn+e5m2), or the JSON "
    "file of a policy"
)

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL_OR_SCRIPT",
        help="Folder of a Hugging Face causal model, or path/to/script.py:function that builds a module.",
    ),
]
TextArgument = Annotated[Path, typer.Argument(metavar="TEXT", help="UTF-8 file to predict.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="State dict of the script's module.", show_default="the weights that the function sets"),
]
WindowsOption = Annotated[int, typer.Option(min=1, help="Largest number of windows of the text.")]
ContextOption = Annotated[int | None, typer.Option(min=2, help="Tokens per window.", show_default="the model's own")]
ByOption = Annotated[str, typer.Option(help="module, or site: kind of product and role.")]
GradientsOption = Annotated[bool, typer.Option(help="Measure what rounding in backward does to the gradient.")]
EstimatesOption = Annotated[
    bool, typer.Option(help="Estimate changes from derivatives, too; there are none for stochastic rounding.")
]
BackendOption = Annotated[str, typer.Option(help="fpsim compiles; fpsim_eager has the same values.")]
CsvOption = Annotated[
    Path | None, typer.Option(help="File to write the numbers to, as CSV. Needs pandas.", show_default="none")
]


def complete_format(incomplete: str) -> list[str]:
    """The names of formats that begin with ``incomplete``, for the completion of shells."""
    return [name for name in (*NAMED_FORMATS, *WHOLE_FORMATS) if name.startswith(incomplete)]
