"""What all tests share: hypothesis without a clock, failures printed when they happen, and the marker `promise`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.promises import PROMISES

# On a busy machine a slow example says nothing.
settings.register_profile("fpsim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fpsim")


class FailuresAtOnce:
    """Print each failure when it happens: a run that is ended from outside never reaches its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {report.longreprtext[-2000:]}")


def pytest_configure(config: pytest.Config) -> None:
    """Tell of failures in the one process that reports them."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


def only_promises(config: pytest.Config) -> bool:
    """Whether the tests of promises alone are asked for, as `make quick` does."""
    return config.option.markexpr.startswith("promise")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files without a promise unread: importing all tests takes longer than many of them."""
    if not only_promises(config) or not collection_path.match("test_*.py"):
        return None
    name = collection_path.relative_to(Path(__file__).parent).as_posix()
    return None if any(test.startswith(f"{name}::") for tests in PROMISES.values() for test in tests) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that `promises.py` names."""
    named = {f"tests/{test}" for tests in PROMISES.values() for test in tests}
    for item in items:
        if named & {item.nodeid, item.nodeid.split("[")[0]}:
            item.add_marker(pytest.mark.promise)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what imports have made, and run less often.

    A compilation makes so many objects that the collector takes a tenth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def no_trace_of_the_compiler() -> Iterator[None]:
    """Keep pytest from collecting the log of each compilation: thousands of empty lines, a quarter of the time."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = False
    yield
    trace.propagate = True


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch in one thread: on a busy machine the others wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
