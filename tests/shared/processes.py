"""New processes for tests, forked from a server that has imported torch and has compiled once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.shared.preloaded"])


def in_a_new_process(work: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """The result of ``work(*arguments)``, run by a process that knows nothing of this one.

    Args:
        work: a function at the top level of a module, so that it can be pickled, as its arguments and its result.
        environment: environment variables to set. Those that torch reads while it is imported come too late.
    """
    with ProcessPoolExecutor(1, CONTEXT, initializer=_set, initargs=(environment,)) as pool:
        return pool.submit(work, *arguments).result()


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)
