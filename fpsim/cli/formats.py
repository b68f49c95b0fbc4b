"""``fpsim formats``: the named formats, or any others, side by side or one in detail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import complete_format
from fpsim.cli.output import familiar_name, print_table
from fpsim.formats import NAMED_FORMATS, WHOLE_FORMATS, FloatFormat, expand, parse_format


@plain_errors
def formats(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Such as e5m10, e3m4fn or e4m3:bias=9.",
            show_default="all names",
            autocompletion=complete_format,
        ),
    ] = None,
) -> None:
    """Show the named formats, or the given ones.

    For a single format, show every fact, and every value if it has at most 8 bits.
    """
    pairs = {name: expand(name) for name in names or WHOLE_FORMATS if "/" in expand(name)}
    if names and pairs:
        from fpsim.casts import parse_cast

        for name in pairs:
            parse_cast(name)
    chosen = [parse_format(name) for name in names or NAMED_FORMATS if name not in pairs]
    if chosen:
        print_table(_table_of_formats(chosen))
    if pairs:
        print_table(_table_of_pairs(pairs))
    if not names:
        typer.echo(
            "Integers with a scale per row are int2 to int16, and uint2 to uint16. docs/scaled_formats.md has all."
        )
    if names and len(chosen) == 1:
        from fpsim.cli.explain_format import explain_format, table_of_values

        [fmt] = chosen
        for heading, content in explain_format(fmt):
            typer.echo(f"{heading:<19} {content}")
        if fmt.bits <= 8:
            print_table(table_of_values(fmt))


def _table_of_pairs(pairs: Mapping[str, str]) -> Table:
    """Names of formats whose elements share scales, with the elements and the scales."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("format with scales", "elements", "scale"):
        table.add_column(heading, overflow="fold")
    for name, pair in pairs.items():
        element, _, scale = pair.partition("/")
        table.add_row(name, element, scale)
    return table


def _table_of_formats(chosen: Iterable[FloatFormat]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("format", overflow="fold")
    for heading in ("bits", "exp.", "man.", "bias", "max", "min normal", "min subnormal"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("inf", "NaN"):
        table.add_column(heading)
    table.add_column("values", justify="right", overflow="fold")
    for fmt in chosen:
        has_subnormals = fmt.subnormals and fmt.mantissa_bits > 0
        table.add_row(
            familiar_name(fmt),
            *map(str, (fmt.bits, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)),
            f"{fmt.max:.6g}",
            f"2^{fmt.emin}",
            f"2^{fmt.emin - fmt.mantissa_bits}" if has_subnormals else "-",
            "yes" if fmt.has_infinity else "-",
            "yes" if fmt.has_nan else "-",
            f"{fmt.num_values:,}" if fmt.num_values < 10**12 else f"~{fmt.num_values:.3g}",
        )
    return table
