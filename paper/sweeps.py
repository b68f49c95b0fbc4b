"""Sweeps: many runs, distributed over workers, each computed once and kept in one folder.

A run that the folder holds already is reused. An interrupted run continues from its checkpoint. A run that fails, or
whose worker dies, is tried again and reported.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from fpsim.json_text import parse_json
from fpsim.policy.shorthand import parse_shorthand
from fpsim.processors import usable_cores

from . import require
from .choices import check_choice
from .config import RunConfig, compile_key, from_dict, run_key, to_dict
from .data import DataConfig, fetch
from .progress import progress_bars
from .storage import Run, read_run, replace_file, versions
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
    formats: Iterable[str],
    seeds: Iterable[int],
    learning_rates: Iterable[float] | None = None,
    data: Iterable[DataConfig] | None = None,
) -> list[Planned]:
    """Every format with every learning rate, seed and text; seeds vary slowest, so that a sweep is balanced early.

    Args:
        base: the fields that do not vary.
        formats: as `fpsim.policy.shorthand.parse_shorthand` reads them.
        learning_rates, data: None means those of ``base``.

    Raises:
        ValueError: a format that `parse_shorthand` cannot read.
    """
    texts = list(data or [base.data])
    rates = list(learning_rates or [base.learning_rate])
    options = {name: parse_shorthand(name) for name in formats}
    return [
        Planned(
            name if len(texts) == 1 else f"{name}, {text.label}",
            replace(base, options=options[name], learning_rate=rate, seed=seed, data=text),
        )
        for seed, name, text, rate in itertools.product(seeds, options, texts, rates)
    ]


def sweep(
    plan: Sequence[Planned],
    folder: Path,
    *,
    title: str = "",
    executor: str = "ray",
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
        executor: ``ray``, ``process`` (without Ray), or ``serial`` (in this process).
        workers: runs at a time; None is one per core, of the cluster where there is one. Ignored by ``serial``.
        address, resources: as for `fpsim.paper.workers.RayPool`.
        retries: how many times a failed run is tried again.
        threads: the number of torch's threads in each worker; only the same number gives the same bits.
        checkpoint_seconds: the least time between two writes of a run's state.
        facts: JSON types to keep in ``sweep.json``, such as the reference condition of an experiment.
        console: the console for progress bars; None is standard error.

    Raises:
        ValueError: an empty plan, an unknown executor, or one configuration under two conditions.
        ModuleNotFoundError: Ray or pyarrow is not installed.
        FileNotFoundError, ConnectionError: a text that does not exist, or a Hub that does not answer.
    """
    start = time.perf_counter()
    require("pyarrow")
    check_choice("executor", executor, EXECUTORS)
    keyed = _keyed(plan)
    missing = {key: planned for key, planned in keyed.items() if not _result(folder, key).exists()}
    for text in {planned.config.data for planned in missing.values()}:
        fetch(text)
    _describe(folder, keyed, title, facts or {})
    jobs = [_job(folder, key, planned, threads, checkpoint_seconds) for key, planned in missing.items()]
    computed, retried, failures = 0, 0, []
    console = console or Console(stderr=True)
    if jobs:
        pool = _pool(executor, len(jobs), workers, address, resources or {})
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
    return Outcome(computed, len(keyed) - len(missing), tuple(failures), retried, time.perf_counter() - start)


def _pool(executor: str, jobs: int, workers: int | None, address: str | None, resources: Mapping[str, float]) -> Pool:
    if executor == "ray":
        return RayPool(jobs, workers=workers, address=address, resources=resources)
    return ProcessPool(min(workers or usable_cores(), jobs)) if executor == "process" else SerialPool()


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


def _describe(folder: Path, keyed: Mapping[str, Planned], title: str, facts: Mapping[str, Any]) -> None:
    """Add this sweep's plan to the folder's; copy the scripts of users' models."""
    path = folder / "sweep.json"
    old = parse_json(path.read_text()) if path.exists() else {}
    plan = {entry["key"]: entry for entry in old.get("plan", [])}
    for key, planned in keyed.items():
        plan[key] = {"key": key, "condition": planned.condition, "config": to_dict(planned.config)}
        if planned.config.model.script:
            script = Path(planned.config.model.script.rpartition(":")[0])
            (folder / "scripts").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(script, folder / "scripts" / script.name)
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    started = {"time": now, "command": " ".join(["fpsim", *sys.argv[1:]]) if sys.argv else "", **versions()}
    content = {
        **old,
        **facts,
        "title": title or old.get("title") or folder.name,
        "starts": [*old.get("starts", []), started],
        "plan": list(plan.values()),
    }
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read_sweep(folder: Path) -> tuple[list[Run], dict[str, Any]]:
    """The finished runs of a sweep in the order of its plan, and the content of ``sweep.json`` with ``failures``.

    Raises:
        FileNotFoundError: no sweep at ``folder``, or none of its runs has finished.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"no sweep at {folder}: name the folder that fpsim study wrote, with sweep.json in it")
    facts = parse_json(path.read_text())
    runs = [
        read_run(_result(folder, entry["key"]), entry["condition"])
        for entry in facts["plan"]
        if _result(folder, entry["key"]).exists()
    ]
    if not runs:
        raise FileNotFoundError(f"the sweep at {folder} has no finished run yet: run its command again")
    failures = sorted((folder / "failures").glob("*.json"))
    return runs, {**facts, "failures": [{"key": f.stem, **parse_json(f.read_text())} for f in failures]}


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
            self._progress.console.print(f"{self._conditions[job.key]}, run {job.key}: {reason}", style="red")
        state = f"{self._retried} interrupted or failed" if self._retried else ""
        self._progress.update(self._all, state=state)
