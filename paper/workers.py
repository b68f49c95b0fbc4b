"""Pools of workers that compute runs: this process, other processes of this machine, or Ray's actors on any machine.

Each worker of a pool takes one job at a time and sends messages about it. `fpsim.paper.sweeps` gives out the jobs, and
handles messages and the death of workers.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from fpsim.processors import usable_cores

from . import require
from .checkpoint import Checkpoint
from .config import compile_key, from_dict
from .storage import one_line, to_parquet, versions
from .trainer import Batch, Trainer
from .training import records

#: Seconds between two messages on the progress of a run.
_PERIOD = 0.5
#: Seconds in which processes may end by themselves.
_GRACE = 2.0
#: Seconds within which a Ray cluster must answer.
_REACHED = 10.0
#: Ray's names of resources: in the options of an actor, and elsewhere.
_RAY_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


@dataclass(frozen=True)
class Job:
    """One run to be computed, in types that any executor can send.

    Attributes:
        key: the run's key (`fpsim.paper.config.run_key`).
        config: its configuration, by `fpsim.paper.config.to_dict`.
        facts: further entries of the result's metadata.
        checkpoint: the file that keeps its state, or None.
        checkpoint_seconds: the least time between two writes of that file.
        threads: the number of torch's threads.
    """

    key: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    checkpoint: str | None
    checkpoint_seconds: float
    threads: int


@dataclass(frozen=True)
class Message:
    """A message from a worker.

    Attributes:
        worker: the number of the worker.
        kind: ``progress``, ``done``, ``error`` (the run raised; the worker lives) or ``dead``.
        step, loss: with ``progress``, those of the newest record.
        result: with ``done``, the run as Parquet.
        text: with ``error`` and ``dead``, the traceback, and the reason in its last line.
    """

    worker: int
    kind: str
    step: int = 0
    loss: float = 0.0
    result: bytes = b""
    text: str = ""


def execute(job: Job, worker: int) -> Iterator[Message]:
    """Compute ``job`` in this process, and yield messages: ``progress``, and at last ``done`` or ``error``."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    try:
        torch.set_num_threads(job.threads)
        config = from_dict(job.config)
        checkpoint = Checkpoint(Path(job.checkpoint), job.checkpoint_seconds, is_own=True) if job.checkpoint else None
        history, told = [], 0.0
        examined: dict[str, Any] = {}

        def look(trainer: Trainer, held_out: Sequence[Batch]) -> None:
            if config.ranges_every and trainer.options is not None:
                examined["ranges"] = trainer.examination(held_out[0]).to_dict()

        for record in records(config, checkpoint=checkpoint, at_end=look):
            history.append(record)
            if time.monotonic() - told >= _PERIOD:
                told = time.monotonic()
                yield Message(worker, "progress", record.step, record.loss)
        facts = {**job.facts, "key": job.key, "config": dict(job.config), **versions()}
        facts |= {"threads": job.threads, "seconds": time.perf_counter() - start, **examined}
        yield Message(worker, "done", len(history), result=to_parquet(history, facts))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # that of an error of torch.compile
        yield Message(worker, "error", text=f"{traceback.format_exc()}\n{one_line(cause)}")
    finally:
        torch.set_num_threads(threads)


class Compiled:
    """Drops the compiled code of the process when a job needs other code, so that memory stays flat."""

    def __init__(self) -> None:
        self._key: str | None = None

    def prepare(self, job: Job) -> None:
        """Make room for ``job``."""
        try:
            key = compile_key(from_dict(job.config))
        except (TypeError, ValueError):
            return  # `execute` reports the error
        if self._key not in (None, key):
            torch._dynamo.reset()
        self._key = key


class Pool(Protocol):
    """Workers with numbers from 0."""

    workers: int

    def submit(self, worker: int, job: Job) -> None:
        """Give an idle worker a job; a worker that has died is started again."""

    def messages(self) -> Iterator[Message]:
        """Wait for a message of any worker, and yield those that have arrived."""

    def close(self) -> None:
        """End all workers."""


class SerialPool:
    """This process as the only worker."""

    workers = 1

    def __init__(self) -> None:
        self._running: Iterator[Message] = iter(())
        self._compiled = Compiled()

    def submit(self, worker: int, job: Job) -> None:
        self._compiled.prepare(job)
        self._running = execute(job, worker)

    def messages(self) -> Iterator[Message]:
        yield next(self._running)

    def close(self) -> None:
        pass


