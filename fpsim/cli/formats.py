"""``fpsim formats``: the facts and the values of formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fpsim.cli.errors import plain_errors
from fpsim.cli.exact_numbers import field_names, show_bits, show_code, show_fields, show_number, show_power
from fpsim.cli.output import familiar_name, print_table
from fpsim.formats import NAMED_FORMATS, FloatFormat, parse_format, resolve_overflow


@plain_errors
def formats(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Such as e5m10, e3m4fn or e4m3:bias=9.", show_default="all names"),
    ] = None,
) -> None:
    """Show the named formats, or the given ones.

    For a single format, show every fact, and every value if it has at most 8 bits.
    """
    chosen = [parse_format(name) for name in names or NAMED_FORMATS]
    print_table(_table_of_formats(chosen))
    if names and len(chosen) == 1:
        [fmt] = chosen
        for heading, content in _facts(fmt):
            typer.echo(f"{heading:<19} {content}")
        if fmt.bits <= 8:
            print_table(_table_of_values(fmt))


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


def _facts(fmt: FloatFormat) -> Iterable[tuple[str, str]]:
    """Headings and contents."""
    from fpsim import reference
    from fpsim.reference.values import scale_b
    from fpsim.rounding.ops import CARRIERS

    def coded(code: int) -> str:
        value = reference.decode(code, fmt)
        return f"{' = '.join(dict.fromkeys([show_number(value), show_power(value)]))} ({show_bits(code, fmt)})"

    widths = [(fmt.signed, "sign"), (fmt.exponent_bits, "exponent"), (fmt.mantissa_bits, "mantissa")]
    yield "bits", f"{fmt.bits} = {' + '.join(f'{width:d} {name}' for width, name in widths if width)}"
    yield "precision", f"{fmt.precision} significant bits"
    yield "exponents", f"{fmt.emin} to {fmt.max_exponent}, bias {fmt.bias}"
    yield "largest", coded(fmt.max_code)
    smallest = reference.encode(scale_b(1, fmt.emin), fmt)
    if reference.decode(smallest, fmt) == scale_b(1, fmt.emin):  # else all finite values are subnormal
        yield "smallest normal", coded(smallest)
    if fmt.subnormals and fmt.mantissa_bits:
        yield "smallest subnormal", coded(1)
    else:
        yield "subnormals", "none: results below the smallest normal become zero" if fmt.zero else "none"
    yield "zeros", "0 and -0" if fmt.has_negative_zero else "0" if fmt.zero else "none"
    infinity = "none" if fmt.infinity_code is None else show_bits(fmt.infinity_code, fmt)
    yield "infinity", infinity + (" and its negative" if fmt.has_infinity and fmt.signed else "")
    yield "NaN", _show_nans(fmt)
    yield "finite values", f"{fmt.num_values:,}"
    yield "usual overflow mode", resolve_overflow(fmt, None)
    carriers = [str(dtype).removeprefix("torch.") for dtype, carrier in CARRIERS.items() if fmt.is_subset_of(carrier)]
    yield "carriers", ", ".join(carriers) or "none"


def _show_nans(fmt: FloatFormat) -> str:
    if fmt.nan_code is None:
        return "none: NaN becomes the largest finite value"
    if fmt.bits > 16:
        return f"{show_bits(fmt.nan_code, fmt)} and others" if fmt.specials == "ieee" else show_bits(fmt.nan_code, fmt)
    count = sum(map(fmt.is_nan_code, range(1 << fmt.bits)))
    return show_bits(fmt.nan_code, fmt) + ("" if count == 1 else f", the usual one of {count:,} codes")


def _table_of_values(fmt: FloatFormat) -> Table:
    from fpsim import reference

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("code")
    table.add_column(field_names(fmt))
    table.add_column("exact value", justify="right")
    table.add_column("decimal", justify="right")
    for code in range(1 << fmt.bits):
        value = reference.decode(code, fmt)
        fields = show_fields(code, fmt, " | ")
        table.add_row(show_code(code, fmt), fields, show_power(value), show_number(value))
    return table
