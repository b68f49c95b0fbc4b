"""The state of an interrupted run in one file, from which another process continues it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fpsim.showing import why_unreadable

from .record import Record
from .storage import put_aside, replacing, versions


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, so that another process can continue it.

    Attributes:
        path: of the one file, replaced in one piece; it holds the configuration, weights, optimizer and the records so
            far.
        seconds: the least time between two writes; 0 writes after every step.
        is_own: whether the file belongs to one run by its name, as in a sweep, so that the checkpoint of another run is
            a broken file there. A sweep removes it at the end of the run. Any other file has the last step, too.
    """

    path: Path
    seconds: float = 30.0
    is_own: bool = False

    def write(self, key: str, history: Sequence[Record], state: Mapping[str, Any]) -> None:
        """Replace the file by the ``state`` of the run ``key`` (`fpsim.paper.config.run_key`) and its records."""
        content = {"key": key, "code": _code(), "records": [asdict(record) for record in history], **state}
        with replacing(self.path) as partial:
            torch.save(content, partial)

    def read(self, key: str) -> tuple[list[Record], Mapping[str, Any]] | None:
        """The records and the state of the run ``key``, on the CPU; None if there is no file to continue from.

        A file that is broken is put aside with a warning, since the run can be computed anew. So is one that another
        version of fpsim or torch wrote: a run of two versions would have the bits of neither.

        Raises:
            ValueError: the file is the checkpoint of another run, and not `is_own`.
            OSError: the file cannot be read.
        """
        if not self.path.exists():
            return None
        self.path.open("rb").close()  # for the plain errors of a file that is not readable, or is a folder
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found, code = state["key"], state.get("code")
            known = {entry.name for entry in fields(Record)}
            history = [Record(**{name: row[name] for name in row if name in known}) for row in state["records"]]
        except MemoryError:
            raise
        except Exception as error:  # torch.load raises errors of many kinds for broken files
            reason = f"is broken ({why_unreadable(error)})"
        else:
            if (found, code) == (key, _code()):
                return history, state
            reason = f"was written by {_said(code)}, and this is {_said(_code())}"
            if found != key:
                reason = f"is the checkpoint of run {found}, not of {key}"
                if not self.is_own:
                    raise ValueError(f"{self.path} {reason}: name another file or remove it")
        aside = put_aside(self.path)
        warnings.warn(f"{self.path} {reason}: it is now {aside.name}, and its run starts anew", stacklevel=2)
        return None


def _code() -> dict[str, str]:
    """The versions on which the bits of a run depend."""
    return {"fpsim": versions()["source"], "torch": str(torch.__version__)}


def _said(code: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in code.items()) if code else "an earlier fpsim"
