"""Fixtures of the tests of real models."""

import logging
from collections.abc import Iterator

import pytest
import torch

from .measure import deterministic


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic algorithms, one thread, and an empty compiler cache in the process.

    The compiler's trace log is switched off: pytest takes a quarter of the time to collect its thousands of empty
    lines.
    """
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    with deterministic():
        yield
    torch._dynamo.reset()
