"""``fpsim evaluate``: a language model under several policies. ``fpsim sensitivity``: which modules lose most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.output import check_writable, print_table, progress_bar

if TYPE_CHECKING:
    from fpsim.evaluate.texts import Task

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
BackendOption = Annotated[str, typer.Option(help="fpsim compiles; fpsim_eager has the same values.")]
CsvOption = Annotated[
    Path | None, typer.Option(help="File to write the numbers to, as CSV. Needs pandas.", show_default="none")
]
POLICY_HELP = (
    "A preset (bf16, mxfp8, nvfp4), a cast of all operands (e4m3fn, int8/row), two casts (e4m3fn+e5m2), or the JSON "
    "file of a policy"
)


@plain_errors
def evaluate(
    model: ModelArgument,
    text: TextArgument,
    policy: Annotated[list[str], typer.Option(help=f"{POLICY_HELP}; may be given several times.")],
    weights: WeightsOption = None,
    windows: WindowsOption = 64,
    context: ContextOption = None,
    backend: BackendOption = "fpsim_eager",
    csv: CsvOption = None,
) -> None:
    """Compare the perplexity of a language model on a text under several policies, with paired differences.

    A checkpoint is read with its tokenizer, and needs fpsim-torch\\[paper]. A script's function returns a module from
    tokens to logits and may take vocabulary and context; its tokens are bytes, unless the script has a function
    tokenize.
    """
    if csv is not None:
        check_writable(csv)
    task = _task(model, text, weights, windows, context)
    from fpsim.curvature import label_count
    from fpsim.evaluate import compare
    from fpsim.evaluate.texts import token_loss

    with progress_bar("windows") as progress:
        result = compare(
            task.network,
            task.batches(),
            policy,
            loss=token_loss,
            metric="perplexity",
            weight=label_count,
            backend=backend,
            progress=lambda done: progress(done, task.windows),
        )
    print_table(result)
    if csv is not None:
        result.to_pandas().to_csv(csv, index=False)


@plain_errors
def sensitivity(
    model: ModelArgument,
    text: TextArgument,
    policy: Annotated[str, typer.Option(help=f"{POLICY_HELP}.")],
    by: Annotated[str, typer.Option(help="module, or site: kind of product and role.")] = "module",
    gradients: Annotated[bool, typer.Option(help="Measure what rounding in backward does to the gradient.")] = True,
    weights: WeightsOption = None,
    windows: WindowsOption = 4,
    context: ContextOption = None,
    backend: BackendOption = "fpsim_eager",
    csv: CsvOption = None,
) -> None:
    """Tell which modules of a language model lose most when they are rounded, and which gradients suffer.

    The change of the loss is measured when only one module is rounded and when all others are, beside its estimates
    from derivatives. MODEL_OR_SCRIPT and TEXT are those of fpsim evaluate.
    """
    if csv is not None:
        check_writable(csv)
    task = _task(model, text, weights, windows, context)
    from fpsim.curvature import label_count
    from fpsim.evaluate import sensitivity as measure
    from fpsim.evaluate.texts import token_loss

    with progress_bar("windows") as progress:
        result = measure(
            task.network,
            task.batches(),
            policy=policy,
            loss=token_loss,
            by=by,  # type: ignore[arg-type]
            gradients=gradients,
            weight=label_count,
            backend=backend,
            progress=lambda done: progress(done, task.windows),
        )
    print_table(result)
    if csv is not None:
        result.to_pandas().to_csv(csv, index=False)


def _task(model: Path, text: Path, weights: Path | None, windows: int, context: int | None) -> Task:
    from fpsim.evaluate.calls import language_task

    return language_task(str(model), text, windows=windows, context=context, weights=weights)
