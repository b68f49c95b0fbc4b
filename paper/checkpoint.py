"""The state of an interrupted run in one file, from which another process continues it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .record import Record
from .storage import replacing


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, so that another process can continue it.

    Attributes:
        path: of the one file, replaced in one piece; it holds weights, optimizer and the records so far.
        seconds: the least time between two writes; 0 writes after every step.
    """

    path: Path
    seconds: float = 30.0

    def write(self, key: str, history: Sequence[Record], state: Mapping[str, Any]) -> None:
        """Replace the file by the ``state`` of the run ``key`` (`fpsim.paper.config.run_key`) and its records."""
        with replacing(self.path) as partial:
            torch.save({"key": key, "records": [asdict(record) for record in history], **state}, partial)

    def read(self, key: str) -> tuple[list[Record], Mapping[str, Any]] | None:
        """The records and the state of the run ``key``, on the CPU; None if there is no file.

        Raises:
            ValueError: the file is the checkpoint of another run.
        """
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["key"] != key:
            raise ValueError(
                f"{self.path} is the checkpoint of run {state['key']}, not of {key}: name another file or remove it"
            )
        known = {entry.name for entry in fields(Record)}
        rows = [{name: value for name, value in row.items() if name in known} for row in state["records"]]
        return [Record(**row) for row in rows], state
