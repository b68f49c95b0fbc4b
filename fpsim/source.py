"""Hashes of fpsim's own source, which distinguish compiled code and results of different versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

#: The packages of fpsim. Their folders are side by side in the repository; in a wheel the others are inside the first.
PACKAGES = ("fpsim", "fpsim.reference", "fpsim.compile_backend", "fpsim.paper")

#: The suffixes of files that can affect a result.
ENDINGS = (".py", ".cpp", ".h", ".cu")

#: The files that determine every bit of a rounding on the CPU. The record of the exhaustive proofs states their hash.
#: When it changes, prove again with ``make prove``.
PROVEN = (
    "formats/float.py",
    "formats/modes.py",
    "formats/names.py",
    "rounding/carriers.py",
    "rounding/cpp_functions.py",
    "rounding/cpu.py",
    "rounding/definitions.py",
    "rounding/float_forms.py",
    "rounding/inductor.py",
    "rounding/kernel.py",
    "rounding/random_words.py",
    "rounding/recording.py",
    "rounding/tensors.py",
)

#: The files that determine the codes of the scales of OCP MX. ``make prove-scales`` proves them again.
SCALES_PROVEN = (*PROVEN, "scaling/rules.py")


@lru_cache(maxsize=1)
def source_hash() -> str:
    """The hash of all source files of fpsim, in all folders: 64 hexadecimal digits.

    It is part of every cache key, so that code of another version is never used.
    """
    return hash_of_folders({package: _folder(package) for package in PACKAGES})


@lru_cache(maxsize=2)
def proven_hash(files: tuple[str, ...] = PROVEN) -> str:
    """The hash of ``files``: 12 hexadecimal digits."""
    folder = _folder("fpsim")
    return _digest((name, folder / name) for name in files)[:12]


def hash_of_folders(folders: Mapping[str, Path]) -> str:
    """The hash of the names and contents of all source files in ``folders`` and in the folders inside them.

    Args:
        folders: the folders, with names that do not depend on their location.
    """
    files = (
        (f"{name}/{file.relative_to(folder).as_posix()}", file)
        for name, folder in sorted(folders.items())
        for file in sorted(folder.rglob("*"))
        if file.suffix in ENDINGS
    )
    return _digest(files)


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: install fpsim again", name=package)
    return Path(next(iter(spec.submodule_search_locations)))
