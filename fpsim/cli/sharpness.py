"""``fpsim sharpness``: the logit sharpness of a checkpoint or of a user's own model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import (
    ContextOption,
    ModelArgument,
    TextArgument,
    WeightsOption,
    WindowsOption,
    complete_format,
)
from fpsim.cli.output import load_torch, print_table, progress_bar

if TYPE_CHECKING:
    from fpsim.evaluate.logit_sharpness import Report


@plain_errors
def sharpness(
    model: ModelArgument,
    text: TextArgument,
    weights: WeightsOption = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure also with all operands rounded to this format (e4m3fn, e8m3/toward_zero); may be given "
            "several times.",
            show_default="unrounded only",
            autocompletion=complete_format,
        ),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Half-width of the box; may be given several times.", show_default="0.0005 and 0.001"),
    ] = None,
    method: Annotated[str, typer.Option(help="exact, or lbfgsb as in the paper (slow).")] = "exact",
    windows: WindowsOption = 16,
    context: ContextOption = None,
    gradients: Annotated[bool, typer.Option(help="Measure the norm of the gradient, too.")] = True,
) -> None:
    """Measure the logit sharpness of a language model on a text, unrounded and under formats.

    A checkpoint is read with its tokenizer, and needs fpsim-torch\\[paper]. A script's function returns a module from
    tokens to logits and may take vocabulary and context; its tokens are bytes, unless the script has a function
    tokenize.
    """
    load_torch("fpsim.evaluate.logit_sharpness")
    from fpsim.evaluate.load import is_script
    from fpsim.evaluate.logit_sharpness import EPSILONS

    measure: Callable[..., Report]
    if is_script(str(model)):
        from fpsim.evaluate.logit_sharpness import measure_script

        measure = functools.partial(measure_script, str(model), weights=weights)
    elif weights is not None:
        raise ValueError(f"weights are for a script, and {model} holds its own: leave --weights out")
    else:
        from fpsim.evaluate.logit_sharpness import measure_checkpoint

        measure = functools.partial(measure_checkpoint, model)
    with progress_bar("windows") as progress:
        report = measure(
            text,
            formats=format or (),
            epsilons=epsilon or EPSILONS,
            method=method,
            windows=windows,
            context=context,
            gradients=gradients,
            progress=progress,
        )
    print_table(report.table())