class ProcessPool:
    """Fresh Python processes on this machine, which keep their compiled code.

    On several GPUs worker ``i`` computes on GPU ``i`` modulo their number where a run asks for ``cuda``.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, Any] = {}
        self._connections: dict[int, Connection] = {}

    def submit(self, worker: int, job: Job) -> None:
        if worker not in self._connections:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, worker), daemon=True)
            with _without_interrupts():
                process.start()
            there.close()
            self._processes[worker], self._connections[worker] = process, here
        self._connections[worker].send(job)

    def messages(self) -> Iterator[Message]:
        numbers = {connection: worker for worker, connection in self._connections.items()}
        for ready in wait(list(numbers)):
            assert isinstance(ready, Connection)
            worker = numbers[ready]
            try:
                yield ready.recv()
            except (EOFError, OSError):
                yield Message(worker, "dead", text=f"worker {worker} ended with {self._bury(worker)}")

    def _bury(self, worker: int) -> str:
        self._connections.pop(worker).close()
        process = self._processes.pop(worker)
        process.join(timeout=10)
        code = process.exitcode
        process.close()
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        deadline = time.monotonic() + _GRACE
        for process in self._processes.values():
            process.join(timeout=max(0.0, deadline - time.monotonic()))  # it ends now that its connection is closed
            process.terminate()
            process.join()
            process.close()
        self._connections.clear()
        self._processes.clear()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A block whose child processes ignore Ctrl-C, which reaches all processes of a terminal: the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, worker: int) -> None:
    """The program of a process of `ProcessPool`: it computes jobs until the other end closes."""
    compiled = Compiled()
    try:
        while True:
            job = connection.recv()
            if torch.device(job.config["device"]) == torch.device("cuda") and torch.cuda.device_count():
                torch.cuda.set_device(worker % torch.cuda.device_count())
            compiled.prepare(job)
            for message in execute(job, worker):
                connection.send(message)
    except (EOFError, OSError):
        return


class RayPool:
    """Actors of Ray, on this machine or, by an address, on a cluster.

    On a cluster fpsim must be installed on all machines. An interrupted run continues on another machine only if the
    sweep's folder is on a disk that both share; results come back through Ray and need no such disk.

    Args:
        jobs: the number of jobs; there are no more workers than jobs.
        workers: the greatest number of actors; None is as many as have free resources now, and at least one. (An actor
            that never starts would hold its job for ever.)
        address: the address of a running cluster (``auto`` finds one); None starts Ray here and stops it in the end.
        resources: the resources of one actor, as Ray's options name them: ``{"num_cpus": 1, "num_gpus": 1}``.

    Raises:
        ConnectionError: no cluster answers at ``address``.
        ValueError: no machine of the cluster has the resources of one actor.
    """

    def __init__(self, jobs: int, *, workers: int | None, address: str | None, resources: Mapping[str, float]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = require("ray")
        self._actors: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        needs = {"num_cpus": 1.0, **resources}
        wanted = {_RAY_NAMES.get(name, name): amount for name, amount in needs.items() if amount}
        self._owns = not self._ray.is_initialized()
        if self._owns and address:
            _connect(self._ray, address)
        elif self._owns:
            together = min(workers or jobs, jobs) * needs["num_cpus"]
            here = {
                "num_cpus": math.ceil(together if workers else min(together, usable_cores())),
                "include_dashboard": False,
            }
            self._ray.init(address="local", object_store_memory=256 * 2**20, **here, **_QUIET)
        try:
            room = self._room(wanted, others=bool(address) or not self._owns) if wanted else workers or usable_cores()
        except ValueError:
            self.close()
            raise
        self.workers = min(workers or jobs, jobs, room)
        self._actor = self._ray.remote(**needs)(_Actor)

    def _room(self, wanted: Mapping[str, float], *, others: bool) -> int:
        """How many actors have room; with ``others`` on the cluster, only the resources that are free now count."""

        def fitting(there: Mapping[str, float]) -> int:
            return min(int(there.get(name, 0) / amount) for name, amount in wanted.items())

        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(map(fitting, nodes))
        if not room:
            asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            there = "; ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
            raise ValueError(f"a run asks Ray for {asked}, and no machine has that much: there are {there or 'none'}")
        return max(1, min(room, fitting(self._ray.available_resources()))) if others else room

    def submit(self, worker: int, job: Job) -> None:
        if worker not in self._actors:
            self._actors[worker] = self._actor.remote()
        self._streams[worker] = self._actors[worker].execute.options(num_returns="streaming").remote(job, worker)

    def messages(self) -> Iterator[Message]:
        numbers = {stream: worker for worker, stream in self._streams.items()}
        ready, _ = self._ray.wait(list(numbers), num_returns=1, fetch_local=False)
        for stream in ready:
            worker = numbers[stream]
            try:
                yield self._ray.get(next(stream))
            except StopIteration:
                del self._streams[worker]
            except self._ray.exceptions.RayError as error:
                del self._streams[worker], self._actors[worker]
                yield Message(worker, "dead", text=f"worker {worker} died: {str(error).strip().splitlines()[0]}")

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._streams.clear()
        if self._owns:
            self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join the cluster at ``address``. A closed port is reported at once; Ray alone takes minutes."""
    remedy = (
        "start one with ray start --head, give the address that it prints, and set RAY_AUTH_MODE=token here too if it "
        "asks for a token"
    )
    host, _, port = address.rpartition(":")
    try:
        if "://" not in address and host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=_REACHED).close()
        ray.init(address=address, **_QUIET)
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address} ({error}): {remedy}") from None


class _Actor:
    """A worker of `RayPool`."""

    def __init__(self) -> None:
        self._compiled = Compiled()

    def execute(self, job: Job, worker: int) -> Iterator[Message]:
        self._compiled.prepare(job)
        yield from execute(job, worker)
