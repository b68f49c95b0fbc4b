"""``fpsim study``: sweeps on the user's own model, the paper's experiments, and reports."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from fpsim.cli.errors import OneLineErrors, plain_errors
from fpsim.cli.output import check_writable, load_torch
from fpsim.cli.study_checkpoints import search, sensitivity
from fpsim.suggestions import did_you_mean

if TYPE_CHECKING:
    from fpsim.paper.config import RunConfig
    from fpsim.paper.experiments import Experiment, Setting
    from fpsim.paper.sweeps import Outcome, Planned

app = typer.Typer(
    cls=OneLineErrors,
    help="Decide whether a format is safe to train in: sweeps, the paper's experiments, reports. Needs "
    "fpsim-torch\\[paper].",
    no_args_is_help=True,
)
app.command()(sensitivity)
app.command()(search)


class _SeveralValues(TyperCommand):
    """Options that may be given several times also take several values at once: ``--formats bf16 e4m3fn e8m3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        result: list[str] = []
        current = ""
        for arg in args:
            if arg.startswith("--"):
                current = arg if arg in several else ""
                result.append(arg)
            elif current and result[-1] != current:
                result += [current, arg]
            else:
                result.append(arg)
        return super().parse_args(ctx, result)


Out = Annotated[
    Path | None, typer.Option(help="Folder of the sweep.", show_default="runs/study, or runs/experiment-NUMBER-SIZE")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="UTF-8 file, folder of such files, nanoGPT .bin file or folder, or hf:NAME.", show_default="Shakespeare"
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="The first seed; the others follow it.")]
Steps = Annotated[int, typer.Option(min=2, help="Optimizer steps per run.")]
Rates = Annotated[
    list[float] | None, typer.Option(help="Learning rates.", show_default="0.003, or those of the experiment")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="tiny, toy, gpt2-124m, llama-120m, llama2-7b, or path/to/script.py:function.",
        show_default="tiny, or that of the experiment",
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        help="process (on this machine), ray, or serial (in this process).",
        show_default="process; with --address: ray",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one per core or GPU")]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster, or auto.", show_default="none")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs per run, for Ray.")]
Cpus = Annotated[float, typer.Option(min=0, help="Cores per run, for Ray.")]
Retries = Annotated[int, typer.Option(min=0, help="Number of further tries after a run has failed.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cpu, or that of the experiment")]
Interpret = Annotated[
    bool, typer.Option("--interpret", help="Run without a compiler: starts sooner, runs several times slower.")
]


#: The default of an option that the size of an experiment determines.
_OF_SIZE = "that of the size"


