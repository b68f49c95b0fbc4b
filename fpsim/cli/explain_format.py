"""The facts and the values of one format, as ``fpsim formats`` shows them."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

from fpsim import reference
from fpsim.cli.exact_numbers import field_names, show_bits, show_code, show_fields, show_number, show_power
from fpsim.formats import FloatFormat, resolve_overflow
from fpsim.reference.values import scale_b
from fpsim.rounding.carriers import CARRIERS


def explain_format(fmt: FloatFormat) -> Iterable[tuple[str, str]]:
    """All facts of ``fmt``: headings and contents."""

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


def table_of_values(fmt: FloatFormat) -> Table:
    """A row for each code of ``fmt``."""
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
