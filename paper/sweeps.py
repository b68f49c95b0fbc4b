"""Sweeps: many runs, distributed over workers, each computed once and kept in one folder.

A run that the folder holds already is reused. An interrupted run continues from its checkpoint. A run that fails, or
whose worker dies, is tried again and reported.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TaskID

from fpsim.policy.shorthand import parse_shorthand
from fpsim.processors import check_device, usable_cores
from fpsim.recipes import RECIPES
from fpsim.suggestions import did_you_mean

from . import require
from .choices import check_choice
from .config import RunConfig, check_single_process, compile_key, from_dict, run_key, to_dict
from .data import DataConfig, check_vocabulary, fetch, load
from .models import ModelConfig, check_script
from .progress import progress_bars, say
from .storage import Run, locked, put_aside, read_json, read_run, remove_partial_files, replace_file, versions
from .workers import Job, Message, Pool, ProcessPool, RayPool, SerialPool

EXECUTORS = ("ray", "process", "serial")


@dataclass(frozen=True)
class Planned:
    """A run and the label under which it is compared with others.

    Attributes:
        condition: the label of the comparison: the format, for example, but not the seed or the learning rate.
        config: its configuration.
    """

    condition: str
    config: RunConfig


@dataclass(frozen=True)
class Failure:
    """A run that was given up: its key, condition, number of tries, and the text of its last error."""

    key: str
    condition: str
    tries: int
    text: str = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """The result of `sweep`: numbers of runs computed and reused, runs given up, retries, and seconds in all."""

    computed: int
    reused: int
    failures: tuple[Failure, ...]
    retries: int
    seconds: float


def grid(
    base: RunConfig,
    *,
    formats: Iterable[str] = (),
    recipes: Iterable[str] = (),
    seeds: Iterable[int],
    learning_rates: Iterable[float] | None = None,
    data: Iterable[DataConfig] | None = None,
    models: Iterable[ModelConfig] | None = None,
) -> list[Planned]:
    """Every format and recipe with every rate, seed, text and model; seeds vary slowest: a sweep is balanced early.

    Args:
        base: the fields that do not vary.
        formats: as `fpsim.policy.shorthand.parse_shorthand` reads them.
        recipes: names of recipes (`fpsim.recipes.RECIPES`), with their defaults. A format may stand here too.
        learning_rates, data, models: None means those of ``base``. Several models are told apart by their sizes.

    Raises:
        ValueError: a format that `parse_shorthand` cannot read, an unknown recipe, or neither formats nor recipes.
    """
    texts, networks = list(data or [base.data]), list(models or [base.model])
    rates = list(learning_rates or [base.learning_rate])
    precisions: dict[str, dict[str, Any]] = {name: {"options": parse_shorthand(name)} for name in formats}
    for name in recipes:
        label = name if name not in precisions else f"{name} recipe"
        precisions[label] = {"recipe": RECIPES[name]()} if name in RECIPES else {"options": _baseline(name)}
    if not precisions:
        raise ValueError("a sweep needs formats or recipes: give at least one")
    return [
        Planned(
            label + f", {text.label}" * (len(texts) > 1) + f", {network.size}" * (len(networks) > 1),
            replace(base, learning_rate=rate, seed=seed, data=text, model=network, **precisions[label]),
        )
        for seed, label, network, text, rate in itertools.product(seeds, precisions, networks, texts, rates)
    ]


def _baseline(name: str) -> dict[str, Any] | None:
    """The options of a format that stands among recipes."""
    try:
        return parse_shorthand(name)
    except ValueError:
        hint = did_you_mean(name, RECIPES)
        raise ValueError(f"no recipe and no format {name!r}{hint}: recipes are {', '.join(RECIPES)}") from None


def sweep(
    plan: Sequence[Planned],
    folder: Path,
    *,
    title: str = "",
    executor: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    retries: int = 2,
    threads: int = 1,
    checkpoint_seconds: float = 30.0,
    facts: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Outcome:
    """Compute every run of ``plan`` that ``folder`` does not hold yet.

    Args:
        title: the title of the report.
        executor: ``ray``, ``process`` (without Ray), or ``serial`` (in this process). None is ``ray`` with an
            ``address``, and ``process`` without: on a single machine Ray's workers would have a lower priority (nice
            15) than all other programs.
        workers: runs at a time; None is one per core, of the cluster where there is one, or one per GPU where the
            executor is ``process`` and the runs ask for ``cuda``. Ignored by ``serial``.
        address, resources: as for `fpsim.paper.workers.RayPool`.
        retries: how many times a failed run is tried again.
        threads: the number of torch's threads in each worker; only the same number gives the same bits.
        checkpoint_seconds: the least time between two writes of a run's state.
        facts: JSON types to keep in ``sweep.json``, such as the reference condition of an experiment.
        console: the console for progress bars; None is standard error.

    Results that are broken files are put aside, and their runs computed again. Several sweeps may use one folder at the
    same time; its plan is then that of all.

    Raises:
        ValueError: an empty plan, an unknown executor, an address without Ray, one configuration under two conditions,
            or, before the first run, a script whose model cannot be built and run, a text that does not fit, a device
            that is not there.
        ModuleNotFoundError: Ray, pyarrow or transformers is not installed.
        FileNotFoundError, ConnectionError: a text that does not exist, or a Hub that does not answer.
        OSError: the folder cannot be written.
    """
    start = time.perf_counter()
    require("pyarrow")
    executor = executor or ("ray" if address else "process")
    check_choice("executor", executor, EXECUTORS)
    if address and executor != "ray":
        raise ValueError(f"the address {address} is that of a Ray cluster, and the executor is {executor}: use ray")
    console = console or Console(stderr=True)
    keyed = _keyed(plan)
    missing = {key: planned for key, planned in keyed.items() if not _is_finished(folder, key, console)}
    _check([planned.config for planned in missing.values()], devices=address is None)
    _describe(folder, keyed, title, facts or {}, console)
    say(console, f"{title or folder.name}: {len(keyed)} runs, {len(missing)} of them to compute, in {folder}")
    jobs = [_job(folder, key, planned, threads, checkpoint_seconds) for key, planned in missing.items()]
    computed, retried, failures = 0, 0, []
    if jobs:
        pool = _pool(executor, jobs, workers, address, resources or {})
        try:
            with _Board(console, jobs, {key: planned.condition for key, planned in keyed.items()}, pool) as board:
                for event in _schedule(jobs, pool, retries, board):
                    if isinstance(event, _Given):
                        failures.append(Failure(event.job.key, keyed[event.job.key].condition, event.tries, event.text))
                        _note(folder, failures[-1])
                    elif event.message.kind == "done":
                        _keep(folder, event.job.key, event.message.result)
                        computed += 1
                    else:
                        retried += 1
        finally:
            pool.close()
            remove_partial_files(folder)
    return Outcome(computed, len(keyed) - len(missing), tuple(failures), retried, time.perf_counter() - start)


def _pool(
    executor: str, jobs: Sequence[Job], workers: int | None, address: str | None, resources: Mapping[str, float]
) -> Pool:
    if executor == "ray":
        return RayPool(len(jobs), workers=workers, address=address, resources=resources)
    if executor == "serial":
        return SerialPool()
    on_gpu = any(torch.device(job.config["device"]).type == "cuda" for job in jobs)
    return ProcessPool(min(workers or (torch.cuda.device_count() if on_gpu else usable_cores()), len(jobs)))


def _check(configs: Sequence[RunConfig], *, devices: bool) -> None:
    """Find what would make every run fail: a device, a text or the user's own model. Each is tried once."""
    if devices:
        for device in {config.device for config in configs}:
            check_device(device)
    for config in configs:
        check_single_process(config)
    for text in {config.data for config in configs}:
        fetch(text)
    if any(config.model.script is None for config in configs):
        require("transformers")
    for text, model in {(config.data, config.model) for config in configs}:
        check_vocabulary(load(text, context=model.context), model.vocabulary)
    for model, batch, device, dtype in {(c.model, c.batch, c.device, c.dtype) for c in configs}:
        check_script(model, batch=batch, device=device, dtype=getattr(torch, dtype))