@app.command(cls=_SeveralValues)
@plain_errors
def run(
    model: Model = None,
    data: Data = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16, e8m3/toward_zero, e4m3fn+e5m2, paper:e8m3, fp8_hybrid, ...",
            show_default="fp32, bf16, e4m3fn and e8m3, or none beside --recipes",
        ),
    ] = None,
    recipes: Annotated[
        list[str] | None, typer.Option(help="Recipes (see fpsim recipes), or formats beside them.", show_default="none")
    ] = None,
    seeds: Seeds = 3,
    first_seed: FirstSeed = 0,
    learning_rates: Rates = None,
    steps: Steps = 300,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window.", show_default="the model's own")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=2, help="Vocabulary of your own model.", show_default="the model's own")
    ] = None,
    loss_scale: Annotated[float, typer.Option(help="Factor on the loss in the backward pass.")] = 1.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 means no clipping.")] = 1.0,
    z_loss: Annotated[float, typer.Option(min=0, help="Coefficient of the z-loss; 0 means none.")] = 0.0,
    qk_norm: Annotated[
        bool, typer.Option("--qk-norm", help="Normalise queries and keys (a Llama becomes Qwen3).")
    ] = False,
    quality: Annotated[str, typer.Option(help="clean, shuffled, duplicated or noisy training text.")] = "clean",
    level: Annotated[float, typer.Option(help="Share of the training text that --quality spoils.")] = 0.5,
    measure_every: Annotated[int, typer.Option(min=0, help="Steps between measurements of sharpness.")] = 10,
    attention_every: Annotated[
        int, typer.Option(min=0, help="Steps between measurements of the largest attention logit; 0 means never.")
    ] = 0,
    hessian_every: Annotated[int, typer.Option(min=0, help="Steps between Hessian eigenvalues; 0 means never.")] = 0,
    device: Device = None,
    interpret: Interpret = False,
    out: Out = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    gpus: Gpus = 0.0,
    cpus: Cpus = 1.0,
    retries: Retries = 2,
) -> None:
    """Train a model in several formats or recipes over seeds and learning rates, and write a report."""
    load_torch("fpsim.paper.sweeps")
    from fpsim.paper.config import RunConfig
    from fpsim.paper.data import DataConfig
    from fpsim.paper.models import model_config
    from fpsim.paper.sweeps import grid

    chosen = model_config(model or "tiny")
    chosen = replace(chosen, context=context or chosen.context, vocabulary=vocabulary or chosen.vocabulary)
    if qk_norm:
        if chosen.family != "llama":
            raise ValueError(f"--qk-norm is for a Llama, and {model} is no Llama: normalise them in your own model")
        chosen = replace(chosen, family="qwen3")
    base = RunConfig(
        model=chosen,
        data=DataConfig(data, quality=quality, level=level if quality != "clean" else 1.0),
        steps=steps,
        batch=batch,
        warmup=steps // 10,
        clip=clip or None,
        loss_scale=loss_scale,
        z_loss=z_loss,
        validate_every=max(1, steps // 5),
        measure_every=measure_every,
        attention_every=attention_every,
        hessian_every=hessian_every,
        ranges_every=max(1, steps // 4),
        stop_nonfinite=10,
        backend="interpreted" if interpret else "compiled",
        device=device or "cpu",
    )
    names = list(dict.fromkeys(formats or ([] if recipes else ["fp32", "bf16", "e4m3fn", "e8m3"])))
    plan = grid(
        base,
        formats=names,
        recipes=dict.fromkeys(recipes or []),
        learning_rates=learning_rates,
        seeds=range(first_seed, first_seed + seeds),
    )
    _compute(
        plan,
        out or Path("runs/study"),
        title=f"{chosen.label} on {base.data.label}",
        facts={},
        executor=executor,
        workers=workers,
        address=address,
        resources=_resources(executor, address, cpus, gpus),
        retries=retries,
    )


@app.command(cls=_SeveralValues)
@plain_errors
def experiment(
    number: Annotated[int, typer.Argument(help="1 to 11: see fpsim study list.")],
    size: Annotated[str, typer.Option(help="quick (minutes on 2 cores), full (hours) or paper (GPUs).")] = "quick",
    conditions: Annotated[
        list[str] | None, typer.Option(help="Conditions to run, by name or glob ('*truncated').", show_default="all")
    ] = None,
    model: Model = None,
    data: Data = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds.", show_default=_OF_SIZE)] = None,
    first_seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="The first seed; the others follow it.", show_default="0; in 9 to 11 the registered one"
        ),
    ] = None,
    learning_rates: Rates = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Optimizer steps per run.", show_default=_OF_SIZE)] = None,
    device: Device = None,
    interpret: Interpret = False,
    out: Out = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    gpus: Gpus = 0.0,
    cpus: Cpus = 1.0,
    retries: Retries = 2,
) -> None:
    """Run an experiment, the paper's or ours (9 to 11), and write a report. Complete runs are not computed again."""
    load_torch("fpsim.paper.sweeps")
    chosen, setting = _setting(number, size)
    setting = _resized(setting, model, data, seeds, learning_rates, steps, device, interpret)
    if first_seed is not None:
        setting = replace(setting, first_seed=first_seed)
    facts = {
        "number": number,
        "question": chosen.question,
        "claim": chosen.claim,
        "differs": chosen.differences(size),
        "reference": chosen.reference,
        "pairs": [list(pair) for pair in chosen.pairs],
        **chosen.registration(size, setting),
        "size": f"{size}: {setting.base.model.label}, {setting.base.steps} steps, "
        f"{setting.seeds} seeds from {setting.first_seed}, "
        f"learning rates {', '.join(f'{rate:g}' for rate in setting.rates)}",
    }
    on_gpu = setting.base.device.startswith("cuda")
    _compute(
        _only(chosen.plan(setting), conditions),
        out or Path(f"runs/experiment-{number}-{size}"),
        title=f"Experiment {number}: {chosen.title}",
        facts={"experiment": facts},
        executor=executor,
        workers=workers,
        address=address,
        resources=_resources(executor, address, cpus, gpus) | ({} if gpus or not on_gpu else {"num_gpus": 1.0}),
        retries=retries,
    )


