"""What all tests share: hypothesis without a clock, and failures that are told when they happen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch in one thread: on a busy machine the others wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
