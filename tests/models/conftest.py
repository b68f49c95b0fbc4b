"""What the tests of real models share: nothing compiled before, and no trace of the compiler's."""

import logging
from collections.abc import Iterator

import pytest
import torch

from .measure import deterministic


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic algorithms, one thread, nothing compiled before.

    The trace of each compilation, thousands of empty lines for pytest to collect, is a quarter of the time.
    """
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    with deterministic():
        yield
    torch._dynamo.reset()