@app.command(cls=_SeveralValues)
@plain_errors
def cost(
    number: Annotated[int, typer.Argument(help="1 to 11: see fpsim study list.")],
    size: Annotated[str, typer.Option(help="quick, full or paper.")] = "paper",
    conditions: Annotated[
        list[str] | None, typer.Option(help="Conditions to measure, by name or glob.", show_default="all")
    ] = None,
    model: Model = None,
    device: Device = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows per measured step.", show_default="the batch of the runs")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps after the first; their median counts.")] = 3,
) -> None:
    """Measure a few steps of each condition of an experiment, and tell how long all of its runs would take here."""
    load_torch("fpsim.paper.sweeps")
    from fpsim.paper import cost as study
    from fpsim.paper.progress import say

    chosen, setting = _setting(number, size)
    setting = _resized(setting, model, None, None, None, None, device, False)
    console, found = Console(stderr=True), []
    for each in study.costs(_only(chosen.plan(setting), conditions), windows=windows, steps=steps):
        say(console, f"{each.condition}: {1e6 * each.seconds_per_token:.4g} ms per 1000 tokens")
        found.append(each)
    Console().print(study.table(found))


def _setting(number: int, size: str) -> tuple[Experiment, Setting]:
    from fpsim.paper.choices import check_choice
    from fpsim.paper.experiments import SIZES, experiment

    chosen = experiment(number)
    check_choice("size", size, SIZES)
    return chosen, chosen.settings[size]


def _resources(executor: str | None, address: str | None, cpus: float, gpus: float) -> dict[str, float]:
    """The resources of one of Ray's workers."""
    is_ray = executor == "ray" or (executor is None and address is not None)
    if not is_ray and (cpus, gpus) != (1.0, 0.0):
        raise ValueError("--cpus and --gpus are for the workers of Ray: add --executor ray, or leave them out")
    return {"num_cpus": cpus, "num_gpus": gpus}


def _only(plan: list[Planned], globs: list[str] | None) -> list[Planned]:
    """The runs whose condition one of ``globs`` matches; all runs if there are no globs."""
    names = list(dict.fromkeys(planned.condition for planned in plan))
    for glob in globs or []:
        if not fnmatch.filter(names, glob):
            raise ValueError(
                f"no condition {glob!r}{did_you_mean(glob, names)}: there are {', '.join(map(repr, names))}"
            )
    return [
        planned for planned in plan if not globs or any(fnmatch.fnmatchcase(planned.condition, glob) for glob in globs)
    ]


def _resized(
    setting: Setting,
    model: str | None,
    data: str | None,
    seeds: int | None,
    rates: list[float] | None,
    steps: int | None,
    device: str | None,
    interpret: bool,
) -> Setting:
    from fpsim.paper.models import model_config

    changes: dict[str, Any] = {
        "model": model and model_config(model),
        "data": data and replace(setting.base.data, path=data),
        "steps": steps,
        "device": device,
        "backend": interpret and "interpreted",
    }
    base: RunConfig = replace(setting.base, **{name: value for name, value in changes.items() if value})
    return replace(setting, base=base, rates=tuple(rates or setting.rates), seeds=seeds or setting.seeds)


def _compute(plan: list[Planned], out: Path, *, title: str, facts: dict[str, Any], **how: Any) -> None:
    from fpsim.paper.report import report as write
    from fpsim.paper.sweeps import sweep

    console = Console(stderr=True)
    try:
        outcome = sweep(plan, out, title=title, facts=facts, console=console, **how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {out} keeps finished runs and the state of others; the same command goes on from there"
        ) from None
    _say(outcome, console)
    if outcome.computed + outcome.reused > 0:
        typer.echo(write(out))
    if outcome.failures:
        raise typer.Exit(1)


def _say(outcome: Outcome, console: Console) -> None:
    from fpsim.paper.progress import say

    say(
        console,
        f"{outcome.computed} runs computed, {outcome.reused} reused, {outcome.retries} tried again, "
        f"{len(outcome.failures)} given up; {outcome.seconds:.0f} s",
    )
    for failure in outcome.failures:
        last = failure.text.strip().splitlines()[-1] if failure.text.strip() else "no message"
        say(console, f"{failure.condition}, run {failure.key}, {failure.tries} tries: {last}", style="red")