def _keyed(plan: Sequence[Planned]) -> dict[str, Planned]:
    if not plan:
        raise ValueError("the plan is empty: give at least one format and one seed")
    keyed: dict[str, Planned] = {}
    for planned in plan:
        other = keyed.setdefault(run_key(planned.config), planned)
        if other.condition != planned.condition:
            raise ValueError(
                f"conditions {other.condition!r} and {planned.condition!r} are the same configuration: leave one out"
            )
    return keyed


def _result(folder: Path, key: str) -> Path:
    return folder / "runs" / f"{key}.parquet"


def _is_finished(folder: Path, key: str, console: Console) -> bool:
    """Whether the folder holds the whole result of the run ``key``; a broken one is put aside."""
    path = _result(folder, key)
    if not path.exists():
        return False
    try:
        found = read_run(path, "").key
        reason = f"{path} is the result of run {found}"
    except ValueError as error:
        found, reason = "", str(error)
    if found != key:
        say(console, f"{reason}: it is now {put_aside(path).name}, and its run is computed again", style="red")
    return found == key


def _checkpoint(folder: Path, key: str) -> Path:
    return folder / "checkpoints" / f"{key}.pt"


def _job(folder: Path, key: str, planned: Planned, threads: int, checkpoint_seconds: float) -> Job:
    place = str(_checkpoint(folder, key).resolve())
    facts = {"condition": planned.condition}
    return Job(key, to_dict(planned.config), facts, place, checkpoint_seconds, threads)


