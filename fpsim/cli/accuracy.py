"""``fpsim accuracy``: the error of an elementwise function in units of the last place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import complete_format
from fpsim.cli.output import check_writable, print_table


@plain_errors
def accuracy(
    function: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function from a tensor to a tensor of its shape: torch.special:i0e, or path/to/script.py:function.",
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="Format of the inputs, and of the units in which errors are told.", autocompletion=complete_format
        ),
    ],
    range: Annotated[tuple[float, float], typer.Option(metavar="LOW HIGH", help="Least and greatest input.")],
    exact: Annotated[
        str | None,
        typer.Option(
            help="The exact function of an mpmath number: a name (exp, i0e, gelu_tanh), or path/to/script.py:function.",
            show_default="that of torch's function",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Random inputs, for formats of more than 16 bits.")] = 4096,
    worst: Annotated[int, typer.Option(min=1, help="Number of inputs to list.")] = 5,
    plot: Annotated[
        Path | None,
        typer.Option(help="File for a plot of the errors; needs fpsim-torch\\[paper].", show_default="none"),
    ] = None,
) -> None:
    """Measure an elementwise function against exact values of 60 digits: errors in ulps, worst inputs, seams."""
    check_writable(plot)
    called = _function(function)
    given = _function(exact) if exact is not None and ":" in exact else exact
    from fpsim.evaluate import accuracy as measure

    result = measure(called, format, low=range[0], high=range[1], exact=given, samples=samples, worst=worst)
    print_table(result)
    if plot is not None:
        result.plot().get_figure().savefig(plot)  # type: ignore[union-attr]


def _function(name: str) -> Callable[..., Any]:
    """The function that ``MODULE:FUNCTION`` names."""
    from fpsim.evaluate.load import is_script, script_function

    if is_script(name):
        return script_function(name)[1]
    home, colon, own = name.partition(":")
    if not colon or not own:
        raise ValueError(f"{name!r} names no function: write MODULE:FUNCTION, such as torch.special:i0e")
    try:
        found = getattr(importlib.import_module(home), own, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {home!r}: write torch.special:i0e, or path/to/script.py:f") from error
    if not callable(found):
        raise ValueError(f"module {home!r} has no function {own!r}")
    return found