@app.command()
@plain_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="the same")] = None,
) -> None:
    """Write the report on a sweep: report.html, figures/*.png and outcomes.json. The sweep may be unfinished."""
    from fpsim.paper.report import report as write

    typer.echo(write(folder, out))


@app.command(cls=_SeveralValues)
@plain_errors
def drift(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    conditions: Annotated[
        list[str] | None, typer.Option(help="Conditions to compare.", show_default="all but the reference")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The other one.", show_default="that of the sweep")] = None,
    seeds: Seeds = 5,
    every: Annotated[int, typer.Option(min=1, help="Steps between comparisons.")] = 50,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and the figure.", show_default="that of the sweep")
    ] = None,
) -> None:
    """Show which layers' weights grow more than those of the reference: trains the sweep's runs again, in pairs."""
    from fpsim.paper import drift as study
    from fpsim.paper.report import judge_sweep
    from fpsim.paper.storage import replace_file
    from fpsim.paper.sweeps import read_sweep

    judged = judge_sweep(*read_sweep(folder))
    judged = replace(judged, reference=reference or judged.reference)
    found = study.drifts(judged, conditions, seeds=seeds, every=every, console=Console(stderr=True))
    out = out or folder
    replace_file(out / "drift.md", study.markdown(found, judged.reference).encode())
    study.figure(found).savefig(out / "drift.png")
    typer.echo(out / "drift.md")


@app.command(name="list")
@plain_errors
def list_experiments() -> None:
    """Show the paper's experiments, and their number of runs by size."""
    from fpsim.paper.experiments import EXPERIMENTS, SIZES

    table = Table("", "experiment", "question", "the paper says", *SIZES, title="Runs by size", show_lines=True)
    for chosen in EXPERIMENTS.values():
        counts = [str(len(chosen.plan(chosen.settings[size]))) for size in SIZES]
        table.add_row(str(chosen.number), chosen.title, chosen.question, chosen.claim, *counts)
    Console().print(table)


@app.command()
@plain_errors
def claims(
    names: Annotated[
        list[str] | None, typer.Argument(help="Claims, or recipes with all their claims.", show_default="all")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the measured numbers and the table.")] = Path("runs/claims"),
    show: Annotated[
        bool, typer.Option("--list", help="Show the claims and their pass marks, and measure none.")
    ] = False,
) -> None:
    """Test the claims of published recipes on small test beds, by pass marks that were registered beforehand.

    The numbers of each seed are kept in the folder, and an interrupted test goes on from there.
    """
    from fpsim.paper.claims import CLAIMS
    from fpsim.paper.claims.claim import registered
    from fpsim.paper.claims.run import chosen, markdown, measure
    from fpsim.paper.progress import say
    from fpsim.paper.storage import replace_file

    selected = chosen(names or [], CLAIMS)
    if show:
        table = Table("claim", "recipe", "statement", "holds", "control", "seeds", show_lines=True)
        for claim in selected:
            by = registered(claim.name)
            marks = ("\n".join(map(str, part)) for part in (by.holds, by.control))
            table.add_row(claim.name, claim.recipe, claim.statement, *marks, str(len(by.seeds)))
        Console().print(table)
        return
    console = Console(stderr=True)
    outcomes = {}
    for claim in selected:
        say(console, f"{claim.name}: {len(registered(claim.name).seeds)} seeds")
        outcomes[claim.name], computed = measure(claim, out)
        say(console, f"  {outcomes[claim.name].verdict} ({computed} seeds computed)")
        for judged in (*outcomes[claim.name].holds, *outcomes[claim.name].control):
            say(console, f"    {judged}")
    replace_file(out / "claims.md", markdown(outcomes, CLAIMS).encode())
    typer.echo(out / "claims.md")


@app.command(cls=_SeveralValues)
@plain_errors
def pareto(
    families: Annotated[list[str] | None, typer.Option(help="resnet, llama.", show_default="both")] = None,
    formats: Annotated[
        list[str] | None, typer.Option(help="bf16, int8, e4m3fn, int4, e2m1fn, int2.", show_default="all")
    ] = None,
    size: Annotated[str, typer.Option(help="quick (minutes on 2 cores) or full (hours).")] = "quick",
    interpret: Interpret = False,
    out: Annotated[Path, typer.Option(help="Folder for the numbers, the table and the figure.")] = Path("runs/pareto"),
) -> None:
    """Train models of several widths in several formats, and show which reach a loss at the least cost."""
    from fpsim.paper import pareto as study
    from fpsim.paper.choices import check_choice
    from fpsim.paper.progress import say
    from fpsim.paper.storage import replace_file

    check_choice("size", size, study.SIZES)
    points = study.pareto(
        families or study.FAMILIES,
        formats or study.FORMATS,
        study.SIZES[size],
        out,
        interpret=interpret,
        tell=partial(say, Console(stderr=True)),
    )
    found = study.means(points)
    replace_file(out / "pareto.md", study.markdown(found).encode())
    study.figure(found).savefig(out / "pareto.png")
    typer.echo(out / "pareto.md")


@app.command(cls=_SeveralValues)
@plain_errors
def generation(
    formats: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16, int8, nf4, 'nf4, double', fp4, 'fp4, double'; all are compared with fp32.",
            show_default="all",
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="quick (minutes on 2 cores) or full (an hour or more).")] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for the numbers, the table and the figure.")] = Path(
        "runs/generation"
    ),
) -> None:
    """Round the weights of a trained model, and show how its texts change with temperature, top-k and length."""
    from fpsim.paper import generation as study
    from fpsim.paper.choices import check_choice
    from fpsim.paper.progress import say
    from fpsim.paper.storage import replace_file

    check_choice("size", size, study.SIZES)
    names = dict.fromkeys(["fp32", *(formats or study.FORMATS)])
    qualities = study.study(study.SIZES[size], names, out, tell=partial(say, Console(stderr=True)))
    replace_file(out / "generation.md", study.markdown(qualities).encode())
    study.figure(qualities).savefig(out / "generation.png")
    typer.echo(out / "generation.md")


