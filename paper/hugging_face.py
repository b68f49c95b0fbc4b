"""Hugging Face datasets as text, from the Hub or from folders and files of this machine, by the package ``datasets``.

A source is written ``hf:NAME[:CONFIG][@SPLIT][#COLUMN]``, as in ``hf:wikitext:wikitext-2-raw-v1@train[:10%]#text``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from fpsim.suggestions import did_you_mean

from . import require

#: Before the name of a dataset.
PREFIX = "hf:"
_SPELLING = re.compile(PREFIX + r"(?P<name>[^#]+?)(:(?P<subset>[^:@#/\\]+))?(@(?P<split>[^@#/\\]+))?(#(?P<column>.+))?")
#: The readers of ``datasets`` for single files, by suffix.
_READERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}


class Source(NamedTuple):
    """The parts of ``hf:NAME[:CONFIG][@SPLIT][#COLUMN]``.

    Attributes:
        name: a dataset of the Hub, or a folder or file of this machine.
        subset: the dataset's configuration; None is its only one.
        split: as ``datasets`` spells them, slices included: ``train``, ``train[:10%]``, ``train+test``.
        column: the column whose strings are the text.
    """

    name: str
    subset: str | None
    split: str
    column: str

    @property
    def place(self) -> Path | None:
        """The folder or file of this machine; None for a dataset of the Hub."""
        return Path(self.name) if Path(self.name).exists() else None


def parse_source(path: str) -> Source:
    """The parts of ``path``; the split is ``train`` and the column ``text`` where it names none.

    Raises:
        ValueError: ``path`` holds no name.
        FileNotFoundError: the name is neither a file or folder here, nor a possible name on the Hub.

    >>> parse_source("hf:owner/name@test")
    Source(name='owner/name', subset=None, split='test', column='text')
    """
    found = _SPELLING.fullmatch(path)
    if found is None:
        raise ValueError(f"{path!r} names no dataset: write {PREFIX}NAME[:CONFIG][@SPLIT][#COLUMN]")
    source = Source(found["name"], found["subset"], found["split"] or "train", found["column"] or "text")
    if source.place is None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.name):
        raise FileNotFoundError(
            f"no dataset at {source.name} (working directory {Path.cwd()}): {PREFIX} takes a folder or file, or a "
            "dataset of the Hugging Face Hub as NAME or OWNER/NAME"
        )
    return source


def rows(path: str) -> Any:
    """The ``datasets.Dataset`` that ``path`` names, memory-mapped, after a check of its column.

    ``datasets`` downloads a dataset of the Hub once per machine, and keeps it.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        ConnectionError: the Hub cannot be reached, and nothing of that name was downloaded before.
        FileNotFoundError: the Hub has no such dataset; no data in a folder.
        ValueError: no such configuration, split or column, or a column that does not hold strings.
    """
    source = parse_source(path)
    datasets = require("datasets", install="datasets")
    try:
        found = _opened(datasets, source)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except ConnectionError as error:
        arguments = f"{source.name!r}, {source.subset!r}, split={source.split!r}"
        raise ConnectionError(
            f"{path}: {error}. Without a connection, name a copy on this machine: where there is one, run "
            f"datasets.load_dataset({arguments}).save_to_disk('FOLDER'), and write {PREFIX}FOLDER"
        ) from None
    except ValueError as error:  # no such configuration or split: the message lists those there are
        raise ValueError(f"{path}: {str(error).rstrip('.')}; write {PREFIX}NAME[:CONFIG][@SPLIT][#COLUMN]") from None
    if source.column not in found.column_names:
        hint = did_you_mean(source.column, found.column_names)
        raise ValueError(
            f"{path} has no column {source.column!r}{hint}: write #COLUMN, one of {', '.join(found.column_names)}"
        )
    kind = getattr(found.features[source.column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise ValueError(f"{path}: the column {source.column!r} holds {kind} and no text: write #COLUMN, another one")
    return found


def _opened(datasets: Any, source: Source) -> Any:
    place = source.place
    if place is None or not place.is_file():
        if place is not None and (place / "state.json").is_file():  # one dataset, by save_to_disk: it has no splits
            if source.subset or source.split != "train":
                raise ValueError(f"{place} was saved as a single split: name neither a configuration nor a split")
            return datasets.load_from_disk(source.name)
        return datasets.load_dataset(source.name, source.subset, split=source.split)
    if place.suffix not in _READERS:
        raise ValueError(f"{place} is none of the files that are read alone: {', '.join(_READERS)}")
    return datasets.load_dataset(_READERS[place.suffix], data_files=source.name, split=source.split)


def text(path: str) -> bytes:
    """All strings of the column that ``path`` names as UTF-8, joined by newlines; rows without a string are left out.

    Raises:
        As `rows`.
    """
    column = parse_source(path).column
    return "\n".join(value for value in rows(path)[column] if value is not None).encode()


def files(path: str) -> list[Path]:
    """The files of this machine that decide the content of ``path``, in a fixed order; none for a dataset of the Hub.

    Raises:
        As `parse_source`.
    """
    place = parse_source(path).place
    if place is None:
        return []
    return sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