def _keep(folder: Path, key: str, result: bytes) -> None:
    replace_file(_result(folder, key), result)
    _checkpoint(folder, key).unlink(missing_ok=True)
    (folder / "failures" / f"{key}.json").unlink(missing_ok=True)


def _note(folder: Path, failure: Failure) -> None:
    facts = {"condition": failure.condition, "tries": failure.tries, "text": failure.text}
    replace_file(folder / "failures" / f"{failure.key}.json", json.dumps(facts, indent=2).encode())


def _describe(
    folder: Path, keyed: Mapping[str, Planned], title: str, facts: Mapping[str, Any], console: Console
) -> None:
    """Add this sweep's plan to the folder's; copy the scripts of users' models."""
    for script in {planned.config.model.script for planned in keyed.values() if planned.config.model.script}:
        _copy(Path(script.rpartition(":")[0]), folder / "scripts")
    path = folder / "sweep.json"
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    started = {"time": now, "command": " ".join(["fpsim", *sys.argv[1:]]) if sys.argv else "", **versions()}
    own = [_entry(key, planned.condition, planned.config) for key, planned in keyed.items()]
    remove_partial_files(folder)
    with locked(path):  # other sweeps add their plans
        old = _described(folder, console)
        plan = {entry["key"]: entry for entry in [*old.get("plan", []), *own]}
        content = {
            **old,
            **facts,
            "title": title or old.get("title") or folder.name,
            "starts": [*old.get("starts", []), started],
            "plan": list(plan.values()),
        }
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _entry(key: str, condition: str, config: RunConfig) -> dict[str, Any]:
    return {"key": key, "condition": condition, "config": to_dict(config)}


def _described(folder: Path, console: Console) -> dict[str, Any]:
    """The content of ``sweep.json``. If it is broken it is put aside, and the plan is that of the finished runs."""
    path = folder / "sweep.json"
    if not path.exists():
        return {}
    try:
        return _read_description(path)
    except ValueError as error:
        console.print(
            f"{error}: it is now {put_aside(path).name}, and its plan is that of the finished runs", style="red"
        )
    found = []
    for result in sorted((folder / "runs").glob("*.parquet")):
        with suppress(ValueError):
            run = read_run(result, "")
            found.append(_entry(run.key, run.facts.get("condition", run.key), run.config))
    return {"plan": found}


def _read_description(path: Path) -> dict[str, Any]:
    content = read_json(path)
    plan = content.get("plan")
    if not isinstance(plan, list) or not all(isinstance(e, dict) and {"key", "condition"} <= set(e) for e in plan):
        raise ValueError(f"{path} is broken: it holds no plan of runs")
    return content


def _copy(script: Path, folder: Path) -> None:
    """Copy ``script`` into ``folder``; beside another script of the same name, under a name with a hash."""
    content = script.read_bytes()
    path = folder / script.name
    if path.exists() and path.read_bytes() != content:
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(content).hexdigest()[:8]}")
    replace_file(path, content)