@app.command()
@plain_errors
def attention(
    seed: Annotated[int, typer.Option(help="Of the random rows.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figure.")] = Path("runs/attention"),
) -> None:
    """Show the one-sided rounding errors of attention in bfloat16, without any training."""
    from fpsim.paper import attention_bias as study
    from fpsim.paper.storage import replace_file

    out.mkdir(parents=True, exist_ok=True)
    found = [*study.sums(seed=seed), *study.attentions(seed=seed)]
    tables = study.markdown(found)
    replace_file(out / "attention.md", tables.encode())
    study.figure(found).savefig(out / "attention.png")
    typer.echo(tables)
    typer.echo(out / "attention.md")


@app.command()
@plain_errors
def rules() -> None:
    """Print the registered rules: when a run counts as diverged, spiking or trained, and how predictions are judged."""
    from fpsim.paper.verdicts import preregistration

    typer.echo(preregistration(), nl=False)


@app.command()
@plain_errors
def train(
    config: Annotated[
        Path, typer.Argument(help="Configuration of a run as JSON: the field config of a run in sweep.json.")
    ],
    out: Annotated[Path, typer.Argument(help="Parquet file to write the records to.")],
    parallel: Annotated[str, typer.Option(help="Kind of parallelism under torchrun: ddp or fsdp2.")] = "ddp",
    checkpoint: Annotated[Path | None, typer.Option(help="File to keep the state in.", show_default="none")] = None,
) -> None:
    """Compute one run, here or under torchrun: torchrun --nproc-per-node 8 -m fpsim.cli.study train CONFIG OUT."""
    from fpsim.paper.checkpoint import Checkpoint
    from fpsim.paper.config import from_dict, run_key, to_dict
    from fpsim.paper.parallel import from_environment
    from fpsim.paper.storage import read_json, replace_file, to_parquet, versions
    from fpsim.paper.training import records
    from fpsim.processors import check_device

    chosen = from_dict(read_json(config))
    check_device(chosen.device)
    for path in filter(None, (out, checkpoint)):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    group = from_environment(parallel, chosen.device)
    state = Checkpoint(checkpoint) if checkpoint else None
    history = list(records(chosen, checkpoint=state, parallel=group))
    if group is None or group.is_first:
        facts = {"key": run_key(chosen), "config": to_dict(chosen), "condition": config.stem, **versions()}
        replace_file(out, to_parquet(history, {**facts, "processes": group.world if group else 1}))
        typer.echo(out)


if __name__ == "__main__":
    app()
