"""Fixtures of the tests of curvature."""

import pytest


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every test of this folder runs torch in one thread: its matrices are small."""
