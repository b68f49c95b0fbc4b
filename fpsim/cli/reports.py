"""``fpsim explain``, ``fpsim profile``, ``fpsim audit``: the effect of a policy in a script's model or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import POLICY_HELP, ContextOption, ModelArgument, WeightsOption
from fpsim.cli.output import check_writable, print_table, progress_bar

if TYPE_CHECKING:
    from fpsim.evaluate.calls import ModelCall

TextArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[TEXT]", help="UTF-8 file to predict.", show_default="the script's function inputs"),
]
PolicyOption = Annotated[str, typer.Option(help=f"{POLICY_HELP}.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="Windows of the text, in one batch.")]
GradientsOption = Annotated[bool, typer.Option(help="Take the backward pass too.")]


@plain_errors
def explain(
    model: ModelArgument,
    text: TextArgument = None,
    policy: PolicyOption = "fp8_hybrid",
    gradients: GradientsOption = True,
    weights: WeightsOption = None,
    windows: WindowsOption = 1,
    context: ContextOption = None,
) -> None:
    """List every value that a policy rounds in a model, with its cast, and every product that it leaves unrounded.

    A script's function returns a module. The script may have a function inputs, which returns the arguments of the
    module; without it, the module is a language model and TEXT is what it predicts, as in fpsim evaluate.
    """
    with _running(model, text, policy, weights, windows, context, gradients) as (call, parsed):
        import fpsim

        plan = fpsim.explain(call.network, *call.args, policy=parsed, **call.kwargs)
    print_table(plan)


@plain_errors
def profile(
    model: ModelArgument,
    text: TextArgument = None,
    policy: PolicyOption = "fp8_hybrid",
    gradients: GradientsOption = True,
    sort: Annotated[
        str, typer.Option(help="Number to sort by: sqnr, relative_error, amax, underflows_share, ...")
    ] = "sqnr",
    limit: Annotated[int, typer.Option(min=1, help="Sites to show, the worst first.")] = 40,
    html: Annotated[Path | None, typer.Option(help="File for a page with plots.", show_default="none")] = None,
    json: Annotated[Path | None, typer.Option(help="File for all numbers, as JSON.", show_default="none")] = None,
    weights: WeightsOption = None,
    windows: WindowsOption = 1,
    context: ContextOption = None,
) -> None:
    """Run one step of a model under a policy, and count underflows, saturations and errors at every rounded value.

    A script's function returns a module. The script may have a function inputs, which returns the arguments of the
    module, and a function loss of its outputs (else the sum of the outputs); without inputs, the module is a language
    model and TEXT is what it predicts, as in fpsim evaluate.
    """
    for file in filter(None, (html, json)):
        check_writable(file)
    with _running(model, text, policy, weights, windows, context, gradients) as (call, parsed):
        import fpsim

        result = fpsim.profile(call.network, *call.args, policy=parsed, loss=call.loss if gradients else None,
                               **call.kwargs)  # fmt: skip
    print_table(result.table(sort, limit))
    if len(result.sites) > limit:
        typer.echo(f"{len(result.sites) - limit} more sites: --limit {len(result.sites)} shows all")
    if any(product.sum for product in result.products):
        print_table(result.table_of_sums())
    if result.gaps:
        typer.echo(f"{len(result.gaps)} gaps are not in this table: fpsim explain lists them")
    if html is not None:
        typer.echo(result.to_html(html, title=f"{model} under {policy}"))
    if json is not None:
        json.write_text(result.to_json(), encoding="utf-8")
        typer.echo(json)


@plain_errors
def audit(
    model: ModelArgument,
    text: TextArgument = None,
    policy: PolicyOption = "fp8_hybrid",
    gradients: GradientsOption = True,
    weights: WeightsOption = None,
    windows: WindowsOption = 1,
    context: ContextOption = None,
) -> None:
    """Run one step of the compiled model, and list the matrix products that escaped rounding. Exit code 1: some did.

    The products of the graphs are compared with those of an eager run. Scripts and TEXT are those of fpsim profile.
    """
    with _running(model, text, policy, weights, windows, context, gradients) as (call, parsed):
        import fpsim

        result = fpsim.audit(call.network, *call.args, policy=parsed, **call.kwargs)
    print_table(result)
    if result.escaped or not result.compiled:
        raise typer.Exit(1)


@contextmanager
def _running(
    model: Path,
    text: Path | None,
    policy: str,
    weights: Path | None,
    windows: int,
    context: int | None,
    gradients: bool,
) -> Iterator[tuple[ModelCall, Any]]:
    """A block that runs a call of the model under the policy, with errors in one line."""
    with progress_bar("loading the model") as _:
        import torch

        from fpsim.evaluate.batches import plain_errors as errors_of_policy
        from fpsim.evaluate.calls import model_call
        from fpsim.evaluate.policies import NOTHING, parse_policy
        from fpsim.evaluate.texts import unfused

        parsed = parse_policy(policy) or NOTHING
        call = model_call(str(model), text, windows=windows, context=context, weights=weights)
    with progress_bar("running the model") as _, unfused(), torch.set_grad_enabled(gradients), errors_of_policy(policy):
        yield call, parsed