def read_sweep(folder: Path) -> tuple[list[Run], dict[str, Any]]:
    """The finished runs of a sweep in the order of its plan, and the content of ``sweep.json`` with ``failures``.

    Raises:
        FileNotFoundError: no sweep at ``folder``, or none of its runs has finished.
        ValueError: ``sweep.json`` is broken. (A broken result is among the ``failures``.)
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"no sweep at {folder}: name the folder that fpsim study wrote, with sweep.json in it")
    facts = _read_description(path)
    runs, failures = [], []
    for entry in facts["plan"]:
        try:
            if _result(folder, entry["key"]).exists():
                runs.append(read_run(_result(folder, entry["key"]), entry["condition"]))
        except ValueError as error:
            failures.append({"key": entry["key"], "condition": entry["condition"], "tries": 0, "text": str(error)})
    if not runs:
        raise FileNotFoundError(f"the sweep at {folder} has no finished run yet: run its command again")
    return runs, {**facts, "failures": failures + [_failure(path) for path in _failures(folder)]}


def _failures(folder: Path) -> list[Path]:
    return sorted((folder / "failures").glob("*.json"))


def _failure(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = {"key": path.stem, "condition": "unknown", "tries": 0}
    try:
        return {**known, "text": "", **read_json(path)}
    except ValueError as error:
        return {**known, "text": str(error)}


# -- giving jobs to workers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """A job is done, or will be tried again."""

    job: Job
    message: Message


@dataclass(frozen=True)
class _Given:
    """A job is given up."""

    job: Job
    tries: int
    text: str


def _schedule(jobs: Sequence[Job], pool: Pool, retries: int, board: _Board) -> Iterator[_Told | _Given]:
    """Keep all workers busy until every job is done or given up."""
    codes = {job.key: compile_key(from_dict(job.config)) for job in jobs}
    waiting, tries = list(jobs), Counter[str]()
    running: dict[int, Job] = {}
    last: dict[int, str] = {}
    while waiting or running:
        for worker in range(pool.workers):
            if worker not in running and waiting:
                job = _next_job(waiting, codes, last, worker)
                waiting.remove(job)
                running[worker], last[worker] = job, codes[job.key]
                tries[job.key] += 1
                board.started(worker, job, tries[job.key])
                pool.submit(worker, job)
        for message in pool.messages():
            job = running.get(message.worker)  # type: ignore[assignment]
            if job is None:  # an idle worker has died: it is started anew with its next job
                last.pop(message.worker, None)
                continue
            board.heard(message, job)
            if message.kind == "progress":
                continue
            del running[message.worker]
            if message.kind == "done" or tries[job.key] <= retries:
                if message.kind != "done":
                    waiting.append(job)
                yield _Told(job, message)
            else:
                yield _Given(job, tries[job.key], message.text)


def _next_job(waiting: Sequence[Job], codes: Mapping[str, str], last: Mapping[int, str], worker: int) -> Job:
    """A job for ``worker``: one whose code it has compiled, else one whose code nobody has, else the most frequent."""
    own = [job for job in waiting if codes[job.key] == last.get(worker)]
    others = {code for number, code in last.items() if number != worker}
    fresh = [job for job in waiting if codes[job.key] not in others]
    if own or fresh:
        return (own or fresh)[0]
    count = Counter(codes[job.key] for job in waiting)
    return max(waiting, key=lambda job: count[codes[job.key]])


class _Board:
    """The live table: a bar for all runs, and one for the current run of each worker."""

    def __init__(self, console: Console, jobs: Sequence[Job], conditions: Mapping[str, str], pool: Pool) -> None:
        self._progress = progress_bars(console, width=24)
        self._conditions = conditions
        self._all = self._progress.add_task("runs", total=len(jobs), state="")
        self._workers: dict[int, TaskID] = {
            worker: self._progress.add_task(f"worker {worker}", total=1, state="waiting")
            for worker in range(pool.workers)
        }
        self._retried = self._failed = 0

    def __enter__(self) -> _Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._workers.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def started(self, worker: int, job: Job, tries: int) -> None:
        config = job.config
        what = f"{self._conditions[job.key]}, rate {config['learning_rate']:g}, seed {config['seed']}"
        again = f" (try {tries})" if tries > 1 else ""
        self._progress.reset(self._workers[worker], total=config["steps"], description=what + again, state="compiling")

    def heard(self, message: Message, job: Job) -> None:
        task = self._workers[message.worker]
        if message.kind == "progress":
            self._progress.update(task, completed=message.step, state=f"loss {message.loss:.3f}")
            return
        if message.kind == "done":
            self._progress.advance(self._all)
        else:
            self._retried += 1
            reason = message.text.strip().splitlines()[-1] if message.text.strip() else message.kind
            say(self._progress.console, f"{self._conditions[job.key]}, run {job.key}: {reason}", style="red")
        state = f"{self._retried} interrupted or failed" if self._retried else ""
        self._progress.update(self._all, state=state)
