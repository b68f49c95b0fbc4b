"""The exact rounding of numbers that share scales, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from fpsim import reference
from fpsim.cli.exact_numbers import show_number
from fpsim.reference.values import Value


def table_of_blocks(texts: Sequence[str], numbers: Sequence[Value], cast: str) -> Table:
    """A row for each of ``numbers``, which are one row of a float32 tensor: its block, element, scale and result.

    Args:
        texts: the numbers as the user wrote them.
        numbers: the numbers.
        cast: a format with scales (`fpsim.reference.round_blocks`).

    Raises:
        ValueError: there is no such cast, or it is stochastic.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("input", "block", "element", "scale", "result"):
        table.add_column(heading, overflow="fold", justify="right")
    rows: dict[int, tuple[str, ...]] = {}
    for place, (indices, block) in enumerate(reference.quantize_blocks(numbers, cast, (len(numbers),))):
        scale = show_number(block.scale)
        if block.tensor_scale != 1:
            scale += f" {'/' if block.rule == 'te' else '*'} {show_number(block.tensor_scale)}"
        if block.zero_point is not None:
            scale += f", zero point {block.zero_point}"
        for index, element, result in zip(indices, block.elements, block.decoded(), strict=True):
            rows[index] = (texts[index], str(place), show_number(element), scale, show_number(result))
    for index in range(len(numbers)):
        table.add_row(*rows[index])
    return table
