"""Compile runs in a second process, so that the first process finds the code in Inductor's cache on disk.

One compilation keeps little more than one core busy, since half of it is Python. The second process runs this file as a
program. The first process compiles what the second could not.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from .config import RunConfig
from .data import Data
from .training import records


class Ahead:
    """The runs that another process compiles, in order."""

    def __init__(self, process: subprocess.Popen[bytes] | None, names: list[str]) -> None:
        self._process, self._names = process, names

    def wait(self, name: str) -> None:
        """Wait until the run ``name``, if it is one of these, is compiled or the other process has ended."""
        while name in self._names:
            assert self._process is not None and self._process.stdout is not None
            if not self._process.stdout.readline():
                self._names.clear()
            else:
                self._names.pop(0)


@contextmanager
def compile_ahead(configs: Mapping[str, RunConfig]) -> Iterator[Ahead]:
    """Start a process that compiles ``configs`` in order; it ends with the block at the latest."""
    if not configs:
        yield Ahead(None, [])
        return
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdin is not None
            pickle.dump((torch.get_num_threads(), list(configs.values())), process.stdin)
            process.stdin.close()
            yield Ahead(process, list(configs))
        finally:
            process.kill()


def _main() -> None:
    threads, configs = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)  # the number is part of the generated code
    for config in configs:
        tokens = torch.zeros(config.model.context + 2, dtype=torch.uint8)  # the code depends on shapes alone
        next(records(config, Data(tokens, tokens)))
        print(flush=True)


if __name__ == "__main__":
    _main()
