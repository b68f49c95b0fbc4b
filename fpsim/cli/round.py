"""``fpsim round``: the exact rounding of single numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import ROUNDINGS_HELP, OverflowOption, complete_format
from fpsim.cli.output import familiar_name, print_table
from fpsim.formats import ROUNDINGS, expand, full_rounding, parse_format, resolve_overflow


@plain_errors
def round(
    values: Annotated[list[str], typer.Argument(metavar="VALUE", help="0.1, -2.5e-3, 1/3, 0x1.8p3, inf or nan.")],
    format: Annotated[
        str, typer.Option(help="Format to round to, such as e4m3fn or mxfp8.", autocompletion=complete_format)
    ],
    rounding: Annotated[str | None, typer.Option(help=f"{ROUNDINGS_HELP}.", show_default="a table of them all")] = None,
    overflow: OverflowOption = None,
) -> None:
    """Round numbers exactly, and show result, code, bit fields, error and neighbours, for one rounding or for all.

    Stochastic rounding has two candidates, each with its probability. If the format has scales, such as mxfp8 or int8,
    the numbers are one row, and the table shows each one's element and scale.
    """
    from fpsim.cli.exact_numbers import parse_number
    from fpsim.cli.explain_number import explain_number, explain_rounding, table_of_roundings

    if "/" in expand(format):
        from fpsim.cli.explain_blocks import table_of_blocks

        modes = [mode for mode in (rounding, overflow) if mode is not None]
        print_table(table_of_blocks(values, [parse_number(text) for text in values], "/".join([format, *modes])))
        return
    fmt = parse_format(format)
    mode = resolve_overflow(fmt, overflow)
    roundings = [*ROUNDINGS, "stochastic"] if rounding is None else [rounding]
    roundings = [full_rounding(each) for each in roundings]
    for text in values:
        if text.startswith("--"):  # unknown options are values here, so that -1 is a number
            raise ValueError(f"no such option: {text}")
    numbers = [parse_number(text) for text in values]
    deterministic = rounding is not None and rounding in ROUNDINGS
    typer.echo(", ".join([familiar_name(fmt), *(roundings if rounding is not None else []), mode]))
    for text, number in zip(values, numbers, strict=True):
        typer.echo()
        explained = (
            explain_rounding(text, number, fmt, roundings[0], mode)
            if deterministic
            else explain_number(text, number, fmt)
        )
        for heading, content in explained:
            typer.echo(f"{heading:<11} {content}")
        if not deterministic:
            print_table(table_of_roundings(number, fmt, roundings, mode))
