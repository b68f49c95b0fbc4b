"""The tests of this folder compute in one thread: their matrices are small."""

import pytest


@pytest.fixture(autouse=True)
def small_matrices(one_thread: None) -> None:
    """Each test takes the fixture of all tests."""
