"""Fixtures of the tests of real models."""

from collections.abc import Iterator

import pytest
import torch

from .measure import deterministic


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Deterministic algorithms, one thread, and an empty compiler cache in the process."""
    torch._dynamo.reset()
    with deterministic():
        yield
    torch._dynamo.reset()
