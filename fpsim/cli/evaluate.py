"""``fpsim evaluate``: a language model under several policies. ``fpsim sensitivity``: which modules lose most."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import (
    POLICY_HELP,
    BackendOption,
    ByOption,
    ContextOption,
    CsvOption,
    EstimatesOption,
    GradientsOption,
    ModelArgument,
    TextArgument,
    WeightsOption,
    WindowsOption,
)
from fpsim.cli.output import check_writable, load_torch, print_measured

if TYPE_CHECKING:
    from fpsim.evaluate.texts import Task


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
    check_writable(csv)
    task = _task(model, text, weights, windows, context)
    load_torch("fpsim.evaluate")
    from fpsim.evaluate import compare

    measure = functools.partial(compare, **_given(task), policies=policy, metric="perplexity", backend=backend)
    print_measured(measure, "windows", task.windows, csv)


@plain_errors
def sensitivity(
    model: ModelArgument,
    text: TextArgument,
    policy: Annotated[str, typer.Option(help=f"{POLICY_HELP}.")],
    by: ByOption = "module",
    gradients: GradientsOption = True,
    estimates: EstimatesOption = True,
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
    check_writable(csv)
    task = _task(model, text, weights, windows, context)
    load_torch("fpsim.evaluate")
    from fpsim.evaluate import sensitivity as sensitivity_of

    options: dict[str, Any] = {"policy": policy, "by": by, "gradients": gradients, "estimates": estimates}
    measure = functools.partial(sensitivity_of, **_given(task), **options, backend=backend)
    print_measured(measure, "windows", task.windows, csv)


def _task(model: Path, text: Path, weights: Path | None, windows: int, context: int | None) -> Task:
    from fpsim.evaluate.calls import language_task

    return language_task(str(model), text, windows=windows, context=context, weights=weights)


def _given(task: Task) -> dict[str, Any]:
    """The model, its batches and its loss: arguments that the functions of `fpsim.evaluate` share."""
    from fpsim.curvature import label_count
    from fpsim.evaluate.texts import token_loss

    return {"model": task.network, "batches": task.batches(), "loss": token_loss, "weight": label_count}
