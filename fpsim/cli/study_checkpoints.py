"""``fpsim study sensitivity`` and ``fpsim study search``: where a run breaks, and the cheapest format for it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from fpsim.cli.errors import plain_errors
from fpsim.cli.options import POLICY_HELP, BackendOption, ByOption, CsvOption, EstimatesOption, GradientsOption
from fpsim.cli.output import check_writable, print_measured

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="File in which fpsim study train keeps its state, or that of an unfinished run."
    ),
]
BatchesOption = Annotated[int, typer.Option(min=1, help="Validation batches of the run to measure on.")]


@plain_errors
def sensitivity(
    checkpoint: CheckpointArgument,
    policy: Annotated[str | None, typer.Option(help=f"{POLICY_HELP}.", show_default="that of the run")] = None,
    by: ByOption = "module",
    gradients: GradientsOption = True,
    estimates: EstimatesOption = True,
    batches: BatchesOption = 2,
    backend: BackendOption = "fpsim_eager",
    csv: CsvOption = None,
) -> None:
    """Tell which modules of a run lose most when they are rounded, with the weights of a checkpoint."""
    check_writable(csv)
    from fpsim.evaluate import sensitivity as sensitivity_of
    from fpsim.paper.checkpointed import checkpointed

    run = checkpointed(checkpoint, batches=batches)
    chosen = run.policy if policy is None else policy
    if chosen is None:
        raise ValueError(f"the run of {checkpoint} rounds nothing: name a policy, such as --policy e4m3fn")
    typer.echo(f"{run.config.model.label}, step {run.step}")
    options: dict[str, Any] = {"policy": chosen, "by": by, "gradients": gradients, "estimates": estimates}
    measure = functools.partial(sensitivity_of, run.model, run.batches, **options, backend=backend)
    print_measured(measure, "batches", len(run.batches), csv)


@plain_errors
def search(
    checkpoint: CheckpointArgument,
    format: Annotated[list[str], typer.Option(help=f"{POLICY_HELP}; given at least twice. unrounded is one, too.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Greatest change of the loss.", show_default="none: give it, or a budget")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Greatest cost.", show_default="none")] = None,
    cost: Annotated[str, typer.Option(help="bits or bytes of the weights, or macs.")] = "bits",
    trials: Annotated[int, typer.Option(min=1, help="Greatest number of choices to measure.")] = 200,
    batches: BatchesOption = 2,
    backend: BackendOption = "fpsim_eager",
    out: Annotated[Path | None, typer.Option(help="File to write the policy to, as JSON.", show_default="none")] = None,
    csv: CsvOption = None,
) -> None:
    """Find the cheapest choice of formats within a tolerance, or the best within a budget, for a run's checkpoint."""
    check_writable(out)
    check_writable(csv)
    from fpsim.evaluate import search as search_of
    from fpsim.paper.checkpointed import checkpointed

    run = checkpointed(checkpoint, batches=batches)
    typer.echo(f"{run.config.model.label}, step {run.step}")
    options: dict[str, Any] = {"formats": format, "tolerance": tolerance, "budget": budget, "cost": cost}
    measure = functools.partial(search_of, run.model, run.batches, **options, trials=trials, backend=backend)
    found = print_measured(measure, "choices", None, csv)
    if out is not None:
        out.write_text(found.policy.to_json() + "\n", encoding="utf-8")
