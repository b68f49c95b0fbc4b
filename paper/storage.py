"""Results on disk: one Parquet file per run with its metadata, and one JSON file per sweep.

A sweep's folder holds ``sweep.json`` (the plan, and the versions of every start), ``runs/KEY.parquet`` (the records of
one run; its configuration and versions are in the file's metadata under ``fpsim``), ``failures/KEY.json``,
``checkpoints/`` of unfinished runs, and ``scripts/`` with the users' own models.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import require
from .config import RunConfig, from_dict
from .record import Record

_METADATA = b"fpsim"
_PACKAGES = ("fpsim", "torch", "transformers", "numpy", "scipy", "ray", "pyarrow")


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
        ValueError: a Parquet file that `to_parquet` did not write.
    """
    table, facts = _read(path)
    columns = {
        name: table[name].to_numpy().astype(np.int64 if name == "step" else np.float64) for name in table.column_names
    }
    return Run(facts["key"], condition, from_dict(facts["config"]), columns, facts)


def _read(source: Path | bytes) -> tuple[Any, dict[str, Any]]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    table = parquet.read_table(arrow.BufferReader(source) if isinstance(source, bytes) else source)
    if _METADATA not in (table.schema.metadata or {}):
        raise ValueError(f"{source!r} is no run of fpsim's study: its metadata has no entry {_METADATA.decode()!r}")
    return table, json.loads(table.schema.metadata[_METADATA])


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` in one piece: readers see the old content or the new."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to in a ``with`` block; the file there takes the place of ``path`` at the end of the block.

    The folder of ``path`` is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    yield partial
    os.replace(partial, path)


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
