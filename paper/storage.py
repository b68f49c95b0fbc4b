"""Results on disk: one Parquet file per run with its metadata, and one JSON file per sweep.

A sweep's folder holds ``sweep.json`` (the plan, and the versions of every start), ``runs/KEY.parquet`` (the records of
one run; its configuration and versions are in the file's metadata under ``fpsim``), ``failures/KEY.json``,
``checkpoints/`` of unfinished runs, and ``scripts/`` with the users' own models. A file that is broken, because a disk
was full or a machine lost power, is put aside under its name with ``.broken`` added. A file that is being written has a
name that ends with ``.partial``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fpsim.json_text import parse_json

from . import require
from .config import RunConfig, from_dict
from .record import Record

_METADATA = b"fpsim"
#: The names of partial files: with the process and the machine that write them; from older versions, the process alone.
_WRITTEN_BY = re.compile(r".+\.(?P<process>[0-9]+)@(?P<host>.+)\.partial")
_WRITTEN_BY_OLDER = re.compile(r"(?:sweep\.json|[0-9a-f]{16}\.(?:json|parquet|pt))\.(?P<process>[0-9]+)")
_DAY = 24 * 60 * 60
_PACKAGES = ("fpsim-torch", "torch", "transformers", "numpy", "scipy", "ray", "pyarrow")


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run as it was stored.

    Attributes:
        key: its name (`fpsim.paper.config.run_key`).
        condition: the label under which it is compared with others.
        config: its configuration.
        columns: one array per field of `Record`, float64 (``step``: int64), NaN where nothing was measured.
        facts: versions, git revision and seconds.
    """

    key: str
    condition: str
    config: RunConfig
    columns: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def to_parquet(history: Sequence[Record], facts: Mapping[str, Any]) -> bytes:
    """The records and ``facts`` (JSON types) as one Parquet file. Missing values are null, NaN stays NaN."""
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    rows = [asdict(record) for record in history]
    table = arrow.table(
        {
            entry.name: arrow.array(
                [row[entry.name] for row in rows],
                type=arrow.int64() if entry.name == "step" else arrow.float64(),
                from_pandas=False,
            )
            for entry in fields(Record)
        }
    )
    sink = arrow.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata({_METADATA: json.dumps(facts)}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_records(source: Path | bytes) -> tuple[list[Record], dict[str, Any]]:
    """The records and facts that `to_parquet` wrote to ``source``."""
    table, facts = _read(source)
    known = [entry.name for entry in fields(Record) if entry.name in table.column_names]
    return [Record(**row) for row in table.select(known).to_pylist()], facts


def read_run(path: Path, condition: str) -> Run:
    """The run stored at ``path``.

    Raises:
        ValueError: the file is broken, or `to_parquet` did not write it.
        OSError: it cannot be read.
    """
    table, facts = _read(path)
    try:
        columns = {entry.name: np.full(len(table), math.nan) for entry in fields(Record)}  # old files lack new ones
        columns |= {
            name: table[name].to_numpy().astype(np.int64 if name == "step" else np.float64)
            for name in table.column_names
        }
        return Run(facts["key"], condition, from_dict(facts["config"]), columns, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {one_line(error)}") from error


def _read(source: Path | bytes) -> tuple[Any, dict[str, Any]]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    if isinstance(source, Path):
        source.open("rb").close()  # for the plain errors of a file that is not there or not readable
    try:
        table = parquet.read_table(arrow.BufferReader(source) if isinstance(source, bytes) else source)
        stored = (table.schema.metadata or {}).get(_METADATA)
        facts = None if stored is None else parse_json(stored.decode())
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise ValueError(f"{_named(source)} is broken: {one_line(error)}") from error
    if facts is None:
        raise ValueError(
            f"{_named(source)} is no run of fpsim's study: its metadata has no entry {_METADATA.decode()!r}"
        )
    return table, facts


def _named(source: Path | bytes) -> str:
    return str(source) if isinstance(source, Path) else f"a Parquet file of {len(source)} bytes"


def one_line(error: BaseException) -> str:
    """The type and the message of ``error`` in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file at ``path``.

    Raises:
        ValueError: the file is broken, or it holds no object.
        OSError: it cannot be read.
    """
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: it holds no JSON object but {type(content).__name__}")
    return content


class OtherVersion(ValueError):
    """A file whose numbers another version of fpsim computed."""


def read_results(path: Path, name: str) -> dict[str, Any]:
    """The results by key that `write_results` wrote under ``name``; empty where there is no file.

    Raises:
        OtherVersion: another version of fpsim wrote them, so that these numbers and new ones do not belong together.
        ValueError: the file is broken.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content.get(name), dict):
        raise ValueError(f"{path} is broken: it holds no {name}")
    if content.get("source") != versions()["source"]:
        raise OtherVersion(f"{path} was written by another version of fpsim: name another folder")
    return dict(content[name])


def write_results(path: Path, name: str, results: Mapping[str, Any]) -> None:
    """Write ``results`` (JSON types by key) under ``name``, with the version of fpsim; `read_results` reads them."""
    replace_file(path, json.dumps({"source": versions()["source"], name: results}, indent=1).encode())


def put_aside(path: Path) -> Path:
    """Rename the broken file at ``path``, and return its new path; of several processes one renames it."""
    aside = path.with_name(f"{path.name}.broken")
    with suppress(FileNotFoundError):
        os.replace(path, aside)
    return aside


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` in one piece: readers see the old content or the new."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to in a ``with`` block; the file there takes the place of ``path`` at the end of the block.

    The folder of ``path`` is made if it is missing. If the block raises, the file is removed. If the process is killed,
    `remove_partial_files` removes it later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}@{socket.gethostname()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # else the file may be empty after a power failure
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not name the file
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half written in the ``folder`` of a sweep.

    A process of this machine that lives keeps its files. Files of other machines are removed a day after their last
    change.
    """
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        found = _WRITTEN_BY.fullmatch(path.name) or _WRITTEN_BY_OLDER.fullmatch(path.name)
        if not found or not path.is_file():
            continue
        is_here = found.groupdict().get("host") in (None, socket.gethostname())
        with suppress(FileNotFoundError):  # another sweep removes it, too
            if not _lives(int(found["process"])) if is_here else time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A ``with`` block that one process at a time enters for the same ``path``, also on several machines.

    The lock is a file beside ``path``; the system frees it when the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """The facts beside the configuration that results depend on: packages, source, git revision, machine."""
    from fpsim.source import source_hash

    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": {"python": platform.python_version(), **installed},
        "source": source_hash()[:16],
        "git": _git_revision(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def _git_revision() -> str | None:
    """The commit of the checkout that this file is in, with ``+`` if tracked files differ from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def plain_number(value: float) -> float | None:
    """``value``, or None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
